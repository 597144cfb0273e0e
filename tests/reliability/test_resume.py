"""A resumed run ends as if it had not been stopped, and logging does not change a run.

Guarantees R3 and R4 of docs/reliability.md, and a mutation check: if any piece of the saved state
is lost, the comparison of R3 notices it. Of R4 one thing is not tested: the frequency of
evaluation, which is once per epoch, always. Instead, more evaluations in other batch sizes must not
change the training.

The clock of the training loop counts calls here, so that metrics.jsonl is equal byte by byte,
`seconds` included.
"""

import copy
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Configure, counted
from helpers import quantizing_bits, write_images
from torch import nn

import qbench.experiment.run as experiment
from qbench.config import groups, registry
from qbench.config.schema import Config
from qbench.data.dataset import Loader
from qbench.data.file_stream import FileSplit
from qbench.errors import CheckpointError, Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.session import TrainingSession
from qbench.experiment.setup import assemble
from qbench.quant.layers import is_quantizer_key
from qbench.quant.method import Unsupported
from qbench.quant.probe import Batch
from qbench.quant.verify import NotQuantized
from qbench.runs.directory import RunDirectory
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Accuracy, Result
from qbench.training import loop
from qbench.training import optimizer as optim
from qbench.training.checkpoint import content_sha256, unpack
from qbench.training.evaluation import evaluate
from qbench.training.loop import Callbacks
from qbench.training.loop import train as train_task
from qbench.training.state import State, WeightAverage
from qbench.training.task import Task

METHODS = groups.option_names("method")
STEPS, EPOCHS, BATCH = 6, 5, 192
EVALUATION_BATCH = 60
VAL_BATCHES, TEST_BATCHES = 3, 6
EPOCH_CALLS = STEPS + VAL_BATCHES + 1
"""Calls of `RunContext.stop` per epoch: after each step, before each validation batch, at the
end.
"""
FILES = ("metrics.jsonl", "predictions.npy", "last.pt", "best.pt")
At = Callable[..., Config]
TALLY: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _counted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(Loader.unaugmented, "__defaults__", (None, EVALUATION_BATCH))


@pytest.fixture(autouse=True, scope="module")
def _report_counts() -> Iterator[None]:
    yield
    if TALLY:
        counted("test_resume: " + ", ".join(f"{count} {what}" for what, count in sorted(TALLY.items())))


@pytest.fixture
def at(smoke: Configure, tmp_path: Path) -> At:
    """Return a function from a folder's name and the words of a run to its configuration below that
    folder.
    """
    return lambda name, *words: smoke(*words, f"out={tmp_path / name}")


def tally(what: str) -> None:
    TALLY[what] = TALLY.get(what, 0) + 1


def with_replay(what: object) -> str:
    """Return what failed, and the command that repeats it."""
    return f"{what}\nreplay: python -m pytest '{os.environ['PYTEST_CURRENT_TEST'].removesuffix(' (call)')}'"


def recipe(name: str, optimizer: str, ema: float | None, epochs: int = EPOCHS, **more: Any) -> list[str]:
    """Return the words of a run; for method float, the options are those of pretraining."""
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
    """Run without interruption; return the result and the number of calls of `stop`, without its
    baseline's.
    """
    parts = assemble(config)
    if not config.is_baseline:
        experiment.run(parts.baseline, RunContext(ProgressReporter(quiet=True)))
    calls = itertools.count()
    result = experiment.run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 0 * next(calls)))
    assert result.status == "done", result.reason
    return result, next(calls)


def with_baseline_of(config: Config, whole: Result, name: str) -> Config:
    """Return the configuration in another folder that holds a copy of the float baseline, not of
    the run.
    """
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
    """Return the fields of the result and the files in which two runs differ: the comparison of
    R3.
    """
    one, two = comparable(whole), comparable(other)
    fields = {key for key in one if one[key] != two[key]}
    return fields | {name for name in FILES if content(whole, name) != content(other, name)}


def content(result: Result, name: str) -> bytes | str:
    """Return the bytes of a file of a run; of a checkpoint, the digest of its content."""
    data = (Path(result.run) / name).read_bytes()
    return content_sha256(unpack(data, name)) if name.endswith(".pt") else data


