"""Layer statistics: computed by hand, without effect on training, complete in TensorBoard."""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import log10, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure, long_tier, tiered
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
from qbench.quant.quantizer import Grid, Quantizer
from qbench.quant.sqnr import MAX_SQNR
from qbench.runs.directory import directory_name
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result
from qbench.runs.tensorboard import CHARTS, METRICS
from qbench.training import layer_stats, monitor

LAYER = "layer1.0.conv1"
LEVELS = ("off", "light", "full")
INPUT = torch.tensor([[0.25, 1.0], [4.0, -1.0]])


@pytest.fixture(autouse=True, scope="module")
def _observe_every_epoch() -> Iterator[None]:
    """Observe after every epoch, although epochs are short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "MIN_STEPS_BETWEEN", 1)
        yield


class Nearest(Quantizer):
    """Rounds to the nearest of the given levels, in one group."""

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
    """Return three linear layers; the middle one is quantized, and its input is the network's
    input.
    """
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor(weight))
    install(method, model)
    return model, quantized_layers(model)["1"]


def small_network() -> tuple[nn.Module, QLayer]:
    method = Method(
        name="nearest", bits=Bits(2, 2), supported_bits={"w": (2,), "a": (2,)},
        weight=lambda name, layer, bits: Nearest(-1.0, 0.0, 1.0),
        input=lambda name, layer, bits: Nearest(0.0, 1.0, 2.0, 3.0),
    )  # fmt: skip
    return network(method, [[0.75, 0.25], [-1.0, 0.25]])


def metrics_of(model: nn.Module, last_codes: dict[str, Tensor] | None = None) -> dict[str, float]:
    traces = layer_stats.trace_layers(model, INPUT)
    return layer_stats.layer_metrics(model, INPUT, traces, last_codes or {}, layer_stats.gradient_norms(model))["1"]


def test_statistics_of_a_layer_by_hand() -> None:
    model, layer = small_network()
    layer.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    layer.weight_q.step.grad = torch.tensor(-2.0)  # type: ignore[union-attr]
    # quantized inputs (0, 1), (3, 0), quantized weights (1, 0), (-1, 0); float outputs (7/16, 0),
    # (11/4, -17/4), quantized outputs (0, 0), (3, -3): errors 7/16, 1/4 and 5/4
    signal, error = (49 + 44**2 + 68**2) / 256, (49 + 16 + 400) / 256
    expected = {
        "w.top": 1.0, "w.dead": 0.0, "w.entropy": 1.5,  # -1, 0, 1: one, two, one of four
        "a.top": 3.0, "a.dead": 1.0, "a.entropy": 1.5,  # 0, 1, 3: two, one, one; nothing on 2
        "a.clipped": 0.25,  # 4 is above 3; -1 is not clipped, because no level is negative
        "sqnr": 10 * log10(signal / error), "cosine": (11 / 4 * 3 + 17 / 4 * 3) / sqrt(18 * signal),
        "w.grad": 5.0, "w.step": 0.5, "a.step": 0.5, "w.step.grad": 2.0,
    }  # fmt: skip
    assert metrics_of(model) == pytest.approx(expected, rel=1e-5)


def test_flips_are_weights_on_another_level() -> None:
    model, layer = small_network()
    before = layer_stats.weight_codes(layer_stats.trace_layers(model, INPUT))
    assert metrics_of(model, before)["w.flips"] == 0
    with torch.no_grad():
        layer.weight[0, 0] = 0.6
        layer.weight[1, 1] = 0.75
    assert metrics_of(model, before)["w.flips"] == 0.25, (
        "0.6 has the level of 0.75, but 0.75 does not have that of 0.25"
    )


def test_a_new_level_below_the_others_is_no_flip_of_all_weights() -> None:
    """The grid of APoT's edge layers gets further levels at its lower end if a weight needs them."""
    model, layer = small_network()
    before = layer_stats.weight_codes(layer_stats.trace_layers(model, INPUT))
    layer.weight_q.points = (-2.0, -1.0, 0.0, 1.0)  # type: ignore[assignment]
    assert metrics_of(model, before)["w.flips"] == 0


def test_negative_levels_clip_low_values_too() -> None:
    model, layer = small_network()
    layer.input_q = Nearest(-0.5, 0.5)
    assert metrics_of(model)["a.clipped"] == 0.75


