"""A run that was stopped goes on as if nothing had happened, wherever it stood; how a run is watched changes nothing.

Promises R3 and R4 of the reliability contract, and its mutation check: whatever piece of the saved state is lost, the
comparison that these promises rest on notices. Of R4 one thing is not tried: how often is evaluated (once an epoch,
always); that more evaluations, and in other batches, leave no trace in what is trained is tried instead.

The clock of the training loop counts calls here, so that metrics.jsonl is equal to the byte, `seconds` too.
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

from qbench.config import groups, registry
from qbench.config.schema import Config
from qbench.data.dataset import Files, Loader
from qbench.errors import CheckpointError, Interrupted
from qbench.experiment import final_result
from qbench.experiment import run as experiment
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
from qbench.runs.result import Result
from qbench.training import loop
from qbench.training import optimizer as optim
from qbench.training.checkpoint import content_sha256, unpack
from qbench.training.evaluation import evaluate
from qbench.training.loop import Callbacks, fit
from qbench.training.state import Average, State
from qbench.training.task import Task

METHODS = groups.option_names("method")
STEPS, EPOCHS, BATCH = 6, 5, 192
VAL, TEST, SIZE = 3, 6, 60
"""Batches of the two splits when evaluated in batches of so many images."""
ASKED = STEPS + VAL + 1
"""How often the loop asks in one epoch whether to stop: after each step, before each batch of val, at the end."""
FILES = ("metrics.jsonl", "predictions.npy", "last.pt", "best.pt")
At = Callable[..., Config]
TALLY: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _counted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(Loader.plain, "__defaults__", (None, SIZE))


@pytest.fixture(autouse=True, scope="module")
def _told() -> Iterator[None]:
    yield
    if TALLY:
        counted("test_resume: " + ", ".join(f"{count} {what}" for what, count in sorted(TALLY.items())))


@pytest.fixture
def at(smoke: Configure, tmp_path: Path) -> At:
    """Return a function from a folder's name and the words of a run to its configuration below that folder."""
    return lambda name, *words: smoke(*words, f"out={tmp_path / name}")


def tally(what: str) -> None:
    TALLY[what] = TALLY.get(what, 0) + 1


def replay(what: object) -> str:
    """What failed and the line that does it again."""
    return f"{what}\nreplay: python -m pytest '{os.environ['PYTEST_CURRENT_TEST'].removesuffix(' (call)')}'"


def recipe(name: str, optimizer: str, ema: float | None, epochs: int = EPOCHS, **more: Any) -> list[str]:
    """The words of a run; those of the float network's own recipe where that is what is run."""
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
    """A desk that answers the question number `at` (from 1), and all after it, with a signal."""
    asked = itertools.count(1)
    return RunContext(ProgressReporter(quiet=True), lambda: 15 if next(asked) >= at else 0)


def alone(config: Config) -> tuple[Result, int]:
    """Run undisturbed; return the result and how often the run asked whether to stop, its parent's questions not."""
    parts = assemble(config)
    if not config.is_baseline:
        experiment.run(parts.baseline, RunContext(ProgressReporter(quiet=True)))
    asked = itertools.count()
    result = experiment.run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 0 * next(asked)))
    assert result.status == "done", result.reason
    return result, next(asked)


def beside(config: Config, whole: Result, name: str) -> Config:
    """The same run in another place, with the parent there and nothing of the run itself."""
    out = Path(config.out).parent / name
    shutil.copytree(config.out, out, ignore=shutil.ignore_patterns(Path(whole.run).name))
    return replaced_out(config, out)


def replaced_out(config: Config, out: Path) -> Config:
    """The same run below another folder."""
    return dataclasses.replace(config, out=str(out))


def stopped(config: Config, at: int) -> RunDirectory:
    """Begin a run and stop it at its question `at`; spoil what the process has drawn."""
    with pytest.raises(Interrupted):
        experiment.run(planned_run(config), stopping(at))
    spoil_random_numbers()
    return planned_run(config).directory


def spoil_random_numbers() -> None:
    """Leave the generators as another process might find them."""
    torch.manual_seed(4711)
    np.random.seed(4712)
    random.seed(4713)


