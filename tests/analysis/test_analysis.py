"""Looking at finished runs: what layers hold and cost, which widths a budget buys, accuracy on test and other data."""

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, Configure
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.bit_allocation import Budget, BudgetInfeasible, allocate, parse_budget, total, uniform
from qbench.analysis.disabled_quantizers import Front, quantizers_disabled
from qbench.analysis.evaluate import calibration_error, interval
from qbench.analysis.inspect import signals, switched
from qbench.analysis.layer_ablation import FloatBaseline, figures, squared_error
from qbench.analysis.sensitivity import choices
from qbench.bits import Bits
from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.cost.count import count_cost
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.setup import assemble
from qbench.experiment.trained_network import load_finished_network
from qbench.methods import dorefa, xnor
from qbench.models import mlp, resnet
from qbench.quant.install import install
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Method
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid

EVERYWHERE = Policy(first="same", last="same")


class Changed(nn.Module):
    """A quantizer that does to weights or inputs what a test says."""

    def __init__(self, change: Any, levels: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.change, self.levels = change, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)  # type: ignore[no-any-return]

    def grid(self, x: Tensor) -> Grid:
        return Grid(torch.tensor(self.levels).reshape(1, -1, 1))


def changing(weight: Any, act: Any = None, levels: tuple[float, ...] = (0.0, 1.0)) -> Method:
    """Return a method that changes weights by (layer name, weights), and inputs."""
    return Method(
        name="changing", bits=Bits(2, 2 if act else 32), supported_bits={"w": (2,), "a": (2,)},
        weight=lambda name, layer, bits: Changed(lambda w: weight(name, w)),
        input=lambda name, layer, bits: Changed(act, levels),
    )  # fmt: skip


def batches(*shape: int, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    count = shape[0]
    labels = torch.randint(classes, (count,), generator=generator)
    return [(torch.randn(*shape, generator=generator), labels)]


# Switching layers off


@pytest.mark.parametrize("method", [dorefa.build(w=2, a=2), xnor.build()])
def test_all_layers_off_compute_as_the_float_network_and_none_as_the_quantized_one(method: Method) -> None:
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
    assert list(model.modules()) == modules, "the same quantizers, in the same places"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_an_activation_put_in_front_of_one_layer_leaves_what_others_read() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert Front(nn.ReLU(inplace=True))(x).tolist() == [0.0, 2.0]
    assert x.tolist() == [-1.0, 2.0]


def test_the_layer_that_hurts_is_found_off_and_only() -> None:
    torch.manual_seed(0)
    model = mlp.build((1, 4, 4), 10, hidden=2, width=16).eval()
    data = batches(64, 1, 4, 4)
    data = [(x, model(x).argmax(1)) for x, _ in data]  # float is right everywhere
    spoiling = changing(lambda name, w: w * 0 if name == "fc2" else w)
    whole, single = switched(install(spoiling, model, EVERYWHERE), data)
    assert whole["off"]["top1"] == 100
    assert whole["on"]["top1"] < 60
    without, alone = single["fc2"]
    assert without == whole["off"]
    assert alone == whole["on"]
    for name in ("fc1", "fc3"):
        assert single[name] == (whole["on"], whole["off"]), "switching what changes nothing changes nothing"


def test_normalization_measured_anew_undoes_a_scale_and_leaves_the_network() -> None:
    torch.manual_seed(0)
    model = resnet.build((3, 8, 8), 10, depth=8, width=4).eval()
    scaling = changing(lambda name, w: 4 * w)
    install(scaling, model, Policy(), example=torch.zeros(1, 3, 8, 8))
    data = batches(64, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    kept, _ = switched(model, data)
    anew, _ = switched(model, data, data)
    assert kept["on"]["loss"] != pytest.approx(kept["off"]["loss"], rel=0.05)
    assert anew["on"]["loss"] == pytest.approx(anew["off"]["loss"], rel=5e-3)  # but for the epsilon
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# What passes a layer


def test_sqnr_clipped_and_dead_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    # weights times 0.9: noise is a tenth of the output, power a hundredth: 20 dB; a gain of 1 / 0.9 undoes it
    install(changing(lambda name, w: 0.9 * w), model, EVERYWHERE)
    x = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0], [2.0, 0.0]])
    found = signals(model, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(2))])["0"]
    assert found.sqnr == pytest.approx(20, abs=1e-4)
    assert found.fitted == 120
    assert found.dead("out") == (1, 2), "the row of zeros"
    assert found.dead("in") == (1, 2), "the second input"
    assert found.clipped is None, "inputs are float"


