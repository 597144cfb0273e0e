"""Tests claims on finished runs, and makes a table of the results.

The p-values are adjusted for the total number of comparisons in all claims. `claim_files.py` explains claims,
comparisons and arms.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

from qbench.papers.claim_files import BASELINE, Claim, Comparison, comparison_values
from qbench.report.comparison.predictions import RunAccuracy, load_run_accuracy, paired_difference, run_difference
from qbench.report.statistics.differences import ALPHA, Difference, paired, with_seed_dof
from qbench.report.statistics.hypothesis_tests import evidence, holm
from qbench.report.statistics.power import SEEDS_LIMIT, seeds_needed
from qbench.report.tables.table import Table
from qbench.runs.hits import Hits
from qbench.runs.reader import DONE, RunRecord

NOT_STARTED = "not started"
"""The status of a run that has no directory yet."""
CAUTIOUS_SEEDS = 10
"""If a claim has fewer seeds than this number, its test uses the degrees of freedom of the seeds (`with_seed_dof`)."""
HEAD = ("claim", "source", "arms", "effect", "95 % interval", "n", "p (Holm)", "outcome", "n needed")


@dataclass(kw_only=True)
class ClaimResult:
    """The result of one comparison.

    Args:
        comparison: the comparison that is tested.
        seeds: the seeds of the runs that are compared.
        means: the mean of each arm over the seeds whose runs have finished.
        difference: the measure of the first arm minus the measure of the second arm, paired by seed.
        problems: reasons why the comparison cannot be tested, such as seeds without a result.
        notes: remarks on the difference.
        fails_to_train: whether, for every seed, the first arm has finished and the second arm has diverged.
        p: the p-value before Holm's adjustment, or None if the comparison cannot be tested.
        holds: whether the difference supports the claim.
        p_holm: the p-value after Holm's adjustment, or None if the comparison cannot be tested.
        outcome: the verdict in words.
        seeds_needed: text with the number of seeds that would probably decide the comparison. The text is empty if the
            comparison is decided or cannot be tested.
    """

    comparison: Comparison
    seeds: list[int]
    means: tuple[float, float] | None = None
    difference: Difference | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fails_to_train: bool = False
    p: float | None = None
    holds: bool = False
    p_holm: float | None = None
    outcome: str = ""
    seeds_needed: str = ""


def evaluate_claim(
    comparison: Comparison,
    measure: str,
    first: Mapping[int, RunRecord],
    second: Mapping[int, RunRecord],
    hits: Mapping[str, Hits] = MappingProxyType({}),
) -> ClaimResult:
    """Return the result of a comparison, before the verdict.

    If the run of any seed has failed or diverged, the comparison cannot be tested, because the remaining seeds are a
    biased sample. The result still contains the difference over the remaining seeds.

    Args:
        comparison: the comparison.
        measure: the claim's measure, `top1` or `drop`.
        first: the runs of the first arm, by seed.
        second: the runs of the second arm, by seed.
        hits: which test images a run classified correctly, for runs that were read from a record of many runs. The
            keys are the last two parts of the runs' paths. The hits of all other runs are read from the runs' own
            files.
    """
    result = ClaimResult(comparison=comparison, seeds=sorted(first))
    arms = {"first": first} if comparison.second is None else {"first": first, "second": second}
    for name, runs in arms.items():
        result.problems += unfinished_seeds(name, runs)
    result.fails_to_train = (
        bool(result.seeds)
        and comparison.second is not None
        and all(first[s].status == DONE and second[s].status == "diverged" for s in result.seeds)
    )
    seeds = [s for s in result.seeds if all(runs[s].status == DONE for runs in arms.values())]
    try:
        minuend = [_measured(first[s], measure, hits) for s in seeds]
        subtrahend = [
            _measured(first[s], BASELINE, hits) if comparison.second is None else _measured(second[s], measure, hits)
            for s in seeds
        ]
    except ValueError as error:
        result.problems.append(str(error))
        return result
    if not seeds:
        return result
    difference = paired_difference(minuend, subtrahend)
    result.difference = with_seed_dof(difference) if difference.n < CAUTIOUS_SEEDS else difference
    if result.difference.items is None:
        result.notes.append(
            "the confidence interval covers the variation between seeds but not between test images, because not "
            "all runs have a predictions.npy for the same test images"
        )
    result.means = (_mean([x.top1 for x in minuend]), _mean([x.top1 for x in subtrahend]))
    return result


def evaluate_values(comparison: Comparison, first: Mapping[int, float], second: Mapping[int, float]) -> ClaimResult:
    """Return the result of a comparison whose measure is not an accuracy.

    `first` and `second` map seeds to values of the measure.
    """
    seeds = sorted(set(first) & set(second))
    result = ClaimResult(comparison=comparison, seeds=seeds)
    if seeds:
        minuend, subtrahend = [first[s] for s in seeds], [second[s] for s in seeds]
        result.difference = paired(minuend, subtrahend)
        result.means = (_mean(minuend), _mean(subtrahend))
    return result


def _measured(run: RunRecord, measure: str, hits: Mapping[str, Hits]) -> RunAccuracy:
    """Return the measure of a run in percent, and its value for each test image if predictions are stored.

    Args:
        run: a finished run.
        measure: `top1`, `drop`, or `baseline` for the top-1 of the run's float baseline.

    Raises:
        ValueError: the run has no float baseline.
    """
    result = run.result
    assert result is not None
    assert result.final is not None
    accuracy = load_run_accuracy(result.run, result.final.test.top1, hits.get(_place(result.run)))
    if measure == "top1":
        return accuracy
    if result.baseline is None:
        raise ValueError(f"{result.run} has no float baseline")
    stored = hits.get(_place(result.baseline.run))
    baseline = load_run_accuracy(result.baseline.run, result.baseline.final.test.top1, stored)
    if measure == BASELINE:
        return baseline
    return run_difference(accuracy, baseline)


def _place(run: str) -> str:
    """Return the last two parts of a run's path, which do not change when the runs are moved."""
    return "/".join(Path(run).parts[-2:])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def unfinished_seeds(arm: str, runs: Mapping[int, RunRecord]) -> list[str]:
    """Return sentences about the seeds whose runs have not finished, one for each status and reason.

    Args:
        arm: "first" or "second".
        runs: the runs of this arm, by seed.
    """
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for seed, run in sorted(runs.items()):
        if run.status != DONE:
            seeds[run.status, run.reason.partition("\n")[0]].append(seed)
    return [
        f"{arm} arm {status} in {len(which)} of {len(runs)} seeds ({', '.join(map(str, which))})"
        + (f": {reason}" if reason else "")
        for (status, reason), which in seeds.items()
    ]


