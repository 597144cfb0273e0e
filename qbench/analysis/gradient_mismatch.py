"""Compares straight-through gradients with the gradients of a smoothed network, layer by layer.

A quantizer's staircase Q has no useful derivative, so a method uses the derivative of another function in the backward
pass. The resulting straight-through gradients are not the gradients of the forward pass. In the smoothed network, each
quantizer computes E[Q(x + sigma z)] with z ~ N(0, 1). This function is smooth, and it is close to Q for small sigma.
The smoothed network therefore has true gradients. This module compares both kinds of gradient at the same weights. No
value of sigma is the right one, so several values are measured.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.finished_run import load_finished_network, probe_batches
from qbench.errors import CheckpointError
from qbench.methods.hwgq import HalfStepHWGQActivation, HWGQActivation
from qbench.quant.quantizer import Quantizer
from qbench.report.tables.table import Table

SIGMAS = (0.25, 0.5, 1.0)
"""The mismatch is measured at these standard deviations of the noise, in units of the quantizer's step."""

VERDICT_SIGMA = 0.5
"""Papers' claims are tested at this standard deviation of the noise, in units of the quantizer's step."""

Loss = Callable[[Tensor, Tensor], Tensor]
LayerMismatch = dict[str, tuple[float, float]]
"""Layer name -> cosine and bias of the layer's straight-through gradient."""
Mismatch = dict[str, dict[str, LayerMismatch]]
"""Sigma as text -> name of a backward pass -> mismatch of all layers."""


def smoothed_staircase(x: Tensor, thresholds: Tensor, levels: Tensor, sigma: float) -> Tensor:
    """Return E[Q(x + sigma z)] with z ~ N(0, 1) for a staircase Q.

    At each threshold t, Q rises by r to the next level. The expectation equals levels[0] plus the sum of
    r Phi((x - t) / sigma) over all thresholds, where Phi is the distribution function of N(0, 1). The derivative of the
    expectation is the sum of r times a Gaussian density with mean t and standard deviation sigma.

    Args:
        x: the inputs, of any shape.
        thresholds: the m thresholds in ascending order, of shape (m,).
        levels: the m + 1 levels in ascending order, of shape (m + 1,).
        sigma: standard deviation of the noise, in units of x.
    """
    y = levels[0].expand_as(x)
    for threshold, rise in zip(thresholds, levels[1:] - levels[:-1], strict=True):
        y = y + rise * torch.special.ndtr((x - threshold) / sigma)
    return y


