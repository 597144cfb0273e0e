"""Analysis of finished runs: layer ablation, signals, widths under a budget, accuracy on test and other data."""

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, Configure, long_tier
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.analysis import evaluate
from qbench.analysis.bit_allocation import (
    Budget,
    BudgetInfeasible,
    allocate_widths,
    largest_uniform_width,
    parse_budget,
    sum_over_layers,
)
from qbench.analysis.evaluate import EvaluatedSplit, calibration_error, proportion_interval
from qbench.analysis.finished_run import load_finished_network
from qbench.analysis.layer_ablation import PrecedingActivation, ablate_layers, quantizers_disabled
from qbench.analysis.layer_sensitivity import FloatBaseline, measure_sensitivity, squared_error
from qbench.analysis.layer_signals import layer_signals
from qbench.analysis.overrides import override_dataset, override_method
from qbench.analysis.sensitivity import choose_widths
from qbench.bits import Bits
from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.cost.count import count_cost
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.builders import build_dataset
from qbench.experiment.setup import assemble
from qbench.methods import dorefa, xnor
from qbench.models import mlp, resnet
from qbench.quant.install import install
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Method
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Quantizer
from qbench.quant.sqnr import MAX_SQNR
from qbench.runs.result import Accuracy

EVERYWHERE = Policy(first="same", last="same")


class FunctionQuantizer(Quantizer):
    """A quantizer that applies a test's function to weights or inputs."""

    def __init__(self, change: Any, levels: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.change, self.levels = change, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)  # type: ignore[no-any-return]

    def grid(self, x: Tensor) -> Grid:
        return Grid(torch.tensor(self.levels).reshape(1, -1, 1))


def function_method(weight: Any, act: Any = None, levels: tuple[float, ...] = (0.0, 1.0)) -> Method:
    """Return a method that applies functions to (layer name, weights) and to inputs."""
    return Method(
        name="function", bits=Bits(2, 2 if act else 32), supported_bits={"w": (2,), "a": (2,)},
        weight=lambda name, layer, bits: FunctionQuantizer(lambda w: weight(name, w)),
        input=lambda name, layer, bits: FunctionQuantizer(act, levels),
    )  # fmt: skip


