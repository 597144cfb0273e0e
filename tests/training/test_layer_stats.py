"""What is told of layers, worked out by hand; that telling changes nothing; what TensorBoard finds of it."""

import itertools
import json
from collections.abc import Iterator
from math import log10, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure
from helpers import quantizing_bits
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.config import compose, groups
from qbench.config.identity import run_identity
from qbench.errors import ConfigError, Diverged, Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.session import TrainingSession
from qbench.methods import bwn, inq
from qbench.quant.install import install
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.method import Method
from qbench.quant.quantizer import Grid
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result
from qbench.runs.tensorboard import CHARTS, METRICS
from qbench.training import layer_stats as observe
from qbench.training import monitor as lookout

LAYER = "layer1.0.conv1"
LEVELS = ("off", "light", "full")
SEEN = torch.tensor([[0.25, 1.0], [4.0, -1.0]])


@pytest.fixture(autouse=True, scope="module")
def _every_epoch() -> Iterator[None]:
    """Epochs are short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "STEPS", 1)
        yield


class Nearest(nn.Module):
    """Rounds to the nearest of some levels, in one group."""

    def __init__(self, *points: float) -> None:
        super().__init__()
        self.points = points
        self.step = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("unset", torch.tensor(torch.nan))
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        points = torch.tensor(self.points)
        return points[(x.unsqueeze(-1) - points).abs().argmin(-1)]

    def grid(self, x: Tensor) -> Grid:
        return Grid(torch.tensor(self.points).reshape(1, -1, 1))


def network(method: Method, weight: list[list[float]]) -> tuple[nn.Module, QLayer]:
    """Three linear layers, the middle one quantized; what enters the network enters the middle one."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor(weight))
    install(method, model)
    return model, quantized_layers(model)["1"]


def by_hand() -> tuple[nn.Module, QLayer]:
    method = Method(
        name="hand", bits=Bits(2, 2), supported_bits={"w": (2,), "a": (2,)},
        weight=lambda name, layer, bits: Nearest(-1.0, 0.0, 1.0),
        input=lambda name, layer, bits: Nearest(0.0, 1.0, 2.0, 3.0),
    )  # fmt: skip
    return network(method, [[0.75, 0.25], [-1.0, 0.25]])


def told(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, float]:
    seen = observe.trace_layers(model, SEEN)
    return observe.layer_metrics(model, SEEN, seen, before or {}, observe.gradients(model))["1"]


def test_numbers_of_a_layer_by_hand() -> None:
    model, layer = by_hand()
    layer.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    layer.weight_q.step.grad = torch.tensor(-2.0)  # type: ignore[union-attr]
    # inputs go to (0, 1), (3, 0), weights to (1, 0), (-1, 0); float outputs are (7/16, 0), (11/4, -17/4), ours (0, 0),
    # (3, -3): errors 7/16, 1/4 and 5/4
    signal, error = (49 + 44**2 + 68**2) / 256, (49 + 16 + 400) / 256
    expected = {
        "w.top": 1.0, "w.dead": 0.0, "w.entropy": 1.5,  # -1, 0, 1: one, two, one of four
        "a.top": 3.0, "a.dead": 1.0, "a.entropy": 1.5,  # 0, 1, 3: two, one, one; nothing on 2
        "a.clipped": 0.25,  # 4 lies above 3; -1 is the activation function's to cut, as no level is negative
        "sqnr": 10 * log10(signal / error), "cosine": (11 / 4 * 3 + 17 / 4 * 3) / sqrt(18 * signal),
        "w.grad": 5.0, "w.step": 0.5, "a.step": 0.5, "w.step.grad": 2.0,
    }  # fmt: skip
    assert told(model) == pytest.approx(expected, rel=1e-5)


def test_flips_are_weights_on_another_level_than_before() -> None:
    model, layer = by_hand()
    before = observe.codes(observe.trace_layers(model, SEEN))
    assert told(model, before)["w.flips"] == 0
    with torch.no_grad():
        layer.weight[0, 0] = 0.6
        layer.weight[1, 1] = 0.75
    assert told(model, before)["w.flips"] == 0.25, "0.6 is on the level of 0.75, 0.75 not on that of 0.25"


def test_negative_levels_clip_below_too() -> None:
    model, layer = by_hand()
    layer.input_q = Nearest(-0.5, 0.5)
    assert told(model)["a.clipped"] == 0.75


