"""Defines the types of published figures: numbers from papers and third parties."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbench.config.schema import BitWidths

PROVENANCES = ("verified", "second-hand", "memory-high", "memory-medium", "memory-low", "unknown")
"""Provenances of a figure, best first.

They mean: read in the named source; read in a quotation by others; remembered with high, medium or low confidence and
not checked; not known.
"""
PAPER, REPOSITORY, THIRD = "authors' paper", "authors' repository", "third party: "
CHECKPOINT = "authors' checkpoint, evaluated here"
"""Values of `ran_by`. `THIRD` is followed by a name. Any value may be followed by a remark in brackets."""
METRICS = ("top1", "top1_error", "top1_error_increase", "top5", "top5_error", "top5_error_increase")
"""Metrics in percent of the test images. An increase is in points, relative to the row's float network."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """qbench's measurement for a row, as mean and standard deviation over n seeds.

    The numbers are in the row's metric. `baseline` is the mean of our float baselines. The keys
    that contain `top5` are our measurement for the row's top-5 figure.
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
    """The training of rows.

    A recipe has command-line overrides, the settings that the source does not state, and our
    deviations from the source.

    `pretrain: same` trains the float baseline with the same optimizer and epochs. For the other
    keys see `PublishedRow`.
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
        value, upper: the number, or the two ends of a published range. None if not known.
        baseline: the number of the float network, in the same metric and from the same source. If
            it is missing, `baseline_note` explains why. `baseline_provenance` is set only if it
            differs from the row's provenance.
        levels: number of levels of the weights, if the bit widths do not determine it.
        words: command-line overrides that are appended to the recipe's.
        lacks: the reason why the row has no recipe.
        waive: maps a lint rule that the row breaks to the reason.
        top5_of: for a top-5 figure, the id of the top-1 row that it belongs to; otherwise empty.
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
        """Return whether the method's authors ran the experiment."""
        return not self.ran_by.startswith(THIRD)

    def accuracy(self, value: float) -> float:
        """Convert a value of the row's metric so that larger is better.

        An error is converted to an accuracy. An increase changes its sign.
        """
        return -value if self.metric.endswith("increase") else 100 - value if "error" in self.metric else value


@dataclass(frozen=True, kw_only=True)
class NoResult:
    """A data set (and optionally a network) without a result in a paper, although others quote one."""

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
    """The title of a network, and the overrides that choose it.

    There are no overrides if qbench does not have the network.
    """

    title: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """The title of a data set, its number of classes, and the overrides that choose it."""

    title: str
    classes: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """The networks, data sets and methods of the published figures, each by its key.

    For a method only the title is given.
    """

    datasets: Mapping[str, DatasetName]
    nets: Mapping[str, NetName]
    methods: Mapping[str, str]
