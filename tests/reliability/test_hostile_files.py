"""Hostile files: no code in them runs, and they take neither time nor memory (R7)."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damaged_runs
import pytest
import torch
from conftest import ROOT, counted
from damaged_runs import WORDS, baseline_of, compose_config, digest, directory, full, is_refused, run_config
from torch import Tensor, nn

from qbench.cli.main import main as cli
from qbench.config.identity import run_identity
from qbench.config.schema import baseline_config
from qbench.errors import CheckpointError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.training.checkpoint import bounded_memory, pack, unpack
from qbench.training.initial_weights import is_intact, load_initial_weights

whole = damaged_runs.whole
interrupted = damaged_runs.interrupted
copy_of = damaged_runs.copy_of


PROTOCOL = b"\x80\x02"


def torch_saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def zipped(pickled: bytes, storage: bytes = b"", compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive in the layout of torch.save, with any pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
    return buffer.getvalue()


def overlapping(size: int, count: int) -> bytes:
    """Return an archive with one record of zeros under many names: larger unpacked, without
    compression.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", PROTOCOL + b"}.")
        archive.writestr("archive/data/0", bytes(size))
        archive.filelist += archive.filelist[1:] * count
    return buffer.getvalue()


def pickled_int(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(elements: int, size: int, stride: int = 1) -> bytes:
    """Return the pickle of {"a": a tensor (size,)} over a storage of `elements` float32."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu" + pickled_int(elements) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pickled_int(0) + b"(" + pickled_int(size) + b"t"
    rebuilt += b"(" + pickled_int(stride) + b"t\x89ccollections\nOrderedDict\n)RtR"
    return PROTOCOL + b"}X\1\0\0\0a" + rebuilt + b"s."


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (f"touch {self.marker}" if self.function is os.system else str(self.marker),)


def hostile(marker: Path, good: dict[str, Tensor], bomb: int, names: int) -> dict[str, bytes]:
    """Return name -> hostile file.

    Args:
        good: a state_dict that fits.
        bomb: bytes that a small file becomes if it is unpacked.
        names: number of names of tensors, which together have at least 18 million letters.
    """
    name = next(iter(good))
    legacy = torch_saved({"a": torch.ones(4)}, _use_new_zipfile_serialization=False)
    head, _, tail = legacy.partition(b"cpuq\x06K\x04N")
    assert tail, "the pickle of the old format has changed"
    long_names = {f"\x1b[2J\n{'n' * 10_000}{i}": torch.empty(0) for i in range(100)}
    nothing = torch.empty(0)
    with torch.random.fork_rng():
        other = {
            "complex": torch.ones(good[name].shape, dtype=torch.complex64),
            "bool": good[name].bool(),
            "integer": good[name].long(),
            "sparse": good[name].flatten(1).to_sparse(),
            "other shape": torch.ones(3),
            "nan": torch.full_like(good[name], torch.nan),
            "inf": torch.full_like(good[name], torch.inf),
            "meta": torch.empty(good[name].shape, device="meta"),
            "half of it": good[name][:1],
            "no tensor": [1, 2],
        }
    deep = b"]" * 10**5 + b"a" * (10**5 - 1)
    return {
        **{f"{what} tensor": torch_saved(good | {name: value}) for what, value in other.items()},
        "code": torch_saved(good | {"x": Code(marker)}),
        "code in old format": torch_saved(good | {"x": Code(marker)}, _use_new_zipfile_serialization=False),
        "code by open": torch_saved(good | {"x": Code(marker, os.mkdir)}),
        "code as the whole": torch_saved(Code(marker)),
        "a plain pickle with code": pickle.dumps({"x": Code(marker)}),
        "a plain pickle with code, protocol 0": pickle.dumps({"x": Code(marker)}, 0),
        "a plain pickle": pickle.dumps({"a": [1.0]}),
        "a pickle by name": zipped(PROTOCOL + b"cposix\nsystem\nX\4\0\0\0true\x85R."),
        "eval": zipped(PROTOCOL + b"cbuiltins\neval\nX\1\0\0\x001\x85R."),
        "bomb": zipped(tensor(bomb // 4, 4), bytes(bomb), zipfile.ZIP_DEFLATED),
        "overlapping": overlapping(10**7, 200),
        "storage of 2^40": zipped(tensor(2**40, 4), bytes(16)),
        "storage of less": zipped(tensor(400, 400), bytes(16)),
        "size beyond storage": zipped(tensor(4, 2**40), bytes(16)),
        "stride beyond storage": zipped(tensor(4, 4, 2**40), bytes(16)),
        "negative size": zipped(tensor(4, -1), bytes(16)),
        "expanded to 2^40": zipped(tensor(4, 2**40, 0), bytes(16)),
        "old format, 2^40 elements": head + b"cpuq\x06" + pickled_int(2**40) + b"N" + tail,
        "bytearray(10**12)": zipped(PROTOCOL + b"cbuiltins\nbytearray\n" + pickled_int(10**12) + b"\x85R."),
        "bytearray(2**31)": zipped(PROTOCOL + b"cbuiltins\nbytearray\n" + pickled_int(2**31) + b"\x85R."),
        "bytearray(10**12), old format": PROTOCOL + b"cbuiltins\nbytearray\n" + pickled_int(10**12) + b"\x85R.",
        "100,000 lists deep": zipped(PROTOCOL + b"}X\1\0\0\0a" + deep + b"s."),
        "text of 4 GB": zipped(PROTOCOL + b"X\xff\xff\xff\xffabc"),
        "bytes of 2^60": zipped(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc"),
        "frame of 2^60": zipped(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"abc"),
        "memo of 2^31": zipped(PROTOCOL + b"}r\xff\xff\xff\x7f."),
        "1,000,000 names": torch_saved({f"n{i}".ljust(18 * 10**6 // names, "n"): nothing for i in range(names)}),
        "long names": torch_saved(good | long_names),
        "numbers as names": torch_saved(dict(enumerate(good.values()))),
        "tuples as names": torch_saved({(1, 2): torch.ones(2)}),
        "other names": torch_saved({"features.weight": torch.ones(2, 2)}),
        "model is a list": torch_saved({"model": [1]}),
        "model is a model": torch_saved({"model": {"model": good}}),
        "a list": torch_saved([torch.ones(2)]),
        "a number": torch_saved(3),
        "a module": torch_saved(nn.Linear(2, 2)),
        "no bytes": b"",
        "text": b"I am no checkpoint\n" * 10,
        "zeros": bytes(10**6),
        "a head only": b"PK\x03\x04",
        "footer only": b"\nqbench sha256 " + b"0" * 64,
    }


PHRASES = {
    "bomb": "its content is compressed",
    "overlapping": "its content is compressed",
    "1,000,000 names": "too many tensors",
    "nan tensor": "contains inf or nan",
    "complex tensor": "other type",
    "other names": "missing",
    "a list": "contains a list",
}

READER = """
import json, resource, sys, time
from pathlib import Path
from qbench.experiment.setup import assemble
from qbench.training.initial_weights import load_initial_weights
from qbench.config import compose
from qbench.errors import QbenchError
import warnings
warnings.simplefilter("error")
def peak_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
(config,) = compose.configurations(["experiment=smoke", "method=dorefa"])
model = assemble(config).float_model()
for path in sys.argv[1:]:
    began, before = time.process_time(), peak_memory()
    try:
        load_initial_weights(model, Path(path))
        outcome = 0, "loaded"
    except QbenchError as error:
        outcome = error.status, str(error)
    except BaseException as error:
        outcome = 1, f"{type(error).__name__}: {error}"
    print(json.dumps([path, *outcome, time.process_time() - began, peak_memory() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def hostile_files(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, bytes]]:
    """Return the path of a file that hostile code would create, and hostile files by name.

    Only the long tier measures the time and the memory that a file takes. For the fast tier, files are smaller.
    """
    marker = tmp_path_factory.mktemp("marker") / "code-ran"
    measured = any(item.get_closest_marker("full") for item in request.session.items)
    good = assemble(compose_config(whole)).float_model().state_dict()
    bomb, names = (2**30, 10**6) if measured else (2**24, 10**5)
    return marker, hostile(marker, good, bomb, names)


def test_the_hostile_code_runs_without_protection(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.load(io.BytesIO(torch_saved({"x": Code(marker)})), weights_only=False)
    assert marker.exists()


@pytest.mark.full
def test_hostile_files_with_init(hostile_files: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Read all in one separate process, to measure time and memory."""
    marker, found = hostile_files
    paths = {}
    for i, (name, data) in enumerate(found.items()):
        paths[name] = tmp_path / f"{i}.pt"
        paths[name].write_bytes(data)
    read_all = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths.values())],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = {row[0]: row[1:] for row in map(json.loads, read_all.stdout.splitlines())}
    for name, path in paths.items():
        assert str(path) in rows, f"{name}: it ended the process: {read_all.stderr[-500:]}"
        status, message, seconds, memory = rows[str(path)]
        assert status == 4, f"{name}: {message}"
        assert str(path) in message, f"{name}: {message}"
        assert len(message.splitlines()) <= 3, f"{name}: {message}"
        assert len(message) < 1000, f"{name}: {message}"
        assert message.replace("\n", "").isprintable(), f"{name}: {message!r}"
        assert PHRASES.get(name, "") in message, f"{name}: {message}"
        assert seconds < 5, f"{name}: {seconds} s"
        assert memory < 2**29 + 10 * len(found[name]), f"{name}: {memory:,} bytes"
    assert not marker.exists()
    counted(f"R7 init=FILE: {len(found)} hostile files, all exit 4, no code ran")


@pytest.mark.full
def test_hostile_files_with_a_correct_digest_in_a_run(
    hostile_files: tuple[Path, dict[str, bytes]], whole: Path, copy_of: Callable[[Path], Path]
) -> None:
    """As a checkpoint they are removed with a warning. As best.pt they are not used, not even with
    `init=RUN`.
    """
    import hashlib

    marker, found = hostile_files
    out = copy_of(whole)
    first, identity = baseline_of(out), run_identity(baseline_config(compose_config(out))).digest
    model = assemble(compose_config(out)).float_model()
    own = directory(out)
    shutil.rmtree(own)
    own.mkdir()
    for i, (name, body) in enumerate(found.items()):
        data = body + b"\nqbench sha256 " + hashlib.sha256(body).hexdigest().encode()
        (first / "best.pt").write_bytes(data)
        assert not is_intact(first / "best.pt", identity), name
        assert is_refused(load_initial_weights, model, first), name
        if i % 4 == 0 or "code" in name:
            (own / f"state-{1000 + i}.pt").write_bytes(data)
    planted = planned_run(compose_config(out)).directory.checkpoints()
    result, messages = run_config(compose_config(out))
    assert result.state_sha256 == digest(whole)
    assert sum("state-" in line and line.startswith("warning: ") for line in messages) == len(planted) > 10
    assert any(f"warning: {first / 'best.pt'}" in line for line in messages)
    assert not marker.exists()


@pytest.mark.parametrize(
    "wrong", ["nan", *full("keys", "counters", "optimizer", "model", "random", "losses", "session")]
)
def test_a_valid_checkpoint_with_wrong_content(interrupted: Path, copy_of: Callable[[Path], Path], wrong: str) -> None:
    """Its digest, name and run are correct, so it was made on purpose."""
    out = copy_of(interrupted)
    newest = planned_run(compose_config(out)).directory.checkpoints()[0]
    saved_state = unpack(newest.read_bytes(), "it")
    state = saved_state["state"]
    if wrong == "keys":
        saved_state["state"] = {"counters": state["counters"]}
    elif wrong == "counters":
        state["counters"] = [0, 0, "x"]
    elif wrong == "optimizer":
        state["optimizer"] = {"state": {}}
    elif wrong == "model":
        state["model"] = {"conv1.weight": torch.ones(3)}
    elif wrong == "random":
        state["random"]["torch"] = torch.ones(3)
    elif wrong == "losses":
        state["losses"] = "none"
    elif wrong == "log":
        saved_state["session"] = None
    else:
        next(t for t in state["model"].values() if t.is_floating_point()).fill_(torch.nan)
    newest.write_bytes(pack(saved_state))
    if wrong in ("counters", "log"):
        _, messages = run_config(compose_config(out))
        assert any(f"warning: {newest} does not contain a training state" in line for line in messages)
        return
    with pytest.raises(CheckpointError, match="cannot continue, because the checkpoint") as caught:
        run_config(compose_config(out))
    assert len(str(caught.value).splitlines()) <= 3


def command(*words: str) -> tuple[int, str, float, int]:
    """Run `python -m qbench`; return status, stderr, CPU seconds and peak memory in bytes.

    `os.wait4` gives the usage of this process alone; RUSAGE_CHILDREN has the peak of all children.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(90, process.kill)
    timer.start()
    assert process.stderr is not None
    with process.stderr as pipe:
        errors = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, errors, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


PATHS = {
    "a pipe": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a directory without best.pt": lambda path: path.mkdir(),
    "best.pt is a directory": lambda path: (path / "best.pt").mkdir(parents=True),
    "best.pt is a pipe": lambda path: (path.mkdir(), os.mkfifo(path / "best.pt")),
    "best.pt is an endless device": lambda path: (path.mkdir(), (path / "best.pt").symlink_to("/dev/zero")),
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "gone": lambda path: None,
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_a_file_is_an_immediate_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, because the path is wrong. Nothing is created."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"{name}: still reading after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    path, out = tmp_path / "weights.pt", tmp_path / "out"
    PATHS[name](path)
    signal.alarm(20)
    try:
        with bounded_memory(2**31):
            assert cli([*WORDS, f"out={out}", f"init={path}"]) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    shown = capsys.readouterr().err.splitlines()
    assert 1 <= len(shown) <= 3
    assert f"init={path}" in shown[0]
    assert not out.exists()


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "code",
        *full(
            "a pipe", "bomb", "1,000,000 names", "text", "an endless device", "bytearray(10**12)", "nan tensor",
            "long names",
        ),
    ],
)  # fmt: skip
def test_hostile_files_on_the_command_line(
    name: str, hostile_files: tuple[Path, dict[str, bytes]], tmp_path: Path, whole: Path
) -> None:
    marker, found = hostile_files
    path, out = tmp_path / "weights.pt", tmp_path / "out"
    if name in PATHS:
        PATHS[name](path)
    else:
        path.write_bytes(found[name])
    words = [*WORDS, "runtime.tensorboard=false", f"out={out}", f"init={path}"]
    status, errors, seconds, memory = command(*words)
    assert status == (2 if name in PATHS else 4), errors
    assert 1 <= len(errors.strip().splitlines()) <= 3, errors
    assert str(path) in errors
    assert seconds < 15, "5 s plus the imports"
    inherited = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux: a child starts with this peak
    assert memory <= max(inherited, 2**30 + 10 * len(found.get(name, b""))), f"{memory:,} bytes"
    assert not marker.exists()
    path.unlink()
    shutil.copy(baseline_of(whole) / "best.pt", path)
    assert cli(words) == 0, "the failed command must not block the next one"
