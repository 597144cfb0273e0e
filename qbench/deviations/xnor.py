"""Deviations from the usual implementation of XNOR-Net, found in public code or in the paper's printed formulas."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qbench.deviations.registry import Deviation, recast
from qbench.methods.xnor import (
    ADAM_FACTOR,
    BinaryActivation,
    BinaryWeight,
    binarize_activation,
    binarize_weight,
    filter_scale,
    multiply_gradients,
)
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import in_float32, sign, straight_through, surrogate
from qbench.quant.quantizer import Grid, Storage


def zero_at_zero(x: Tensor, binary: Tensor) -> Tensor:
    """Return `binary` with 0 wherever x is 0.

    `binary` was computed from x. The gradient passes to `binary` unchanged.
    """
    return straight_through(binary, torch.where(x.detach() == 0, 0.0, binary.detach()).to(binary.dtype))


@in_float32
def printed_weight_gradient(w: Tensor) -> Tensor:
    """Binarize weights with dL/dw = (1 / n + alpha w 1{|w| <= 1}) dL/dw_hat.

    w has the shape (O, ...) for O output filters. n is the number of weights per filter, and alpha is the scale of a
    filter.
    """
    alpha, latent = filter_scale(w), w.detach()
    return surrogate(w, alpha * sign(w), alpha * latent * (latent.abs() <= 1) + 1 / w[0].numel())


@in_float32
def printed_activation_gradient(x: Tensor) -> Tensor:
    """Return sign(x) with dL/dx = x 1{|x| <= 1} dL/dx_hat."""
    latent = x.detach()
    return surrogate(x, sign(x), latent * (latent.abs() <= 1))


class SignOfZeroWeight(BinaryWeight):
    """Binary weight quantizer with sign(0) = 0, so that zero is a third value."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return zero_at_zero(w, binarize_weight(w, gradient=self.gradient))

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group per output filter. The levels of a group are -alpha, 0 and alpha."""
        alpha = filter_scale(w).reshape(-1, 1)
        return Grid(torch.stack([-alpha, torch.zeros_like(alpha), alpha], 1), lambda t: t.reshape(len(t), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the bytes of codes and of one scale per filter. A code needs two bits for three levels."""
        return Storage(w.numel(), 2, 4 * len(w))


class SignOfZeroActivation(BinaryActivation):
    """Binary input quantizer with sign(0) = 0, so that zero is a third value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs of the activations."""
        return zero_at_zero(x, binarize_activation(x))

    def grid(self, x: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -1, 0 and 1."""
        return Grid(x.new_tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1))


class PrintedWeight(BinaryWeight):
    """Binary weight quantizer with the derivative of sign that the paper prints."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return printed_weight_gradient(w)


class PrintedActivation(BinaryActivation):
    """Binary input quantizer with the derivative of sign that the paper prints."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs of the activations."""
        return printed_activation_gradient(x)


def _has_paper_gradient(module: nn.Module) -> bool:
    """Return True. Raise `Unsupported` if the method has an option that selects the gradient of other code."""
    if isinstance(module, BinaryWeight) and module.gradient != "paper":
        raise Unsupported("deviation=printed_weight_gradient needs method.gradient=paper")
    return True


def times_1e9(method: Method) -> Method:
    """Return the method with all gradients multiplied by 1e9 before each step."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        multiply_gradients(model, ADAM_FACTOR)
        (method.step or (lambda model, optimizer: optimizer.step()))(model, optimizer)

    return replace(method, step=step)


DEVIATIONS = {
    "sign_of_zero": Deviation(
        "sign(0) = 0 in weights and activations.",
        "torch's sign in allenai/XNOR-Net, util.lua; in jiecaoyu/XNOR-Net-PyTorch too",
        lambda method: replace(
            method,
            weight=recast(method.weight, SignOfZeroWeight),
            input=recast(method.input, SignOfZeroActivation),
        ),
        acts=lambda bits: 1 in (bits.w, bits.a), bits="w1a32",
    ),
    "printed_weight_gradient": Deviation(
        "The derivative of a weight's sign is r 1{|r| <= 1}, as the paper prints it, not 1{|r| <= 1}.",
        "the paper, quoted in allenai/XNOR-Net#25",
        lambda method: replace(method, weight=recast(method.weight, PrintedWeight, _has_paper_gradient)),
        acts=lambda bits: bits.w == 1, bits="w1a32",
    ),
    "printed_activation_gradient": Deviation(
        "The derivative of an activation's sign is r 1{|r| <= 1}, as the paper prints it, not 1{|r| <= 1}.",
        "the paper, quoted in allenai/XNOR-Net#25",
        lambda method: replace(method, input=recast(method.input, PrintedActivation)),
        acts=lambda bits: bits.a == 1, bits="w32a1",
    ),
    "times_1e9": Deviation(
        "All gradients are multiplied by 1e9, so that Adam's epsilon is negligible.",
        "allenai/XNOR-Net, train.lua at a9ebb147, with Adam; jiecaoyu/XNOR-Net-PyTorch and its issues 37, 47, 126",
        times_1e9,
        acts=lambda bits: 1 in (bits.w, bits.a), bits="w1a32",
    ),
}  # fmt: skip
