"""Tests two settings with an increasing number of seeds until a difference or equivalence is significant.

This is a group-sequential test. Each test during the sampling is called a look. If every look used the significance
level 5 %, all looks together would too often find a difference that does not exist. Look number k therefore uses the
level 0.05 / (k (k + 1)), which is a Bonferroni correction. For any number of looks, the levels add up to at most 0.05.
Earlier levels do not depend on the number of looks, so a test can continue later with a larger `max_seeds`. The test of
difference can be wrong only if the true difference is zero. The test of equivalence can be wrong only if the true
difference is at least the margin. Both tests may therefore use the full level.

The rate of false decisions is at most 5 % if the differences of the seeds are about normally distributed. The rate is
larger if training collapses in a few seeds of one setting. If no seed of an early look collapsed, the data of this look
do not show how the collapse changes the mean. No test of the same seeds can avoid this. The verdict therefore contains
a warning that names outlying seeds. It also contains the p-value of the sign-flip test, which does not assume a normal
distribution.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qbench.config.identity import run_identity
from qbench.config.schema import Config
from qbench.errors import ConfigError
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.report.comparison.naming import flat
from qbench.report.comparison.pairs import independent_seeds
from qbench.report.comparison.predictions import RunAccuracy, load_run_accuracy, paired_difference
from qbench.report.comparison.verdicts import MARGIN, Verdict
from qbench.report.statistics.differences import ALPHA, Difference, half_width, with_seed_dof
from qbench.report.statistics.hypothesis_tests import equivalent, outlying, sign_flip
from qbench.report.statistics.power import SEEDS_LIMIT, seeds_to_decide
from qbench.runs.reader import DONE, RunRecord
from qbench.runs.result import Result

FIRST_LOOK, GROWTH, MAX_SEEDS = 3, 1.5, 18
"""Number of seeds at the first look, growth factor between looks, and default maximum number of seeds."""
NAMED_KEYS = 3
"""Maximum number of keys in the name of a setting. Further keys are only counted."""

SeedAccuracies = tuple[Sequence[RunAccuracy], Sequence[RunAccuracy]]
"""The accuracies of the first and the second setting. Both have one entry per seed, in the same order of seeds."""


@dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """Two settings to compare, and the parameters of the test.

    Args:
        first, second: the configurations of the two settings. The test sets their seeds.
        margin: equivalence margin in points of top-1.
        max_seeds: maximum number of seeds. Looks of the schedule that need more seeds are left out.
        launcher: whether missing runs are started one at a time ("") or several at a time ("joblib").
    """

    first: Config
    second: Config
    margin: float = MARGIN
    max_seeds: int = MAX_SEEDS
    launcher: str = ""


@dataclass(frozen=True, kw_only=True)
class SequentialResult:
    """The result of the last look of a test.

    Args:
        verdict: the verdict on the first setting relative to the second setting.
        difference: top-1 of the first setting minus top-1 of the second setting, in points.
        means: mean test top-1 of both settings in percent.
        level: the significance level of the last look.
        by_seed: top-1 of the first setting minus top-1 of the second setting for every seed, in points.
    """

    verdict: Verdict
    difference: Difference
    means: tuple[float, float]
    level: float
    by_seed: tuple[float, ...]


class MissingRunError(Exception):
    """Raised if a run has no accuracy. The test stops, because the other runs alone would be a biased sample."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        reason = runs[0].reason.partition("\n")[0]
        super().__init__(
            f"no verdict: run {runs[0].path} has no accuracy, its status is {runs[0].status}"
            + (f": {reason}" if reason else "")
        )
        self.runs = list(runs)


def look_schedule(max_seeds: int) -> list[int]:
    """Return the number of seeds at each look: 3 at the first look, then 1.5 times as many as before, rounded up.

    Looks with more than `max_seeds` seeds are left out. The numbers of the other looks do not depend on `max_seeds`.
    """
    schedule, n = [FIRST_LOOK], math.ceil(GROWTH * FIRST_LOOK)
    while n <= max_seeds:
        schedule.append(n)
        n = math.ceil(GROWTH * n)
    return schedule


