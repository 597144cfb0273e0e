"""Papers' claims held against runs: what a claim's file says, what its runs tell, verdicts over the whole family.

A claim is an experiment file with a node `claim`; `scripts/claims.py` trains its arms and calls what is here.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison.predictions import RunAccuracy, load_run_accuracy, paired_difference, run_difference
from qbench.report.statistics.differences import ALPHA, Difference, paired
from qbench.report.statistics.hypothesis_tests import TESTS, evidence, holm
from qbench.report.statistics.power import SEEDS_LIMIT, seeds_needed
from qbench.report.tables.table import Table
from qbench.runs.reader import DONE, RunRecord, read_run
from qbench.runs.result import Result

PARENT = "parent"
MEASURES = ("top1", "drop", "gradient_mismatch")
BACKWARD = "method.backward="
CLAIM_KEYS = ("says", "source", "note", "measure", "net", "comparisons")
COMPARISON_KEYS = ("name", "first", "second", "test", "margin")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms, as words of the command line, and what is claimed of them. No second arm: the run's float parent."""

    claim: str
    name: str
    first: tuple[str, ...]
    second: tuple[str, ...] | None
    test: str
    margin: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the node `claim` of an experiment file says.

    Args:
        measure: `top1`, points of test top-1 after the last epoch; `drop`, the same less the run's own float parent's;
            `gradient_mismatch`, the mean cosine of layers' gradients with the smoothed network's (`report.mismatch`).
        net: for gradient_mismatch, the words of the trained network that is measured.
    """

    name: str
    says: str
    source: str
    note: str = ""
    measure: str = "top1"
    net: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...]

    @property
    def arms(self) -> list[tuple[str, ...]]:
        """The arms that are trained, each once."""
        if self.measure == "gradient_mismatch":
            return [self.net]
        both = [arm for c in self.comparisons for arm in (c.first, c.second) if arm is not None]
        return list(dict.fromkeys(both))


@dataclass(kw_only=True)
class ClaimResult:
    """One comparison with its runs' answer.

    `fails_to_train`: the first arm is done and the second diverged, in all seeds. `p` is before, `p_holm` after
    adjustment; both None without a verdict.
    """

    comparison: Comparison
    seeds: list[int]
    means: tuple[float, float] | None = None
    difference: Difference | None = None
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fails_to_train: bool = False
    p: float | None = None
    holds: bool = False
    p_holm: float | None = None
    outcome: str = ""
    would_take: str = ""


def read_claims(folder: Path) -> list[Claim]:
    """Return the claims below a folder, by name.

    Raises:
        ConfigError: a file without the node `claim`, or with a key or value in it that does not exist.
    """
    return [read_claim(path, str(path.relative_to(folder).with_suffix(""))) for path in sorted(folder.rglob("*.yaml"))]


def read_claim(path: Path, name: str) -> Claim:
    """Return the claim of one experiment file; see `read_claims`."""
    node = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("claim")
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: an experiment without the node `claim`")
    _refuse_unknown(path, node, (*CLAIM_KEYS, *COMPARISON_KEYS))
    own = {key: node.pop(key) for key in COMPARISON_KEYS if key in node}
    listed = node.pop("comparisons", [own] if own else [])
    if not listed or (own and listed != [own]):
        raise ConfigError(f"{path}: claim wants either first and second or a list `comparisons` of such pairs")
    for key in ("says", "source"):
        if not node.get(key):
            raise ConfigError(f"{path}: claim.{key} is missing")
    if node.get("measure", "top1") not in MEASURES:
        raise ConfigError(f"{path}: claim.measure={node['measure']}: allowed are {', '.join(MEASURES)}")
    node["net"] = tuple(node.get("net", ()))
    claim = Claim(name=name, comparisons=tuple(_comparison(path, name, entry) for entry in listed), **node)
    names = [c.name for c in claim.comparisons]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: comparisons of one claim want different names: {', '.join(names)}")
    return claim


def _comparison(path: Path, claim: str, entry: dict[str, Any]) -> Comparison:
    _refuse_unknown(path, entry, COMPARISON_KEYS)
    if not isinstance(entry.get("first"), list) or not (isinstance(entry.get("second"), list) or _parental(entry)):
        raise ConfigError(f"{path}: first is a list of command-line words, second such a list or `{PARENT}`")
    test, margin = entry.get("test", "better"), float(entry.get("margin", 0))
    if test not in TESTS:
        raise ConfigError(f"{path}: test={test}: allowed are {', '.join(TESTS)}")
    if margin < 0 or (test == "equal" and margin == 0):
        raise ConfigError(f"{path}: test={test} with margin={margin:g}: allowed is a margin above 0")
    second = None if _parental(entry) else tuple(entry["second"])
    name = str(entry.get("name", claim))
    return Comparison(claim=claim, name=name, first=tuple(entry["first"]), second=second, test=test, margin=margin)


def _parental(entry: dict[str, Any]) -> bool:
    return entry.get("second") == PARENT


def _refuse_unknown(path: Path, node: dict[str, Any], known: Sequence[str]) -> None:
    for key in node:
        if key not in known:
            raise ConfigError(
                f"{path}: claim.{key}: no such key{did_you_mean(key, known)}\nallowed: {', '.join(known)}"
            )


def evaluate_claim(
    comparison: Comparison, measure: str, first: Mapping[int, RunRecord], second: Mapping[int, RunRecord]
) -> ClaimResult:
    """Return what the runs of two arms, by seed, tell about a comparison; without a verdict where any seed lacks.

    Figures of single seeds that failed or diverged are not left out in silence: the difference of the others is
    given, and no verdict, since those that survive are not a fair sample.
    """
    judged = ClaimResult(comparison=comparison, seeds=sorted(first))
    arms = {"first": first} if comparison.second is None else {"first": first, "second": second}
    for name, runs in arms.items():
        judged.troubles += _troubles(name, runs)
    judged.fails_to_train = (
        bool(judged.seeds)
        and comparison.second is not None
        and all(first[s].status == DONE and second[s].status == "diverged" for s in judged.seeds)
    )
    seeds = [s for s in judged.seeds if all(runs[s].status == DONE for runs in arms.values())]
    try:
        own = [_figures(first[s], measure) for s in seeds]
        other = [_figures(second[s], measure) if comparison.second else _figures(first[s], PARENT) for s in seeds]
    except ValueError as error:
        judged.troubles.append(str(error))
        return judged
    if not seeds:
        return judged
    judged.difference = paired_difference(own, other)
    if judged.difference.items is None:
        judged.notes.append("interval over seeds alone: some run has no predictions.npy of the same test images")
    judged.means = (_mean([x.top1 for x in own]), _mean([x.top1 for x in other]))
    return judged


def judge_values(comparison: Comparison, first: Mapping[int, float], second: Mapping[int, float]) -> ClaimResult:
    """Return what one figure a seed tells about a comparison: for measures that are not top-1."""
    seeds = sorted(set(first) & set(second))
    judged = ClaimResult(comparison=comparison, seeds=seeds)
    if seeds:
        own, other = [first[s] for s in seeds], [second[s] for s in seeds]
        judged.difference, judged.means = paired(own, other), (_mean(own), _mean(other))
    return judged


def _figures(found: RunRecord, measure: str) -> RunAccuracy:
    """Return a run's figure in percent and, where its predictions are kept, the part of every test image in it."""
    result = found.result
    assert result is not None
    assert result.final is not None
    own = load_run_accuracy(result.run, result.final.test.top1)
    if measure == "top1":
        return own
    if result.baseline is None:
        raise ValueError(f"{result.run} has no float parent to compare with")
    base = load_run_accuracy(result.baseline.run, result.baseline.final.test.top1)
    if measure == PARENT:
        return base
    return run_difference(own, base)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _troubles(name: str, runs: Mapping[int, RunRecord]) -> list[str]:
    """Say of an arm which seeds are not done, by status."""
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for seed, run in sorted(runs.items()):
        if run.status != DONE:
            seeds[run.status, run.reason.partition("\n")[0]].append(seed)
    return [
        f"{name} arm {status} in {len(which)} of {len(runs)} seeds ({', '.join(map(str, which))})"
        + (f": {reason}" if reason else "")
        for (status, reason), which in seeds.items()
    ]


