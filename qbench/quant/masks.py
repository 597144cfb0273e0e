"""Implements growing masks of frozen weights, which incremental methods (INQ, SLQ, MLQ) use.

Each weight of a layer is free or frozen. For a frozen weight, the layer uses a stored value, and the latent weight
keeps the value that it had when it was frozen (`optimizer_step`). Free weights are trained, and are frozen later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qbench.quant.layers import quantized_layers
from qbench.quant.quantizer import Quantizer


def extend_mask(frozen: Tensor, score: Tensor, portion: float) -> Tensor:
    """Return a copy of the mask `frozen`, extended by the free weights with the highest scores.


    Args:
        frozen: the current mask (bool). The returned mask contains all weights of the current mask.
        score: one number per weight, of the shape of `frozen`. In a tie, the lower index is chosen.
        portion: fraction of all weights that the returned mask contains, 0 to 1. If `frozen` already contains a larger
            fraction, a copy of `frozen` is returned.
    """
    missing = round(portion * frozen.numel()) - int(frozen.sum())
    extended = frozen.flatten().clone()
    if missing > 0:
        candidates = score.detach().masked_fill(frozen, -torch.inf).flatten()
        extended[candidates.argsort(descending=True, stable=True)[:missing]] = True
    return extended.reshape(frozen.shape)


class FrozenWeight(Quantizer):
    """A weight quantizer that freezes a growing part of a layer's weights.

    The state has two buffers of the shape of the weights: the mask `frozen` (bool), and `value`, which contains the
    values of frozen weights and 0 elsewhere.
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
        """Return the stored values (without gradient) of frozen weights, and the latent values of free weights."""
        return torch.where(self.frozen, self.value.to(w.dtype), w)

    @torch.no_grad()
    def freeze(self, mask: Tensor, value: Tensor) -> None:
        """Freeze the free weights in `mask` at `value`. Weights that are already frozen keep their values."""
        new = mask & ~self.frozen
        self.value.copy_(torch.where(new, value, self.value))
        self.frozen.logical_or_(mask)

    @contextmanager
    def frozen_for_now(self, mask: Tensor, value: Tensor) -> Iterator[None]:
        """Freeze weights only within a `with` block, to measure the effect of freezing them."""
        before = self.frozen.clone(), self.value.clone()
        self.freeze(mask, value)
        try:
            yield
        finally:
            self.frozen.copy_(before[0])
            self.value.copy_(before[1])


@torch.no_grad()
def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, but leave the latent values of frozen weights unchanged.

    Frozen weights have no gradient, but momentum and weight decay would go on changing their latent values. The errors
    of quantization are measured with these values, and other runs can start from them.
    """
    layers = [(layer.weight, layer.weight_q) for layer in quantized_layers(model).values()]
    kept = [(w, q.frozen, w.clone()) for w, q in layers if isinstance(q, FrozenWeight)]
    optimizer.step()
    for weight, frozen, before in kept:
        weight.copy_(torch.where(frozen, before, weight))


def stage(epoch: int, epochs: int, stages: int, short_end: bool = False) -> int:
    """Return the stage (counted from 0) to which an epoch belongs.

    The epochs are divided equally among the stages. The last epoch is always in the last stage. With `short_end`, the
    last stage consists of the last epoch alone, and the other stages share the other epochs.
    """
    if epoch == epochs - 1:
        return stages - 1
    if short_end:
        return max(stage(epoch, epochs - 1, stages - 1), 0)
    return epoch * stages // epochs


def stage_borders(epochs: int, stages: int, short_end: bool = False) -> list[int]:
    """Return the first epoch of each stage except stage 0. The function is meant for `Method.phases`."""
    numbers = [stage(epoch, epochs, stages, short_end) for epoch in range(epochs)]
    return [epoch for epoch in range(1, epochs) if numbers[epoch] != numbers[epoch - 1]]
