"""Claims: the statistics against closed forms and scipy's, the files, verdicts, the script from runs to document."""

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import evaluation
from hypothesis import given
from hypothesis import strategies as st
from qbench.papers.claims import ClaimResult, Comparison
from scipy import stats
from torch import nn
from torch.nn import functional as F

from qbench.analysis import gradient_mismatch as mismatch
from qbench.cli.main import main as cli
from qbench.errors import ConfigError
from qbench.papers import claims
from qbench.report.statistics.differences import Difference, paired, two_way
from qbench.report.statistics.hypothesis_tests import equivalent, evidence, holm, noninferior
from qbench.report.statistics.power import needed
from qbench.runs.reader import RunRecord
from qbench.runs.result import BaselineResult, Protocol, Result

FOLDER = ROOT / "conf" / "experiment" / "claims"


# --- one figure a seed


def test_paired_is_students() -> None:
    first, second = [97.1, 96.4, 98.0, 97.5], [96.0, 96.6, 96.9, 96.1]
    theirs = stats.ttest_rel(first, second)
    interval = theirs.confidence_interval(0.95)
    ours = paired(first, second)
    assert (ours.n, ours.freedom) == (4, 3)
    assert ours.mean == pytest.approx(0.85)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) quantile 4.302653; p = 1 - t / sqrt(2 + t^2)."""
    ours = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert ours.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    t = 2 * 3**0.5
    assert ours.p == pytest.approx(1 - t / (2 + t * t) ** 0.5)


def test_one_pair_knows_no_spread() -> None:
    ours = paired([3.0], [1.0])
    assert (ours.mean, ours.low, ours.high, ours.p) == (2, -np.inf, np.inf, 1)
    assert evidence(ours, "better", 0) == (1, True)
    assert noninferior(ours, 100) == 1
    assert needed(ours) is None


def test_equal_differences_are_no_certainty() -> None:
    """Five times the same, or but for rounding: a point for an interval, and the sign-flip test's p, 2 of 2^5."""
    ours = paired([1.1, 2.1, 3.1, 4.1, 5.1], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ours.p == 2 / 32
    assert (ours.low, ours.high) == pytest.approx((0.1, 0.1))
    ours = paired([1.5] * 5, [1.0] * 5)
    assert (ours.low, ours.high, ours.p) == (0.5, 0.5, 2 / 32)
    assert paired([1.0] * 5, [1.0] * 5).p == 1
    assert noninferior(paired([1.0] * 5, [1.0] * 5), 0.5) == 1 / 32
    assert noninferior(paired([0.5] * 5, [1.0] * 5), 0.5) == 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_arms_are_refused(first: list[float], second: list[float]) -> None:
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
    assert ours.error**2 == pytest.approx(5000 / 6)
    assert ours.seeds_part == pytest.approx(5000 / 18)
    assert ours.items_part == pytest.approx(10000 / 18)
    assert ours.freedom == pytest.approx(5000**2 / ((5000 / 3) ** 2 / 1 + 5000**2 / 2 + (5000 / 3) ** 2 / 2))
    assert (ours.n, ours.items) == (2, 3)


def test_two_way_is_the_cluster_robust_sum() -> None:
    """Seed + item - rest, each as Cameron, Gelbach and Miller have it, with their small-sample factors made exact."""
    rng = np.random.default_rng(0)
    d = _table(rng, 5, 7, (1.0, 1.0, 1.0))
    ours = two_way(d, np.zeros_like(d))
    x = 100 * d - 100 * d.mean()
    by_seed = (x.sum(1) ** 2).sum() * 5 / 4
    by_item = (x.sum(0) ** 2).sum() * 7 / 6
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True)
    single = (rest**2).sum() * 35 / 24
    assert ours.error**2 == pytest.approx((by_seed + by_item - single) / 35**2)


