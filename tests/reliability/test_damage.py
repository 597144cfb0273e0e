"""Damaged, swapped and hostile files: never used in silence, no code runs, nothing is lost but what is torn."""

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, counted
from torch import Tensor, nn

from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.config.schema import Config, baseline_config
from qbench.errors import CheckpointError, Interrupted, QbenchError
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.report.comparison.compare import compare
from qbench.report.comparison.predictions import load_run_accuracy
from qbench.report.comparison.setting_table import settings_of
from qbench.runs.event_files import RECORD_OVERHEAD
from qbench.runs.progress import ProgressReporter
from qbench.runs.reader import FROM_LOGS, read, read_run
from qbench.runs.result import Result, load_result
from qbench.training.checkpoint import bounded_memory, pack, unpack, weights_sha256
from qbench.training.initial_weights import is_intact, load_initial_weights

WORDS = ("experiment=smoke", "method=dorefa", "epochs=2", "runtime.checkpoint_seconds=0")
STOPPED = 25  # step of 36 at which the run is interrupted, in its second epoch
JUNK = (b"\n", b"\0", b"junk" * 5000)

flips_and_cuts = pytest.mark.parametrize(
    ("flips", "cuts"), [(60, 20), pytest.param(1000, 300, marks=pytest.mark.full)], ids=["fast", "full"]
)
samples = pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.full)], ids=["fast", "full"])


def long(*values: Any) -> list[Any]:
    """Return parameters of the long tier."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.full) for v in values]


def composed(out: Path, *words: str, tensorboard: bool = False) -> Config:
    (config,) = compose.configurations(
        [f"out={out}", *WORDS, f"runtime.tensorboard={'true' if tensorboard else 'false'}", *words]
    )
    return config


def done(config: Config, stop_at: int | None = None) -> tuple[Result, list[str]]:
    """Run a configuration; return its result and what the screen said. `stop_at`: interrupted at that look."""
    looks = 0

    def stop() -> int:
        nonlocal looks
        looks += 1
        return signal.SIGTERM if stop_at is not None and looks >= stop_at else 0

    screen, said = ProgressReporter(quiet=True), []
    screen.keep = said.append  # type: ignore[method-assign]
    return run(planned_run(config), RunContext(screen, stop)), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of dorefa and its parent, with event files; another run of both beside them."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    done(composed(out, tensorboard=True))
    done(composed(out, "seed=1"))
    return out


@pytest.fixture(scope="module")
def broken_off(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but dorefa was interrupted: its directory holds two checkpoints, of seed 1 too."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("broken_off")
    shutil.copytree(whole, out, dirs_exist_ok=True)
    for path in out.rglob("dorefa-*"):
        shutil.rmtree(path)
    for seed in (0, 1):
        with pytest.raises(Interrupted):
            done(composed(out, f"seed={seed}"), stop_at=STOPPED)
        assert len(planned_run(composed(out, f"seed={seed}")).directory.checkpoints()) == 2
    return out


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function from a folder to a copy of it, anew at every call."""

    def copy(folder: Path) -> Path:
        out = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        return shutil.copytree(folder, out)

    return copy


def directory(out: Path, *words: str) -> Path:
    return planned_run(composed(out, *words)).path


def parent_of(out: Path, *words: str) -> Path:
    return planned_run(baseline_config(composed(out, *words))).path


def digest(out: Path, *words: str) -> str:
    result = load_result(directory(out, *words))
    assert result is not None
    assert result.state_sha256 is not None
    return result.state_sha256


def refused(reader: Callable[..., Any], *arguments: Any) -> bool:
    try:
        reader(*arguments)
    except CheckpointError:
        return True
    return False


