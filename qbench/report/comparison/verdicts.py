"""Defines verdicts on pairs of settings, and the conclusions of a comparison."""

from dataclasses import dataclass
from enum import StrEnum

MARGIN = 0.5
"""Default margin of equivalence in points of top-1."""


class Verdict(StrEnum):
    """The verdict on the first of two settings, relative to the second setting.

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
    """The conclusion about a setting and another setting with a lower mean and the same widths.

    Args:
        other: label of the other setting.
        paired_by: "seed and test image", "seed", or "" if unpaired or not tested.
        n: number of seeds that were compared.
        same_baselines: whether the runs of both settings start from the same float baselines.
        difference: top-1 of this setting minus top-1 of the other setting, in points, over the seeds that were
            compared.
        ci95: 95 % confidence interval of the difference, or None if there are too few seeds.
        p, p_holm: p-values of "there is no difference", without and with adjustment for the number of pairs.
        p_equivalent, p_equivalent_holm: p-values of "the means differ by the margin or more", without and with this
            adjustment.
        p_mcnemar, p_mcnemar_holm: p-value of McNemar's test (`mcnemar`) on the predictions of two networks, if the
            settings have only one seed in common, without and with adjustment for the number of such pairs.
        margin: equivalence margin in points.
        family: number of pairs for which p-values are adjusted; 0 if this pair is not tested.
        verdict: the verdict on this setting.
        more_seeds: about how many more seeds would lead to a verdict. None if there is a verdict already, or if even
            1000 seeds would not be enough.
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
    p_mcnemar_holm: float | None
    margin: float
    family: int
    verdict: Verdict
    more_seeds: int | None


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The conclusions about a setting in comparison with all other settings of the same widths.

    Args:
        pairs: one conclusion about this setting for each setting with a lower mean.
        winner: whether the setting has the highest mean and is significantly above all other settings.
        test_images: number of test images, or None if it is not known.
        test_sample_ci95_half: half-width, in points, of the 95 % confidence interval that covers only the error of the
            test sample. None if the number of test images is not known.
    """

    pairs: tuple[PairConclusion, ...] = ()
    winner: bool = False
    test_images: int | None = None
    test_sample_ci95_half: float | None = None
