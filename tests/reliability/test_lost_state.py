"""If any piece of the saved state is lost, the comparison of resumed runs notices it (R3)."""

import copy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import resumed_runs
import torch
from resumed_runs import (
    COUNTERS,
    END,
    HALF,
    METHODS,
    METRICS,
    SMALL,
    WEIGHTS,
    At,
    change_random_state,
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

from qbench.config.schema import Config
from qbench.errors import CheckpointError
from qbench.experiment.session import TrainingSession
from qbench.experiment.setup import assemble
from qbench.quant.layers import is_quantizer_key
from qbench.quant.verify import NotQuantized
from qbench.training import optimizer as optim
from qbench.training.digests import content_sha256
from qbench.training.state import State, WeightAverage

counted_clock = resumed_runs.counted_clock
report_counts = resumed_runs.report_counts
at = resumed_runs.at


class LostPieces(NamedTuple):
    """A run, the call of `stop` that ends it, and pieces of its checkpoint -> what must differ
    without the piece.
    """

    words: list[str]
    call: int
    pieces: dict[str, set[str]]


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
    "data": "digest of the images (tests/experiment/test_data_check.py)",
    "state.random.cuda": "empty without a GPU",
    "session.wall_seconds": "test_a_run_may_be_stopped_several_times",
    "session.peak_bytes": "peak memory (tests/runs/test_records.py)",
    "session.baseline": "evaluations of the float baseline (tests/runs/test_records.py)",
    "session.memory": "memory of warnings and observation (tests/training/test_layer_stats.py)",
}


@pytest.mark.full
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
    existing = {"identity", "data", *(f"session.{key}" for key in saved["session"])}
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
    QUANTIZERS[learned] = [*recipe(learned, "adam_cosine", None), "model=test_lost_state:signed"]


def signed(shape: tuple[int, int, int], classes: int, *, width: int = 16) -> nn.Module:
    """Return a perceptron; one layer reads a normalization's output, another an activation's."""
    inputs = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.BatchNorm1d(width)]
    return nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(width, width), nn.Linear(width, classes))


FAST_QUANTIZERS = ("inq",)


@pytest.mark.parametrize(
    "name", [*FAST_QUANTIZERS, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in FAST_QUANTIZERS)]
)
def test_the_loss_of_any_buffer_of_a_quantizer_is_noticed(name: str, at: At) -> None:
    """Masks, phases, orders, ranges, learned steps; stopped within a phase, in epoch 4 of 5."""
    config = at("alone", *QUANTIZERS[name])
    parts = assemble(config)
    model = parts.install(parts.float_model())
    leaves = {key.rpartition(".")[2] for key in model.state_dict() if is_quantizer_key(key, model)}
    if not parts.epochs or not leaves:
        return  # it saves no checkpoint, or its quantizers have no state
    check_losses(config, HALF, {f"state.model:{leaf}": END for leaf in sorted(leaves)})
