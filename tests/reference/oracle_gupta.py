"""Fixed-point training in slow, exact arithmetic: the reference for the tensor code.

`il` and `fl` are integer and fraction bits; `il` includes the sign. Section numbers such as 1a are
those of notes on the papers outside this repository.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


# Section 2a: a number


def ends(il: int, fl: int) -> tuple[Fraction, Fraction]:
    """The range: -2^(IL-1) and 2^(IL-1) - 2^-FL."""
    top = Fraction(2) ** (il - 1)
    return -top, top - Fraction(2) ** -fl


def floor_to(x: Fraction, fl: int) -> Fraction:
    """The largest multiple of eps = 2^-FL that is not above x."""
    eps = Fraction(2) ** -fl
    return floor(x / eps) * eps


def nearest(x: Fraction, fl: int) -> Fraction:
    """The floor if floor <= x <= floor + eps / 2, so also at a tie; else floor + eps."""
    eps, low = Fraction(2) ** -fl, floor_to(x, fl)
    return low if x <= low + eps / 2 else low + eps


def probability_up(x: Fraction, fl: int) -> Fraction:
    """The probability of floor + eps under stochastic rounding: (x - floor) / eps."""
    return (x - floor_to(x, fl)) / Fraction(2) ** -fl


def convert(x: Fraction, il: int, fl: int) -> Fraction:
    """Round to nearest, and saturate at the ends of the range."""
    low, high = ends(il, fl)
    return low if x <= low else high if x >= high else nearest(x, fl)


# Section 2a: a perceptron with one hidden layer, x -> w1 x + b1 -> ReLU -> w2 h + b2 -> softmax,
# everything rounded to nearest


@dataclass
class Perceptron:
    """Stored tensors w1, b1, w2, b2, their velocities, and for each kind of tensor its format (il,
    fl).
    """

    tensors: dict[str, FloatArray]
    formats: Mapping[str, tuple[int, int]]
    velocity: dict[str, FloatArray] = field(default_factory=dict)

    def to(self, kind: str, x: FloatArray) -> FloatArray:
        il, fl = self.formats[kind]
        return np.array([float(convert(Fraction(v), il, fl)) for v in x.flat], np.float64).reshape(x.shape)

    def in_range(self, kind: str, x: FloatArray) -> npt.NDArray[np.bool_]:
        low, high = ends(*self.formats[kind])
        return (x >= float(low)) & (x <= float(high))

    def start(self) -> None:
        for name, value in self.tensors.items():
            self.tensors[name] = self.to("weights" if name[0] == "w" else "biases", value)

    def gradients(self, x: FloatArray, labels: npt.NDArray[np.int64]) -> dict[str, FloatArray]:
        """Return gradients. Each matrix product is rounded once. No gradient passes through saturated outputs."""
        t = self.tensors
        wide1 = x @ t["w1"].T + t["b1"]
        z1 = self.to("activations", wide1)
        h = np.maximum(z1, 0)
        wide2 = h @ t["w2"].T + t["b2"]
        z2 = self.to("activations", wide2)
        p = np.exp(z2 - z2.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        loss_error = (p - np.eye(p.shape[1])[labels]) / len(x)  # of the mean over the batch, in float
        e2 = self.to("errors", loss_error) * self.in_range("activations", wide2)
        e1 = self.to("errors", (e2 @ t["w2"]) * (z1 > 0)) * self.in_range("activations", wide1)
        return {"w1": e1.T @ x, "b1": e1.sum(0), "w2": e2.T @ h, "b2": e2.sum(0)}

    def step(self, x: FloatArray, labels: npt.NDArray[np.int64], rate: float, momentum: float) -> None:
        """Update v <- momentum v + dL/dW, rounded if v has a format, and W <- Convert(W + Convert(-rate v))."""
        for name, grad in self.gradients(x, labels).items():
            v = momentum * self.velocity.get(name, np.zeros_like(grad)) + grad
            update = self.to("updates", -rate * v)
            self.tensors[name] = self.to("weights" if name[0] == "w" else "biases", self.tensors[name] + update)
            self.velocity[name] = self.to("momentum", v) if "momentum" in self.formats else v
