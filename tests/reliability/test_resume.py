"""A resumed run ends as if it had not been stopped, and logging does not change a run (R3, R4).

Of R4 one thing is not tested: the frequency of evaluation, which is once per epoch, always.
Instead, more evaluations in other batch sizes must not change the training.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import resumed_runs
from conftest import long_tier
from helpers import write_images
from resumed_runs import (
    BATCH,
    EPOCH_CALLS,
    EPOCHS,
    EVALUATION_BATCH,
    METHODS,
    SMALL,
    STEPS,
    TEST_BATCHES,
    At,
    differences,
    moments,
    newest_checkpoint,
    recipe,
    replaced_out,
    resumed,
    stopped,
    tally,
    uninterrupted,
    with_baseline_of,
    with_replay,
)
from torch import nn

import qbench.experiment.run as experiment
from qbench.config import registry
from qbench.data.file_stream import FileSplit
from qbench.data.loader import Loader
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.quant.method import Unsupported
from qbench.quant.probe import Batch
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Accuracy
from qbench.training import loop
from qbench.training.digests import content_sha256
from qbench.training.evaluation import evaluate
from qbench.training.state import State

counted_clock = resumed_runs.counted_clock
report_counts = resumed_runs.report_counts
at = resumed_runs.at


COMBINATIONS = [(n, o, e, []) for n in METHODS for o in ("sgd", "adam_cosine") for e in (None, 0.9)]
FAST = ("lsq", "adam_cosine", 0.9, SMALL)


@pytest.mark.parametrize(("name", "optimizer", "ema", "network"), [FAST, *(long_tier(*c) for c in COMBINATIONS)])
def test_a_run_stopped_at_any_moment_ends_the_same(
    name: str, optimizer: str, ema: float | None, network: list[str], at: At
) -> None:
    config = at("alone", *recipe(name, optimizer, ema), *network)
    method = registry.create("method", {"name": name})
    if ema is not None and "no_master" in method.traits:
        with pytest.raises(Unsupported, match="keeps no float weights that could be averaged"):
            assemble(config)
        tally("combinations refused, nothing to average (R3)")
        return
    whole, calls = uninterrupted(config)
    places = moments(EPOCHS // 2, calls)
    if not method.needs_training:  # there is only the final evaluation, without a checkpoint
        places = {"final evaluation": (calls - TEST_BATCHES, [])}
    for i, (moment, (call, expected)) in enumerate(places.items()):
        again = with_baseline_of(config, whole, f"stopped{i}")
        directory = stopped(again, call)
        saved = newest_checkpoint(directory)["state"]["counters"][:2] if directory.checkpoints() else []
        assert saved == expected, with_replay(moment)
        assert differences(whole, resumed(again)) == set(), with_replay(moment)
        tally("runs stopped and resumed (R3)")


@pytest.mark.parametrize(
    ("name", "optimizer", "network"),
    [("ttq", "sgd", SMALL), long_tier("ttq", "sgd", []), long_tier("lsq", "radam", [])],
)
def test_a_run_stopped_inside_an_update_of_several_batches_ends_the_same(
    name: str, optimizer: str, network: list[str], at: At
) -> None:
    """Six batches an epoch make updates of four and two batches."""
    config = at("alone", *recipe(name, optimizer, None, epochs=2, accumulate=4, warmup=0.5), *network)
    whole, _ = uninterrupted(config)
    for call, inside in ((1, True), (3, True), (4, False), (5, True), (EPOCH_CALLS + 2, True)):
        again = with_baseline_of(config, whole, f"stopped{call}")
        saved = newest_checkpoint(stopped(again, call))["state"]
        assert saved["counters"][1] == call % EPOCH_CALLS
        assert ("gradients" in saved) is inside, call
        assert differences(whole, resumed(again)) == set(), with_replay(f"call {call}")


@pytest.mark.full
def test_a_run_may_be_stopped_several_times(at: At) -> None:
    config = at("alone", *recipe("mlq", "sgd", 0.9))
    whole, _ = uninterrupted(config)
    again, seconds = with_baseline_of(config, whole, "stopped"), [0.0]
    for _ in range(EPOCHS):
        directory = stopped(again, EPOCH_CALLS)
        seconds.append(newest_checkpoint(directory)["session"]["wall_seconds"])
    result = resumed(again)
    assert differences(whole, result) == set(), with_replay("last resume")
    assert seconds == sorted(set(seconds)), "the time before an interruption counts"
    assert result.wall_seconds is not None
    assert result.wall_seconds > seconds[-1]


def test_images_and_epochs_are_counted_over_the_whole_run(at: At) -> None:
    config = at("alone", *recipe("dorefa", "sgd", None))
    stopped(config, 3)  # in the float baseline
    experiment.run(assemble(config).baseline, RunContext(ProgressReporter(quiet=True)))
    stopped(config, 2 * EPOCH_CALLS + 3)
    result = resumed(config)
    lines = [json.loads(line) for line in (Path(result.run) / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == list(range(EPOCHS))
    assert [line["images"] for line in epochs] == [STEPS * BATCH] * EPOCHS
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, EPOCHS * STEPS + 1))
    assert result.speed is not None
    assert result.speed.images_per_second == BATCH, "one tick per step"
    assert result.speed.seconds_per_epoch == STEPS


LOGGING = {
    "saved after every step": ["runtime.checkpoint_seconds=0"],
    "never saved inside an epoch": ["runtime.checkpoint_seconds=1e9"],
    "few losses logged": ["runtime.log_every=7"],
    "with TensorBoard": ["runtime.tensorboard=true"],
    "with a live progress bar": ["runtime.progress=true"],
    "activations kept as integers": ["runtime.activation_memory=codes"],
    "evaluated twice": [],
}
every_method = pytest.mark.parametrize(
    "name", ["dorefa", *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n != "dorefa")]
)


@pytest.mark.full
@every_method
def test_logging_and_saving_do_not_change_a_run(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    words = recipe(name, "sgd", None)
    base, _ = uninterrupted(at("alone", *words))
    method = registry.create("method", {"name": name})
    for i, (variant, more) in enumerate(LOGGING.items()):
        if "activations" in variant and "cells_input" not in method.traits:
            continue  # an error: tests/training/test_training.py
        screen = ProgressReporter(quiet=True)
        with monkeypatch.context() as patch:
            if "runtime.progress=true" in more:
                patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
                screen = ProgressReporter(live=True)
            if variant == "evaluated twice":
                patch.setattr(loop, "evaluate", evaluate_twice)
                patch.setattr("qbench.experiment.final_result.evaluate", evaluate_twice)
            config = with_baseline_of(at("alone", *words, *more), base, f"variant{i}")
            again = experiment.run(planned_run(config), RunContext(screen))
        logged = {"metrics.jsonl"} if any("log_every" in word for word in more) else set()
        assert differences(base, again) - logged == set(), with_replay(variant)
        tally("runs with other logging (R4)")


@pytest.mark.full
@pytest.mark.parametrize(("workers", "epochs"), [(2, 1), (2, 2), (1, 2)])
def test_the_number_of_workers_does_not_change_a_run(
    workers: int, epochs: int, at: At, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_images(tmp_path / "set", count=12)
    words = [*recipe("dorefa", "sgd", None, epochs=epochs, batch_size=8), "dataset=folder", f"dataset.root={root}"]
    words += ["dataset.size=12", "dataset.resize=16", "dataset.val=0.25"]
    config = at("alone", *words, "runtime.num_workers=0")
    assert isinstance(assemble(config).data.train, FileSplit), "the images must stream"
    base, calls = uninterrupted(config)
    with_workers = at("alone", *words, f"runtime.num_workers={workers}")
    again, other_calls = uninterrupted(with_baseline_of(with_workers, base, "workers"))
    assert differences(base, again) == set(), with_replay(f"{workers} workers")
    assert other_calls == calls
    tally("runs with other workers (R4)")
    interrupted = with_baseline_of(with_workers, base, "stopped")
    stopped(interrupted, calls // 2)
    without_workers = replaced_out(config, Path(interrupted.out))
    assert differences(base, resumed(without_workers)) == set(), with_replay(f"stopped with {workers}, resumed with 0")


def test_a_live_progress_bar_draws_no_random_numbers() -> None:
    """In a separate process, because draws at import time happen only once."""
    code = """
