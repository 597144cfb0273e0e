"""Deviations of public code from LSQ's paper."""

from dataclasses import replace

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.deviations.registry import Deviation, recast
from qbench.methods.lsq import SMALLEST, LSQActivation, LSQWeight
from qbench.quant.layers import clamp_min_
from qbench.quant.method import Method
from qbench.quant.ops import straight_through
from qbench.quant.quantizer import Grid


def _zeros_passing_gradient(x: Tensor) -> Tensor:
    """Return zeros of the shape of x. The gradient of these zeros passes to x unchanged."""
    return straight_through(x, torch.zeros_like(x))


class UnmaskedWeight(LSQWeight):
    """Weight quantizer whose gradient also passes for weights beyond the outermost levels."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return super().forward(w.detach()) + _zeros_passing_gradient(w)


class UnmaskedActivation(LSQActivation):
    """Input quantizer whose gradient also passes for inputs beyond the outermost levels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return super().forward(x.detach()) + _zeros_passing_gradient(x)


class UnclampedWeight(LSQWeight):
    """Weight quantizer whose step may become negative. A negative step reverses the order of the levels."""

    positive_parameters: tuple[str, ...] = ()

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group. Its levels are step * k for k = -Qn, ..., Qp, ascending."""
        grid = super().grid(w)
        return Grid(grid.points.sort(1).values, grid.arrange)


class UnclampedActivation(LSQActivation):
    """Input quantizer whose step may become negative. A negative step reverses the order of the levels."""

    positive_parameters: tuple[str, ...] = ()

    def grid(self, x: Tensor) -> Grid:
        """Return a grid with one group. Its levels are step * k for k = -Qn, ..., Qp, ascending."""
        return Grid(super().grid(x).points.sort(1).values)


def unmasked(method: Method) -> Method:
    """Return the method with gradients that also pass for values beyond the outermost levels. Steps stay above zero."""

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        clamp_min_(model, {UnmaskedWeight: ("step",), UnmaskedActivation: ("step",)}, SMALLEST)

    weight, activation = recast(method.weight, UnmaskedWeight), recast(method.input, UnmaskedActivation)
    return replace(method, weight=weight, input=activation, step=step)


def unclamped(method: Method) -> Method:
    """Return the method with steps that may become negative."""
    weight, activation = recast(method.weight, UnclampedWeight), recast(method.input, UnclampedActivation)
    return replace(method, weight=weight, input=activation, step=None)


def _quantized(bits: Bits) -> bool:
    return bits.w < FLOAT or bits.a < FLOAT


DEVIATIONS = {
    "unmasked_gradient": Deviation(
        "dL/dv = dL/dv_hat for every v, also for v beyond the outermost levels.",
        "hustzxd/LSQuantization, lsq.py, and its issue 1",
        unmasked,
        acts=_quantized, bits="w2a2",
    ),
    "unclamped_step": Deviation(
        "Steps may become negative.",
        "observed in ZouJiu1/LSQplus#12",
        unclamped,
        acts=_quantized, bits="w2a2",
    ),
}  # fmt: skip
