"""A pair of settings at the same widths, with the difference between them."""

from dataclasses import dataclass
from math import isfinite

from qbench.report.comparison.setting import Setting
from qbench.report.comparison.verdicts import PairConclusion, Verdict
from qbench.report.statistics.differences import ALPHA, Difference
from qbench.report.statistics.hypothesis_tests import equivalent


@dataclass(frozen=True, kw_only=True)
class SettingPair:
    """Two settings at the same widths, the one of the higher mean first.

    Args:
        difference: first minus second in points, over the seeds that both have, so it may be below
            0. None if fewer than two seeds can be compared.
        paired_by: how runs are paired, see `PairConclusion`.
        p_mcnemar: with one common seed and predictions on the same images, McNemar's p-value of the
            two networks.
        p_holm, p_equivalent_holm: p-values for no difference and for a difference of the margin or
            more, adjusted.
        leading: the first setting has the highest mean at these widths.
        more_seeds: for undecided leading pairs, about how many more seeds would decide; None: no
            number up to 1000.
    """

    first: Setting
    second: Setting
    difference: Difference | None = None
    paired_by: str = ""
    p_mcnemar: float | None = None
    p_holm: float = 1.0
    p_equivalent_holm: float = 1.0
    leading: bool = False
    more_seeds: int | None = None

    @property
    def verdict(self) -> Verdict:
        """What may be said of the first setting."""
        d = self.difference
        if d is None:
            return Verdict.NO_SPREAD
        if d.mean == d.standard_error == 0:  # all seeds and images have the same result: nothing is left to test
            return Verdict.IDENTICAL
        if self.p_holm < ALPHA:
            return Verdict.ABOVE if d.mean > 0 else Verdict.BELOW
        return Verdict.EQUIVALENT if self.p_equivalent_holm < ALPHA else Verdict.UNDECIDED

    def conclusion(self, margin: float) -> PairConclusion:
        """Return what is concluded about the first setting and the second."""
        d, first, second = self.difference, self.first, self.second
        common = {run.seed for run in first.runs} & {run.seed for run in second.runs}
        return PairConclusion(
            other=second.label,
            paired_by=self.paired_by,
            n=d.n if d else len(common),
            same_baselines=set(first.baselines) == set(second.baselines),
            difference=d.mean if d else first.top1.mean - second.top1.mean,
            ci95=(d.low, d.high) if d and isfinite(d.standard_error) else None,
            p=d.p if d else None,
            p_holm=self.p_holm if d else None,
            p_equivalent=equivalent(d, margin) if d else None,
            p_equivalent_holm=self.p_equivalent_holm if d else None,
            p_mcnemar=self.p_mcnemar,
            margin=margin,
            verdict=self.verdict,
            more_seeds=self.more_seeds,
        )
