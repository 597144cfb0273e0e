"""Bad input gives an error of at most three lines and an exit status, and leaves no file: a table, and fuzzed input.

Most tests call `main` in this process; none of these reaches training.
"""

import contextlib
import functools
import importlib
import io
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import yaml
from conftest import ROOT, counted, long_tier, tiered
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from qbench.analysis.step_cost import CostEstimator, StepCost
from qbench.cli.main import main as cli
from qbench.config import compose, groups
from qbench.cost.count import count_macs
from qbench.errors import CheckpointError
from qbench.models import mlp
from qbench.training.checkpoint import load_torch_file, pack, unpack
from qbench.training.initial_weights import InitialWeights, load_initial_weights

SECONDS = 20
"""Time limit of a command in tests; the target of 5 s is for an idle machine."""
BYTES = 2**31
"""Memory limit of a command, besides what the tests hold."""

GLOBAL = "# @package _global_\n"
USER_MODULE = "mine.py"
HUGE = "9" * 400


class Answer(NamedTuple):
    status: int
    stdout: str
    stderr: str


class TooLong(BaseException):
    """Raised past the command line, which catches `Exception` only."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise if the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TooLong(f"not finished in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cli(words: list[str]) -> Answer:
    """Run a command line in this process, within the limits of time and memory."""
    out, err = io.StringIO(), io.StringIO()
    path = list(sys.path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    try:
        with at_most(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli(words)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        sys.path[:] = path
        sys.modules.pop("mine", None)
    return Answer(status, out.getvalue(), err.getvalue())


def never(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("training started")


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory inside another one; training is refused, and no command changes torch's threads."""
    work = tmp_path / "outer" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr("qbench.experiment.run._train", never)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return work