def conclude(family: Sequence[ClaimResult]) -> None:
    """Give every comparison its verdict, adjusted for the number of all comparisons that the claims' files state.

    One without a verdict counts as p = 1, so that no other verdict depends on what has not been run yet.
    """
    for one in family:
        if one.difference is not None and not one.troubles:
            found = evidence(one.difference, one.comparison.test, one.comparison.margin)
            one.p, one.holds = found.p, found.holds
    for one, adjusted in zip(family, holm([1.0 if one.p is None else one.p for one in family]), strict=True):
        one.p_holm = None if one.p is None else adjusted
        if one.p is None and one.fails_to_train and one.comparison.test != "equal":
            one.outcome = f"holds: the second arm diverged in all {len(one.seeds)} seeds"
        elif one.p is None:
            waiting = one.difference is None and all("not begun" in t for t in one.troubles)
            one.outcome = "not run" if waiting else f"no verdict: {'; '.join(one.troubles)}"
        elif adjusted < ALPHA:
            one.outcome = "holds" if one.holds else "does not hold"
        else:
            one.outcome = f"not separable at {len(one.seeds)}"
            one.would_take = _would_take(one, len(family))


def _would_take(one: ClaimResult, family: int) -> str:
    """Return the number of seeds it would take, at the level that Holm asks of the family's smallest p."""
    d = one.difference
    assert d is not None
    if d.n < 2:
        return "one seed tells nothing"
    found = seeds_needed(d, one.comparison.test, one.comparison.margin, ALPHA / family)
    if found is not None:
        return str(max(found, d.n + 1))
    few = f": the {d.items} test images forbid it" if d.items and d.item_variance else ""
    return f"more than {SEEDS_LIMIT}{few}"


