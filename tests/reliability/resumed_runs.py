"""Stops runs, resumes them, and compares them with uninterrupted runs (R3 and R4 in docs/reliability.md)."""

import dataclasses
import itertools
import os
import random
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Configure, counted
from helpers import quantizing_bits

import qbench.experiment.run as experiment
from qbench.config import groups
from qbench.config.schema import Config
from qbench.data.loader import Loader
from qbench.errors import Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.runs.directory import RunDirectory
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result
from qbench.training import loop
from qbench.training.checkpoint import unpack
from qbench.training.digests import content_sha256

METHODS = groups.option_names("method")
STEPS, EPOCHS, BATCH = 6, 5, 192
EVALUATION_BATCH = 60
VAL_BATCHES, TEST_BATCHES = 3, 6
EPOCH_CALLS = STEPS + VAL_BATCHES + 1
"""Calls of `RunContext.stop` per epoch: after a step, before a validation batch, at the end."""
FILES = ("metrics.jsonl", "predictions.npy", "last.pt", "best.pt")
At = Callable[..., Config]
TALLY: dict[str, int] = {}


@pytest.fixture(autouse=True)
def counted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the clock of the training loop count its calls, so that `seconds` are equal too."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(Loader.unaugmented, "__defaults__", (None, EVALUATION_BATCH))


@pytest.fixture(autouse=True, scope="module")
def report_counts() -> Iterator[None]:
    """Record what the full tier has covered."""
    yield
    if TALLY:
        counted("R3, R4: " + ", ".join(f"{count} {what}" for what, count in sorted(TALLY.items())))
        TALLY.clear()


@pytest.fixture
def at(smoke: Configure, tmp_path: Path) -> At:
    """Return a function that takes the name of a folder and the words of a run, and returns the configuration."""
    return lambda name, *words: smoke(*words, f"out={tmp_path / name}")


def tally(what: str) -> None:
    TALLY[what] = TALLY.get(what, 0) + 1


def with_replay(what: object) -> str:
    """Return what failed, and the command that repeats it."""
    return f"{what}\nreplay: python -m pytest '{os.environ['PYTEST_CURRENT_TEST'].removesuffix(' (call)')}'"


def recipe(name: str, optimizer: str, ema: float | None, epochs: int = EPOCHS, **more: Any) -> list[str]:
    """Return the words of a run. With the method float, the options belong to the training of the float baseline."""
    options: dict[str, Any] = {"lr": 0.01, "batch_size": BATCH, "ema": "null" if ema is None else ema} | more
    group, key = ("optim@pretrain.optim", "pretrain.optim") if name == "float" else ("optim", "optim")
    words = [
        f"method={name}",
        f"bits={quantizing_bits(name)}",
        f"{group}={optimizer}",
        f"pretrain.optim.batch_size={BATCH}",
    ]
    words += [f"{key}.{option}={value}" for option, value in options.items()]
    return [*words, f"{'pretrain.' if name == 'float' else ''}epochs={epochs}", "runtime.log_every=1"]


def stopping(at: int) -> RunContext:
    """Return a context whose `stop` returns a signal from call number `at` on, counted from 1."""
    calls = itertools.count(1)
    return RunContext(ProgressReporter(quiet=True), lambda: 15 if next(calls) >= at else 0)


def uninterrupted(config: Config) -> tuple[Result, int]:
    """Run without interruption. Return the result and the number of calls of `stop`.

    Calls during the training of the float baseline are not counted.
    """
    parts = assemble(config)
    if not config.is_baseline:
        experiment.run(parts.baseline, RunContext(ProgressReporter(quiet=True)))
    calls = itertools.count()
    result = experiment.run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 0 * next(calls)))
    assert result.status == "done", result.reason
    return result, next(calls)


def with_baseline_of(config: Config, whole: Result, name: str) -> Config:
    """Return the configuration with another folder, to which the float baseline is copied, but not the run."""
    out = Path(config.out).parent / name
    shutil.copytree(config.out, out, ignore=shutil.ignore_patterns(Path(whole.run).name))
    return replaced_out(config, out)


def replaced_out(config: Config, out: Path) -> Config:
    """Return the configuration with another folder."""
    return dataclasses.replace(config, out=str(out))


def stopped(config: Config, at: int) -> RunDirectory:
    """Start a run and stop it at call `at` of `stop`; then change the random state."""
    with pytest.raises(Interrupted):
        experiment.run(planned_run(config), stopping(at))
    change_random_state()
    return planned_run(config).directory


def change_random_state() -> None:
    """Set the generators to other states, as in another process."""
    torch.manual_seed(4711)
    np.random.seed(4712)
    random.seed(4713)


def newest_checkpoint(directory: RunDirectory) -> dict[str, Any]:
    """Return the content of the newest checkpoint."""
    path = directory.checkpoints()[0]
    return unpack(path.read_bytes(), str(path))


def resumed(config: Config) -> Result:
    """Run the configuration again."""
    return experiment.run(planned_run(config), RunContext(ProgressReporter(quiet=True)))


def comparable(result: Result) -> dict[str, Any]:
    """Return a result without its directory, its total time and its memory."""
    values = dataclasses.asdict(result)
    del values["run"], values["wall_seconds"], values["speed"]["peak_bytes"]
    (values["baseline"] or {}).pop("run", None)
    return values


def differences(whole: Result, other: Result) -> set[str]:
    """Return the names of the result's fields and of the files in which two runs differ (R3 in docs/reliability.md)."""
    one, two = comparable(whole), comparable(other)
    fields = {key for key in one if one[key] != two[key]}
    return fields | {name for name in FILES if content(whole, name) != content(other, name)}


def content(result: Result, name: str) -> bytes | str:
    """Return the bytes of a file of a run; of a checkpoint, the digest of its content."""
    data = (Path(result.run) / name).read_bytes()
    return content_sha256(unpack(data, name)) if name.endswith(".pt") else data


def moments(epoch: int, calls: int) -> dict[str, tuple[int, list[int]]]:
    """Return the moments of a run at which tests stop it.

    A moment has a name, the number of the call of `stop` at which the run stops, and the position [epoch, batch] that
    the checkpoint then contains.
    """
    start = epoch * EPOCH_CALLS
    return {
        "first batch": (start + 1, [epoch, 1]),
        "middle batch": (start + STEPS // 2, [epoch, STEPS // 2]),
        "last batch": (start + STEPS, [epoch, STEPS]),
        "validation": (start + STEPS + 2, [epoch, STEPS]),
        "end of the epoch": (start + EPOCH_CALLS, [epoch + 1, 0]),
        "final evaluation": (calls - TEST_BATCHES, [EPOCHS, 0]),
    }


COUNTERS = ("epoch", "batch", "step", "images", "hits", "stale", "stopped")
"""The entries of `counters` in a checkpoint, in this order."""
HALF = moments(3, 0)["middle batch"][0]


SMALL = ["model=mlp", "model.hidden=3", "model.width=16"]
WEIGHTS, END, METRICS = {"weights_sha256", "state_sha256"}, {"state_sha256"}, {"metrics.jsonl"}
