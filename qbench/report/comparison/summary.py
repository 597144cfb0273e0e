"""Sums up the conclusions of a table in one sentence."""

from collections.abc import Sequence

from qbench.report.comparison.setting import Setting
from qbench.report.comparison.verdicts import PairConclusion, Verdict

NAMED = 3
"""Maximum number of significant differences that the sentence names. More differences are only counted."""

Compared = tuple[Setting, PairConclusion]
"""A setting, and the conclusion about this setting and a setting with a lower mean."""


def summary(settings: Sequence[Setting]) -> str:
    """Return one sentence about the differences between settings at the same widths.

    The sentence is empty if no two settings have the same widths. Holm's method adjusts all p-values in the sentence.
    """
    pairs = [(setting, pair) for setting in settings if setting.conclusion for pair in setting.conclusion.pairs]
    tested = [(setting, pair) for setting, pair in pairs if pair.p_holm is not None]
    if not pairs:
        return ""
    if not tested:
        return "No difference can be tested: two settings need two or more common seeds, such as seed=0,1,2"
    significant = [compared for compared in tested if compared[1].verdict in (Verdict.ABOVE, Verdict.BELOW)]
    same = [pair for _, pair in tested if pair.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)]
    parts = [_significant(significant, len(tested)) if significant else _not_significant(tested)]
    if same:
        parts.append(f"{len(same)} of {_pairs(len(tested))} equivalent within ±{same[0].margin:g} points")
    return "; ".join(parts)


def _significant(significant: Sequence[Compared], tested: int) -> str:
    if len(significant) > NAMED:
        return f"{len(significant)} of {_pairs(tested)} of settings differ significantly"
    named = ", ".join(f"{s.label} {pair.verdict.value} {pair.other} at {s.bits}" for s, pair in significant)
    rest = f"; no other of the {_pairs(tested)} differs significantly" if len(significant) < tested else ""
    return f"Significant: {named}{rest}"


def _not_significant(tested: Sequence[Compared]) -> str:
    """Return the text for a table without significant differences. It names the undecided pair with the smallest p."""
    names = {frozenset((setting.label, pair.other)) for setting, pair in tested}
    one = len(names) == 1
    between = f"between {' and '.join(sorted(*names))}" if one else f"in {_pairs(len(tested))} of settings"
    text = f"No difference {between} is significant"
    undecided = [compared for compared in tested if compared[1].verdict is Verdict.UNDECIDED]
    if not undecided:
        return text
    setting, pair = min(undecided, key=lambda compared: compared[1].p_holm or 0.0)
    where = f"{setting.bits}" if one else f"{setting.label} and {pair.other} at {setting.bits}"
    return f"{text}; closest: {where}, p = {pair.p_holm:.2g}"


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"
