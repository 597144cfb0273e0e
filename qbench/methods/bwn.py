"""Binary-Weight-Network: weights binary with a scale per filter, activations float.

Paper
    Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
    ECCV 2016, arXiv 1603.05279, section 3.1. Authors' code: allenai/XNOR-Net (Torch).

Idea
    XNOR-Net's weights without its activations: no multiplications in a convolution, 32 times less memory.

Forward
    Per output filter: alpha sign(w), alpha = mean|w|, sign(0) = +1.

Backward
    As in xnor: gradient=paper or authors.

Schedule
    One phase.

Sites
    weight.

State
    None.

Bits
    w 1 or 32, a and g 32; by default w1a32g32.

Protocol
    The authors' code: SGD with momentum 0.9, rate 1e-2 falling to 1e-4 in steps over 55 epochs, batch 128; first and
    last layer float.

Choices
    gradient, center, clamp: as in xnor.

Deviations
    None known.

Results
    README (digits, glyphs).
"""

from qbench.bits import FLOAT, Bits
from qbench.methods.xnor import GRADIENTS, site, stepped, tidy
from qbench.quant.method import Method


def build(*, w: int = 1, gradient: str = "paper", center: bool = False, clamp: bool = False) -> Method:
    """Return BWN; for the options see xnor's card."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient}: allowed are {', '.join(GRADIENTS)}")
    return Method(
        name="bwn",
        bits=Bits(w),
        supported_bits={"w": (1, FLOAT)},
        traits=frozenset({"odd", "monotone", "idempotent"}),
        weight=lambda name, layer, bits: site(layer, gradient, center),
        prepare=(lambda model, probe: tidy(model, center=center, clamp=clamp)) if center or clamp else None,
        step=(lambda m, optimizer: stepped(m, optimizer, center=center, clamp=clamp)) if center or clamp else None,
    )