class SmoothedHalfWave(Quantizer):
    """Computes the expected output of a half-wave quantizer whose input contains Gaussian noise.

    A half-wave quantizer is zero for negative inputs and has positive levels for positive inputs.
    `sigma` is the standard deviation of the noise in units of the first positive level. `first` is the first threshold,
    from which on the output is positive. The other thresholds are halfway between two levels.
    """

    levels: Tensor

    def __init__(self, positive: Tensor, sigma: float, first: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("levels", torch.cat([positive.new_zeros(1), positive]))
        self.first = first
        self.sigma = sigma * float(positive[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the expected output of the quantizer."""
        thresholds = (self.levels[1:] + self.levels[:-1]) / 2
        thresholds[0] = self.first
        return smoothed_staircase(x, thresholds.to(x), self.levels.to(x), self.sigma)


class _WithoutGradient(Quantizer):
    """A quantizer that blocks gradients.

    It takes the place of another quantizer. If the replacement changes a layer's gradient, then this gradient passes
    through the replaced quantizer.
    """

    def __init__(self, quantizer: HWGQActivation) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x).detach()


def cosine_and_bias(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the cosine between a gradient and a reference, and the bias of the gradient.

    The bias is p / r - 1. Here, p is the length of the gradient's projection on the reference, and
    r is the length of the reference. A bias of 0 with a cosine below 1 means that the gradient is the reference plus a
    perpendicular vector. A bias of -1 means that the gradient is perpendicular to the reference. For a zero gradient,
    the cosine is 0 and the bias is -1.

    Raises:
        ValueError: the reference is zero.
    """
    a, b = gradient.double().flatten(), reference.double().flatten()
    length, reference_length = a.norm().item(), b.norm().item()
    if reference_length == 0:
        raise ValueError("the reference gradient is zero, so the cosine is not defined")
    product = torch.dot(a, b).item()
    cosine = product / (length * reference_length) if length else 0.0
    return cosine, product / reference_length**2 - 1


def gradient_mismatch(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    backwards: Sequence[str],
    sigmas: Sequence[float] = SIGMAS,
) -> Mismatch:
    """Return the gradient mismatch of every layer whose gradient passes through a half-wave quantizer.

    Batch normalization uses the statistics of each batch, as in training. The model is not changed.

    Args:
        model: a network with half-wave quantizers.
        batches: images and labels. The differentiated loss is the mean over all images.
        loss: the loss function.
        backwards: names of the backward passes to measure.
        sigmas: standard deviations of the noise, in units of the quantizer's step.

    Raises:
        ValueError: the model has no half-wave quantizer.
    """
    if not list(_half_waves(model)):
        raise ValueError("the network has no half-wave quantizer; choose a run with method=hwgq or activation=hwgq")
    closed = _weight_gradients(model, batches, loss, _WithoutGradient)
    straight = {
        name: _weight_gradients(model, batches, loss, partial(_with_backward, backward=name)) for name in backwards
    }
    layers = [n for n, g in closed.items() if not all(torch.equal(g, grads[n]) for grads in straight.values())]
    mismatch: Mismatch = {}
    for sigma in sigmas:
        true = _weight_gradients(model, batches, loss, partial(_smooth, sigma=sigma))
        mismatch[str(sigma)] = {
            name: {layer: cosine_and_bias(gradients[layer], true[layer]) for layer in layers}
            for name, gradients in straight.items()
        }
    return mismatch


def mismatch_of_run(run: Path, backwards: Sequence[str]) -> Mismatch:
    """Return the gradient mismatch of a finished run's network.

    The loss is cross entropy on the probe, which is a fixed set of training images.

    Raises:
        CheckpointError: the network has other outputs than the network that was trained.
    """
    setup, model, changed = load_finished_network(run, weights="last", device="auto")
    if changed:
        raise CheckpointError(changed)
    return gradient_mismatch(model.to(setup.device), probe_batches(setup), F.cross_entropy, backwards)


def mismatch_table(runs: Sequence[Mismatch]) -> Table:
    """Return a table of cosine and bias, averaged over runs.

    The first rows show each layer at `VERDICT_SIGMA`. The last rows show the mean over layers at each sigma. Each
    backward pass has one column for the cosine and one column for the bias.
    """
    names = list(runs[0][str(VERDICT_SIGMA)])
    table = Table(("sigma", "layer", *(f"{name} {what}" for name in names for what in ("cosine", "bias"))))
    for layer in runs[0][str(VERDICT_SIGMA)][names[0]]:
        by_name = [[run[str(VERDICT_SIGMA)][name][layer] for run in runs] for name in names]
        table.rows.append((f"{VERDICT_SIGMA:g}", layer, *_mean_cells(by_name)))
    for sigma in runs[0]:
        by_name = [[pair for run in runs for pair in run[sigma][name].values()] for name in names]
        table.rows.append((sigma, "mean", *_mean_cells(by_name)))
    return table


def _mean_cells(by_name: Sequence[Sequence[tuple[float, float]]]) -> list[str]:
    return [f"{sum(pair[i] for pair in pairs) / len(pairs):.3f}" for pairs in by_name for i in (0, 1)]


def _half_waves(model: nn.Module) -> Iterator[tuple[str, HWGQActivation]]:
    for name, module in model.named_modules():
        if isinstance(module, HWGQActivation):
            yield name, module


def _with_backward(quantizer: HWGQActivation, backward: str) -> Quantizer:
    quantizer.backward = backward
    return quantizer


def _smooth(quantizer: HWGQActivation, sigma: float) -> Quantizer:
    first = float(quantizer.levels[0]) / 2 if isinstance(quantizer, HalfStepHWGQActivation) else 0.0
    return SmoothedHalfWave(quantizer.levels, sigma, first)


def _weight_gradients(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    replace: Callable[[HWGQActivation], Quantizer],
) -> dict[str, Tensor]:
    """Return the gradient dL/dw of each layer, for a copy of the model with other quantizers.

    `replace` returns the quantizer that takes the place of a half-wave quantizer.
    """
    model = copy.deepcopy(model).train()
    for name, quantizer in list(_half_waves(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replace(quantizer))
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout masks for all quantizers
        total = torch.stack([loss(model(images), labels) * len(labels) for images, labels in batches]).sum()
    mean_loss = total / sum(len(labels) for _, labels in batches)
    grads = torch.autograd.grad(mean_loss, list(weights.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), grads, strict=True)}