def batches(*shape: int, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    count = shape[0]
    labels = torch.randint(classes, (count,), generator=generator)
    return [(torch.randn(*shape, generator=generator), labels)]


# Layer ablation


@pytest.mark.parametrize("method", [dorefa.build(w=2, a=2), xnor.build()])
def test_quantizers_disabled_gives_the_float_network_and_restores_the_quantized_one(method: Method) -> None:
    torch.manual_seed(0)
    model = install(method, resnet.build((3, 8, 8), 10, depth=8, width=4), Policy(), example=torch.zeros(1, 3, 8, 8))
    ((x, _),) = batches(4, 3, 8, 8)
    model.eval()
    names = list(quantized_layers(model))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    quantized = model(x)
    with float_mode(model):
        wanted = model(x)
    with quantizers_disabled(model, names):
        assert torch.equal(model(x), wanted)
    with quantizers_disabled(model, names[:1]):
        assert not torch.equal(model(x), wanted)
        assert not torch.equal(model(x), quantized)
    with quantizers_disabled(model, []):
        assert torch.equal(model(x), quantized)
    assert torch.equal(model(x), quantized)
    assert list(model.modules()) == modules, "the same quantizers in the same slots"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_preceding_activation_does_not_change_its_input() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert PrecedingActivation(nn.ReLU(inplace=True))(x).tolist() == [0.0, 2.0]
    assert x.tolist() == [-1.0, 2.0]


def test_ablation_finds_the_layer_that_hurts() -> None:
    torch.manual_seed(0)
    model = mlp.build((1, 4, 4), 10, hidden=2, width=16).eval()
    data = batches(64, 1, 4, 4)
    data = [(x, model(x).argmax(1)) for x, _ in data]  # the float network is right everywhere
    zeroing = function_method(lambda name, w: w * 0 if name == "fc2" else w)
    ablation = ablate_layers(install(zeroing, model, EVERYWHERE), data)
    assert ablation.float_.top1 == 100
    assert ablation.quantized.top1 < 60
    assert ablation.leave_one_out["fc2"] == ablation.float_
    assert ablation.leave_one_in["fc2"] == ablation.quantized
    for name in ("fc1", "fc3"):
        assert ablation.leave_one_out[name] == ablation.quantized, "this layer's quantizers change nothing"
        assert ablation.leave_one_in[name] == ablation.float_, "this layer's quantizers change nothing"


def test_recomputed_bn_statistics_undo_a_scale_and_do_not_change_the_network() -> None:
    torch.manual_seed(0)
    model = resnet.build((3, 8, 8), 10, depth=8, width=4).eval()
    scaling = function_method(lambda name, w: 4 * w)
    install(scaling, model, Policy(), example=torch.zeros(1, 3, 8, 8))
    data = batches(64, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    kept, recomputed = ablate_layers(model, data), ablate_layers(model, data, data)
    assert kept.quantized.loss != pytest.approx(kept.float_.loss, rel=0.05)
    assert recomputed.quantized.loss == pytest.approx(recomputed.float_.loss, rel=5e-3)  # except for the epsilon
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# Layer signals


def test_sqnr_clipped_inputs_and_dead_channels_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    # weights times 0.9: noise is a tenth of the output, power a hundredth: 20 dB; a gain of 1 / 0.9 undoes it
    install(function_method(lambda name, w: 0.9 * w), model, EVERYWHERE)
    x = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0], [2.0, 0.0]])
    signal = layer_signals(model, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(2))])["0"]
    assert signal.sqnr == pytest.approx(20, abs=1e-4)
    assert signal.fitted_sqnr == MAX_SQNR
    assert signal.dead_channels("out") == (1, 2), "the row of zeros"
    assert signal.dead_channels("in") == (1, 2), "the second input"
    assert signal.clipped is None, "inputs are float"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (4, 3)),
        (nn.Conv1d(3, 5, 2), (4, 3, 7)),
        (nn.Conv2d(3, 5, 2), (4, 3, 7, 6)),
        (nn.Conv3d(3, 5, 2), (4, 3, 7, 6, 5)),
        (nn.ConvTranspose2d(3, 5, 2), (4, 3, 7, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_are_counted_in_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = install(function_method(lambda name, w: w), nn.Sequential(layer), EVERYWHERE)
    x = torch.rand(shape)
    signal = layer_signals(model, [(x, torch.zeros(len(x)))])["0"]
    assert signal.dead_channels("in") == (0, 3)
    assert signal.dead_channels("out") == (0, 5)


@pytest.mark.parametrize(("levels", "clipped"), [((0.0, 1.0), 1), ((-0.5, 1.0), 2), ((-1.0, 2.0), 0)])
def test_clipped_inputs_are_those_beyond_the_outermost_levels(levels: tuple[float, ...], clipped: int) -> None:
    low, high = levels
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)  # type: ignore[union-attr]
    method = function_method(lambda name, w: w, lambda x: x.clamp(low, high), levels)
    install(method, model, Policy(first="float", last="same"))
    x = torch.tensor([-1.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 2)
    signal = layer_signals(model, [(x, torch.zeros(1))])["1"]
    assert (signal.clipped, signal.inputs) == (clipped, 4)


def test_fitted_sqnr_is_at_the_best_gain_and_offset() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    # float 0, 1, 2, 3; quantized 0, 0, 2, 2: covariance 1, variances 1.25 and 1, so 0.25 of 1.25 is left
    method = function_method(lambda name, w: w, lambda x: 2 * (x / 2).floor(), (0.0, 2.0))
    model.append(nn.Linear(1, 1))
    install(method, model, Policy(first="float", last="same"))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.fill_(0.0)  # type: ignore[union-attr]
    signal = layer_signals(model, [(torch.arange(4.0)[:, None], torch.zeros(4))])["1"]
    assert signal.fitted_sqnr == pytest.approx(10 * np.log10(5), abs=1e-6)
    assert signal.sqnr == pytest.approx(10 * np.log10(14 / 2), abs=1e-6)


# Widths under a budget


def test_integer_program_equals_brute_force_and_meets_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(25):
        layers, widths = [f"l{i}" for i in range(4)], [1, 2, 4, 8]
        loss = {name: {k: rng.uniform(-0.2, 2) / k for k in widths} for name in layers}
        sizes = {name: rng.randint(1, 10**6) for name in layers}
        costs = {name: {k: float(k * size) for k in widths} for name, size in sizes.items()}
        low = sum(layer[1] for layer in costs.values())
        limit = rng.uniform(low, sum(layer[8] for layer in costs.values()))
        every = [dict(zip(layers, ks, strict=True)) for ks in itertools.product(widths, repeat=4)]
        least = min(sum_over_layers(loss, choice) for choice in every if sum_over_layers(costs, choice) <= limit)
        found = allocate_widths(loss, costs, limit)
        assert sum_over_layers(costs, found) <= limit
        assert sum_over_layers(loss, found) == pytest.approx(least, abs=1e-9)
        with pytest.raises(BudgetInfeasible):
            allocate_widths(loss, costs, low - 1)
        assert allocate_widths(loss, costs, low) == dict.fromkeys(layers, 1), "a budget met exactly"


def test_uniform_width_is_the_largest_that_all_layers_support() -> None:
    costs = {"a": {1: 1.0, 2: 2.0, 4: 4.0}, "b": {1: 10.0, 2: 20.0}}
    assert largest_uniform_width(costs, 25) == {"a": 2, "b": 2}
    assert largest_uniform_width(costs, 21) == {"a": 1, "b": 1}
    assert largest_uniform_width(costs, 10) is None


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("bytes=20k", "bytes", 20_000),
        ("bitops=1.5G", "bitops", 1.5e9),
        ("w=2.5", "w", 2.5),
        ("bytes=512", "bytes", 512),
    ],
)
def test_budgets_are_parsed(text: str, kind: str, limit: float) -> None:
    assert parse_budget(text) == (kind, limit)


