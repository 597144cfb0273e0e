"""Defines a pair of settings with the same widths, and their difference."""

from dataclasses import dataclass
from math import isfinite

from qbench.report.comparison.setting import Setting
from qbench.report.comparison.verdicts import PairConclusion, Verdict
from qbench.report.statistics.differences import ALPHA, Difference
from qbench.report.statistics.hypothesis_tests import equivalent


@dataclass(frozen=True, kw_only=True)
class SettingPair:
    """Two settings with the same widths. The setting with the higher mean comes first.

    Args:
        first, second: the settings.
        difference: top-1 of the first setting minus top-1 of the second setting, in points. A paired difference covers
            only the common seeds and may therefore be below 0. None if fewer than two seeds can be compared.
        paired_by: how runs are paired, as in `PairConclusion`.
        p_mcnemar: McNemar's p-value of two networks with the same seed and test images. None if this test does not
            apply.
        p_mcnemar_holm: the same p-value, adjusted by Holm's method for all pairs to which the test applies.
        networks: the number of these pairs; 0 if the test does not apply.
        p_holm: p-value of "there is no difference", adjusted by Holm's method.
        p_equivalent_holm: p-value of "the means differ by the margin or more", adjusted by Holm's
            method.
        family: number of pairs over which Holm's method adjusted the p-values; 0 if this pair is not tested.
        leading: whether the first setting has the highest mean of all settings with these widths.
        more_seeds: for undecided leading pairs, about how many more seeds would lead to a verdict. None if even 1000
            seeds would not be enough.
    """

    first: Setting
    second: Setting
    difference: Difference | None = None
    paired_by: str = ""
    p_mcnemar: float | None = None
    p_mcnemar_holm: float | None = None
    networks: int = 0
    p_holm: float = 1.0
    p_equivalent_holm: float = 1.0
    family: int = 0
    leading: bool = False
    more_seeds: int | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the first setting relative to the second setting."""
        d = self.difference
        if d is None:
            return Verdict.NO_SPREAD
        if d.items and d.mean == d.standard_error == 0:  # the same result for all seeds and images: nothing to test
            return Verdict.IDENTICAL
        if self.p_holm < ALPHA:
            return Verdict.ABOVE if d.mean > 0 else Verdict.BELOW
        return Verdict.EQUIVALENT if self.p_equivalent_holm < ALPHA else Verdict.UNDECIDED

    def conclusion(self, margin: float) -> PairConclusion:
        """Return the conclusion about the first setting relative to the second setting."""
        d, first, second = self.difference, self.first, self.second
        return PairConclusion(
            other=second.label,
            paired_by=self.paired_by,
            n=d.n if d else len({run.seed for run in first.runs} & {run.seed for run in second.runs}),
            same_baselines=set(first.baselines) == set(second.baselines),
            difference=d.mean if d else first.top1.mean - second.top1.mean,
            ci95=(d.low, d.high) if d and isfinite(d.standard_error) else None,
            p=d.p if d else None,
            p_holm=self.p_holm if d else None,
            p_equivalent=equivalent(d, margin) if d else None,
            p_equivalent_holm=self.p_equivalent_holm if d else None,
            p_mcnemar=self.p_mcnemar,
            p_mcnemar_holm=self.p_mcnemar_holm,
            margin=margin,
            family=self.family,
            verdict=self.verdict,
            more_seeds=self.more_seeds,
        )
