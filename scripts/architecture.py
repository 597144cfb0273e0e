#!/usr/bin/env python3
"""Draws docs/architecture.svg, which shows the folders of qbench/ and the imports between them.

    .venv/bin/python scripts/architecture.py [--check]

scripts/test makes the environment .venv. With --check, nothing is written, and the exit status is 1 if the picture is
out of date. The script reads imports from the source, and the order of the folders from LAYERS in
tests/test_imports.py. An import gets an arrow if no chain of other arrows connects the two folders. Arrows to `bits`
and `errors` are not drawn, because most folders import these two.
"""

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
CAPTIONS = {
    "__main__": "python -m qbench",
    "api": "Python interface",
    "cli": "subcommands",
    "analysis": "plan, inspect, evaluate",
    "papers": "published figures, claims",
    "report": "tables, statistics, plots",
    "deploy": "exported files",
    "check": "conformance kit",
    "experiment": "a run, a sweep",
    "training": "training loop, state",
    "distributed": "shards, processes",
    "runs": "run directories, results",
    "deviations": "flaws of public code",
    "methods": "one paper, one file",
    "models": "float networks",
    "data": "data sets, batches",
    "cost": "MACs, BitOps, bytes",
    "quant": "quantizers, layers",
    "config": "schema, composition",
    "system": "files, signals",
    "bits": "bit widths",
    "errors": "exit statuses",
}
FOUNDATION = ("bits", "errors")
WIDTH, BOX, HIGH, ROW, MARGIN = 800, 156, 44, 80, 14
"""Sizes in pixels: width of the picture, width of a box, height of a box, distance between rows, margin."""
GAP, LANE, PORT = 28, 20, 20
"""Distances in pixels: between two boxes of a row, and between two arrow ends at a box.

The second distance is also the width that an arrow needs to pass through a row.
"""
STYLE = """
  .page { fill: #ffffff } .box { fill: #eef3fb; stroke: #3b6ea8 } .free { fill: #f3f3f3; stroke: #8a8a8a }
  text { font: 12px system-ui, sans-serif; fill: #444444; text-anchor: middle }
  .name { font: 600 14px ui-monospace, monospace; fill: #111111 }
  path { fill: none; stroke: #5b6b7f; stroke-width: 1.3 } .head { fill: #5b6b7f; stroke: none }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .box { fill: #172538; stroke: #6ea3dd } .free { fill: #22262c; stroke: #8b949e }
    text { fill: #b4bcc6 } .name { fill: #f0f3f6 }
    path { stroke: #93a4b8 } .head { fill: #93a4b8 }
  }
"""


@dataclass
class Item:
    """A box, or the place where an arrow passes through a row. Such a place has an empty `folder`.

    `x` is the centre in pixels.
    """

    folder: str = ""
    x: float = 0.0
    below: list["Item"] = field(default_factory=list)
    above: list["Item"] = field(default_factory=list)

    @property
    def width(self) -> int:
        return BOX if self.folder else LANE


def layers() -> tuple[str, ...]:
    """Return the folders in the order that tests/test_imports.py defines."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    )
    order: tuple[str, ...] = ast.literal_eval(value)
    return order


def imports() -> dict[str, set[str]]:
    """Return, for each folder, the other folders that its modules import."""
    found: dict[str, set[str]] = {folder: set() for folder in layers()}
    for path in (path for path in (ROOT / "qbench").rglob("*.py") if path.name != "__init__.py"):
        folder = path.relative_to(ROOT / "qbench").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            parts = (name.split(".") for name in names)
            found[folder].update(p[1] for p in parts if p[0] == "qbench" and len(p) > 1)
    return {folder: {name for name in names if name in found} - {folder} for folder, names in found.items()}


def arrows() -> dict[str, set[str]]:
    """Return the folders to which each folder has an arrow.

    Folders that a chain of arrows connects need no other arrow.
    """
    direct = {folder: names - set(FOUNDATION) for folder, names in imports().items()}

    def reached(folder: str) -> set[str]:
        return set().union(*({name} | reached(name) for name in direct.get(folder, ())))

    implied = {folder: set().union(*(reached(name) for name in names)) for folder, names in direct.items()}
    return {folder: names - implied[folder] for folder, names in direct.items() if folder not in FOUNDATION}


def rows(drawn: dict[str, set[str]]) -> list[list[Item]]:
    """Divide the folders into rows, and return the rows from top to bottom.

    A folder begins a new row if a folder of the current row imports it.
    """
    places: list[list[Item]] = [[]]
    for folder in (name for name in layers() if name not in FOUNDATION):
        if any(folder in drawn.get(item.folder, ()) for item in places[-1]):
            places.append([])
        places[-1].append(Item(folder))
    row_of = {item.folder: (i, item) for i, row in enumerate(places) for item in row}
    for folder, names in sorted(drawn.items()):
        for name in sorted(names):
            (start, upper), (end, lower) = row_of[folder], row_of[name]
            for i in range(start + 1, end):
                lane = Item()
                places[i].append(lane)
                _join(upper, lane)
                upper = lane
            _join(upper, lower)
    return places


def _join(upper: Item, lower: Item) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def place(places: list[list[Item]]) -> None:
    """Set the centre of every item.

    An item is placed near the items with which arrows connect it. The items are ordered so that few arrows cross.
    """
    for row in places:
        _spread(row)
    for sweep in range(40):
        for row in places if sweep % 2 == 0 else reversed(places):
            if sweep < 30:  # first order each row by the row that was placed before it, and later only move items
                joined = {id(item): (item.below if sweep % 2 else item.above) or [item] for item in row}
            else:
                joined = {id(item): [*item.above, *item.below] for item in row}
            wanted = {key: _mean(other.x for other in others) for key, others in joined.items()}
            row.sort(key=lambda item: wanted[id(item)] if sweep < 30 else item.x)
            _spread(row, [wanted[id(item)] for item in row])
    for item in (item for row in places for item in row):
        item.above.sort(key=lambda other: other.x)
        item.below.sort(key=lambda other: other.x)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _spread(row: list[Item], wanted: list[float] | None = None) -> None:
    """Place a row's items near the given centres, within the picture and without overlap."""
    edge = float(MARGIN)
    for item, centre in zip(row, wanted or [WIDTH / 2] * len(row), strict=True):
        item.x = max(centre, edge + item.width / 2)
        edge = item.x + item.width / 2 + GAP
    edge = float(WIDTH - MARGIN)
    for item in reversed(row):
        item.x = min(item.x, edge - item.width / 2)
        edge = item.x - item.width / 2 - GAP


