"""Defines a setting: all runs of one method with the same options, widths and protocol, over several seeds.

All dataclasses are frozen. Conclusions, published results and groups of equal bytes are added later to copies, which
`dataclasses.replace` makes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from qbench.bits import FLOAT, Bits
from qbench.cost.network_cost import NetworkCost
from qbench.report.comparison.lr_selection import SelectedLearningRate
from qbench.report.comparison.verdicts import Conclusion
from qbench.report.statistics.differences import paired
from qbench.runs.result import TrainingSpeed


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over n seeds, with its standard deviation and the half-width of its 95 % confidence interval.

    With one seed, the standard deviation and the half-width are None.
    """

    mean: float
    std: float | None = None
    ci95_half: float | None = None
    n: int = 1


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of some values, one per seed, with Student's confidence interval."""
    if len(values) < 2:
        return Estimate(mean=mean(values))
    interval = paired(values, [0.0] * len(values))
    return Estimate(mean=mean(values), std=stdev(values), ci95_half=interval.high - interval.mean, n=len(values))


@dataclass(frozen=True, kw_only=True)
class SeedAccuracy:
    """The accuracy of one run of a setting.

    Args:
        seed: the run's seed.
        run: the run's directory.
        top1: test top-1 in percent.
        baseline: directory of the run's float baseline, or None if there is no baseline.
        baseline_top1: test top-1 of the float baseline in percent.
        weights_sha256: sha256 of the run's weights, or None if it is not known.
    """

    seed: int
    run: str
    top1: float
    baseline: str | None = None
    baseline_top1: float | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class LevelRange:
    """The smallest and largest number of levels that layers use, and the largest and smallest allowed number."""

    fewest: int
    most: int
    allowed: int
    fewest_allowed: int


@dataclass(frozen=True, kw_only=True)
class VerifiedLevels:
    """The number of verified layers, and the numbers of levels of weights (w), activations (a) and gradients (g).

    If the number of verified layers differs between runs, the smallest number is stored.
    """

    layers: int
    found: Mapping[str, LevelRange]


