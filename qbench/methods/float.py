"""Float: the network without quantization. Quantized runs use this network as baseline or as control.

Paper
    None. The float network is the baseline with which papers compare their methods.

Idea
    A quantized network is judged by the difference between its accuracy and the accuracy of the
    float baseline from which its training started. `method=float` trains this float baseline with
    the recipe under `pretrain`. `method=float init=float` trains the float baseline further, with
    the recipe of the quantized runs. This control shows how much accuracy fine-tuning gains without
    quantization.

Forward
    The forward pass of the network is not changed.

Backward
    The backward pass of the network is not changed.

Schedule
    Training has one phase.

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
    The column `float` of every table has the results.
"""

from qbench.bits import Bits
from qbench.quant.method import Method


def build(*, w: int = 32, a: int = 32, g: int = 32) -> Method:
    """Return the `Method` that quantizes nothing."""
    return Method(name="float", bits=Bits(w, a, g), supported_bits={})
