"""Defines the types of published figures, which are numbers from papers and from third parties."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbench.config.schema import BitWidths

PROVENANCES = ("verified", "second-hand", "memory-high", "memory-medium", "memory-low", "unknown")
"""The possible provenances of a number, best first.

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

An increase in error is the error minus the error of the row's float network, in percentage points.
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """qbench's measurement for a row: mean and standard deviation over n seeds.

    All numbers except top-5 values are in the row's metric.

    Args:
        spread: standard deviation over the seeds, or None with one seed.
        source: where the measurement is documented, such as `docs/records/cifar10.json`.
        baseline: the mean of our float baselines.
        top5, baseline_top5: top-5 values of the same runs.
        departs: differences between the recipe of our runs and the row's recipe. It is empty if the runs have the row's
            recipe.
    """

    value: float
    n: int
    spread: float | None
    source: str
    baseline: float | None = None
    top5: float | None = None
    baseline_top5: float | None = None
    departs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training recipe of one or more rows.

    `words` are command-line overrides. `open` lists training details that the source does not state. `departs` lists
    differences between our recipe and the source. With `pretrain: same`, the float baseline is trained with the same
    optimizer and the same number of epochs. The other keys have the same meaning as in `PublishedRow`.
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
        table: the table of the source that contains the number, as a title for the rows.
        metric: the meaning of the number, one of `METRICS`.
        policy, init, epochs, augmentation: what the source says about quantized layers, initial weights, number of
            epochs and augmentation of its run, as text.
        ran_by: who trained the network.
        source: the publication, with the table or page that contains the number.
        provenance: how the number is known, one of `PROVENANCES`.
        note: a remark on the number.
        recipe: name of the row's recipe, or an empty text.
        measured: qbench's own measurements for this row. Tables show the last one. A paper's file contains some, and
            `measured.yaml` contains the others.
        value: the published number, or the lower end of a published range. None means that the number is not known.
        upper: the upper end of a published range, or None for a single number.
        baseline: the published number of the float network, in the same metric and from the same source. None means
            that there is no such number.
        baseline_note: the reason why `baseline` is missing.
        baseline_provenance: the provenance of `baseline`, if it differs from the row's provenance.
        levels: number of levels of the weights, if the bit widths do not determine this number.
        words: command-line overrides that are appended to the overrides of the recipe.
        lacks: the reason why the row has no recipe.
        waive: the lint rules that the row is allowed to break, each with the reason.
        top5_of: if this row is a top-5 value, the id of the row with the top-1 value of the same run, else empty.
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
    def reproduced(self) -> bool:
        """Return whether qbench has measured the row with the row's own recipe."""
        return any(not measured.departs for measured in self.measured)

    @property
    def by_authors(self) -> bool:
        """Return whether the method's authors ran the experiment."""
        return not self.ran_by.startswith(THIRD)

    def accuracy(self, value: float) -> float:
        """Convert a value of the row's metric so that a larger value is better.

        An error becomes 100 - error. An increase in error becomes its negative.
        """
        return -value if self.metric.endswith("increase") else 100 - value if "error" in self.metric else value


@dataclass(frozen=True, kw_only=True)
class NoResult:
    """A data set, and optionally a network, for which other texts quote a result that the paper does not contain."""

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
    """The title of a network, and the command-line overrides that select this network.

    The overrides are empty if qbench does not have the network.
    """

    title: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """A data set's title and number of classes, and the command-line overrides that select this data set."""

    title: str
    classes: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """The networks, data sets and methods of the published figures, each by its key in the YAML files.

    The value of a method is its title.
    """

    datasets: Mapping[str, DatasetName]
    nets: Mapping[str, NetName]
    methods: Mapping[str, str]
