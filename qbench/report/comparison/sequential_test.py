"""Tests two settings with an increasing number of seeds until a difference or equivalence is significant.

This is a group-sequential test. A test at the 5 % level that is repeated after every few seeds finds too many
differences. Here each of K looks tests at the level 0.05 / K (Bonferroni over looks). The rate of false decisions
therefore stays below 5 % for any dependence between looks. The tests of difference and equivalence may both use the
full level. At most one of them can be wrong, since the true difference cannot be zero and at least the margin at the
same time.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qbench.config.identity import run_identity
from qbench.config.schema import Config
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.report.comparison.naming import flat
from qbench.report.comparison.predictions import RunAccuracy, load_run_accuracy, paired_difference
from qbench.report.comparison.verdicts import MARGIN, Verdict
from qbench.report.statistics.differences import ALPHA, Difference, half_width, with_seed_dof
from qbench.report.statistics.hypothesis_tests import equivalent
from qbench.report.statistics.power import SEEDS_LIMIT, seeds_to_decide
from qbench.runs.reader import DONE, RunRecord

FIRST_LOOK, GROWTH, MAX_SEEDS = 3, 1.5, 20
"""Number of seeds at the first look, growth factor between looks, and default number at the last look."""
NAMED_KEYS = 3
"""Maximum number of keys in the name of a setting. Further keys are only counted."""

SeedAccuracies = tuple[Sequence[RunAccuracy], Sequence[RunAccuracy]]
"""The accuracies of both settings, one entry per seed, with seeds in the same order."""


@dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """Two settings to compare, and the parameters of the test.

    Args:
        first, second: the configurations of the settings. The test replaces their seeds.
        margin: equivalence margin in points of top-1.
        max_seeds: number of seeds at the last look.
        launcher: how missing runs are started: "" one at a time, "joblib" several at a time.
    """

    first: Config
    second: Config
    margin: float = MARGIN
    max_seeds: int = MAX_SEEDS
    launcher: str = ""


@dataclass(frozen=True, kw_only=True)
class SequentialResult:
    """The result of the last look.

    Args:
        verdict: the verdict on the first setting.
        difference: first minus second in points.
        means: mean test top-1 of both settings in percent.
        level: the significance level of each look.
    """

    verdict: Verdict
    difference: Difference
    means: tuple[float, float]
    level: float


class MissingRunError(Exception):
    """Raised if a run has no accuracy. The other runs alone would be a biased sample."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        reason = runs[0].reason.partition("\n")[0]
        super().__init__(
            f"no verdict: run {runs[0].path} has no accuracy, its status is {runs[0].status}"
            + (f": {reason}" if reason else "")
        )
        self.runs = list(runs)


def look_schedule(max_seeds: int) -> list[int]:
    """Return the number of seeds at each look: 3 at first, then 1.5 times as many each time.

    The last number is `max_seeds`.
    """
    schedule = [FIRST_LOOK]
    while schedule[-1] < max_seeds:
        schedule.append(min(math.ceil(GROWTH * schedule[-1]), max_seeds))
    return schedule


def decide(
    accuracies: Callable[[int], SeedAccuracies],
    margin: float,
    max_seeds: int,
    report: Callable[[str], None] = lambda line: None,
) -> SequentialResult:
    """Test two settings with an increasing number of seeds, up to a verdict or `max_seeds`.

    Args:
        accuracies: function that takes a number of seeds n and returns the n accuracies of each
            setting, in the order of seeds.
        margin: points of top-1 within which the settings count as equivalent.
        max_seeds: number of seeds at the last look.
        report: called with a line of text after every look without a verdict.
    """
    schedule = look_schedule(max_seeds)
    level = ALPHA / len(schedule)
    for n in schedule:
        result = _look(accuracies(n), margin, level)
        if result.verdict is not Verdict.UNDECIDED or n == max_seeds:
            break
        d = result.difference
        report(f"{n} seeds: {d.mean:+.2f} points, p = {d.p:.2g} is not below {level:.2g}; continuing")
    return result


def _look(accuracies: SeedAccuracies, margin: float, level: float) -> SequentialResult:
    """Test for a difference, then for equivalence, at one look."""
    d = with_seed_dof(paired_difference(*accuracies))
    first, second = (sum(run.top1 for run in runs) / len(runs) for runs in accuracies)
    if d.p < level:
        verdict = Verdict.ABOVE if d.mean > 0 else Verdict.BELOW
    else:
        verdict = Verdict.EQUIVALENT if equivalent(d, margin) < level else Verdict.UNDECIDED
    return SequentialResult(verdict=verdict, difference=d, means=(first, second), level=level)