def test_two_way_over_alike_items_is_paired() -> None:
    """Items that all behave alike are one item: what is left is Student's test over seeds."""
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
def test_the_interval_covers(sizes: tuple[float, float, float]) -> None:
    """95 % nominal; 400 tries have a standard error of 1.1 points, and components cut off at zero make it wider."""
    assert 0.92 <= _coverage(lambda d: two_way(d, np.zeros_like(d)), sizes) <= 0.995


def test_intervals_over_one_factor_alone_do_not_cover() -> None:
    """The wrong ways to do it: seeds alone where images matter, images alone where seeds do."""
    assert _coverage(lambda d: paired(d.mean(1), np.zeros(6)), (0.1, 1.0, 1.0)) < 0.8
    assert _coverage(lambda d: paired(d.mean(0), np.zeros(60)), (0.3, 0.0, 1.0)) < 0.8


# --- tests against a border


def _d(mean: float, error: float = 0.2, freedom: float = 9.0) -> Difference:
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(mean, mean - reach, mean + reach, 10, 0.5, error, freedom, error**2)


def test_noninferiority_by_hand() -> None:
    """Mean -0.1, error 0.2, margin 0.5: t = 2 at 9 degrees of freedom, one-sided p = 0.038276."""
    assert noninferior(_d(-0.1), 0.5) == pytest.approx(0.038276, abs=1e-6)
    assert noninferior(_d(-0.5), 0.5) == pytest.approx(0.5)


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
    ("test", "margin", "mean", "sure", "holds"),
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
def test_evidence_goes_both_ways(test: str, margin: float, mean: float, sure: bool, holds: bool) -> None:
    found = evidence(_d(mean), test, margin)
    assert (found.p < 0.05) == sure
    if sure:
        assert found.holds == holds


@given(st.floats(-2, 2), st.floats(0.01, 1), st.sampled_from(["better", "at_least", "equal"]), st.floats(0.1, 1))
def test_evidence_says_what_the_interval_says(mean: float, error: float, test: str, margin: float) -> None:
    d = _d(mean, error)
    found = evidence(d, test, margin)
    low, high = {"better": (margin, margin), "at_least": (-margin, -margin), "equal": (-margin, margin)}[test]
    inside = d.low > low and d.high < high if test == "equal" else d.low > low
    outside = d.high < low or (test == "equal" and d.low > high)
    if abs(found.p - 0.05) > 1e-9:
        assert (found.p < 0.05) == (inside or outside)
        if inside or outside:
            assert found.holds == inside


def test_no_such_test() -> None:
    with pytest.raises(ValueError, match="better, at_least, equal"):
        evidence(_d(0.0), "worse", 0)


