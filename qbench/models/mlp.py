"""Multilayer perceptron: hidden layers of equal width, each linear, batch normalization, activation."""

import math
from collections.abc import Callable

from torch import Tensor, nn

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "affine": nn.BatchNorm1d,
    "no_affine": lambda features: nn.BatchNorm1d(features, affine=False),
    "none": lambda features: nn.Identity(),
}


class MLP(nn.Module):
    """Linear layers `fc1`, `fc2`, ... with `bn` and `act` of the same number behind all but the last."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, features: int, classes: int, hidden: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.hidden = hidden
        for i in range(1, hidden + 1):
            self.add_module(f"fc{i}", nn.Linear(features, width, bias=norm == "none"))
            self.add_module(f"bn{i}", NORMS[norm](width))
            self.add_module(f"act{i}", nn.ReLU())
            features = width
        self.add_module(f"fc{hidden + 1}", nn.Linear(features, classes))
        self.feeds = {f"act{i}": (f"fc{i + 1}",) for i in range(1, hidden + 1)}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = x_NCHW.flatten(1)
        for i in range(1, self.hidden + 1):
            for part in ("fc", "bn", "act"):
                x = self.get_submodule(f"{part}{i}")(x)
        logits: Tensor = self.get_submodule(f"fc{self.hidden + 1}")(x)
        return logits


def build(
    shape: tuple[int, int, int], classes: int, *, hidden: int = 3, width: int = 128, norm: str = "affine"
) -> nn.Module:
    """Return a perceptron for images of `shape` (C, H, W) with `hidden` layers of `width` units."""
    if hidden < 1:
        raise ValueError(f"hidden={hidden}: allowed is 1 or more layers")
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more units")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    return MLP(math.prod(shape), classes, hidden, width, norm)