def run_sequential_test(
    test: SequentialTest,
    run: Callable[[list[PlannedRun]], list[RunRecord]],
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Run the test and return the verdict in words.

    Args:
        test: the settings to compare.
        run: function that trains missing runs and returns a record of every run.
        report: called with a line of text after every look without a verdict.

    Raises:
        MissingRunError: a run has no accuracy.
    """

    def accuracies(n: int) -> SeedAccuracies:
        runs = [planned_run(_with_seed(config, seed)) for config in (test.first, test.second) for seed in range(n)]
        records = run(runs)
        if missing := [record for record in records if record.status != DONE]:
            raise MissingRunError(missing)
        loaded = [load_run_accuracy(str(record.path), _top1(record)) for record in records]
        return loaded[:n], loaded[n:]

    return describe(test, decide(accuracies, test.margin, test.max_seeds, report))


def _with_seed(config: Config, seed: int) -> Config:
    return replace(copy.deepcopy(config), seed=seed)


def _top1(record: RunRecord) -> float:
    assert record.result is not None
    assert record.result.top1 is not None
    return record.result.top1


def describe(test: SequentialTest, result: SequentialResult) -> str:
    """Return the verdict with its numbers in two sentences.

    The confidence level of the interval follows from the test that decided. It is 1 - level for a difference. It is 1 -
    2 level for equivalence, because equivalence is tested by two one-sided tests at `level`.
    """
    d, margin = result.difference, test.margin
    first, second = names(test)
    alpha = result.level * (2 if result.verdict is Verdict.EQUIVALENT else 1)
    half = half_width(d, alpha)
    numbers = f"{d.mean:+.2f} points, {100 * (1 - alpha):.4g} % confidence interval "
    numbers += f"{d.mean - half:+.2f} to {d.mean + half:+.2f}"
    numbers += f"; test top-1 {result.means[0]:.2f} and {result.means[1]:.2f}, {d.n} seeds"
    numbers += f", {d.items:,} test images" if d.items else ""
    if result.verdict is Verdict.UNDECIDED:
        verdict = (
            f"is not significantly different from {second}, and not shown to be equivalent within ±{margin:g} points"
        )
        return f"{first} {verdict}: {numbers}. {_advice(test, result)}"
    relation = {
        Verdict.ABOVE: f"is above {second}",
        Verdict.BELOW: f"is below {second}",
        Verdict.EQUIVALENT: f"is equivalent to {second} within ±{margin:g} points",
    }[result.verdict]
    looks = len(look_schedule(test.max_seeds))
    method = (
        f"Each of {looks} looks tests at the level {result.level:.2g}, so the rate of false decisions stays below 5 %."
    )
    return f"{first} {relation}: {numbers}. {method}"


def _advice(test: SequentialTest, result: SequentialResult) -> str:
    """Return a sentence on how many more seeds would probably lead to a verdict, or why no number would."""
    d = result.difference
    seeds = seeds_to_decide(d, test.margin, result.level)
    if seeds is not None:
        return f"About {max(seeds - d.n, 1)} more seeds would lead to a verdict: --max-seeds {max(seeds, d.n + 1)}."
    if d.items and d.item_variance:
        return f"The {d.items:,} test images are too few for a verdict."
    return f"Even {SEEDS_LIMIT:,} seeds are too few for a verdict."


def names(test: SequentialTest) -> tuple[str, str]:
    """Return the names of both settings: method, widths, and the keys in which they differ.

    If method and widths are the same, any differing key can be named. Otherwise only differing keys
    of the protocol and the network are named.
    """
    configs = test.first, test.second
    short = setting_name(test.first), setting_name(test.second)
    keys = [flat(run_identity(config).keys if short[0] == short[1] else _shared_keys(config)) for config in configs]
    differing = [key for key in sorted(set().union(*keys)) if keys[0].get(key) != keys[1].get(key)]
    more = f" and {len(differing) - NAMED_KEYS} more keys" if len(differing) > NAMED_KEYS else ""
    typed = [" ".join(f"{key}={values.get(key, '?')}" for key in differing[:NAMED_KEYS]) + more for values in keys]
    return f"{short[0]} {typed[0]}".rstrip(), f"{short[1]} {typed[1]}".rstrip()


def _shared_keys(config: Config) -> dict[str, object]:
    """Return the keys that all methods of a table share: those of the protocol and the network."""
    return run_identity(config).protocol | {"model": config.model}


def setting_name(config: Config) -> str:
    """Return a setting's method and widths, such as `dorefa w2a2g32`."""
    return f"{config.method_name} {config.bits}"
