"""Implements methods in plain torch as public code does, so that step times can be compared.

Each function follows the public code that it names. Nothing is slowed down on purpose. Work that the public code does
once per epoch is not done at every step. The memory format is NCHW by default, as in the public code. The first and the
last layer are float.
"""

import math
from collections.abc import Iterable

import torch
from plain import NCHW, Act, Conv, Device, Layout, Make, Work, placed, plain, sgd, training_step
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class Round(Function):
    """Rounds to multiples of a step, and passes the gradient through unchanged.

    Like most ports, it clones the gradient.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, per_unit: float) -> Tensor:
        return torch.round(x * per_unit) / per_unit

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clone(), None


def round_to(x: Tensor, per_unit: float) -> Tensor:
    """Return x rounded to multiples of 1 / per_unit. The gradient passes unchanged."""
    return Round.apply(x, per_unit)  # type: ignore[no-untyped-call,no-any-return]


def dorefa_weights(w: Tensor, levels: int = 3) -> Tensor:
    """Return 2-bit weights as in pytorch_DoReFaNet and derived code, which multiplies the weights by their maximum."""
    t = torch.tanh(w)
    largest = torch.max(torch.abs(t)).detach()
    return largest * (2 * round_to(t / 2 / largest + 0.5, levels) - 1)


def dorefa_net() -> nn.Module:
    """Return a network with DoReFa W2A2 as in pytorch_DoReFaNet, which clamps and rounds in separate steps."""
    return plain(lambda c: Conv(c, dorefa_weights), lambda: Act(lambda x: round_to(torch.clamp(x, 0, 1), 3)))


def dorefa(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of `dorefa_net`."""
    return training_step(dorefa_net(), device, layout=layout)


class Pact(Function):
    """PACT's activation as in KwangHoonAn/PACT.

    The input is saved, and the backward pass makes masks by comparisons.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        scale = 3 / alpha
        return torch.round(torch.clamp(x, 0, alpha.item()) * scale) / scale

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors  # type: ignore[attr-defined]
        inside = ~((x < 0) | (x > alpha))
        return gradient * inside.float(), torch.sum(gradient * torch.ge(x, alpha).float()).view(-1)


class PactAct(nn.Module):
    """The layer around `Pact`, whose learned bound starts at 10."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 10.0))

    def forward(self, x: Tensor) -> Tensor:
        return Pact.apply(x, self.alpha)  # type: ignore[no-untyped-call,no-any-return]