@pytest.mark.parametrize(("levels", "clipped"), [((0.0, 1.0), 1), ((-0.5, 1.0), 2), ((-1.0, 2.0), 0)])
def test_clipped_inputs_are_those_beyond_the_outermost_levels(levels: tuple[float, ...], clipped: int) -> None:
    low, high = levels
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)  # type: ignore[union-attr]
    method = changing(lambda name, w: w, lambda x: x.clamp(low, high), levels)
    install(method, model, Policy(first="float", last="same"))
    x = torch.tensor([-1.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 2)
    found = signals(model, [(x, torch.zeros(1))])["1"]
    assert (found.clipped, found.inputs) == (clipped, 4)


def test_fitted_sqnr_is_of_what_a_gain_and_an_offset_leave() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    # float 0, 1, 2, 3; quantized 0, 0, 2, 2: covariance 1, variances 1.25 and 1, so 0.25 is left of 1.25
    method = changing(lambda name, w: w, lambda x: 2 * (x / 2).floor(), (0.0, 2.0))
    model.append(nn.Linear(1, 1))
    install(method, model, Policy(first="float", last="same"))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.fill_(0.0)  # type: ignore[union-attr]
    found = signals(model, [(torch.arange(4.0)[:, None], torch.zeros(4))])["1"]
    assert found.fitted == pytest.approx(10 * np.log10(5), abs=1e-6)
    assert found.sqnr == pytest.approx(10 * np.log10(14 / 2), abs=1e-6)


# Widths under a budget


def test_the_integer_program_equals_brute_force_and_keeps_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(25):
        layers, widths = [f"l{i}" for i in range(4)], [1, 2, 4, 8]
        harm = {name: {k: draw.uniform(-0.2, 2) / k for k in widths} for name in layers}
        sizes = {name: draw.randint(1, 10**6) for name in layers}
        costs = {name: {k: float(k * size) for k in widths} for name, size in sizes.items()}
        low = sum(of[1] for of in costs.values())
        most = draw.uniform(low, sum(of[8] for of in costs.values()))
        every = [dict(zip(layers, ks, strict=True)) for ks in itertools.product(widths, repeat=4)]
        least = min(total(harm, choice) for choice in every if total(costs, choice) <= most)
        found = allocate(harm, costs, most)
        assert total(costs, found) <= most
        assert total(harm, found) == pytest.approx(least, abs=1e-9)
        with pytest.raises(BudgetInfeasible):
            allocate(harm, costs, low - 1)
        assert allocate(harm, costs, low) == dict.fromkeys(layers, 1), "a budget met exactly"


def test_uniform_is_the_largest_width_that_all_layers_can_have() -> None:
    costs = {"a": {1: 1.0, 2: 2.0, 4: 4.0}, "b": {1: 10.0, 2: 20.0}}
    assert uniform(costs, 25) == {"a": 2, "b": 2}
    assert uniform(costs, 21) == {"a": 1, "b": 1}
    assert uniform(costs, 10) is None


@pytest.mark.parametrize(
    ("text", "kind", "most"),
    [
        ("bytes=20k", "bytes", 20_000),
        ("bitops=1.5G", "bitops", 1.5e9),
        ("w=2.5", "w", 2.5),
        ("bytes=512", "bytes", 512),
    ],
)
def test_budgets_are_read(text: str, kind: str, most: float) -> None:
    assert parse_budget(text) == (kind, most)


@pytest.mark.parametrize("text", ["20k", "bytes", "w=3k", "bytes=-1", "bytes=1K", "flops=3", "w="])
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="bytes=20k, bitops=1G"):
        parse_budget(text)


