"""Batch normalization of the networks: with scale and shift, without them, or none at all."""

from collections.abc import Callable

from torch import nn

Norm = Callable[[int], nn.Module]
"""Number of channels (or features) -> normalization layer."""

NORMS_2D: dict[str, Norm] = {
    "affine": nn.BatchNorm2d,
    "no_affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "none": lambda channels: nn.Identity(),
}
"""Value of `model.norm` -> normalization after a convolution."""

NORMS_1D: dict[str, Norm] = {
    "affine": nn.BatchNorm1d,
    "no_affine": lambda features: nn.BatchNorm1d(features, affine=False),
    "none": lambda features: nn.Identity(),
}
"""Value of `model.norm` -> normalization after a linear layer."""


def check_norm(norm: str) -> None:
    """Raise `ValueError` if `norm` is not a value of `model.norm`."""
    if norm not in NORMS_2D:
        raise ValueError(f"norm={norm}: must be one of auto, {', '.join(NORMS_2D)}")
