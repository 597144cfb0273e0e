"""Claims: files, gradient mismatch, verdicts, and the script from runs to document."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, tiered
from helpers import evaluation
from scipy import stats
from torch import nn
from torch.nn import functional as F

from qbench.analysis import gradient_mismatch as mismatch
from qbench.cli.main import main as cli
from qbench.config.identity import run_identity
from qbench.errors import ConfigError
from qbench.papers.claim_files import Claim, Comparison, read_claim, read_claims
from qbench.papers.claim_results import ClaimResult, decide_claims, evaluate_claim, evaluate_values
from qbench.runs.reader import RunRecord
from qbench.runs.result import BaselineResult, Protocol, Result

FOLDER = ROOT / "conf" / "experiment" / "claims"


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


def test_mismatch_does_not_depend_on_dropout_masks() -> None:
    torch.manual_seed(0)
    net = _Net()
    net.two = nn.Sequential(nn.Dropout(0.3), net.two)  # type: ignore[assignment]
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))]
    one, other = (mismatch.gradient_mismatch(net, batches, F.cross_entropy, ["clipped"]) for _ in range(2))
    assert one == other
    assert set(one["0.5"]["clipped"]) == {"one"}, "the layer after the quantizer has the same gradient"


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


ARMS = {"a": [1, 1, 1, 0], "b": [1, 1, 0, 0]}


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


def test_an_arm_without_further_options_is_an_arm(tmp_path: Path) -> None:
    """`second: []` is the run of the experiment file, and no second arm at all is the float baseline."""
    base = _run(tmp_path, "float", [1, 1, 1, 1], 100.0)
    first, second = ({0: _run(tmp_path, name, hits, 25.0 * sum(hits), base)} for name, hits in ARMS.items())
    unchanged = evaluate_claim(replace(_compare(), second=()), "top1", first, second)
    assert unchanged.means == (75, 50)
    assert evaluate_claim(_compare(baseline=True), "top1", first, {}).means == (75, 100)


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
