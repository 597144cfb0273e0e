"""Masks that only grow: what incremental methods (INQ, SLQ, MLQ) share.

A layer's weights are free or frozen. Frozen ones compute with a stored value, whatever momentum and decay do to the
latent weight beneath; free ones are trained on and frozen later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def extend_mask(frozen: Tensor, score: Tensor, portion: float) -> Tensor:
    """Return `frozen` grown to the part `portion` of all weights by the free ones of highest score.

    Args:
        frozen: bool, the mask so far; the one returned holds it.
        score: one number a weight, of the same shape; ties go to the lower index.
        portion: accumulated, 0 to 1; a mask that is larger already comes back as it is.
    """
    missing = round(portion * frozen.numel()) - int(frozen.sum())
    grown = frozen.flatten().clone()
    if missing > 0:
        candidates = score.detach().masked_fill(frozen, -torch.inf).flatten()
        grown[candidates.argsort(descending=True, stable=True)[:missing]] = True
    return grown.reshape(frozen.shape)


class FrozenWeight(nn.Module):
    """A weight quantizer that freezes a growing part of a layer.

    State: `frozen` (bool, of the weights' shape) and `value` (the frozen weights' values, 0 elsewhere).
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
        """Return the frozen values and the free latent weights; frozen ones get no gradient."""
        return torch.where(self.frozen, self.value.to(w.dtype), w)

    @torch.no_grad()
    def freeze(self, mask: Tensor, value: Tensor) -> None:
        """Freeze the weights of `mask` that are free at `value`; those that are frozen keep theirs."""
        new = mask & ~self.frozen
        self.value.copy_(torch.where(new, value, self.value))
        self.frozen.logical_or_(mask)

    @contextmanager
    def frozen_for_now(self, mask: Tensor, value: Tensor) -> Iterator[None]:
        """Freeze for a while, to measure what freezing these weights would do."""
        kept = self.frozen.clone(), self.value.clone()
        self.freeze(mask, value)
        try:
            yield
        finally:
            self.frozen.copy_(kept[0])
            self.value.copy_(kept[1])


def stage(epoch: int, epochs: int, stages: int) -> int:
    """Return which of `stages` an epoch belongs to: even shares, and the last epoch always in the last stage."""
    return stages - 1 if epoch == epochs - 1 else epoch * stages // epochs


def stage_borders(epochs: int, stages: int) -> list[int]:
    """Return the first epochs of the stages after the first, as `Method.phases` wants them."""
    return [e for e in range(1, epochs) if stage(e, epochs, stages) != stage(e - 1, epochs, stages)]