def test_rules_of_a_file_are_those_that_are_typed(configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "some rules.yaml"
    file.write_text("# why\nlayer1.0.conv1: 4\nlayer2.*: float\n")
    word = f"layers='@{file}'"
    read = configure("method=dorefa", word)
    assert (
        run_identity(read).keys
        == run_identity(configure("method=dorefa", "layers.rules={layer1.0.conv1: 4, layer2.*: float}")).keys
    )
    assert configure("method=dorefa", word, "layers.first=8").layers.first == 8
    swept = compose.configurations(["-m", "method=dorefa", f"layers=default,'@{file}'"])
    assert [config.layers.rules for config in swept] == [None, read.layers.rules]


def test_squared_error_is_up_to_a_factor() -> None:
    w = torch.tensor([1.0, 2.0, -3.0])
    assert squared_error(w, w / 7) == pytest.approx(0, abs=1e-9)
    assert squared_error(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])) == pytest.approx(16), "3 is fitted, 4 not"
    assert squared_error(w, 0 * w) == pytest.approx(14)


@pytest.fixture
def planted(configure: Configure) -> FloatBaseline:
    """A network in which few bits lose all of fc3: one weight is 60 times the others, at an input that is always 0."""
    parts = assemble(configure("method=uniform", "bits=w3a32", "method.channel=false", "model=mlp", "model.width=24"))
    torch.manual_seed(0)
    model = parts.float_model().train()
    images, labels = parts.data.train.images.float() / 255 - 0.3, parts.data.train.labels  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        model.bn2.weight[0] = model.bn2.bias[0] = 0.0  # type: ignore[index,union-attr]
        model.fc3.weight[0, 0] = 60 * model.fc3.weight.abs().max()  # type: ignore[index,operator,union-attr]
    data = [(images, labels)]
    return FloatBaseline(parts, model.eval(), data, Probe([(images[:64], labels[:64])], F.cross_entropy))


def test_a_planted_fragile_layer_gets_the_most_bits(planted: FloatBaseline) -> None:
    found = figures(planted, [2, 3, 4, 5, 6, 7, 8])
    assert list(found.loss) == ["fc2", "fc3"], "first and last stay float"
    assert found.loss["fc3"][3] > 5 * abs(found.loss["fc2"][3])
    whole = {kind: found.rest[kind] + total(found.costs(kind), {"fc2": 5, "fc3": 5}) for kind in ("bytes", "bitops")}
    for budget in (Budget("w", 5), Budget("bytes", whole["bytes"]), Budget("bitops", whole["bitops"])):
        chosen = choices(found, budget)
        assert all(chosen.values())
        by_loss, uniformly = chosen["loss"], chosen["uniform"]
        assert by_loss is not None
        assert uniformly is not None
        assert by_loss["fc3"] > by_loss["fc2"], budget
        assert total(found.loss, by_loss) < total(found.loss, uniformly)
        cost = count_cost(planted.quantized(by_loss), planted.parts.macs)
        spent = {"bytes": cost["bytes_ideal"], "bitops": cost["bitops"], "w": sum(by_loss.values()) / 2}
        assert spent[budget.kind] <= budget.most
        for kind in ("bytes", "bitops"):
            assert found.rest[kind] + total(found.costs(kind), by_loss) == spent[kind], (
                "as the whole network is counted"
            )


def test_a_budget_out_of_reach_names_the_least_and_the_most(planted: FloatBaseline) -> None:
    found = figures(planted, [2, 4])
    with pytest.raises(ConfigError, match=r"at least w=2\n.*from w=2, at most of use is w=4"):
        choices(found, parse_budget("w=1.9"))
    assert choices(found, parse_budget("w=99"))["uniform"] == {"fc2": 4, "fc3": 4}
    assert choices(found, parse_budget("w=2"))["loss"] == {"fc2": 2, "fc3": 2}