def damages(data: bytes, seed: int, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies with what was done: flipped bits, truncations, junk at the end, before, within, doubled."""
    chance = random.Random(seed)
    for bit in sorted(chance.sample(range(8 * len(data)), flips)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(changed)
    for size in sorted({0, 1, len(data) - 1, len(data) - 2, *chance.sample(range(len(data)), cuts)}):
        yield f"cut to {size} of {len(data)} bytes", data[:size]
    for junk in JUNK:
        yield f"{len(junk)} bytes behind", data + junk
        yield f"{len(junk)} bytes before", junk + data
        at = chance.randrange(1, len(data) - 1)
        yield f"{len(junk)} bytes at {at}", data[:at] + junk + data[at:]
    yield "twice", data + data


def tried(what: str, data: bytes, seed: int, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies, all of which a test must see through; note in the long tier how many there were."""
    count = 0
    for case, damaged in damages(data, seed, flips, cuts):
        yield f"seed {seed}: {case}", damaged
        count += 1
    if flips == 1000:
        counted(f"R6 {what}: {count} damages ({flips} flips, {cuts} truncations), all detected")


def one(data: bytes, seed: int) -> tuple[str, bytes]:
    """Return one damage, of whatever kind."""
    found = list(damages(data, seed, 6, 4))
    return random.Random(seed).choice(found)


# R6: bits, truncations, junk, swapped files


@flips_and_cuts
def test_no_damage_to_a_checkpoint_is_overlooked(broken_off: Path, flips: int, cuts: int) -> None:
    newest = planned_run(composed(broken_off)).directory.checkpoints()[0]
    for case, data in tried("checkpoint", newest.read_bytes(), 1, flips, cuts):
        assert refused(unpack, data, case), f"{case}: read in silence"


@samples
def test_a_run_falls_back_to_the_checkpoint_before(
    whole: Path, broken_off: Path, copied: Callable[[Path], Path], count: int
) -> None:
    expected = digest(whole)
    for seed in range(count):
        out = copied(broken_off)
        newest, before = planned_run(composed(out)).directory.checkpoints()
        what, data = one(newest.read_bytes(), seed)
        newest.write_bytes(data)
        result, said = done(composed(out))
        assert result.state_sha256 == expected, f"seed {seed}: {what}"
        assert any(newest.name in line and line.startswith("warning:") for line in said), f"seed {seed}: {what}: {said}"
        assert f"going on from {before.name}" in said, f"seed {seed}: {what}: {said}"
        shutil.rmtree(out)
    if count > 3:
        counted(f"R6 checkpoint: {count} whole runs from the checkpoint before, final state equal")


def test_without_any_good_checkpoint_it_begins_anew_and_keeps_what_it_saves(
    whole: Path, broken_off: Path, copied: Callable[[Path], Path]
) -> None:
    out = copied(broken_off)
    for path in planned_run(composed(out)).directory.checkpoints():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Interrupted):
        done(composed(out), stop_at=4)
    assert [path.name for path in planned_run(composed(out)).directory.checkpoints()] == ["state-4.pt", "state-3.pt"]
    result, said = done(composed(out))
    assert "going on from state-4.pt" in said, "what was announced is not lost to damaged files with higher numbers"
    assert result.state_sha256 == digest(whole)


@pytest.mark.parametrize("swap", ["another run's", "older as newer", *long("newer as older", "a directory", "a pipe")])
def test_checkpoints_in_the_wrong_place(
    whole: Path, broken_off: Path, copied: Callable[[Path], Path], swap: str
) -> None:
    out = copied(broken_off)
    newest, before = planned_run(composed(out)).directory.checkpoints()
    if swap == "another run's":
        newest.write_bytes(planned_run(composed(out, "seed=1")).directory.checkpoints()[0].read_bytes())
    elif swap == "older as newer":
        newest.write_bytes(before.read_bytes())
    elif swap == "newer as older":
        before.write_bytes(newest.read_bytes())
        newest.unlink()
    elif swap == "a directory":
        before.with_name("state-9999.pt").mkdir()
    else:
        os.mkfifo(before.with_name("state-9999.pt"))
    result, said = done(composed(out))
    assert result.state_sha256 == digest(whole), said
    wrong = {"another run's": newest, "older as newer": newest, "newer as older": before}.get(swap)
    assert wrong is None or any(line.startswith(f"warning: {wrong}") for line in said), said
    assert wrong is None or not wrong.exists()