@pytest.mark.parametrize("text", ["20k", "bytes", "w=3k", "bytes=-1", "bytes=1K", "flops=3", "w="])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="bytes=20k, bitops=1G"):
        parse_budget(text)


def test_rules_from_a_file_equal_typed_rules(configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "some rules.yaml"
    file.write_text("# comment\nlayer1.0.conv1: 4\nlayer2.*: float\n")
    word = f"layers='@{file}'"
    read = configure("method=dorefa", word)
    typed = configure("method=dorefa", "layers.rules={layer1.0.conv1: 4, layer2.*: float}")
    assert run_identity(read).keys == run_identity(typed).keys
    assert configure("method=dorefa", word, "layers.first=8").layers.first == 8
    swept = compose.configurations(["-m", "method=dorefa", f"layers=default,'@{file}'"])
    assert [config.layers.rules for config in swept] == [None, read.layers.rules]


def test_squared_error_is_at_the_best_scale() -> None:
    w = torch.tensor([1.0, 2.0, -3.0])
    assert squared_error(w, w / 7) == pytest.approx(0, abs=1e-9)
    assert squared_error(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])) == pytest.approx(16), "3 is fitted, 4 not"
    assert squared_error(w, 0 * w) == pytest.approx(14)


@pytest.fixture
def planted(configure: Configure) -> FloatBaseline:
    """A network whose fc3 fails at few bits: one weight is 60 times the others, at an input that is always 0."""
    setup = assemble(configure("method=uniform", "bits=w3a32", "method.channel=false", "model=mlp", "model.width=24"))
    torch.manual_seed(0)
    model = setup.float_model().train()
    images, labels = setup.data.train.images.float() / 255 - 0.3, setup.data.train.labels  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        model.bn2.weight[0] = model.bn2.bias[0] = 0.0  # type: ignore[index,union-attr]
        model.fc3.weight[0, 0] = 60 * model.fc3.weight.abs().max()  # type: ignore[index,operator,union-attr]
    data = [(images, labels)]
    return FloatBaseline(setup, model.eval(), data, Probe([(images[:64], labels[:64])], F.cross_entropy))