def moments(epoch: int, calls: int) -> dict[str, tuple[int, list[int]]]:
    """Return moment -> number of the call of `stop`, and [epoch, batch] of the checkpoint after
    stopping there.
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


COMBINATIONS = [(n, o, e) for n in METHODS for o in ("sgd", "adam_cosine") for e in (None, 0.9)]
FAST = [("dorefa", "sgd", None), ("lsq", "adam_cosine", 0.9), ("slq", "adam_cosine", None)]


@pytest.mark.parametrize(
    ("name", "optimizer", "ema"),
    [*FAST, *(pytest.param(*c, marks=pytest.mark.full) for c in COMBINATIONS if c not in FAST)],
)
def test_a_run_stopped_at_any_moment_ends_the_same(name: str, optimizer: str, ema: float | None, at: At) -> None:
    config = at("alone", *recipe(name, optimizer, ema))
    method = registry.create("method", {"name": name})
    if ema is not None and "no_master" in method.traits:
        with pytest.raises(Unsupported, match="no float copy of its weights to average"):
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
    "activations kept as integers": ["runtime.compress_activations=true"],
    "evaluated twice": [],
}
every_method = pytest.mark.parametrize(
    "name", ["dorefa", *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n != "dorefa")]
)


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
                patch.setattr(experiment, "evaluate", evaluate_twice)
            config = with_baseline_of(at("alone", *words, *more), base, f"variant{i}")
            again = experiment.run(planned_run(config), RunContext(screen))
        logged = {"metrics.jsonl"} if any("log_every" in word for word in more) else set()
        assert differences(base, again) - logged == set(), with_replay(variant)
        tally("runs with other logging (R4)")


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.full)])
def test_the_number_of_workers_does_not_change_a_run(
    workers: int, at: At, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_images(tmp_path / "set", count=12)
    words = [*recipe("dorefa", "sgd", None, epochs=2, batch_size=8), "dataset=folder", f"dataset.root={root}"]
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


def evaluate_twice(model: nn.Module, batches: Iterable[Batch], *more: Any) -> Accuracy | None:
    """Evaluate two times; the first result is not used."""
    batches = list(batches)
    evaluate(model, batches, *more[:1])
    return evaluate(model, batches, *more)


@every_method
def test_evaluation_does_not_change_training(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
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
    base, calls = uninterrupted(at("alone", *recipe(name, "sgd", None)))
    monkeypatch.setattr(Loader, "unaugmented", batches)
    again, more_calls = uninterrupted(at("other", *recipe(name, "sgd", None)))
    assert more_calls > calls
    half = len(ends) // 2  # the digest of a run comes after that of its baseline
    assert ends[half - 1] == ends[-1], with_replay("training state")
    assert again.weights_sha256 == base.weights_sha256


COUNTERS = ("epoch", "batch", "step", "images", "hits", "stale", "stopped")
"""The entries of `counters` in a checkpoint, in this order."""
HALF = moments(3, 0)["middle batch"][0]


class LostPieces(NamedTuple):
    """A run, the call of `stop` that ends it, and pieces of its checkpoint -> what must differ
    without the piece.
    """

    words: list[str]
    call: int
    pieces: dict[str, set[str]]


SMALL = ["model=mlp", "model.hidden=3", "model.width=16"]
WEIGHTS, END, METRICS = {"weights_sha256", "state_sha256"}, {"state_sha256"}, {"metrics.jsonl"}
LOST = {
    "sgd": LostPieces(
        recipe("dorefa", "sgd", 0.9) + SMALL,
        HALF,
        {
            "state.random.torch": WEIGHTS,
            "state.random.numpy": END,  # not used by qbench, but perhaps by a user's method
            "state.random.python": END,
            "state.counters.epoch": WEIGHTS | METRICS,
            "state.counters.batch": WEIGHTS | METRICS,
            "state.counters.step": END | METRICS,
            "state.counters.images": METRICS,
            "state.counters.hits": METRICS,
            "state.losses": METRICS,
            "state.seconds": METRICS | {"speed"},
            "state.model": WEIGHTS,
            "state.model:running_mean": WEIGHTS,
            "state.model:running_var": WEIGHTS,
            "state.model:num_batches_tracked": WEIGHTS,
            "state.optimizer:momentum_buffer": WEIGHTS,
            "state.average": WEIGHTS,
            "session.log_size": METRICS,
            "session.train_seconds": {"speed"},
            "session.train_images": {"speed"},
        },
    ),
    "adam": LostPieces(
        recipe("dorefa", "adam_cosine", None) + SMALL,
        HALF,
        {f"state.optimizer:{moment}": WEIGHTS for moment in ("exp_avg", "exp_avg_sq", "step")},
    ),
    "best": LostPieces(  # the first epoch is the best, the third is the last
        recipe("dorefa", "sgd", None, lr=1e-9, patience=2),
        moments(2, 0)["middle batch"][0],
        {"state.best": {"best", "best.pt"} | END, "state.counters.stale": {"final"} | END},
    ),
    "stopped": LostPieces(
        recipe("dorefa", "sgd", None, lr=1e-9, patience=2),
        moments(2, 0)["end of the epoch"][0],
        {"state.counters.stopped": {"final"} | END},
    ),
    "trainable": LostPieces(recipe("dq", "adam_cosine", None), HALF, {"state.trainable": {"CheckpointError"}}),
}
TESTED_ELSEWHERE = {
    "identity": "without it a checkpoint is not used (tests/reliability/test_damaged_files.py)",
    "state.random.cuda": "empty without a GPU",
    "session.wall_seconds": "test_a_run_may_be_stopped_several_times",
    "session.memory": "memory of warnings and observation (tests/training/test_layer_stats.py)",
}


@pytest.mark.parametrize("case", LOST)
def test_the_loss_of_any_piece_of_the_state_is_noticed(case: str, at: At) -> None:
    lost = LOST[case]
    check_losses(at("alone", *lost.words), lost.call, lost.pieces)


def check_losses(config: Config, call: int, pieces: dict[str, set[str]]) -> None:
    """Stop a run; resume it with all pieces, which must end the same, and without each piece, which
    must not.
    """
    whole, _ = uninterrupted(config)
    interrupted = with_baseline_of(config, whole, "stopped")
    stopped(interrupted, call)
    initial, newest = initial_state(config), TrainingSession._newest
    for i, piece in enumerate(("", *pieces)):
        again = replaced_out(config, Path(config.out).with_name(f"without{i}"))
        shutil.copytree(interrupted.out, again.out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TrainingSession, "_newest", lambda session, piece=piece: without(newest(session), initial, piece)
            )
            try:
                result = resumed(again)
            except (CheckpointError, NotQuantized, ValueError) as error:  # the run itself reports it
                differ = {type(error).__name__, *END}
            else:
                differ = differences(whole, result)
        assert pieces[piece] <= differ if piece else not differ, with_replay(f"lost: {piece}; differ: {differ}")
        tally("mutants noticed" if piece else "mutants' originals equal")


def initial_state(config: Config) -> dict[str, Any]:
    """Return the state of a resuming process before it reads the checkpoint, with another random
    state.
    """
    parts = assemble(config)
    model = parts.install(parts.float_model())
    average = WeightAverage(model, config.optim.ema) if config.optim.ema is not None else None
    state = State(optim.build_optimizer(model, config.optim), average)
    change_random_state()
    return {"state": state.save(model), "session": {"train_seconds": 0.0, "train_images": 0, "log_size": 0}}


def without(saved: dict[str, Any] | None, initial: dict[str, Any], piece: str) -> dict[str, Any]:
    """Return a checkpoint with one piece replaced by its initial value.

    Args:
        piece: a path of keys; after a colon, the last part of the names of tensors at that path.
    """
    assert saved is not None
    changed = copy.deepcopy(saved)
    path, _, leaf = piece.partition(":")
    keys: list[Any] = [COUNTERS.index(key) if key in COUNTERS else key for key in path.split(".") if key]
    into, begun = changed, initial
    for key in keys[:-1]:
        into, begun = into[key], begun[key]
    if leaf and keys[-1] == "optimizer":
        slots = [slot for slot in into["optimizer"]["state"].values() if leaf in slot]
        assert slots
        for slot in slots:
            slot[leaf] = torch.zeros_like(slot[leaf])
    elif leaf:
        own, others = into[keys[-1]], begun[keys[-1]]
        names = [name for name in own if name.rpartition(".")[2] == leaf]
        assert any(not torch.equal(own[name], others[name]) for name in names), f"{piece} has its initial value"
        own |= {name: others[name] for name in names}
    elif keys:
        assert content_sha256({"": into[keys[-1]]}) != content_sha256({"": begun[keys[-1]]}), (
            "the piece has its initial value"
        )
        into[keys[-1]] = begun[keys[-1]]
    return changed


def test_every_piece_of_a_checkpoint_is_tested(at: At) -> None:
    saved = newest_checkpoint(stopped(at("alone", *recipe("float", "sgd", 0.9)), 1))
    existing = {"identity", *(f"session.{key}" for key in saved["session"])}
    for key, part in saved["state"].items():
        inner = COUNTERS if key == "counters" else part if key == "random" else ()
        existing |= {f"state.{key}.{name}" for name in inner} or {f"state.{key}"}
    tested = {piece.partition(":")[0] for lost in LOST.values() for piece in lost.pieces}
    assert len(saved["state"]["counters"]) == len(COUNTERS)
    assert existing == tested | set(TESTED_ELSEWHERE)


QUANTIZERS = {name: recipe(name, "adam_cosine", None) + SMALL for name in METHODS}
QUANTIZERS["dq"] += ["bits.w=4"]  # at 2 bits all layers get equally many points, as they have initially
# Some inputs must be negative, so that `signed` and `low` differ from their initial values.
for learned in ("lsq", "uniform"):
    QUANTIZERS[learned] = [*recipe(learned, "adam_cosine", None), "model=test_resume:signed"]


def signed(shape: tuple[int, int, int], classes: int, *, width: int = 16) -> nn.Module:
    """Return a perceptron; one layer reads a normalization's output, another an activation's."""
    inputs = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.BatchNorm1d(width)]
    return nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(width, width), nn.Linear(width, classes))


FAST_QUANTIZERS = ("inq", "mlq", "lsq")


@pytest.mark.parametrize(
    "name", [*FAST_QUANTIZERS, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in FAST_QUANTIZERS)]
)
def test_the_loss_of_any_buffer_of_a_quantizer_is_noticed(name: str, at: At) -> None:
    """Masks, phases, orders, ranges, learned steps; stopped within a phase, in epoch 4 of 5."""
    config = at("alone", *QUANTIZERS[name])
    parts = assemble(config)
    state = parts.install(parts.float_model()).state_dict()
    leaves = {key.rpartition(".")[2] for key in state if is_quantizer_key(key)}
    if not parts.epochs or not leaves:
        return  # it saves no checkpoint, or its quantizers have no state
    check_losses(config, HALF, {f"state.model:{leaf}": END for leaf in sorted(leaves)})


MODEL = "task.model"
RECOMPUTED = {
    "task.probe": "images of the data set",
    "task.train.__self__": "the loader: the data set, its mean and deviation",
    "task.validate": "the loader",
    "task.method.teachers": "the teacher: loaded again from the float baseline, never trained",
    "task.method.loss(teacher)": "the teacher",
    "task.model: ImageQuantizer.low": "from the range of images",
    "task.model: ImageQuantizer.span": "from the range of images",
    "task.model: hwgq.HWGQActivation.levels": "from width and options",
    "task.model: lsq.LSQActivation.is_signed": "`signed` of the state_dict, read once; a load clears it",
}
"""What may exist outside the state_dict: it is the same in every process."""


REPRESENTATIVES = ("float", "dorefa", "lsq", "inq", "qd", "gupta")
"""Float, stateless, learned, incremental, distilled, and without latent weights."""


@pytest.mark.parametrize(
    "name", [*REPRESENTATIVES, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in REPRESENTATIVES)]
)
def test_no_part_of_a_run_is_outside_the_saved_state(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk through everything that the loop can reach; compare plain values before and after
    training.
    """
    tasks: list[Task] = []
    before: dict[str, str] = {}

    def recorded(task: Task, state: State, callbacks: Callbacks) -> None:
        if task.method.name == name:
            before.update(plain_values(task.model))
            tasks.append(task)
        train_task(task, state, callbacks)
        if task.method.name == name:
            raise Interrupted("end of the test")

    monkeypatch.setattr(experiment, "train", recorded)
    more = [] if name == "float" else ["layers.first=same", "init=scratch"]
    with pytest.raises(Interrupted):
        resumed(at("alone", *recipe(name, "sgd", None, epochs=1), *more))
    (task,) = tasks
    saved = {id(tensor) for tensor in task.model.state_dict(keep_vars=True).values()}
    assert unexplained(hidden(task, "task", saved)) == []
    changed = [path for path, value in plain_values(task.model).items() if before.get(path) != value]
    assert unexplained(changed) == []
    names = [registry.find("method", name).__module__, "qbench.quant.layers", "qbench.quant.masks", "qbench.quant.ops"]
    for module in (sys.modules[n] for n in names):
        values = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        assert [p for key, value in values.items() for p in hidden(value, f"{module.__name__}.{key}", set())] == []


