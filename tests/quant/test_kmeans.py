"""One-dimensional k-means against all assignments of few values, a plain table of many, and the
package kmeans1d.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, product

import kmeans1d
import numpy as np
import pytest
import torch
from conftest import tiered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant import kmeans as module
from qbench.quant.kmeans import Clustering, kmeans

Solver = Callable[[Tensor, int, Sequence[float]], Clustering]


def every_assignment(values: Sequence[int], k: int, pinned: Sequence[int]) -> Fraction:
    """The least inertia by definition: each value belongs to any pin or to any free group."""
    free, pinned = k - len(set(pinned)), sorted(set(pinned))
    best = None
    for groups in product(range(k), repeat=len(values)):
        total = Fraction(0)
        for group in set(groups):
            members = [x for x, g in zip(values, groups, strict=True) if g == group]
            centre = Fraction(sum(members), len(members)) if group < free else Fraction(pinned[group - free])
            total += sum((x - centre) ** 2 for x in members)
        best = total if best is None else min(best, total)
    assert best is not None
    return best


def table(values: Sequence[float], k: int, pinned: Sequence[float] = ()) -> float:
    """The least inertia in O(k n^2): the i-th value belongs to the nearest pin, or is the last of a
    free interval.
    """
    x = np.sort(np.asarray(values, np.float64))
    n, centre = len(x), x[len(x) // 2]
    x, pins = x - centre, [p - centre for p in sorted(set(pinned))]
    nearest = np.min([(x - p) ** 2 for p in pins], axis=0) if pins else np.full(n, np.inf)
    least = np.concatenate(([0], np.cumsum(nearest)))
    within = np.full((n, n + 1), np.inf)  # of x[i:j], by a running mean
    for i in range(n):
        mean = square = 0.0
        for j in range(i, n):
            step = x[j] - mean
            mean += step / (j - i + 1)
            square += step * (x[j] - mean)
            within[i, j + 1] = square
    for _ in range(k - len(pins)):
        before, least = least, least.copy()
        for i in range(1, n + 1):
            least[i] = min(before[i], least[i - 1] + nearest[i - 1], (before[:i] + within[:i, i]).min())
    return float(least[n])


def check(solve: Solver, values: Tensor, k: int, pinned: Sequence[float] = (), optimum: float | None = None) -> None:
    """Assert everything that `kmeans` promises, for float64 values that are few enough for the
    table.
    """
    clustering = solve(values, k, pinned)
    assert isinstance(clustering.inertia, float)
    c, x = clustering.centroids.tolist(), values.flatten().tolist()
    assert clustering.centroids.dtype == values.dtype
    assert c == sorted(set(c)), "ascending and distinct"
    assert set(pinned) <= set(c), "pins stay unchanged"
    assert len(c) == min(k, len(set(x) | set(pinned)))
    assert (clustering.labels.dtype, clustering.labels.shape) == (torch.int64, values.shape)
    exact = [Fraction(m) for m in c]
    for value, label in zip(x, clustering.labels.flatten().tolist(), strict=True):
        assert label == min(range(len(c)), key=lambda i: (abs(Fraction(value) - exact[i]), i)), "nearest, or lower"
    got = sum((v - c[i]) ** 2 for v, i in zip(x, clustering.labels.flatten().tolist(), strict=True))
    assert clustering.inertia == pytest.approx(got, rel=1e-9, abs=1e-300)
    least = table(x, k, pinned) if optimum is None else optimum
    assert clustering.inertia <= least * (1 + 1e-9) + 1e-13 * table(x, 1 + len(set(pinned)), pinned), (
        "not above the optimum"
    )
    assert clustering.inertia >= least * (1 - 1e-9) - 1e-300, "not below the optimum"


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda r, n: r.normal(size=n),
    "uniform": lambda r, n: r.random(n),
    "cauchy": lambda r, n: r.standard_cauchy(n),
    "t3": lambda r, n: r.standard_t(3, n),
    "two widths": lambda r, n: r.normal(size=n) * np.where(r.random(n) < 0.9, 1e-3, 1),
    "an outlier": lambda r, n: np.append(r.normal(size=n - 1), -1e6),
    "mostly zero": lambda r, n: r.normal(size=n) * (r.random(n) < 0.3),
    "laplace": lambda r, n: r.laplace(size=n),
    "bimodal": lambda r, n: r.normal(size=n) * 0.3 + np.where(r.random(n) < 0.4, -1, 1.2),
    "t2 and outliers": lambda r, n: np.append(r.standard_t(2, n - 2), [-1e4, 3e4]),
    "ties": lambda r, n: np.round(r.normal(size=n) * 2**13) / 2**13,
}
FEW_SHAPES = ("normal", "cauchy", "mostly zero", "t2 and outliers")
"""Shapes of which many values are clustered in the fast tier."""


def sample(shape: str, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(SHAPES[shape](np.random.default_rng(seed), n))


def package(values: Tensor, k: int) -> float:
    """Inertia of kmeans1d's centroids, from float64 and around the median: the package does not
    subtract a centre.
    """
    x = values.double().numpy().ravel()
    x = x - np.median(x)
    labels, centroids = kmeans1d.cluster(x, k)
    return float(((x - np.array(centroids)[labels]) ** 2).sum())


@pytest.mark.parametrize(
    ("values", "k", "pinned", "centroids", "labels", "inertia"),
    [
        ([0, 0, 1, 9, 11], 2, (), [1 / 3, 10], [0, 0, 0, 1, 1], 2 / 3 + 2),
        ([0, 0, 1, 9, 11], 2, (0,), [0, 10], [0, 0, 0, 1, 1], 1 + 2),
        ([4, 3, 2, 1], 2, (), [1.5, 3.5], [1, 1, 0, 0], 1),
        ([1, 2, 3, 10], 3, (2.5,), [1, 2.5, 10], [0, 1, 1, 2], 0.5),  # {1, 2} at 1.5 and 3 at 2.5: 0.75
        ([0, 1], 2, (100,), [0.5, 100], [0, 0], 0.5),  # no value is nearest to it
        ([0, 1, 2], 2, (0, 2), [0, 2], [0, 0, 1], 1),  # a tie: the lower one
        ([0, 1, 2], 2, (2, 0, 2), [0, 2], [0, 0, 1], 1),
        ([5, 5, 5], 4, (), [5], [0, 0, 0], 0),
        ([5, 5, 5], 4, (0, 7), [0, 5, 7], [1, 1, 1], 0),
        ([5], 1, (5,), [5], [0], 0),
        ([3, 1, 3], 9, (), [1, 3], [1, 0, 1], 0),
    ],
)
def test_by_hand(
    values: list[float], k: int, pinned: tuple[float, ...], centroids: list[float], labels: list[int], inertia: float
) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        clustering = kmeans(torch.tensor(values, dtype=dtype), k, pinned)
        assert clustering.centroids.dtype == dtype
        assert clustering.centroids.tolist() == torch.tensor(centroids, dtype=dtype).tolist()
        assert clustering.labels.tolist() == labels
        assert clustering.inertia == pytest.approx(inertia, rel=torch.finfo(dtype).eps)


small = st.integers(-6, 6)


@settings(deadline=None, max_examples=150)
@given(st.lists(small, min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_every_assignment_of_few_values(values: list[int], k: int, data: st.DataObject) -> None:
    pinned = data.draw(st.lists(small, max_size=k, unique=True))
    least = float(every_assignment(values, k, pinned))
    assert table(values, k, pinned) == pytest.approx(least, abs=1e-9), "the two oracles agree"
    check(kmeans, torch.tensor(values, dtype=torch.float64), k, pinned, least)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(-99, 99), min_size=1, max_size=25), st.integers(1, 12), st.data())
def test_the_table_of_more_values(values: list[int], k: int, data: st.DataObject) -> None:
    pinned = data.draw(st.lists(st.integers(-120, 120), max_size=k, unique=True))
    unit = data.draw(st.sampled_from([1.0, 0.1, 1e-200, 3e150]))
    check(kmeans, torch.tensor(values, dtype=torch.float64) * unit, k, [p * unit for p in pinned])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pins", [0, 1, 4])
@pytest.mark.parametrize("k", tiered([4, 5, 17], [5]))
def test_the_table_of_many_values(shape: str, pins: int, k: int) -> None:
    values = sample(shape, 150, k).reshape(5, 30)
    check(kmeans, values, k, values.flatten()[:pins].mul(1.25).unique().tolist())


def cases() -> list[tuple[Tensor, int, tuple[float, ...]]]:
    three = torch.tensor([0.0, 1, 2], dtype=torch.float64)
    heavy = torch.cat((torch.zeros(30, dtype=torch.float64), torch.arange(1.0, 6, dtype=torch.float64)))
    return [
        (three, 2, (0, 2)),
        (heavy, 2, ()),
        (noise(60), 5, ()),
        (noise(60), 5, (0.3, 1.5)),
        (noise(60) + 1e8, 5, ()),
        (torch.cat((noise(60), noise(20, 1) * 0.1 + 9)), 6, (0.0,)),
    ]


def labelled(values: Tensor, centroids: np.ndarray, right: bool = False) -> Clustering:
    c = torch.from_numpy(np.unique(centroids))
    labels = torch.bucketize(values, (c[1:] + c[:-1]) / 2, right=right)
    return Clustering(c, labels, float(((values - c[labels]) ** 2).sum()))


def lloyd(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    x, pins = values.numpy(), np.array(sorted(pinned))
    free = np.linspace(x.min(), x.max(), k - len(pins))
    for _ in range(100):
        c = np.concatenate((pins, free))
        near = np.abs(x[:, None] - c).argmin(1) - len(pins)
        free = np.array([x[near == i].mean() if (near == i).any() else m for i, m in enumerate(free)])
    return labelled(values, np.concatenate((pins, free)))


def without_counts(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    return labelled(values, kmeans(values.unique(), k, pinned).centroids.numpy())


def pinned_afterwards(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    c = kmeans(values, k).centroids.numpy()
    for p in pinned:
        c[np.abs(c - p).argmin()] = p
    return labelled(values, c)


def pins_take_no_share(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    free = kmeans(values, k - len(pinned)).centroids.numpy() if len(pinned) < k else np.empty(0)
    return labelled(values, np.concatenate((free, np.array(pinned, np.float64))))


def upper_at_ties(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    return labelled(values, kmeans(values, k, pinned).centroids.numpy(), right=True)


def no_centre(values: Tensor, k: int, pinned: Sequence[float]) -> Clustering:
    x = np.sort(values.numpy())
    s, q = (np.concatenate(([0], np.cumsum(x**p))) for p in (1, 2))
    n, least, cuts = len(x), np.append(0, np.full(len(x), np.inf)), []
    for _ in range(k):
        trial = np.full((n + 1, n + 1), np.inf)
        for i in range(1, n + 1):
            j = np.arange(i)
            trial[i, :i] = least[:i] + q[i] - q[:i] - (s[i] - s[:i]) ** 2 / (i - j)
        cuts.append(trial.argmin(1))
        least = trial.min(1)
    end, c = n, []
    for cut in reversed(cuts):
        c.append(x[cut[end] : end].mean())
        end = cut[end]
    return labelled(values, np.array(c))


def test_all_cases() -> None:
    for values, k, pinned in cases():
        check(kmeans, values, k, pinned)


@pytest.mark.parametrize(
    ("wrong", "indices"),
    [
        (lloyd, [2]),
        (without_counts, [1]),
        (pinned_afterwards, [3]),
        (pins_take_no_share, [3, 5]),
        (upper_at_ties, [0]),
        (no_centre, [4]),
    ],
)
def test_wrong_solvers_are_caught(wrong: Solver, indices: list[int]) -> None:
    for case in indices:
        with pytest.raises(AssertionError):
            check(wrong, *cases()[case])


@pytest.mark.parametrize("k", tiered([2, 8, 17, 32], [2, 17]))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_package_finds_nothing_better(shape: str, k: int) -> None:
    values = sample(shape, 9_999)
    assert kmeans(values, k).inertia == pytest.approx(package(values, k), rel=1e-12)


def test_a_layer() -> None:
    values = (noise(36_864) * 0.05).float().reshape(64, 64, 3, 3)
    start = time.process_time()
    clustering = kmeans(values, 17, (0.0,))
    assert time.process_time() - start < 2  # 0.02 s alone
    free = kmeans(values, 17)
    assert free.inertia == pytest.approx(package(values, 17), rel=1e-9)
    assert free.inertia < clustering.inertia
    assert 0.0 in clustering.centroids.tolist()


@pytest.mark.parametrize("k", tiered([2, 8, 16, 32], [2, 16]))
@pytest.mark.parametrize("shape", tiered(SHAPES, FEW_SHAPES))
def test_more_distinct_values_than_the_exact_limit(shape: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT", 2_000)
    values = sample(shape, 30_000, k)
    ratio = kmeans(values, k).inertia / package(values, k)
    assert 1 - 1e-12 <= ratio <= 1 + max(1e-6, (k / 2_000) ** 2)
    pins = [0.0, float(values.quantile(0.9))]
    clustering = kmeans(values, k, pins)
    assert set(pins) <= set(clustering.centroids.tolist())
    monkeypatch.setattr(module, "EXACT", 100_000)
    ratio = clustering.inertia / kmeans(values, k, pins).inertia
    assert 1 - 1e-12 <= ratio <= 1 + max(1e-6, (k / 2_000) ** 2)


@pytest.mark.parametrize("k", tiered([3, 16, 32], [16]))
@pytest.mark.parametrize("shape", tiered(SHAPES, FEW_SHAPES))
def test_slightly_more_values_than_the_exact_limit(shape: str, k: int) -> None:
    values = sample(shape, 40_000, k).float()
    assert len(values.unique()) > module.EXACT
    ratio = kmeans(values, k).inertia / package(values, k)
    assert 1 - 1e-6 <= ratio <= 1 + 1e-5  # splits between bins alone leave up to 6e-5


@pytest.mark.parametrize("k", tiered([16, 32], [16]))
@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "bimodal", "t2 and outliers", "mostly zero", "ties"])
def test_finer_bins_improve_little(shape: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = sample(shape, 10**6, k).float()
    clustering = kmeans(values, k)
    monkeypatch.setattr(module, "BINS", 1024)
    monkeypatch.setattr(module, "ZOOMS", 5)
    assert clustering.inertia <= kmeans(values, k).inertia * (1 + 1e-5)


def test_one_centroid_of_many_values() -> None:
    values = noise(30_000)
    assert float(kmeans(values, 1).centroids) == pytest.approx(float(values.mean()), abs=1e-12)
    assert kmeans(values, 1, (0.25,)).centroids.tolist() == [0.25]
    assert kmeans(values, 2, (0.25, 1.5)).centroids.tolist() == [0.25, 1.5]


@pytest.mark.parametrize("pins", [(), (0.0,), (-0.7, 0.0, 0.9)])
def test_centroids_of_many_values_are_means(pins: tuple[float, ...]) -> None:
    """Every free centroid is the mean of the values nearest to it."""
    values = sample("normal", 300_000).float()
    clustering = kmeans(values, 7, pins)
    squares = (values.double() - clustering.centroids.double()[clustering.labels]).square().sum()
    assert clustering.inertia == pytest.approx(float(squares), rel=1e-6)
    for i, m in enumerate(clustering.centroids.tolist()):
        if m not in torch.tensor(pins).tolist():
            assert m == pytest.approx(float(values[clustering.labels == i].double().mean()), abs=1e-4)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=1, max_size=4))
def test_the_best_of_given_splits(seed: int, fixed: list[bool]) -> None:
    r = np.random.default_rng(seed)
    k, y = len(fixed), np.sort(r.integers(-50, 50, 20).astype(np.float64))
    c = np.sort(r.choice(99, k, replace=False) - 49.3)
    options = np.sort(r.integers(0, 21, (4, k + 1)), 1)
    options[0, 1:-1] = np.sort(r.choice(np.arange(1, 20), k - 1, replace=False))  # no cluster is empty
    options[:, 0], options[:, -1] = 0, 20

    def cost(splits: Sequence[int]) -> float:
        if any(j - i < (0 if f else 1) for (i, j), f in zip(pairwise(splits), fixed, strict=True)):
            return np.inf
        parts = [y[i:j] for i, j in pairwise(splits)]
        return sum(((p - (m if f else p.mean())) ** 2).sum() for p, m, f in zip(parts, c, fixed, strict=True))

    least = min(cost([0, *middle, 20]) for middle in product(*options.T[1:-1].tolist()))
    clustering = np.where(fixed, c, module._best_of(options, y, c, np.array(fixed)))
    best = [s for m in product(*options.T[1:-1].tolist()) if cost(s := [0, *m, 20]) <= least * (1 + 1e-9) + 1e-9]
    means = [[m if f else y[i:j].mean() for m, f, (i, j) in zip(c, fixed, pairwise(s), strict=True)] for s in best]
    assert any(np.allclose(clustering, m) for m in means)


def test_no_refinement_if_a_centroid_has_no_values() -> None:
    x, c = np.repeat([0.0, 10.0], 9), np.array([1.0, 5.0, 9.0])
    assert module._refine_splits(x, x, np.array([0, 18]), c, c[[0, 2]]).tolist() == c.tolist()


@pytest.mark.parametrize("k", [1, 2, 17, 256, 257])
def test_labels_of_many_values(k: int) -> None:
    """Several chunks with a rest, and more centroids than a byte counts."""
    values = torch.randint(600, (3, 2 * module.CHUNK // 3 + 5), generator=torch.Generator().manual_seed(k)) / 7
    clustering = kmeans(values, k)
    c = clustering.centroids.double()
    assert len(c) == k
    distance = (values.double() - c[clustering.labels]).abs()
    for other in (clustering.labels - 1, clustering.labels + 1):
        assert (distance <= (values.double() - c[other.clamp(0, k - 1)]).abs()).all()


def test_many_values_with_a_large_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (noise(30_000) * 2**10).round() / 2**10  # so that the sum is exact
    least = package(values, 8)
    monkeypatch.setattr(module, "EXACT", 1_000)
    assert kmeans(values + 2.0**40, 8).inertia == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("k", [16, 32])
def test_a_million_values(k: int) -> None:
    n = 1_000_000
    values = torch.arange(n, dtype=torch.float64)[torch.randperm(n, generator=torch.Generator().manual_seed(k))]
    start = time.process_time()
    clustering = kmeans(values, k)
    assert time.process_time() - start < 8  # 0.1 s alone
    m = n // k  # values per cluster, whose squares sum to m (m^2 - 1) / 12
    optimum = k * m * (m * m - 1) / 12
    assert 1 - 1e-12 <= clustering.inertia / optimum <= 1 + (k / module.EXACT) ** 2
    np.testing.assert_allclose(clustering.centroids, np.arange(k) * m + (m - 1) / 2, rtol=0, atol=m * 1e-3)


def test_few_distinct_among_many_are_exact() -> None:
    values = torch.arange(300_000, dtype=torch.float32).remainder(1_000)
    clustering = kmeans(values, 10)
    assert clustering.centroids.tolist() == [49.5 + 100 * i for i in range(10)]
    assert clustering.inertia == 300 * 10 * 100 * (100**2 - 1) / 12
    torch.testing.assert_close(clustering.labels, (values / 100).long())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
    st.integers(-900, 900),
)
def test_order_and_powers_of_two_do_not_matter(values: list[float], k: int, random, power: int) -> None:  # type: ignore[no-untyped-def]
    x, order = torch.tensor(values, dtype=torch.float64), list(range(len(values)))
    x[x.abs() < 2.0**-100] = 0  # avoid subnormal numbers after scaling
    random.shuffle(order)
    plain, shuffled, scaled = kmeans(x, k), kmeans(x[order], k), kmeans(x * 2.0**power, k)
    assert torch.equal(plain.centroids, shuffled.centroids)
    assert torch.equal(plain.labels[order], shuffled.labels)
    assert plain.inertia == shuffled.inertia
    assert torch.equal(plain.centroids * 2.0**power, scaled.centroids)
    assert torch.equal(plain.labels, scaled.labels)
    assert scaled.inertia == plain.inertia * 2.0**power * 2.0**power


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_shift_and_scale(seed: int, k: int, shift: float, scale: float, flip: bool) -> None:
    x, pinned = noise(50, seed), [0.0, 1.0][: k - 1]
    a = -scale if flip else scale
    plain, moved = kmeans(x, k, pinned), kmeans(a * x + shift, k, [a * p + shift for p in pinned])
    assert moved.inertia == pytest.approx(a * a * plain.inertia, rel=1e-6)
    expected = (a * plain.centroids + shift).sort().values
    torch.testing.assert_close(moved.centroids, expected, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("seed", range(5))
def test_large_offsets_and_outliers_keep_the_precision(seed: int) -> None:
    x = noise(300, seed)
    least = table(x.tolist(), 6)
    assert kmeans(x + 1e6, 6).inertia == pytest.approx(least, rel=1e-6)
    assert kmeans(torch.cat((x, torch.tensor([-1e8]))), 7).inertia == pytest.approx(least, rel=1e-9)
    assert kmeans(torch.cat((x, torch.tensor([1e8, 1e12]))), 8).inertia == pytest.approx(least, rel=1e-9)
    assert kmeans(torch.cat((x * 1e-9, torch.tensor([-3.0, 1.0]))), 8).inertia == pytest.approx(least * 1e-18, rel=1e-6)
    two = kmeans(torch.tensor([0, 1e-20, 1], dtype=torch.float64), 3).centroids.tolist()
    assert two == [0, 1e-20, 1]


def test_pinning_the_optimum_changes_nothing() -> None:
    x = torch.cat((noise(400), noise(200, 1).mul(0.1) + 2))
    best = kmeans(x, 17)
    inertia = [kmeans(x, 17, best.centroids[:: 17 // n][:n]).inertia for n in (1, 4, 8, 16, 17)]
    assert inertia == [pytest.approx(best.inertia, rel=1e-12)] * 5
    stages = [kmeans(x, 17, [0.1 * i for i in range(n)]).inertia for n in range(18)]
    assert stages == sorted(stages), "a pin never helps"
    more = [kmeans(x, k, [0.0]).inertia for k in range(1, 12)]
    assert more == sorted(more, reverse=True), "a centroid never hurts"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_layouts(dtype: torch.dtype) -> None:
    x = noise(2 * 3 * 4 * 5).to(dtype).reshape(2, 3, 4, 5).requires_grad_()
    before = x.detach().clone()
    clustering = kmeans(x, 5, (0.3,))
    assert torch.equal(x, before), "the input is never written to"
    assert not clustering.centroids.requires_grad
    assert clustering.labels.shape == x.shape
    assert torch.tensor(0.3, dtype=dtype) in clustering.centroids
    for other in (x.to(memory_format=torch.channels_last), x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)):
        again = kmeans(other, 5, torch.tensor([0.3], dtype=dtype))
        assert torch.equal(again.labels, clustering.labels)
        assert torch.equal(again.centroids, clustering.centroids)
    exact = [Fraction(m) for m in clustering.centroids.tolist()]
    for value, label in zip(x.flatten().tolist(), clustering.labels.flatten().tolist(), strict=True):
        assert label == min(range(5), key=lambda i: (abs(Fraction(value) - exact[i]), i))
    wide = kmeans(before.double(), 5, (float(torch.tensor(0.3, dtype=dtype)),))
    assert torch.equal(wide.centroids.to(dtype), clustering.centroids)
    assert kmeans(before.flatten()[0], 3).labels.shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_middle_of_two_neighbours_is_not_rounded(dtype: torch.dtype) -> None:
    """The middle of 1 + e and 1 + 2e rounds to the even one, the upper, which would then belong to
    the lower.
    """
    e = torch.finfo(dtype).eps
    low, high = torch.tensor([1 + e, 1 + 2 * e], dtype=dtype)
    assert (low / 2 + high / 2) == high, "otherwise the test proves nothing"
    assert kmeans(torch.stack((high, low)), 2, (float(low), float(high))).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "k", "pinned", "message"),
    [
        ([], 1, (), "must not be empty"),
        ([1.0], 0, (), "k=0: must be an integer of at least 1"),
        ([1.0], -1, (), "k=-1: must be an integer of at least 1"),
        ([1.0], 2, (1, 2, 3), "k=2: must be an integer of at least 3"),
        ([1.0, float("nan"), 2], 1, (), "NaN or infinity"),
        ([1.0, float("inf")], 1, (), "NaN or infinity"),
        ([1.0, -float("inf")], 1, (), "NaN or infinity"),
        ([1.0], 1, (float("nan"),), "NaN or infinity"),
        ([1.0], 1, (1e300,), "NaN or infinity"),  # not a float32
    ],
)
def test_invalid_arguments_are_refused(values: list[float], k: int, pinned: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(torch.tensor(values), k, pinned)
    with pytest.raises(ValueError, match="int64"):
        kmeans(torch.tensor([1, 2]), 1)


@pytest.mark.full
def test_memory_of_ten_million_values() -> None:
    code = """
import re, time, torch
from qbench.quant.kmeans import kmeans
def kilobytes(key):  # ru_maxrss would include the memory of the process that started this one
    return int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
kmeans(torch.randn(200_000), 32, (0.0,))
x = torch.randn(10_000_000)
now = kilobytes("VmRSS")
start = time.process_time()
kmeans(x, 32, (0.0,))
print(1024 * (kilobytes("VmHWM") - now), time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    memory, seconds = map(float, done.stdout.split())
    assert memory < 16e7 + 4 * 132 * module.EXACT
    assert seconds < 15  # 1 s alone
