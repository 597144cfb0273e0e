"""Claims: statistics against closed forms and scipy, files, verdicts, and the script from runs to document."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, tiered
from helpers import evaluation
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from qbench.analysis import gradient_mismatch as mismatch
from qbench.cli.main import main as cli
from qbench.config.identity import run_identity
from qbench.errors import ConfigError
from qbench.papers.claim_files import Claim, Comparison, read_claim, read_claims
from qbench.papers.claim_results import ClaimResult, decide_claims, evaluate_claim, evaluate_values
from qbench.report.statistics.differences import Difference, one_sided_p, paired, two_way
from qbench.report.statistics.hypothesis_tests import equivalent, evidence, holm
from qbench.report.statistics.power import seeds_needed
from qbench.runs.reader import RunRecord
from qbench.runs.result import BaselineResult, Protocol, Result

FOLDER = ROOT / "conf" / "experiment" / "claims"


# --- one value per seed


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


# --- gradient mismatch


def test_smoothed_staircase_is_the_expectation() -> None:
    thresholds, levels = torch.tensor([0.0, 0.8], dtype=torch.double), torch.tensor([0.0, 0.5, 1.1], dtype=torch.double)
    x = torch.linspace(-1, 2, 7, dtype=torch.double, requires_grad=True)
    y = mismatch.smoothed_staircase(x, thresholds, levels, 0.3)
    z = np.linspace(-8, 8, 200_001)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    for value, got in zip(x.tolist(), y.tolist(), strict=True):
        noisy = value + 0.3 * z
        assert got == pytest.approx(((0.5 * (noisy > 0) + 0.6 * (noisy > 0.8)) * weight).sum(), abs=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), x)
    densities = [0.5 * stats.norm.pdf(v, 0.0, 0.3) + 0.6 * stats.norm.pdf(v, 0.8, 0.3) for v in x.tolist()]
    assert slope.tolist() == pytest.approx(densities)


def test_cosine_and_bias_by_hand() -> None:
    assert mismatch.cosine_and_bias(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx((0.6, 0.0))
    assert mismatch.cosine_and_bias(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx((-1.0, -3.0))
    assert mismatch.cosine_and_bias(torch.zeros(2), torch.tensor([1.0, 0.0])) == (0.0, -1.0)
    with pytest.raises(ValueError, match="zero"):
        mismatch.cosine_and_bias(torch.ones(2), torch.zeros(2))


class _Net(nn.Module):
    """conv - batch norm - half-wave quantizer - conv: only the first conv's gradient comes through the quantizer."""

    def __init__(self) -> None:
        super().__init__()
        from qbench.methods.hwgq import HWGQActivation, half_wave_levels

        self.one = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.quantizer = HWGQActivation(half_wave_levels(2), "clipped")
        self.two = nn.Conv2d(4, 3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.quantizer(self.norm(self.one(x)))).mean((2, 3))


def test_mismatch_of_layers_before_a_quantizer() -> None:
    torch.manual_seed(0)
    net = _Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))) for _ in range(2)]
    found = mismatch.gradient_mismatch(net, batches, F.cross_entropy, ["clipped", "vanilla"])
    assert set(found) == {"0.25", "0.5", "1.0"}
    assert set(found["0.5"]["clipped"]) == {"one"}
    assert found["0.5"]["clipped"]["one"][0] > found["0.5"]["vanilla"]["one"][0] > 0.5
    assert found["0.5"]["clipped"] != found["1.0"]["clipped"]
    assert net.quantizer.backward == "clipped"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="half-wave"):
        mismatch.gradient_mismatch(nn.Linear(2, 2), batches, F.cross_entropy, ["clipped"])


# --- claim files


def _file(folder: Path, claim: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "one.yaml"
    path.write_text("# @package _global_\nclaim:\n  " + claim.replace("\n", "\n  "))
    return path


GOOD = "says: a\nsource: b\nfirst: [method=ttq]\nsecond: [method=twn]\n"


def test_a_claim_of_one_comparison_or_of_several(tmp_path: Path) -> None:
    one = read_claim(_file(tmp_path, GOOD + "test: at_least\nmargin: 0.5"), "one")
    assert one.comparisons == (
        Comparison(claim="one", name="one", first=("method=ttq",), second=("method=twn",), test="at_least", margin=0.5),
    )
    several = "- {name: x, first: [], second: [seed=1]}\n- {name: y, first: [], second: baseline}"
    several = f"says: a\nsource: b\ncomparisons:\n{several}"
    many = read_claim(_file(tmp_path, several), "many")
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
        ("says: a\nsource: b\nfirst: x\nsecond: [b]", "list of command-line arguments"),
        (GOOD + "comparisons: [{first: [a], second: [b]}]", "or a list `comparisons`"),
        ("says: a\nsource: b\ncomparisons: [{first: [a], second: [b]}, {first: [a], second: [c]}]", "different names"),
    ],
)
def test_wrong_claims_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_claim(_file(tmp_path, text), "one")


