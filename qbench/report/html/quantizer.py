"""Draws how a method quantizes single weights and inputs, as small SVG curves."""

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qbench.bits import Bits
from qbench.config import groups
from qbench.errors import QbenchError
from qbench.runs.result import Result

if TYPE_CHECKING:
    from qbench.report.quantizer_plots.transfer_curves import TransferCurve

WIDTH, HEIGHT, MARGIN = 180, 150, 6
"""Width and height of a drawing, and margin around the curve, in pixels."""
POINTS = 120
"""Number of points of a curve, in addition to the points at jumps."""
MOST_JUMPS = 64
"""Maximum number of jumps that are drawn exactly."""


@dataclass(frozen=True)
class QuantizerDrawing:
    """A curve from float values to quantized values, as points of an SVG polyline.

    `what` is "weights" or "inputs". The other texts are labels: the ends of both axes, and the number of levels.
    """

    what: str
    points: str
    x_ends: tuple[str, str]
    y_ends: tuple[str, str]
    levels: str
    width: int = WIDTH
    height: int = HEIGHT


def draw_quantizers(result: Result) -> list[QuantizerDrawing]:
    """Return the curves of a result's method with its options and widths, measured before training.

    Only methods that are part of qbench are drawn. The files of a run can name a user's code, but a comparison never
    runs this code. Combined methods are not drawn.
    """
    return _drawings(result.method, json.dumps(result.options), tuple(result.bits[key] for key in "wag"))


@cache
def _drawings(method: str, options: str, bits: tuple[int, ...]) -> list[QuantizerDrawing]:
    if method not in groups.option_names("method"):
        return []
    from qbench.experiment.builders import build_method
    from qbench.quant.method import Unsupported
    from qbench.report.quantizer_plots.measurement import forward_curves

    try:
        node = {"name": method} | json.loads(options)
        curves = forward_curves(build_method(node, {"name": "none"}, Bits(*bits)))
    except (QbenchError, Unsupported, ValueError, TypeError, RuntimeError):  # options of another version, or damaged
        return []
    return [_drawing(what, curve) for what, curve in curves.items()]


def _drawing(what: str, curve: "TransferCurve") -> QuantizerDrawing:
    import torch

    jumps = curve.jumps if len(curve.jumps) <= MOST_JUMPS else curve.jumps[:0]
    shown = torch.unique(torch.cat([torch.linspace(0, len(curve.x) - 1, POINTS).long(), jumps, jumps + 1]))
    x, y = curve.x[shown].tolist(), curve.y[shown].tolist()
    (left, right), (low, high) = (min(x), max(x)), (min(y), max(y))
    across, up = (right - left) or 1.0, (high - low) or 1.0
    points = " ".join(
        f"{MARGIN + (WIDTH - 2 * MARGIN) * (a - left) / across:.1f},"
        f"{MARGIN + (HEIGHT - 2 * MARGIN) * (high - b) / up:.1f}"
        for a, b in zip(x, y, strict=True)
    )
    levels = f"{len(curve.levels):,} levels" if len(curve.levels) else ""
    return QuantizerDrawing(what, points, (f"{left:.2g}", f"{right:.2g}"), (f"{low:.3g}", f"{high:.3g}"), levels)
