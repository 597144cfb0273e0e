"""Statistics against closed forms, scipy and simulations: differences, hypothesis tests and the number of seeds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qbench.report.statistics.differences import (
    NORMAL_QUANTILE,
    Difference,
    _difference,
    _few,
    _many,
    one_sided_p,
    paired,
    swapped,
    two_way,
)
from qbench.report.statistics.hypothesis_tests import equivalent, evidence, holm, outlying, sign_flip
from qbench.report.statistics.power import seeds_needed


def test_paired_is_students_t_test() -> None:
    first, second = [97.1, 96.4, 98.0, 97.5], [96.0, 96.6, 96.9, 96.1]
    theirs = stats.ttest_rel(first, second)
    interval = theirs.confidence_interval(0.95)
    ours = paired(first, second)
    assert (ours.n, ours.dof) == (4, 3)
    assert ours.mean == pytest.approx(0.85)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) quantile 4.302653; p = 1 - t / sqrt(2 + t^2)."""
    ours = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert ours.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    t = 2 * 3**0.5
    assert ours.p == pytest.approx(1 - t / (2 + t * t) ** 0.5)


def test_one_pair_has_no_spread() -> None:
    ours = paired([3.0], [1.0])
    assert (ours.mean, ours.low, ours.high, ours.p) == (2, -np.inf, np.inf, 1)
    assert evidence(ours, "better", 0) == (1, True)
    assert one_sided_p(ours, -100) == 1
    assert seeds_needed(ours) is None


def test_equal_differences_give_no_certainty() -> None:
    """Five equal differences, up to rounding: the interval is a point, and p is that of the sign-flip test, 2 / 2^5."""
    ours = paired([1.1, 2.1, 3.1, 4.1, 5.1], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ours.p == 2 / 32
    assert (ours.low, ours.high) == pytest.approx((0.1, 0.1))
    ours = paired([1.5] * 5, [1.0] * 5)
    assert (ours.low, ours.high, ours.p) == (0.5, 0.5, 2 / 32)
    assert paired([1.0] * 5, [1.0] * 5).p == 1
    assert one_sided_p(paired([1.0] * 5, [1.0] * 5), -0.5) == 1 / 32
    assert one_sided_p(paired([0.5] * 5, [1.0] * 5), -0.5) == 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_arms_of_unequal_length_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="paired"):
        paired(first, second)


# --- seeds and test items


def _table(rng: np.random.Generator, seeds: int, items: int, sizes: tuple[float, float, float]) -> Any:
    a, b, e = sizes
    return (
        a * rng.standard_normal((seeds, 1))
        + b * rng.standard_normal((1, items))
        + e * rng.standard_normal((seeds, items))
    )


def test_two_way_by_hand() -> None:
    """d = 100 [[1, 0, 0], [1, 1, 0]] = 50 + rows -+ 100/6 + columns 50, 0, -50 + rest +-(100/6, -100/3, 100/6).

    MS_seeds = 3 * 2 (100/6)^2 = 1666.67; MS_items = 2 * 2 * 50^2 / 2 = 5000; MS_rest = 2 * (2 (100/6)^2 + (100/3)^2)
    / 2 = 1666.67. The variance is (1666.67 + 5000 - 1666.67) / 6.
    """
    ours = two_way([[1, 0, 0], [1, 1, 0]], np.zeros((2, 3)))
    assert ours.mean == pytest.approx(50)
    assert ours.standard_error**2 == pytest.approx(5000 / 6)
    assert ours.seed_variance == pytest.approx(5000 / 18)
    assert ours.item_variance == pytest.approx(10000 / 18)
    assert ours.dof == pytest.approx(5000**2 / ((5000 / 3) ** 2 / 1 + 5000**2 / 2 + (5000 / 3) ** 2 / 2))
    assert (ours.n, ours.items) == (2, 3)


def test_two_way_equals_the_cluster_robust_sum() -> None:
    """Seed + item - rest as in Cameron, Gelbach and Miller, with exact small-sample factors."""
    rng = np.random.default_rng(0)
    d = _table(rng, 5, 7, (1.0, 1.0, 1.0))
    ours = two_way(d, np.zeros_like(d))
    x = 100 * d - 100 * d.mean()
    by_seed = (x.sum(1) ** 2).sum() * 5 / 4
    by_item = (x.sum(0) ** 2).sum() * 7 / 6
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True)
    single = (rest**2).sum() * 35 / 24
    assert ours.standard_error**2 == pytest.approx((by_seed + by_item - single) / 35**2)


def test_two_way_over_equal_items_is_paired() -> None:
    """Items that all behave alike count as one item: the result is Student's test over seeds."""
    rows = np.array([[1.0], [0.0], [1.0], [1.0]])
    ours, plain = two_way(np.repeat(rows, 6, axis=1), np.zeros((4, 6))), paired(100 * rows[:, 0], [0.0] * 4)
    assert (ours.mean, ours.low, ours.high, ours.p) == pytest.approx((plain.mean, plain.low, plain.high, plain.p))


