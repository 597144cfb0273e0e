"""Verdicts on two settings, and what a comparison concludes about a pair."""

from dataclasses import dataclass
from enum import StrEnum

MARGIN = 0.5
"""Default margin of equivalence in points of top-1."""


class Verdict(StrEnum):
    """What may be said of the first of two settings.

    ABOVE and BELOW: the means differ significantly. EQUIVALENT: they differ by less than the margin
    (two one-sided tests). IDENTICAL: every seed and test image has the same result. UNDECIDED:
    neither a difference nor equivalence is significant. NO_SPREAD: too few seeds for a test.
    """

    ABOVE = "above"
    BELOW = "below"
    EQUIVALENT = "equivalent"
    IDENTICAL = "identical"
    UNDECIDED = "undecided"
    NO_SPREAD = "no spread"


@dataclass(frozen=True, kw_only=True)
class PairConclusion:
    """What is concluded about a setting and another one of lower mean at the same widths.

    Args:
        other: label of the other setting.
        paired_by: "seed and test image", "seed", or "" if unpaired or not tested.
        n: number of seeds compared.
        same_baselines: whether both start from the same float baselines.
        difference: points of top-1, this setting minus the other, over the seeds compared.
        ci95: its 95 % confidence interval, None without spread.
        p, p_holm: p-value for "there is no difference", and adjusted for all pairs of the
            comparison.
        p_equivalent, p_equivalent_holm: the same for "they differ by the margin or more".
        p_mcnemar: with one common seed, the p-value of the two networks' predictions, see
            `mcnemar`.
        margin: of equivalence, in points.
        verdict: what follows.
        more_seeds: about how many more seeds would decide; None if decided, or if no number up to
            1000 would.
    """

    other: str
    paired_by: str
    n: int
    same_baselines: bool
    difference: float
    ci95: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    p_equivalent: float | None
    p_equivalent_holm: float | None
    p_mcnemar: float | None
    margin: float
    verdict: Verdict
    more_seeds: int | None


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What follows for a setting from the comparison with others at the same widths.

    `pairs` are those with the settings of lower mean. `winner`: it is significantly above all of
    them, and no other has a higher mean. `test_sample_ci95_half` is half the 95 % interval that the
    test sample alone leaves, in points; None where the number of test images is not known.
    """

    pairs: tuple[PairConclusion, ...] = ()
    winner: bool = False
    test_images: int | None = None
    test_sample_ci95_half: float | None = None
