"""Measures on a fixed part of the training split, for methods that use data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) as the network takes them, and labels (N,)."""


class Probe:
    """A fixed part of the training split, used to measure losses, gradients or layer responses.

    All measurements run in eval mode, leave batch-norm statistics unchanged and restore the random
    state. No quantization method ever sees validation or test data.

    Args:
        batches: batches as the network takes them, on the network's device.
        loss: (logits, labels) -> mean loss of the batch, a scalar.
    """

    def __init__(self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.batches = tuple(batches)
        self._loss = loss

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss over the probe."""
        with eval_mode_keeping_rng(model), torch.no_grad():
            return self._mean_loss(model).item()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return parameter name -> gradient of the mean loss, without changing any `.grad`."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with eval_mode_keeping_rng(model), torch.enable_grad():
            grads = torch.autograd.grad(self._mean_loss(model), list(named.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}

    def responses(self, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's inputs and outputs, concatenated over the probe, without gradient."""
        with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, [layer]) as calls:
            for images, _ in self.batches:
                model(images)
        return torch.cat([call.input for call in calls]), torch.cat([call.output for call in calls])

    def _mean_loss(self, model: nn.Module) -> Tensor:
        count = sum(len(labels) for _, labels in self.batches)
        parts = [self._loss(model(images), labels) * len(labels) for images, labels in self.batches]
        return torch.stack(parts).sum() / count