def test_two_way_edges() -> None:
    assert two_way([[1, 0]], [[0, 0]]).high == np.inf, "one seed"
    assert two_way([[1], [0]], [[0], [0]]).high == np.inf, "one image"
    same = two_way(np.ones((3, 4)), np.ones((3, 4)))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    for wrong in ((np.zeros((2, 3)), np.zeros((3, 2))), (np.zeros(3), np.zeros(3)), (np.zeros((0, 3)),) * 2):
        with pytest.raises(ValueError, match="seeds, items"):
            two_way(*wrong)


def _coverage(interval: Callable[[Any], Difference], sizes: tuple[float, float, float]) -> float:
    rng = np.random.default_rng(1)
    hits = [interval(_table(rng, 6, 60, sizes)) for _ in range(400)]
    return float(np.mean([d.low <= 0 <= d.high for d in hits]))


@pytest.mark.parametrize("sizes", [(0.3, 0.0, 1.0), (0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.3, 0.5, 1.0), (0.0, 0.0, 1.0)])
def test_interval_has_its_coverage(sizes: tuple[float, float, float]) -> None:
    """95 % nominal. 400 trials have a standard error of 1.1 points; components clipped at zero widen the interval."""
    assert 0.92 <= _coverage(lambda d: two_way(d, np.zeros_like(d)), sizes) <= 0.995


def test_intervals_over_one_factor_lack_coverage() -> None:
    """Wrong intervals: over seeds only if images matter, over images only if seeds matter."""
    assert _coverage(lambda d: paired(d.mean(1), np.zeros(6)), (0.1, 1.0, 1.0)) < 0.8
    assert _coverage(lambda d: paired(d.mean(0), np.zeros(60)), (0.3, 0.0, 1.0)) < 0.8


# --- tests against a border


def _d(mean: float, error: float = 0.2, freedom: float = 9.0) -> Difference:
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(mean, mean - reach, mean + reach, 10, 0.5, error, freedom, error**2)


def test_noninferiority_by_hand() -> None:
    """Mean -0.1, error 0.2, margin 0.5: t = 2 at 9 degrees of freedom, one-sided p = 0.038276."""
    assert one_sided_p(_d(-0.1), -0.5) == pytest.approx(0.038276, abs=1e-6)
    assert one_sided_p(_d(-0.5), -0.5) == pytest.approx(0.5)


def test_equivalence_by_hand() -> None:
    """Mean 0.1, error 0.2, margin 0.5: t = 3 from below, 2 from above; the larger p is that of t = 2."""
    assert equivalent(_d(0.1), 0.5) == pytest.approx(0.038276, abs=1e-6)
    assert equivalent(_d(-0.1), 0.5) == pytest.approx(equivalent(_d(0.1), 0.5))
    assert equivalent(_d(0.6), 0.5) > 0.5


def test_equivalence_is_scipys_two_tests() -> None:
    first, second = [97.1, 96.4, 98.0, 97.5], [97.0, 96.6, 97.9, 97.1]
    values = np.subtract(first, second)
    lower = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    assert equivalent(paired(first, second), 0.5) == pytest.approx(max(lower, upper))


@pytest.mark.parametrize(
    ("test", "margin", "mean", "significant", "holds"),
    [
        ("better", 0.0, 1.0, True, True),
        ("better", 0.0, -1.0, True, False),
        ("better", 0.0, 0.1, False, True),
        ("better", 0.5, 0.6, False, True),
        ("at_least", 0.5, 0.1, True, True),
        ("at_least", 0.5, -0.2, False, True),
        ("at_least", 0.5, -1.2, True, False),
        ("equal", 0.6, 0.05, True, True),
        ("equal", 0.6, 0.5, False, False),
        ("equal", 0.6, -1.5, True, False),
        ("equal", 0.6, 1.5, True, False),
    ],
)
def test_evidence_for_and_against_a_claim(
    test: str, margin: float, mean: float, significant: bool, holds: bool
) -> None:
    found = evidence(_d(mean), test, margin)
    assert (found.p < 0.05) == significant
    if significant:
        assert found.holds == holds


@given(st.floats(-2, 2), st.floats(0.01, 1), st.sampled_from(["better", "at_least", "equal"]), st.floats(0.1, 1))
def test_evidence_agrees_with_the_interval(mean: float, error: float, test: str, margin: float) -> None:
    d = _d(mean, error)
    found = evidence(d, test, margin)
    low, high = {"better": (margin, margin), "at_least": (-margin, -margin), "equal": (-margin, margin)}[test]
    inside = d.low > low and d.high < high if test == "equal" else d.low > low
    outside = d.high < low or (test == "equal" and d.low > high)
    if abs(found.p - 0.05) > 1e-9:
        assert (found.p < 0.05) == (inside or outside)
        if inside or outside:
            assert found.holds == inside


