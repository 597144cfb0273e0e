"""Kinds of batch normalization in a network: affine, no_affine (without scale and shift), none."""

from collections.abc import Callable

from torch import nn

Norm = Callable[[int], nn.Module]
"""Function from the number of channels (or features) to a normalization layer."""

NORMS_2D: dict[str, Norm] = {
    "affine": nn.BatchNorm2d,
    "no_affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "none": lambda channels: nn.Identity(),
}
"""Maps each value of `model.norm` to a function that makes the normalization after a convolution."""

NORMS_1D: dict[str, Norm] = {
    "affine": nn.BatchNorm1d,
    "no_affine": lambda features: nn.BatchNorm1d(features, affine=False),
    "none": lambda features: nn.Identity(),
}
"""Maps each value of `model.norm` to a function that makes the normalization after a linear layer."""


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch normalization modules of a network, also of classes such as FrozenBatchNorm2d."""
    return [module for module in model.modules() if "BatchNorm" in type(module).__name__]


def check_norm(norm: str) -> None:
    """Raise `ValueError` if `norm` is not a value of `model.norm`."""
    if norm not in NORMS_2D:
        raise ValueError(f"norm={norm}: must be one of auto, {', '.join(NORMS_2D)}")


def remove_scale_and_shift(model: nn.Module) -> None:
    """Remove scale and shift from all batch normalizations of a network, in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            module.affine = False
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of all batch normalizations in a network, in place.

    Args:
        momentum: weight of the newest batch in the running averages.

    Raises:
        ValueError: `momentum` is not above 0 and below 1.
    """
    if not 0 < momentum < 1:
        raise ValueError(f"bn_momentum={momentum}: must be above 0 and below 1")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = momentum