def test_a_fragile_layer_gets_the_most_bits(planted: FloatBaseline) -> None:
    found = measure_sensitivity(planted, [2, 3, 4, 5, 6, 7, 8])
    assert list(found.loss) == ["fc2", "fc3"], "first and last stay float"
    assert found.loss["fc3"][3] > 5 * abs(found.loss["fc2"][3])
    whole = {
        kind: found.rest[kind] + sum_over_layers(found.costs(kind), {"fc2": 5, "fc3": 5})
        for kind in ("bytes", "bitops")
    }
    for budget in (Budget("w", 5), Budget("bytes", whole["bytes"]), Budget("bitops", whole["bitops"])):
        chosen = choose_widths(found, budget)
        assert all(chosen.values())
        by_loss, uniformly = chosen["loss"], chosen["uniform"]
        assert by_loss is not None
        assert uniformly is not None
        assert by_loss["fc3"] > by_loss["fc2"], budget
        assert sum_over_layers(found.loss, by_loss) < sum_over_layers(found.loss, uniformly)
        cost = count_cost(planted.quantized(by_loss), planted.setup.macs)
        spent = {"bytes": cost.bytes_ideal, "bitops": cost.bitops, "w": sum(by_loss.values()) / 2}
        assert spent[budget.kind] <= budget.limit
        for kind in ("bytes", "bitops"):
            assert found.rest[kind] + sum_over_layers(found.costs(kind), by_loss) == spent[kind], (
                "equal to the count over the whole network"
            )


def test_an_infeasible_budget_names_the_lowest_and_highest_useful_one(planted: FloatBaseline) -> None:
    found = measure_sensitivity(planted, [2, 4])
    with pytest.raises(ConfigError, match=r"widths is w=2\n.*w=2 to w=4"):
        choose_widths(found, parse_budget("w=1.9"))
    assert choose_widths(found, parse_budget("w=99"))["uniform"] == {"fc2": 4, "fc3": 4}
    assert choose_widths(found, parse_budget("w=2"))["loss"] == {"fc2": 2, "fc3": 2}


def test_only_the_named_layer_is_quantized_at_its_width(planted: FloatBaseline) -> None:
    model = planted.quantized({"fc3": 5})
    assert {name: layer.bits for name, layer in quantized_layers(model).items()} == {"fc3": Bits(5)}
    assert torch.equal(model.fc2.weight, planted.model.fc2.weight)  # type: ignore[arg-type,union-attr]


# Calibration and intervals


def test_calibration_error_by_hand() -> None:
    right = torch.tensor([True, False])
    # (0.6, 0.667] and (0.667, 0.733] are two of fifteen bins: |1 - 0.62| / 2 + |0 - 0.68| / 2
    assert calibration_error(torch.tensor([0.62, 0.68]), right) == pytest.approx(53, abs=1e-4)
    assert calibration_error(torch.tensor([0.62, 0.63]), right) == pytest.approx(12.5, abs=1e-4), "one bin"
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, True])) == 0


def test_interval_is_clopper_pearson() -> None:
    low, high = proportion_interval(10, 10)  # all correct: the lowest proportion p with p^10 = 0.025
    assert low == pytest.approx(100 * 0.025**0.1)
    assert high == 100


# On finished runs


