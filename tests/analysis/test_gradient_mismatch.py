"""The smoothed quantizer, whose gradient is the reference of the gradient mismatch."""

import pytest
import torch

from qbench.analysis.gradient_mismatch import _smooth
from qbench.methods import hwgq
from qbench.methods.hwgq import HalfStepHWGQActivation, HWGQActivation, half_step_levels, half_wave_levels


@pytest.mark.parametrize(
    "quantizer",
    [
        HWGQActivation(half_wave_levels(2, uniform=True), "vanilla"),
        HWGQActivation(half_wave_levels(3, uniform=False), "vanilla"),
        HalfStepHWGQActivation(half_step_levels(2), "vanilla"),
        HalfStepHWGQActivation(hwgq._levels(2, "uniform", "authors", "half_step"), "vanilla"),
    ],
)
def test_with_little_noise_the_smoothed_quantizer_is_the_quantizer(quantizer: HWGQActivation) -> None:
    x = torch.linspace(-3, 3, 1201)
    edges = (quantizer(x[1:]) != quantizer(x[:-1])).nonzero().flatten()
    inside = torch.ones_like(x, dtype=torch.bool)
    inside[edges] = inside[edges + 1] = False
    assert len(edges) == len(quantizer.levels)
    torch.testing.assert_close(_smooth(quantizer, 1e-3)(x)[inside], quantizer(x)[inside])
