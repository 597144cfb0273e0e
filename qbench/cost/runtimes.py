"""What a quantized network runs on outside of training, as far as its widths and levels allow; with sources.

Nothing is exported here, and no runtime is measured: these are statements about formats, from the documents named.
"""

from collections.abc import Sequence

from qbench.bits import FLOAT
from qbench.cost.layers import LayerCost, Levels

INT8 = (
    "ONNX Runtime and LiteRT, as int8",
    "linear 8-bit codes, weights a scale a tensor or channel, activations a scale a tensor",
    "onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "
    "ai.google.dev/edge/litert/models/quantization_spec",
)
BINARY = (
    "1-bit runtimes such as Larq Compute Engine",
    "binary weights and activations, XNOR and popcount",
    "pypi.org/project/larq-compute-engine, docs.larq.dev/compute-engine",
)
FPGA = (
    "QONNX and FINN, on FPGAs",
    "integer codes of any width",
    "github.com/fastmachinelearning/qonnx, finn.readthedocs.io",
)
WIDTH_INT8 = 8


def runs_on(layers: Sequence[LayerCost]) -> list[str]:
    """Return a line for every kind of runtime that has this arithmetic; or one that says why none has.

    Args:
        layers: of a network; only quantized ones count, float layers run as float anywhere.
    """
    quantized = [layer for layer in layers if layer.bits.w < FLOAT or layer.bits.a < FLOAT]
    if not quantized:
        return ["runs on anything: nothing is quantized"]
    inner = [layer for layer in quantized if layer.inputs is None or layer.inputs.per != "channel"] or quantized
    if all(layer.bits.a == FLOAT for layer in inner):
        why = "activations are float: codes save storage, and are turned into floats before they are used"
        return [f"simulation, or weights stored as codes: {why}"]
    if all(layer.bits.w == FLOAT for layer in inner):
        return ["simulation only: weights are float, so that quantized activations save nothing"]
    if any(levels is None or levels.steps == 0 for layer in inner for levels in (layer.weights, layer.inputs)):
        return ["what it runs on is known only once it has seen data: its levels come from there"]
    found = []
    if all(_two(layer.weights) and _two(layer.inputs) for layer in inner):
        found.append(BINARY)
    linear = all(_linear(layer.weights) and _linear(layer.inputs) for layer in inner)
    if linear and all(_fits(layer.weights) and _fits(layer.inputs) for layer in inner):
        found.append(INT8)
    if linear:
        found.append(FPGA)
    narrow = max(max(layer.bits.w, layer.bits.a) for layer in inner) < WIDTH_INT8
    lines = [f"runs on {name}: {what} ({source})" for name, what, source in found]
    if INT8 in found and narrow:
        lines.append("int8 runtimes spend 8 bits on each of these codes: fewer save them nothing")
    if lines and any(layer.rescaled for layer in inner):
        lines.append("its outputs are scaled by what is computed from each input: that no runtime named here does")
    return lines or ["simulation only: levels are not multiples of one step, which integer runtimes take codes for"]


def _two(levels: Levels | None) -> bool:
    return levels is not None and levels.number == 2 and levels.per in ("layer", "channel")


def _linear(levels: Levels | None) -> bool:
    return levels is not None and levels.steps is not None and levels.per in ("layer", "channel")


def _fits(levels: Levels | None) -> bool:
    return levels is not None and levels.steps is not None and levels.steps < 2**WIDTH_INT8
