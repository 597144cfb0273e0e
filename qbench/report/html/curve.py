"""Draws a setting's learning curve as a small SVG."""

from collections.abc import Mapping
from dataclasses import dataclass

from qbench.report.plots.training_curves import FLOAT_STAGE, SeedCurve

WIDTH, HEIGHT, LEFT, BELOW = 380, 150, 34, 18
"""Width, height, left margin and bottom margin of the drawing, in pixels."""
RIGHT, TOP = 8, 6
"""Right and top margin of the drawing, in pixels."""


@dataclass(frozen=True, kw_only=True)
class DrawnLine:
    """The points of a line, and the outline of its band from the lowest to the highest seed.

    `kind` is the CSS class of the line.
    """

    kind: str
    points: str
    band: str


@dataclass(frozen=True, kw_only=True)
class CurveDrawing:
    """The lines of a drawing, its size, and the numbers on its axes.

    `border` is the x-coordinate between float and quantized training, or None without float training.
    """

    lines: list[DrawnLine]
    summary: str
    border: str | None
    float_epochs: int
    low: str
    high: str
    last_epoch: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    below: int = BELOW
    right: int = RIGHT
    top: int = TOP


@dataclass(frozen=True)
class _Scale:
    """Maps epochs and accuracies to pixels."""

    first: int
    last: int
    low: float
    high: float

    def x(self, epoch: float) -> str:
        span = (self.last - self.first) or 1
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (epoch - self.first) / span:.1f}"

    def point(self, epoch: float, accuracy: float) -> str:
        span = (self.high - self.low) or 1.0
        return f"{self.x(epoch)},{TOP + (HEIGHT - BELOW - 2 * TOP) * (self.high - accuracy) / span:.1f}"


def draw_curve(lines: Mapping[str, SeedCurve]) -> CurveDrawing | None:
    """Return a drawing of learning curves, or None if `lines` is empty.

    The keys of `lines` are widths as text, or "float".
    """
    if not lines:
        return None
    epochs = [x for line in lines.values() for x in line.x]
    scale = _Scale(
        first=min(*epochs, 0 if FLOAT_STAGE in lines else 1),
        last=max(*epochs, 1),
        low=min(y for line in lines.values() for y in line.low),
        high=max(y for line in lines.values() for y in line.high),
    )
    ends = [f"{name}: {line.mean[0]:.1f} to {line.mean[-1]:.1f} in {len(line.x)}" for name, line in lines.items()]
    return CurveDrawing(
        lines=[_draw_line(name, line, scale) for name, line in lines.items()],
        summary="; ".join(ends),
        border=scale.x(0.5) if scale.first < 1 else None,
        float_epochs=1 - scale.first,
        low=f"{scale.low:.0f}",
        high=f"{scale.high:.0f}",
        last_epoch=scale.last,
    )


def _draw_line(name: str, line: SeedCurve, scale: _Scale) -> DrawnLine:
    upper = [scale.point(x, y) for x, y in zip(line.x, line.high, strict=True)]
    lower = [scale.point(x, y) for x, y in zip(line.x, line.low, strict=True)]
    return DrawnLine(
        kind="float" if name == FLOAT_STAGE else "own",
        points=" ".join(scale.point(x, y) for x, y in zip(line.x, line.mean, strict=True)),
        band=" ".join(upper + lower[::-1]),
    )
