"""Reading the ledger: papers, recipes, rows from `figures/<paper>.yaml`; names from `names.yaml` beside them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qbench.config.schema import BitWidths, did_you_mean
from qbench.errors import ConfigError

FOLDER = Path(__file__).parent / "figures"
PROVENANCES = ("verified", "second-hand", "memory-high", "memory-medium", "memory-low", "unknown")
"""How well a figure is known, best first: read in the source named, read in another's quotation, remembered with more
or less confidence and not checked, not known."""
PAPER, REPOSITORY, THIRD = "authors' paper", "authors' repository", "third party: "
"""Who ran it; behind the last one stands a name, and a remark may follow any of them in brackets."""
METRICS = ("top1", "top1_error", "top1_error_increase", "top5", "top5_error", "top5_error_increase")
"""In percent of the test images; an increase in points over the row's own float network."""
INHERITED = ("policy", "init", "epochs", "augmentation")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What runs of ours gave for a row: means in the row's metric over n seeds, their standard deviation.

    `baseline` is our own float parents' mean; the `top5` keys serve the row's top-5 companion.
    """

    value: float
    n: int
    spread: float | None
    seeds: str
    date: str
    device: str
    commit: str
    baseline: float | None = None
    top5: float | None = None
    baseline_top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows were trained: words of the command line, and what they leave open or say otherwise than the paper.

    `pretrain: same` trains the float parent by the same optimizer and epochs. The other keys are those of rows.
    """

    name: str
    words: tuple[str, ...]
    provenance: str
    source: str
    pretrain: str = ""
    open: tuple[str, ...] = ()
    departs: tuple[str, ...] = ()
    policy: str = "unknown"
    init: str = "unknown"
    epochs: str = "unknown"
    augmentation: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published number.

    `value` to `upper` where a range was published; None where the figure is not known. `baseline` is the float
    network's in the same metric from the same source, or `baseline_note` says why there is none; `baseline_provenance`
    stands where it is not the row's own. `levels` of the
    weights stands where widths do not say it. `words` come after the recipe's; `lacks` says why a row has no recipe.
    `waive` names rules of the lint that the row breaks, with the reason. `of` is the row whose top-5 figure this is.
    """

    paper: str
    id: str
    method: str
    table: str = ""
    dataset: str = ""
    net: str = ""
    bits: BitWidths = field(default_factory=lambda: BitWidths(32, 32, 32))
    levels: int | None = None
    metric: str = ""
    value: float | None = None
    upper: float | None = None
    baseline: float | None = None
    baseline_note: str = ""
    baseline_provenance: str = ""
    policy: str = "unknown"
    init: str = "unknown"
    epochs: str = "unknown"
    augmentation: str = "unknown"
    ran_by: str = ""
    source: str = ""
    provenance: str = ""
    note: str = ""
    recipe: str = ""
    words: tuple[str, ...] = ()
    lacks: str = ""
    waive: Mapping[str, str] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    of: str = ""

    @property
    def by_authors(self) -> bool:
        """Whether the method's own authors ran it."""
        return not self.ran_by.startswith(THIRD)

    def accuracy(self, value: float) -> float:
        """Return a value of the row's metric so that more is better: a percentage, of an increase its negative."""
        return -value if self.metric.endswith("increase") else 100 - value if "error" in self.metric else value


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper's head and rows. `no_result`: where it is known to have none, though people quote one."""

    key: str
    name: str
    title: str
    authors: tuple[str, ...]
    year: int
    link: str
    affiliation: str
    affiliation_provenance: str
    idea: str
    scope: str = ""
    no_result: tuple[Mapping[str, str], ...] = ()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """What `names.yaml` says of nets, data sets and methods: titles, and command-line words for those of ours."""

    datasets: Mapping[str, Mapping[str, Any]]
    nets: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, str]


@cache
def names() -> Names:
    """Return what the ledger's nets, data sets and methods are called."""
    return Names(**yaml.safe_load((FOLDER / "names.yaml").read_text(encoding="utf-8")))


