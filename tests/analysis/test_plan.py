"""`qbench plan`: the runs and the cost of each layer, without data and without training."""

import functools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Configure, long_tier, tiered
from helpers import plant, write_packed
from torch import nn

from qbench.analysis import plan, step_cost
from qbench.bits import FLOAT, Bits
from qbench.config import compose
from qbench.config.schema import Config
from qbench.cost.count import count_cost
from qbench.cost.layers import Levels, layer_costs
from qbench.cost.runtimes import BINARY, FPGA, INT8, runs_on
from qbench.data.spec import placeholder_dataset
from qbench.errors import ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.papers.recipe_differences import recipe_differences
from qbench.quant.method import Method
from qbench.quant.quantizer import IdentityQuantizer
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.directory import PACKED_FILE

EXPERIMENTS = sorted(
    str(path.relative_to(ROOT / "conf/experiment").with_suffix(""))
    for path in (ROOT / "conf/experiment").rglob("*.yaml")
)
PLANNED = {name.partition("/")[0]: name for name in reversed(EXPERIMENTS)}
REPRESENTATIVES = [PLANNED[name] for name in ("claims", "gupta", "lsq", "slq", "smoke")]
"""The first file of some papers: a baseline, activations, weights alone. The others are planned in the long tier."""

Planned = Callable[..., list[Table]]


compose_uncached = compose.configurations


@functools.cache
def composed(words: tuple[str, ...]) -> list[Config]:
    """Compose once per command line: this takes longer than planning, and nearby rows compose each other."""
    return compose_uncached(list(words))


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Return a function from command-line words to the plan, in a directory without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compose, "configurations", lambda words: composed(tuple(words)))
    return lambda *words: plan.plan([planned_run(config) for config in compose.configurations(list(words))])


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step_cost.CostEstimator, "_step_cost", lambda self, setup, model: step_cost.StepCost(1e-3, 10.0, 1.0)
    )


