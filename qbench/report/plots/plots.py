"""Pictures of a comparison: accuracy against bits, bytes and BitOps, learning curves, error by layer.

Methods are told apart by colour (Okabe and Ito's), shape and dash, widths by colour and dash; float is black. Bars are
Student's 95 % intervals over seeds, none where there is one seed; bands of curves go from the lowest seed to the
highest. Where figures lie far apart the axis is that of the logarithm of the error, so that good ones are told apart.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

from qbench.errors import ConfigError
from qbench.report.plots import style as strokes
from qbench.report.plots.style import ACROSS, COLOURS, DASHES, FILLS, GREY, INK, LINE, MARKERS, STARS, Style
from qbench.report.tables.table import Table
from qbench.runs.history import BASELINE, MEASURES, Curves, SettingValues, is_float, layer_errors, learning, width_label
from qbench.runs.reader import RunRecord
from qbench.system import files

SUFFIXES = (".png", ".pdf", ".svg")
TITLES = {
    "bits": "Accuracy and bits; bars: 95 % intervals over seeds",
    "pareto": "Accuracy and cost; bars: 95 % intervals over seeds; rings: nothing cheaper is as good",
    "curves": "Learning curves, float stage left of the line, quantized right; bands: all seeds",
    "layers": "Outputs of layers against the float network's of the same latent weights, up to scale; bands: all seeds",
}


@dataclass(frozen=True)
class Block:
    """What of one table is drawn."""

    title: str
    cells: list[SettingValues]
    floats: list[SettingValues]
    styles: dict[str, Style]
    curves: Curves
    measure: str
    errors: Curves
    layers: list[str]


def plot(tables: Sequence[Table], found: Sequence[RunRecord], path: Path) -> None:
    """Draw a comparison into a PNG, PDF or SVG.

    The file's stem says which picture: bits, pareto, curves or layers; under any other name all stand in one figure.

    Raises:
        ConfigError: another suffix, or nothing to draw.
        ResourceError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"compare --plot {path}: the suffix says which format\nallowed: {', '.join(SUFFIXES)}")
    kinds = [path.stem] if path.stem in KINDS else list(KINDS)
    figure = picture(tables, found, kinds)
    if figure is None:
        needed = "runs with records of their layers" if kinds == ["layers"] else "finished runs of a quantized network"
        raise ConfigError(f"compare --plot {path}: nothing to draw\nthis picture needs {needed}")
    files.write(path, rendered(figure, path.suffix.lower()[1:]))


def picture(tables: Sequence[Table], found: Sequence[RunRecord], kinds: Iterable[str], *, titled: bool = True) -> Any:
    """Return a matplotlib figure, a row of panels for every table and kind; None where there is nothing to draw."""
    os.environ["MPLBACKEND"] = "agg"  # a backend that is set but not there would end the import
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds, parts, told = list(kinds), [], ""
    for block in read_blocks(tables, found, curves="curves" in kinds, layers="layers" in kinds):
        for kind in kinds:
            if height := _height(kind, block):
                lines = [*wrap(block.title, 120), TITLES[kind]] if block.title != told else [TITLES[kind]]
                told, lines = block.title, lines if titled else []
                parts.append((kind, block, lines, height + LINE * len(lines)))
    if not parts:
        return None
    heights = [height for *_, height in parts]
    with rc_context({"text.parse_math": False, "text.usetex": False, "font.size": 8, "axes.edgecolor": INK}):
        figure = Figure(figsize=(strokes.WIDTH, sum(heights)), dpi=strokes.DPI, layout="constrained")
        places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for place, (kind, block, lines, _) in zip(places, parts, strict=True):
            KINDS[kind](place, block)
            if lines:
                place.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9, weight="bold", color=INK)
        strokes.thin_out(figure)
    return figure


def rendered(figure: Any, form: str, **style: Any) -> bytes:
    """Return a figure's file, the same bytes whenever it is the same."""
    from matplotlib import rc_context

    made = BytesIO()
    undated: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with rc_context({"svg.hashsalt": "qbench", "text.usetex": False} | style):
        figure.savefig(made, format=form, metadata=undated[form])
    return made.getvalue()


def read_blocks(tables: Sequence[Table], found: Sequence[RunRecord], *, curves: bool, layers: bool) -> list[Block]:
    """Return what there is to draw of the tables that hold figures; metrics.jsonl is read where it is asked for."""
    results = {str(run.path): run.result for run in found if run.result}
    shown = [(table, [cell for cell in table.values if "top1_mean" in cell]) for table in tables]
    names = sorted({cell["method"] for _, cells in shown for cell in cells if not is_float(cell)})
    styles = {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }
    blocks = []
    for table, cells in shown:
        own, floats = [c for c in cells if not is_float(c)], [c for c in cells if is_float(c)]
        used = {name: style for name, style in styles.items() if any(cell["method"] == name for cell in own)}
        lines, measure = learning(own, results) if curves else ({}, "")
        errors, named = layer_errors(own) if layers else ({}, [])
        blocks.append(Block(table.title, own, floats, used, lines, measure, errors, named))
    return [block for block in blocks if block.cells]


