"""Verdicts on two settings, and the pair of settings that a verdict is about."""

from enum import StrEnum

MARGIN = 0.5
"""Default margin of equivalence in points of top-1."""


class Verdict(StrEnum):
    """What may be said of the first of two settings.

    ABOVE and BELOW: the means differ significantly. EQUIVALENT: they differ by less than the margin (two one-sided
    tests). IDENTICAL: every seed and test image has the same result. UNDECIDED: neither a difference nor equivalence
    is significant. NO_SPREAD: too few seeds for a test.
    """

    ABOVE = "above"
    BELOW = "below"
    EQUIVALENT = "equivalent"
    IDENTICAL = "identical"
    UNDECIDED = "undecided"
    NO_SPREAD = "no spread"