def test_one_layer_alone_is_quantized_at_its_width(planted: FloatBaseline) -> None:
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


def test_the_interval_is_clopper_and_pearsons() -> None:
    low, high = interval(10, 10)  # all right: the lowest share p with p^10 = 0.025
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


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    """Run a verb; return the tables it prints as JSON."""
    capsys.readouterr()
    assert cli([*map(str, words), "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["tables"]  # type: ignore[no-any-return]


def test_evaluate_repeats_the_runs_own_figures_and_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "result.json").read_text())
    for weights, stored in (("last", result["final"]), ("best", result["best"])):
        (table,) = told(capsys, "evaluate", run, "--weights", weights)
        (row,) = table["rows"]
        assert {key: row[key] for key in ("top1", "top5", "loss")} == stored["test"]
    assert row["n"] == 450
    assert row["low"] < row["top1"] < row["high"]
    assert any("not for selection" in note for note in table["notes"])
    own = np.load(run / "predictions.npy")
    told(capsys, "evaluate", run, "--predictions", tmp_path / "p.npy")
    told(capsys, "evaluate", run, f"--predictions={tmp_path / 'p.csv'}")
    kept = np.load(tmp_path / "p.npy")
    assert (kept["label"] == own[:, 0]).all()
    assert (kept["predicted"] == own[:, 1]).all()
    assert (kept["index"] == np.arange(450)).all()
    assert ((kept["probability"] >= 0.1) & (kept["probability"] <= 1)).all(), "the largest of ten"
    head, first, *_ = (tmp_path / "p.csv").read_text().splitlines()
    assert head == "index,label,predicted,probability"
    assert first.split(",")[:3] == ["0", *map(str, own[0])]


def test_evaluate_on_other_data_normalizes_as_the_run_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own,) = told(capsys, "evaluate", run)
    (same,) = told(capsys, "evaluate", run, "dataset.val=0.5")  # other training images, so another mean and deviation
    assert same["rows"][0]["loss"] == own["rows"][0]["loss"]
    (other,) = told(
        capsys, "evaluate", run, "dataset=synthetic", "dataset.channels=1", "dataset.size=8", "dataset.test=64"
    )
    assert other["rows"][0]["n"] == 64
    assert any("made data" in note for note in other["notes"])


def test_inspect_tells_of_every_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (table,) = told(capsys, "inspect", run)
    result = json.loads((run / "result.json").read_text())
    rows = {row["layer"]: row for row in table["rows"]}
    assert set(rows) == set(result["verified"])
    assert rows["layer1.0.conv1"]["levels"]["w"] == result["verified"]["layer1.0.conv1"]["w"]
    for row in rows.values():
        assert row["bits"] == {"w": 2, "a": 2, "g": 32}
        assert 0 <= row["clipped"] <= 100
        assert row["sqnr"] < row["fitted"] < 120, "dorefa's weights are on another scale"
    assert [row["off_loss"] for row in table["rows"]] == sorted(row["off_loss"] for row in table["rows"])
    (in_order,) = told(capsys, "inspect", run, "--sort", "order", "--bn-stats", "keep", "--images", "40")
    assert [row["layer"] for row in in_order["rows"]] == list(result["verified"])
    assert any("on 40 validation images" in note for note in in_order["notes"])
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_widths_chosen_are_trained_and_the_files_place_is_no_part_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bits.yaml"
    allocations, layers = told(
        capsys, "sensitivity", run, "--budget", "w=3", "--widths", "2,3,4", "--out", file, "--images", "64"
    )
    assert [row["widths_by"] for row in allocations["rows"]] == ["loss", "mse", "uniform"]
    chosen = yaml.safe_load(file.read_text())
    assert chosen == allocations["rows"][0]["widths"] == {row["layer"]: row["loss"] for row in layers["rows"]}
    assert allocations["rows"][0]["bits"] <= 3
    assert allocations["rows"][2]["bits"] == 3
    assert file.read_text().startswith("# qbench sensitivity ")
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


