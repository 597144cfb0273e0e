"""Registers known deviations of public code from the papers. `method.deviation=NAME` runs one of them.

Each file in this folder has the name of a method and contains `DEVIATIONS`. The methods' own files implement only the
papers.
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
        what: how the deviation differs from the paper, in one sentence.
        source: where the deviation was found, and who pointed it out.
        apply: function that takes the paper's method and returns the deviating method.
        acts: function that takes widths and returns whether the deviation makes a difference at
            these widths.
        bits: widths at which the deviation makes a difference. Only the tensors that the deviation
            changes are quantized; the others are float.
    """

    what: str
    source: str
    apply: Callable[[Method], Method]
    acts: Callable[[Bits], bool]
    bits: str


def deviations(method: str) -> dict[str, Deviation]:
    """Return the known deviations of a method by name. A method without a file here has none."""
    if not method.isidentifier() or find_spec(f"qbench.deviations.{method}") is None:
        return {}
    known: dict[str, Deviation] = import_module(f"qbench.deviations.{method}").DEVIATIONS
    return known


def deviate(method_name: str, name: str, method: Method) -> Method:
    """Return the method with a deviation, or the method itself if `name` is `none`.

    Raises:
        ValueError: there is no such deviation.
        Unsupported: the deviation makes no difference at the method's widths.
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
    """Return a factory like `site` whose quantizers have the class `kind` and the same options and state.

    Args:
        where: returns whether a quantizer gets the class `kind`. Other quantizers stay as they are.
    """

    def recast_site(name: str, layer: FloatLayer, bits: int) -> Quantizer:
        assert site is not None
        module = site(name, layer, bits)
        if where(module):
            module.__class__ = kind
        return module

    return None if site is None else recast_site
