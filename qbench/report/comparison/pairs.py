"""What follows from a comparison: which methods differ at the same widths, which are as good, what seeds would tell.

Each pair of cells of one table at the same widths is asked twice: do they differ, and are they as good as each other
within a margin? Pairs are by seed, and by test image where predictions are kept; each question is adjusted by Holm's
method for all pairs of the block. Figures come from the values that `compare` gives.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from qbench.report.comparison import predictions as answers
from qbench.report.comparison import sentences
from qbench.report.comparison.predictions import RunAccuracy
from qbench.report.comparison.verdicts import MARGIN
from qbench.report.statistics.differences import ALPHA, Difference, sample_error, unpaired, with_seed_dof
from qbench.report.statistics.hypothesis_tests import equivalent, holm, mcnemar
from qbench.report.statistics.power import seeds_to_decide
from qbench.report.tables.table import Table
from qbench.system import files

Values = dict[str, Any]
SAME, ABOVE, BELOW, EQUAL, UNDECIDED, NO_SPREAD = "the same", "above", "below", "as good", "undecided", "no spread"


@dataclass(kw_only=True)
class SettingPair:
    """Two cells of the same widths, the one of the higher mean first.

    `difference` is first minus second in points over the seeds that both have, and so may be below 0; None where fewer
    than two seeds could be compared; then `networks_p` may say whether the answers of their two networks differ.
    `p_holm` is against no difference, `p_equal_holm` against a difference of the margin or more, both adjusted. The
    pairs of the best cell of some widths are `leading`; for those that are undecided `more_seeds` would probably
    decide, None: no number up to 1000.
    """

    first: Values
    second: Values
    difference: Difference | None = None
    by: str = ""
    networks_p: float | None = None
    p_holm: float = 1.0
    p_equal_holm: float = 1.0
    leading: bool = False
    more_seeds: int | None = None

    @property
    def verdict(self) -> str:
        """What may be said of the pair."""
        if self.difference is None:
            return NO_SPREAD
        if self.difference.mean == self.difference.error == 0:  # every seed and image alike: no question is left
            return SAME
        if self.p_holm < ALPHA:
            return ABOVE if self.difference.mean > 0 else BELOW
        return EQUAL if self.p_equal_holm < ALPHA else UNDECIDED

    def values(self, margin: float) -> Values:
        """Return the pair as plain values, for the first cell."""
        d = self.difference
        return {
            "other": self.second["method"],
            "by": self.by,
            "n": d.n if d else len(set(self.first["seeds"]) & set(self.second["seeds"])),
            "same_parents": set(self.first["parents"]) == set(self.second["parents"]),
            "difference": d.mean if d else self.first["top1_mean"] - self.second["top1_mean"],
            "interval": [d.low, d.high] if d and isfinite(d.error) else None,
            "p": d.p if d else None,
            "p_holm": self.p_holm if d else None,
            "p_equal": equivalent(d, margin) if d else None,
            "p_equal_holm": self.p_equal_holm if d else None,
            "networks_p": self.networks_p,
            "margin": margin,
            "verdict": self.verdict,
            "more_seeds": self.more_seeds,
        }


def conclude(tables: Sequence[Table], margin: float = MARGIN) -> None:
    """Add to tables of `compare` what may be concluded: notes, and in the values of each cell its `pairs`, whether it
    is the `winner` of its widths, and the error that the test sample alone leaves.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin:g}: allowed is a number of points above 0")
    blocks: dict[tuple[str, ...], list[Table]] = defaultdict(list)
    for table in tables:
        if cells := [v for v in table.values if "top1_mean" in v]:
            blocks[cells[0]["dataset"], cells[0]["model"], cells[0]["protocol"]].append(table)
    for own in blocks.values():
        known: dict[str, RunAccuracy] = {}
        pairs = {id(table): _pairs(table.values, known) for table in own}
        asked = adjust_p_values([pair for found in pairs.values() for pair in found], margin)
        for table in own:
            found = pairs[id(table)]
            _mark(table.values, found, margin)
            table.notes += [*sentences.sample(table.values), *sentences.pairs(found, margin, asked)]