@cache
def papers() -> tuple[Paper, ...]:
    """Return the ledger, by file name."""
    return tuple(read_paper(path) for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "names")


def rows(paper: str | None = None, provenance: str | None = None) -> list[Row]:
    """Return the rows, of one paper if named, whose provenance is `provenance` or better; baselines that are worse are
    left out.

    Raises:
        ConfigError: no such paper or provenance.
    """
    known = {p.key: p for p in papers()}
    if paper is not None and paper not in known:
        raise ConfigError(
            f"published --paper {paper}: no such paper{did_you_mean(paper, known)}\nallowed: {', '.join(known)}"
        )
    if provenance is not None and provenance not in PROVENANCES:
        hint = did_you_mean(provenance, PROVENANCES)
        raise ConfigError(f"published --provenance {provenance}{hint}\nallowed: {', '.join(PROVENANCES)}")
    allowed = PROVENANCES[: PROVENANCES.index(provenance) + 1] if provenance else None
    found = [row for p in ([known[paper]] if paper else known.values()) for row in p.rows]
    if allowed is None:
        return found
    return [
        row
        if (row.baseline_provenance or row.provenance) in allowed
        else dataclasses.replace(row, baseline=None, baseline_note="not known as well as asked for")
        for row in found
        if row.provenance in allowed
    ]


def read_paper(path: Path) -> Paper:
    """Return a paper of the ledger.

    Raises:
        ConfigError: a key that does not exist or is missing, named with its file and row.
    """
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipes = {
        name: _made(Recipe, f"{path.name}: recipe {name}", {"name": name} | values)
        for name, values in (node.pop("recipes", None) or {}).items()
    }
    found: list[Row] = []
    for table in node.pop("tables", ()):
        shared = {"paper": path.stem, "method": path.stem} | table
        for entry in shared.pop("rows"):
            found += _rows(path.name, recipes, shared | entry)
    paper: Paper = _made(Paper, path.name, {"key": path.stem, "recipes": recipes, "rows": found} | node)
    return paper


def _rows(where: str, recipes: Mapping[str, Recipe], values: dict[str, Any]) -> list[Row]:
    """Return an entry's row and, where it has a key `top5`, the row of that figure."""
    where = f"{where}: {values.get('id', 'a row without id')}"
    if (name := values.get("recipe")) and name not in recipes:
        raise ConfigError(
            f"{where}: recipe {name}: no such recipe{did_you_mean(name, recipes)}\nknown: {', '.join(recipes)}"
        )
    if name:
        values = {key: getattr(recipes[name], key) for key in INHERITED} | values
    values["bits"] = BitWidths(**({"w": 32, "a": 32, "g": 32} | values.get("bits", {})))
    values["measured"] = tuple(_made(Measured, f"{where}: measured", m) for m in values.get("measured", ()))
    top5 = {key: values.pop(key) for key in ("top5", "baseline_top5") if key in values}
    row: Row = _made(Row, where, values)
    if "top5" not in top5:
        return [row]
    measured = [
        dataclasses.replace(m, value=m.top5, baseline=m.baseline_top5) for m in row.measured if m.top5 is not None
    ]
    second = dataclasses.replace(
        row, id=f"{row.id}_top5", of=row.id, metric=row.metric.replace("top1", "top5"), value=top5["top5"], upper=None,
        baseline=top5.get("baseline_top5"), measured=tuple(measured),
    )  # fmt: skip
    return [row, second]


def _made(kind: Any, where: str, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of some values, lists as tuples; refuse keys that it has not, and missing ones."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: {key}: no such key{did_you_mean(key, fields)}\nallowed: {', '.join(fields)}")
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    for key, item in fields.items():
        if key not in values and (item.default, item.default_factory) == optional:
            raise ConfigError(f"{where}: {key} is missing")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(**{key: str(value) if key == "epochs" else value for key, value in plain.items()})
