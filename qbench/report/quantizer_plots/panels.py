"""Draws a curve into a panel, in the colours of Okabe and Ito. Marks differ not only in colour but also in shape."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from qbench.report.quantizer_plots.transfer_curves import DRAWS, FEW_LEVELS, Codewords, QuantizerCurves, TransferCurve

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

BLUE, VERMILLION, SKY, ORANGE = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"
DASHES = (0, (4, 0.7))
MAX_STEPS = 64
"""Maximum number of jumps of a curve that is drawn as a staircase. A curve with more jumps is drawn as a line."""
MAX_LARGE_MARKS, MIN_ZOOMED = 9, 60
"""Maximum number of thresholds that get large marks, and minimum number of values in a magnified section."""
BINS, MARGIN = 60, 0.08
"""Number of bins of the histogram, and margin of an axis as a fraction of the axis range."""


class PlotSizes(NamedTuple):
    """Sizes in a plot, and the number format of the tick labels (`digits`).

    The sizes of text, lines and marks are in points. The size of a tick label is a fraction of the axis.
    """

    text: float
    line: float
    mark: float
    tick: float
    digits: str


LARGE, SMALL = PlotSizes(9, 2.2, 7, 0.08, ".3g"), PlotSizes(7, 1.5, 4, 0.13, ".2g")


def draw_curve(
    panel: "Axes", curve: TransferCurve, sizes: PlotSizes, frozen: Tensor | None = None, picks: Tensor | None = None
) -> None:
    """Draw a curve as a staircase, as a mean with a band, or as dots if some values are frozen."""
    x, y = curve.x.numpy(), curve.y.numpy()
    levels = curve.levels.numpy() if frozen is None else np.unique(y[frozen.numpy()])
    few = levels if 0 < len(levels) <= FEW_LEVELS else levels[:0]
    low, high = _limits(y, few, *(edge.numpy() for edge in curve.band or ()))
    _draw_histogram(panel, curve.tensor)
    panel.plot(x[[0, -1]], x[[0, -1]], color="0.45", lw=0.8, ls=(0, (4, 3)), zorder=1.5)
    panel.hlines(few, x[0], x[-1], color="0.6", lw=0.6, zorder=1)
    if frozen is not None and picks is not None:
        _draw_dots(panel, curve.x[picks], curve.y[picks], frozen[picks], sizes)
    else:
        _draw_staircase(panel, curve, sizes.line)
    if frozen is None and 0 < len(curve.jumps) <= MAX_STEPS:
        size = sizes.mark if len(curve.jumps) <= MAX_LARGE_MARKS else 0.6 * sizes.mark
        foot = np.full(len(curve.jumps), 0.035)
        transform = panel.get_xaxis_transform()
        panel.plot(curve.thresholds.numpy(), foot, "^", color="black", ms=size, transform=transform, zorder=4)
    _finish(panel, x, (low, high), sizes)
    if len(few):
        ticks = _spread_out(few.tolist(), sizes.tick * (high - low))
        panel.set_yticks(ticks, [format_number(tick, sizes.digits) for tick in ticks])


def draw_zoom(panel: "Axes", curve: TransferCurve, sizes: PlotSizes) -> None:
    """Draw the five levels of a curve around zero, magnified, into a corner of the panel.

    Nothing is drawn if the curve has few levels, or if too few values are between these five levels.
    """
    levels, x = curve.levels.numpy(), curve.x.numpy()
    if len(levels) <= FEW_LEVELS:
        return
    near = levels[max(int(np.abs(levels).argmin()) - 2, 0) :][:5]
    low, high = near[0].item(), near[-1].item()
    if ((x >= low) & (x <= high)).sum() < MIN_ZOOMED or (high - low) > (x[-1] - x[0]) / 10:
        return
    inset = panel.inset_axes((0.66, 0.14, 0.3, 0.4))
    _draw_staircase(inset, curve, sizes.line / 2)
    inset.set(xlim=(low, high), ylim=_limits(near), yticks=[])
    inset.set_xticks([low, high], [format_number(low, ".2g"), format_number(high, ".2g")])
    inset.tick_params(labelsize=sizes.text - 2.5, length=2, pad=1.5)


def _draw_staircase(panel: "Axes", curve: TransferCurve, width: float) -> None:
    """Draw the steps of a staircase. If there are many steps or y is a mean, draw a line."""
    x, y = curve.x.numpy(), curve.y.numpy()
    if curve.band is not None:
        low, high = curve.band
        panel.fill_between(x, low.numpy(), high.numpy(), color=SKY, alpha=0.5, lw=0, zorder=2)
    if len(curve.jumps) > MAX_STEPS or curve.band is not None:
        panel.plot(x, y, color=BLUE, lw=width, zorder=3)
        return
    steps, jumps = curve.heights.numpy(), curve.thresholds.numpy()
    edges = np.concatenate([x[:1], jumps, x[-1:]])
    panel.hlines(steps, edges[:-1], edges[1:], color=BLUE, lw=width, zorder=3)
    panel.vlines(jumps, steps[:-1], steps[1:], color=BLUE, lw=0.5, zorder=2)


def draw_slope(panel: "Axes", curves: QuantizerCurves, sizes: PlotSizes) -> None:
    """Draw the derivative that training uses instead of the derivative of the staircase."""
    assert curves.slope is not None
    x, d = curves.forward.x[curves.picks], curves.slope
    _draw_histogram(panel, curves.forward.tensor)
    if curves.frozen is not None:
        _draw_dots(panel, x, d, curves.frozen[curves.picks], sizes)
    else:
        smooth = "default" if len(np.unique(d.numpy())) > MAX_STEPS else "steps-mid"
        panel.plot(x.numpy(), d.numpy(), ls=DASHES, color=VERMILLION, lw=sizes.line, drawstyle=smooth, zorder=3)
    _finish(panel, curves.forward.x.numpy(), _limits(d.numpy(), np.array([0.0, 1.0])), sizes)


def draw_codewords(left: "Axes", right: "Axes", codewords: Codewords, sizes: PlotSizes) -> None:
    """Draw codewords and the vectors that they encode.

    The left panel shows the first two dimensions. The right panel shows one weight of each vector, with its quantized
    value over its float value.
    """
    size = sizes.mark**2
    vectors, points = codewords.vectors.numpy(), codewords.points.numpy()
    left.scatter(vectors[:, 0], vectors[:, 1], s=size / 8, color="0.75", lw=0)
    left.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, marker="D", zorder=3)
    x, y = codewords.vectors[:, 0].numpy(), codewords.decoded[:, 0].numpy()
    _draw_histogram(right, codewords.vectors.flatten())
    right.scatter(x, y, s=size / 8, color=BLUE, lw=0, zorder=3)
    ends = _limits(x)
    _finish(left, np.array(ends), _limits(codewords.vectors[:, 1].numpy()), sizes)
    _finish(right, np.array(ends), _limits(y), sizes)


def _draw_dots(panel: "Axes", x: Tensor, y: Tensor, frozen: Tensor, sizes: PlotSizes) -> None:
    """Draw single values. Frozen values are squares, and free values are dots."""
    for which, marker, color in ((~frozen, ".", BLUE), (frozen, "s", ORANGE)):
        panel.plot(x[which].numpy(), y[which].numpy(), marker, color=color, ms=sizes.mark / 2, mew=0, zorder=3)


def _draw_histogram(panel: "Axes", tensor: Tensor) -> None:
    """Draw the histogram of a float tensor in the background.

    The highest bar is cut off at the height of the second highest bar, because the highest bar may contain the many
    zeros after a ReLU.
    """
    counts, edges = np.histogram(tensor.numpy(), bins=BINS)
    heights = (counts / max(np.sort(counts)[-2], 1)).clip(max=1)
    panel.stairs(0.9 * heights, edges, fill=True, color="0.89", transform=panel.get_xaxis_transform(), zorder=0)


def legend_handles(measured: list[QuantizerCurves | Codewords]) -> list["Artist"]:
    """Return the legend entries for the graphical elements that occur in the given curves."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    curves = [r for r in measured if isinstance(r, QuantizerCurves)]
    maps = [m for r in curves for m in (r.forward, r.backward) if m is not None]
    entries: list[tuple[bool, Artist]] = [
        (bool(maps), Line2D([], [], color=BLUE, lw=2, label="quantized value")),
        (bool(maps), Line2D([], [], color=VERMILLION, lw=2, ls=DASHES, label="gradient")),
        (any(0 < len(m.levels) <= FEW_LEVELS for m in maps), Line2D([], [], color="0.6", lw=0.8, label="level")),
        (
            any(0 < len(m.jumps) <= MAX_STEPS and r.frozen is None for r in curves for m in (r.forward,)),
            Line2D([], [], color="black", marker="^", ls="", label="threshold"),
        ),
        (any(m.band for m in maps), Patch(color=SKY, alpha=0.5, label=f"range of {DRAWS} draws, line: mean")),
        (any(r.frozen is not None for r in curves), Line2D([], [], color=ORANGE, marker="s", ls="", label="frozen")),
        (any(r.frozen is not None for r in curves), Line2D([], [], color=BLUE, marker=".", ls="", label="free")),
        (len(curves) < len(measured), Line2D([], [], color=BLUE, marker="D", ls="", label="codeword")),
        (bool(maps), Line2D([], [], color="0.45", lw=0.8, ls=(0, (4, 3)), label="identity")),
        (True, Patch(color="0.89", label="float tensor")),
    ]
    return [handle for is_used, handle in entries if is_used]