def test_groups_are_counted_together_and_frozen_weights_told() -> None:
    model, _ = network(bwn.build(), [[1.0, 3.0], [-4.0, -4.0]])  # +-2 in the first filter, +-4 in the second
    values = told(model)
    assert (values["w.top"], values["w.entropy"], values["w.dead"]) == (4, 1, 0)
    assert "a.top" not in values
    model, layer = network(inq.build(), [[1.0, 0.5], [0.25, 0.7]])
    assert isinstance(layer.weight_q, inq.INQWeight)
    layer.weight_q.freeze_next(layer.weight, 0.5, "largest")
    assert told(model)["w.frozen"] == 0.5


def test_equal_outputs_have_the_ceiling_and_dead_ones_no_number() -> None:
    model, layer = by_hand()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    layer.input_q = Nearest(0.25, 1.0, 4.0, -1.0)
    assert told(model)["sqnr"] == observe.CEILING
    with torch.no_grad():
        layer.weight.zero_()
    assert not {"sqnr", "cosine"} & set(told(model))


@pytest.mark.parametrize(
    ("shape", "trained", "count"),
    [((100, 1, 8, 8), 1152, 18), ((100, 1, 8, 8), 64, 8), ((100, 3, 32, 32), 45_000, 64), ((9, 3, 224, 224), 10**6, 2)],
)
def test_few_images(shape: tuple[int, ...], trained: int, count: int) -> None:
    assert len(observe.few(torch.zeros(shape), trained)) == count


QUIET = ["experiment=smoke", "epochs=3", "init=scratch"]
RUNS = {  # with what draws random numbers: rounding of gradients, of weights, of all, a random partition
    "dorefa": ["bits=w2a2g4"],
    "qd": ["method.stochastic=true"],
    "gupta": [],
    "inq": ["method.partition=random"],
}
METHODS = groups.option_names("method")


def quiet(config: Any) -> Result:
    return run(planned_run(config), RunContext(ProgressReporter(quiet=True)))


