"""Float: the network without quantization. It is the baseline of every other run, and a control.

Paper
    None: this is the baseline that each paper compares itself with.

Idea
    A quantized network is judged by the difference between its accuracy and that of the float
    network that it started from. `method=float` trains this float baseline by the recipe under
    `pretrain`. With `init=float`, `method=float` trains the baseline further by the recipe of the
    quantized runs. That run shows what fine-tuning alone gains.

Forward
    The forward pass of the network is not changed.

Backward
    The backward pass of the network is not changed.

Schedule
    One phase.

Sites
    None.

State
    None.

Bits
    w, a and g are 32.

Protocol
    The float baseline uses `pretrain.epochs` and `pretrain.optim`. With `init=float`, the run uses
    `epochs` and `optim`.

Choices
    None.

Deviations
    None known.

Results
    See the column `float` of every table.
"""

from qbench.bits import Bits
from qbench.quant.method import Method


def build(*, w: int = 32, a: int = 32, g: int = 32) -> Method:
    """Return the method that quantizes nothing."""
    return Method(name="float", bits=Bits(w, a, g), supported_bits={})