def format_number(value: float, digits: str) -> str:
    """Return a number as text for an axis. The minus sign is typographic, and -0 is written as 0."""
    text = f"{value:{digits}}"
    return (f"{0:{digits}}" if not float(text) else text).replace("-", "\u2212")


def _limits(*values: "NDArray[np.generic]") -> tuple[float, float]:
    """Return the lower and the upper end of an axis that shows all values."""
    low, high = (float(end(np.concatenate(values))) for end in (np.min, np.max))
    margin = MARGIN * ((high - low) or 1)
    return low - margin, high + margin


def _spread_out(levels: list[float], gap: float) -> list[float]:
    """Return the levels that get a label on an axis. Labels are at least `gap` apart.

    The lowest level, the highest level and zero are chosen first. Then the level that is farthest from all chosen
    levels is added, as long as there is room for another label.
    """
    kept = [levels[0], *levels[1:][-1:]]
    rest = sorted(levels, key=abs)
    while rest:
        far = [min(abs(level - other) for other in kept) for level in rest]
        level = rest[0] if rest[0] == 0 and far[0] >= gap else rest[far.index(max(far))]
        if max(far) < gap:
            break
        kept.append(level)
        rest.remove(level)
    return sorted(kept)


def _finish(panel: "Axes", x: "NDArray[np.generic]", y: tuple[float, float], sizes: PlotSizes) -> None:
    panel.set(xlim=(float(x[0]), float(x[-1])), ylim=y)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(labelsize=sizes.text - 1, length=2.5, pad=2)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