FAMILY = read_claims(FOLDER)


@pytest.mark.parametrize("claim", tiered(FAMILY, FAMILY[::3]), ids=lambda c: c.name)
def test_every_claim_file_states_its_command_and_composes(claim: Claim) -> None:
    from qbench.config import compose

    head = (FOLDER / f"{claim.name}.yaml").read_text().splitlines()[:4]
    assert head[0] == "# @package _global_"
    assert f"#   scripts/claims.py {claim.name}" in head
    (config,) = compose.configurations([f"experiment=claims/{claim.name}", *claim.arms[0]])
    assert config.claim
    assert config.claim["says"] == claim.says
    assert "claim" not in run_identity(config).keys


@pytest.mark.full
@pytest.mark.parametrize(
    ("claim", "arm"), [pytest.param(c, arm, id=f"{c.name} {' '.join(arm)}") for c in FAMILY for arm in c.arms]
)
def test_every_arm_can_be_assembled(claim: Claim, arm: tuple[str, ...]) -> None:
    from qbench.config import compose
    from qbench.experiment.setup import assemble

    (config,) = compose.configurations([f"experiment=claims/{claim.name}", *arm])
    if config.dataset["name"] == "glyphs":
        config.dataset |= {"train": 200, "test": 100}
    setup = assemble(config)  # raises if the method does not support the arm's widths or options
    assert setup.method.name == config.method_name


# --- verdicts


def _run(tmp_path: Path, name: str, hits: list[int] | None, top1: float, base: RunRecord | None = None) -> RunRecord:
    path = tmp_path / name
    path.mkdir(parents=True)
    if hits is not None:
        np.save(path / "predictions.npy", np.array([[3, 3 if hit else 4] for hit in hits], dtype=np.int16))
    final = evaluation(top1)
    baseline = None
    if base is not None and base.result is not None:
        baseline = BaselineResult(run=base.result.run, final=base.result.final)
    values: dict[str, Any] = {"bits": {"w": 2, "a": 32, "g": 32}, "seed": 0, "dataset": "digits", "model": "resnet8"}
    result = Result(
        status="done",
        method="x",
        run=str(path),
        final=final,
        baseline=baseline,
        protocol=Protocol(hash="", keys={}),
        wall_seconds=2.0,
        **values,
    )
    return RunRecord(path=path, status="done", result=result)


def _compare(test: str = "better", margin: float = 0.0, baseline: bool = False) -> Comparison:
    second = None if baseline else ("b",)
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


def test_predictions_give_the_two_way_interval_else_seeds_only(tmp_path: Path) -> None:
    first, second = _arms(tmp_path / "with")
    result = evaluate_claim(_compare(), "top1", first, second)
    assert result.difference
    assert result.difference.items == 100
    assert not result.notes
    assert result.means
    assert result.difference.mean == pytest.approx(result.means[0] - result.means[1])
    plain = evaluate_claim(_compare(), "top1", *_arms(tmp_path / "without", kept=False))
    assert plain.difference
    assert plain.difference.items is None
    assert plain.difference.mean == pytest.approx(result.difference.mean)
    assert "variation between seeds but not between test images" in plain.notes[0]


def test_predictions_that_contradict_the_accuracy_are_not_used(tmp_path: Path) -> None:
    first = {0: _run(tmp_path, "a", [1, 1, 0, 1], 75.0), 1: _run(tmp_path, "a1", [1, 1, 1, 1], 75.0)}
    second = {s: _run(tmp_path, f"b{s}", [1, 0, 0, 1], 50.0) for s in (0, 1)}
    result = evaluate_claim(_compare(), "top1", first, second)
    assert result.difference
    assert result.difference.items is None
    assert result.difference.mean == 25


def test_against_the_float_baseline_and_for_drops(tmp_path: Path) -> None:
    base = _run(tmp_path, "float", [1, 1, 1, 0], 75.0)
    first = {0: _run(tmp_path, "a", [1, 1, 1, 1], 100.0, base)}
    second = {0: _run(tmp_path, "b", [1, 0, 0, 0], 25.0, base)}
    against = evaluate_claim(_compare(baseline=True), "top1", first, {})
    assert against.difference
    assert (against.difference.mean, against.difference.items) == (25, 4)
    drops = evaluate_claim(_compare(), "drop", first, second)
    assert drops.means == (25, -50)
    assert drops.difference
    assert (drops.difference.mean, drops.difference.items) == (75, 4)
    orphan = evaluate_claim(_compare(baseline=True), "top1", {0: _run(tmp_path, "c", None, 1.0)}, {})
    assert "no float baseline" in orphan.problems[0]


