"""Finished and interrupted runs, and damaged copies of files, for the tests of damage."""

import functools
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import counted, tiered

from qbench.config import compose
from qbench.config.schema import Config, baseline_config
from qbench.errors import CheckpointError, Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result, load_result

SIZE = ("optim.batch_size=128", "pretrain.optim.batch_size=128")  # 9 steps per epoch
WORDS = ("experiment=smoke", "method=dorefa", "epochs=2", "runtime.checkpoint_seconds=0", "runtime.log_every=5", *SIZE)
STOP_AT = 28  # call of `stop` at which the run is interrupted, in its second epoch
JUNK = (b"\n", b"\0", b"junk" * 5000)

flips_and_cuts = pytest.mark.parametrize(
    ("flips", "cuts"), [(60, 20), pytest.param(1000, 300, marks=pytest.mark.full)], ids=["fast", "full"]
)
samples = pytest.mark.parametrize("count", tiered([1, 3, 40], [1]))


def full(*values: Any) -> list[Any]:
    """Return parameters of the full tier."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.full) for v in values]


def compose_config(out: Path, *words: str, tensorboard: bool = False) -> Config:
    (config,) = compose.configurations(
        [f"out={out}", *WORDS, f"runtime.tensorboard={'true' if tensorboard else 'false'}", *words]
    )
    return config


def run_config(config: Config, stop_at: int | None = None) -> tuple[Result, list[str]]:
    """Run a configuration, and return the result and the messages of the run.

    If `stop_at` is given, the run is interrupted at this call of its function `stop`, counted from 1.
    """
    calls = 0

    def stop() -> int:
        nonlocal calls
        calls += 1
        return signal.SIGTERM if stop_at is not None and calls >= stop_at else 0

    reporter, messages = ProgressReporter(quiet=True), []
    reporter.keep = messages.append  # type: ignore[method-assign]
    return run(planned_run(config), RunContext(reporter, stop)), messages


@functools.cache
def _finished_runs(folder: Path) -> Path:
    out = folder / "whole"
    run_config(compose_config(out, tensorboard=True))
    run_config(compose_config(out, "seed=1"))
    return out


@functools.cache
def _interrupted_runs(folder: Path) -> Path:
    out = shutil.copytree(_finished_runs(folder), folder / "interrupted")
    for path in out.rglob("dorefa-*"):
        shutil.rmtree(path)
    for seed in (0, 1):
        with pytest.raises(Interrupted):
            run_config(compose_config(out, f"seed={seed}"), stop_at=STOP_AT)
        assert len(planned_run(compose_config(out, f"seed={seed}")).directory.checkpoints()) == 2
    return out


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with finished runs of dorefa with seeds 0 and 1, and their float baselines.

    The run with seed 0 has TensorBoard event files. All tests share the folder.
    """
    return _finished_runs(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as `whole`, but in which both runs of dorefa were interrupted. Each run has two checkpoints.

    All tests share the folder.
    """
    return _interrupted_runs(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a folder; every call makes another copy."""

    def copy(folder: Path) -> Path:
        out = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        return shutil.copytree(folder, out)

    return copy


def directory(out: Path, *words: str) -> Path:
    return planned_run(compose_config(out, *words)).path


def baseline_of(out: Path, *words: str) -> Path:
    return planned_run(baseline_config(compose_config(out, *words))).path


def digest(out: Path, *words: str) -> str:
    result = load_result(directory(out, *words))
    assert result is not None
    assert result.state_sha256 is not None
    return result.state_sha256


def is_refused(reader: Callable[..., Any], *arguments: Any) -> bool:
    try:
        reader(*arguments)
    except CheckpointError:
        return True
    return False


def damages(data: bytes, seed: int, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yield pairs (description, damaged copy of the data).

    The damages are: single bits are flipped, the end is cut off, junk is added at the end, at the start or inside, and
    the data is repeated.
    """
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


def all_damages(what: str, data: bytes, seed: int, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies, and record their number in the full tier."""
    count = 0
    for case, damaged in damages(data, seed, flips, cuts):
        yield f"seed {seed}: {case}", damaged
        count += 1
    if flips == 1000:
        counted(f"R6 {what}: {count} damages ({flips} flips, {cuts} truncations), all detected")


def one_damage(data: bytes, seed: int) -> tuple[str, bytes]:
    """Return one damaged copy of a random kind."""
    return random.Random(seed).choice(list(damages(data, seed, 6, 4)))
