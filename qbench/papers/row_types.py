"""Defines the types of published figures, which are numbers from papers and from third parties."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbench.config.schema import BitWidths

PROVENANCES = ("verified", "second-hand", "memory-high", "memory-medium", "memory-low", "unknown")
"""Where a number comes from, best first.

- `verified`: the number was read in the named source.
- `second-hand`: the number was read in a text that quotes the source.
- `memory-high`, `memory-medium`, `memory-low`: the number is remembered with high, medium or low confidence. It was not
  checked.
- `unknown`: the number is not known.
"""
PAPER, REPOSITORY, THIRD = "authors' paper", "authors' repository", "third party: "
CHECKPOINT = "authors' checkpoint, evaluated here"
"""Values of `ran_by`. `THIRD` is followed by the name of the third party."""
METRICS = ("top1", "top1_error", "top1_error_increase", "top5", "top5_error", "top5_error_increase")
"""Metrics in percent of the test images.

An increase is the error minus the error of the row's float network, in percentage points.
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """qbench's measurement for a row, as mean and standard deviation over n seeds.

    The numbers are values of the row's metric. `baseline` is the mean of our float baselines. `top5`
    and `baseline_top5` are the top-5 values of the same runs.
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
    """How the network of a row is trained. Several rows can share a recipe.

    `words` are command-line overrides. `open` lists the settings that the source does not state.
    `departs` lists our deviations from the source. With `pretrain: same`, the float baseline is
    trained with the same optimizer and number of epochs. For the other keys see `PublishedRow`.
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
        value: the published number, or the lower end of a published range. None if it is not known.
        upper: the upper end of a published range, or None for a single number.
        baseline: the published number of the float network, in the same metric and from the same
            source.
        baseline_note: the reason why `baseline` is missing.
        baseline_provenance: the provenance of `baseline`, if it differs from the row's provenance.
        levels: number of levels of the weights, if the bit widths do not determine it.
        words: command-line overrides that are appended to those of the recipe.
        lacks: the reason why the row has no recipe.
        waive: maps each lint rule that the row may break to the reason.
        top5_of: the id of the row with the same run's top-1 value, if this row has a top-5 value.
            Otherwise empty.
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
        """Return a value of the row's metric, converted so that a larger value is better.

        An error becomes an accuracy. An increase in error changes its sign.
        """
        return -value if self.metric.endswith("increase") else 100 - value if "error" in self.metric else value


@dataclass(frozen=True, kw_only=True)
class NoResult:
    """A data set, and optionally a network, for which a paper has no result although other texts quote one."""

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
    """The title of a network, and the command-line overrides that select it.

    The overrides are empty if qbench does not have the network.
    """

    title: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """The title of a data set, its number of classes, and the command-line overrides that select it."""

    title: str
    classes: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """The networks, data sets and methods of the published figures, each by its key in the YAML files.

    A method is represented only by its title.
    """

    datasets: Mapping[str, DatasetName]
    nets: Mapping[str, NetName]
    methods: Mapping[str, str]