def _rows_by_name(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def test_layers_of_the_default_network_by_hand(planned: Planned, untimed: None) -> None:
    """W2A2 inside; the first and the last layer float, so that their BitOps are MACs x 32 x 32."""
    runs, layers = planned("method=dorefa", "bits=w2a2")
    assert [value["state"] for value in runs.values] == ["new", "new"]
    found = {value["name"]: value for value in layers.values}
    inner = {"layer1.0.conv1": 64 * 8 * 8 * 9, "layer2.0.conv1": 16 * 16 * 8 * 9, "layer3.0.conv2": 4 * 32 * 32 * 9}
    for name, macs in inner.items():
        assert (found[name]["macs"], found[name]["bitops"]) == (macs, 4 * macs)
        assert found[name]["weights"] == Levels(4, 1, "layer", 3)
        assert found[name]["inputs"] == Levels(4, 1, "layer", 3)
    assert found["layer1.0.conv1"]["bytes_ideal"] == 8 * 8 * 9 * 2 / 8
    assert found["conv1"]["bitops"] == 64 * 8 * 9 * 32 * 32
    assert found["fc"]["bytes_ideal"] == 4 * (10 * 32 + 10)
    assert found["all"]["bitops"] == (64 * 8 * 9 + 320) * 1024 + 4 * (4 * 36_864 + 2 * 18_432)
    rows = _rows_by_name(layers)
    assert rows["layer1.0.conv1"]["quantizers"] == "dorefa.DoReFaWeight dorefa.DoReFaActivation"
    assert [rows["conv1"][key] for key in "WAG"] == ["float"] * 3
    assert {value["run"] for value in runs.values} == {
        str(run.path)
        for run in plan.with_baseline(
            planned_run(compose.configurations(["method=dorefa", "bits=w2a2"])[0]), step_cost.CostEstimator()
        )
    }


def test_the_title_counts_runs_and_float_baselines(planned: Planned, untimed: None) -> None:
    title = planned("-m", "method=dorefa,lsq", "bits=w2a2", "seed=0,1")[0].title
    assert title == "4 runs and 2 float baselines"
    assert planned("method=dorefa")[0].title == "1 run and 1 float baseline"
    assert planned("method=float")[0].title == "1 run"
    assert planned("-m", "method=float,dorefa")[0].title == "2 runs", "the float run is the baseline"


def test_a_message_says_which_network_is_measured_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, untimed: None, planned: Planned
) -> None:
    runs = [planned_run(config) for config in compose.configurations(["-m", "method=dorefa", "bits=w2a2", "seed=0,1"])]
    said: list[str] = []
    assemble_quickly = step_cost.assemble

    def assemble_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return assemble_quickly(*args, **kwargs)

    monkeypatch.setattr(step_cost, "PATIENCE_SECONDS", 60.0)
    plan.plan(runs, said.append)
    assert not said
    monkeypatch.setattr(step_cost, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(step_cost, "assemble", assemble_slowly)
    plan.plan(runs, said.append)
    assert [re.sub(r"-[0-9a-f]{8} ", " ", line) for line in said] == [
        "measuring network 1 of 2: dorefa-w2a2g32-s0 ...",
        "measuring network 2 of 2: float-w32a32g32-s0 ...",
    ]


SUMMED = [("method=ttq",), ("method=qd", "bits.w=4"), ("method=hwgq",), ("method=lsq", "layers.first=8")]


@pytest.mark.parametrize("words", tiered(SUMMED, SUMMED[-1:]))
def test_sums_equal_those_of_compare(planned: Planned, untimed: None, words: tuple[str, ...]) -> None:
    runs, layers = planned(*words)
    *each, whole = layers.values
    (config,) = compose.configurations(list(words))
    setup = assemble(config)
    cost = asdict(count_cost(setup.install(setup.float_model()), setup.macs))
    assert {key: whole[key] for key in cost} == cost, words
    assert {key: runs.values[-1][key] for key in cost} == cost
    rest = cost["params"] - sum(layer["params"] for layer in each)
    for key in ("bitops", "bytes_ideal", "bytes_packed", "macs"):
        floats = 4 * rest if key.startswith("bytes") else 0
        assert sum(layer[key] for layer in each) + floats == pytest.approx(cost[key]), (words, key)


@pytest.mark.parametrize(
    ("words", "params", "macs"),
    [
        long_tier(("model=vgg16", "dataset=imagenet"), 138_357_544, 15_470_264_320),
        long_tier(("model=resnet50", "dataset=imagenet"), 25_557_032, 4_089_184_256),
        (("model=alexnet", "dataset=imagenet", "dataset.size=224"), 61_100_840, 714_188_480),
    ],
)
def test_imagenet_networks_are_planned_without_memory(
    planned: Planned, untimed: None, words: tuple[str, ...], params: int, macs: int
) -> None:
    """torchvision's documented parameters; MACs computed from its layers."""
    runs, layers = planned(*words, "method=inq")
    assert (layers.values[-1]["params"], layers.values[-1]["macs"]) == (params, macs)
    (config,) = compose.configurations([*words, "method=inq"])
    assert next(step_cost.quantized_network(assemble(config, planned=True))[0].parameters()).device.type == "meta"
    assert runs.values[-1]["steps"] == 30 * (round(0.99 * 1_281_167) // 64)


@pytest.mark.parametrize("experiment", tiered(EXPERIMENTS, REPRESENTATIVES))
def test_every_experiment_plans_without_data(planned: Planned, untimed: None, experiment: str) -> None:
    tables = planned(f"experiment={experiment}")
    assert len(tables) == 2, "one run and its layers"
    assert all(value["state"] == "new" for value in tables[0].values)
    layers = [value for value in tables[1].values if "shape" in value]
    (config,) = compose.configurations([f"experiment={experiment}"])
    if config.bits.w != FLOAT:
        assert any(value["bits"]["w"] < FLOAT for value in layers)
    if not experiment.startswith(("claims/", "smoke")):
        same = [
            note
            for note in tables[1].notes
            if note.startswith("all compared keys are identical to those of experiment=")
        ]
        assert same or config.is_baseline, "a row of the same recipe is the nearest one"
    for form in FORMATS.values():
        assert form(tables)
    json.loads(FORMATS["json"](tables))


def test_a_stored_run_that_is_trained_again_is_not_free(configure: Configure) -> None:
    words = ["method=float", "init=scratch", "epochs=1"]
    plant(configure(*words), 90.0)
    states = [plan.plan([planned_run(configure(*words, f"rerun={again}"))])[0].rows[-1][1] for again in (False, True)]
    assert states[0] == "stored"
    assert states[1] != "stored"


def test_an_unfinished_run_has_the_time_of_its_remaining_epochs(configure: Configure, untimed: None) -> None:
    config = configure("method=float", "init=scratch", "pretrain.epochs=4")
    new = plan.plan([planned_run(config)])[0].values[0]
    directory = planned_run(config).path
    directory.mkdir(parents=True)
    (directory / "state-1.pt").touch()
    epoch = {"kind": "epoch", "epoch": 2, "train_loss": 1.0, "train_top1": 50.0, "seconds": 1.0, "images": 9}
    (directory / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
    begun = plan.plan([planned_run(config)])[0].values[0]
    assert (new["state"], begun["state"]) == ("new", "unfinished")
    assert begun["seconds"] == pytest.approx(new["seconds"] / 4)


def test_shards_of_a_batch_are_in_memory_one_after_another(configure: Configure, untimed: None) -> None:
    words = ["method=float", "init=scratch", "optim.batch_size=64", "pretrain.optim.batch_size=64"]
    whole, sharded = (
        plan.plan([planned_run(configure(*words, f"batch_shards={n}"))])[0].values[0]["memory"] for n in (1, 8)
    )
    assert whole - sharded == pytest.approx(10 * (64 - 8)), "ten bytes per image"


def test_a_plan_with_the_network_of_a_run_as_teacher(configure: Configure) -> None:
    """The plan has no images, so it cannot compare them with the teacher's."""
    words = ["experiment=smoke", "dataset=synthetic", "model=mlp", "runtime.tensorboard=false"]
    teacher = run(planned_run(configure(*words, "method=float"))).run
    student = configure(*words, "method=dorefa", "bits=w2a2", "distill=kd", f"distill.teacher={teacher}")
    assert plan.plan([planned_run(student)])[0].rows[-1][1] == "new"


def test_keys_that_no_estimate_includes_have_a_note(configure: Configure) -> None:
    words = ["runtime.precision=bf16", "runtime.activation_memory=keep", "distill=kd"]
    table = plan.plan([planned_run(configure("method=dorefa", "bits=w2a2", *words))])[0]
    assert (
        "time and memory are estimated without runtime.precision=bf16, runtime.activation_memory=keep, the teacher"
    ) in table.notes


def test_a_sweep_estimates_each_network_once(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated: list[str] = []

    def fixed_cost(self: step_cost.CostEstimator, setup: ExperimentSetup, model: nn.Module) -> step_cost.StepCost:
        estimated.append(setup.config.method_name)
        return step_cost.StepCost(2e-3, 0.0, 0.0)

    monkeypatch.setattr(step_cost.CostEstimator, "_step_cost", fixed_cost)
    (table,) = planned("-m", "method=dorefa,ttq,mlq", "bits.w=2", "seed=0,1", "bits.a=32,2")
    assert sorted(estimated) == ["dorefa", "dorefa", "float", "mlq", "ttq"]
    states = [row[1].partition(":")[0] for row in table.rows]
    assert (states.count("new"), states.count("unsupported")) == (2 + 4 + 2 + 2, 2 + 2), "ttq, mlq: no activations"
    steps = {value["run"]: value.get("steps") for value in table.values}
    assert set(steps.values()) == {60 * 18, 30 * 18, None}
    seconds = sum(value["seconds"] for value in table.values)
    assert seconds == pytest.approx((2 * 60 + 8 * 30) * 18 * 64 * 2e-3)


def test_time_and_memory_of_a_small_network(planned: Planned) -> None:
    """The tensors kept for the backward pass of a network of two layers, by hand: the two inputs."""
    start = time.perf_counter()
    (table, _) = planned("model=resnet50", "dataset=imagenet", "method=lsq")
    assert time.perf_counter() - start < 60
    assert any("estimated from MACs" in note for note in table.notes)
    assert all(value["seconds"] > 0 for value in table.values)
    weights = 4 * 25_557_032
    assert table.values[0]["memory"] > 2 * weights
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 6 * 6, 5, bias=False))
    images, fixed = step_cost.saved_bytes(model, torch.zeros(7, 3, 8, 8))
    assert images == 4 * 7 * (3 * 8 * 8 + 4 * 6 * 6)
    assert fixed == 0, "weights are counted as weights"
    assert step_cost.saved_bytes(model.to("meta"), torch.zeros(7, 3, 8, 8, device="meta")) == (images, fixed)


@pytest.mark.full
def test_larger_networks_take_longer(planned: Planned) -> None:
    (small, _), (large, _) = (planned("dataset=synthetic", f"model={name}") for name in ("resnet8", "resnet56"))
    assert large.values[0]["seconds"] > 2 * small.values[0]["seconds"] > 0


def _layer(w: Levels | None, a: Levels | None, bits: Bits, rescaled: bool = False) -> SimpleNamespace:
    return SimpleNamespace(weights=w, inputs=a, bits=bits, rescaled=rescaled)


def test_supported_runtimes() -> None:
    two, half = Levels(2, 1, "layer", 1, symmetric=True), Levels(2, 1, "layer", 1)
    four, far = Levels(4, 1, "channel", 3), Levels(16, 1, "layer", 300)
    uneven, later, bucket = Levels(3, 1, "layer", None), Levels(256, 1, "layer", 0), Levels(16, 1, "256 values", 15)

    def notes(w: Levels | None, a: Levels | None, bits: Bits, rescaled: bool = False) -> str:
        return "\n".join(runs_on([_layer(w, a, bits, rescaled)]))  # type: ignore[list-item]

    names = (BINARY[0], INT8[0], FPGA[0])
    for w, a, expected in (
        (two, two, (True, True, True)), (two, half, (False, True, True)),
        (four, four, (False, True, True)), (far, four, (False, False, True)),
        (uneven, four, (False, False, False)), (bucket, four, (False, False, False)),
    ):  # fmt: skip
        text = notes(w, a, Bits(4, 4))
        assert tuple(name in text for name in names) == expected, (w, a)
    multiples = "integer runtimes need levels that are multiples of one step"
    assert notes(uneven, four, Bits(4, 4)) == f"runs in simulation only: {multiples}"
    assert multiples not in notes(bucket, four, Bits(4, 4))
    assert "one scale per layer or channel" in notes(bucket, four, Bits(4, 4))
    (line,) = runs_on([_layer(four, four, Bits(2, 2))], {"int8": "a reason", "qonnx": "a reason"})  # type: ignore[list-item]
    assert multiples not in line
    assert "qbench export refuses the network" in line
    assert "the levels depend on data" in notes(four, later, Bits(8, 8))
    assert "computed from each input" in notes(two, two, Bits(1, 1), rescaled=True)
    assert "compact storage of the weights" in notes(four, None, Bits(4))
    assert "weights are float" in notes(None, four, Bits(32, 4))
    assert runs_on([_layer(None, None, Bits())]) == ["runs on any runtime, because nothing is quantized"]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("words", "int8"),
    [
        (["method=pact", "bits=w8a8"], False),  # PACT has the weights of DoReFa: odd integers up to 255
        (["method=pact", "bits=w7a8"], True),
        (["method=hwgq", "bits=w1a8"], True),
        (["method=dorefa", "bits=w8a8"], False),
        (["method=inq", "activation=lsq", "bits=w5a8"], False),  # powers of two up to 128, of both signs
        (["method=lsq", "bits=w8a8"], True),
        (["method=lsq", "bits=w4a4", "layers.last=w8"], True),  # the last layer has a float input
    ],
)
def test_int8_without_an_export(configure: Configure, words: list[str], int8: bool) -> None:
    """The levels alone decide if a network is too large to be exported by `plan`."""
    setup = assemble(configure(*words), planned=True)
    layers = layer_costs(step_cost.quantized_network(setup)[0], setup.method, setup.macs)
    assert any(INT8[0] in line for line in runs_on(layers)) == int8


def test_an_absent_result_is_that_of_the_network(configure: Configure) -> None:
    words = ["method=lsq", "dataset=imagenet", "model=torchvision"]
    for net in ("resnet18", "densenet121"):
        sentences = " ".join(recipe_differences(planned_run(configure(*words, f"model.net={net}")).identity))
        assert ("DenseNet-121" in sentences) == (net == "densenet121")


@pytest.mark.full
def test_a_plan_says_what_the_export_accepts(planned: Planned, untimed: None) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    notes = planned("method=lsq", "bits=w4a4")[1].notes
    assert "qbench export accepts the forms packed, onnx, int8, qonnx, integer" in notes
    assert any(note.startswith(f"runs on {INT8.name}") for note in notes)
    notes = planned("method=dorefa", "bits=w8a8")[1].notes
    assert "qbench export accepts the forms packed, onnx, qonnx, integer" in notes
    (refused,) = [
        note for note in notes if note.startswith("qbench export refuses int8: layer1.0.conv1: int8 export needs")
    ]
    assert "from -127 to 127" in refused
    assert not any(note.startswith(f"runs on {INT8.name}") for note in notes)
    notes = planned("method=inq")[1].notes
    assert "qbench export accepts the forms packed, onnx" in notes, "as it is after its last epoch"
    notes = planned("method=gupta")[1].notes
    assert any("refuses packed, onnx, int8, qonnx, integer: layer1.0.conv1 has 16-bit weights" in n for n in notes)
    notes = planned("model=resnet50", "dataset=imagenet", "method=lsq")[1].notes
    assert not any("qbench export" in note for note in notes), "too large to ask about"


PLUS_ZEROS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, classes))

    def forward(self, x):
        return self.net(x) + torch.zeros(len(x), 1)
