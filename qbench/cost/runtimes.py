"""Decides which runtimes support the arithmetic of a quantized network.

The number formats of each runtime come from the documents named below, not from measurements. If the caller knows which
export forms accept the network, the decision uses this knowledge.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from qbench.bits import FLOAT
from qbench.cost.layers import LayerCost, Levels


class Runtime(NamedTuple):
    """A kind of runtime, with its name, its supported arithmetic, and the documents that describe this arithmetic."""

    name: str
    arithmetic: str
    source: str


INT8 = Runtime(
    "ONNX Runtime and LiteRT, as int8",
    "linear 8-bit codes; one scale per tensor or channel for weights, one scale per tensor for activations",
    "onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "
    "ai.google.dev/edge/litert/models/quantization_spec",
)
BINARY = Runtime(
    "1-bit runtimes such as Larq Compute Engine",
    "binary weights and activations, XNOR and popcount",
    "pypi.org/project/larq-compute-engine, docs.larq.dev/compute-engine",
)
FPGA = Runtime(
    "QONNX and FINN, on FPGAs",
    "integer codes of any width",
    "github.com/fastmachinelearning/qonnx, finn.readthedocs.io",
)
WIDTH_INT8 = 8


def runs_on(layers: Sequence[LayerCost], refused: Mapping[str, str] | None = None) -> list[str]:
    """Return one line per runtime that supports the layers' arithmetic, or a line that says why there is none.

    Args:
        layers: the layers of a network. Only quantized layers are considered, because any runtime
            can run float layers.
        refused: form of `qbench export` (`int8`, `qonnx`) -> reason why the network cannot be exported to this form, or
            an empty text if this export is possible.
    """
    quantized = [layer for layer in layers if layer.bits.w < FLOAT or layer.bits.a < FLOAT]
    if not quantized:
        return ["runs on any runtime, because nothing is quantized"]
    # The first layer's input (the image) has one scale per channel, so only the other layers are considered.
    inner = [layer for layer in quantized if layer.inputs is None or layer.inputs.per != "channel"] or quantized
    if reason := _no_runtime(inner):
        return [reason]
    runtimes = _supporting(inner, refused or {})
    if not runtimes:
        return [f"runs in simulation only: {_why_no_runtime(inner)}"]
    lines = [f"runs on {name}: {arithmetic} ({source})" for name, arithmetic, source in runtimes]
    if INT8 in runtimes and max(max(layer.bits.w, layer.bits.a) for layer in inner) < WIDTH_INT8:
        lines.append("int8 runtimes use 8 bits per code, so a smaller width saves nothing on them")
    if any(layer.rescaled for layer in inner):
        lines.append("outputs are scaled by values computed from each input, which no listed runtime supports")
    return lines


def _no_runtime(layers: Sequence[LayerCost]) -> str:
    """Return the reason why no runtime supports these layers, or why the supported runtimes are not known yet.

    Return an empty text if there is no such reason. The supported runtimes then depend on the levels.
    """
    if all(layer.bits.a == FLOAT for layer in layers):
        why = "activations are float, so weight codes save storage but are converted to floats before use"
        return f"useful for simulation, or for compact storage of the weights: {why}"
    if all(layer.bits.w == FLOAT for layer in layers):
        return "useful for simulation only: weights are float, so quantized activations save nothing"
    if any(levels is None or levels.steps == 0 for levels in chain(*_levels(layers))):
        return "supported runtimes are not known yet, because the levels depend on data"
    return ""


def _why_no_runtime(layers: Sequence[LayerCost]) -> str:
    """Return the reason why no integer runtime supports the levels of these layers, or the network."""
    levels = [*chain(*_levels(layers))]
    if any(each is None or each.steps is None for each in levels):
        return "integer runtimes need levels that are multiples of one step"
    if all(_linear(each) for each in levels):
        return "qbench export refuses the network for the integer runtimes, for the reason in the next lines"
    return "integer runtimes need one scale per layer or channel"


def _levels(layers: Iterable[LayerCost]) -> tuple[list[Levels | None], list[Levels | None]]:
    """Return the levels of the quantized weights, and of the quantized inputs. Any runtime can compute with floats."""
    weights = [layer.weights for layer in layers if layer.bits.w < FLOAT]
    return weights, [layer.inputs for layer in layers if layer.bits.a < FLOAT]


def _supporting(layers: Sequence[LayerCost], refused: Mapping[str, str]) -> list[Runtime]:
    weights, inputs = _levels(layers)
    linear = all(map(_linear, [*weights, *inputs]))
    signed, unsigned = 2 ** (WIDTH_INT8 - 1), 2**WIDTH_INT8 - 1
    int8 = linear and all(_fits_int8(w, signed) for w in weights) and all(_fits_int8(a, unsigned) for a in inputs)
    supported = {
        BINARY: all(map(_binary, [*weights, *inputs])),
        INT8: not refused["int8"] if "int8" in refused else int8,
        FPGA: not refused["qonnx"] if "qonnx" in refused else linear,
    }
    return [runtime for runtime, yes in supported.items() if yes]


def _binary(levels: Levels | None) -> bool:
    """Return whether the levels are -E and E. XNOR and popcount do not compute with 0 and E."""
    return levels is not None and levels.number == 2 and levels.symmetric and levels.per in ("layer", "channel")


def _linear(levels: Levels | None) -> bool:
    return levels is not None and levels.steps is not None and levels.per in ("layer", "channel")


def _fits_int8(levels: Levels | None, largest: int) -> bool:
    """Return whether the levels are integers of 8 bits. If they reach as far below as above 0, 127 is the largest."""
    if levels is None or levels.steps is None:
        return False
    return levels.steps <= (2 ** (WIDTH_INT8 - 1) - 1 if levels.symmetric else largest)
