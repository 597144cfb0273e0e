"""Deviations from HWGQ-Net's paper, found in later code and in the defaults of the authors' code."""

from dataclasses import replace

import torch
from torch import Tensor

from qbench.bits import FLOAT
from qbench.deviations.registry import Deviation, recast
from qbench.methods.hwgq import AUTHORS_STEPS, HalfStepHWGQActivation, HWGQActivation, HWGQWeight
from qbench.quant.layers import FloatLayer
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import in_float32, sign, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage


@in_float32
def unscaled_weight(w: Tensor) -> Tensor:
    """Return the signs of weights, with sign(0) = +1. The gradient passes unchanged."""
    return straight_through(w, sign(w))


class UnscaledWeight(HWGQWeight):
    """Binary weight quantizer without a scale per filter."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the signs of the weights."""
        return unscaled_weight(w)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -1 and 1."""
        return Grid(w.new_tensor([-1.0, 1.0]).reshape(1, 2, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the bytes of codes with one bit per weight."""
        return Storage(w.numel(), 1, 0)


def old_constants(method: Method) -> Method:
    """Return the method with activations quantized to step * round(x / step).

    The first threshold is therefore half a step. The step sizes, however, are the authors' constants, which are optimal
    only if the first threshold is 0, as in the paper.
    """
    original = method.input

    def deviating(name: str, layer: FloatLayer, bits: int) -> Quantizer:
        assert original is not None
        module = original(name, layer, bits)
        ranks = torch.arange(1, 2**bits, dtype=torch.float64)
        # Only the paper's quantizer with uniform levels is changed. Its levels are multiples of the first level.
        if type(module) is not HWGQActivation or not torch.allclose(
            module.levels.double() / ranks, module.levels[0].double()
        ):
            raise Unsupported("deviation=old_constants needs method.levels=uniform method.threshold=zero")
        if bits not in AUTHORS_STEPS:
            raise Unsupported(f"deviation=old_constants has steps for 1 to 4 bits, but {name} has {bits} bits")
        return HalfStepHWGQActivation(AUTHORS_STEPS[bits] * ranks, module.backward)

    return replace(method, input=deviating)


DEVIATIONS = {
    "old_constants": Deviation(
        "Activations are step * round(x / step), so the first threshold is half a step. The steps are the authors' "
        "constants, which are optimal if the first threshold is 0.",
        "zhaoweicai/EdMIPS, models/quant_module.py",
        old_constants,
        acts=lambda bits: bits.a in AUTHORS_STEPS, bits="w32a2",
    ),
    "affine_norm": Deviation(
        "The batch normalization before the quantizer has scale and shift.",
        "zhaoweicai/EdMIPS, bnaff=True by default; warning by Yin et al., Understanding STE",
        lambda method: replace(method, requires=replace(method.requires, norm="affine")),
        acts=lambda bits: bits.a < FLOAT, bits="w32a2",
    ),
    "no_alpha": Deviation(
        "Binary weights are +-1, without the filters' scales.",
        "zhaoweicai/hwgq, caffe.proto: use_alpha is false by default",
        lambda method: replace(method, weight=recast(method.weight, UnscaledWeight)),
        acts=lambda bits: bits.w == 1, bits="w1a32",
    ),
}  # fmt: skip