def plant(folder: Path, files: Mapping[str, str | bytes | Callable[[Path], object]]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    importlib.invalidate_caches()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the files below a folder with their bytes, to find any that a command leaves or changes."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def row(words: str | list[str], phrase: str, status: int = 2, name: str = "", **files: Any) -> Any:
    """A row of the table: the command line, a phrase of its output, its exit status, `files` written before."""
    split = words.split() if isinstance(words, str) else words
    return pytest.param(split, phrase, status, files.get("files", {}), id=(name or " ".join(split))[:60])


def experiment(name: str, text: str | bytes, phrase: str) -> Any:
    """A row: a user's experiment file with this text."""
    content = GLOBAL.encode() + text if isinstance(text, bytes) else GLOBAL + text
    words = "plan --config-dir=c experiment=bad"
    return row(words, phrase, 2, f"yaml: {name}", files={"c/experiment/bad.yaml": content})


def group(kind: str, text: str, phrase: str, status: int = 2) -> Any:
    """A row: a user's file in one of the groups."""
    name = f"{kind}: {text}".replace("\n", "; ")
    return row(f"plan --config-dir=c {kind}=bad", phrase, status, name, files={f"c/{kind}/bad.yaml": text})


def own_function(words: str, source: str, phrase: str, status: int) -> Any:
    """A row: a user's function."""
    return row(words, phrase, status, f"user function: {source}"[:60], files={USER_MODULE: source})


def start(name: str, content: Any, phrase: str, status: int = 4) -> Any:
    """A row: a checkpoint to start from."""
    return row("method=dorefa init=start.pt", phrase, status, f"init: {name}", files={"start.pt": content})


def log(name: str, config: str | bytes, phrase: str) -> Any:
    """A row: `compare` on a run without result.json, whose config.yaml is this."""
    final = '{"kind": "final", "step": 1, "test_top1": 50.0, "test_top5": 90.0, "test_loss": 1.0}\n'
    files = {"o/d/run/config.yaml": config, "o/d/run/metrics.jsonl": final}
    return row("compare o", phrase, 0, f"config.yaml: {name}", files=files)


def bomb(first: str = "[x, x, x, x, x, x, x, x, x]", merge: bool = False) -> str:
    """Nine levels of nine references: 400 million values in half a kilobyte."""
    lines = [f"k0: &k0 {first}"]
    for level in range(1, 9):
        nine = ", ".join([f"*k{level - 1}"] * 9)
        lines.append(f"k{level}: &k{level} {{<<: [{nine}]}}" if merge else f"k{level}: &k{level} [{nine}]")
    return "\n".join(lines) + "\n"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def saved(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no tensors here")


LINES = [
    row("trian", "trian: not a subcommand and not KEY=VALUE"),
    row("method=dorefa oops", "oops: not a subcommand and not KEY=VALUE"),
    row("method=dorfa", "did you mean dorefa?"),
    row("metod=dorefa", "metod: no such key; did you mean method?"),
    row("model.widht=3", "did you mean model.width?"),
    row("+bits.x=3", "bits.x: no such key"),
    row("method=null", "method=null: no such method"),
    row("method=[1]", "method=[1]: must be one value, not a list\ntype method=1"),
    row("method={a:1}", "method"),
    row("experiment=nope", "experiment=nope: no such experiment"),
    row("optim@nosuch=adam", "optim@nosuch"),
    row("activation=nope method=dorefa", "activation=nope: no such activation"),
    row("bits.w=two", "bits.w=two: must be a whole number"),
    row("bits.w=0", "bits.w=0: must be a number from 1 to 32"),
    row("bits.w=1.5", "bits.w=1.5: must be a whole number"),
    row("bits.w=[1,2]", "bits.w=[1, 2]: must be a whole number\none run for each value: -m bits.w=1,2"),
    row("bits.w=1,2", "found several values"),
    row("bits=w99", "bits.w=99"),
    row("bits=", "must be like w2"),
    row("optim.lr=nan", "optim.lr=nan: must be a number above 0"),
    row("optim.lr=1e400", "optim.lr=inf: must be a number above 0"),
    row("optim.lr=-1", "optim.lr=-1"),
    row("optim.lr=", "optim.lr=: must be a number"),
    row(f"optim.lr={HUGE}", "out of range"),
    row("epochs=-1", "epochs=-1: must be a number from 0"),
    row("epochs=${nowhere}", "'nowhere' not found"),
    row("epochs=${epochs}", "Recursive interpolation"),
    row("~epochs", "~epochs: this key cannot be removed"),
    row("seed=-1", "seed=-1"),
    row("seed=99999999999999999999", "seed=99999999999999999999: must be a number from 0"),
    row("rerun=maybe", "rerun=maybe: must be true or false"),
    row(f"model.width={HUGE}", "a number up to 64 bits"),
    row("model.width=1000000", "out of memory", 5),
    row("dataset=synthetic dataset.train=9000000000000000000", "out of memory", 5),
    row("model.width=0", "model.width=0: must be 1 or more"),
    row("model.width=nan", "model.width=nan: must be a whole number"),
    row("dataset.val=0.9999", "leaves no images to train on"),
    row("layers.first=abc", "layers.first=abc: must be float, same"),
    row("layers.rules={nosuch:8} method=dorefa", "layers.rules[nosuch]: matches no layer"),
    row("layers.rules=3", "layers.rules=3: must be a group of keys"),
    row("runtime.device=nope", "runtime.device=nope: must be one of auto, cpu, cuda"),
    row("distill.temperature=3 method=dorefa", "no effect without a teacher"),
    row("distill=kd distill.teacher=nowhere method=dorefa", "distill.teacher=nowhere: no such directory"),
    row("distill=kd distill.teacher=. method=dorefa", "distill.teacher=.: cannot read best.pt: No such file"),
    row("--nope", "--nope: no such flag"),
    row("--cfg nope", "--cfg nope: must be job, hydra, all"),
    row("--config-dir=/nowhere", "--config-dir /nowhere: no such directory"),
    row("-m bits.w=two", "bits.w=two"),
    row("-m bits.w=1,two", "bits.w=two"),
    row("-m method=dorefa,dorfa", "method=dorfa: no such method"),
    row("-m seed=range(0,1000000000)", "the sweep has more than 10,000 combinations"),
    row("-m bits.w=choice()", "bits.w=choice(): not valid as KEY=VALUE"),
    row("hydra/launcher=joblib", "put -m first"),
    row("-m hydra/launcher=nope seed=0", "hydra/launcher=nope: no such launcher"),
    row("-m hydra/launcher=joblib hydra.launcher.n_jobs=many seed=0", "hydra.launcher.n_jobs=many"),
    row("-m hydra/launcher=joblib hydra.launcher.nosuch=1 seed=0", "hydra.launcher.nosuch=1"),
    row("-m hydra.launcher.n_jobs=2 seed=0", "no effect without hydra/launcher"),
    row("hydra.run.dir=elsewhere", "hydra.run.dir=elsewhere: qbench does not use this key"),
    row("hydra.searchpath=[file:///nowhere]", "path=/nowhere is not available"),
    row("=3", "=3: not a subcommand and not KEY=VALUE"),
    row(["a b=3"], "a b=3: not valid as KEY=VALUE"),
    row(["method=" + "x" * 300], "no such method", name="300 characters"),
    row(["bits.w=" + "x" * 100_000], "xxx ... xxx", name="100,000 characters"),
    row(["bits.w=" + "9" * 5000], "4300 digits", name="5,000 digits"),
    row(["optim.lr=" + "[" * 2000], "[[ ... [[", name="2,000 brackets"),
    row(["layers.rules=" + "{a:" * 500 + "1" + "}" * 500], "nested too deeply", name="500 levels"),
    row(['method="a\x1b[31mb"'], r"method=a\x1b[31mb: no such method", name="an escape sequence"),
    row(["method=a\nb"], "not valid as KEY=VALUE", name="a newline"),
    row(["method=a\n\nb\nc\nd\ne"], "method=a", name="many newlines"),
    row(["\x00"], r"\x00: not a subcommand", name="a zero"),
    row(["model.width=\udcff"], r"\udcff", name="bytes that are no text"),
]  # fmt: skip

PATHS = [
    row("out=", "out=: must be text of one or more"),
    row(['out="a\x1bb"'], r"out=a\x1bb: must be", name="out with a control character"),
    row(['out="a\nb"'], "out=a", name="out with a newline"),
    row(['out="a\x00b"'], "out=a", name="out with a zero"),
    row("out=null", "out=None"),
    row(["out=" + "x" * 300], "File name too long", 5, name="out of 300 characters"),
    row("out=/proc/nowhere", "cannot write /proc/nowhere", 5),
    row("out=file", "cannot write file/", 5, files={"file": "a file"}),
    row("out=file/../file/below", "cannot write file/", 5, files={"file": "a file"}),
    row("out=../../x method=dorfa", "no such method"),
    row("init=nowhere", "init=nowhere: no such file or directory"),
    row("init=", "init=: no such file or directory"),
    row(["init=" + "y" * 300], "no such file or directory", name="init of 300 characters"),
    row("init=.", "cannot read best.pt: No such file"),
    row("init=/dev/zero", "not a regular file"),
    row("init=pipe", "not a regular file", files={"pipe": os.mkfifo}),
    row("init=method", "must be one of auto, float, scratch"),
    start("an empty file", b"", "is not a readable checkpoint"),
    start("text", "these are no weights\n", "is not a readable checkpoint"),
    start("code in a pickle", pickle.dumps(Evil()), "is not a readable checkpoint"),
    start("code in a checkpoint", saved({"model": Evil()}), "is not a readable checkpoint"),
    start("an archive of something else", archive, "is not a readable checkpoint"),
    start("a tensor", saved(torch.zeros(2)), "contains a Tensor, not a state_dict"),
    start("another network", saved({"fc.weight": torch.zeros(2, 3)}), "does not fit the network"),
    start("bytes cut off", pack({"model": {"x": torch.zeros(9)}})[:-80], "start.pt"),
    start("a byte changed", pack({"model": {"x": torch.zeros(9)}}).replace(b"model", b"madel", 1), "is damaged"),
]  # fmt: skip

DATA = [
    row("dataset=mnist dataset.root=/nowhere", "files are missing in /nowhere/MNIST/raw", 3),
    row("dataset=mnist dataset.root=3", "dataset.root=3: must be a word"),
    row("dataset=mnist dataset.root=file", "files are missing", 3, files={"file": "a file"}),
    row("dataset=cifar10 dataset.root=d", "files are missing in", 3, files={"d/cifar-10-batches-py/readme.html": ""}),
    row(
        "dataset=mnist dataset.root=d", "damaged or truncated", 3, "cut MNIST files",
        files={f"d/MNIST/raw/{part}": b"\0\0\x08" for part in (
            "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
        )},
    ),
]  # fmt: skip

FILES = [
    experiment("alias bomb", bomb(), "too large"),
    experiment("merge bomb", bomb("{x: 1}", merge=True), "too large"),
    experiment("a list that holds itself", "claim: &a {x: [*a]}\n", "too large"),
    experiment("10 MB of nesting", "[" * 10_000_000, "too large"),
    experiment("2,000 levels", "claim: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
    experiment("python tag", "claim: !!python/object/apply:os.system ['touch pwned']\n", "object/apply:os.system"),
    experiment("unknown tag", "epochs: !nosuch 3\n", "'!nosuch'"),
    experiment("duplicate keys", "epochs: 3\nepochs: 4\n", "line 3: epochs occurs twice"),
    experiment("binary", bytes(range(128, 256)), "not valid YAML"),
    experiment("tab", "\tepochs: 3\n", r"found character '\t'"),
    experiment("unclosed quote", "out: 'abc\n", "unexpected end of stream"),
    experiment("list at top", "- a\n- b\n", "contains ['a', 'b']"),
    experiment("text at top", "just text\n", "contains 'just text'"),
    experiment("undefined alias", "epochs: *nowhere\n", "undefined alias 'nowhere'"),
    experiment("two documents", "---\nepochs: 3\n---\nepochs: 4\n", "another document"),
    experiment("key that is a list", "? [a, b]\n: 3\n", "unhashable key"),
    experiment("null as key", "null: 4\n", "Incompatible key type"),
    experiment("set", "x: !!set {a, b}\n", "not a supported primitive type"),
    experiment("bytes", "model: {width: !!binary aGk=}\n", "model.width=b'hi'"),
    experiment("number as key of a model", "model: {x: {3: 4}}\n", "a key must be text"),
    experiment("unknown key", "optim: {nosuch: 1}\n", "optim.nosuch: no such key"),
    experiment("wrong type", "epochs: {a: 1}\n", "epochs={'a': 1}: must be a whole number"),
    experiment("nan", "epochs: .nan\n", "epochs=nan"),
    experiment("a value for a group", "bits: 8\n", "bits=8: must be a group of keys"),
    experiment("rules as list", "layers: {rules: [a]}\n", "layers.rules=['a']: must be a group of keys"),
    experiment("broken interpolation", "x: ${\n", "no viable alternative"),
    experiment("includes itself", "defaults:\n  - /experiment/bad\n", "contains itself"),
    experiment("defaults that are none", "defaults: 3\n", "defaults must be a list"),
    experiment("unknown default", "defaults:\n  - override /method: dorfa\n", "did you mean dorefa?"),
    row("plan --config-dir=c experiment=bad", "# @package _global_", name="yaml: empty",
        files={"c/experiment/bad.yaml": ""}),
    row("plan --config-dir=c", "--config-dir c: no such directory", files={"c": "a file"}),
    group("method", "name: nosuch\nbits: w2\n", "method=nosuch: no such method"),
    group("method", "bits: w2\n", "method.name is missing"),
    group("method", "name: dorefa\nbits: [w2]\n", "must be like w2"),
    group("method", "name: dorefa\nbits: w2\nnosuch: 3\n", "method.nosuch: dorefa has no such key"),
    group("model", "name: resnet8\nfamily: ../x\n", "model=../x: no such model"),
    group("model", "name: mlp\nwidth: abc\n", "model.width=abc: must be a whole number"),
    group("dataset", "name: digits\nrecipe: 3\n", "dataset.recipe"),
    group("optim", "lr: 0.1\nmilestones: 3\n", "optim.milestones=3: must be a list"),
    group("layers", "first: 8.5\n", "layers.first=8.5: must be float, same"),
    group("runtime", "device: [cpu]\n", "runtime.device=['cpu']: must be text"),
    log("alias bomb", bomb(), "too large"),
    log("python tag", "seed: !!python/object/apply:os.system ['touch pwned']\n", "corrupt"),
    log("binary", bytes(range(256)), "corrupt"),
    log("a list", "- 1\n- 2\n", "corrupt"),
    log("nothing", "", "corrupt"),
    log("nested", "a: " + "[" * 5000, "nested too deeply"),
    row("distill=kd distill.teacher=t method=dorefa", "t/best.pt is damaged", 4, "teacher: alias bomb",
        files={"t/config.yaml": bomb(), "t/best.pt": b"unread"}),
    row("settle t method=dorefa", "config.yaml is not valid: t/config.yaml: too large", 4, "settle: alias bomb",
        files={"t/config.yaml": bomb()}),
]  # fmt: skip

OWN_CODE = [
    row("method=no.such:module", "No module named 'no'"),
    row("method=os:nosuch", "nosuch is not in module os"),
    row("method=os:environ", "environ is not a function"),
    row("method=:", "package.module:function"),
    row("method=..:b", "package.module:function"),
    row("method=os:system", "its argument command has no value; qbench tried build(*, w=2, a=32, g=32)"),
    row("method=builtins:exit", "SystemExit", 1),
    row("describe no.such:x", "No module named 'no'"),
    own_function("method=mine:f", "def f(:\n", "SyntaxError", 1),
    own_function("method=mine:f", "1 / 0\n", "ZeroDivisionError: division by zero", 1),
    own_function("method=mine:f", "import sys\nsys.exit()\n", "SystemExit", 1),
    own_function("method=mine:f", "import nosuch\n", "No module named 'nosuch'", 2),
    own_function("method=mine:f", "def f(*, w=2, a=32, g=32): return None\n", "returned a NoneType, not a Method", 2),
    own_function("method=mine:f", "def f(*, w=2, a=32, g=32): raise KeyError('planted')\n", "KeyError: 'planted'", 1),
    own_function("model=mine:f", "def f(shape, classes): raise KeyError('planted')\n", "KeyError: 'planted'", 1),
    own_function("model=mine:f", "def f(shape, classes): return 3\n", "returned a int, not a torch.nn.Module", 2),
    own_function("model=mine:f", "def f(): pass\n", "returned a NoneType, not a torch.nn.Module", 2),
    own_function("model=mine:f", "def f(a, b): pass\n", "its argument a has no value; qbench tried Net(), Net(num_", 2),
    own_function("dataset=mine:f", "def f(): return None\n", "dataset=mine:f: the function returned a NoneType", 3),
    own_function("dataset=mine:f", "def f(): raise OSError(28, 'No space left')\n", "No space left", 5),
    own_function("dataset=mine:f", "def f(): raise RuntimeError('\\x1b]0;a title')\n", r"\x1b]0;a title", 1),
]  # fmt: skip

SUBCOMMANDS = [
    row("describe", "describe needs exactly one method"),
    row("describe dorfa", "did you mean dorefa?"),
    row("describe ../../setup", "no such method"),
    row("list nosuch", "list nosuch: no such group"),
    row("list methods now", "list methods now: no such group"),
    row("list method", "did you mean methods?"),
    row("list runs nowhere", "nowhere: no such directory"),
    row("compare", "compare needs a directory of runs"),
    row("compare nowhere", "nowhere: no such directory"),
    row(["compare", ""], "no such directory", name="compare nothing"),
    row(["compare", "x" * 300], "no such directory", name="compare 300 characters"),
    row("compare --format xml .", "compare --format xml"),
    row("compare --nope .", "no such flag: --nope"),
    row("compare file", "file: not a record of runs", files={"file": "a file"}),
    row("check", "check needs exactly one method"),
    row("check dorfa", "did you mean dorefa?"),
    row("check dorefa bits.w=40", "bits.w=40"),
    row("check dorefa model.width=3", "model.width=3 has no effect on check"),
    row("plan oops", "oops: not a subcommand and not KEY=VALUE"),
    row("plan -m bits=w2,w99", "bits.w=99"),
    row("plan --nope", "--nope: no such flag"),
    row("check dorefa --all", "check: no such flag: --all"),
    row("check dorefa ttq", "check needs exactly one method, found 2"),
    row("describe dorefa ttq", "describe needs exactly one method or run directory, found 2"),
    row("completion", "completion without a shell: must be bash"),
    row("completion zsh", "completion zsh: must be bash"),
    row("compare . --format", "compare --format needs a value"),
    row("compare . --form=text", "compare: no such flag: --form=text; did you mean --format?"),
    row("compare . --published=yes", "compare --published: ignored explicit argument 'yes'"),
    row("compare . --columns accuracy,bytes", "compare --columns bytes"),
    row("evaluate", "evaluate needs exactly one run directory, found 0"),
    row("evaluate . .", "evaluate needs exactly one run directory, found 2"),
    row("evaluate . --weights worst", "evaluate --weights worst"),
    row("inspect . --images many", "inspect --images many: must be a whole number from 1 on"),
    row("inspect . --sort leave-one", "inspect --sort leave-one; did you mean leave-one-in?"),
    row("sensitivity . --widths 2,x", "sensitivity --widths 2,x: must be numbers from 1 to 31"),
    row("plot", "plot needs exactly one method, found 0"),
    row("plot twn --out twn.bmp", "plot --out twn.bmp: unknown file format"),
    row("published ttq", "published: unexpected argument: ttq"),
    row("published --paper ttk", "no such paper; did you mean ttq?"),
    row("published --provenance verfied", "published --provenance verfied; did you mean verified?"),
    row("settle a", "settle needs two settings, found 1"),
    row("settle a b --margin -1", "settle --margin -1: must be a number of points"),
]  # fmt: skip


TABLES = (LINES, PATHS, DATA, FILES, OWN_CODE, SUBCOMMANDS)
"""Every third row of each table is tested in the fast tier."""


@pytest.mark.parametrize(
    ("words", "phrase", "status", "files"),
    [
        pytest.param(*one.values, id=one.id, marks=[pytest.mark.full] if i % 3 else [])
        for rows in TABLES
        for i, one in enumerate(rows)
    ],
)
def test_bad_input(
    words: list[str], phrase: str, status: int, files: Mapping[str, Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(workdir, files)
    before = tree(workdir.parent)
    got = run_cli(words)
    assert got.status == status, got
    assert phrase in (got.stderr if status else got.stdout), got
    _is_short(got)
    if status:
        assert not got.stdout, got
        assert got.stderr.startswith("qbench: "), got
    assert tree(workdir.parent) == before


def _is_short(got: Answer) -> None:
    lines = got.stderr.splitlines()
    assert len(lines) <= 3, got
    assert all(len(line) <= 1100 and line.isprintable() for line in lines), got
    assert "Traceback" not in got.stderr, got
    assert bool(lines) == bool(got.status), got


PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
ODD = {
    "OMP_NUM_THREADS": "garbage", "MKL_NUM_THREADS": "-3", "CUDA_VISIBLE_DEVICES": "garbage", "MPLBACKEND": "garbage",
    "TERM": "dumb", "COLUMNS": "0", "LINES": "x", "HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere",
    "LANG": "xx_YY.UTF-99", "PYTHONIOENCODING": "ascii:strict", "QBENCH_NOSUCH": "1", "HYDRA_FULL_ERROR": "garbage",
    "PYTHONWARNINGS": "error", "PYTHONSAFEPATH": "1", "XDG_CACHE_HOME": "/proc/nowhere", "PATH": "/proc/nowhere",
}  # fmt: skip
SMOKE = ["experiment=smoke", "method=dorefa", 'out="öß"']


def run_process(words: list[str], work: Path, environment: Mapping[str, str], **streams: Any) -> Answer:
    """Run a command line in a new process with its own environment."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    fresh = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
    line = [sys.executable, "-m", "qbench", *words]
    done = subprocess.run(line, cwd=work, env=os.environ | fresh | environment, timeout=120, text=True, **streams)
    return Answer(done.returncode, done.stdout or "", done.stderr or "")


@pytest.mark.parametrize(
    ("words", "environment", "status", "phrase"),
    [
        (['out="öß"', "method=dorfa"], PLAIN, 2, "method=dorfa"),
        (["plan", 'out="öß"'], PLAIN, 2, r"out=\udcc3\udcb6\udcc3\udc9f: must be"),
        (["plan", 'out="öß"', "--cfg", "job"], {"PYTHONIOENCODING": "ascii:strict"}, 0, r"out: \xf6\xdf"),
        (["--cfg", "job"], {"TMPDIR": "/proc/nowhere"}, 0, "threads: 1"),
        (["method=dorfa"], {"HYDRA_FULL_ERROR": "1", "QBENCH_TRACEBACK": "", "COLUMNS": "garbage"}, 2, "method=dorfa"),
        pytest.param(
            ["runtime.device=cuda"], {"CUDA_VISIBLE_DEVICES": "-1"}, 2, "this CUDA device is not available",
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list | dict) else None,
)  # fmt: skip
def test_bad_environment(
    words: list[str], environment: Mapping[str, str], status: int, phrase: str, tmp_path: Path
) -> None:
    got = run_process(words, tmp_path, environment)
    assert got.status == status, got
    assert phrase in got.stdout + got.stderr, got
    _is_short(got)
    assert not tree(tmp_path)


@pytest.mark.parametrize("keys", tiered([list(ODD), *([key] for key in ODD)], []), ids=lambda keys: keys[0])
def test_a_run_in_an_odd_environment(keys: list[str], tmp_path: Path) -> None:
    got = run_process(SMOKE, tmp_path, {key: ODD[key] for key in keys})
    assert got.status == 0, got
    assert "Traceback" not in got.stderr, got
    assert {path.name for path in tmp_path.iterdir()} == {"öß"}


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        got = run_process(["list", "methods"], tmp_path, {}, stdout=full)
        assert got == (5, "", "qbench: No space left on device\n")
        assert run_process(["list", "method"], tmp_path, {}, stderr=full).status == 2
    reader, writer = os.pipe()
    os.close(reader)
    assert run_process(["list", "methods"], tmp_path, {}, stdout=writer) == (0, "", "")
    os.close(writer)


def test_a_home_directory_that_does_not_exist(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    got = run_cli(["dataset=mnist", 'dataset.root="~/x"'])
    assert got.status == 3, got
    assert "missing in /proc/nowhere/x/MNIST" in got.stderr, got
    monkeypatch.delenv("HOME")
    assert run_cli(["dataset=mnist", 'dataset.root="~/x"']).status == 3


def test_a_deleted_working_directory(workdir: Path) -> None:
    gone = workdir / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert run_cli(["plan"]) == (5, "", "qbench: the working directory no longer exists; change to another directory\n")


# Fuzzing. The seed of a shard decides its examples; a failure prints the example.

VALID = """\
method=dorefa bits.w=2
-m method=dorefa bits=w2a2,w4a4 seed=0,1
-m method=dorefa bits=w8,w2a2g6 seed=0 out=outputs/readme/digits
-m method=dorefa bits=w2 seed=0 optim=adam,adam_cosine,sgd
-m method=dorefa,hwgq,bwn,xnor bits=w1a1 seed=0 hydra/launcher=joblib
-m method=dorefa bits.w=1,2 hydra/launcher=joblib hydra.launcher.n_jobs=2
method=ttq activation=hwgq
method=bwn activation=dorefa bits.a=2
method=dorefa bits.w=2 distill=kd
method=dorefa distill=kd distill.temperature=4 distill.weight=0.5
method=dorefa bits=w2a2 runtime.activation_memory=codes
method=dorefa bits=w2a2 runtime.precision=bf16
-m experiment=claims/ttq_twn method=ttq,twn seed=0,1
experiment=smoke method=inq model.width=4
experiment=claims/dorefa_noise method=dorefa bits=w2a2g2 method.deviation=none
method=lsq bits=w3a3 model=resnet20 optim.lr=0.01 optim.batch_size=128
method=pact bits=w4a4 dataset=synthetic dataset.size=8 dataset.train=64
method=slq bits.w=5 layers.first=8 layers.last=8
method=eslq model=lenet epochs=3 pretrain.epochs=2
method=gupta bits=w16a16g16 model=mlp model.width=16
method=qcnn bits.w=1 epochs=2
method=qd bits.w=4 distill=none
method=dq bits.w=4 seed=3
method=ptq bits=w8a8 dataset.val=0.2
method=uniform bits=w4a4 'layers.rules={layer1.*:8,fc:float}'
method=twn init=scratch rerun=true
method=hwgq bits.a=2 optim=sgd_step +optim.nesterov=true
method=mlq bits.w=2 optim.ema=0.99 optim.clip_norm=1.0 optim.label_smoothing=0.1
method=float init=float optim.milestones=[0.5,0.75]
method=xnor dataset=mnist dataset.root=data --cfg job
""".splitlines()
SUBCOMMAND_LINES = [
    "list methods",
    "list runs out",
    "describe dorefa",
    "compare out --format md",
    "check dorefa bits.w=2",
]
ODD_WORDS = (
    "", "nan", "-inf", "-1", "0", "1e999", "1e-999", HUGE, "9" * 5000, "null", "true", "[1,2]", "[]", "{a:1}", "{}",
    "${seed}", "${oc.env:PATH}", "${oc.decode:x}", "${", "'", '"', "\\", "\x00", "\x1b[2J", "\n", "\t", " ", "\udcff",
    "x" * 300, "../..", "~", "1,2,3", "range(0,9)", "range(1e9)", "choice(", "choice(1,2)", "glob(*)", "sort(2,1)",
    "shuffle(1,2)", "int(x)", "str(1)", "???", "öß", "٣", "a.b.c", "a/b", "@", "+", "++", "--", "=", ":", "/dev/zero",
    "w2a2", "dorefa", "ttq", "kd", "scratch", "none", "3.7", "1_000", "0x10", "1e3", ".", "/", "*", "no", "on",
)  # fmt: skip
PLACES = st.integers(0, 10**6)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["letter", "cut", "value", "key", "number", "drop", "twice", "swap", "graft", "graft"]),
        PLACES, PLACES, st.one_of(st.sampled_from(ODD_WORDS), st.text(max_size=6)),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def edited(words: list[str], edits: list[tuple[str, int, int, str]], others: list[list[str]]) -> list[str]:
    """Return a command line with random edits."""
    words = list(words)
    for kind, place, spot, text in edits:
        i = place % len(words) if words else 0
        word = words[i] if words else ""
        at = spot % (len(word) + 1)
        key, _, _ = word.partition("=")
        other = others[spot % len(others)]
        changed = {
            "letter": [word[:at] + text[:2] + word[at + 1 :]],
            "cut": [word[:at] + text + word[at + spot % 7 :]],
            "value": [f"{key}={text}"],
            "number": [f"{key}={place % 40 - 3}"],
            "key": [f"{key[:at]}{text}{word[len(key) :]}"],
            "drop": [],
            "twice": [word, word],
            "swap": [*words[i + 1 : i + 2], word],
            "graft": [word, other[place % len(other)]],
        }[kind]
        words[i : i + (2 if kind == "swap" else 1)] = changed
    return words


def fuzz(check: Callable[..., None], shard: int, count: int, *examples: st.SearchStrategy[Any]) -> None:
    """Check `count` random examples; the number of the shard is the seed."""
    harmless = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    def one(values: tuple[Any, ...]) -> None:
        note(f"shard {shard}")
        check(*values)

    drawn = settings(
        max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=harmless,
        phases=[Phase.generate],  # shrinking takes minutes, and the examples are small anyway
    )  # fmt: skip
    seed(shard)(drawn(given(st.tuples(*examples))(one)))()


def shards(total: int, each: int) -> list[Any]:
    """One shard of 10 examples for the fast tier, and the shards of the full tier."""
    return [(0, 10), long_tier(0, 40), *(long_tier(n, each) for n in range(1, total // each + 1))]


@pytest.fixture
def quick(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands without their slow parts: no timing, no property checks, small sweeps."""
    monkeypatch.setattr(CostEstimator, "_step_cost", lambda self, setup, model: StepCost(0.0, 0.0, 0.0))
    monkeypatch.setattr("qbench.check.kit.check", lambda subject: [])
    monkeypatch.setattr(compose, "MOST_COMBINATIONS", 4)
    counts: dict[tuple[str, Any], dict[str, int]] = {}

    def count(model: torch.nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
        key = str(model), shape
        if key not in counts:
            counts[key] = count_macs(model, shape)
        return counts[key]

    monkeypatch.setattr("qbench.experiment.setup.count_macs", count)
    return workdir


@functools.cache
def lines() -> list[list[str]]:
    return [[word.strip("'") for word in line.split()] for line in VALID]


def run_checked(words: list[str]) -> Answer:
    """Run any command line; check its status, its message and its memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    note(f"qbench {words}")
    got = run_cli(words)
    user_code = any(re.match(r"[+~]*(method|model|dataset|activation)\b.*:", word) for word in words)
    assert got.status in (0, 2, 3, 4, 5) or (user_code and got.status == 1), got
    _is_short(got)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES, got
    return got


@pytest.mark.parametrize(("shard", "count"), shards(5000, 500))
def test_fuzzed_command_lines(shard: int, count: int, quick: Path) -> None:
    statuses: dict[int, int] = {}

    def check(line: int, edits: list[tuple[str, int, int, str]]) -> None:
        if line < len(lines()):
            words = ["plan", *edited(lines()[line], edits, lines())]
        else:
            subcommand, *words = SUBCOMMAND_LINES[line - len(lines())].split()
            words = [subcommand, *edited(words, edits, lines())]
        status = run_checked(words).status
        statuses[status] = statuses.get(status, 0) + 1
        assert not tree(quick)

    fuzz(check, shard, count, st.integers(0, len(lines()) + len(SUBCOMMAND_LINES) - 1), EDITS)
    assert statuses[0] >= count // 40, f"too few valid lines: only the parser is tested: {statuses}"
    assert statuses[2] > count // 3, statuses
    if shard:
        counted(f"fuzzed command lines, shard {shard}: {count} and more; answers by status {statuses}")


@functools.cache
def texts() -> list[tuple[str, str]]:
    """YAML files of the package, as (group, text)."""
    found = [("experiment", "experiment/smoke"), ("experiment", "experiment/claims/ttq_twn")]
    found += [(kind, f"{kind}/{name}") for kind, name in (
        ("optim", "unified"), ("optim", "sgd_step"), ("method", "dorefa"), ("method", "inq"), ("model", "resnet8"),
        ("model", "mlp"), ("dataset", "digits"), ("layers", "default"), ("distill", "kd"), ("runtime", "default"),
    )]  # fmt: skip
    return [(kind, (groups.conf_directory() / f"{file}.yaml").read_text()) for kind, file in found]


ODD_YAML = (
    *ODD_WORDS, "&a", "*a", "&a [*a]", "<<: *a", "<<: {epochs: 2}", "!!python/object/apply:os.system ['touch pwned']",
    "!!binary aGk=", "!!set {a}", "!!float x", "!!timestamp x", "2020-13-45", "? ", "- ", "|", ">", "%YAML 3.0", "---",
    "...", "# @package a.b", "# @package _global_", "defaults: [method: ttq]", "defaults:\n  - _self_", ": ", "{", "}",
    "[", "]", "\ufeff", "\x85", "\u2028", "\x07", "hydra: {searchpath: [x]}", "1:30", "0b1", "~", "=", "`", "!", "!!",
    "epochs: ${epochs}", "a: ${a}${a}", "null: 1", "[" * 2000, bomb(), "k: " + "x" * 70_000,
)  # fmt: skip
YAML_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["letter", "cut", "line", "value", "drop", "twice", "swap", "indent", "end"]),
        PLACES, PLACES, st.one_of(st.sampled_from(ODD_YAML), st.text(max_size=6)),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def edited_yaml(text: str, edits: list[tuple[str, int, int, str]], data: bytes) -> bytes:
    """Return YAML text with random edits; `data` are bytes inserted at the first edit."""
    for kind, place, spot, new in edits:
        rows = text.splitlines() or [""]
        i, at = place % len(rows), spot % (len(text) + 1)
        line = rows[i]
        changed = {
            "line": [new, line],
            "value": [f"{line.partition(':')[0]}: {new}"],
            "drop": [],
            "twice": [line, line],
            "swap": [*rows[i + 1 : i + 2], line],
            "indent": [" " * (spot % 5) + line],
            "end": [line[: spot % (len(line) + 1)]],
        }.get(kind)
        if changed is None:
            text = text[:at] + new + text[at + (place % 9 if kind == "cut" else 1) :]
        else:
            rows[i : i + (2 if kind == "swap" else 1)] = changed
            text = "\n".join(rows) + "\n"
    whole = text.encode(errors="surrogatepass")
    at = edits[0][2] % (len(whole) + 1)
    return whole[:at] + data + whole[at:]


FEW_BYTES = st.one_of(st.just(b""), st.just(b""), st.just(b""), st.binary(max_size=3))


@pytest.fixture(scope="module")
def stored_config() -> str:
    """The config.yaml of a run."""
    (config,) = compose.configurations(["experiment=smoke", "method=dorefa", "layers.rules={fc:8}"])
    from qbench.config.schema import to_dict

    return str(yaml.safe_dump(to_dict(config), sort_keys=False))


@pytest.mark.parametrize(("shard", "count"), shards(5000, 500))
def test_fuzzed_yaml(shard: int, count: int, quick: Path, stored_config: str) -> None:
    statuses: dict[int, int] = {}

    def check(which: int, edits: list[tuple[str, int, int, str]], data: bytes) -> None:
        if which < len(texts()):
            kind, text = texts()[which]
            content = edited_yaml(text, edits, data)
            name, words = f"c/{kind}/bad.yaml", ["plan", "--config-dir=c", f"{kind}=bad"]
        else:
            content = edited_yaml(stored_config, edits, data)
            name, words = "o/d/run/config.yaml", ["compare", "o"]
        note(repr(content))
        final = '{"kind": "final", "step": 1, "test_top1": 50.0, "test_top5": 90.0, "test_loss": 1.0}\n'
        plant(quick, {name: content, "o/d/run/metrics.jsonl": final})
        before = tree(quick)
        got = run_checked(words)
        statuses[got.status] = statuses.get(got.status, 0) + 1
        assert words[0] != "compare" or (got.status == 0 and got.stdout)
        assert tree(quick) == before

    fuzz(check, shard, count, st.integers(0, 2 * len(texts()) - 1), YAML_EDITS, FEW_BYTES)
    assert statuses[0] > count // 20, statuses
    assert statuses[2] >= count // 10, statuses
    if shard:
        counted(f"fuzzed YAML files, shard {shard}: {count} and more; answers by status {statuses}")


@functools.cache
def checkpoints() -> list[bytes]:
    """Small checkpoints: from `pack`, from torch.save, and a state with everything that a run saves."""
    torch.manual_seed(0)
    model = mlp.build((1, 2, 2), 2, width=3)
    state = {
        "state": {"counters": [1, 2, 3], "random": [torch.zeros(3, dtype=torch.uint8), "MT19937", 0.5, None]},
        "identity": "x" * 8, "session": {"log_size": 3},
    }  # fmt: skip
    plain = io.BytesIO()
    torch.save(model.state_dict(), plain)
    old = io.BytesIO()
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    return [pack({"model": model.state_dict(), "identity": "x"}), pack(state), plain.getvalue(), old.getvalue()]


def edited_bytes(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    """Return the bytes of a file with random edits."""
    others = checkpoints()
    for kind, place, spot, new in edits:
        i = place % (len(data) + 1)
        data = {
            "flip": data[:i] + bytes(b ^ (1 << spot % 8) for b in data[i : i + 1]) + data[i + 1 :],
            "put": data[:i] + new + data[i + len(new) :],
            "insert": data[:i] + new + data[i:],
            "cut": data[:i] + data[i + spot % 200 :],
            "end": data[:i],
            "splice": data[:i] + others[spot % len(others)][i:],
            "move": data[:i] + data[spot % (len(data) + 1) :][: spot % 300] + data[i:],
        }[kind]
    return data


def edited_pickle(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    """Return a checkpoint whose data.pkl is edited and whose checksums are right, so that the reader parses it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as file:
        for entry in source.infolist():
            content = source.read(entry)
            file.writestr(
                entry.filename, edited_bytes(content, edits) if entry.filename.endswith("data.pkl") else content
            )
    return target.getvalue()


BYTE_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "insert", "cut", "end", "splice", "move"]), PLACES, PLACES,
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"cos\nsystem\n", b"\xff" * 8, b"X\xff"])),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.parametrize(("shard", "count"), shards(5000, 1000))
def test_fuzzed_checkpoints(shard: int, count: int, workdir: Path) -> None:
    messages: list[str] = []
    model = mlp.build((1, 2, 2), 2, width=3)
    file = workdir / "start.pt"

    def check(which: int, edits: list[tuple[str, int, int, bytes]], seal: bool, inside: bool) -> None:
        data = checkpoints()[which]
        data = edited_pickle(data, edits) if inside and which < 3 else edited_bytes(data, edits)
        if seal:
            data += b"\nqbench sha256 " + sha256(data).hexdigest().encode()
        file.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (
            lambda: unpack(data, "it"), lambda: load_torch_file(data, "it"), lambda: load_initial_weights(model, file),
        ):  # fmt: skip
            try:
                with at_most(SECONDS):
                    assert isinstance(read(), dict | InitialWeights)
            except CheckpointError as error:
                messages.append(str(error))
        assert all(line.isprintable() for text in messages[-3:] for line in text.splitlines()), messages
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
        assert not [path for path in workdir.iterdir() if path != file]

    fuzz(check, shard, count, st.integers(0, 3), BYTE_EDITS, st.booleans(), st.booleans())
    assert count < len(messages), "edits must be noticed"
    if shard:
        counted(
            f"fuzzed checkpoints, shard {shard}: {count} and more, read in 3 ways, {len(messages)} readings refused"
        )