def lines(result: Result, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run but for their times; those of a kind, or all others than what is told of layers."""
    found = [json.loads(line) for line in (Path(result.run) / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in found if (record["kind"] == kind if kind else record["kind"] != "layers")]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in kept]


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in RUNS)])
def test_a_run_is_the_same_however_much_is_told(name: str, configure: Configure, tmp_path: Path) -> None:
    words = [
        *QUIET,
        f"method={name}",
        *(RUNS.get(name) or [f"bits={quantizing_bits(name)}"]),
        "runtime.tensorboard=false",
    ]
    if name == "float":
        words.append("pretrain.epochs=3")
    off, light, full = (
        quiet(configure(*words, f"runtime.observe={level}", f"out={tmp_path / level}")) for level in LEVELS
    )
    assert off.status == "done", off.reason
    assert off.weights_sha256 == light.weights_sha256 == full.weights_sha256
    assert off.state_sha256 == light.state_sha256 == full.state_sha256
    assert lines(off) == lines(light) == lines(full)
    assert lines(off, "layers") == []
    assert lines(light, "layers") == lines(full, "layers")
    epochs = [record["epoch"] for record in lines(light, "layers")]
    assert epochs == ([] if name == "float" else [None] if not light.speed.seconds_per_epoch else [0, 1, 2])  # type: ignore[union-attr]


@pytest.mark.parametrize("asked", [9, 38, 39])  # of 20 an epoch: within the first; last step, validation of the second
def test_a_resumed_run_tells_the_same(asked: int, configure: Configure, tmp_path: Path) -> None:
    words = [*QUIET, "method=lsq", "runtime.tensorboard=false", "optim.batch_size=64"]
    whole = quiet(configure(*words, f"out={tmp_path / 'whole'}"))
    config = configure(*words, f"out={tmp_path / 'stopped'}")
    count = itertools.count(1)
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 15 if next(count) >= asked else 0))
    again = quiet(config)
    assert lines(again, "layers") == lines(whole, "layers")
    flips = ["w.flips" in record["layers"][LAYER] for record in lines(again, "layers")]
    assert flips == [False, True, True], "the first look has none before it"


def test_another_level_than_before_an_interruption_costs_one_epochs_flips(configure: Configure) -> None:
    words = [*QUIET, "method=lsq", "runtime.tensorboard=false"]
    count = itertools.count(1)
    with pytest.raises(Interrupted):
        run(
            planned_run(configure(*words, "runtime.observe=off")),
            RunContext(ProgressReporter(quiet=True), lambda: 15 * (next(count) > 30)),
        )
    told = lines(quiet(configure(*words)), "layers")
    assert ["w.flips" in record["layers"][LAYER] for record in told] == [False, True]


def test_a_checkpoint_without_what_was_remembered_is_noticed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, count = configure(*QUIET, "method=lsq", "runtime.tensorboard=false"), itertools.count(1)
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 15 * (next(count) > 30)))
    newest = TrainingSession._newest

    def without(session: TrainingSession) -> dict[str, Any] | None:
        saved = newest(session)
        assert saved is not None
        assert saved["session"]["memory"]["codes"][LAYER].dtype == torch.uint8
        del saved["session"]["memory"]
        return saved

    monkeypatch.setattr(TrainingSession, "_newest", without)
    assert ["w.flips" in record["layers"][LAYER] for record in lines(quiet(config), "layers")] == [False, False, True]


@pytest.mark.parametrize(("level", "steps"), [("light", [108, 126]), ("full", [18, 36, 54, 72, 90, 108, 126])])
def test_short_epochs_are_looked_at_now_and_then(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, level: str, steps: list[int]
) -> None:
    """Of 18 steps every sixth, 100 steps being the least, and the last."""
    monkeypatch.setattr(lookout, "STEPS", 100)
    words = [*QUIET, "method=lsq", "epochs=7", "runtime.tensorboard=false", f"runtime.observe={level}"]
    assert [record["step"] for record in lines(quiet(configure(*words)), "layers")] == steps


def test_it_is_no_part_of_a_runs_identity(configure: Configure) -> None:
    one, two = configure("method=dorefa"), configure("method=dorefa", "runtime.observe=full")
    assert run_identity(one).keys == run_identity(two).keys
    assert run_identity(one).protocol == run_identity(two).protocol
    assert one.runtime.observe == "light"
    with pytest.raises(ConfigError, match=r"runtime\.observe=much: allowed is.* off, light, full"):
        configure("runtime.observe=much")


def events(result: Result) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(result.run, size_guidance={"histograms": 0}).Reload()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """A run of each level, and the float parent."""
    found = {}
    for level in LEVELS:
        out = tmp_path_factory.mktemp(level)
        words = ["experiment=smoke", "method=lsq", "epochs=21", "dataset.val=0", f"runtime.observe={level}"]
        (config,) = compose.configurations([f"out={out}", "optim.batch_size=500", *words])
        found[level] = quiet(config)
    return found


def test_tags_of_each_level(shown: dict[str, Result]) -> None:
    tags = {level: events(result).Tags() for level, result in shown.items()}
    scalars = {level: {tag for tag in found["scalars"] if LAYER in tag} for level, found in tags.items()}
    histograms = {level: {tag for tag in found["histograms"] if LAYER in tag} for level, found in tags.items()}
    assert scalars["off"] == histograms["off"] == set()
    numbers = "w.top w.dead w.entropy w.flips w.grad w.step w.step.grad a.top a.dead a.entropy a.clipped a.step"
    names = [*numbers.split(), "a.step.grad", "sqnr", "cosine"]
    assert scalars["light"] == scalars["full"] == {f"{name}/{LAYER}" for name in names}
    assert histograms["light"] == {f"latent/{LAYER}", f"quantized/{LAYER}"}
    more = ("input", "quantized_input", "w.levels", "a.levels")
    assert histograms["full"] == histograms["light"] | {f"{name}/{LAYER}" for name in more}
    counts = {level: len(events(shown[level]).Histograms(f"latent/{LAYER}")) for level in ("light", "full")}
    assert counts == {"light": 11, "full": 21}, "every second and the last; every one"


def test_a_histogram_holds_every_value_and_the_levels(shown: dict[str, Result]) -> None:
    weights = torch.load(Path(shown["full"].run) / "last.pt", weights_only=True)["model"]
    latent = weights[f"{LAYER}.weight"]
    found = events(shown["full"])
    last = found.Histograms(f"latent/{LAYER}")[-1].histogram_value
    assert (last.num, last.min, last.max) == pytest.approx((latent.numel(), latent.min().item(), latent.max().item()))
    assert last.sum == pytest.approx(latent.sum().item(), rel=1e-4)
    quantized = found.Histograms(f"quantized/{LAYER}")[-1].histogram_value
    assert sum(count > 0 for count in quantized.bucket) == 4, "four levels, four bars"
    levels = found.Histograms(f"w.levels/{LAYER}")[-1].histogram_value
    assert sorted(count for count in levels.bucket if count) == sorted(c for c in quantized.bucket if c)
    step = weights[f"{LAYER}.weight_q.step"]
    assert found.Scalars(f"w.step/{LAYER}")[-1].value == pytest.approx(step.item(), rel=1e-5)


def plugin(result: Result, name: str) -> dict[str, Any]:
    """What a plugin finds in a run: tag -> metadata."""
    found = events(result).summary_metadata
    return {tag: data.plugin_data for tag, data in found.items() if data.plugin_data.plugin_name == name}


def test_the_charts_match_what_is_told_and_hold_the_parent_too(shown: dict[str, Result]) -> None:
    import re

    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    child, parent = shown["light"], Result(**vars(shown["light"]) | {"run": shown["light"].float["run"]})  # type: ignore[index]
    layouts = []
    for result in (child, parent):
        ((tag, _),) = plugin(result, "custom_scalars").items()
        layouts.append(Layout.FromString(events(result).Tensors(tag)[0].tensor_proto.string_val[0]))
    assert layouts[0] == layouts[1], "TensorBoard joins equal charts of all runs"
    charts = {f"{c.title}/{chart.title}": chart.multiline.tag[0] for c in layouts[0].category for chart in c.chart}
    assert len(charts) == sum(len(category) for category in CHARTS.values())
    tags = {"child": events(child).Tags()["scalars"], "parent": events(parent).Tags()["scalars"]}
    matched = {of: {n for n, tag in charts.items() if any(re.match(tag, t) for t in own)} for of, own in tags.items()}
    unmatched = {"validation", "frozen"}  # dataset.val=0, and lsq freezes nothing
    assert {n for n in charts if not any(word in n for word in unmatched)} == matched["child"]
    assert {n for n in matched["child"] if n.startswith("float and quantized")} == matched["parent"]
    numbers = next(tag for name, tag in charts.items() if "numbers" in name)
    assert {t.partition("/")[0] for t in tags["child"] if re.match(numbers, t)} == {"w.step", "a.step"}


def test_the_table_of_hyper_parameters_has_the_same_columns_for_all_runs(
    shown: dict[str, Result], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = configure("experiment=smoke", "method=dorefa", "init=scratch", "optim.lr=1e30")
    with pytest.raises(Diverged):
        quiet(config)
    folders = {"diverged": str(Path(config.out) / run_identity(config).directory), "done": shown["light"].run}
    folders["parent"] = shown["light"].float["run"]  # type: ignore[index]
    columns, ended = {}, {}
    for name, folder in folders.items():
        found = plugin(Result(**vars(shown["light"]) | {"run": folder}), "hparams")
        data = {tag: HParamsPluginData.FromString(entry.content) for tag, entry in found.items()}
        experiment = data["_hparams_/experiment"].experiment
        start = data["_hparams_/session_start_info"].session_start_info
        assert {i.name for i in experiment.hparam_infos if i.differs} == {"method", "w", "a", "g", "seed"}
        columns[name] = ([i.name for i in experiment.hparam_infos], [m.name.tag for m in experiment.metric_infos])
        assert set(start.hparams) == set(columns[name][0])
        ended[name] = "_hparams_/session_end_info" in data
        assert len(list(Path(folder).glob("events.out.tfevents.*"))) == 1
        assert not [path for path in Path(folder).iterdir() if path.is_dir()], "no run beside the run"
    assert columns["done"] == columns["parent"] == columns["diverged"]
    assert columns["done"][1] == [f"hparam/{name}" for name in METRICS]
    assert ended == {"diverged": False, "done": True, "parent": True}


@pytest.mark.parametrize("name", ["lsq", "uniform", "gupta"])
def test_looking_leaves_no_trace(name: str, configure: Configure) -> None:
    from qbench.experiment.setup import assemble
    from qbench.training.checkpoint import content_sha256
    from qbench.training.random_state import random_state

    config = configure("experiment=smoke", f"method={name}", "init=scratch")
    parts = assemble(config)
    model = parts.install(parts.float_model()).train()
    images = torch.rand(8, *parts.data.shape)
    model(images).sum().backward()

    def trace() -> tuple[str, list[bool], list[int]]:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        digest = content_sha256({"model": model.state_dict(), "grads": grads, "random": random_state()})
        return digest, [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]

    before = trace()
    seen = observe.trace_layers(model, images)
    observe.layer_metrics(model, images, seen, observe.codes(seen), observe.gradients(model))
    observe.occupancy(seen)
    assert trace() == before
    model(images)
    assert trace() != before, "a pass in training leaves one"
