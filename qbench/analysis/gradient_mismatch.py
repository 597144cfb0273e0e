"""How far straight-through gradients are from those of a network whose staircases are smooth, layer by layer.

A staircase Q has no useful derivative; a method puts another one in its place in the backward pass, so that forward and
backward do not belong to one function. Under noise they do: E[Q(x + sigma z)], z ~ N(0, 1), is smooth, and near Q for
small sigma. Its network's true gradient, at the same weights, is what straight-through gradients are held against. The
choice of sigma is a convention, so several are measured.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qbench.methods.hwgq import HWGQActivation
from qbench.quant.quantizer import Quantizer

SIGMAS = (0.25, 0.5, 1.0)
"""Of the noise, in steps of the quantizer; verdicts are made at STATED."""

STATED = 0.5

Loss = Callable[[Tensor, Tensor], Tensor]


def smoothed(x: Tensor, thresholds: Tensor, levels: Tensor, sigma: float) -> Tensor:
    """Return E[Q(x + sigma z)] for the staircase Q that rises to the next of `levels` (m + 1,) at each threshold (m,).

    It is levels[0] + sum of rises times Phi((x - t) / sigma), and so its derivative is the sum of rises times Gaussian
    densities at the thresholds, of standard deviation sigma.
    """
    y = levels[0].expand_as(x)
    for threshold, rise in zip(thresholds, levels[1:] - levels[:-1], strict=True):
        y = y + rise * torch.special.ndtr((x - threshold) / sigma)
    return y


class Smoothed(Quantizer):
    """Stands in for a half-wave quantizer: zero up to its threshold at zero, then its positive levels."""

    levels: Tensor

    def __init__(self, positive: Tensor, sigma: float) -> None:
        super().__init__()
        self.register_buffer("levels", torch.cat([positive.new_zeros(1), positive]))
        self.sigma = sigma * float(positive[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the expectation under noise."""
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        edges[0] = 0
        return smoothed(x, edges.to(x), self.levels.to(x), self.sigma)


class _Closed(Quantizer):
    """A quantizer that lets no gradient pass: what changes under it has come through one."""

    def __init__(self, site: Quantizer) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x).detach()


def agreement(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return cosine, and bias: the length of the gradient's projection on the reference over the reference's, minus 1.

    A bias of 0 with a cosine below 1 is a gradient that is right but for something perpendicular; -1 is one that knows
    nothing of the reference. Both are 0 and -1 for a gradient of zeros.

    Raises:
        ValueError: the reference is zero.
    """
    a, b = gradient.double().flatten(), reference.double().flatten()
    own, base = a.norm().item(), b.norm().item()
    if base == 0:
        raise ValueError("the reference gradient is zero: nothing can be compared with it")
    product = torch.dot(a, b).item()
    return product / (own * base) if own else 0.0, product / base**2 - 1


def mismatch(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    backwards: Sequence[str],
    sigmas: Sequence[float] = SIGMAS,
) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Return {sigma: {backward: {layer: (cosine, bias)}}} for the layers whose gradient comes through a quantizer.

    Batch normalization normalizes each batch, as in training; the model itself is left as it was.

    Args:
        model: one whose half-wave quantizers have positive `levels` and the name of a `backward`.
        batches: images and labels; gradients are of the mean loss over all.
        backwards: names to set them to in turn.

    Raises:
        ValueError: the model has no such quantizer.
    """
    if not list(_half_waves(model)):
        raise ValueError("the network has no half-wave quantizer: methods with `levels` and `backward` have")
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {str(sigma): {} for sigma in sigmas}
    closed = _gradients(model, batches, loss, _Closed)
    straight = {name: _gradients(model, batches, loss, partial(_turned, backward=name)) for name in backwards}
    layers = [n for n, g in closed.items() if not all(torch.equal(g, own[n]) for own in straight.values())]
    for sigma in sigmas:
        truth = _gradients(model, batches, loss, partial(_smoothed, sigma=sigma))
        for name, gradients in straight.items():
            found[str(sigma)][name] = {layer: agreement(gradients[layer], truth[layer]) for layer in layers}
    return found


def _half_waves(model: nn.Module) -> Iterator[tuple[str, HWGQActivation]]:
    for name, module in model.named_modules():
        if isinstance(module, HWGQActivation):
            yield name, module


def _turned(site: HWGQActivation, backward: str) -> Quantizer:
    site.backward = backward
    return site


def _smoothed(site: HWGQActivation, sigma: float) -> Quantizer:
    return Smoothed(site.levels, sigma)


def _gradients(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    change: Callable[[HWGQActivation], Quantizer],
) -> dict[str, Tensor]:
    """Return dL/dw by layer name for a copy of the model with its quantizers changed."""
    own = copy.deepcopy(model).train()
    for name, site in list(_half_waves(own)):
        parent, _, leaf = name.rpartition(".")
        setattr(own.get_submodule(parent), leaf, change(site))
    named = {n: m.weight for n, m in own.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    total = torch.stack([loss(own(images), labels) * len(labels) for images, labels in batches]).sum()
    mean = total / sum(len(labels) for _, labels in batches)
    grads = torch.autograd.grad(mean, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(named.items(), grads, strict=True)}