def look_level(number: int) -> float:
    """Return the significance level of look number k = 1, 2, ...: 0.05 / (k (k + 1)). The levels add up to 0.05."""
    return ALPHA / (number * (number + 1))


def decide(
    accuracies: Callable[[int], SeedAccuracies],
    margin: float,
    max_seeds: int,
    report: Callable[[str], None] = lambda line: None,
) -> SequentialResult:
    """Test two settings with an increasing number of seeds until there is a verdict or the last look is done.

    Args:
        accuracies: function that takes a number of seeds n and returns the accuracies of each setting, in the order of
            seeds. Seeds that repeat the networks of earlier seeds may be left out, but two seeds are needed.
        margin: equivalence margin in points of top-1.
        max_seeds: maximum number of seeds.
        report: callback that gets a line of text after every look without a verdict.
    """
    schedule = look_schedule(max_seeds)
    for number, n in enumerate(schedule, 1):
        level = look_level(number)
        result = _look(accuracies(n), margin, level)
        if result.verdict is not Verdict.UNDECIDED or n == schedule[-1]:
            break
        d = result.difference
        report(f"{n} seeds: {d.mean:+.2f} points, p = {d.p:.2g} is not below {level:.2g}; continuing")
    return result


def _look(accuracies: SeedAccuracies, margin: float, level: float) -> SequentialResult:
    """Test for a difference and then for equivalence, as one look."""
    d = with_seed_dof(paired_difference(*accuracies))
    first, second = (sum(run.top1 for run in runs) / len(runs) for runs in accuracies)
    if d.p < level:
        verdict = Verdict.ABOVE if d.mean > 0 else Verdict.BELOW
    else:
        verdict = Verdict.EQUIVALENT if equivalent(d, margin) < level else Verdict.UNDECIDED
    by_seed = tuple(one.top1 - other.top1 for one, other in zip(*accuracies, strict=True))
    return SequentialResult(verdict=verdict, difference=d, means=(first, second), level=level, by_seed=by_seed)


