"""Known public deviations from the papers, by method: what `method.deviation=NAME` runs in place of the paper.

A file here is named as the method's and holds `DEVIATIONS`. The methods' own files stay free of flaws.
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
    """A flaw or variant seen in public code.

    Args:
        what: what it does otherwise than the paper, a sentence.
        source: where it was seen, and by whom it was pointed out.
        apply: the faithful method -> the deviating one.
        acts: whether it makes any difference at these widths.
        bits: widths at which it does: what it touches alone, the rest float.
    """

    what: str
    source: str
    apply: Callable[[Method], Method]
    acts: Callable[[Bits], bool]
    bits: str


def deviations(method: str) -> dict[str, Deviation]:
    """Return a method's known deviations by name; none for a method without a file here."""
    if not method.isidentifier() or find_spec(f"qbench.deviations.{method}") is None:
        return {}
    known: dict[str, Deviation] = import_module(f"qbench.deviations.{method}").DEVIATIONS
    return known


def deviate(method_name: str, name: str, method: Method) -> Method:
    """Return the method under a deviation; itself for `none`.

    Raises:
        ValueError: no such deviation.
        Unsupported: the deviation makes no difference at the method's widths.
    """
    if name == "none":
        return method
    known = deviations(method_name)
    if name not in known:
        raise ValueError(f"deviation={name}: allowed are {', '.join(['none', *known])}")
    if not known[name].acts(method.bits):
        raise Unsupported(f"method.deviation={name} has no effect at bits={method.bits}; try bits={known[name].bits}")
    return known[name].apply(method)


def recast(
    site: QuantizerFactory | None, kind: type[Quantizer], where: Callable[[Quantizer], bool] = lambda module: True
) -> QuantizerFactory | None:
    """Return a site whose modules become `kind`, a subclass of their own, and keep all that they hold: options, state.

    Args:
        where: which modules; the others stay as they are.
    """

    def built(name: str, layer: FloatLayer, bits: int) -> Quantizer:
        assert site is not None
        module = site(name, layer, bits)
        if where(module):
            module.__class__ = kind
        return module

    return None if site is None else built
