"""Float: the network without quantization. It is the baseline of every other run, and the control.

Paper
    None: this is the baseline that each paper compares itself with.

Idea
    A quantized network is judged by its distance from the float network that it started from.
    `method=float` is that float baseline itself, trained by the recipe under `pretrain`. With
    `init=float` it is the baseline trained further by the recipe of the quantized runs: a control
    for what fine-tuning alone brings.

Forward
    The network's own.

Backward
    The network's own.

Schedule
    One phase.

Sites
    None.

State
    None.

Bits
    w, a and g are 32.

Protocol
    As the float baseline: `pretrain.epochs` and `pretrain.optim`. With `init=float`: `epochs` and
    `optim`.

Choices
    None.

Deviations
    None known.

Results
    The column `float` of every table.
"""

from qbench.bits import Bits
from qbench.quant.method import Method


def build(*, w: int = 32, a: int = 32, g: int = 32) -> Method:
    """Return the method that quantizes nothing."""
    return Method(name="float", bits=Bits(w, a, g), supported_bits={})