"""


def test_a_plan_says_that_the_network_and_not_its_levels_cannot_run_in_integers(
    planned: Planned, untimed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plus_zeros.py").write_text(PLUS_ZEROS)
    monkeypatch.syspath_prepend(str(tmp_path))
    notes = planned("model=plus_zeros:Net", "method=dorefa", "bits=w2a2")[1].notes
    found = [note.startswith("runs in simulation only: qbench export refuses the network") for note in notes]
    assert notes[found.index(True) + 1].startswith("qbench export refuses packed, onnx, int8, qonnx, integer: ")


def test_a_plan_shows_the_measured_size_of_an_export(planned: Planned, untimed: None) -> None:
    directory = Path(planned("method=lsq")[0].rows[-1][0])
    directory.mkdir(parents=True)
    (directory / "result.json").write_text("{}")
    (config,) = compose.configurations(["method=lsq"])
    write_packed(directory, 1_234, planned_run(config).identity.digest)
    notes = planned("method=lsq")[0].notes
    assert f"{directory / PACKED_FILE}: 1,234 bytes, measured; the table shows the ideal size" in notes
    os.utime(directory / PACKED_FILE, (0, 0))  # older than the result, so of other weights
    assert not any("1,234" in note for note in planned("method=lsq")[0].notes)


def test_levels_are_those_of_the_quantizers(configure: Configure) -> None:
    for name, bits, weights, inputs in (
        ("twn", "w2", (3, "layer", 1), None), ("ttq", "w2", (3, "layer", None), None),
        ("hwgq", "w1a2", (2, "channel", 1), (4, "layer", 3)),
        ("gupta", "w8a8g8", (256, "layer", 128), (256, "layer", 128)), ("inq", "w3", (5, "layer", 2), None),
    ):  # fmt: skip
        setup = assemble(configure(f"method={name}", f"bits={bits}"))
        layer = layer_costs(setup.install(setup.float_model()), setup.method, setup.macs)[2]
        assert layer.weights is not None
        assert (layer.weights.number, layer.weights.per, layer.weights.steps) == weights, name
        assert (layer.inputs and (layer.inputs.number, layer.inputs.per, layer.inputs.steps)) == inputs, name


def test_a_method_without_levels_is_allowed() -> None:
    method = Method(
        name="mine", bits=Bits(2), supported_bits={"w": (2,)}, weight=lambda name, layer, bits: IdentityQuantizer()
    )
    from qbench.cost.layers import _levels

    assert _levels(method, "weight", nn.Conv2d, (4, 4, 3, 3), 2) is None


def test_the_nearest_published_row_and_the_differences(planned: Planned, untimed: None) -> None:
    notes = planned("method=ttq", "model=resnet20", "dataset=cifar10", "epochs=7")[1].notes
    nearest = next(note for note in notes if note.startswith("nearest published row: experiment=ttq/resnet20"))
    assert "epochs=7 (published: 400)" in nearest
    assert "optimizer=" in nearest
    assert any("DoReFa has no CIFAR-10 result" in n for n in planned("method=dorefa", "dataset=cifar10")[1].notes)
    (note,) = [n for n in planned("method=uniform")[1].notes if "recipe" in n]
    assert "no published row has a recipe for uniform" in note


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("dataset=cifar10 dataset.val=1.5", "dataset.val=1.5"),
        ("dataset=cifar10 +dataset.nosuch=1", "dataset.nosuch"),
        ("dataset=imagenet dataset.size=small", "dataset.size"),
    ],
)
def test_keys_are_checked_without_data(planned: Planned, words: str, phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        planned(*words.split())


def test_dataset_specs_equal_the_loaded_data_sets(configure: Configure) -> None:
    for name, train in (("glyphs", 352), ("synthetic", 100)):
        config = configure(f"dataset={name}", f"dataset.train={train}", "dataset.test=34")
        known, read = placeholder_dataset(config.dataset), assemble(config).data
        assert known is not None
        assert (known.shape, known.classes, known.synthetic) == (read.shape, read.classes, read.synthetic)
        assert (len(known.train) + len(known.val), len(known.test)) == (len(read.train) + len(read.val), len(read.test))
        assert len(known.val) == len(read.val) or name == "synthetic", "of each class, a rounded share"


def test_a_long_plan_estimates_times_on_gpus(configure: Configure) -> None:
    """ResNet-18 has 1.83 GMACs: 3 passes of 2 operations for each, at half of an A100's 19.5e12 operations/s."""
    config = configure("dataset=imagenet", "model=dorefa_resnet18", "method=dorefa", "init=scratch", "epochs=30")
    table = plan.plan([planned_run(config)])[0]
    (note,) = (note for note in table.notes if note.startswith("on one GPU, not measured"))
    images = 30 * (1_268_355 // 64) * 64
    hours = 6 * table.values[0]["macs"] * images / (0.5 * 19.5e12) / 3600
    assert 11 < hours < 13
    assert f"A100 {int(hours)} h" in note
    assert "50 % of the published fp32 speed" in note


@pytest.mark.full
def test_a_long_plan_in_bfloat16_estimates_times_on_the_gpus_that_compute_in_it(configure: Configure) -> None:
    low = configure("dataset=imagenet", "model=dorefa_resnet18", "method=dorefa", "runtime.precision=bf16")
    (note,) = (note for note in plan.plan([planned_run(low)])[0].notes if note.startswith("on one GPU, not measured"))
    assert "V100" not in note
    assert "20 % of the published bf16 speed" in note