def test_unfinished_runs_are_named_and_give_no_verdict(tmp_path: Path) -> None:
    first, second = _arms(tmp_path)
    second[1] = RunRecord(path=tmp_path, status="diverged", reason="the loss is nan\nmore")
    result = evaluate_claim(_compare(), "top1", first, second)
    decide_claims([result])
    assert result.difference
    assert result.difference.n == 2
    assert result.outcome == "no verdict: second arm diverged in 1 of 3 seeds (1): the loss is nan"
    assert result.p_holm is None
    nothing = {s: RunRecord(path=tmp_path, status="not started") for s in first}
    waiting = evaluate_claim(_compare(), "top1", nothing, nothing)
    decide_claims([waiting])
    assert waiting.outcome == "not run"
    assert waiting.difference is None


def _evaluated(values: list[float], test: str = "better", margin: float = 0.0) -> ClaimResult:
    pairs = dict(enumerate(values))
    return evaluate_values(_compare(test, margin), pairs, dict.fromkeys(pairs, 0.0))


def test_verdicts_over_all_comparisons() -> None:
    good, bad = _evaluated([1.0, 1.1, 0.9, 1.0, 1.05]), _evaluated([-1.0, -1.1, -0.9, -1.0, -1.05])
    same, open_ = _evaluated([0.0, 0.1, -0.1, 0.05, -0.05], "equal", 0.5), _evaluated([0.5, -0.6, 0.9, 1.0, -0.2])
    missing = ClaimResult(comparison=_compare(), seeds=[0], problems=["first arm not started in 1 of 1 seeds (0)"])
    family = [good, bad, same, open_, missing]
    decide_claims(family)
    assert [j.outcome for j in family] == ["holds", "does not hold", "holds", "undecided with 5 seeds", "not run"]
    assert int(open_.seeds_needed) > 5
    assert good.p_holm == pytest.approx(min(5 * good.p, good.p_holm))  # type: ignore[operator,type-var]


def test_more_comparisons_make_a_verdict_less_likely() -> None:
    values = [1.0, 0.2, 0.9, 1.3, 0.4]
    alone, among = _evaluated(values), _evaluated(values)
    decide_claims([alone])
    decide_claims([among, *(ClaimResult(comparison=_compare(), seeds=[]) for _ in range(40))])
    assert alone.outcome == "holds"
    assert among.outcome == "undecided with 5 seeds"


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
    """Small claims instead of the papers': accuracies, one with a method that does not exist; and a mismatch."""
    ttq: tuple[str, ...] = ("method=ttq",)
    pairs = {"w": ("method=twn",), "lossless": None, "wrong": ("method=tttq",), "wide": (*ttq, "bits=w9")}
    accuracy = [
        Comparison(claim="tiny", name=name, first=ttq, second=second, test="equal", margin=1)
        for name, second in pairs.items()
    ]
    arms = [(f"method.backward={name}",) for name in ("clipped", "vanilla")]
    backward = Comparison(claim="grad", name="grad", first=arms[0], second=arms[1], test="better", margin=0)
    words = {"says": "a", "source": "b"}
    family = [
        Claim(name="tiny", comparisons=tuple(accuracy), **words),
        Claim(name="grad", measure="gradient_mismatch", net=("method=hwgq",), comparisons=(backward,), **words),
    ]
    monkeypatch.setattr(script.claim_files, "read_claims", lambda folder: family)
    small = ["experiment=smoke", "runtime.tensorboard=false", "runtime.progress=false"]
    monkeypatch.setattr(script, "arm_words", lambda claim, arm, out: [*small, *arm, f"out={out}"])

    def in_process(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "qbench"]
        return SimpleNamespace(returncode=cli(words[3:]))

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=in_process, DEVNULL=None))
    sweep_words = script.sweep_words
    monkeypatch.setattr(script, "sweep_words", lambda *a: [w for w in sweep_words(*a) if "launcher" not in w])
    return script


@pytest.mark.full
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
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("result.json")} == before, "stored runs are reused"
    assert (tmp_path / "d" / "claims.md").read_text() == text
    assert two_claims.main([*words, "--report", "--record", "r.json"]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    done = [run for run in record["runs"] if run["status"] == "done"]
    assert done
    assert all(run["result"]["weights_sha256"] and run["hits"] for run in done)
    shutil.rmtree(tmp_path / "o")
    assert two_claims.main([*words[:-1], "d/again.md", "--from", "r.json"]) == 0
    assert (tmp_path / "d" / "again.md").read_text() == text, "the record alone gives the same document"


def test_an_unknown_claim_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nosuch"]) == ConfigError.status
    assert "ttq_twn" in capsys.readouterr().err


def test_seeds_are_parsed(script: ModuleType) -> None:
    assert script.parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
