"""Builds an integer network step by step, and converts values between float64, fixed point and integers."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qbench.deploy.about import About, image_range
from qbench.deploy.integer_network import IntegerStep
from qbench.deploy.integer_values import Value, fixed, fraction_bits, real, rescaling
from qbench.deploy.network import Argument, Network, Ref, Step, Stored

Array = np.ndarray


class NotInteger(Exception):
    """Raised if a step cannot be computed in integers. The message continues the text `LAYER: integer export`."""


class QuantizerPlace(NamedTuple):
    """The position of an activation quantizer with integer levels.

    Args:
        traced, integer: index of the quantizer's step in the traced network and in the integer network.
        unit: the real value of the integer 1.
        levels: the name of the tensor of levels in the traced network.
    """

    traced: int
    integer: int
    unit: float
    levels: str


class Builder:
    """An integer network under construction.

    Args:
        network: the traced network.
        quantized_later: indices of those steps of the traced network on which a quantizer depends.
    """

    def __init__(self, network: Network, about: About, quantized_later: set[int]) -> None:
        self.steps: list[IntegerStep] = []
        self.quantizers: list[QuantizerPlace] = []
        self.integer_places: set[int] = set()
        self.network = network
        self._shapes = [*network.shapes(about.shape), (2, *about.shape)]
        self._quantized_later = quantized_later
        self._converted: dict[tuple[int, bytes], Value] = {}
        self._values = {-1: real(-1, *image_range(about), image=True)}
        self._here, self._step = -1, network.steps[0]

    def begin(self, place: int, step: Step) -> tuple[list[object], dict[str, object]]:
        """Make a step of the traced network the current step, and return the arguments of this step."""
        self._here, self._step = place, step
        return list(map(self._argument, step.args)), {k: self._argument(v) for k, v in step.kwargs.items()}

    def _argument(self, argument: Argument) -> object:
        if not isinstance(argument, Ref):
            return argument
        if argument.item is not None:
            raise NotInteger("does not support functions that return several results")
        return self._values[argument.step]

    def finish(self, value: Value) -> None:
        """Set the result of the current step."""
        self._values[self._here] = value

    @property
    def here(self) -> int:
        """Index of the current step in the traced network."""
        return self._here

    @property
    def before_quantizer(self) -> bool:
        """Whether a quantizer reads the result of the current step."""
        return self._here in self._quantized_later

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the current step's first argument for a batch of two images."""
        first = self._step.args[0]
        assert isinstance(first, Ref)
        return self._shapes[first.step]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the current step's result for a batch of two images."""
        return self._shapes[self._here]

    def result(self, place: int) -> Value:
        """Return the converted result of a step of the traced network."""
        return self._values[place]

    def tensor(self, stored: Stored | None, default: float, count: int) -> Array:
        """Return a stored vector as float64. If it is None, return a vector of `count` elements with the default."""
        return np.full(count, default) if stored is None else self.network.tensors[stored.name].double().numpy()

    def add(self, function: str, *inputs: Value, integer: bool, **parameters: object) -> int:
        """Add a step to the integer network, and return the index of the step."""
        arrays = {key: value for key, value in parameters.items() if isinstance(value, np.ndarray)}
        numbers = {key: value for key, value in parameters.items() if key not in arrays}
        self.steps.append(IntegerStep(function, tuple(value.place for value in inputs), numbers, arrays))
        place = len(self.steps) - 1
        if integer:
            self.integer_places.add(place)
        return place

    def as_real(self, value: Value) -> Value:
        """Return a value as float64. For an integer value, add a step that converts integers to float64."""
        if not value.integer:
            return value
        place = self.add("affine", value, integer=False, scale=flat(value.scale), shift=flat(value.shift))
        result = real(place, *replace(value, floor=-np.inf, ceiling=np.inf).interval())
        return self.clipped(result, value.floor, value.ceiling) if value.clamped else result

    def clipped(self, value: Value, floor: float, ceiling: float) -> Value:
        """Add a step that clips a float64 value to [floor, ceiling], and return the result."""
        ends = {key: end if np.isfinite(end) else None for key, end in (("low", floor), ("high", ceiling))}
        place = self.add("clip", value, integer=False, **ends)
        return real(place, np.clip(value.low, floor, ceiling), np.clip(value.high, floor, ceiling))

    def as_fixed(self, value: Value, fraction: Array | None = None) -> Value:
        """Return a value as fixed-point numbers, after applying its scale, shift and clamp.

        By default, the number of fraction bits is the largest that fits.
        """
        low, high = value.interval()
        fraction = fraction_bits(low, high) if fraction is None else np.broadcast_to(fraction, low.shape)
        parts = (value.scale, value.shift, fraction, np.array([value.floor, value.ceiling]))
        key = value.place, b"".join(part.tobytes() for part in parts)
        if key not in self._converted:
            if value.integer:
                parameters = {name: flat(array) for name, array in rescaling(value, fraction).items()}
                place = self.add("rescale", value, integer=True, **parameters)
            else:
                place = self.add("fixed_point", value, integer=True, fraction=flat(fraction))
            self._converted[key] = fixed(place, low, high, fraction)
        return self._converted[key]

    def affine(self, x: Value, scale: Array, shift: Array) -> Value:
        """Return scale * x + shift. This adds a step only if x is float64 or has a clamp."""
        if x.clamped:
            x = self.as_fixed(x)
        if x.integer:
            return x.normalized(scale, shift)
        place = self.add("affine", x, integer=False, scale=flat(scale), shift=flat(shift))
        return real(place, *x.normalized(scale, shift).interval())


def flat(array: Array) -> Array:
    """Return per-channel values as a one-dimensional array."""
    return np.ascontiguousarray(array).reshape(-1)
