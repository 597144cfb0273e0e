"""Conclusions in words: one sentence for every width, the best cell against the others; which error is the larger."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench.report.statistics.differences import ALPHA

if TYPE_CHECKING:
    from qbench.report.comparison.pairs import SettingPair

MOST = 6
"""Names in one part of a sentence; the others are counted."""


def sample(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what to say of the error that the test sample leaves beside that of the seeds: which is the larger."""
    if not rows or not rows[0]["test_images"]:
        return []
    told = f"error at 95 %: test sample of {rows[0]['test_images']:,} images {_range([v['sample_half'] for v in rows])}"
    spread = [v for v in rows if v["top1_half"] is not None]
    if not spread:
        return [f"{told}; one seed each: its error is not known"]
    seeds = sum(v["top1_half"] > v["sample_half"] for v in spread)
    larger = "seeds" if 2 * seeds > len(spread) else "test sample"
    often = max(seeds, len(spread) - seeds)
    where = "" if often == len(spread) else f" in {often} of {len(spread)} cells"
    return [f"{told}, seeds {_range([v['top1_half'] for v in spread])}: the larger is that of the {larger}{where}"]


def pairs(found: Sequence["SettingPair"], margin: float, family: int) -> list[str]:
    """Return a sentence for each width that several methods share, under one that says how they were compared.

    Args:
        found: all pairs of a table.
        family: how many pairs Holm's adjustment is for.
    """
    widths: dict[int, list[SettingPair]] = defaultdict(list)
    for pair in found:
        if pair.leading:
            widths[id(pair.first)].append(pair)
    told = [_sentence(own, margin, family) for own in widths.values()]
    ways = sorted({pair.by for pair in found if pair.by})
    if not ways:
        return told
    asked = f"Holm over {family} pairs" if family > 1 else "one pair"
    head = f"compared by {', or by '.join(ways)} at 95 %, {asked}, margin ±{margin:g} points"
    return [f"{head}; in brackets the difference, and about how many more seeds would decide", *told]


def _sentence(own: Sequence["SettingPair"], margin: float, family: int) -> str:
    """Say how the best cell of some widths stands to the others."""
    best, groups = own[0].first, defaultdict(list)
    for pair in own:
        d = pair.difference
        alone = pair.verdict == "undecided" and d is not None and d.p < ALPHA and d.mean > 0
        groups["alone" if alone else pair.verdict].append(_named(pair, margin))
    parts = {
        "above": "is above",
        "below": "is, over the seeds they share, below",
        "the same": "gives the same as",
        "as good": f"is as good, within ±{margin:g}, as",
        "alone": f"would be above, tested alone and not as one of {family} pairs,",
        "undecided": "cannot be told from",
        "no spread": "has too few seeds in common with",
    }
    said = [f"{words} {_listed(groups[verdict])}" for verdict, words in parts.items() if groups[verdict]]
    widths = "".join(f"{key}{best['bits'][key]}" for key in "wag")
    return f"{widths}: {best['method']} {best['top1_mean']:.2f} {'; '.join(said)}"


def _named(pair: "SettingPair", margin: float) -> str:
    """Write the other cell's name with the difference, and how many more seeds would decide where that is open."""
    d, name = pair.difference, str(pair.second["method"])
    if d is None:
        if pair.networks_p is None:
            return name
        differ = "differ" if pair.networks_p < ALPHA else "cannot be told apart"
        return f"{name} (these two networks {differ}: exact McNemar, p {pair.networks_p:.2g})"
    told = f"{d.mean:+.2f} ±{d.high - d.mean:.2f}" if d.error else f"{d.mean:+.2f} in each of {d.n} seeds"
    if pair.verdict in ("above", "below") and pair.p_equal_holm < ALPHA:
        told += f", within ±{margin:g}"
    if pair.verdict == "undecided":
        more = pair.more_seeds
        few = f"{d.items:,} test images are too few" if d.items and d.items_part else "1,000 seeds would not decide"
        told += f", {more:,} more seed{'s' * (more > 1)}" if more else f", {few}"
    return name if pair.verdict == "the same" else f"{name} ({told})"


def _listed(names: Sequence[str]) -> str:
    """Return names in a line, those beyond the first few as a count."""
    shown = names if len(names) <= MOST + 1 else names[:MOST]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} others" if len(shown) < len(names) else "")


def _range(halves: Sequence[float]) -> str:
    least, most = min(halves), max(halves)
    return f"±{least:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"±{least:.2f} to ±{most:.2f}"