def front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Return which of (cost, figure) are on the Pareto front, cheapest first: no other is as cheap and better, nor as
    good and cheaper.
    """
    best: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda k: (pairs[k][0], -pairs[k][1])):
        if not best or pairs[i][1] > pairs[best[-1]][1]:
            best.append(i)
    return best


def bits(figure: Any, block: Block) -> None:
    """Draw accuracy against bits, a line for each method and what it does to activations; what leaves weights float
    has a panel of its own, against the bits of activations or gradients.
    """
    groups = _series(block.cells)
    places = {key: sorted({c["bits"][key] for cells in lines.values() for c in cells}) for key, lines in groups.items()}
    ratios = {"width_ratios": [len(at) + 0.5 for at in places.values()]}
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, gridspec_kw=ratios)[0]
    regimes = sorted({"", *(regime for lines in groups.values() for _, regime in lines)})
    fills = dict(zip(regimes, FILLS * len(regimes), strict=False))
    handles: dict[str, Any] = {}
    for panel, (key, lines) in zip(panels, groups.items(), strict=True):
        handles |= _floats(panel, block.floats)
        for place, ((name, regime), cells) in enumerate(lines.items()):
            x = [places[key].index(c["bits"][key]) + 0.8 * ((place + 0.5) / len(lines) - 0.5) for c in cells]
            style, label = block.styles[name], _named(name, regime)
            handles[label] = strokes.points(panel, x, cells, style, fillstyle=fills[regime])
        for i in range(0, len(places[key]), 2):
            panel.axvspan(i - 0.5, i + 0.5, color=GREY, alpha=0.08, lw=0, zorder=-1)
        panel.set_xlim(-0.5, len(places[key]) - 0.5)
        panel.set_xticks(range(len(places[key])), list(map(str, places[key])))
        told = strokes.accuracy(panel, [*block.cells, *block.floats])
        strokes.finish(panel, BITS[key], told if panel is panels[0] else "")
    strokes.legend(figure, handles)


BITS = {"w": "bits a weight, W", "a": "bits an activation, A", "g": "bits a gradient, G"}


def _series(cells: Sequence[SettingValues]) -> dict[str, dict[tuple[str, str], list[SettingValues]]]:
    """Return the cells of each line by its axis, method and what else the method quantizes: "A=W" where it has
    activations as wide as weights at several widths, else "A2".
    """
    lines: dict[str, dict[tuple[str, str], list[SettingValues]]] = {}
    for name in dict.fromkeys(cell["method"] for cell in cells):
        own = sorted(
            (cell for cell in cells if cell["method"] == name), key=lambda c: [c["bits"][key] for key in "wag"]
        )
        alike = [c for c in own if c["bits"]["a"] == c["bits"]["w"] < 32]
        for cell in own:
            w, a, g = (cell["bits"][key] for key in "wag")
            axis = "w" if w < 32 else "a" if a < 32 else "g"
            told = ["A=W" if a == w and len(alike) > 1 else f"A{a}"] if axis == "w" and a < 32 else []
            told += [f"G{g}"] if axis != "g" and g < 32 else []
            lines.setdefault(axis, {}).setdefault((name, " ".join(told)), []).append(cell)
    return {axis: lines[axis] for axis in "wag" if axis in lines}


def _named(name: str, regime: str) -> str:
    return f"{name}, {regime}" if regime else name


def _floats(panel: Any, cells: Sequence[SettingValues]) -> dict[str, Any]:
    """Draw float networks as lines in bands."""
    handles = {}
    for cell, dash in zip(cells, DASHES, strict=False):
        top1, half = cell["top1_mean"], cell["top1_half"]
        handles[cell["method"]] = panel.axhline(top1, color=INK, ls=dash, lw=1, zorder=1)
        if half is not None:
            panel.axhspan(top1 - half, top1 + half, color=GREY, alpha=0.22, lw=0, zorder=0)
    return handles


def pareto(figure: Any, block: Block) -> None:
    """Draw accuracy against bytes and against BitOps, and the front: what nothing cheaper is as good as."""
    axes = {"bytes": ("weights (bytes, log scale)", "B"), "bitops": ("BitOps an image (log scale)", "")}
    stars = {cell["method"]: Style(INK, STARS[i % len(STARS)], "") for i, cell in enumerate(block.floats)}
    styles, handles = stars | block.styles, {}
    for panel, (key, (label, unit)) in zip(figure.subplots(1, 2, sharey=True), axes.items(), strict=True):
        cells = [cell for cell in [*block.floats, *block.cells] if cell.get(key)]
        for name, style in styles.items():
            if own := [cell for cell in cells if cell["method"] == name]:
                handles[name] = strokes.points(panel, [cell[key] for cell in own], own, style._replace(dash=""))
        best = [cells[i] for i in front([(cell[key], cell["top1_mean"]) for cell in cells])]
        x, y = [cell[key] for cell in best], [cell["top1_mean"] for cell in best]
        panel.step(x, y, where="post", color=INK, lw=0.9, alpha=0.6, zorder=1)
        panel.plot(x, y, "o", ms=9, mfc="none", mec=INK, mew=0.8, zorder=4)
        for cell, at in zip(best, zip(x, y, strict=True), strict=True):
            name = cell["method"] if is_float(cell) else f"{cell['method']} {width_label(cell)}"
            turned = {"rotation": 40, "rotation_mode": "anchor", "fontsize": 7, "color": INK, "gid": "front"}
            panel.annotate(name, at, (3, 6), textcoords="offset points", **turned).set_in_layout(False)
        strokes.log_axis(panel, unit)
        told = strokes.accuracy(panel, [*block.floats, *block.cells], room=0.3)
        strokes.finish(panel, label, told if key == "bytes" else "")
    strokes.legend(figure, handles)


def curves(figure: Any, block: Block) -> None:
    """Draw the learning curves of each method, the float stage and the quantized one side by side."""
    every = [found for lines in block.curves.values() for found in lines.values()]
    first, last = min(found.x[0] for found in every), max(found.x[-1] for found in every)
    for panel in _multiples(figure, block.curves, MEASURES[block.measure], "epoch"):
        panel.axvline(0.5, color=INK, lw=0.6)
        ticks = {x: str(x - first + 1) for x in (first, 0) if first < 1} | {last: str(last)}
        panel.set_xticks(list(ticks), list(ticks.values()))


def layers(figure: Any, block: Block) -> None:
    """Draw the error of each layer, of each method."""
    for panel in _multiples(figure, block.errors, "SQNR (dB)", "layer"):
        panel.set_xticks(range(len(block.layers)), block.layers, rotation=90, fontsize=5.5)


KINDS: dict[str, Callable[[Any, Block], None]] = {"bits": bits, "pareto": pareto, "curves": curves, "layers": layers}


def _height(kind: str, block: Block) -> float:
    """Return inches with the legend's; 0 where there is nothing of this kind."""
    if kind in ("curves", "layers"):
        lines = block.curves if kind == "curves" else block.errors
        rows = strokes.legend_rows({key for own in lines.values() for key in own})
        tick = 0.0 if kind == "curves" else 0.07 * max(map(len, block.layers), default=0)
        return 0.6 + tick + 1.7 * -(-len(lines) // ACROSS) + LINE * rows if lines else 0
    labels = {_named(*line) for lines in _series(block.cells).values() for line in lines}
    labels = {cell["method"] for cell in block.floats} | (labels if kind == "bits" else set(block.styles))
    drawn = kind == "bits" or any(cell.get("bytes") or cell.get("bitops") for cell in block.cells)
    return 3.1 + LINE * strokes.legend_rows(labels) if drawn else 0


def _multiples(figure: Any, methods: Curves, y: str, x: str) -> list[Any]:
    """Draw a panel for every method, a line for each of its widths."""
    columns = min(len(methods), ACROSS)
    grid = figure.subplots(-(-len(methods) // columns), columns, sharex=True, sharey=True, squeeze=False)
    known = sorted({key for lines in methods.values() for key in lines if key != BASELINE}, key=_rank)
    looks = {key: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, key in enumerate(known)}
    handles = {}
    for place, (name, lines) in enumerate(methods.items()):
        panel = grid[place // columns][place % columns]
        for key, found in lines.items():
            colour, dash = looks.get(key, (INK, "-"))
            panel.fill_between(found.x, found.low, found.high, color=colour, alpha=0.2, lw=0)
            marker = "o" if len(found.x) == 1 else ""
            (handles[key],) = panel.plot(found.x, found.mean, color=colour, ls=dash, lw=1.3, marker=marker, ms=3)
        panel.set_title("\n".join(wrap(name, 36)), loc="left", fontsize=8, pad=3, color=INK)
        below = place + columns >= len(methods)
        strokes.finish(panel, x if below else "", y if place % columns == 0 else "")
        panel.tick_params(labelbottom=below)
    for panel in grid.flat[len(methods) :]:
        panel.remove()
    strokes.legend(figure, {key: handles[key] for key in [BASELINE, *known] if key in handles})
    return list(grid.flat[: len(methods)])


def _rank(name: str) -> list[tuple[str, int]]:
    """Return what sorts W2 before W10, and W2 before W2 A2."""
    return [(part[0], int(part[1:])) for part in name.split()]
