"""Masks of frozen weights that only grow: what incremental methods (INQ, SLQ, MLQ) share.

A layer's weights are free or frozen. Frozen ones compute with a stored value, whatever momentum and
decay do to the latent weight. Free ones are trained, and frozen later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qbench.quant.quantizer import Quantizer


def extend_mask(frozen: Tensor, score: Tensor, portion: float) -> Tensor:
    """Return `frozen` extended by the free weights of highest score, up to a portion of all.

    Args:
        frozen: bool, the mask so far; the returned one contains it.
        score: one number per weight, of the same shape; the lower index wins a tie.
        portion: accumulated, 0 to 1; a mask that is larger already is returned unchanged.
    """
    missing = round(portion * frozen.numel()) - int(frozen.sum())
    extended = frozen.flatten().clone()
    if missing > 0:
        candidates = score.detach().masked_fill(frozen, -torch.inf).flatten()
        extended[candidates.argsort(descending=True, stable=True)[:missing]] = True
    return extended.reshape(frozen.shape)


class FrozenWeight(Quantizer):
    """A weight quantizer that freezes a growing part of a layer.

    State: `frozen` (bool, of the weights' shape) and `value` (the frozen weights' values, 0
    elsewhere).
    """

    frozen: Tensor
    value: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.bool))
        self.register_buffer("value", torch.zeros_like(weight, requires_grad=False))

    @property
    def complete(self) -> bool:
        """Whether every weight is frozen."""
        return bool(self.frozen.all())

    def forward(self, w: Tensor) -> Tensor:
        """Return the values of frozen weights, without gradient, and the latent values of free
        ones.
        """
        return torch.where(self.frozen, self.value.to(w.dtype), w)

    @torch.no_grad()
    def freeze(self, mask: Tensor, value: Tensor) -> None:
        """Freeze the free weights in `mask` at `value`; those frozen already keep their value."""
        new = mask & ~self.frozen
        self.value.copy_(torch.where(new, value, self.value))
        self.frozen.logical_or_(mask)

    @contextmanager
    def frozen_for_now(self, mask: Tensor, value: Tensor) -> Iterator[None]:
        """Freeze weights while the context lasts, to measure the effect of freezing them."""
        before = self.frozen.clone(), self.value.clone()
        self.freeze(mask, value)
        try:
            yield
        finally:
            self.frozen.copy_(before[0])
            self.value.copy_(before[1])


def stage(epoch: int, epochs: int, stages: int) -> int:
    """Return the stage (from 0) of an epoch.

    Stages have equal shares, but the last epoch is always in the last stage.
    """
    return stages - 1 if epoch == epochs - 1 else epoch * stages // epochs


def stage_borders(epochs: int, stages: int) -> list[int]:
    """Return the first epochs of the stages after the first, for `Method.phases`."""
    return [e for e in range(1, epochs) if stage(e, epochs, stages) != stage(e - 1, epochs, stages)]
