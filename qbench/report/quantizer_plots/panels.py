"""One curve on one pair of axes. Colours are those of Okabe and Ito; every kind of mark has a shape of its own too."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from qbench.report.quantizer_plots.readings import DRAWS, FEW, Codewords, QuantizerCurves, TransferCurve

BLUE, VERMILLION, SKY, ORANGE = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"
DASHES = (0, (4, 0.7))
STEPS = 64
"""Jumps that are drawn as a staircase; more are a line."""
CROWD, WORTH = 9, 60
"""Thresholds that have room for large marks; values that a magnified part must hold."""
BINS, MARGIN = 60, 0.08


class PlotSizes(NamedTuple):
    """Sizes: of text, lines and marks in points, the part of an axis that a tick's text takes, a level's digits."""

    text: float
    line: float
    mark: float
    tick: float
    digits: str


LARGE, SMALL = PlotSizes(9, 2.2, 7, 0.08, ".3g"), PlotSizes(7, 1.5, 4, 0.13, ".2g")


def curve(
    panel: Any, drawn: TransferCurve, look: PlotSizes, frozen: Tensor | None = None, picks: Tensor | None = None
) -> None:
    """Draw x -> y: a staircase with its levels and thresholds, the mean in its band, or dots where part is frozen."""
    x, y = drawn.x.numpy(), drawn.y.numpy()
    levels = drawn.levels.numpy() if frozen is None else np.unique(y[frozen.numpy()])
    few = levels if 0 < len(levels) <= FEW else levels[:0]
    low, high = _limits(y, few, *(edge.numpy() for edge in drawn.band or ()))
    histogram(panel, drawn.tensor)
    panel.plot(x[[0, -1]], x[[0, -1]], color="0.45", lw=0.8, ls=(0, (4, 3)), zorder=1.5)
    panel.hlines(few, x[0], x[-1], color="0.6", lw=0.6, zorder=1)
    if frozen is not None and picks is not None:
        dots(panel, drawn.x[picks], drawn.y[picks], frozen[picks], look)
    else:
        _line(panel, drawn, look.line)
    if frozen is None and 0 < len(drawn.jumps) <= STEPS:
        size = look.mark if len(drawn.jumps) <= CROWD else 0.6 * look.mark
        foot = np.full(len(drawn.jumps), 0.035)
        transform = panel.get_xaxis_transform()
        panel.plot(drawn.thresholds.numpy(), foot, "^", color="black", ms=size, transform=transform, zorder=4)
    _finish(panel, x, (low, high), look)
    if len(few):
        ticks = _apart(few.tolist(), look.tick * (high - low))
        panel.set_yticks(ticks, [number(tick, look.digits) for tick in ticks])


def zoom(panel: Any, drawn: TransferCurve, look: PlotSizes) -> None:
    """Draw a few steps around zero into a corner, where they are too small to be seen and have enough values each."""
    levels, x = drawn.levels.numpy(), drawn.x.numpy()
    if len(levels) <= FEW:
        return
    near = levels[max(int(np.abs(levels).argmin()) - 2, 0) :][:5]
    low, high = near[0].item(), near[-1].item()
    if ((x >= low) & (x <= high)).sum() < WORTH or (high - low) > (x[-1] - x[0]) / 10:
        return
    inset = panel.inset_axes((0.66, 0.14, 0.3, 0.4))
    _line(inset, drawn, look.line / 2)
    inset.set(xlim=(low, high), ylim=_limits(near), yticks=[])
    inset.set_xticks([low, high], [number(low, ".2g"), number(high, ".2g")])
    inset.tick_params(labelsize=look.text - 2.5, length=2, pad=1.5)


def _line(panel: Any, drawn: TransferCurve, width: float) -> None:
    """Draw a staircase step by step, a finer one and a mean as a line."""
    x, y = drawn.x.numpy(), drawn.y.numpy()
    if drawn.band is not None:
        panel.fill_between(x, *(edge.numpy() for edge in drawn.band), color=SKY, alpha=0.5, lw=0, zorder=2)
    if len(drawn.jumps) > STEPS or drawn.band is not None:
        panel.plot(x, y, color=BLUE, lw=width, zorder=3)
        return
    steps, jumps = drawn.heights.numpy(), drawn.thresholds.numpy()
    edges = np.concatenate([x[:1], jumps, x[-1:]])
    panel.hlines(steps, edges[:-1], edges[1:], color=BLUE, lw=width, zorder=3)
    panel.vlines(jumps, steps[:-1], steps[1:], color=BLUE, lw=0.5, zorder=2)


def slope(panel: Any, reading: QuantizerCurves, look: PlotSizes) -> None:
    """Draw the derivative that stands in for the staircase's."""
    assert reading.slope is not None
    x, d = reading.forward.x[reading.picks], reading.slope
    histogram(panel, reading.forward.tensor)
    if reading.frozen is not None:
        dots(panel, x, d, reading.frozen[reading.picks], look)
    else:
        smooth = "default" if len(np.unique(d.numpy())) > STEPS else "steps-mid"
        panel.plot(x.numpy(), d.numpy(), ls=DASHES, color=VERMILLION, lw=look.line, drawstyle=smooth, zorder=3)
    _finish(panel, reading.forward.x.numpy(), _limits(d.numpy(), np.array([0.0, 1.0])), look)


