"""Multilayer perceptron with hidden layers of equal width.

A hidden layer consists of a linear layer, batch normalization and an activation.
"""

import math

from torch import Tensor, nn

from qbench.models.normalization import NORMS_1D, check_norm
from qbench.models.residual_blocks import Feeds


class MLP(nn.Module):
    """Perceptron with the linear layers `fc1`, `fc2`, ....

    Each linear layer except the last is followed by a `bn` and an `act` of the same number.
    """

    feeds: Feeds

    def __init__(self, features: int, classes: int, hidden: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.hidden = hidden
        for i in range(1, hidden + 1):
            self.add_module(f"fc{i}", nn.Linear(features, width, bias=norm == "none"))
            self.add_module(f"bn{i}", NORMS_1D[norm](width))
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
        raise ValueError(f"hidden={hidden}: must be 1 or more layers")
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more units")
    check_norm(norm)
    return MLP(math.prod(shape), classes, hidden, width, norm)