def test_an_unknown_test_is_refused() -> None:
    with pytest.raises(ValueError, match="better, at_least, equal"):
        evidence(_d(0.0), "worse", 0)


def test_holm_by_hand() -> None:
    """0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06, not below the one before; 0.5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_starts_with_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * max(p_values)) for p, q in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == min(1.0, len(p_values) * min(p_values))
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(adjusted)[order], np.array(adjusted)[order][1:], strict=False))


def test_needed_seeds_reach_the_power() -> None:
    """Power from the noncentral t: about 80 % at n seeds, and less with two seeds fewer."""
    d = paired([0.4, 1.6, -0.5, 1.1, 0.4], [0.0] * 5)
    n = seeds_needed(d)
    assert n is not None
    assert n > 5
    spread = (d.seed_variance * d.n) ** 0.5

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, d.mean / spread * n**0.5))

    assert power(n) == pytest.approx(0.8, abs=0.05)
    assert power(n - 2) < power(n)
    assert seeds_needed(d, alpha=0.001) > n  # type: ignore[operator]
    assert seeds_needed(d, "better", d.mean) is None, "on the border no number of seeds decides"
    assert seeds_needed(d, "at_least", 0.5) < n  # type: ignore[operator]


def test_more_seeds_do_not_help_with_few_images() -> None:
    few = Difference(0.1, -0.3, 0.5, 10, 0.6, 0.2, 100.0, seed_variance=0.0001, item_variance=0.04, items=450)
    assert seeds_needed(few) is None
    assert seeds_needed(Difference(1.0, 0.6, 1.4, 10, 0.0, 0.2, 100.0, 0.0001, 0.04, 450)) is not None


# --- borders and constants


@pytest.mark.parametrize("compute", [_few, _many])
def test_values_that_are_equal_up_to_rounding_have_no_variance(
    compute: Callable[[list[float]], tuple[float, float]],
) -> None:
    """The tolerance is 1e-12 (1 + |x|), which is 9.1e-11 for values of 90."""
    assert compute([90.0, 90.0 + 5e-11])[1] == 0
    assert compute([90.0, 90.0 + 5e-10])[1] > 0
    assert compute([0.0, 1.5e-12])[1] > 0


def test_two_pairs_have_an_interval() -> None:
    ours = paired([3.0, 5.0], [1.0, 1.0])
    assert (ours.dof, ours.standard_error) == (1, pytest.approx(1.0))
    assert ours.low == pytest.approx(3 - stats.t.ppf(0.975, 1))


def test_equal_hits_have_the_degrees_of_freedom_of_the_seeds() -> None:
    hits = np.ones((4, 5), dtype=bool)
    assert (two_way(hits, hits).dof, two_way(hits, hits).standard_error) == (3, 0)


def test_a_difference_is_swapped_by_hand() -> None:
    d = swapped(Difference(1.0, -0.5, 2.5, 4, 0.2, 0.3, 3.0, 0.09))
    assert (d.mean, d.low, d.high, d.p, d.standard_error) == (-1.0, -2.5, 0.5, 0.2, 0.3)


def test_the_normal_quantile_is_scipys() -> None:
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-15) == NORMAL_QUANTILE


@pytest.mark.parametrize("n", [4, 16])
def test_sign_flips_are_exact_up_to_16_differences(n: int) -> None:
    """With one negative difference, a sum is as far from 0 if at most one sign differs from the others."""
    assert sign_flip([1.0] * n) == 2 / 2**n
    assert sign_flip([1.0] * (n - 1) + [-1.0]) == 2 * (n + 1) / 2**n


def test_more_than_16_differences_are_drawn() -> None:
    assert sign_flip([1.0] * 17) == pytest.approx(2 / 2**17, abs=2 / 2**16)
    assert sign_flip([1.0, -1.0] * 10) == 1.0


def test_outlying_values_are_beyond_5_robust_deviations_and_a_point() -> None:
    """In the first two lists, the median distance is 1, so the limit is 5 * 1.4826 = 7.413."""
    usual = [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert outlying([*usual, 7.40, -7.40]) == []
    assert outlying([*usual, 7.42, -7.42]) == [5, 6]
    assert outlying([0.0, 0.0, 0.0, 0.9]) == []
    assert outlying([0.0, 0.0, 0.0, 1.1]) == [3]


def test_two_seeds_can_be_enough() -> None:
    assert seeds_needed(_difference(50.0, 10, 1e-6, 0.0, 9.0, None)) == 2