def _top(row: int) -> int:
    return MARGIN + row * ROW


def _port(item: Item, others: list[Item], other: Item) -> float:
    """Return the x-coordinate in pixels at which the arrow to another item touches the edge of an item."""
    index = next(i for i, one in enumerate(others) if one is other)
    return item.x + PORT * (index - (len(others) - 1) / 2) if item.folder else item.x


def _arrows(start: Item, row: int) -> list[str]:
    """Return the SVG text of the arrows that begin at a box. An arrow is a curve with a head at its end."""
    parts = []
    for below in start.below:
        upper, lower, i = start, below, row
        path = f"M{_port(start, start.below, below):.0f} {_top(row) + HIGH}"
        while True:
            i += 1
            x, end = _port(upper, upper.below, lower), _port(lower, lower.above, upper)
            y, stop = _top(i - 1) + HIGH, _top(i) - (6 if lower.folder else 0)
            path += f"C{x:.0f} {(y + stop) / 2:.0f} {end:.0f} {(y + stop) / 2:.0f} {end:.0f} {stop}"
            if lower.folder:
                break
            path += f"V{_top(i) + HIGH}"
            upper, lower = lower, lower.below[0]
        parts += [f'<path d="{path}"/>', f'<path class="head" d="M{end:.0f} {_top(i)}l-4 -8h8z"/>']
    return parts


def _box(folder: str, x: float, y: int, kind: str = "box") -> list[str]:
    return [
        f'<rect class="{kind}" x="{x - BOX / 2:.0f}" y="{y}" width="{BOX}" height="{HIGH}" rx="6"/>',
        f'<text class="name" x="{x:.0f}" y="{y + 18}">{folder}</text>',
        f'<text x="{x:.0f}" y="{y + 35}">{CAPTIONS[folder]}</text>',
    ]


def svg() -> str:
    """Return the picture as SVG text."""
    places = rows(arrows())
    place(places)
    boxes = [part for i, row in enumerate(places) for o in row if o.folder for part in _box(o.folder, o.x, _top(i))]
    lines = [part for i, row in enumerate(places) for o in row if o.folder for part in _arrows(o, i)]
    last = _top(len(places))
    for i, folder in enumerate(FOUNDATION):
        boxes += _box(folder, WIDTH / 2 + (i - (len(FOUNDATION) - 1) / 2) * (BOX + GAP), last, "free")
    note = (
        f'<text x="{WIDTH / 2:.0f}" y="{last + HIGH + 20}">most folders import bits and errors: no arrows drawn</text>'
    )
    high = last + HIGH + 20 + MARGIN
    title = "Folders of qbench: each folder is above the folders that it imports"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}"'
            f' role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{high}"/>',
            *lines,
            *boxes,
            f'<text x="{WIDTH / 2:.0f}" y="{last + HIGH + 20}">{note}</text>',
            "</svg>\n",
        ]
    )


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(svg(), encoding="utf-8")
        return 0
    if PICTURE.read_text(encoding="utf-8") == svg():
        return 0
    print("docs/architecture.svg is out of date; run scripts/architecture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