def summary(family: Sequence[ClaimResult], claims: Mapping[str, Claim]) -> Table:
    """Return one row a comparison; `values` has all numbers for machines."""
    head = ("claim", "source", "arms", "effect", "95 % interval", "n", "p (Holm)", "outcome", "n it would take")
    table = Table(head)
    for one in family:
        claim, c, d = claims[one.comparison.claim], one.comparison, one.difference
        places = 4 if claim.measure == "gradient_mismatch" else 2
        border = f" {c.margin:g}" if c.margin else ""
        sign = {"better": f"> {border.strip() or '0'}", "at_least": f"> -{c.margin:g}", "equal": f"within{border}"}
        name = claim.name if c.name == claim.name else f"{claim.name}: {c.name}"
        table.rows.append(
            (
                name,
                claim.source,
                f"{' '.join(c.first) or 'as it stands'} - {_second(c)} {sign[c.test]}",
                "-" if d is None else f"{d.mean:+.{places}f}",
                "-" if d is None else "none" if d.n < 2 else f"{d.low:+.{places}f} to {d.high:+.{places}f}",
                "-" if d is None else str(d.n),
                "-" if one.p_holm is None else f"{one.p_holm:.2g}",
                one.outcome,
                one.would_take or "-",
            )
        )
        table.values.append(_plain(one, claim))
    return table


def _second(c: Comparison) -> str:
    return "float parent" if c.second is None else " ".join(c.second) or "as it stands"


def _plain(one: ClaimResult, claim: Claim) -> dict[str, Any]:
    c, d = one.comparison, one.difference
    numbers = {} if d is None else {name: getattr(d, name) for name in Difference.__dataclass_fields__}
    return {
        "claim": claim.name,
        "comparison": c.name,
        "says": claim.says,
        "source": claim.source,
        "measure": claim.measure,
        "first": list(c.first),
        "second": PARENT if c.second is None else list(c.second),
        "test": c.test,
        "margin": c.margin,
        "seeds": one.seeds,
        "means": one.means,
        "difference": {k: None if isinstance(v, float) and abs(v) == float("inf") else v for k, v in numbers.items()},
        "p": one.p,
        "p_holm": one.p_holm,
        "outcome": one.outcome,
        "would_take": one.would_take,
        "troubles": one.troubles,
        "notes": one.notes,
    }


def read_arm(paths: Mapping[int, Path]) -> dict[int, RunRecord]:
    """Return what stands in the directories of an arm's runs, by seed."""
    return {s: read_run(p) if p.is_dir() else RunRecord(path=p, status="not begun") for s, p in paths.items()}


def wall_seconds(runs: Sequence[RunRecord]) -> float:
    """Return the seconds of work in the runs that have a result."""
    results: list[Result] = [run.result for run in runs if run.result is not None]
    return sum(result.wall_seconds or 0.0 for result in results)