def vectors(left: Any, right: Any, drawn: Codewords, look: PlotSizes) -> None:
    """Draw codewords among the vectors they stand for, in two of their dimensions; and one weight -> one weight."""
    size = look.mark**2
    left.scatter(*drawn.vectors[:, :2].T.numpy(), s=size / 8, color="0.75", lw=0)
    left.scatter(*drawn.points[:, :2].T.numpy(), s=size, color=BLUE, marker="D", zorder=3)
    x, y = drawn.vectors[:, 0].numpy(), drawn.decoded[:, 0].numpy()
    histogram(right, drawn.vectors.flatten())
    right.scatter(x, y, s=size / 8, color=BLUE, lw=0, zorder=3)
    ends = _limits(x)
    _finish(left, np.array(ends), _limits(drawn.vectors[:, 1].numpy()), look)
    _finish(right, np.array(ends), _limits(y), look)


def dots(panel: Any, x: Tensor, y: Tensor, frozen: Tensor, look: PlotSizes) -> None:
    """Draw values one by one: frozen ones as squares, free ones as dots."""
    for which, marker, color in ((~frozen, ".", BLUE), (frozen, "s", ORANGE)):
        panel.plot(x[which].numpy(), y[which].numpy(), marker, color=color, ms=look.mark / 2, mew=0, zorder=3)


def histogram(panel: Any, tensor: Tensor) -> None:
    """Draw a float tensor's histogram behind; a bar far above the others, ReLU's zeros, is cut."""
    counts, edges = np.histogram(tensor.numpy(), bins=BINS)
    heights = (counts / max(np.sort(counts)[-2], 1)).clip(max=1)
    panel.stairs(0.9 * heights, edges, fill=True, color="0.89", transform=panel.get_xaxis_transform(), zorder=0)


def handles(readings: list[QuantizerCurves | Codewords]) -> list[Any]:
    """Return a legend's entries for what these curves have."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    curves = [r for r in readings if isinstance(r, QuantizerCurves)]
    maps = [m for r in curves for m in (r.forward, r.backward) if m is not None]
    found: list[tuple[bool, Any]] = [
        (bool(maps), Line2D([], [], color=BLUE, lw=2, label="quantized value")),
        (bool(maps), Line2D([], [], color=VERMILLION, lw=2, ls=DASHES, label="gradient")),
        (any(0 < len(m.levels) <= FEW for m in maps), Line2D([], [], color="0.6", lw=0.8, label="level")),
        (
            any(0 < len(m.jumps) <= STEPS and r.frozen is None for r in curves for m in (r.forward,)),
            Line2D([], [], color="black", marker="^", ls="", label="threshold"),
        ),
        (any(m.band for m in maps), Patch(color=SKY, alpha=0.5, label=f"least to most of {DRAWS} draws, line: mean")),
        (any(r.frozen is not None for r in curves), Line2D([], [], color=ORANGE, marker="s", ls="", label="frozen")),
        (any(r.frozen is not None for r in curves), Line2D([], [], color=BLUE, marker=".", ls="", label="free")),
        (len(curves) < len(readings), Line2D([], [], color=BLUE, marker="D", ls="", label="codeword")),
        (bool(maps), Line2D([], [], color="0.45", lw=0.8, ls=(0, (4, 3)), label="unchanged")),
        (True, Patch(color="0.89", label="float tensor")),
    ]
    return [handle for shown, handle in found if shown]


def number(value: float, digits: str) -> str:
    """Return a number as axes write it, with a minus sign of its own and none in front of 0."""
    text = f"{value:{digits}}"
    return (f"{0:{digits}}" if not float(text) else text).replace("-", "\u2212")


def _limits(*values: Any) -> tuple[float, float]:
    """Return the ends of an axis that shows all of these."""
    low, high = (float(end(np.concatenate(values))) for end in (np.min, np.max))
    margin = MARGIN * ((high - low) or 1)
    return low - margin, high + margin


def _apart(levels: list[float], gap: float) -> list[float]:
    """Return those levels whose texts do not overlap: the ends, zero, then the farthest from all that are there."""
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


def _finish(panel: Any, x: Any, y: tuple[float, float], look: PlotSizes) -> None:
    panel.set(xlim=(float(x[0]), float(x[-1])), ylim=y)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(labelsize=look.text - 1, length=2.5, pad=2)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
