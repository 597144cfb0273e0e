"""Guesses about keys that do not exist: right, or none."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from qbench.config import compose
from qbench.config.unknown_key import unknown_key_message
from qbench.errors import ConfigError

GUESSES = {
    "lr": "optim.lr",
    "device": "runtime.device",
    "batch_size": "optim.batch_size",
    "workers": "runtime.num_workers",
    "w": "bits.w",
    "a": "bits.a",
    "g": "bits.g",
    "teacher": "distill.teacher",
    "width": "model.width",
    "metod": "method",
    "optimizer": "optim",
    "data": "dataset",
    "epoch": "epochs",
    "seeds": "seed",
    "experimnt": "experiment",
    "momentum": "+optim.momentum",
    "weight_decay": "optim.weight_decay",
    "schedule": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "learning_rate": "optim.lr",
    "optim.learning_rate": "optim.lr",
    "weights": "bits.w",
    "bits.weights": "bits.w",
    "bits.act": "bits.a",
    "temperature": "distill.temperature",
    "threads": "runtime.threads",
    "runtime.workers": "runtime.num_workers",
    "runtime.save_seconds": "runtime.checkpoint_seconds",
    "model.widht": "model.width",
    "norm": "model.norm",
    "val": "dataset.val",
    "pretrain.lr": "pretrain.optim.lr",
    "pretrain.batch_size": "pretrain.optim.batch_size",
    "training.lr": "optim.lr",
    "layer.first": "layers.first",
    "grid.factors": "lr_grid.factors",
    "smoothing": "optim.label_smoothing",
    "gpu": "runtime.device",
}
NO_GUESS = ["name", "recipe", "optim.lookahead", "optim.betas", "model.dropout", "wd", "bits.x"]


@pytest.fixture(scope="module")
def tree() -> dict[Any, Any]:
    """The composed configuration of `qbench method=dorefa`."""
    (node,) = compose.compose_nodes(["method=dorefa"], sweep=False)
    return dict(OmegaConf.to_container(node))  # type: ignore[arg-type]


@pytest.mark.parametrize(("typed", "key"), GUESSES.items())
def test_the_guess_is_right(typed: str, key: str, tree: dict[Any, Any]) -> None:
    message = unknown_key_message(typed, tree)
    assert message.startswith(f"{typed}: no such key; did you mean {key}?\nallowed: ")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("typed", NO_GUESS)
def test_no_guess_is_better_than_a_wrong_one(typed: str, tree: dict[Any, Any]) -> None:
    assert unknown_key_message(typed, tree).startswith(f"{typed}: no such key\nallowed: ")


def test_the_keys_in_the_same_place_are_listed(tree: dict[Any, Any]) -> None:
    allowed = unknown_key_message("optim.lookahead", tree).partition("allowed: ")[2].split(", ")
    assert {"optim.lr", "optim.schedule", "optim.batch_size", "+optim.momentum"} <= set(allowed)
    assert unknown_key_message("bits.x", tree).endswith("allowed: bits.w, bits.a, bits.g")
    top = unknown_key_message("recipe", tree).partition("allowed: ")[2].split(", ")
    assert {"method", "experiment", "lr_search", "seed"} <= set(top)
    assert "claim" not in top


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr=0.1", "lr: no such key; did you mean optim.lr?"),
        ("+lr=0.1", "lr: no such key; did you mean optim.lr?"),
        ("+bits.weights=2", "bits.weights: no such key; did you mean bits.w?"),
        ("-m method=dorefa,ttq w=1,2", "w: no such key; did you mean bits.w?"),
        ("method=dorefa optim.momentum=0.5", "optim.momentum: no such key in the selected option of optim\nto add"),
        ("lr_grid.lr=0.1", "lr_grid.lr: no such key; did you mean optim.lr?\nallowed: lr_grid.factors"),
    ],
)
def test_a_command_line_gets_the_message(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose.configurations(line.split())
    assert str(error.value).startswith(message)


def test_a_key_that_the_chosen_option_does_not_set_takes_a_plus() -> None:
    (config,) = compose.configurations(["method=dorefa", "+optim.momentum=0.5"])
    assert config.optim.momentum == 0.5