@flips_and_cuts
def test_no_damage_to_published_weights_is_overlooked(
    whole: Path, copied: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    """The parent's best.pt; the same file by `init=PATH`, as a file and as its run's directory."""
    config = composed(whole)
    run_path, identity = parent_of(copied(whole)), run_identity(baseline_config(config)).digest
    file, model = run_path / "best.pt", assemble(config).float_model()
    good = file.read_bytes()
    assert is_intact(file, identity)
    load_initial_weights(model, file)
    load_initial_weights(model, run_path)
    for case, data in tried("parent, init=FILE, init=RUN", good, 2, flips, cuts):
        if data == good[: good.rfind(b"\nqbench sha256 ")]:
            continue  # cut exactly before the footer: a whole checkpoint of nobody's
        file.write_bytes(data)
        assert not is_intact(file, identity), case
        for start in (file, run_path):
            assert refused(load_initial_weights, model, start), f"{case}: loaded in silence from {start}"


@flips_and_cuts
def test_damage_to_a_strangers_checkpoint_changes_no_weight_in_silence(
    whole: Path, tmp_path: Path, flips: int, cuts: int
) -> None:
    """A `torch.save` file without our digest has checksums in its archive, which torch.load does not look at."""
    model = assemble(composed(whole)).float_model()
    good = model.state_dict()
    torch.save(good, tmp_path / "net.pt")
    expected = weights_sha256(good)
    refused = harmless = 0
    for what, data in damages((tmp_path / "net.pt").read_bytes(), 3, flips, cuts):
        (tmp_path / "damaged.pt").write_bytes(data)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        try:
            load_initial_weights(model, tmp_path / "damaged.pt")
        except CheckpointError:
            refused += 1
            continue
        assert weights_sha256(model.state_dict()) == expected, f"seed 3: {what}: other weights in silence"
        harmless += 1
    assert refused > 5 * harmless
    if flips == 1000:
        counted(
            f"R6 stranger's checkpoint: {refused} refused, {harmless} harmless (fields nobody reads), 0 used wrongly"
        )


def test_a_format_without_checksums_is_said(whole: Path, tmp_path: Path) -> None:
    model = assemble(composed(whole)).float_model()
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "without checksums" in load_initial_weights(model, tmp_path / "old.pt")
    torch.save(model.state_dict(), tmp_path / "new.pt")
    assert "checksums" not in load_initial_weights(model, tmp_path / "new.pt")


@flips_and_cuts
def test_no_damage_to_a_result_is_overlooked(
    whole: Path, copied: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    path = directory(copied(whole))
    file, stored, tried, equal = path / "result.json", load_result(path), 0, 0
    assert stored is not None
    for what, data in damages(file.read_bytes(), 4, flips, cuts):
        file.write_bytes(data)
        found = load_result(path)
        assert found is None or found == stored, f"seed 4: {what}: read in silence"
        tried, equal = tried + 1, equal + (found is not None)
    assert equal < tried / 20
    if flips == 1000:
        counted(f"R6 result: {tried} damages ({flips} flips, {cuts} cuts), {equal} left the content equal, none used")


@samples
def test_runs_with_a_damaged_result_or_parent_come_out_the_same(
    whole: Path, copied: Callable[[Path], Path], count: int
) -> None:
    expected, base = digest(whole), load_result(parent_of(whole))
    assert base is not None
    for seed in range(count):
        out = copied(whole)
        own, first = directory(out), parent_of(out)
        kind = ("result", "parent's best", "parent's result")[seed % 3]
        file = {"result": own / "result.json", "parent's best": first / "best.pt"}.get(kind, first / "result.json")
        if kind != "result":
            shutil.rmtree(own)
        what, data = one(file.read_bytes(), seed)
        file.write_bytes(data)
        unharmed = file.name == "result.json" and load_result(file.parent) is not None
        result, said = done(composed(out))
        case = f"seed {seed}: {kind}: {what}: {said}"
        assert result.state_sha256 == expected, case
        assert unharmed or any(line.startswith(f"warning: {file}") for line in said), case
        again = load_result(first)
        assert again is not None
        assert again.state_sha256 == base.state_sha256, case
        assert is_intact(first / "best.pt", run_identity(baseline_config(composed(out))).digest), case
        shutil.rmtree(out)
    if count > 3:
        counted(f"R6 result, parent: {count} whole runs with a damaged file, final state equal, each with a warning")


@pytest.mark.parametrize(
    "what", ["result", "parent's best", "best of init", *long("parent's result", "result of init")]
)
def test_files_of_another_run(whole: Path, copied: Callable[[Path], Path], what: str) -> None:
    out = copied(whole)
    own, first = directory(out), parent_of(out)
    if what == "result":
        shutil.copy(directory(out, "seed=1") / "result.json", own / "result.json")
        result, said = done(composed(out))
        assert any("belongs to another run" in line for line in said), said
    elif what.startswith("parent"):
        shutil.rmtree(own)
        name = "best.pt" if what == "parent's best" else "result.json"
        shutil.copy(parent_of(out, "seed=1") / name, first / name)
        result, said = done(composed(out))
        assert any(line.startswith(f"warning: {first / name}") for line in said), said
    else:
        name = "best.pt" if what == "best of init" else "result.json"
        shutil.copy(parent_of(out, "seed=1") / name, first / name)
        with pytest.raises(CheckpointError, match="are of two runs"):
            done(composed(out, f"init={first}"))
        return
    assert (result.state_sha256, result.seed) == (digest(whole), 0)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("best.pt", "gone"), ("best.pt", "a directory"), ("result.json", "a pipe"), ("last.pt", "damaged"),
        *long(
            ("best.pt", "a pipe"), ("last.pt", "gone"), ("predictions.npy", "gone"), ("result.json", "gone"),
            ("result.json", "a directory"), ("metrics.jsonl", "a directory"), ("config.yaml", "gone"),
        ),
    ],
)  # fmt: skip
def test_what_a_parent_lacks(whole: Path, copied: Callable[[Path], Path], name: str, what: str) -> None:
    """Anew where it is needed, as it is where nobody reads it, refused where a directory bars the way."""
    out = copied(whole)
    shutil.rmtree(directory(out))
    file = parent_of(out) / name
    trained = load_result(parent_of(out))
    assert trained is not None
    file.unlink()
    if what == "a directory":
        file.mkdir()
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "damaged":
        file.write_bytes(b"damaged")
    barred = what == "a directory" and name != "metrics.jsonl"
    if barred:
        with pytest.raises(QbenchError, match=rf"{re.escape(str(file))}.*[Dd]irectory|not permitted") as caught:
            done(composed(out))
        assert caught.value.status == 5
        return
    result, said = done(composed(out))
    assert result.state_sha256 == digest(whole)
    anew = name in ("best.pt", "result.json")
    now = load_result(parent_of(out))
    assert now is not None
    assert (now.wall_seconds != trained.wall_seconds) == anew, said
    warned = any(f"warning: {file}" in line for line in said)
    assert warned == (anew and (name, what) != ("result.json", "gone")), said