def pact(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of PACT W2A2, with DoReFa's weights."""
    return training_step(plain(lambda c: Conv(c, dorefa_weights), PactAct), device, layout=layout)


class LearnedStep(nn.Module):
    """LSQ as in its paper's appendix and in lsq-net, where `detach` sets the gradients of scale and rounding."""

    def __init__(self, low: int, high: int, values: Tensor | None = None) -> None:
        super().__init__()
        self.low, self.high = low, high
        first = torch.ones(1) if values is None else values.detach().abs().mean().view(1) * 2 / math.sqrt(high)
        self.step = nn.Parameter(first)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.step / math.sqrt(self.high * x.numel())
        step = (self.step - scaled).detach() + scaled
        x = torch.clamp(x / step, self.low, self.high)
        return ((x.round() - x).detach() + x) * step


def lsq(device: Device, layout: Layout = NCHW) -> Work:
    """Return a training step of LSQ W2A2 with one step size per tensor."""
    net = plain(lambda c: Conv(c, LearnedStep(-2, 1, c.weight)), lambda: LearnedStep(0, 3))
    return training_step(net, device, layout=layout)


def hwgq_weights(w: Tensor) -> Tensor:
    """Return 1-bit weights as in EdMIPS.

    The scale of the weights is their standard deviation times the optimal step for a Gaussian.
    """
    step = 1.596 * w.detach().std().item()
    return StraightThrough.apply(w, step)  # type: ignore[no-untyped-call,no-any-return]


class StraightThrough(Function):
    """EdMIPS's weight quantizer at one bit, whose levels are plus and minus half a step."""

    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, step: float) -> Tensor:
        return ((torch.round(w / step + 0.5) - 0.5) * step).clamp(-step / 2, step / 2)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def hwgq(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of HWGQ W1A2 as in EdMIPS, which clamps at three steps of 0.538 and then rounds."""
    step = 0.538
    net = plain(lambda c: Conv(c, hwgq_weights), lambda: Act(lambda x: round_to(x.clamp(0, 3 * step), 1 / step)))
    return training_step(net, device, layout=layout)


def hidden(net: nn.Module) -> list[nn.Conv2d]:
    """Return all convolutions except the first."""
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)][1:]


def ttq(device: Device, layout: Layout = NCHW, threshold: float = 0.05) -> Work:
    """Return a step of TTQ W2A32 as in trained-ternary-quantization.

    The float kernels are stored separately from the network's kernels, which are ternary. After the backward pass,
    masks convert the gradients of the ternary kernels to gradients of the float kernels and of the two scales. As in
    the public code, three optimizers then update the float kernels and the scales, and the ternary kernels are
    overwritten. The signs of the gradients follow the chain rule.
    """
    net = placed(plain(), device, layout)
    kernels = [layer.weight for layer in hidden(net)]
    latent = [nn.Parameter(kernel.detach().clone()) for kernel in kernels]
    scales = [nn.Parameter(torch.ones(2, device=device)) for _ in kernels]
    optimizer, other = sgd(net.parameters()), [sgd(latent), sgd(scales)]

    def masks(w: Tensor) -> tuple[Tensor, Tensor]:
        bound = threshold * w.abs().max()
        return (w > bound).float(), (w < -bound).float()

    def requantize() -> None:
        for kernel, w, scale in zip(kernels, latent, scales, strict=True):
            positive, negative = masks(w.data)
            kernel.data = scale.data[0] * positive + -scale.data[1] * negative

    def gradients() -> None:
        for kernel, w, scale in zip(kernels, latent, scales, strict=True):
            assert kernel.grad is not None
            g, (up, down), (positive, negative) = kernel.grad.data, scale.data, masks(w.data)
            zero = torch.ones_like(g) - positive - negative
            w.grad = up * positive * g + down * negative * g + zero * g
            scale.grad = torch.stack([(positive * g).sum(), -(negative * g).sum()])
            kernel.grad.data.zero_()

    def after() -> None:
        for one in other:
            one.step()
        requantize()

    requantize()
    return training_step(net, device, optimizer, layout=layout, between=gradients, after=after)


class Sign(Function):
    """The sign as in XNOR-Net-PyTorch, which sets the gradient outside of -1 to 1 to zero by indexing."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = gradient.clone()
        gradient[x.ge(1)] = 0
        gradient[x.le(-1)] = 0
        return gradient


def xnor(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of XNOR W1A1 as in XNOR-Net-PyTorch.

    The step binarizes the weights, runs forward and backward, restores the weights, corrects the gradients and updates
    the weights. The earliest versions of the public code also compute the mean of |x| over the channels, but do not use
    this mean. This step therefore does not compute it.
    """
    net = placed(plain(activation=lambda: Act(Sign.apply)), device, layout)
    kernels = [layer.weight for layer in hidden(net)]
    saved = [kernel.detach().clone() for kernel in kernels]

    def mean(w: Tensor) -> Tensor:
        total: Tensor = w.norm(1, 3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True)
        return total.div(w[0].nelement())

    def binarize() -> None:
        for kernel, keep in zip(kernels, saved, strict=True):
            kernel.data = kernel.data.add(-kernel.data.mean(1, keepdim=True))
            kernel.data.clamp_(-1, 1)
            keep.copy_(kernel.data)
            kernel.data = kernel.data.sign() * mean(kernel.data).expand_as(kernel.data)

    def restore() -> None:
        for kernel, keep in zip(kernels, saved, strict=True):
            kernel.data.copy_(keep)
            assert kernel.grad is not None
            w, g, n = kernel.data, kernel.grad.data, kernel[0].nelement()
            scale = mean(w).expand_as(w).clone()
            scale[w.lt(-1)] = 0
            scale[w.gt(1)] = 0
            shared = (w.sign() * g).sum(3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True).div(n)
            kernel.grad.data = (scale * g + shared.expand_as(w) * w.sign()).mul(1 - 1 / w.shape[1]).mul(n)

    return training_step(net, device, layout=layout, before=binarize, between=restore)


def power_of_two(w: Tensor, bits: int = 5) -> Tensor:
    """Return INQ's quantized weights. Each weight is rounded to zero or to the nearest power of two."""
    top = torch.floor(torch.log2(4 * w.abs().max() / 3)).item()
    grid = torch.tensor([0.0, *(2.0 ** (top - i) for i in range(2 ** (bits - 2)))], device=w.device)
    nearest = (w.abs().unsqueeze(-1) - grid).abs().argmin(-1)
    return grid[nearest] * w.sign()


def half_frozen(w: Tensor) -> Tensor:
    """Return INQ's mask, which selects the half of the weights with the larger magnitudes."""
    return w.abs() >= w.abs().median()


def assemble(w: Tensor, fixed: Tensor) -> Tensor:
    """Return the weights, with every frozen weight replaced by its value in `fixed`.

    Free weights have nan in `fixed`.
    """
    taken = ~torch.isnan(fixed)
    whole = torch.zeros_like(fixed)
    whole[taken] = fixed[taken]
    return whole + torch.isnan(fixed).float() * w


def inq_masked(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of INQ W5A32 with half of the weights frozen, as in quantlab.

    Every forward pass inserts the frozen weights.
    """

    def frozen(layer: nn.Conv2d) -> nn.Module:
        w = layer.weight.detach().to(device)
        fixed = torch.where(half_frozen(w), power_of_two(w), float("nan"))
        return Conv(layer, lambda weight: assemble(weight, fixed))

    return training_step(plain(frozen), device, layout=layout)


class MaskedSGD(torch.optim.Optimizer):
    """SGD as in INQ-pytorch, which multiplies the update of every parameter by a mask."""

    def __init__(self, parameters: Iterable[Tensor], masks: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.01, "momentum": 0.9})
        self.masks = masks

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p, mask in zip(group["params"], self.masks, strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.data)
            update = state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad.data)
            update.mul_(mask)
            p.data.add_(update, alpha=-group["lr"])


def inq_optimizer(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of INQ W5A32 with half of the weights frozen, as in INQ-pytorch.

    The frozen weights are set once. Masks then keep updates from changing these weights.
    """
    net = placed(plain(), device, layout)
    kernels = {id(layer.weight) for layer in hidden(net)}
    masks = []
    for p in net.parameters():
        freeze = half_frozen(p.data) if id(p) in kernels else torch.zeros_like(p.data, dtype=torch.bool)
        masks.append((~freeze).float())
        if id(p) in kernels:
            p.data = torch.where(freeze, power_of_two(p.data), p.data)
    return training_step(net, device, MaskedSGD(net.parameters(), masks), layout=layout)


PUBLISHED: dict[str, Make] = {
    "DoReFa W2A2 as everybody writes it": dorefa,
    "LSQ W2A2 as published": lsq,
    "PACT W2A2 as published": pact,
    "HWGQ W1A2 as ports write it": hwgq,
    "XNOR W1A1 as ports write it": xnor,
    "TTQ W2A32 as ports write it": ttq,
    "INQ W5A32 as ports write it (mask and project every step)": inq_masked,
    "INQ W5A32 as ports write it (mask in the optimizer)": inq_optimizer,
}