def test_a_float_run_is_asked_by_a_method(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parent,) = run.parent.glob("float-*")
    words = ("method=lsq", "bits=w4a32", "layers.first=same", "--widths", "2,8", "--images", "64")
    allocations, layers = told(capsys, "sensitivity", parent, *words, "--out", tmp_path / "b.yaml", "--measure", "mse")
    assert "conv1" in {row["layer"] for row in layers["rows"]}
    assert yaml.safe_load((tmp_path / "b.yaml").read_text()) == allocations["rows"][1]["widths"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["inspect"], 2, "wants the directory of one run"),
        (["inspect", "nowhere"], 2, "no such directory"),
        (["inspect", "RUN", "--sort", "hurtt"], 2, "did you mean hurt"),
        (["inspect", "RUN", "--imges=3"], 2, "did you mean --images?"),
        (["inspect", "RUN", "--images", "0"], 2, "whole number from 1"),
        (["inspect", "RUN", "method=lsq"], 2, "has no effect"),
        (["evaluate", "RUN", "--predictions", "p.txt"], 2, ".csv or .npy"),
        (["evaluate", "RUN", "optim.lr=1"], 2, "allowed: dataset=NAME"),
        (["evaluate", "RUN", "dataset=synthetic"], 2, "same shape and classes"),
        (["evaluate", "RUN", "dataset=folder", "dataset.root=nowhere"], 3, "nowhere"),
        (["sensitivity", "RUN", "--budget", "20k"], 2, "bytes=20k"),
        (["sensitivity", "RUN", "--budget", "bytes=1", "--widths", "2,4", "--images", "16"], 2, "cost at least bytes="),
        (["sensitivity", "RUN", "--widths", "0"], 2, "numbers from 1 to 31"),
        (["sensitivity", "RUN", "bits=w4"], 2, "add method=NAME"),
        (["sensitivity", "PARENT"], 2, "a float run has no method"),
        (["sensitivity", "RUN", "--out", "mine.yaml"], 2, "not from qbench sensitivity"),
        (["method=dorefa", "layers=@nowhere.yaml"], 2, "cannot read nowhere.yaml"),
        (["method=dorefa", "layers=@list.yaml"], 2, "patterns and widths"),
    ],
)
def test_mistakes_are_named_with_the_fix(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], status: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (parent,) = run.parent.glob("float-*")
    places = {"RUN": str(run), "PARENT": str(parent)}
    assert cli([places.get(word, word) for word in words]) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) <= 3
    assert (tmp_path / "mine.yaml").read_text() == "epochs: 3\n"


def test_a_run_that_is_not_whole_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "x" / run.name
    for verb in ("inspect", "evaluate", "sensitivity"):
        for name, said in (("result.json", "is not done"), ("last.pt", "No such file"), ("best.pt", "No such file")):
            shutil.rmtree(twin, ignore_errors=True)
            shutil.copytree(run, twin)
            (twin / name).unlink()
            if (verb == "sensitivity") != (name == "best.pt") and name != "result.json":
                continue
            assert cli([verb, str(twin)]) == CheckpointError.status
            assert said in capsys.readouterr().err
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


def test_sensitivity_wants_the_float_parent(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "x" / run.name)
    assert cli(["sensitivity", str(tmp_path / "x" / run.name), "--out", str(tmp_path / "b.yaml")]) == 4
    assert "its float parent is not beside it: float-" in capsys.readouterr().err


def test_wrong_words_are_answered_without_torch(run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "qbench", "evaluate", str(run), "--predictions", "x.txt"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "allowed are files that end in" in done.stderr


def test_a_finished_runs_network_is_the_one_that_was_measured(run: Path) -> None:
    parts, model = load_finished_network(run, weights="last")
    stored = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert parts.config.method_name == "dorefa"