def test_holm_by_hand() -> None:
    """0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06, not below the one before; 0.5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_starts_at_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * max(p_values)) for p, q in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == min(1.0, len(p_values) * min(p_values))
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(adjusted)[order], np.array(adjusted)[order][1:], strict=False))


def test_seeds_needed_have_the_power() -> None:
    """Power by the noncentral t: 80 % is reached at n, about, and not two seeds before."""
    d = paired([0.4, 1.6, -0.5, 1.1, 0.4], [0.0] * 5)
    n = needed(d)
    assert n is not None
    assert n > 5
    spread = (d.seeds_part * d.n) ** 0.5

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, d.mean / spread * n**0.5))

    assert power(n) == pytest.approx(0.8, abs=0.05)
    assert power(n - 2) < power(n)
    assert needed(d, alpha=0.001) > n  # type: ignore[operator]
    assert needed(d, "better", d.mean) is None, "on the border no number decides"
    assert needed(d, "at_least", 0.5) < n  # type: ignore[operator]


def test_no_number_of_seeds_helps_against_few_images() -> None:
    few = Difference(0.1, -0.3, 0.5, 10, 0.6, 0.2, 100.0, seeds_part=0.0001, items_part=0.04, items=450)
    assert needed(few) is None
    assert needed(Difference(1.0, 0.6, 1.4, 10, 0.0, 0.2, 100.0, 0.0001, 0.04, 450)) is not None


# --- the gradient's mismatch


def test_smoothed_is_the_expectation() -> None:
    thresholds, levels = torch.tensor([0.0, 0.8], dtype=torch.double), torch.tensor([0.0, 0.5, 1.1], dtype=torch.double)
    x = torch.linspace(-1, 2, 7, dtype=torch.double, requires_grad=True)
    y = mismatch.smoothed(x, thresholds, levels, 0.3)
    z = np.linspace(-8, 8, 200_001)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    for value, got in zip(x.tolist(), y.tolist(), strict=True):
        noisy = value + 0.3 * z
        assert got == pytest.approx(((0.5 * (noisy > 0) + 0.6 * (noisy > 0.8)) * weight).sum(), abs=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), x)
    densities = [0.5 * stats.norm.pdf(v, 0.0, 0.3) + 0.6 * stats.norm.pdf(v, 0.8, 0.3) for v in x.tolist()]
    assert slope.tolist() == pytest.approx(densities)


def test_agreement_by_hand() -> None:
    assert mismatch.agreement(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx((0.6, 0.0))
    assert mismatch.agreement(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx((-1.0, -3.0))
    assert mismatch.agreement(torch.zeros(2), torch.tensor([1.0, 0.0])) == (0.0, -1.0)
    with pytest.raises(ValueError, match="zero"):
        mismatch.agreement(torch.ones(2), torch.zeros(2))


class _Net(nn.Module):
    """conv - half-wave quantizer - conv - linear, all but the first conv behind the quantizer."""

    def __init__(self) -> None:
        super().__init__()
        from qbench.methods.hwgq import HWGQActivation, half_wave_levels

        self.one = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.quantizer = HWGQActivation(half_wave_levels(2), "clipped")
        self.two = nn.Conv2d(4, 3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.quantizer(self.norm(self.one(x)))).mean((2, 3))


def test_mismatch_is_of_layers_in_front_of_a_quantizer() -> None:
    torch.manual_seed(0)
    net = _Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))) for _ in range(2)]
    found = mismatch.mismatch(net, batches, F.cross_entropy, ["clipped", "vanilla"])
    assert set(found) == {"0.25", "0.5", "1.0"}
    assert set(found["0.5"]["clipped"]) == {"one"}
    assert found["0.5"]["clipped"]["one"][0] > found["0.5"]["vanilla"]["one"][0] > 0.5
    assert found["0.5"]["clipped"] != found["1.0"]["clipped"]
    assert net.quantizer.backward == "clipped"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="half-wave"):
        mismatch.mismatch(nn.Linear(2, 2), batches, F.cross_entropy, ["clipped"])


# --- claims' files


def _file(folder: Path, claim: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "one.yaml"
    path.write_text("# @package _global_\nclaim:\n  " + claim.replace("\n", "\n  "))
    return path


GOOD = "says: a\nsource: b\nfirst: [method=ttq]\nsecond: [method=twn]\n"


def test_a_claim_of_one_comparison_or_of_several(tmp_path: Path) -> None:
    one = claims.read_claim(_file(tmp_path, GOOD + "test: at_least\nmargin: 0.5"), "one")
    assert one.comparisons == (
        Comparison(claim="one", name="one", first=("method=ttq",), second=("method=twn",), test="at_least", margin=0.5),
    )
    several = "- {name: x, first: [], second: [seed=1]}\n- {name: y, first: [], second: parent}"
    several = f"says: a\nsource: b\ncomparisons:\n{several}"
    many = claims.read_claim(_file(tmp_path, several), "many")
    assert [c.second for c in many.comparisons] == [("seed=1",), None]
    assert many.arms == [(), ("seed=1",)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("says: a\nsource: b", "first and second"),
        (GOOD + "sceond: [a]", "claim.sceond: no such key; did you mean second"),
        (GOOD + "test: worse", "better, at_least, equal"),
        (GOOD + "test: equal", "above 0"),
        (GOOD + "margin: -1", "above 0"),
        (GOOD + "measure: top5", "top1, drop, gradient_mismatch"),
        ("source: b\nfirst: [a]\nsecond: [b]", "claim.says"),
        ("says: a\nsource: b\nfirst: x\nsecond: [b]", "list of command-line words"),
        (GOOD + "comparisons: [{first: [a], second: [b]}]", "either"),
        ("says: a\nsource: b\ncomparisons: [{first: [a], second: [b]}, {first: [a], second: [c]}]", "different names"),
    ],
)
def test_what_a_claim_may_not_say(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        claims.read_claim(_file(tmp_path, text), "one")


FAMILY = claims.read_claims(FOLDER)


@pytest.mark.parametrize("claim", FAMILY, ids=lambda c: c.name)
def test_every_claim_opens_with_its_command_and_composes(claim: claims.Claim) -> None:
    from qbench.config import compose

    head = (FOLDER / f"{claim.name}.yaml").read_text().splitlines()[:4]
    assert head[0] == "# @package _global_"
    assert f"#   scripts/claims.py {claim.name}" in head
    (config,) = compose.configurations([f"experiment=claims/{claim.name}", *claim.arms[0]])
    assert config.claim
    assert config.claim["says"] == claim.says
    assert "claim" not in config.identity()


@pytest.mark.full
@pytest.mark.parametrize(
    ("claim", "arm"), [pytest.param(c, arm, id=f"{c.name} {' '.join(arm)}") for c in FAMILY for arm in c.arms]
)
def test_every_arm_can_be_assembled(claim: claims.Claim, arm: tuple[str, ...]) -> None:
    from qbench.config import compose
    from qbench.experiment.setup import assemble

    (config,) = compose.configurations([f"experiment=claims/{claim.name}", *arm])
    if config.dataset["name"] == "glyphs":
        config.dataset |= {"train": 200, "test": 100}
    parts = assemble(config)  # raises where a method does not know the arm's widths or options
    assert parts.method.name == config.method_name


# --- verdicts


def _run(tmp_path: Path, name: str, hits: list[int] | None, top1: float, base: RunRecord | None = None) -> RunRecord:
    path = tmp_path / name
    path.mkdir(parents=True)
    if hits is not None:
        np.save(path / "predictions.npy", np.array([[3, 3 if hit else 4] for hit in hits], dtype=np.int16))
    final = evaluation(top1)
    parent = None
    if base is not None and base.result is not None:
        parent = BaselineResult(run=base.result.run, final=base.result.final)
    values: dict[str, Any] = {"bits": {"w": 2, "a": 32, "g": 32}, "seed": 0, "dataset": "digits", "model": "resnet8"}
    result = Result(
        status="done",
        method="x",
        run=str(path),
        final=final,
        baseline=parent,
        protocol=Protocol(hash="", keys={}),
        wall_seconds=2.0,
        **values,
    )
    return RunRecord(path=path, status="done", result=result)


def _compare(test: str = "better", margin: float = 0.0, parent: bool = False) -> Comparison:
    second = None if parent else ("b",)
    return Comparison(claim="c", name="c", first=("a",), second=second, test=test, margin=margin)


def _arms(tmp_path: Path, kept: bool = True) -> tuple[dict[int, RunRecord], dict[int, RunRecord]]:
    rng = np.random.default_rng(0)
    found: list[dict[int, RunRecord]] = []
    for arm, chance in (("a", 0.9), ("b", 0.6)):
        hits = rng.random((3, 100)) < chance
        found.append(
            {s: _run(tmp_path, f"{arm}{s}", list(hits[s]) if kept else None, 100 * hits[s].mean()) for s in range(3)}
        )
    return found[0], found[1]


def test_predictions_give_the_two_way_interval_and_their_absence_the_seeds(tmp_path: Path) -> None:
    first, second = _arms(tmp_path / "with")
    judged = claims.evaluate_claim(_compare(), "top1", first, second)
    assert judged.difference
    assert judged.difference.items == 100
    assert not judged.notes
    assert judged.means
    assert judged.difference.mean == pytest.approx(judged.means[0] - judged.means[1])
    plain = claims.evaluate_claim(_compare(), "top1", *_arms(tmp_path / "without", kept=False))
    assert plain.difference
    assert plain.difference.items is None
    assert plain.difference.mean == pytest.approx(judged.difference.mean)
    assert "seeds alone" in plain.notes[0]


def test_predictions_that_contradict_the_figure_are_not_used(tmp_path: Path) -> None:
    first = {0: _run(tmp_path, "a", [1, 1, 0, 1], 75.0), 1: _run(tmp_path, "a1", [1, 1, 1, 1], 75.0)}
    second = {s: _run(tmp_path, f"b{s}", [1, 0, 0, 1], 50.0) for s in (0, 1)}
    judged = claims.evaluate_claim(_compare(), "top1", first, second)
    assert judged.difference
    assert judged.difference.items is None
    assert judged.difference.mean == 25


def test_against_the_float_parent_and_of_drops(tmp_path: Path) -> None:
    base = _run(tmp_path, "float", [1, 1, 1, 0], 75.0)
    first = {0: _run(tmp_path, "a", [1, 1, 1, 1], 100.0, base)}
    second = {0: _run(tmp_path, "b", [1, 0, 0, 0], 25.0, base)}
    against = claims.evaluate_claim(_compare(parent=True), "top1", first, {})
    assert against.difference
    assert (against.difference.mean, against.difference.items) == (25, 4)
    drops = claims.evaluate_claim(_compare(), "drop", first, second)
    assert drops.means == (25, -50)
    assert drops.difference
    assert (drops.difference.mean, drops.difference.items) == (75, 4)
    orphan = claims.evaluate_claim(_compare(parent=True), "top1", {0: _run(tmp_path, "c", None, 1.0)}, {})
    assert "no float parent" in orphan.troubles[0]


def test_what_did_not_finish_is_named_and_has_no_verdict(tmp_path: Path) -> None:
    first, second = _arms(tmp_path)
    second[1] = RunRecord(path=tmp_path, status="diverged", reason="the loss is nan\nmore")
    judged = claims.evaluate_claim(_compare(), "top1", first, second)
    claims.conclude([judged])
    assert judged.difference
    assert judged.difference.n == 2
    assert judged.outcome == "no verdict: second arm diverged in 1 of 3 seeds (1): the loss is nan"
    assert judged.p_holm is None
    nothing = {s: RunRecord(path=tmp_path, status="not begun") for s in first}
    waiting = claims.evaluate_claim(_compare(), "top1", nothing, nothing)
    claims.conclude([waiting])
    assert waiting.outcome == "not run"
    assert waiting.difference is None


def _judged(values: list[float], test: str = "better", margin: float = 0.0) -> ClaimResult:
    pairs = dict(enumerate(values))
    return claims.judge_values(_compare(test, margin), pairs, dict.fromkeys(pairs, 0.0))


def test_verdicts_of_a_family() -> None:
    good, bad = _judged([1.0, 1.1, 0.9, 1.0, 1.05]), _judged([-1.0, -1.1, -0.9, -1.0, -1.05])
    same, open_ = _judged([0.0, 0.1, -0.1, 0.05, -0.05], "equal", 0.5), _judged([0.5, -0.6, 0.9, 1.0, -0.2])
    missing = ClaimResult(comparison=_compare(), seeds=[0], troubles=["first arm not begun in 1 of 1 seeds (0)"])
    family = [good, bad, same, open_, missing]
    claims.conclude(family)
    assert [j.outcome for j in family] == ["holds", "does not hold", "holds", "not separable at 5", "not run"]
    assert int(open_.would_take) > 5
    assert good.p_holm == pytest.approx(min(5 * good.p, good.p_holm))  # type: ignore[operator,type-var]


def test_more_comparisons_make_a_verdict_harder() -> None:
    values = [1.0, 0.2, 0.9, 1.3, 0.4]
    alone, among = _judged(values), _judged(values)
    claims.conclude([alone])
    claims.conclude([among, *(ClaimResult(comparison=_compare(), seeds=[]) for _ in range(40))])
    assert alone.outcome == "holds"
    assert among.outcome == "not separable at 5"


# --- the script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = SourceFileLoader("claims_script", str(ROOT / "scripts" / "claims.py"))
    spec = importlib.util.spec_from_loader("claims_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


TINY = """\
model: {width: 4}
epochs: 1
pretrain: {epochs: 1}
runtime: {tensorboard: false, progress: false}
"""


@pytest.fixture
def two_claims(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Small claims in the place of the papers': accuracies, one with a method that does not exist; a measurement."""
    ttq: tuple[str, ...] = ("method=ttq",)
    pairs = {"w": ("method=twn",), "lossless": None, "wrong": ("method=tttq",), "wide": (*ttq, "bits=w9")}
    accuracy = [
        Comparison(claim="tiny", name=name, first=ttq, second=second, test="equal", margin=1)
        for name, second in pairs.items()
    ]
    arms = [(f"method.backward={name}",) for name in ("clipped", "vanilla")]
    own = Comparison(claim="grad", name="grad", first=arms[0], second=arms[1], test="better", margin=0)
    words = {"says": "a", "source": "b"}
    family = [
        claims.Claim(name="tiny", comparisons=tuple(accuracy), **words),
        claims.Claim(name="grad", measure="gradient_mismatch", net=("method=hwgq",), comparisons=(own,), **words),
    ]
    monkeypatch.setattr(script.kept, "read_claims", lambda folder: family)
    small = ["experiment=smoke", "runtime.tensorboard=false", "runtime.progress=false"]
    monkeypatch.setattr(script, "words_of", lambda claim, arm, out: [*small, *arm, f"out={out}"])

    def in_process(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "qbench"]
        return SimpleNamespace(returncode=cli(words[3:]))

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=in_process, DEVNULL=None))
    command = script.command
    monkeypatch.setattr(script, "command", lambda *a: [w for w in command(*a) if "launcher" not in w])
    return script