@dataclass(frozen=True, kw_only=True)
class PublishedMatch:
    """A published result for a setting.

    Args:
        row: name of the paper and of the row in the published figures.
        metric: top1, top1_error or top1_error_increase.
        claimed, upper: the published value, or the range from `claimed` to `upper` if `upper` is given.
        top1: the published value as top-1 in percent, or None if the value is an increase or not known.
        text: the published value as tables show it. A leading ~ marks a value from memory.
        to_float: the published value minus the paper's float baseline, in points.
        gap: our accuracy minus the published value, in points.
        ran_by, by_authors: who ran the published experiment, and whether these people are the method's authors.
        provenance, remembered, source: where the published value comes from, and whether the value is from memory.
        words: command-line arguments that reproduce the row.
    """

    row: str
    metric: str
    claimed: float | None
    upper: float | None
    top1: float | None
    text: str
    to_float: float | None
    gap: float | None
    ran_by: str
    by_authors: bool
    provenance: str
    remembered: bool
    source: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One method with its options and widths under one protocol, over all its seeds.

    Args:
        label: the method's name, followed by the options (as typed) that differ between runs of the method.
        method, options, bits: the method's name, options and widths.
        network: keys of the network that differ from their defaults and are not part of the protocol.
        dataset, model: names of the data set and the network.
        protocol: first 8 digits of the protocol's hash.
        keys: the keys of the protocol, nested as in the configuration.
        is_baseline: whether the network is a float network that was trained from scratch. Other runs start from this
            network.
        fine_tuned: whether the network started from its float baseline and was trained for the protocol's epochs.
        source: the kind of file from which the runs were read: result.json or logs.
        runs: one entry per run, sorted by seed.
        top1: test top-1 in percent after the last epoch, as an estimate over seeds. Runs of the
            same seed are averaged first.
        difference: top-1 minus the top-1 of the run's float baseline, in points. None if any run has no baseline.
        over_control: top-1 minus the top-1 of the float control with the same normalization (`with_control`), in
            points. Only common seeds are used. None if there is no such control.
        levels: number of values that a quantized weight can take.
        cost, speed, verified: cost, training speed and verified levels. Each is None if no run recorded it. Speeds are
            means over runs, and peak memory is the maximum over runs.
        file_bytes: the size of a run's exported packed file in bytes, or None if no run has such a file.
        learning_rate: how the learning rate was selected, or None without lr_search=grid.
        warnings: the warnings of all runs, each listed once. If only some seeds have a warning, its text names these
            seeds.
        conclusion, published, bytes_group: values of the classes `Conclusion` and `PublishedMatch`, and the group that
            `setting_table.group_by_bytes` assigns.
    """

    label: str
    method: str
    options: Mapping[str, object]
    bits: Bits
    network: Mapping[str, str]
    dataset: str
    model: str
    keys: Mapping[str, object]
    protocol: str
    is_baseline: bool
    source: str
    runs: tuple[SeedAccuracy, ...]
    top1: Estimate
    difference: Estimate | None = None
    over_control: Estimate | None = None
    levels: int | None = None
    cost: NetworkCost | None = None
    file_bytes: int | None = None
    speed: TrainingSpeed | None = None
    verified: VerifiedLevels | None = None
    learning_rate: SelectedLearningRate | None = None
    warnings: tuple[str, ...] = ()
    conclusion: Conclusion | None = None
    published: tuple[PublishedMatch, ...] | None = None
    bytes_group: int | None = None
    fine_tuned: bool = True

    @property
    def model_keys(self) -> Mapping[str, object]:
        """The network's keys in the protocol."""
        keys = self.keys.get("model")
        return keys if isinstance(keys, Mapping) else {}

    @property
    def name(self) -> str:
        """The label and the widths, such as `dorefa w2a2g32`."""
        return f"{self.label} {self.bits}"

    @property
    def is_float(self) -> bool:
        """Whether the network is a float network, either a baseline or fine-tuned."""
        return self.method == "float"

    @property
    def short_widths(self) -> str:
        """The widths below 32 bits, such as `W4 A4`, or `W32` if all widths are 32 bits."""
        return " ".join(f"{k.upper()}{n}" for k, n in self.bits._asdict().items() if n != FLOAT) or f"W{FLOAT}"

    @property
    def baselines(self) -> list[str]:
        """The directories of the float baselines, one for each run that has a baseline."""
        return [run.baseline for run in self.runs if run.baseline is not None]

    def to_json(self) -> dict[str, object]:
        """Return the setting as values for JSON, as a row of `qbench compare --format json`.

        The result has the fields of the class under the same names, and these keys:

        - top1_mean, top1_std, top1_ci95_half: percent; n: number of seeds.
        - diff_mean, diff_ci95_half: top-1 minus the top-1 of the float baseline, in points.
        - over_control_mean, over_control_ci95_half: top-1 minus the top-1 of the float control, in points; only if
          there is such a control.
        - seeds, runs, top1: one entry per run.
        - baseline_top1: one entry per run; null if any run has no baseline.
        - baselines: directories of the float baselines.
        - bytes, bytes_packed, params, macs, bitops, bits_per_weight: cost of the network; bytes is
          the ideal size.
        - bytes_file: size of an exported packed file; only if a run of the setting has one.
        - images_per_second, seconds_per_epoch, peak_bytes: training speed and memory.
        - verified_layers: number of verified layers.
        - levels_found: for each of w, a and g, the smallest and largest number of levels found, and the largest and
          smallest allowed number.
        - warnings: facts that limit what the accuracy or the size means, each once.
        - lr_search: the selected optim.lr, the seeds, and the grid (each rate with its mean
          validation top-1); only with lr_search=grid.
        - pairs, winner, test_images, test_sample_ci95_half: see `Conclusion` and `PairConclusion`.
        - published: see `PublishedMatch`; only with --published.
        - bytes_group: only with --sort equal-bytes.
        """
        values = {
            "label": self.label,
            "method": self.method,
            "bits": self.bits._asdict(),
            "levels": self.levels,
            **_accuracy_values(self),
            **_cost_values(self.cost),
            **({} if self.file_bytes is None else {"bytes_file": self.file_bytes}),
            **_speed_values(self.speed),
            **_level_values(self.verified),
            "warnings": list(self.warnings),
            "source": self.source,
            "is_baseline": self.is_baseline,
            "options": dict(self.options),
            "network": dict(self.network),
            "dataset": self.dataset,
            "model": self.model,
            "model_keys": dict(self.model_keys),
            "protocol": self.protocol,
        }
        if self.over_control is not None:
            values |= {
                "over_control_mean": self.over_control.mean,
                "over_control_ci95_half": self.over_control.ci95_half,
            }
        if self.learning_rate is not None:
            values["lr_search"] = self.learning_rate.to_json()
        if self.conclusion is not None:
            values |= vars(self.conclusion) | {"pairs": [vars(pair) for pair in self.conclusion.pairs]}
        if self.published is not None:
            values["published"] = [vars(match) for match in self.published]
        if self.bytes_group is not None:
            values["bytes_group"] = self.bytes_group
        return values


def _accuracy_values(setting: Setting) -> dict[str, object]:
    baseline_top1 = [run.baseline_top1 for run in setting.runs]
    return {
        "top1_mean": setting.top1.mean,
        "top1_std": setting.top1.std,
        "top1_ci95_half": setting.top1.ci95_half,
        "n": setting.top1.n,
        "diff_mean": setting.difference.mean if setting.difference else None,
        "diff_ci95_half": setting.difference.ci95_half if setting.difference else None,
        "seeds": [run.seed for run in setting.runs],
        "runs": [run.run for run in setting.runs],
        "top1": [run.top1 for run in setting.runs],
        "baseline_top1": None if None in baseline_top1 else baseline_top1,
        "baselines": setting.baselines,
    }


def _speed_values(speed: TrainingSpeed | None) -> dict[str, object]:
    """Return the speed and the memory. A speed is None if nothing was trained, as with `ptq`."""
    names = ("images_per_second", "seconds_per_epoch", "peak_bytes")
    return {name: getattr(speed, name) or None if speed else None for name in names}


def _level_values(verified: VerifiedLevels | None) -> dict[str, object]:
    found = verified.found if verified else {}
    return {
        "verified_layers": verified.layers if verified else None,
        "levels_found": {
            key: [levels.fewest, levels.most, levels.allowed, levels.fewest_allowed] for key, levels in found.items()
        },
    }


def _cost_values(cost: NetworkCost | None) -> dict[str, object]:
    values = vars(cost) if cost else {}
    names = ("bytes_packed", "params", "macs", "bitops", "bits_per_weight")
    return {"bytes": values.get("bytes_ideal")} | {name: values.get(name) for name in names}