def unexplained(paths: Iterable[str]) -> list[str]:
    """Return the paths that RECOMPUTED does not explain."""
    return [path for path in paths if not any(path.startswith(known) for known in RECOMPUTED)]


def hidden(thing: Any, path: str, kept: set[int], met: dict[int, Any] | None = None) -> list[str]:
    """Return paths to tensors, arrays and random generators that can be reached from an object and
    are not `kept`.

    An attribute of a module is named by the module's type: `task.model: lsq.LSQActivation.step`.
    """
    met = {} if met is None else met
    if id(thing) in met or id(thing) in kept or isinstance(thing, PLAIN):
        return []
    met[id(thing)] = thing
    if isinstance(thing, STATEFUL):
        return [path]
    if isinstance(thing, nn.Module) and path.startswith(MODEL):
        path = f"{MODEL}: {kind(thing)}"
    return [found for name, inner in members(thing) for found in hidden(inner, f"{path}{name}", kept, met)]


PLAIN = (int, float, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
STATEFUL = (torch.Tensor, np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def kind(module: nn.Module) -> str:
    """`lsq.LSQActivation`, `BatchNorm2d`."""
    own = type(module).__module__
    return (f"{own.rpartition('.')[2]}." if own.startswith("qbench.methods") else "") + type(module).__name__


def members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object, with the path to them."""
    if isinstance(thing, dict):
        yield from ((f".{key}", value) for key, value in thing.items())
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from ((f"[{i}]", value) for i, value in enumerate(thing))
    elif isinstance(thing, functools.partial):
        yield from ((f".{name}", getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif isinstance(thing, types.MethodType):
        yield from ((f".{name}", getattr(thing, name)) for name in ("__self__", "__func__"))
    elif isinstance(thing, types.FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((f"({name})", cell.cell_contents) for name, cell in cells)
        yield from (("()", value) for value in (thing.__defaults__, thing.__kwdefaults__) if value)
    if isinstance(thing, nn.Module):  # parameters, buffers and modules under their own names
        parts = {**thing._parameters, **thing._buffers, **thing._modules}
        own = {key: value for key, value in vars(thing).items() if key not in ("_parameters", "_buffers", "_modules")}
        yield from ((f".{key}", value) for key, value in (parts | own).items())
    elif hasattr(thing, "__dict__"):
        yield from ((f".{key}", value) for key, value in vars(thing).items())


def plain_values(model: nn.Module) -> dict[str, str]:
    """Return the attributes of modules that are neither tensors nor modules, as text; hooks
    included.
    """
    return {
        f"{MODEL}: {kind(module)}.{key} of {name}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules", "training")
    }


@pytest.mark.parametrize(
    "hide",
    [
        lambda module, tensor: setattr(module, "extra", tensor),
        lambda module, tensor: setattr(module, "extra", {"a": [(tensor,)]}),
        lambda module, tensor: setattr(module, "extra", lambda: tensor),
        lambda module, tensor: setattr(module, "extra", functools.partial(print, tensor)),
        lambda module, tensor: module.register_buffer("extra", tensor, persistent=False),
        lambda module, tensor: setattr(module, "extra", tensor.numpy()),
        lambda module, tensor: setattr(module, "extra", torch.Generator()),
        lambda module, tensor: module.register_forward_hook(lambda *_: tensor),
    ],
)
def test_the_walk_finds_hidden_state(hide: Callable[[nn.Module, torch.Tensor], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert hidden(model, "", kept) == []
    hide(model[0], torch.ones(2))
    assert len(hidden(model, "", kept)) == 1