def saved_in(directory: RunDirectory) -> dict[str, Any]:
    """The newest checkpoint."""
    path = directory.checkpoints()[0]
    return unpack(path.read_bytes(), str(path))


def resumed(config: Config) -> Result:
    """The same line again."""
    return experiment.run(planned_run(config), RunContext(ProgressReporter(quiet=True)))


def comparable(result: Result) -> dict[str, Any]:
    """A result but for its place, the time of the whole process, and the memory that it held."""
    values = dataclasses.asdict(result)
    del values["run"], values["wall_seconds"], values["speed"]["peak_bytes"]
    (values["baseline"] or {}).pop("run", None)
    return values


def differences(whole: Result, other: Result) -> set[str]:
    """Names of the result's fields and of the files in which two runs differ: the comparison of R3."""
    one, two = comparable(whole), comparable(other)
    found = {key for key in one if one[key] != two[key]}
    return found | {name for name in FILES if content(whole, name) != content(other, name)}


def content(result: Result, name: str) -> bytes | str:
    """What a file of a run says."""
    data = (Path(result.run) / name).read_bytes()
    return content_sha256(unpack(data, name)) if name.endswith(".pt") else data


def moments(epoch: int, questions: int) -> dict[str, tuple[int, list[int]]]:
    """Moment -> number of its question, and [epoch, batch] of the checkpoint that it leaves."""
    start = epoch * ASKED
    return {
        "first batch": (start + 1, [epoch, 1]),
        "middle batch": (start + STEPS // 2, [epoch, STEPS // 2]),
        "last batch": (start + STEPS, [epoch, STEPS]),
        "validation": (start + STEPS + 2, [epoch, STEPS]),
        "end of the epoch": (start + ASKED, [epoch + 1, 0]),
        "final evaluation": (questions - TEST, [EPOCHS, 0]),
    }


COMBINATIONS = [(n, o, e) for n in METHODS for o in ("sgd", "adam_cosine") for e in (None, 0.9)]
FAST = [("dorefa", "sgd", None), ("lsq", "adam_cosine", 0.9), ("slq", "adam_cosine", None)]


@pytest.mark.parametrize(
    ("name", "optimizer", "ema"),
    [*FAST, *(pytest.param(*c, marks=pytest.mark.full) for c in COMBINATIONS if c not in FAST)],
)
def test_a_run_stopped_anywhere_ends_as_if_left_alone(name: str, optimizer: str, ema: float | None, at: At) -> None:
    config = at("alone", *recipe(name, optimizer, ema))
    method = registry.create("method", {"name": name})
    if ema is not None and "no_master" in method.traits:
        with pytest.raises(Unsupported, match="no float copy of its weights to average"):
            assemble(config)
        tally("combinations refused, nothing to average (R3)")
        return
    whole, questions = alone(config)
    places = moments(EPOCHS // 2, questions)
    if not method.needs_training:  # one evaluation is all there is, and it saves nothing on the way
        places = {"final evaluation": (questions - TEST, [])}
    for i, (moment, (question, left)) in enumerate(places.items()):
        again = beside(config, whole, f"stopped{i}")
        directory = stopped(again, question)
        found = saved_in(directory)["state"]["counters"][:2] if directory.checkpoints() else []
        assert found == left, replay(moment)
        assert differences(whole, resumed(again)) == set(), replay(moment)
        tally("runs stopped and resumed (R3)")


def test_a_run_may_be_stopped_again_and_again(at: At) -> None:
    config = at("alone", *recipe("mlq", "sgd", 0.9))
    whole, _ = alone(config)
    again, seconds = beside(config, whole, "stopped"), [0.0]
    for _ in range(EPOCHS):
        directory = stopped(again, ASKED)
        seconds.append(saved_in(directory)["session"]["wall_seconds"])
    result = resumed(again)
    assert differences(whole, result) == set(), replay("the last")
    assert seconds == sorted(set(seconds)), "the time of work before an interruption counts"
    assert result.wall_seconds is not None
    assert result.wall_seconds > seconds[-1]


def test_images_and_epochs_count_the_whole_run(at: At) -> None:
    config = at("alone", *recipe("dorefa", "sgd", None))
    stopped(config, 3)  # in the float parent
    experiment.run(assemble(config).baseline, RunContext(ProgressReporter(quiet=True)))
    stopped(config, 2 * ASKED + 3)
    result = resumed(config)
    lines = [json.loads(line) for line in (Path(result.run) / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == list(range(EPOCHS))
    assert [line["images"] for line in epochs] == [STEPS * BATCH] * EPOCHS
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, EPOCHS * STEPS + 1))
    assert result.speed is not None
    assert result.speed.images_per_second == BATCH, "one tick a step"
    assert result.speed.seconds_per_epoch == STEPS


WATCHED = {
    "saved after every step": ["runtime.checkpoint_seconds=0"],
    "never saved inside an epoch": ["runtime.checkpoint_seconds=1e9"],
    "few losses logged": ["runtime.log_every=7"],
    "with TensorBoard": ["runtime.tensorboard=true"],
    "with a live bar": ["runtime.progress=true"],
    "activations kept as integers": ["runtime.compress_activations=true"],
    "evaluated twice": [],
}
every_method = pytest.mark.parametrize(
    "name", ["dorefa", *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n != "dorefa")]
)


@every_method
def test_how_a_run_is_watched_changes_nothing(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    words = recipe(name, "sgd", None)
    base, _ = alone(at("alone", *words))
    method = registry.create("method", {"name": name})
    for i, (how, more) in enumerate(WATCHED.items()):
        if "activations" in how and "cells_input" not in method.traits:
            continue  # refused: tests/training/test_training.py
        screen = ProgressReporter(quiet=True)
        with monkeypatch.context() as patch:
            if "runtime.progress=true" in more:
                patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
                screen = ProgressReporter(live=True)
            if how == "evaluated twice":
                patch.setattr(loop, "evaluate", twice)
                patch.setattr(final_result, "evaluate", twice)
            again = experiment.run(planned_run(at(f"watched{i}", *words, *more)), RunContext(screen))
        logged = {"metrics.jsonl"} if any("log_every" in word for word in more) else set()
        assert differences(base, again) - logged == set(), replay(how)
        tally("runs watched otherwise (R4)")


def test_how_many_processes_decode_images_changes_nothing(
    at: At, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_images(tmp_path / "set", count=12)
    words = [*recipe("dorefa", "sgd", None, epochs=2, batch_size=8), "dataset=folder", f"dataset.root={root}"]
    words += ["dataset.size=12", "dataset.resize=16", "dataset.val=0.25"]
    config = at("alone", *words)
    assert isinstance(assemble(config).data.train, Files), "they stream"
    base, questions = alone(config)
    for workers in (1, 2):
        again, asked = alone(at(f"workers{workers}", *words, f"runtime.num_workers={workers}"))
        assert differences(base, again) == set(), replay(f"{workers} workers")
        assert asked == questions
        tally("runs with other workers (R4)")
    other = beside(at("alone", *words, "runtime.num_workers=2"), base, "stopped")
    stopped(other, questions // 2)
    fewer = dataclasses.replace(other, runtime=dataclasses.replace(other.runtime, workers=0))
    assert differences(base, resumed(fewer)) == set(), replay("stopped with 2 workers, resumed with none")


def test_a_live_bar_draws_no_random_numbers() -> None:
    """In a process of its own: what is drawn when something is imported is drawn once."""
    code = """
import random, sys
from qbench.runs.progress import Screen
sys.stderr.isatty = lambda: True
screen = Screen()
before = random.getstate()
screen.start("a", 2, 0, 1)
screen.step(1, lambda: 1.0)
screen.say("b")
screen.epoch(2, {"epoch": 0, "train_loss": 1.0, "train_top1": 1.0})
screen.stop()
assert screen._live and random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def twice(model: nn.Module, batches: Iterable[Batch], *more: Any) -> dict[str, float]:
    """Evaluate two times, the first one for nothing."""
    batches = list(batches)
    evaluate(model, batches, *more[:1])
    return evaluate(model, batches, *more)


@every_method
def test_evaluation_leaves_no_trace_in_what_is_trained(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other batches the sums of the losses differ in the last bits: `best` ranks by them, all else is equal."""
    ends: list[str] = []
    own, plain = State.digest, Loader.plain

    def digest(state: State, model: nn.Module) -> str:
        kept = {key: part for key, part in state.save(model).items() if key not in ("best", "seconds")}
        ends.append(content_sha256(kept))
        return own(state, model)

    def batches(loader: Loader, split: str, limit: int | None = None) -> Iterator[Batch]:
        return plain(loader, split, limit, SIZE if split == "train" else 7)

    monkeypatch.setattr(State, "digest", digest)
    base, few = alone(at("alone", *recipe(name, "sgd", None)))
    monkeypatch.setattr(Loader, "plain", batches)
    again, many = alone(at("other", *recipe(name, "sgd", None)))
    assert many > few
    half = len(ends) // 2  # each run's own end is the last after its parent's
    assert ends[half - 1] == ends[-1], replay("what is trained")
    assert again.weights_sha256 == base.weights_sha256


COUNTERS = ("epoch", "batch", "step", "images", "hits", "stale", "stopped")
"""What stands in `counters` of a checkpoint, in this order."""
HALF = moments(3, 0)["middle batch"][0]


class Loss(NamedTuple):
    """A run, the question it is stopped at, and pieces of its checkpoint -> what must differ where one is lost."""

    words: list[str]
    question: int
    pieces: dict[str, set[str]]


SMALL = ["model=mlp", "model.hidden=3", "model.width=16"]
WEIGHTS, END, METRICS = {"weights_sha256", "state_sha256"}, {"state_sha256"}, {"metrics.jsonl"}
LOST = {
    "sgd": Loss(
        recipe("dorefa", "sgd", 0.9) + SMALL,
        HALF,
        {
            "state.random.torch": WEIGHTS,
            "state.random.numpy": END,  # nothing of ours draws from it, a method of the user's may
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
    "adam": Loss(
        recipe("dorefa", "adam_cosine", None) + SMALL,
        HALF,
        {f"state.optimizer:{moment}": WEIGHTS for moment in ("exp_avg", "exp_avg_sq", "step")},
    ),
    "best": Loss(  # the first epoch is the best, and the third the last
        recipe("dorefa", "sgd", None, lr=1e-9, patience=2),
        moments(2, 0)["middle batch"][0],
        {"state.best": {"best", "best.pt"} | END, "state.counters.stale": {"final"} | END},
    ),
    "stopped": Loss(
        recipe("dorefa", "sgd", None, lr=1e-9, patience=2),
        moments(2, 0)["end of the epoch"][0],
        {"state.counters.stopped": {"final"} | END},
    ),
    "trainable": Loss(recipe("dq", "adam_cosine", None), HALF, {"state.trainable": {"CheckpointError"}}),
}
UNTRIED = {
    "identity": "without it a checkpoint is refused (tests/reliability/test_damage.py)",
    "state.random.cuda": "empty without a GPU",
    "session.wall_seconds": "test_a_run_may_be_stopped_again_and_again",
    "session.memory": "what warnings and observation remember (tests/training/test_layer_stats.py)",
}


@pytest.mark.parametrize("case", LOST)
def test_whatever_piece_of_the_state_is_lost_is_noticed(case: str, at: At) -> None:
    lost = LOST[case]
    noticed(at("alone", *lost.words), lost.question, lost.pieces)


def noticed(config: Config, question: int, pieces: dict[str, set[str]]) -> None:
    """Stop a run; resume it as it was saved, which must make no difference, and without each piece, which must."""
    whole, _ = alone(config)
    halted = beside(config, whole, "stopped")
    stopped(halted, question)
    fresh, newest = as_begun(config), TrainingSession._newest
    for i, piece in enumerate(("", *pieces)):
        again = replaced_out(config, Path(config.out).with_name(f"without{i}"))
        shutil.copytree(halted.out, again.out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TrainingSession, "_newest", lambda session, piece=piece: without(newest(session), fresh, piece)
            )
            try:
                result = resumed(again)
            except (CheckpointError, NotQuantized, ValueError) as error:  # the run itself notices
                found = {type(error).__name__, *END}
            else:
                found = differences(whole, result)
        assert pieces[piece] <= found if piece else not found, replay(f"lost: {piece or 'nothing'}; differ: {found}")
        tally("mutants noticed" if piece else "mutants' originals equal")


def as_begun(config: Config) -> dict[str, Any]:
    """What stands in a process that resumes this run before the checkpoint is read, other random numbers included."""
    parts = assemble(config)
    model = parts.install(parts.float_model())
    average = Average(model, config.optim.ema) if config.optim.ema is not None else None
    state = State(optim.build(model, config.optim), average)
    spoil_random_numbers()
    return {"state": state.save(model), "session": {"train_seconds": 0.0, "train_images": 0, "log_size": 0}}


def without(saved: dict[str, Any] | None, fresh: dict[str, Any], piece: str) -> dict[str, Any]:
    """Return a checkpoint with one piece as it is before a resume reads it.

    Args:
        piece: a path of keys; behind a colon the last part of the names of tensors at that path.
    """
    assert saved is not None
    changed = copy.deepcopy(saved)
    path, _, leaf = piece.partition(":")
    keys: list[Any] = [COUNTERS.index(key) if key in COUNTERS else key for key in path.split(".") if key]
    into, begun = changed, fresh
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
        assert any(not torch.equal(own[name], others[name]) for name in names), f"nothing to lose in {piece}"
        own |= {name: others[name] for name in names}
    elif keys:
        assert content_sha256({"": into[keys[-1]]}) != content_sha256({"": begun[keys[-1]]}), "nothing to lose"
        into[keys[-1]] = begun[keys[-1]]
    return changed


def test_every_piece_of_a_checkpoint_is_lost_once(at: At) -> None:
    saved = saved_in(stopped(at("alone", *recipe("float", "sgd", 0.9)), 1))
    found = {"identity", *(f"session.{key}" for key in saved["session"])}
    for key, part in saved["state"].items():
        inner = COUNTERS if key == "counters" else part if key == "random" else ()
        found |= {f"state.{key}.{name}" for name in inner} or {f"state.{key}"}
    tried = {piece.partition(":")[0] for lost in LOST.values() for piece in lost.pieces}
    assert len(saved["state"]["counters"]) == len(COUNTERS)
    assert found == tried | set(UNTRIED)


QUANTIZERS = {name: recipe(name, "adam_cosine", None) + SMALL for name in METHODS}
QUANTIZERS["dq"] += ["bits.w=4"]  # at 2 bits all layers get as many points, as before they were shared out
for learned in ("lsq", "uniform"):  # some inputs have negative values: `signed` and `low` have something to lose
    QUANTIZERS[learned] = [*recipe(learned, "adam_cosine", None), "model=test_resume:signed"]


def signed(shape: tuple[int, int, int], classes: int, *, width: int = 16) -> nn.Module:
    """A perceptron one of whose layers reads a normalization, the other an activation."""
    inside = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(inside, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.BatchNorm1d(width)]
    return nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(width, width), nn.Linear(width, classes))


QUICK = ("inq", "mlq", "lsq")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in QUICK)]
)
def test_whatever_a_quantizer_keeps_is_noticed_when_lost(name: str, at: At) -> None:
    """Masks, phases, orders, ranges, learned steps: stopped in the fourth of five epochs, in a phase that goes on."""
    config = at("alone", *QUANTIZERS[name])
    parts = assemble(config)
    kept = parts.install(parts.float_model()).state_dict()
    leaves = {key.rpartition(".")[2] for key in kept if is_quantizer_key(key)}
    if not parts.epochs or not leaves:
        return  # nothing saved on the way, or nothing in its quantizers
    noticed(config, HALF, {f"state.model:{leaf}": END for leaf in sorted(leaves)})


MODEL = "task.model"
RECOMPUTED = {
    "task.probe": "images of the data set",
    "task.train.__self__": "the loader: the data set, its mean and deviation",
    "task.validate": "the loader",
    "task.method.teachers": "the teacher: loaded anew from the float parent, never trained",
    "task.method.loss(teacher)": "the teacher",
    "task.model: ImageQuantizer.low": "from the range of images",
    "task.model: ImageQuantizer.span": "from the range of images",
    "task.model: hwgq.HWGQActivation.levels": "from width and options",
    "task.model: lsq.LSQActivation.is_signed": "`signed` of the state_dict, asked for once; a load forgets it",
}
"""What may live outside the state_dict: each is the same again, whenever it is made anew."""


@pytest.mark.parametrize("name", METHODS)
def test_nothing_that_a_run_needs_hides_from_the_state(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walks all that the loop can reach: attributes, lists, dictionaries, closures; compares plain values over time."""
    seen: list[Task] = []
    before: dict[str, str] = {}

    def watched(task: Task, state: State, watch: Callbacks) -> None:
        if task.method.name == name:
            before.update(plain_values(task.model))
            seen.append(task)
        fit(task, state, watch)
        if task.method.name == name:
            raise Interrupted("this is enough")

    monkeypatch.setattr(experiment, "fit", watched)
    more = [] if name == "float" else ["layers.first=same", "init=scratch"]
    with pytest.raises(Interrupted):
        resumed(at("alone", *recipe(name, "sgd", None, epochs=1), *more))
    (task,) = seen
    kept = {id(tensor) for tensor in task.model.state_dict(keep_vars=True).values()}
    assert unexplained(hidden(task, "task", kept)) == []
    changed = [path for path, value in plain_values(task.model).items() if before.get(path) != value]
    assert unexplained(changed) == []
    names = [registry.find("method", name).__module__, "qbench.quant.layers", "qbench.quant.masks", "qbench.quant.ops"]
    for module in (sys.modules[n] for n in names):
        values = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        assert [p for key, value in values.items() for p in hidden(value, f"{module.__name__}.{key}", set())] == []


def unexplained(paths: Iterable[str]) -> list[str]:
    """Paths that no line of RECOMPUTED is about."""
    return [path for path in paths if not any(path.startswith(known) for known in RECOMPUTED)]


def hidden(thing: Any, path: str, kept: set[int], met: dict[int, Any] | None = None) -> list[str]:
    """Paths to tensors, arrays and random generators that can be reached from a thing and are not `kept`.

    An attribute of the network's parts is named by their kind: `task.model: lsq.LSQActivation.step`.
    """
    met = {} if met is None else met
    if id(thing) in met or id(thing) in kept or isinstance(thing, PLAIN):
        return []
    met[id(thing)] = thing
    if isinstance(thing, STATEFUL):
        return [path]
    if isinstance(thing, nn.Module) and path.startswith(MODEL):
        path = f"{MODEL}: {kind(thing)}"
    return [found for name, inner in inside(thing) for found in hidden(inner, f"{path}{name}", kept, met)]


PLAIN = (int, float, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
STATEFUL = (torch.Tensor, np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def kind(module: nn.Module) -> str:
    """`lsq.LSQActivation`, `BatchNorm2d`."""
    own = type(module).__module__
    return (f"{own.rpartition('.')[2]}." if own.startswith("qbench.methods") else "") + type(module).__name__


def inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a thing holds, with how to get there."""
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
    if isinstance(thing, nn.Module):  # its parts under their own names
        parts = {**thing._parameters, **thing._buffers, **thing._modules}
        own = {key: value for key, value in vars(thing).items() if key not in ("_parameters", "_buffers", "_modules")}
        yield from ((f".{key}", value) for key, value in (parts | own).items())
    elif hasattr(thing, "__dict__"):
        yield from ((f".{key}", value) for key, value in vars(thing).items())


def plain_values(model: nn.Module) -> dict[str, str]:
    """Attributes of modules that are neither tensors nor modules, as text; not torch's own but for hooks."""
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
def test_the_walk_finds_what_is_hidden(hide: Callable[[nn.Module, torch.Tensor], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert hidden(model, "", kept) == []
    hide(model[0], torch.ones(2))
    assert len(hidden(model, "", kept)) == 1
