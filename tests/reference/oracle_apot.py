"""APoT in NumPy, transcribed from the authors' code for CIFAR, yhhhli/APoT_Quantization at 13204f1.

The authors' functions are `build_power_value`, `power_quant`, `weight_quantization` and `act_quantization`. Here they
compute one value after the other, with their backward passes. A value in the middle of two levels gets the lower level.
In the authors' code, the order of a set decides.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Quantized(NamedTuple):
    """Values, the slope of the input's gradient, and the slope of alpha's gradient, per element."""

    value: Array
    slope: Array
    alpha_slope: Array


def build_power_value(b: int) -> Array:
    """Return the levels of a code, ascending, the largest of which is 1."""
    base_a, base_b, base_c = [0.0], [0.0], [0.0]
    if b == 2:
        base_a += [2 ** (-i - 1) for i in range(3)]
    elif b == 4:
        for i in range(3):
            base_a.append(2 ** (-2 * i - 1))
            base_b.append(2 ** (-2 * i - 2))
    elif b == 3:
        for i in range(3):
            if i < 2:
                base_a.append(2 ** (-i - 1))
            else:
                base_b.append(2 ** (-i - 1))
                base_a.append(2 ** (-i - 2))
    elif b == 5:
        for i in range(3):
            if i < 2:
                base_a.append(2 ** (-2 * i - 1))
                base_b.append(2 ** (-2 * i - 2))
            else:
                base_c.append(2 ** (-2 * i - 1))
                base_a.append(2 ** (-2 * i - 2))
                base_b.append(2 ** (-2 * i - 3))
    values = sorted({a + c + d for a in base_a for c in base_b for d in base_c})
    return np.array(values) / max(values)


def power_quant(x: Array, grid: Array) -> Array:
    """Return the nearest level; of two equally near ones the lower."""
    return grid[np.abs(x[..., None] - grid).argmin(-1)]


def weight(w: Array, alpha: float, bits: int) -> Quantized:
    """Return quantized weights; the slope is that of W, through the division by its deviation."""
    std = w.std(ddof=1)
    v = (w - w.mean()) / std / alpha
    clipped = np.clip(v, -1, 1)
    size = np.abs(clipped)
    # two bits: uniform levels 0 and 1, rounded half to even
    projected = np.round(size) if bits == 2 else power_quant(size, build_power_value(bits - 1))
    q = projected * np.sign(clipped)
    outside = np.abs(v) > 1
    return Quantized(q * alpha, np.full_like(w, 1 / std), np.where(outside, np.sign(v), q - v))


def first_or_last(w: Array) -> Array:
    """Return the weights of first_conv and last_fc."""
    top = w.max()
    return np.round(w / top * 127) / 127 * top


def activation(x: Array, alpha: float, bits: int) -> Quantized:
    """Return quantized activations; x is at least 0, as after a ReLU."""
    v = x / alpha
    q = power_quant(np.minimum(v, 1), build_power_value(bits))
    above = v > 1
    return Quantized(q * alpha, (~above).astype(float), np.where(above, 1.0, q - v))
