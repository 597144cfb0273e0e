"""Defines verdicts on two settings, and the conclusions of a comparison."""

from dataclasses import dataclass
from enum import StrEnum

MARGIN = 0.5
"""Default margin of equivalence in points of top-1."""


class Verdict(StrEnum):
    """The verdict on the first of two settings.

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
    """The conclusion about a setting and another setting that has a lower mean at the same widths.

    Args:
        other: label of the other setting.
        paired_by: "seed and test image", "seed", or "" if unpaired or not tested.
        n: number of seeds compared.
        same_baselines: whether the runs of both settings start from the same float baselines.
        difference: top-1 of this setting minus that of the other, in points, over the seeds
            compared.
        ci95: 95 % confidence interval of the difference; None with too few seeds.
        p, p_holm: p-values of "there is no difference", unadjusted and adjusted for all pairs.
        p_equivalent, p_equivalent_holm: the same p-values for "the means differ by the margin or
            more".
        p_mcnemar: McNemar's p-value of the two networks' predictions, if they share only one seed. See `mcnemar`.
        margin: equivalence margin in points.
        verdict: the verdict on this setting.
        more_seeds: about how many more seeds would lead to a verdict. None if there already is a
            verdict, or if even 1000 seeds would not lead to one.
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
    """The conclusions about a setting compared with others at the same widths.

    Args:
        pairs: the conclusions about this setting and each setting with a lower mean.
        winner: whether the setting has the highest mean and is significantly above all others.
        test_images: number of test images; None if not known.
        test_sample_ci95_half: half-width, in points, of the 95 % confidence interval for the test sample alone. None if
            the number of test images is not known.
    """

    pairs: tuple[PairConclusion, ...] = ()
    winner: bool = False
    test_images: int | None = None
    test_sample_ci95_half: float | None = None
