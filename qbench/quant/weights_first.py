"""Quantizes the weights of all layers of a network together, at the start of a forward pass.

The results are bit-identical to those of a network that quantizes the weights of each layer when the layer is called.
Only the order of the work differs. On a CPU this order is faster, because the code and data of the weight quantizers
stay in the processor's caches. If quantizers ran between large convolutions, their code and data would have to be
loaded from memory each time. The backward pass has the same advantage: autograd begins with the latest operations, so
it reaches the weight quantizers of all layers together, near the end.
"""

import ctypes
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from qbench.quant.elementwise import is_dense, readable
from qbench.quant.quantizer import Quantizer

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

Result = TypeVar("Result")

_current: ContextVar["WeightsFirst | None"] = ContextVar("weights_first", default=None)


class WeightLayer(Protocol):
    """A quantized layer, with the attributes that the quantization of its weights reads."""

    label: str
    training: bool
    weight: Tensor
    weight_q: Quantizer


class WeightsFirst:
    """Remembers which layers the last forward pass called, and quantizes their weights when the next one begins.

    In the first forward pass, each layer quantizes its weights when it is called. In later passes, this happens only in
    the following cases:

    - The last forward pass did not call the layer.
    - The weight quantizer draws random numbers, or changes its own parameters or buffers.
    - The weights change during the forward pass.
    - The same forward pass has called the layer before.
    """

    def __init__(self) -> None:
        self._last: dict[WeightLayer, None] = {}  # layers that the last forward pass called, in this order
        self._called: dict[WeightLayer, None] = {}
        self._ready: dict[WeightLayer, tuple[Tensor, _State]] | None = None
        self._never: set[WeightLayer] = set()

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

    def weight(self, layer: WeightLayer, quantize: Callable[[WeightLayer], Tensor]) -> Tensor:
        """Return the quantized weights of a layer. `quantize` computes them."""
        if self._ready is None:
            self._ready = self._together(quantize)
        if layer in self._never:
            return quantize(layer)
        made = self._ready.pop(layer, None)
        if made is not None and made[1].holds(layer):
            self._called[layer] = None
            return made[0]
        before = _State(layer)
        result, draws = _draws_numbers(lambda: quantize(layer))
        if draws or made is not None or not before.holds(layer):
            self._never.add(layer)
        else:
            self._called[layer] = None
        return result

    def _together(self, quantize: Callable[[WeightLayer], Tensor]) -> dict[WeightLayer, tuple[Tensor, "_State"]]:
        """Return the quantized weights of the layers that the last forward pass called, and the state of each layer.

        If a quantizer changes its state for the first time, the change is undone, and its layer is left out from then
        on. If random numbers are drawn for the first time, all these layers are left out from then on.
        """
        generator, states = torch.get_rng_state(), {layer: _State(layer) for layer in self._last}
        weights, draws = _draws_numbers(lambda: {layer: quantize(layer) for layer in states})
        changed = [layer for layer, state in states.items() if draws or not state.holds(layer)]
        if draws:
            torch.set_rng_state(generator)
        for layer in changed:
            states[layer].restore()
        self._never |= set(changed)
        return {layer: (weight, states[layer]) for layer, weight in weights.items() if layer not in self._never}


class _State:
    """The values that determine the quantized weights of a layer: tensors, and torch's modes.

    Values are compared, because changes through `.data` do not change the version of a tensor.
    """

    def __init__(self, layer: WeightLayer) -> None:
        self._tensors = _tensors(layer)
        self._values = [t.detach().clone() for t in self._tensors]
        self._modes = _modes(layer)

    def holds(self, layer: WeightLayer) -> bool:
        """Return whether nothing has changed since this object was made."""
        tensors = _tensors(layer)
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        return same and self._modes == _modes(layer) and all(map(_equal, tensors, self._values))

    def restore(self) -> None:
        """Give the tensors the values that they had when this object was made."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                if not _equal(tensor, value):
                    tensor.copy_(value)


def _tensors(layer: WeightLayer) -> list[Tensor]:
    quantizer = layer.weight_q
    own = (*quantizer._parameters.values(), *quantizer._buffers.values())  # without torch's slow search for submodules
    if quantizer._modules:
        own = (*quantizer.parameters(), *quantizer.buffers())
    return [t for t in (layer.weight, *own) if isinstance(t, Tensor)]


def _modes(layer: WeightLayer) -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), layer.training


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Return whether two tensors have the same values. NaN counts as equal to NaN."""
    if _same_bytes(tensor, value) or torch.equal(tensor, value):
        return True
    return tensor.shape == value.shape and bool(((tensor == value) | ((tensor != tensor) & (value != value))).all())


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same layout and the same bytes in memory.

    This comparison is several times faster than `torch.equal`. If it cannot be made, the result is False.
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride() or not (readable((a, b)) and is_dense(a)):
        return False
    return not _compare(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())


def _draws_numbers(compute: Callable[[], Result]) -> tuple[Result, bool]:
    """Return a result, and whether its computation drew random numbers."""
    before = torch.get_rng_state()
    result = compute()
    return result, not torch.equal(before, torch.get_rng_state())


def weight_of(layer: WeightLayer, quantize: Callable[[WeightLayer], Tensor]) -> Tensor:
    """Return `quantize(layer)`, the quantized weights of a layer. `WeightsFirst` may have computed them already."""
    if torch.compiler.is_compiling():
        return quantize(layer)
    current = _current.get()
    weight = layer.weight
    if current is None or not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return quantize(layer)
    return current.weight(layer, quantize)
