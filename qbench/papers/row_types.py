"""Published figures as typed values: what papers and third parties reported, one row per number."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbench.config.schema import BitWidths

PROVENANCES = ("verified", "second-hand", "memory-high", "memory-medium", "memory-low", "unknown")
"""How well a figure is known, best first: read in the source named; read in a quotation by others; remembered with
high, medium or low confidence and not checked; not known."""
PAPER, REPOSITORY, THIRD = "authors' paper", "authors' repository", "third party: "
"""Who ran it. A name follows the third one; a remark in brackets may follow any of them."""
METRICS = ("top1", "top1_error", "top1_error_increase", "top5", "top5_error", "top5_error_increase")
"""In percent of the test images; an increase is in points over the float network of the same row."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What qbench measured for a row: the mean over n seeds in the row's metric, and its standard deviation.

    `baseline` is the mean of our float baselines. The `top5` keys belong to the row's top-5 figure.
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
    """How rows were trained: command-line words, what the source leaves open, and where we deviate from it.

    `pretrain: same` trains the float baseline with the same optimizer and epochs. Other keys: see `PublishedRow`.
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
class PublishedRow:
    """One published number.

    Args:
        value, upper: the number, or both ends where a range was published; None if the number is not known.
        baseline: the float network's number in the same metric from the same source; else `baseline_note` says why
            it is missing. `baseline_provenance` is set only if it differs from the row's own provenance.
        levels: levels of the weights, where the widths do not determine them.
        words: command-line words that follow the recipe's words.
        lacks: why the row has no recipe.
        waive: lint rules that the row breaks, with the reason.
        top5_of: id of the top-1 row whose top-5 figure this is; empty for all others.
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
    top5_of: str = ""

    @property
    def by_authors(self) -> bool:
        """Whether the method's own authors ran it."""
        return not self.ran_by.startswith(THIRD)

    def accuracy(self, value: float) -> float:
        """Convert a value of the row's metric so that more is better: an error to an accuracy, an increase to its
        negative.
        """
        return -value if self.metric.endswith("increase") else 100 - value if "error" in self.metric else value


@dataclass(frozen=True, kw_only=True)
class NoResult:
    """A data set (and network) for which a paper is known to have no result, though others quote one."""

    dataset: str
    provenance: str
    source: str
    net: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The bibliographic data of a paper, its recipes and its rows."""

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
    no_result: tuple[NoResult, ...] = ()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    rows: tuple[PublishedRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NetName:
    """The title of a network and the command-line words that choose it; no words if qbench does not have it."""

    title: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """The title of a data set, its number of classes, and the command-line words that choose it."""

    title: str
    classes: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """The networks, data sets and methods of the published figures, by key; a method's value is its title."""

    datasets: Mapping[str, DatasetName]
    nets: Mapping[str, NetName]
    methods: Mapping[str, str]
