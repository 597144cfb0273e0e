"""Quantizes the weights of all layers of a network together, at the start of a forward pass.

The results are bit-identical to those of a network that quantizes the weights of each layer when the layer is called.
Only the order of the work differs. On a CPU this order is faster, because the code and data of the weight quantizers
are then in the processor's caches. Between two large convolutions, they would have to be loaded from memory again.
The backward pass has the same advantage: autograd begins with the latest operations, so it reaches the weight
quantizers of all layers together, near the end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")

_current: ContextVar["WeightsFirst | None"] = ContextVar("weights_first", default=None)


class WeightsFirst:
    """Remembers which layers the last forward pass called, and quantizes their weights when the next one begins.

    In the first forward pass, each layer quantizes its weights when it is called. Later, some layers still do so:
    layers that the last forward pass did not call, and layers whose weight quantizer draws random numbers or changes
    during the forward pass. The second and later calls of a layer also do so.
    """

    def __init__(self) -> None:
        self._last: dict[nn.Module, None] = {}  # layers that the last forward pass called, in this order
        self._called: dict[nn.Module, None] = {}
        self._ready: dict[nn.Module, tuple[Tensor, object]] | None = None
        self._never: set[nn.Module] = set()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Quantize weights together in the forward pass within a `with` block."""
        token = _current.set(self)
        self._ready, self._called = None, {}
        try:
            yield
        finally:
            _current.reset(token)
            self._ready, self._last = None, self._called

    def weight(self, layer: nn.Module, quantize: Callable[[Any], Tensor]) -> Tensor:
        """Return the quantized weights of a layer. `quantize` computes them."""
        if self._ready is None:
            self._ready = self._together(quantize)
        if layer not in self._never:
            self._called[layer] = None
        weight, state = self._ready.pop(layer, (None, None))
        if weight is not None and state == _state(layer):
            return weight
        result, draws = _draws_numbers(lambda: quantize(layer))
        if draws or weight is not None:
            self._never.add(layer)
            self._called.pop(layer, None)
        return result

    def _together(self, quantize: Callable[[Any], Tensor]) -> dict[nn.Module, tuple[Tensor, object]]:
        """Return the quantized weights of the layers that the last forward pass called, and what determines them."""
        before = torch.get_rng_state()
        ready, draws = _draws_numbers(lambda: {layer: (quantize(layer), _state(layer)) for layer in self._last})
        if draws:  # for the first time, so the numbers are drawn again when the layers are called
            torch.set_rng_state(before)
            self._never |= self._last.keys()
            return {}
        return ready


def _draws_numbers(compute: Callable[[], Result]) -> tuple[Result, bool]:
    """Return a result, and whether its computation drew random numbers."""
    before = torch.get_rng_state()
    result = compute()
    return result, not torch.equal(before, torch.get_rng_state())


def _state(layer: nn.Module) -> object:
    """Return what determines the quantized weights of a layer, and whether they have gradients."""
    quantizer = layer.weight_q
    assert isinstance(quantizer, nn.Module)
    tensors = (layer.weight, *quantizer.parameters(), *quantizer.buffers())
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), layer.training
    return *((id(t), t._version) for t in tensors if isinstance(t, Tensor)), *modes


def weight_of(layer: nn.Module, quantize: Callable[[Any], Tensor]) -> Tensor:
    """Return `quantize(layer)`, the quantized weights of a layer, which `WeightsFirst` may have computed before."""
    if torch.compiler.is_compiling():
        return quantize(layer)
    current = _current.get()
    weight = layer.weight
    if current is None or not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return quantize(layer)
    return current.weight(layer, quantize)
