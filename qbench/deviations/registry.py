"""Registers known deviations of public code from the papers. `method.deviation=NAME` applies a deviation.

Every other file in this folder has the name of a method. Its `DEVIATIONS` are the known deviations from this method.
The files in `qbench/methods/` implement only the papers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from qbench.bits import Bits
from qbench.quant.layers import FloatLayer
from qbench.quant.method import Method, QuantizerFactory, Unsupported
from qbench.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Deviation:
    """A flaw or variant found in public code.

    Args:
        what: a sentence that says how the deviation differs from the paper.
        source: the code in which the deviation was found, and the place in which the deviation was pointed out.
        apply: function that takes the paper's method and returns the deviating method.
        acts: function that takes widths and returns whether the deviation has an effect at these widths.
        bits: example of widths at which the deviation has an effect. In this example, tensors that the deviation does
            not change have 32 bits.
    """

    what: str
    source: str
    apply: Callable[[Method], Method]
    acts: Callable[[Bits], bool]
    bits: str


def deviations(method: str) -> dict[str, Deviation]:
    """Return the known deviations of a method by name. The result is empty if the method has no file in this folder."""
    if not method.isidentifier() or find_spec(f"qbench.deviations.{method}") is None:
        return {}
    known: dict[str, Deviation] = import_module(f"qbench.deviations.{method}").DEVIATIONS
    return known


def deviate(method_name: str, name: str, method: Method) -> Method:
    """Return the method with the deviation `name`, or the method itself if `name` is `none`.

    Raises:
        ValueError: the method has no such deviation.
        Unsupported: the deviation has no effect at the method's widths.
    """
    if name == "none":
        return method
    known = deviations(method_name)
    if name not in known:
        raise ValueError(f"deviation={name}: must be one of {', '.join(['none', *known])}")
    if not known[name].acts(method.bits):
        raise Unsupported(f"method.deviation={name} has no effect at bits={method.bits}; try bits={known[name].bits}")
    return known[name].apply(method)


def recast(
    site: QuantizerFactory | None, kind: type[Quantizer], where: Callable[[Quantizer], bool] = lambda module: True
) -> QuantizerFactory | None:
    """Return a quantizer factory that works as `site` does, but changes the class of the quantizers to `kind`.

    The options and the state of the quantizers stay the same.

    Args:
        site: a factory of quantizers, or None.
        kind: the new class.
        where: function that returns whether a quantizer gets the new class. Other quantizers are not changed.
    """

    def recast_site(name: str, layer: FloatLayer, bits: int) -> Quantizer:
        assert site is not None
        module = site(name, layer, bits)
        if where(module):
            module.__class__ = kind
        return module

    return None if site is None else recast_site