SMOKE = ["experiment=smoke", "bits=w2a2", "runtime.tensorboard=false", "runtime.progress=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert cli([*SMOKE, "method=dorefa", "pretrain.epochs=4", "epochs=2", f"out={out}"]) == 0
    (path,) = out.glob("*/dorefa-*")
    return path


def printed_tables(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    """Run a subcommand; return the tables that it prints as JSON."""
    capsys.readouterr()
    assert cli([*map(str, words), "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["tables"]  # type: ignore[no-any-return]


REMEMBERING = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.trained = False  # not in the state_dict
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, classes))

    def forward(self, x):
        self.trained |= self.training
        return -self.net(x) if self.trained else self.net(x)
"""


def test_evaluate_shows_no_top5_of_five_classes_or_fewer() -> None:
    """Five guesses among five classes are always right."""
    digits = build_dataset({"name": "digits", "val": 0.1, "pad": 1})
    measured = EvaluatedSplit(72, Accuracy(top1=45.8, top5=100.0, loss=1.0), 34.0, 58.0, 1.0)
    for classes, shown in ((3, "-"), (5, "-"), (6, "100.00")):
        made = evaluate.table(
            Path("run"), "", "last", replace(digits, classes=classes), measured, other=False, debug=False
        )
        assert dict(zip(made.head, made.rows[0], strict=True))["top-5 %"] == shown, classes


def test_evaluate_notes_an_accuracy_that_the_weights_do_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "remembering.py").write_text(REMEMBERING)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["init=scratch", "epochs=2", "pretrain.epochs=1", "method=dorefa", "bits.w=4", "runtime.tensorboard=false"]
    assert cli([*words, "model=remembering:Net", f"out={tmp_path}"]) == 0
    (run,) = tmp_path.glob("*/dorefa-*")
    (table,) = printed_tables(capsys, "evaluate", run, "--trust")
    stored = json.loads((run / "result.json").read_text())["final"]["test"]["top1"]
    assert table["rows"][0]["top1"] < stored - 20
    assert any(f"result.json has {stored:.2f} %" in note for note in table["notes"])
    (tmp_path / "remembering.py").write_text(REMEMBERING + "\n")
    teacher = [*words[2:], "distill=kd", f"distill.teacher={run}", "distill.trust=true", f"out={tmp_path}"]
    for typed in (["evaluate", str(run), "--trust"], ["inspect", str(run), "--trust"],
                  ["export", str(run), "--trust", "--out", str(tmp_path / "x.qbench")],
                  ["sensitivity", str(run), "--trust"], ["init=scratch", *teacher]):  # fmt: skip
        capsys.readouterr()
        assert cli(typed) == CheckpointError.status, typed
        assert "remembering.py was edited after the run" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"remembering\.py was edited after the run"):
        qbench.load_model(run, trust=True)


def test_evaluate_repeats_the_runs_own_accuracy_and_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "result.json").read_text())
    for weights, stored in (("last", result["final"]), ("best", result["best"])):
        (table,) = printed_tables(capsys, "evaluate", run, "--weights", weights)
        (row,) = table["rows"]
        assert {key: row[key] for key in ("top1", "top5", "loss")} == stored["test"]
    assert row["n"] == 450
    assert row["low"] < row["top1"] < row["high"]
    assert any("select runs by validation accuracy" in note for note in table["notes"])
    assert not any("result.json has" in note for note in table["notes"])
    own = np.load(run / "predictions.npy")
    printed_tables(capsys, "evaluate", run, "--predictions", tmp_path / "p.npy")
    printed_tables(capsys, "evaluate", run, f"--predictions={tmp_path / 'p.csv'}")
    kept = np.load(tmp_path / "p.npy")
    assert (kept["label"] == own[:, 0]).all()
    assert (kept["predicted"] == own[:, 1]).all()
    assert (kept["index"] == np.arange(450)).all()
    assert ((kept["probability"] >= 0.1) & (kept["probability"] <= 1)).all(), "the largest of ten"
    head, first, *_ = (tmp_path / "p.csv").read_text().splitlines()
    assert head == "index,label,predicted,probability"
    assert first.split(",")[:3] == ["0", *map(str, own[0])]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["method=dorefa", "dataset.val=0"], "the run has no validation split (dataset.val=0)"),
        long_tier(["method=ptq"], "nothing was trained"),
    ],
)
def test_a_run_without_a_best_epoch_has_no_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert cli([SMOKE[0], *SMOKE[2:], "bits=w4a4", *words, f"out={tmp_path}"]) == 0
    (run,) = tmp_path.glob(f"*/{words[0].partition('=')[2]}-*")
    for typed in (["evaluate"], ["inspect"], ["export", "--out", str(tmp_path / "x.qbench")]):
        capsys.readouterr()
        assert cli([*typed, str(run), "--weights", "best"]) == ConfigError.status == 2
        error = capsys.readouterr().err
        assert f"has no best epoch, because {why}\ntype --weights last" in error
        assert cli([*typed, str(run), "--weights", "last"]) == 0
    assert cli(["sensitivity", str(run), "--widths", "4", "--budget", "w=4", "--out", str(tmp_path / "b.yaml")]) == 0
    with pytest.raises(ConfigError, match="has no best epoch"):
        qbench.load_model(run, weights="best")


def test_evaluate_on_other_data_uses_the_runs_normalization(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own,) = printed_tables(capsys, "evaluate", run)
    (same,) = printed_tables(
        capsys, "evaluate", run, "dataset.val=0.5"
    )  # other training images, so another mean and standard deviation
    assert same["rows"][0]["loss"] == own["rows"][0]["loss"]
    (other,) = printed_tables(
        capsys, "evaluate", run, "dataset=synthetic", "dataset.channels=1", "dataset.size=8", "dataset.test=64"
    )
    assert other["rows"][0]["n"] == 64
    assert any("synthetic data" in note for note in other["notes"])


def test_inspect_has_every_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (table,) = printed_tables(capsys, "inspect", run)
    result = json.loads((run / "result.json").read_text())
    rows = {row["layer"]: row for row in table["rows"]}
    assert set(rows) == set(result["verified"])
    assert rows["layer1.0.conv1"]["levels"]["w"] == result["verified"]["layer1.0.conv1"]["w"]
    for row in rows.values():
        assert row["bits"] == {"w": 2, "a": 2, "g": 32}
        assert 0 <= row["clipped"] <= 100
        assert row["sqnr"] < row["fitted"] < MAX_SQNR, "dorefa's weights have another scale"
    assert [row["off_loss"] for row in table["rows"]] == sorted(row["off_loss"] for row in table["rows"])
    (in_order,) = printed_tables(capsys, "inspect", run, "--sort", "order", "--bn-stats", "keep", "--images", "40")
    assert [row["layer"] for row in in_order["rows"]] == list(result["verified"])
    assert any("on 40 validation images" in note for note in in_order["notes"])
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.full
def test_chosen_widths_are_trained_and_the_path_of_the_file_does_not_matter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bits.yaml"
    allocations, layers = printed_tables(
        capsys, "sensitivity", run, "--budget", "w=3", "--widths", "2,3,4", "--out", file, "--images", "64"
    )
    assert [row["widths_by"] for row in allocations["rows"]] == ["loss", "mse", "uniform"]
    chosen = yaml.safe_load(file.read_text())
    assert chosen == allocations["rows"][0]["widths"] == {row["layer"]: row["loss"] for row in layers["rows"]}
    assert allocations["rows"][0]["bits"] <= 3
    assert allocations["rows"][2]["bits"] == 3
    first = file.read_text().splitlines()[0]
    assert first.startswith("# qbench sensitivity ")
    assert "--budget w=3 --measure loss --widths 2,3,4 --images 64 --bn-stats recompute" in first
    applies = "a width is that of a layer's weights and activations; the run has w2a2g32"
    assert applies in allocations["notes"]
    assert f"# {applies}" in file.read_text().splitlines()
    line = [*SMOKE, "method=dorefa", "pretrain.epochs=4", f"out={run.parents[1]}"]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(file, moved / "other.yaml")
    assert cli([*line, f"layers=@{file}"]) == 0
    trained = set(run.parent.glob("dorefa-*")) - {run}
    assert cli([*line, f"layers=@{moved / 'other.yaml'}"]) == 0
    assert set(run.parent.glob("dorefa-*")) - {run} == trained, "stored, not trained again"
    (path,) = trained
    result = json.loads((path / "result.json").read_text())
    assert {name: found["w"]["allowed"] for name, found in result["verified"].items()} == {
        name: 2**width for name, width in chosen.items()
    }
    assert result["cost"]["bytes_ideal"] == allocations["rows"][0]["bytes"]
    assert result["cost"]["bitops"] == allocations["rows"][0]["bitops"]


def test_sensitivity_of_a_float_run_by_a_named_method(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (baseline,) = run.parent.glob("float-*")
    words = ("method=lsq", "bits=w4a32", "layers.first=same", "--widths", "2,8", "--images", "64")
    allocations, layers = printed_tables(
        capsys, "sensitivity", baseline, *words, "--out", tmp_path / "b.yaml", "--measure", "mse"
    )
    assert "conv1" in {row["layer"] for row in layers["rows"]}
    assert yaml.safe_load((tmp_path / "b.yaml").read_text()) == allocations["rows"][1]["widths"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["inspect"], 2, "needs exactly one run directory"),
        (["inspect", "nowhere"], 2, "no such directory"),
        (["inspect", "RUN", "--sort", "leave-one-ou"], 2, "did you mean leave-one-out"),
        (["inspect", "RUN", "--imges=3"], 2, "did you mean --images?"),
        (["inspect", "RUN", "--images", "0"], 2, "whole number from 1"),
        (["inspect", "RUN", "method=lsq"], 2, "has no effect"),
        (["evaluate", "RUN", "--predictions", "p.txt"], 2, ".csv or .npy"),
        (["evaluate", "RUN", "optim.lr=1"], 2, "allowed: dataset=NAME"),
        (["evaluate", "RUN", "dataset=synthetic"], 2, "same shape and classes"),
        (["evaluate", "RUN", "dataset=folder", "dataset.root=nowhere"], 3, "nowhere"),
        (["sensitivity", "RUN", "--budget", "20k"], 2, "bytes=20k"),
        (["sensitivity", "RUN", "--budget", "bytes=1", "--widths", "2,4", "--images", "16"], 2, "widths is bytes="),
        (["sensitivity", "RUN", "--widths", "0"], 2, "numbers from 1 to 31"),
        (["sensitivity", "RUN", "bits=w4"], 2, "add method=NAME"),
        (["sensitivity", "BASELINE"], 2, "is a float run and has no method"),
        (["sensitivity", "RUN", "--out", "mine.yaml"], 2, "was not written by qbench sensitivity"),
        (["method=dorefa", "layers=@nowhere.yaml"], 2, "cannot read nowhere.yaml"),
        (["method=dorefa", "layers=@list.yaml"], 2, "patterns and widths"),
    ],
)
def test_wrong_arguments_are_named_with_the_fix(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], status: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (baseline,) = run.parent.glob("float-*")
    places = {"RUN": str(run), "BASELINE": str(baseline)}
    assert cli([places.get(word, word) for word in words]) == status
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 3
    assert (tmp_path / "mine.yaml").read_text() == "epochs: 3\n"


def test_an_incomplete_or_damaged_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "x" / run.name
    for subcommand in ("inspect", "evaluate", "sensitivity"):
        for name, message in (
            ("result.json", "is not finished"),
            ("last.pt", "No such file"),
            ("best.pt", "No such file"),
        ):
            shutil.rmtree(twin, ignore_errors=True)
            shutil.copytree(run, twin)
            (twin / name).unlink()
            if (subcommand == "sensitivity") != (name == "best.pt") and name != "result.json":
                continue
            assert cli([subcommand, str(twin)]) == CheckpointError.status
            assert message in capsys.readouterr().err
    shutil.rmtree(twin)
    shutil.copytree(run, twin)
    for name in ("last.pt", "result.json"):
        damaged = bytearray((twin / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (twin / name).write_bytes(damaged)
        assert cli(["evaluate", str(twin)]) == CheckpointError.status
        assert "damaged" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli(["inspect", str(tmp_path / "empty")]) == CheckpointError.status
    capsys.readouterr()


def test_sensitivity_needs_the_float_baseline(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "x" / run.name)
    assert cli(["sensitivity", str(tmp_path / "x" / run.name), "--out", str(tmp_path / "b.yaml")]) == 4
    assert ": float baseline float-" in capsys.readouterr().err


def test_wrong_arguments_are_reported_without_torch(run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "qbench", "evaluate", str(run), "--predictions", "x.txt"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "must end in" in done.stderr


def test_the_loaded_network_has_the_stored_weights(run: Path) -> None:
    setup, model, _ = load_finished_network(run, weights="last")
    stored = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert setup.config.method_name == "dorefa"


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (lambda: nn.Linear(6, 4), (6,)),
        (lambda: nn.Linear(6, 4), (2, 3, 6)),
        (lambda: nn.Conv2d(6, 4, 3), (6, 5, 5)),
        (lambda: nn.Conv1d(6, 4, 3), (2, 6, 5)),
        (lambda: nn.ConvTranspose3d(6, 4, 2), (2, 6, 3, 3, 3)),
    ],
)
def test_signals_of_layers_called_with_and_without_a_batch(kind: Callable[[], Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    x = torch.randn(shape)
    install(dorefa.build(w=2, a=2), model, Policy(first="same", last="same", input="float"))
    signal = layer_signals(model, [(x, torch.zeros(1))])["0"]
    outputs = model(x)
    axis = -1 if isinstance(model[0], nn.Linear) else -1 - len(model[0].kernel_size)
    assert signal.dead_channels("out")[1] == outputs.shape[axis] == 4
    assert signal.dead_channels("in")[1] == 6
    assert signal.high["out"].max() == outputs.max()
    assert signal.count == outputs.numel() / 4


def with_options(noise: float = 0.0, opts: object = None) -> object:
    """Return nothing: only the arguments of this data set are read."""


def test_nested_keys_of_the_data_set_can_be_overridden() -> None:
    own = {"name": "test_analysis:with_options", "noise": 1.0, "opts": {"a": 1, "b": {"c": 2, "d": 3}}}
    found = override_dataset(own, ["+dataset.opts.b.c=7", "+dataset.opts.e=8", "dataset.noise=0.5"])
    assert (found["noise"], found["opts"]) == (0.5, {"a": 1, "b": {"c": 7, "d": 3}, "e": 8})
    assert own["opts"] == {"a": 1, "b": {"c": 2, "d": 3}}
    assert override_dataset({**own, "opts": None}, ["+dataset.opts.a=2"])["opts"] == {"a": 2}
    assert override_dataset(own, ["dataset.opts={a: 2}"])["opts"] == {"a": 2}


def test_typed_layers_change_only_these_keys_of_the_run(configure: Configure) -> None:
    """Also one rule among several; a whole policy, such as a file of widths, replaces all keys."""
    own = configure("method=lsq", "bits=w4a4", "layers.last=8", "layers.rules={layer1.0.conv1: float, fc: 3}")
    changed = override_method(own, ["layers.first=8"])
    assert changed.layers == replace(own.layers, first=8)
    assert override_method(own, ["layers.rules={fc: 2}"]).layers.rules == {"fc": 2}
    rules = override_method(own, ["+layers.rules.fc=2"]).layers.rules or {}
    assert list(rules.items()) == [("fc", 2), ("layer1.0.conv1", "float")], "the first pattern that matches counts"
    assert override_method(own, ["layers=default"]).layers == configure("method=lsq").layers
    assert changed.method == own.method
    other = override_method(own, ["method=dorefa", "bits=w2a2", "layers.first=8"])
    assert (other.method["name"], other.layers) == ("dorefa", changed.layers)


def test_the_note_of_sensitivity_repeats_the_typed_keys(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the typed key, the file of widths describes the network that was measured."""
    file = tmp_path / "b.yaml"
    words = ("layers.first=8", "--widths", "2,4", "--images", "16", "--out", file)
    tables = printed_tables(capsys, "sensitivity", run, *words)
    assert any(f"add layers=@{file} layers.first=8 to the run's command" in note for note in tables[0]["notes"])
    assert "conv1" in {row["layer"] for row in tables[1]["rows"]}