def test_scale_groups_are_counted_together_and_frozen_weights_reported() -> None:
    model, _ = network(bwn.build(), [[1.0, 3.0], [-4.0, -4.0]])  # +-2 in the first filter, +-4 in the second
    values = metrics_of(model)
    assert (values["w.top"], values["w.entropy"], values["w.dead"]) == (4, 1, 0)
    assert "a.top" not in values
    model, layer = network(inq.build(), [[1.0, 0.5], [0.25, 0.7]])
    assert isinstance(layer.weight_q, inq.INQWeight)
    layer.weight_q.freeze_next(layer.weight, 0.5, "largest")
    assert metrics_of(model)["w.frozen"] == 0.5


def test_sqnr_of_equal_outputs_is_the_maximum_and_of_zero_outputs_undefined() -> None:
    model, layer = small_network()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    layer.input_q = Nearest(0.25, 1.0, 4.0, -1.0)
    assert metrics_of(model)["sqnr"] == MAX_SQNR
    with torch.no_grad():
        layer.weight.zero_()
    assert not {"sqnr", "cosine"} & set(metrics_of(model))


@pytest.mark.parametrize(
    ("shape", "trained", "count"),
    [((100, 1, 8, 8), 1152, 18), ((100, 1, 8, 8), 64, 8), ((100, 3, 32, 32), 45_000, 64), ((9, 3, 224, 224), 10**6, 2)],
)
def test_number_of_observed_images(shape: tuple[int, ...], trained: int, count: int) -> None:
    assert len(layer_stats.observed_images(torch.zeros(shape), trained)) == count


WORDS = ["experiment=smoke", "epochs=3", "init=scratch"]
RUNS = {  # what draws random numbers: rounding of gradients, of weights, of everything, a random partition
    "dorefa": ["bits=w2a2g4"],
    "qd": ["method.stochastic=true"],
    "gupta": [],
    "inq": ["method.partition=random"],
}
METHODS = groups.option_names("method")


def run_quietly(config: Any) -> Result:
    return run(planned_run(config), RunContext(ProgressReporter(quiet=True)))


def records_of(result: Result, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records in metrics.jsonl without times: those of a kind, by default all except
    layer statistics.
    """
    found = [json.loads(line) for line in (Path(result.run) / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in found if (record["kind"] == kind if kind else record["kind"] != "layers")]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in kept]


FAST = ("inq",)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in FAST)])
def test_observation_does_not_change_a_run(name: str, configure: Configure, tmp_path: Path) -> None:
    words = [
        *WORDS,
        f"method={name}",
        *(RUNS.get(name) or [f"bits={quantizing_bits(name)}"]),
        "runtime.tensorboard=false",
        "optim.batch_size=192",
    ]
    if name == "float":
        words.append("pretrain.epochs=3")
    off, light, full = (
        run_quietly(configure(*words, f"runtime.observe={level}", f"out={tmp_path / level}")) for level in LEVELS
    )
    assert off.status == "done", off.reason
    assert off.weights_sha256 == light.weights_sha256 == full.weights_sha256
    assert off.state_sha256 == light.state_sha256 == full.state_sha256
    assert records_of(off) == records_of(light) == records_of(full)
    assert records_of(off, "layers") == []
    assert records_of(light, "layers") == records_of(full, "layers")
    epochs = [record["epoch"] for record in records_of(light, "layers")]
    assert epochs == ([] if name == "float" else [None] if not light.speed.seconds_per_epoch else [0, 1, 2])


RESUMED = [*WORDS, "method=lsq", "runtime.tensorboard=false", "optim.batch_size=64"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return the run that the resumed runs are compared with."""
    torch.set_num_threads(1)
    (config,) = compose.configurations([*RESUMED, f"out={tmp_path_factory.mktemp('uninterrupted')}"])
    return run_quietly(config)


# of 20 per epoch: in the first; last step, validation of the second
@pytest.mark.parametrize("stop_at", tiered([9, 38, 39], [39]))
def test_a_resumed_run_logs_the_same(stop_at: int, uninterrupted: Result, configure: Configure) -> None:
    config = configure(*RESUMED)
    count = itertools.count(1)
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: 15 if next(count) >= stop_at else 0))
    again = run_quietly(config)
    assert records_of(again, "layers") == records_of(uninterrupted, "layers")
    flips = ["w.flips" in record["layers"][LAYER] for record in records_of(again, "layers")]
    assert flips == [False, True, True], "the first observation has no earlier one"