def run_sequential_test(
    test: SequentialTest,
    run: Callable[[list[PlannedRun]], list[RunRecord]],
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Run the test and return the verdict in words. Seeds with the same networks as an earlier seed are left out.

    Args:
        test: the settings to compare.
        run: function that trains missing runs and returns the `RunRecord` of every run.
        report: callback that gets a line of text after every look without a verdict.

    Raises:
        MissingRunError: a run has no accuracy.
        ConfigError: all seeds have the same networks.
    """
    seeds: list[int] = []

    def accuracies(n: int) -> SeedAccuracies:
        runs = [planned_run(_with_seed(config, seed)) for config in (test.first, test.second) for seed in range(n)]
        records = run(runs)
        if missing := [record for record in records if record.status != DONE]:
            raise MissingRunError(missing)
        results = [_result(record) for record in records]
        weights = [result.weights_sha256 for result in results]
        seeds[:] = independent_seeds({seed: (weights[seed], weights[n + seed]) for seed in range(n)})
        if len(seeds) < 2:
            raise ConfigError(
                f"no verdict: seeds 0 to {n - 1} have the same weights in both settings; they are one network of each "
                "setting, and show nothing about other seeds\nchoose settings whose weights depend on the seed"
            )
        loaded = [load_run_accuracy(str(record.path), _top1(record)) for record in records]
        return [loaded[seed] for seed in seeds], [loaded[n + seed] for seed in seeds]

    return describe(test, decide(accuracies, test.margin, test.max_seeds, report), seeds)


def _with_seed(config: Config, seed: int) -> Config:
    return replace(copy.deepcopy(config), seed=seed)


def _result(record: RunRecord) -> Result:
    assert record.result is not None
    return record.result


def _top1(record: RunRecord) -> float:
    top1 = _result(record).top1
    assert top1 is not None
    return top1


def describe(test: SequentialTest, result: SequentialResult, seeds: Sequence[int]) -> str:
    """Return the verdict with its numbers in two sentences. `seeds` are the seeds of the result's differences.

    The text contains a confidence interval, usually with the confidence level 1 - level. For a verdict of equivalence,
    the confidence level is 1 - 2 * level, because equivalence is tested by two one-sided tests at `level`.
    """
    d, margin = result.difference, test.margin
    first, second = names(test)
    alpha = result.level * (2 if result.verdict is Verdict.EQUIVALENT else 1)
    half = half_width(d, alpha)
    numbers = f"{d.mean:+.2f} points, {100 * (1 - alpha):.4g} % confidence interval "
    numbers += f"{d.mean - half:+.2f} to {d.mean + half:+.2f}"
    numbers += f"; test top-1 {result.means[0]:.2f} and {result.means[1]:.2f}, {d.n} seeds"
    numbers += f", {d.items:,} test images" if d.items else ""
    warning = _warning(result, seeds)
    if result.verdict is Verdict.UNDECIDED:
        verdict = (
            f"is not significantly different from {second}, and not shown to be equivalent within ±{margin:g} points"
        )
        return f"{first} {verdict}: {numbers}. {_advice(test, result)}{warning}"
    relation = {
        Verdict.ABOVE: f"is above {second}",
        Verdict.BELOW: f"is below {second}",
        Verdict.EQUIVALENT: f"is equivalent to {second} within ±{margin:g} points",
    }[result.verdict]
    method = (
        f"This test has the significance level {result.level:.2g}; the levels of the tests at all numbers of seeds add "
        "up to 5 %, which limits false verdicts if the differences of the seeds are about normally distributed. "
        f"Sign-flip test over seeds: p = {sign_flip(result.by_seed):.2g}."
    )
    return f"{first} {relation}: {numbers}. {method}{warning}"


def _warning(result: SequentialResult, seeds: Sequence[int]) -> str:
    """Return a warning that names outlying seeds, or an empty text if there are none."""
    named = ", ".join(str(seeds[i]) for i in outlying(result.by_seed))
    if not named:
        return ""
    return (
        f" Warning: in seed {named}, the difference is far from all other differences; if training can collapse, "
        "the mean and its interval are not reliable."
    )


def _advice(test: SequentialTest, result: SequentialResult) -> str:
    """Return a sentence that says how many more seeds a verdict would probably need, or why no number is enough."""
    d, done = result.difference, look_schedule(test.max_seeds)
    for number, n in enumerate(look_schedule(SEEDS_LIMIT), 1):
        if number <= len(done):
            continue
        seeds = seeds_to_decide(d, test.margin, look_level(number))
        if seeds is None:
            break
        if n >= seeds:
            return f"About {n - done[-1]} more seeds would lead to a verdict: --max-seeds {n}."
    if d.items and d.item_variance:
        return f"The {d.items:,} test images are too few for a verdict."
    return f"Even {SEEDS_LIMIT:,} seeds are too few for a verdict."


def names(test: SequentialTest) -> tuple[str, str]:
    """Return a name for each setting: the method, the widths, and the keys in which the settings differ.

    If the settings have the same method and widths, the names can contain any key. Otherwise, they contain only keys of
    the protocol and the network.
    """
    configs = test.first, test.second
    short = setting_name(test.first), setting_name(test.second)
    keys = [flat(run_identity(config).keys if short[0] == short[1] else _shared_keys(config)) for config in configs]
    differing = [key for key in sorted(set().union(*keys)) if keys[0].get(key) != keys[1].get(key)]
    more = f" and {len(differing) - NAMED_KEYS} more keys" if len(differing) > NAMED_KEYS else ""
    typed = [" ".join(f"{key}={values.get(key, '?')}" for key in differing[:NAMED_KEYS]) + more for values in keys]
    return f"{short[0]} {typed[0]}".rstrip(), f"{short[1]} {typed[1]}".rstrip()


def _shared_keys(config: Config) -> dict[str, object]:
    """Return the keys that do not belong to a method: the keys of the protocol and of the network."""
    return run_identity(config).protocol | {"model": config.model}


def setting_name(config: Config) -> str:
    """Return the method and the widths of a setting, such as `dorefa w2a2g32`."""
    return f"{config.method_name} {config.bits}"
