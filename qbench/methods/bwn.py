"""Binary-Weight-Network: weights are binary with one scale per filter, and activations are float.

Paper
    Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary
    Convolutional Neural Networks", ECCV 2016, arXiv 1603.05279, section 3.1. Authors' code:
    allenai/XNOR-Net (Torch).

Idea
    BWN quantizes weights in the same way as XNOR-Net. Activations stay float. Convolutions with
    binary weights need no multiplications. Binary weights take 32 times less memory than float32
    weights.

Forward
    For each output filter: w_hat = alpha sign(w), with alpha = mean|w| and sign(0) = +1.

Backward
    The gradient of the weights is the same as in the method xnor. The option `gradient` chooses the
    formula of the gradient.

Schedule
    Training has one phase.

Sites
    weight.

State
    None.

Bits
    w 1 or 32, a and g 32; by default w1a32g32.

Protocol
    The authors' code trains for 55 epochs by SGD with momentum 0.9 and batch size 128. The learning
    rate is 1e-2, then 5e-3 from epoch 19, 1e-3 from epoch 30, 5e-4 from epoch 44 and 1e-4 from
    epoch 53. Weight decay is 5e-4 up to epoch 29 and 0 afterwards. The first and last layers are
    float.

Choices
    gradient, center, clamp: see the method xnor.

Deviations
    None known.

Results
    docs/results.md (digits, glyphs).
"""

from qbench.bits import FLOAT, Bits
from qbench.methods.xnor import center_and_clamp, check_gradient, step_function, weight_quantizer
from qbench.quant.method import Method, factory_for


def build(*, w: int = 1, gradient: str = "paper", center: bool = False, clamp: bool = False) -> Method:
    """Return the `Method` for BWN. The method card of XNOR-Net explains the options."""
    check_gradient(gradient)
    changes_weights = center or clamp
    return Method(
        name="bwn",
        bits=Bits(w),
        supported_bits={"w": (1, FLOAT)},
        traits=frozenset({"odd", "monotone", "idempotent"}),
        weight=factory_for(w, lambda name, layer, bits: weight_quantizer(layer, gradient, center)),
        prepare=(lambda model, probe: center_and_clamp(model, center=center, clamp=clamp)) if changes_weights else None,
        step=step_function(w, gradient, center, clamp),
    )