def _mark(rows: Iterable[Values], pairs: Sequence[SettingPair], margin: float) -> None:
    """Put into every cell's values its pairs, whether it is above all others, and the error of the test sample."""
    rows = list(rows)
    items = next((n for v in rows for run in v["runs"][:2] if (n := tested_on(Path(run)))), None)
    own: dict[int, list[SettingPair]] = defaultdict(list)
    for pair in pairs:
        own[id(pair.first)].append(pair)
    for values in rows:
        found = own[id(values)]
        values["pairs"] = [pair.values(margin) for pair in found]
        values["winner"] = bool(found) and all(pair.leading and pair.verdict == ABOVE for pair in found)
        values["test_images"] = items
        values["sample_half"] = sample_error(values["top1_mean"], items) if items else None


def adjust_p_values(family: Sequence[SettingPair], margin: float) -> int:
    """Adjust the p of all pairs of a block for their number, which is returned; those without a difference are neither
    asked nor counted.
    """
    asked = [pair for pair in family if pair.difference is not None]
    differences = [pair.difference for pair in asked if pair.difference is not None]
    adjusted = holm([d.p for d in differences]), holm([equivalent(d, margin) for d in differences])
    for pair, differ, equal in zip(asked, *adjusted, strict=True):
        pair.p_holm, pair.p_equal_holm = differ, equal
    left = [pair for pair in asked if pair.verdict == UNDECIDED]
    for pair, d in ((pair, pair.difference) for pair in left if pair.leading):
        n = seeds_to_decide(d, margin, ALPHA / len(left)) if d else None
        pair.more_seeds = max(n - d.n, 1) if d and n is not None else None
    return len(asked)


def _pairs(rows: Iterable[Values], known: dict[str, RunAccuracy]) -> list[SettingPair]:
    """Return every pair of cells at the same widths, higher means first; float parents are no rivals."""
    widths: dict[tuple[int, ...], list[Values]] = defaultdict(list)
    for values in rows:
        if not values["is_parent"]:
            widths[tuple(values["bits"][key] for key in "wag")].append(values)
    found = []
    for cells in widths.values():
        cells.sort(key=lambda v: (-v["top1_mean"], v["method"]))
        for first, second in combinations(cells, 2):
            found.append(_pair(first, second, known))
            found[-1].leading = first is cells[0]
    return found


def _pair(first: Values, second: Values, known: dict[str, RunAccuracy]) -> SettingPair:
    arms = [_arm(cell, known) for cell in (first, second)]
    seeds = sorted(set(arms[0]) & set(arms[1]))
    if len(seeds) > 1:
        own = [[arm[seed]() for seed in seeds] for arm in arms]
        d = with_seed_dof(answers.paired_difference(*own))
        return SettingPair(first=first, second=second, difference=d, by="seed and test image" if d.items else "seed")
    if min(map(len, arms)) > 1:
        figures = [[run().top1 for run in arm.values()] for arm in arms]
        return SettingPair(first=first, second=second, difference=unpaired(*figures), by="nothing: the seeds differ")
    found = SettingPair(first=first, second=second)
    if seeds:
        networks = [arm[seeds[0]]() for arm in arms]
        if answers.same_test_images(networks):
            found.networks_p = mcnemar(networks[0].hits, networks[1].hits)
    return found


def _arm(cell: Values, known: dict[str, RunAccuracy]) -> dict[int, Callable[[], RunAccuracy]]:
    """Return a cell's figures by seed, each read when it is asked for; of a seed that stands twice, the mean."""
    runs: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for seed, run, top1 in zip(cell["seeds"], cell["runs"], cell["top1"], strict=True):
        runs[seed].append((run, top1))

    def read(own: list[tuple[str, float]]) -> RunAccuracy:
        if len(own) > 1:
            return RunAccuracy(mean(top1 for _, top1 in own))
        run, top1 = own[0]
        if run not in known:
            known[run] = answers.of_run(run, top1)
        return known[run]

    return {seed: lambda own=own: read(own) for seed, own in runs.items()}  # type: ignore[misc]


def tested_on(run: Path) -> int | None:
    """Return how many test images a run was evaluated on, from its manifest; None where it does not say."""
    data = (files.read_json(run / "manifest.json") or {}).get("data")
    count = data.get("test_images") if isinstance(data, dict) else None
    return count if isinstance(count, int) and count > 0 else None
