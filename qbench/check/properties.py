"""The list of properties that every method must have.

A property is a function of the method under test and one of its widths. It raises `PropertyViolation` if the property
does not hold, and `NotApplicable` if it cannot be tested on the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qbench.bits import Bits
from qbench.check.backward import gradients_arrive, learned_parameters
from qbench.check.forward import compressed_inputs, function_of_inputs, function_of_weights, levels, unbiased_rounding
from qbench.check.robustness import degenerate_tensors, float_at_32, half_types, not_finite
from qbench.check.subject import MethodUnderTest
from qbench.check.training import resume, round_trip

Where = Literal["weights", "inputs", "every", "default and narrowest", "default"]
"""The widths at which a property is checked.

`weights`, `inputs`: all widths that quantize weights, or inputs. `every`: all widths. `default`: the method's default
widths. `default and narrowest`: the default widths, and the smallest supported widths of weights, inputs and gradients
together.
"""


@dataclass(frozen=True)
class Property:
    """A property and the widths at which it is checked."""

    name: str
    holds: Callable[[MethodUnderTest, Bits], None]
    where: Where


PROPERTIES = (
    Property("levels", levels, "every"),
    Property("weights: odd, monotone, idempotent as declared", function_of_weights, "weights"),
    Property("inputs: monotone, idempotent, clipped as declared", function_of_inputs, "inputs"),
    Property("inputs: kept as levels with the same results, as declared", compressed_inputs, "inputs"),
    Property("gradients reach what is trained", gradients_arrive, "every"),
    Property("gradients of learned parameters", learned_parameters, "default and narrowest"),
    Property("stochastic rounding is unbiased", unbiased_rounding, "every"),
    Property("32 bits are float", float_at_32, "default and narrowest"),
    Property("zero, constant, one-element tensors", degenerate_tensors, "every"),
    Property("inf and nan are refused", not_finite, "default and narrowest"),
    Property("float16 and bfloat16 under autocast", half_types, "default"),
    Property("state_dict round trip", round_trip, "default and narrowest"),
    Property("resume", resume, "default and narrowest"),
)
