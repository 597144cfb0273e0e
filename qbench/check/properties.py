"""Lists the properties that every method must have.

Each property has a function that checks it for a method at one combination of widths. The function raises
`PropertyViolation` if the property does not hold, and `NotApplicable` if the property does not apply to the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qbench.bits import Bits
from qbench.check.backward import gradients_arrive, learned_parameters
from qbench.check.forward import compressed_inputs, function_of_inputs, function_of_weights, levels, unbiased_rounding
from qbench.check.robustness import degenerate_tensors, float_at_32, half_types, not_finite, scaled_loss
from qbench.check.subject import MethodUnderTest
from qbench.check.training import resume, round_trip

Where = Literal["weights", "inputs", "every", "default and narrowest", "default"]
"""The widths at which a property is checked.

- `weights`: all widths at which weights are quantized.
- `inputs`: all widths at which inputs are quantized.
- `every`: all widths.
- `default`: the method's default widths.
- `default and narrowest`: the default widths, and the smallest supported widths of weights, inputs and gradients
  together.
"""


@dataclass(frozen=True)
class Property:
    """The name of a property, the function that checks it, and the widths at which it is checked."""

    name: str
    holds: Callable[[MethodUnderTest, Bits], None]
    where: Where


PROPERTIES = (
    Property("levels", levels, "every"),
    Property("weights: odd, monotone, idempotent as declared", function_of_weights, "weights"),
    Property("inputs: monotone, idempotent, clipped as declared", function_of_inputs, "inputs"),
    Property("inputs: saved as integers with the same results, as declared", compressed_inputs, "inputs"),
    Property("weights, inputs and learned parameters get gradients", gradients_arrive, "every"),
    Property(
        "gradients of learned parameters agree with finite differences", learned_parameters, "default and narrowest"
    ),
    Property("stochastic rounding is unbiased", unbiased_rounding, "every"),
    Property("32 bits give the float network's gradients", float_at_32, "default and narrowest"),
    Property("zero, constant and one-element weights give finite values", degenerate_tensors, "every"),
    Property("inf and nan raise an error", not_finite, "default and narrowest"),
    Property("float16 and bfloat16 autocast gives finite gradients", half_types, "default"),
    Property("a scaled loss gives scaled gradients, unless declared otherwise", scaled_loss, "default and narrowest"),
    Property("a saved and loaded state_dict gives the same outputs", round_trip, "default and narrowest"),
    Property("resumed training gives the same weights", resume, "default and narrowest"),
)
