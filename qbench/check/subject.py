"""Provides the method under test, small networks and synthetic data. All random numbers are seeded."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.models import mlp, resnet
from qbench.quant.install import install
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.method import Method
from qbench.quant.probe import Batch, Probe

SHAPE, CLASSES, IMAGES, BATCH = (1, 8, 8), 3, 48, 16

EPOCHS = 4
"""Number of training epochs. Incremental methods quantize all weights within these epochs."""

Make = Callable[[Bits], Method]


class PropertyViolation(Exception):
    """Raised if a property does not hold. The message states the place and the size of the deviation."""


class NotApplicable(Exception):
    """Raised if a property does not apply to the method. The message states the reason."""


@dataclass(frozen=True)
class MethodUnderTest:
    """The method under test, and a function that creates it at given widths.

    Args:
        name: the name of the method.
        make: function that takes widths, and returns the method at these widths.
        default: the default widths of the method.
    """

    name: str
    make: Make
    default: Bits
    _networks: dict[tuple[Bits, int], nn.Module] = field(default_factory=dict)

    def widths(self, key: str) -> list[int]:
        """Return the supported widths below 32 of weights, activations or gradients (`key` w, a or g)."""
        supported = self.make(self.default).supported_bits.get(key, ())
        return [width for width in range(1, FLOAT) if width in supported]

    @property
    def supported_bits(self) -> list[Bits]:
        """The combinations of widths to check.

        The combinations are the default widths and, for each supported width of w, a or g, this width with 32 bits for
        the other two kinds of tensors.
        """
        single = [Bits(**{key: width}) for key in "wag" for width in self.widths(key)]
        return list(dict.fromkeys([*single, *([self.default] if self.default != Bits() else [])]))

    def float_network(self) -> nn.Module:
        """Return a small float convolutional network that the method supports. Every call returns the same weights."""
        torch.manual_seed(1)
        norm = self.make(self.default).requires.norm or "affine"
        return resnet.build(SHAPE, CLASSES, depth=8, width=4, norm=norm)

    def network(self, bits: Bits, epoch: int = EPOCHS - 1) -> nn.Module:
        """Return a copy of the float network, quantized by the method. The copy is in the state of epoch `epoch`."""
        method = self.make(bits)
        key = bits, epoch if method.on_epoch else 0
        if key not in self._networks:
            model = self.float_network()
            install(method, model, example=torch.zeros(1, *SHAPE))
            advance(method, model, last=epoch)
            self._networks[key] = model.eval()
        return copy.deepcopy(self._networks[key])

    def layers(self, bits: Bits) -> Iterator[tuple[str, QLayer]]:
        """Yield the name and the layer for each quantized layer of `network`."""
        yield from quantized_layers(self.network(bits)).items()


def advance(method: Method, model: nn.Module, data: Probe | None = None, last: int = EPOCHS - 1) -> None:
    """Prepare a method, and call its `on_epoch` for every epoch from 0 to `last`. The network is not trained."""
    data = data or probe()
    torch.manual_seed(2)
    if method.prepare:
        method.prepare(model, data)
    for epoch in range(last + 1):
        if method.on_epoch:
            method.on_epoch(model, epoch, EPOCHS, data)


def batches(shape: tuple[int, int, int] = SHAPE) -> list[Batch]:
    """Return batches of noise. The mean of an image depends on its class, so that a network can learn the classes."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(IMAGES) % CLASSES
    images = torch.rand(IMAGES, *shape, generator=generator) + labels.reshape(-1, 1, 1, 1) / CLASSES
    return [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, IMAGES, BATCH)]


def probe(shape: tuple[int, int, int] = SHAPE) -> Probe:
    """Return a probe that contains the first batch of `batches`."""
    return Probe(batches(shape)[:1], F.cross_entropy)


def tiny_network(norm: str) -> nn.Module:
    """Return a perceptron whose hidden layers have one weight each."""
    torch.manual_seed(1)
    return mlp.build((1, 1, 1), CLASSES, hidden=3, width=1, norm=norm)


def gradient_of(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a module's output for input x, and the gradient of the output's sum with respect to x.

    If x gets no gradient, the returned gradient is zero.
    """
    x = x.detach().clone().requires_grad_()
    y = module(x)
    if not y.requires_grad:
        return y.detach(), torch.zeros_like(x)
    (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return y.detach(), torch.zeros_like(x) if grad is None else grad