@pytest.mark.full
def test_flips_are_missing_once_after_the_level_was_changed(configure: Configure) -> None:
    words = [*WORDS, "method=lsq", "runtime.tensorboard=false"]
    count = itertools.count(1)
    with pytest.raises(Interrupted):
        run(
            planned_run(configure(*words, "runtime.observe=off")),
            RunContext(ProgressReporter(quiet=True), lambda: 15 * (next(count) > 30)),
        )
    records = records_of(run_quietly(configure(*words)), "layers")
    assert ["w.flips" in record["layers"][LAYER] for record in records] == [False, True]


def test_flips_are_missing_once_after_the_memory_was_lost(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, count = configure(*WORDS, "method=lsq", "runtime.tensorboard=false"), itertools.count(1)
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
    assert ["w.flips" in record["layers"][LAYER] for record in records_of(run_quietly(config), "layers")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("level", "steps"), [long_tier("light", [108, 126]), ("full", [18, 36, 54, 72, 90, 108, 126])])
def test_short_epochs_are_observed_at_intervals(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, level: str, steps: list[int]
) -> None:
    """Epochs have 18 steps: every sixth is observed, because 100 steps is the smallest interval,
    and the last.
    """
    monkeypatch.setattr(monitor, "MIN_STEPS_BETWEEN", 100)
    words = [*WORDS, "method=lsq", "epochs=7", "runtime.tensorboard=false", f"runtime.observe={level}"]
    words += ["model=mlp", "model.hidden=3", "model.width=16"]
    assert [record["step"] for record in records_of(run_quietly(configure(*words)), "layers")] == steps


def test_the_level_is_not_part_of_the_identity(configure: Configure) -> None:
    one, two = configure("method=dorefa"), configure("method=dorefa", "runtime.observe=full")
    assert run_identity(one).keys == run_identity(two).keys
    assert run_identity(one).protocol == run_identity(two).protocol
    assert one.runtime.observe == "light"
    with pytest.raises(ConfigError, match=r"runtime\.observe=much: must be.* off, light, full"):
        configure("runtime.observe=much")


def events(result: Result) -> Any:
    return _events(result.run)


@functools.cache
def _events(run: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(run, size_guidance={"histograms": 0}).Reload()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Return a run of each level with event files; they share the float baseline."""
    folder, logged = tmp_path_factory.mktemp("logged"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "HISTOGRAMS_PER_RUN", 3)
        for level in LEVELS:
            out = folder / level
            if logged:
                shutil.copytree(folder / LEVELS[0], out, ignore=shutil.ignore_patterns("lsq-*"))
            words = ["experiment=smoke", "method=lsq", "epochs=7", "dataset.val=0", f"runtime.observe={level}"]
            (config,) = compose.configurations([f"out={out}", "optim.batch_size=500", *words])
            logged[level] = run_quietly(config)
    return logged


def test_tags_of_each_level(logged: dict[str, Result]) -> None:
    tags = {level: events(result).Tags() for level, result in logged.items()}
    scalars = {level: {tag for tag in found["scalars"] if LAYER in tag} for level, found in tags.items()}
    histograms = {level: {tag for tag in found["histograms"] if LAYER in tag} for level, found in tags.items()}
    assert scalars["off"] == histograms["off"] == set()
    numbers = "w.top w.dead w.entropy w.flips w.grad w.step w.step.grad a.top a.dead a.entropy a.clipped a.step"
    names = [*numbers.split(), "a.step.grad", "sqnr", "cosine"]
    assert scalars["light"] == scalars["full"] == {f"quant/{name}/{LAYER}" for name in names}
    assert histograms["light"] == {f"quant/latent/{LAYER}", f"quant/quantized/{LAYER}"}
    more = ("input", "quantized_input", "w.levels", "a.levels")
    assert histograms["full"] == histograms["light"] | {f"quant/{name}/{LAYER}" for name in more}
    counts = {level: len(events(logged[level]).Histograms(f"quant/latent/{LAYER}")) for level in ("light", "full")}
    assert counts == {"light": 4, "full": 7}, "every second and the last; every one"


def test_a_histogram_holds_every_value_and_the_levels(logged: dict[str, Result]) -> None:
    weights = torch.load(Path(logged["full"].run) / "last.pt", weights_only=True)["model"]
    latent = weights[f"{LAYER}.weight"]
    found = events(logged["full"])
    last = found.Histograms(f"quant/latent/{LAYER}")[-1].histogram_value
    assert (last.num, last.min, last.max) == pytest.approx((latent.numel(), latent.min().item(), latent.max().item()))
    assert last.sum == pytest.approx(latent.sum().item(), rel=1e-4)
    quantized = found.Histograms(f"quant/quantized/{LAYER}")[-1].histogram_value
    assert sum(count > 0 for count in quantized.bucket) == 4, "four levels give four bars"
    levels = found.Histograms(f"quant/w.levels/{LAYER}")[-1].histogram_value
    assert sorted(count for count in levels.bucket if count) == sorted(c for c in quantized.bucket if c)
    step = weights[f"{LAYER}.weight_q.step"]
    assert found.Scalars(f"quant/w.step/{LAYER}")[-1].value == pytest.approx(step.item(), rel=1e-5)


def plugin(result: Result, name: str) -> dict[str, Any]:
    """Return what a TensorBoard plugin finds in a run: tag -> metadata."""
    found = events(result).summary_metadata
    return {tag: data.plugin_data for tag, data in found.items() if data.plugin_data.plugin_name == name}


def test_the_charts_show_all_logged_tags_and_the_float_baseline(logged: dict[str, Result]) -> None:
    import re

    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    quantized = logged["light"]
    assert quantized.baseline is not None
    baseline = replace(quantized, run=quantized.baseline.run)
    layouts = []
    for result in (quantized, baseline):
        ((tag, _),) = plugin(result, "custom_scalars").items()
        layouts.append(Layout.FromString(events(result).Tensors(tag)[0].tensor_proto.string_val[0]))
    assert layouts[0] == layouts[1], "TensorBoard joins equal charts of all runs"
    charts = {f"{c.title}/{chart.title}": chart.multiline.tag[0] for c in layouts[0].category for chart in c.chart}
    assert len(charts) == sum(len(category) for category in CHARTS.values())
    tags = {"quantized": events(quantized).Tags()["scalars"], "baseline": events(baseline).Tags()["scalars"]}
    matched = {
        run: {name for name, pattern in charts.items() if any(re.match(pattern, tag) for tag in own_tags)}
        for run, own_tags in tags.items()
    }
    unmatched = {"validation", "frozen"}  # because of dataset.val=0, and because lsq freezes no weights
    assert {n for n in charts if not any(word in n for word in unmatched)} == matched["quantized"]
    assert {n for n in matched["quantized"] if n.startswith("float and quantized")} == matched["baseline"]
    numbers = next(tag for name, tag in charts.items() if name.endswith("steps, scales, clips"))
    assert {t.split("/")[1] for t in tags["quantized"] if re.match(numbers, t)} == {"w.step", "a.step"}


def test_the_table_of_hyper_parameters_has_the_same_columns_for_all_runs(
    logged: dict[str, Result], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = configure("experiment=smoke", "method=dorefa", "init=scratch", "optim.lr=1e30")
    with pytest.raises(Diverged):
        run_quietly(config)
    folders = {"diverged": str(Path(config.out) / directory_name(run_identity(config))), "done": logged["light"].run}
    assert logged["light"].baseline is not None
    folders["baseline"] = logged["light"].baseline.run
    columns, ended = {}, {}
    for name, folder in folders.items():
        found = plugin(replace(logged["light"], run=folder), "hparams")
        data = {tag: HParamsPluginData.FromString(entry.content) for tag, entry in found.items()}
        experiment = data["_hparams_/experiment"].experiment
        start = data["_hparams_/session_start_info"].session_start_info
        assert {i.name for i in experiment.hparam_infos if i.differs} == {"method", "w", "a", "g", "seed"}
        columns[name] = ([i.name for i in experiment.hparam_infos], [m.name.tag for m in experiment.metric_infos])
        assert set(start.hparams) == set(columns[name][0])
        ended[name] = "_hparams_/session_end_info" in data
        assert len(list(Path(folder).glob("events.out.tfevents.*"))) == 1
        assert not [path for path in Path(folder).iterdir() if path.is_dir()], "no extra run in a subfolder"
    assert columns["done"] == columns["baseline"] == columns["diverged"]
    assert columns["done"][1] == [*METRICS]
    assert ended == {"diverged": False, "done": True, "baseline": True}


@pytest.mark.parametrize("name", tiered(["lsq", "uniform", "gupta"], ["lsq"]))
def test_observing_leaves_no_trace(name: str, configure: Configure) -> None:
    from qbench.experiment.setup import assemble
    from qbench.training.digests import content_sha256
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
    traces = layer_stats.trace_layers(model, images)
    codes, gradients = layer_stats.weight_codes(traces), layer_stats.gradient_norms(model)
    layer_stats.layer_metrics(model, images, traces, codes, gradients)
    layer_stats.level_counts(traces)
    assert trace() == before
    model(images)
    assert trace() != before, "a pass in training mode leaves one"
