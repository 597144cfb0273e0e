"""Defines the probe: a fixed part of the training split that methods use for measurements."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls

Batch = tuple[Tensor, Tensor]
"""A batch: normalized images (N, C, H, W), and their labels (N,)."""


class Probe:
    """A fixed part of the training split, used to measure losses, gradients and layer outputs.

    All measurements run in eval mode, do not change batch-norm statistics, and restore the state of the random number
    generators. Quantization methods never see validation or test data.

    Args:
        batches: batches of normalized images with labels, on the network's device.
        loss: function of (logits, labels) that returns the mean loss of a batch as a scalar.
    """

    def __init__(self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.batches = tuple(batches)
        self._loss = loss

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss of a network over the probe's images."""
        with eval_mode_keeping_rng(model), torch.no_grad():
            return self._mean_loss(model).item()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the gradient of the mean loss for each parameter, by name. The attributes `.grad` are not changed."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with eval_mode_keeping_rng(model), torch.enable_grad():
            grads = torch.autograd.grad(self._mean_loss(model), list(named.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}

    def responses(self, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's inputs and outputs for all images of the probe, without gradient.

        If the network calls the layer with tensors of several sizes, both results are flattened, of shape (n,).
        """
        with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, [layer]) as calls:
            for images, _ in self.batches:
                model(images)
        return _joined([call.input for call in calls]), _joined([call.output for call in calls])

    def _mean_loss(self, model: nn.Module) -> Tensor:
        count = sum(len(labels) for _, labels in self.batches)
        parts = [self._loss(model(images), labels) * len(labels) for images, labels in self.batches]
        return torch.stack(parts).sum() / count


def _joined(batches: list[Tensor]) -> Tensor:
    one_size = len({batch.shape[1:] for batch in batches}) == 1
    return torch.cat(batches if one_size else [batch.flatten() for batch in batches])