def test_from_claims_to_document(two_claims: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seeds", "0-1", "--out", "o", "--docs", "d/claims.md"]
    assert two_claims.main([*words, "--plan"]) == 0
    planned = capsys.readouterr()
    assert "| all |" in planned.out
    assert "tttq" in planned.err
    assert not (tmp_path / "o").exists()
    assert two_claims.main([*words, "--report"]) == 0
    assert "not run" in (tmp_path / "d" / "claims.md").read_text()
    assert two_claims.main(words) == 0
    text = (tmp_path / "d" / "claims.md").read_text()
    stored = json.loads((tmp_path / "o" / "claims.json").read_text())
    rows = {row["comparison"]: row for row in stored["comparisons"]}
    assert set(rows) == {"w", "lossless", "wrong", "wide", "grad"}
    assert rows["w"]["difference"]["n"] == 2
    assert rows["wrong"]["outcome"].startswith("no verdict: second arm failed in 2 of 2 seeds (0, 1): method=tttq")
    assert "unsupported in 2 of 2 seeds" in rows["wide"]["outcome"]
    assert rows["wide"]["difference"] == {}
    cosine = rows["grad"]["means"]
    assert 0 < cosine[0] <= 1
    assert list(stored["gradient_mismatch"]["grad"]) == ["0", "1"]
    assert "| sigma | layer | clipped cosine | clipped bias |" in text
    assert "qbench -m experiment=smoke" in text
    assert str(tmp_path) not in text
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("result.json")}
    assert two_claims.main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("result.json")} == before, "stored runs are found"
    assert (tmp_path / "d" / "claims.md").read_text() == text


def test_no_such_claim(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nosuch"]) == ConfigError.status
    assert "ttq_twn" in capsys.readouterr().err


def test_seeds_as_typed(script: ModuleType) -> None:
    assert script.seeds_of("0-3,7") == [0, 1, 2, 3, 7]
