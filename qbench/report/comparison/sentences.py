"""Writes the conclusions of a comparison as sentences."""

import math
from collections import defaultdict
from collections.abc import Sequence

from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_pair import SettingPair
from qbench.report.comparison.verdicts import Verdict
from qbench.report.statistics.differences import ALPHA
from qbench.report.statistics.power import SEEDS_LIMIT

NAMES_LISTED = 6
"""Maximum number of names in one part of a sentence. Further names are only counted."""
UNPAIRED = "unpaired, because the seeds differ"
WITHOUT_IMAGES = "over seeds only; the error from the choice of test images is not included"


def sample_notes(settings: Sequence[Setting]) -> list[str]:
    """Return a list with one note, which says whether seeds or the sample of test images cause the larger error.

    The list is empty if the number of test images is not known for any setting. Otherwise, the note uses the first
    known number.
    """
    samples = [(s, c.test_images, c.test_sample_ci95_half) for s in settings if (c := s.conclusion)]
    known = [(setting, images, half) for setting, images, half in samples if images and half is not None]
    if not known:
        return []
    images = known[0][1]
    note = (
        f"95 % confidence intervals: {_range([half for *_, half in known])} from the test sample of {images:,} images"
    )
    # an interval of width 0 comes from equal seeds, which do not show the error from seeds either
    both = [(setting.top1.ci95_half, half) for setting, _, half in known if setting.top1.ci95_half]
    if not both:
        why = "one seed each" if all(setting.top1.n == 1 for setting, *_ in known) else "no difference between seeds"
        return [f"{note}; {why}: the error from seeds is not known"]
    seeds_larger = sum(from_seeds > from_sample for from_seeds, from_sample in both)
    larger = "seeds" if 2 * seeds_larger > len(both) else "the test sample"
    count = max(seeds_larger, len(both) - seeds_larger)
    where = "" if count == len(both) else f" in {count} of {len(both)} settings"
    return [f"{note}, {_range([half for half, _ in both])} from seeds; the error from {larger} is larger{where}"]


def pair_notes(pairs: Sequence[SettingPair], margin: float) -> list[str]:
    """Return a note on how the pairs of a table were compared, and one sentence for each combination of widths."""
    by_widths: dict[int, list[SettingPair]] = defaultdict(list)
    for pair in pairs:
        if pair.leading:
            by_widths[id(pair.first)].append(pair)
    notes = [_sentence(pairs_of_widths, margin) for pairs_of_widths in by_widths.values()]
    ways = sorted({_pairing(pair) for pair in pairs if pair.difference is not None})
    if not ways:
        return notes
    head = f"compared {', or '.join(ways)}; {_adjustment(pairs)}; equivalence margin ±{margin:g} points"
    return [
        f"{head}; in brackets: difference ± half-width of its 95 % confidence interval, and about how many "
        f"more seeds a verdict needs",
        *notes,
    ]


def _adjustment(pairs: Sequence[SettingPair]) -> str:
    """Return text that says over which pairs p-values are adjusted. With --by, the pairs are from several tables."""
    family, here = max(pair.family for pair in pairs), sum(pair.family > 0 for pair in pairs)
    if family == 1:
        return "one pair"
    where = "this table" if family == here else "all tables of this protocol"
    return f"p-values adjusted for the {family} pairs of {where} (Holm), separately for difference and equivalence"


def _pairing(pair: SettingPair) -> str:
    """Return a text that says how two settings were paired, and whether intervals cover only the error from seeds."""
    left_out = "" if pair.difference and pair.difference.items else f" ({WITHOUT_IMAGES})"
    return (f"by {pair.paired_by}" if pair.paired_by else UNPAIRED) + left_out