@flips_and_cuts
def test_damaged_predictions_never_enter_a_claim(
    whole: Path, copied: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    path = directory(copied(whole))
    file, stored = path / "predictions.npy", load_result(path)
    assert stored is not None
    assert stored.final is not None
    top1 = stored.final.test.top1
    good = load_run_accuracy(str(path), top1)
    assert good.hits is not None
    for what, data in damages(file.read_bytes(), 5, flips, cuts):
        file.write_bytes(data)
        found = load_run_accuracy(str(path), top1)
        assert found.top1 == top1, f"seed 5: {what}"
        assert found.hits is None or 100 * found.hits.mean() == pytest.approx(top1, abs=0.01), f"seed 5: {what}"


# R7: hostile files

PROTOCOL = b"\x80\x02"


def saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def zipped(pickled: bytes, storage: bytes = b"", compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive as torch.save makes it, with any pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
    return buffer.getvalue()


def overlapping(size: int, count: int) -> bytes:
    """Return an archive with one record of zeros under many names: larger inside than outside, nothing compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", PROTOCOL + b"}.")
        archive.writestr("archive/data/0", bytes(size))
        archive.filelist += archive.filelist[1:] * count
    return buffer.getvalue()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(elements: int, size: int, stride: int = 1) -> bytes:
    """Return the pickle of {"a": a tensor (size,)} over a storage of `elements` float32."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu" + number(elements) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + b"(" + number(size) + b"t"
    rebuilt += b"(" + number(stride) + b"t\x89ccollections\nOrderedDict\n)RtR"
    return PROTOCOL + b"}X\1\0\0\0a" + rebuilt + b"s."


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (f"touch {self.marker}" if self.function is os.system else str(self.marker),)


def hostile(marker: Path, good: dict[str, Tensor]) -> dict[str, bytes]:
    """Return hostile files by name. `good` is a state_dict that fits."""
    name = next(iter(good))
    legacy = saved({"a": torch.ones(4)}, _use_new_zipfile_serialization=False)
    head, _, tail = legacy.partition(b"cpuq\x06K\x04N")
    assert tail, "the old format is pickled otherwise than thought"
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
        **{f"{what} tensor": saved(good | {name: value}) for what, value in other.items()},
        "code": saved(good | {"x": Code(marker)}),
        "code in old format": saved(good | {"x": Code(marker)}, _use_new_zipfile_serialization=False),
        "code by open": saved(good | {"x": Code(marker, os.mkdir)}),
        "code as the whole": saved(Code(marker)),
        "a plain pickle with code": pickle.dumps({"x": Code(marker)}),
        "a plain pickle with code, protocol 0": pickle.dumps({"x": Code(marker)}, 0),
        "a plain pickle": pickle.dumps({"a": [1.0]}),
        "a pickle by name": zipped(PROTOCOL + b"cposix\nsystem\nX\4\0\0\0true\x85R."),
        "eval": zipped(PROTOCOL + b"cbuiltins\neval\nX\1\0\0\x001\x85R."),
        "bomb": zipped(tensor(2**28, 4), bytes(2**30), zipfile.ZIP_DEFLATED),
        "overlapping": overlapping(10**7, 200),
        "storage of 2^40": zipped(tensor(2**40, 4), bytes(16)),
        "storage of less": zipped(tensor(400, 400), bytes(16)),
        "size beyond storage": zipped(tensor(4, 2**40), bytes(16)),
        "stride beyond storage": zipped(tensor(4, 4, 2**40), bytes(16)),
        "negative size": zipped(tensor(4, -1), bytes(16)),
        "expanded to 2^40": zipped(tensor(4, 2**40, 0), bytes(16)),
        "old format, 2^40 elements": head + b"cpuq\x06" + number(2**40) + b"N" + tail,
        "bytearray(10**12)": zipped(PROTOCOL + b"cbuiltins\nbytearray\n" + number(10**12) + b"\x85R."),
        "bytearray(2**31)": zipped(PROTOCOL + b"cbuiltins\nbytearray\n" + number(2**31) + b"\x85R."),
        "bytearray(10**12), old format": PROTOCOL + b"cbuiltins\nbytearray\n" + number(10**12) + b"\x85R.",
        "100,000 lists deep": zipped(PROTOCOL + b"}X\1\0\0\0a" + deep + b"s."),
        "text of 4 GB": zipped(PROTOCOL + b"X\xff\xff\xff\xffabc"),
        "bytes of 2^60": zipped(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc"),
        "frame of 2^60": zipped(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"abc"),
        "memo of 2^31": zipped(PROTOCOL + b"}r\xff\xff\xff\x7f."),
        "1,000,000 names": saved({f"n{i}": nothing for i in range(10**6)}),
        "long names": saved(good | long_names),
        "numbers as names": saved(dict(enumerate(good.values()))),
        "tuples as names": saved({(1, 2): torch.ones(2)}),
        "other names": saved({"features.weight": torch.ones(2, 2)}),
        "model is a list": saved({"model": [1]}),
        "model is a model": saved({"model": {"model": good}}),
        "a list": saved([torch.ones(2)]),
        "a number": saved(3),
        "a module": saved(nn.Linear(2, 2)),
        "no bytes": b"",
        "text": b"I am no checkpoint\n" * 10,
        "zeros": bytes(10**6),
        "a head only": b"PK\x03\x04",
        "footer only": b"\nqbench sha256 " + b"0" * 64,
    }


PHRASES = {
    "bomb": "compresses nothing",
    "overlapping": "compresses nothing",
    "1,000,000 names": "too many tensors",
    "nan tensor": "holds inf or nan",
    "complex tensor": "other type",
    "other names": "missing",
    "a list": "holds a list",
}

READER = """
import json, resource, sys, time
from pathlib import Path
from qbench.experiment.setup import assemble
from qbench.training.initial_weights import load_start
from qbench.config import compose
from qbench.errors import QbenchError
import warnings
warnings.simplefilter("error")
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
(config,) = compose.configurations(["experiment=smoke", "method=dorefa"])
model = assemble(config).float_model()
for path in sys.argv[1:]:
    began, before = time.process_time(), held()
    try:
        load_start(model, Path(path))
        found = 0, "loaded"
    except QbenchError as error:
        found = error.status, str(error)
    except BaseException as error:
        found = 1, f"{type(error).__name__}: {error}"
    print(json.dumps([path, *found, time.process_time() - began, held() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def threats(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A marker that code would make, and hostile files."""
    marker = tmp_path_factory.mktemp("marker") / "code-ran"
    return marker, hostile(marker, assemble(composed(whole)).float_model().state_dict())


def test_code_would_run_if_it_were_let(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.load(io.BytesIO(saved({"x": Code(marker)})), weights_only=False)
    assert marker.exists()


def test_hostile_files_as_init(threats: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Read one after the other in a process of its own, so that time and memory are its own."""
    marker, found = threats
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


def test_hostile_files_with_a_right_digest_in_a_runs_directory(
    threats: tuple[Path, dict[str, bytes]], whole: Path, copied: Callable[[Path], Path]
) -> None:
    """As a checkpoint to go on from: removed with a warning. As best.pt: no parent, and refused for `init=RUN`."""
    import hashlib

    marker, found = threats
    out = copied(whole)
    first, identity = parent_of(out), run_identity(baseline_config(composed(out))).digest
    model = assemble(composed(out)).float_model()
    own = directory(out)
    shutil.rmtree(own)
    own.mkdir()
    for i, (name, body) in enumerate(found.items()):
        data = body + b"\nqbench sha256 " + hashlib.sha256(body).hexdigest().encode()
        (first / "best.pt").write_bytes(data)
        assert not is_intact(first / "best.pt", identity), name
        assert refused(load_initial_weights, model, first), name
        if i % 4 == 0 or "code" in name:
            (own / f"state-{1000 + i}.pt").write_bytes(data)
    planted = planned_run(composed(out)).directory.checkpoints()
    result, said = done(composed(out))
    assert result.state_sha256 == digest(whole)
    assert sum("state-" in line and line.startswith("warning: ") for line in said) == len(planted) > 10
    assert any(f"warning: {first / 'best.pt'}" in line for line in said)
    assert not marker.exists()


@pytest.mark.parametrize(
    "wrong", ["keys", "counters", "nan", *long("optimizer", "model", "random", "losses", "session")]
)
def test_a_checkpoint_of_ours_with_wrong_content(broken_off: Path, copied: Callable[[Path], Path], wrong: str) -> None:
    """Its digest, name and run are right: somebody made it so."""
    out = copied(broken_off)
    newest = planned_run(composed(out)).directory.checkpoints()[0]
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
        _, said = done(composed(out))
        assert any(f"warning: {newest} holds no state of a training" in line for line in said)
        return
    with pytest.raises(CheckpointError, match="checkpoint to go on from") as caught:
        done(composed(out))
    assert len(str(caught.value).splitlines()) <= 3


def command(*words: str) -> tuple[int, str, float, int]:
    """Run `python -m qbench`; return exit status, stderr, seconds of work, and the most memory in bytes."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return process.returncode, errors, seconds, 1024 * ended.ru_maxrss


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
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2: it is the path that is wrong. Nothing is created."""

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


@pytest.mark.parametrize(
    "name",
    [
        "code", "a pipe",
        *long("bomb", "1,000,000 names", "text", "an endless device", "bytearray(10**12)", "nan tensor", "long names"),
    ],
)  # fmt: skip
def test_hostile_files_on_a_real_command_line(
    name: str, threats: tuple[Path, dict[str, bytes]], tmp_path: Path, whole: Path
) -> None:
    marker, found = threats
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
    assert seconds < 15, "5 s and the imports"
    assert memory < 2**30 + 10 * len(found.get(name, b"")), f"{memory:,} bytes"
    assert not marker.exists()
    path.unlink()
    shutil.copy(parent_of(whole) / "best.pt", path)
    status, errors, *_ = command(*words)
    assert status == 0, f"what it left behind stops the next run: {errors}"


# R20: logs


def logs_only(whole: Path, out: Path, *, events: bool = False) -> Path:
    """Return a copy of dorefa's directory with its logs alone: metrics.jsonl and config.yaml, or event files."""
    source = directory(whole)
    path = out / source.parent.name / source.name
    path.mkdir(parents=True)
    for file in source.iterdir():
        if file.name.startswith("events.") if events else file.name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(file, path / file.name)
    return path


def spoilt(data: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield metrics.jsonl cut at each of its last 200 bytes and elsewhere, with garbage in it, and longer."""
    chance = random.Random(seed)
    for size in [*range(len(data) - 200, len(data)), *(chance.randrange(len(data)) for _ in range(count)), 0]:
        yield f"cut to {size}", data[:size]
    garbage = (
        b"garbage\n",
        b"\0" * 512,
        b"\xff\xfe\xc3\x28\n",
        b"\n\n\n",
        b"[" * 10**5 + b"\n",
        b"{}\n",
        b"3\n",
        b'"\n',
    )
    garbage += (
        b'{"kind": "epoch"}\n',
        b'{"kind": "final"}\n',
        b'{"kind": NaN}\n',
        b'{"kind": "final", "test_top1": "x"}\n',
    )
    for _ in range(max(1, count // 10)):
        for piece in garbage:
            lines = data.splitlines(keepends=True)
            at = chance.randrange(len(lines) + 1)
            yield f"{piece[:20]!r} before line {at}", b"".join([*lines[:at], piece, *lines[at:]])
            at = chance.randrange(len(data))
            yield f"{piece[:20]!r} at {at}", data[:at] + piece + data[at:]
    for _ in range(count):
        changed = bytearray(data)
        start = chance.randrange(len(data))
        stop = min(len(data), start + chance.randrange(1, 100))
        changed[start:stop] = chance.randbytes(stop - start)
        yield f"random bytes from {start} to {stop}", bytes(changed)
    yield "twice", data + data


def readable(data: bytes) -> tuple[list[Any], int]:
    """Return the objects among lines, and how many lines are none."""
    objects, other = [], 0
    for line in data.split(b"\n"):
        try:
            value = json.loads(line, parse_constant=lambda word: [][0])
        except (ValueError, RecursionError, IndexError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            other += bool(line)
    return objects, other


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.full)], ids=["fast", "full"])
def test_compare_loses_only_the_torn_lines_and_says_how_many(whole: Path, tmp_path: Path, count: int) -> None:
    path = logs_only(whole, tmp_path / "out")
    file, tried = path / "metrics.jsonl", 0
    good = file.read_bytes()
    stored = load_result(directory(whole))
    assert stored is not None
    assert stored.final is not None
    for what, data in spoilt(good, 6, count):
        case = f"seed 6: {what}"
        file.write_bytes(data)
        objects, other = readable(data)
        (found,) = read([str(tmp_path / "out")])
        finals = [r for r in objects if r.get("kind") == "final"]
        if finals and isinstance(finals[-1].get("test_top1"), float):
            assert (found.status, found.notes) == ("done", [FROM_LOGS]), case
            assert found.result is not None, case
            assert found.result.final is not None, case
            if what.startswith("cut"):
                assert found.result.final.test == stored.final.test, case
        elif not finals:
            assert found.status == "unfinished", case
            epochs = sum(r.get("kind") == "epoch" for r in objects)
            assert found.reason == (f"{epochs} epochs done" if epochs else "no epoch done"), case
        said = [f"metrics.jsonl: {other} line{'s' * (other > 1)} cannot be read"] if other else []
        assert found.unread == said, case
        tables = compare([found])
        assert all(any(line in note for table in tables for note in table.notes) for line in said), case
        tried += 1
    if count == 300:
        counted(f"R20 metrics.jsonl: {tried} torn or corrupt copies compared, 0 tracebacks, lost lines counted")


def test_compare_with_damaged_files_of_every_kind(
    whole: Path, copied: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A result alone decides; where it is torn, the logs tell, and compare says so."""
    stored = compare(read([str(whole)]))
    out = copied(whole)
    path = directory(out)
    (path / "metrics.jsonl").write_bytes(b"\xff\0garbage")
    for events in path.glob("events.*"):
        events.write_bytes(b"garbage")
    figures = [[s.top1.mean for s in settings_of(table)] for table in stored]
    assert [[s.top1.mean for s in settings_of(table)] for table in compare(read([str(out)]))] == figures
    shutil.rmtree(out)
    out = copied(whole)
    path = directory(out)
    text = (path / "result.json").read_bytes()
    for data in (text[:-30], b"[" * 10**5, b"", b"\xff", text.replace(b"dorefa", b"dorefb", 1)):
        (path / "result.json").write_bytes(data)
        found = read_run(path)
        assert (found.status, found.notes) == ("done", [FROM_LOGS])
        assert found.unread == ["result.json is torn or of another version"]
        assert cli(["compare", str(out)]) == 0
        assert f"{path.name}: result.json is torn" in capsys.readouterr().out
    for name in ("metrics.jsonl", "config.yaml", "result.json"):
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
        assert cli(["compare", str(out)]) == 0
        (path / name).rmdir()
        os.mkfifo(path / name)
        assert cli(["compare", str(out)]) == 0
        capsys.readouterr()
    for events in path.glob("events.*"):
        events.unlink()
        events.mkdir()
    assert read_run(path).status == "torn"


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.full)], ids=["fast", "full"])
def test_compare_from_damaged_event_files(whole: Path, tmp_path: Path, count: int) -> None:
    path = logs_only(whole, tmp_path / "out", events=True)
    (file,) = path.glob("events.*")
    good, chance = file.read_bytes(), random.Random(7)
    (intact,) = read([str(tmp_path / "out")])
    assert intact.result is not None
    assert (intact.status, intact.unread) == ("done", [])
    final = intact.result.final
    assert final is not None
    kinds = {"done": 0, "unfinished": 0, "torn": 0}
    cases = [("emptied", b""), ("garbage", b"garbage"), ("longer", good + b"junk"), ("one less", good[:-1])]
    for _ in range(count):
        size = chance.randrange(len(good))
        cases.append((f"cut to {size}", good[:size]))
        bit = chance.randrange(8 * len(good))
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        cases.append((f"bit {bit} flipped", bytes(changed)))
    for what, data in cases:
        case = f"seed 7: {what}"
        file.write_bytes(data)
        (found,) = read([str(tmp_path / "out")])
        kinds[found.status] += 1
        compare([found])
        if data:
            assert found.unread, case
            assert found.unread[0].endswith("bytes cannot be read"), case
        if found.status == "done":
            assert found.result is not None, case
            assert found.result.final is not None, case
            assert found.result.final.test == final.test, case
            assert found.result.final.val in (final.val, None), case
        else:
            assert found.reason, case
    assert kinds["unfinished"] > count / 2, "most are cut before the figures at the end"
    assert kinds["done"] > count / 2, "most flips hit a record that nobody needs"
    if count == 300:
        counted(f"R20 event files: {len(cases)} truncations and flips compared, 0 tracebacks: {kinds}")


LARGE = 50_000_000


@pytest.mark.parametrize("what", ["zeros", "noise", "small numbers", "the first length", "a content"])
def test_a_large_damaged_event_file_is_read_at_once(what: str, whole: Path, tmp_path: Path) -> None:
    path = logs_only(whole, tmp_path, events=True)
    (file,) = path.glob("events.*")
    good, noise = file.read_bytes(), random.Random(9).randbytes(LARGE)
    data = {
        "zeros": good + bytes(LARGE),
        "noise": good + noise,
        "small numbers": good + b"\1\0\0\0\0\0\0\0" * (LARGE // 8),  # what lengths look like
        "the first length": b"\xff" + good[1:] + noise,
        "a content": good[:12] + b"\xff" + good[13:] + noise,
    }[what]
    read_run(path)  # imports
    file.write_bytes(data)
    began = time.process_time()
    found = read_run(path)
    assert time.process_time() - began < 5
    first = RECORD_OVERHEAD + int.from_bytes(good[:8], "little")
    lost = LARGE + (first if what in ("the first length", "a content") else 0)
    assert found.unread == [f"{file.name}: {lost:,} bytes cannot be read"]
    assert found.status == "done", "the figures are before it"


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.full)], ids=["fast", "full"])
def test_a_resumed_run_never_appends_after_a_torn_tail(
    whole: Path, broken_off: Path, copied: Callable[[Path], Path], count: int
) -> None:
    expected, chance = digest(whole), random.Random(8)
    undamaged = [strip(line) for line in (directory(whole) / "metrics.jsonl").read_text().splitlines()]
    source = (directory(broken_off) / "metrics.jsonl").read_bytes()
    assert source.count(b"\n") >= 2
    every = list(spoilt(source, 8, 20))
    for what, data in [("removed", None), *chance.sample(every, count)]:
        case = f"seed 8: {what}"
        out = copied(broken_off)
        file = directory(out) / "metrics.jsonl"
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        result, said = done(composed(out))
        assert result.state_sha256 == expected, case
        text = file.read_bytes()
        assert text.endswith(b"\n"), case
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["kind"] for line in lines[-2:]] == ["epoch", "final"], case
        known = (data or b"")[: len(source)]
        kept = sum(len(line) + 1 for line in known.split(b"\n") if readable(line)[0])
        lost = len(source) - kept
        told = [line for line in said if "metrics.jsonl" in line]
        assert len(told) == (lost > 0), f"{case}: {said}"
        assert not lost or f"{lost} bytes are lost" in told[0], f"{case}: {told}"
        if known == source:
            assert [strip(line) for line in text.decode().splitlines()] == undamaged, case
        shutil.rmtree(out)
    if count > 4:
        counted(f"R20 resume: {count + 1} runs over damaged metrics.jsonl, final state equal, every line whole")


def strip(line: str) -> dict[str, Any]:
    """Return a record without its time."""
    return {key: value for key, value in json.loads(line).items() if key != "seconds"}