def decide_claims(family: Sequence[ClaimResult]) -> None:
    """Adjust all p-values by Holm's method, and set the verdict of every result.

    A comparison that cannot be tested counts with p = 1. The number of comparisons in the adjustment therefore does not
    depend on which runs have finished.
    """
    for one in family:
        if one.difference is not None and not one.problems:
            found = evidence(one.difference, one.comparison.test, one.comparison.margin)
            one.p, one.holds = found.p, found.holds
    for one, adjusted in zip(family, holm([1.0 if one.p is None else one.p for one in family]), strict=True):
        one.p_holm = None if one.p is None else adjusted
        if one.p is None and one.fails_to_train and one.comparison.test != "equal":
            one.outcome = f"holds: the second arm diverged in all {len(one.seeds)} seeds"
        elif one.p is None:
            not_run = one.difference is None and all(NOT_STARTED in problem for problem in one.problems)
            one.outcome = "not run" if not_run else f"no verdict: {'; '.join(one.problems)}"
        elif adjusted < ALPHA:
            one.outcome = "holds" if one.holds else "does not hold"
        else:
            one.outcome = f"undecided with {len(one.seeds)} seeds"
            one.seeds_needed = _seeds_needed(one, len(family))


def _seeds_needed(one: ClaimResult, comparisons: int) -> str:
    """Return a text with the number of seeds that would probably decide a comparison.

    The computation uses the significance level that Holm's method applies to the smallest p-value.
    """
    d = one.difference
    assert d is not None
    if d.n < 2:
        return "not known with one seed"
    found = seeds_needed(d, one.comparison.test, one.comparison.margin, ALPHA / comparisons)
    if found is not None:
        return str(max(found, d.n + 1))
    limit = f": limited by the {d.items} test images" if d.items and d.item_variance else ""
    return f"more than {SEEDS_LIMIT}{limit}"


def claims_table(family: Sequence[ClaimResult], claims: Mapping[str, Claim]) -> Table:
    """Return a table with one row per comparison.

    For programs, the table's `values` contain the results as numbers.
    """
    table = Table(HEAD)
    for one in family:
        claim, c = claims[one.comparison.claim], one.comparison
        name = claim.name if c.name == claim.name else f"{claim.name}: {c.name}"
        table.rows.append(
            (
                name,
                claim.source,
                f"{' '.join(c.first) or 'unchanged'} - {_second_arm(c)} {_border(c)}",
                *_effect_cells(one.difference, places=4 if claim.measure == "gradient_mismatch" else 2),
                "-" if one.p_holm is None else f"{one.p_holm:.2g}",
                one.outcome,
                one.seeds_needed or "-",
            )
        )
        table.values.append(_values(one, claim))
    return table


def _second_arm(c: Comparison) -> str:
    return "float baseline" if c.second is None else " ".join(c.second) or "unchanged"


def _border(c: Comparison) -> str:
    """Return the range of differences that supports the claim as text, such as `> 0.5` for a margin of 0.5."""
    return {"better": f"> {c.margin:g}", "at_least": f"> -{c.margin:g}", "equal": f"within {c.margin:g}"}[c.test]


def _effect_cells(d: Difference | None, places: int) -> tuple[str, str, str]:
    """Return the cells of the effect, its 95 % confidence interval and the number of seeds.

    Args:
        d: the difference between the arms, or None if the difference is not known.
        places: number of decimal places.
    """
    if d is None:
        return "-", "-", "-"
    tied = d.n < 2 or d.standard_error == 0  # one value, or equal values, have no interval
    interval = "-" if tied else f"{d.low:+.{places}f} to {d.high:+.{places}f}"
    return f"{d.mean:+.{places}f}", interval, str(d.n)


def _values(one: ClaimResult, claim: Claim) -> dict[str, object]:
    """Return a result as values for JSON. Infinite numbers become None."""
    comparison = comparison_values(one.comparison)
    numbers = {} if one.difference is None else asdict(one.difference)
    return {
        "claim": claim.name,
        "comparison": comparison["name"],
        "says": claim.says,
        "source": claim.source,
        "measure": claim.measure,
        **{key: comparison[key] for key in ("first", "second", "test", "margin")},
        "seeds": one.seeds,
        "means": one.means,
        "difference": {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in numbers.items()},
        "p": one.p,
        "p_holm": one.p_holm,
        "outcome": one.outcome,
        "seeds_needed": one.seeds_needed,
        "problems": one.problems,
        "notes": one.notes,
    }