def _sentence(pairs: Sequence[SettingPair], margin: float) -> str:
    """Return a sentence that compares the best setting with all other settings of the same widths."""
    best = pairs[0].first
    relations: dict[str, list[str]] = {
        "above": [], "below": [], "identical": [], "equivalent": [], "unadjusted": [], "undecided": [], "no spread": [],
    }  # fmt: skip
    for pair in pairs:
        d = pair.difference
        unadjusted = pair.verdict is Verdict.UNDECIDED and d is not None and d.p < ALPHA and d.mean > 0
        relations["unadjusted" if unadjusted else pair.verdict.value].append(_other(pair, margin))
    words = {
        "above": "is significantly above {}",
        "below": "is significantly below {} over their common seeds",
        "identical": "is identical to {}",
        "equivalent": f"is equivalent within ±{margin:g} points to {{}}",
        "unadjusted": f"is significantly different from {{}} only without the adjustment for {pairs[0].family} pairs",
        "undecided": "is not significantly different from {}",
        "no spread": "has too few common seeds with {}",
    }
    parts = [words[relation].format(_enumerate(names)) for relation, names in relations.items() if names]
    return f"{best.bits}: {best.label} {best.top1.mean:.2f}{_errors(best)} {'; '.join(parts)}"


def _errors(setting: Setting) -> str:
    """Return the error of an accuracy over seeds, without and with the error of the test sample, in brackets.

    The text is empty if one of the two errors is not known.
    """
    over_seeds, sample = setting.top1.ci95_half, setting.conclusion and setting.conclusion.test_sample_ci95_half
    if not over_seeds or not sample:
        return ""
    return f" (±{over_seeds:.2f} over seeds, ±{math.hypot(over_seeds, sample):.2f} with the test sample)"


def _other(pair: SettingPair, margin: float) -> str:
    """Return the label of a pair's second setting, with the difference.

    If the pair is undecided, the text also says how many more seeds are needed.
    """
    d, label = pair.difference, pair.second.label
    if d is None:
        if pair.p_mcnemar_holm is None:
            return label
        differ = "differ significantly" if pair.p_mcnemar_holm < ALPHA else "do not differ significantly"
        adjusted = f", adjusted for {pair.networks} pairs of networks" if pair.networks > 1 else ""
        return f"{label} (these two networks {differ}; McNemar's exact test: p = {pair.p_mcnemar_holm:.2g}{adjusted})"
    if pair.verdict is Verdict.IDENTICAL:
        return label
    facts = [f"{d.mean:+.2f} ±{d.high - d.mean:.2f}" if d.standard_error else f"{d.mean:+.2f} in each of {d.n} seeds"]
    if pair.paired_by and d.n < max(pair.first.top1.n, pair.second.top1.n):
        facts.append(f"over {d.n} common seeds")
    if pair.verdict in (Verdict.ABOVE, Verdict.BELOW) and pair.p_equivalent_holm < ALPHA:
        facts.append(f"equivalent within ±{margin:g} points")
    if pair.verdict is Verdict.UNDECIDED:
        facts += [f"p = {pair.p_holm:.2g}", _seeds_to_decide(pair)]
    return f"{label} ({', '.join(facts)})"


def _seeds_to_decide(pair: SettingPair) -> str:
    d, more = pair.difference, pair.more_seeds
    assert d is not None
    if more:
        return f"{more:,} more seed{'s' * (more > 1)}"
    return (
        f"{d.items:,} test images are too few" if d.items and d.item_variance else f"{SEEDS_LIMIT:,} seeds are too few"
    )


def _enumerate(names: Sequence[str]) -> str:
    """Return names separated by commas. Only the first few names are listed, and all others are counted."""
    listed = names if len(names) <= NAMES_LISTED + 1 else names[:NAMES_LISTED]
    return ", ".join(listed) + (f" and {len(names) - len(listed)} others" if len(listed) < len(names) else "")


def _range(halves: Sequence[float]) -> str:
    smallest, largest = f"±{min(halves):.2f}", f"±{max(halves):.2f}"
    return smallest if smallest == largest else f"{smallest} to {largest}"
