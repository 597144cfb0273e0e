"""Reads the published figures, which are numbers copied from papers.

Each paper has a file `figures/<paper>.yaml` with bibliographic data, recipes and tables. A key of a table applies to
all rows of the table. `figures/names.yaml` contains the names of networks, data sets and methods. `measured.yaml`
contains qbench's own measurements of the rows. `scripts/published_rows.py` writes this file.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.papers.row_types import PROVENANCES, Measured, Names, Paper, PublishedRow, Recipe

FOLDER = Path(__file__).parent / "figures"
MEASURED = Path(__file__).with_name("measured.yaml")
"""The file of measurements, by `paper/row`."""
INHERITED = ("policy", "init", "epochs", "augmentation")
"""Keys of a recipe that also apply to the rows that use the recipe. A value in the row has priority."""

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@cache
def names() -> Names:
    """Return the names of networks, data sets and methods."""
    return _convert(Names, "names.yaml", yaml.safe_load((FOLDER / "names.yaml").read_text(encoding="utf-8")))


@cache
def papers() -> tuple[Paper, ...]:
    """Return all papers with their rows, sorted by file name."""
    return tuple(read_paper(path) for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "names")


@cache
def measurements() -> Mapping[str, tuple[Measured, ...]]:
    """Return the measurements in `measured.yaml`, by `paper/row`."""
    content = yaml.safe_load(MEASURED.read_text(encoding="utf-8")) or {}
    return {row: (_convert(Measured, f"{MEASURED.name}: {row}", values),) for row, values in content.items()}


def published_rows(paper: str | None = None, provenance: str | None = None) -> list[PublishedRow]:
    """Return the rows whose provenance is at least as good as the given provenance.

    If the provenance of a row's float baseline is worse, the row is returned without the baseline.

    Args:
        paper: the key of one paper, or None for all papers.
        provenance: one of `PROVENANCES`, or None for all rows.

    Raises:
        ConfigError: the paper or provenance does not exist.
    """
    known = {p.key: p for p in papers()}
    if paper is not None and paper not in known:
        raise ConfigError(
            f"published --paper {paper}: no such paper{did_you_mean(paper, known)}\nallowed: {', '.join(known)}"
        )
    if provenance is not None and provenance not in PROVENANCES:
        hint = did_you_mean(provenance, PROVENANCES)
        raise ConfigError(
            f"published --provenance {provenance}: unknown provenance{hint}\nallowed: {', '.join(PROVENANCES)}"
        )
    rows = [row for p in ([known[paper]] if paper else known.values()) for row in p.rows]
    if provenance is None:
        return rows
    allowed = PROVENANCES[: PROVENANCES.index(provenance) + 1]
    return [
        row
        if (row.baseline_provenance or row.provenance) in allowed
        else dataclasses.replace(
            row, baseline=None, baseline_note=f"the provenance of the baseline is worse than {provenance}"
        )
        for row in rows
        if row.provenance in allowed
    ]


def read_paper(path: Path) -> Paper:
    """Return the paper in a YAML file.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type. The message names
            the file and the row.
    """
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipes = {
        name: _convert(Recipe, f"{path.name}: recipe {name}", {"name": name} | values)
        for name, values in (node.pop("recipes", None) or {}).items()
    }
    rows: list[PublishedRow] = []
    for table in node.pop("tables", ()):
        shared = {"paper": path.stem, "method": path.stem} | table
        for entry in shared.pop("rows"):
            rows += _rows_of_entry(path.name, recipes, shared | entry)
    paper = _convert(Paper, path.name, {"key": path.stem} | node)
    return dataclasses.replace(paper, recipes=recipes, rows=tuple(rows))


def _rows_of_entry(file: str, recipes: Mapping[str, Recipe], values: dict[str, Any]) -> list[PublishedRow]:
    """Return the row of an entry, and a second row for top-5 if the entry has a key `top5`."""
    where = f"{file}: {values.get('id', 'a row without id')}"
    if (name := values.get("recipe")) and name not in recipes:
        raise ConfigError(
            f"{where}: recipe {name}: no such recipe{did_you_mean(name, recipes)}\nallowed: {', '.join(recipes)}"
        )
    if name:
        values = {key: getattr(recipes[name], key) for key in INHERITED} | values
    values["bits"] = {"w": 32, "a": 32, "g": 32} | values.get("bits", {})
    measured = tuple(_convert(Measured, f"{where}: measured", m) for m in values.pop("measured", ()))
    measured += measurements().get(f"{values['paper']}/{values.get('id')}", ())
    top5 = {key: values.pop(key) for key in ("top5", "baseline_top5") if key in values}
    row = dataclasses.replace(_convert(PublishedRow, where, values), measured=measured)
    if "top5" not in top5:
        return [row]
    measured_top5 = [
        dataclasses.replace(m, value=m.top5, baseline=m.baseline_top5) for m in measured if m.top5 is not None
    ]
    second = dataclasses.replace(
        row, id=f"{row.id}_top5", top5_of=row.id, metric=row.metric.replace("top1", "top5"), value=top5["top5"],
        upper=None, baseline=top5.get("baseline_top5"), measured=tuple(measured_top5),
    )  # fmt: skip
    return [row, second]


def _convert(kind: type[T], where: str, values: Mapping[str, Any]) -> T:
    """Return a dataclass of type `kind` with the given values. `where` is the location for error messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: {key}: no such key{did_you_mean(key, fields)}\nallowed: {', '.join(fields)}")
    for key, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise ConfigError(f"{where}: {key} is missing")
    if "epochs" in values:  # YAML reads `epochs: 200` as a number but `epochs: at most 8` as text
        values = {**values, "epochs": str(values["epochs"])}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