import random, sys
from qbench.runs.progress import ProgressReporter
sys.stderr.isatty = lambda: True
screen = ProgressReporter()
before = random.getstate()
screen.start("a", 2, 0, 1)
screen.step(1, lambda: 1.0)
screen.say("b")
screen.epoch(2, {"epoch": 0, "train_loss": 1.0, "train_top1": 1.0})
screen.stop()
assert screen._live and random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def evaluate_twice(model: nn.Module, batches: Iterable[Batch], *more: Any, **options: Any) -> Accuracy | None:
    """Evaluate two times; the first result is not used."""
    batches = list(batches)
    evaluate(model, batches, *more[:1])
    return evaluate(model, batches, *more, **options)


@pytest.mark.parametrize(("name", "network"), [("dorefa", SMALL), *(long_tier(n, []) for n in METHODS)])
def test_evaluation_does_not_change_training(
    name: str, network: list[str], at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other batch sizes, losses differ in the last bits.

    `best` depends on them, everything else is equal.
    """
    ends: list[str] = []
    original_digest, original_batches = State.digest, Loader.unaugmented

    def digest(state: State, model: nn.Module) -> str:
        kept = {key: part for key, part in state.save(model).items() if key not in ("best", "seconds")}
        ends.append(content_sha256(kept))
        return original_digest(state, model)

    def batches(loader: Loader, split: str, limit: int | None = None) -> Iterator[Batch]:
        return original_batches(loader, split, limit, EVALUATION_BATCH if split == "train" else 7)

    monkeypatch.setattr(State, "digest", digest)
    base, calls = uninterrupted(at("alone", *recipe(name, "sgd", None), *network))
    monkeypatch.setattr(Loader, "unaugmented", batches)
    again, more_calls = uninterrupted(at("other", *recipe(name, "sgd", None), *network))
    assert more_calls > calls
    half = len(ends) // 2  # the digest of a run comes after that of its baseline
    assert ends[half - 1] == ends[-1], with_replay("training state")
    assert again.weights_sha256 == base.weights_sha256
