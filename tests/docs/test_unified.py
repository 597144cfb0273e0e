"""scripts/unified.py: the width of the controls by hand, the tables from planted results, and the command."""

import importlib.util
import json
import re
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, Configure, long_tier, tiered
from helpers import evaluation

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.cost.count import count_cost
from qbench.cost.network_cost import NetworkCost
from qbench.errors import ConfigError
from qbench.experiment import sweep
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.quant.method import Unsupported
from qbench.runs.reader import RunRecord, read
from qbench.runs.result import BaselineResult

THIN = ("dataset=digits", "model=resnet8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("unified_script", str(ROOT / "scripts" / "unified.py"))
    spec = importlib.util.spec_from_loader("unified_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# --- the width of the controls


def float_bytes(width: int) -> int:
    """Return the bytes of ResNet-8 on digits: n = 1, one channel, ten classes, width w, four bytes per parameter.

    Convolutions 9 (w + 2 w^2 + 2 w^2 + 4 w^2 + 8 w^2 + 16 w^2), batch norms 2 (w + w + w + 2 w + 2 w + 4 w + 4 w),
    linear layer 40 w + 10.
    """
    return 4 * (9 * width + 288 * width**2 + 30 * width + 40 * width + 10)


def int8_bytes(width: int) -> int:
    """Return the same with one byte per weight except in the first and last layer, and a scale of four bytes for each
    of the w + w + 2 w + 2 w + 4 w + 4 w output channels.
    """
    return 288 * width**2 + 4 * 14 * width + 4 * (79 * width + 10)


@pytest.mark.parametrize(("kind", "expected"), [("float", float_bytes), ("8-bit", int8_bytes)])
def test_bytes_of_a_narrowed_network(script: ModuleType, configure: Configure, kind: str, expected: Any) -> None:
    words = [f"{key}={value}" for key, value in script.CONTROLS[kind].items()]
    setup = assemble(configure(*THIN, *words))
    assert [script.bytes_at(setup, width) for width in (1, 2, 5, 8)] == [expected(w) for w in (1, 2, 5, 8)]
    whole = count_cost(setup.install(setup.float_model()), {})
    assert script.bytes_at(setup, 8) == whole.bytes_ideal, "with memory and without"


@pytest.mark.parametrize(
    ("kind", "budget", "width"),
    [
        ("float", 7176, 2),  # dorefa W2 at width 8: 18432 weights in 4608 bytes, 642 floats; 5280 <= 7176 < 11356
        long_tier("float", 9480, 2),  # W3
        long_tier("float", 11784, 3),  # W4
        long_tier("float", 5280, 2),  # exactly
        ("float", 5279, 1),
        ("float", 1507, 0),  # a width of 1 takes 1508
        ("float", 10**9, 8),  # never wider than the network itself
        long_tier("8-bit", 7176, 4),  # 4608 + 224 + 1304 = 6136; a width of 5 takes 9100
        ("8-bit", 9480, 5),
        long_tier("8-bit", 11784, 5),  # a width of 6 takes 12640
    ],
)
def test_width_of_the_control(script: ModuleType, configure: Configure, kind: str, budget: int, width: int) -> None:
    words = [f"{key}={value}" for key, value in script.CONTROLS[kind].items()]
    assert script.widest_within(assemble(configure(*THIN, *words)), budget) == width


def test_resnet20_on_cifar10(script: ModuleType, configure: Configure) -> None:
    """1044 w^2 + 153 w + 10 parameters. At w = 16, W2 takes 267264 / 4 + 4 * 2458 = 76648 bytes: a float network of
    width 4 (69304) fits, one of width 5 (107500) does not. This needs no image.
    """
    words = [f"{key}={value}" for key, value in script.CONTROLS["float"].items()]
    setup = assemble(configure("dataset=cifar10", "model=resnet20", *words), planned=True)
    assert script.bytes_at(setup, 16) == 4 * 269_722
    assert [script.widest_within(setup, budget) for budget in (69_303, 76_648, 107_499, 107_500)] == [3, 4, 4, 5]
    quantized = configure("dataset=cifar10", "model=resnet20", "method=dorefa", "bits=w2a32")
    assert script.bytes_at(assemble(quantized, planned=True), 16) == 76_648


# --- the table


def plant_run(config: Config, top1: float, size: float, baseline: tuple[Config, float]) -> None:
    """Write a run with a known test top-1 and size, and the path and top-1 of its float baseline."""
    baseline_config, baseline_top1 = baseline
    result = BaselineResult(run=str(planned_run(baseline_config).path), final=evaluation(baseline_top1))
    cost = NetworkCost(
        params=1, macs=1, bitops=1, bytes_float=1, bytes_ideal=size, bytes_packed=int(size), bits_per_weight=2.0
    )
    directory = planned_run(config).directory
    done = replace(
        directory.new_result("done"),
        final=evaluation(top1),
        baseline=None if config.is_baseline else result,
        cost=cost,
        wall_seconds=1.0,
    )
    with directory.lock():
        directory.write_config()
        directory.finish(done)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Three methods at W2, one at W3, float at width 8; controls with 700 and 900 bytes; three seeds."""
    planted = {  # words -> bytes, top-1 of the three seeds
        ("method=float",): (4000, [95.0, 96.0, 97.0]),
        ("method=float", "init=float", "bits=w32a32"): (4000, [95.5, 96.5, 97.5]),
        ("method=dorefa", "bits=w2a32"): (1000, [94.0, 95.0, 96.0]),
        ("method=lsq", "bits=w2a32"): (900, [91.0, 93.0, 95.0]),
        ("method=ttq", "bits=w2a32"): (800, [88.0, 88.1, 87.9]),
        ("method=dorefa", "bits=w3a32"): (600, [95.0, 95.0, 95.0]),
        ("method=float", "init=float", "bits=w32a32", "model.width=3"): (700, [90.0, 90.0, 90.0]),
        ("method=uniform", "bits=w8a32", "model.width=5"): (900, [92.0, 94.0, 96.0]),
    }
    out = tmp_path_factory.mktemp("records")
    for words, (size, top1) in planted.items():
        width = [word for word in words if word.startswith("model.width")]
        configs = [compose_thin(out, *words), compose_thin(out, "method=float", *width)]
        for seed, accuracy in enumerate(top1):
            config, baseline = (replace(config, seed=seed) for config in configs)
            plant_run(config, accuracy, size, (baseline, 97.0))
    return read([str(out)])


def compose_thin(out: Path, *words: str) -> Config:
    (config,) = compose.configurations([f"out={out}", *THIN, *words])
    return config


def test_every_network_is_compared_with_the_controls_of_its_bytes(script: ModuleType, records: list[RunRecord]) -> None:
    rows = [row for row in script.network_rows(records) if row.role == "quantized"]
    controls = {(row.setting.method, row.setting.bits.w): row.controls for row in rows}
    widths = {key: {kind: pair and pair[0].width for kind, pair in pairs.items()} for key, pairs in controls.items()}
    assert widths == {
        ("dorefa", 2): {"float": 3, "8-bit": 5},
        ("lsq", 2): {"float": 3, "8-bit": 5},  # exactly the 8-bit control's bytes
        ("ttq", 2): {"float": 3, "8-bit": None},
        ("dorefa", 3): {"float": None, "8-bit": None},
    }
    _, d = controls["dorefa", 2]["float"]  # 4, 5, 6: mean 5, standard error 1 / sqrt(3), t(2) quantile 4.302653
    assert (d.mean, d.n) == (5.0, 3)
    assert d.high - d.mean == pytest.approx(4.302653 / 3**0.5, abs=1e-6)
    _, d = controls["lsq", 2]["8-bit"]  # -1, -1, -1: paired by seed, although both spread by two points
    assert (d.mean, d.low, d.high) == (-1.0, -1.0, -1.0)


def test_tables(script: ModuleType, records: list[RunRecord]) -> None:
    whole, two, three = script.tables(records)
    assert [row[0] for row in whole.rows] == ["float", "float, fine-tuned"]
    assert [row[0] for row in two.rows] == [
        *("dorefa", "lsq", "ttq", "float, fine-tuned, narrowed", "8-bit (uniform), narrowed"),
    ]  # fmt: skip
    shown = dict(zip(two.head, two.rows[0], strict=True))
    assert shown == {
        "method": "dorefa",
        "W": "2",
        "A": "32",
        "levels": "-",
        "bits/weight": "2.00",
        "width": "8",
        "bytes": "1 kB",
        "top-1 %": "95.00",
        "std": "1.00",
        "n": "3",
        "diff": "-2.00",
        "over float": "+5.00 ±2.48",
        "over 8-bit": "+1.00 ±2.48",
    }
    assert two.rows[3][5:] == ("3", "700 B", "90.00", "0.00", "3", "-7.00", "-", "-")
    assert [row[0] for row in three.rows] == ["dorefa"], "no control is as small"
    assert three.notes[:2] == [f"W3: no {kind} network fits into these bytes" for kind in script.CONTROLS]


def test_sentences_on_controls(script: ModuleType, records: list[RunRecord]) -> None:
    """dorefa: +4 +5 +6; lsq: +1 +3 +5, 3 +- 4.97; ttq: -2 -1.9 -2.1. Of the 8-bit net: +2 +1 +0, and -1 -1 -1."""
    _, two, _ = script.tables(records)
    against_float, against_int8 = two.notes[:2]
    # 700 of 1000, 900 and 800 bytes; 900 of 1000 and 900
    assert against_float.startswith(
        "W2 compared with float controls, which have 70 % to 88 % of the bytes of the quantized networks. "
    )
    assert against_float.endswith("Methods above their control: dorefa; below: ttq; not significantly different: lsq")
    assert against_int8.startswith(
        "W2 compared with 8-bit controls, which have 90 % to 100 % of the bytes of the quantized networks. "
    )
    assert against_int8.endswith("Methods above their control: none; below: lsq; not significantly different: dorefa")


def test_a_seed_without_control_is_left_out(script: ModuleType, records: list[RunRecord]) -> None:
    some = [run for run in records if run.result and not (run.result.bits["w"] == 8 and run.result.seed == 0)]
    rows = script.network_rows(some)
    row = next(r for r in rows if (r.setting.method, r.setting.bits.w) == ("dorefa", 2))
    assert (row.setting.top1.n, row.controls["8-bit"][1].n) == (3, 2)


def test_failed_runs_are_listed(script: ModuleType, records: list[RunRecord]) -> None:
    failed = replace(records[0], status="failed", reason="why", result=None)
    assert script.tables([failed, *records[1:]])[-1].values[0].reason == "why"


# --- the command


@pytest.mark.full
def test_the_default_command(script: ModuleType) -> None:
    assert (script.sweep_keys([])["bits"], script.sweep_keys([])["seed"]) == ("w2a32,w3a32,w4a32", "0,1,2")
    words = script.sweep_keys(["seed=0", "bits=w2a32"])
    configs = {c.method["name"]: c for c in script.compose_sweep(words)}
    assert {*configs} == {*groups.option_names("method")} - {"float"}
    assert {(c.dataset["name"], c.model["name"], c.model["width"]) for c in configs.values()} == {
        ("cifar10", "resnet20", 16),
    }  # fmt: skip
    assert {(c.bits.w, c.bits.a) for c in configs.values()} == {(2, 32)}
    for name in ("bwn", "gupta", "hwgq", "xnor"):
        with pytest.raises(Unsupported):
            assemble(configs[name], planned=True)
    for name in ("dorefa", "inq", "lsq", "ttq", "twn", "uniform"):
        assemble(configs[name], planned=True)
    for keys in script.CONTROLS.values():
        (control,) = script.compose_sweep(words | keys)
        narrow = script.with_width(control, 5)
        assert (narrow.model["width"], control.model["width"]) == (5, 16)
        assert not control.is_baseline, "it is fine-tuned too: the same total epochs"
        ours, theirs = (
            (c.pretrain, c.epochs, c.optim, c.dataset, c.layers, c.init) for c in (narrow, configs["dorefa"])
        )
        assert ours == theirs


def test_the_document_has_the_table_of_its_command(script: ModuleType) -> None:
    text = (ROOT / "docs" / "unified.md").read_text(encoding="utf-8")
    ((command, body),) = re.findall(r"<!-- table: (scripts/unified.py .*?) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert f"`{command}`" in body, "run scripts/tables.py unified"
    assert not re.search(r"^\| (failed|diverged|unfinished|running|corrupt) ", body, re.MULTILINE)
    (config,) = script.compose_sweep(script.sweep_keys([*command.split()[1:], "method=ttq", "bits=w2a32", "seed=0"]))
    assert f"| ttq | 2 | 32 | 3 | 2.00 | {config.model['width']} |" in body


def test_unsuitable_keys_are_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["init=scratch"]) == ConfigError.status
    assert "remove init" in capsys.readouterr().err
    assert script.main(["model=lenet", "dataset=synthetic", "method=dorefa", "seed=0"]) == ConfigError.status
    assert "width" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", tiered(["0", "0,1"], ["0"]))
def test_from_training_to_table(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seeds: str
) -> None:
    """Thin and short, in this process; the repetition trains nothing, even after the directory was moved."""
    monkeypatch.setattr(sweep, "launch_all", lambda words, configs, name, stop: sweep.run_all(configs, stop))
    words = [*THIN, "model.width=4", "epochs=1", "pretrain.epochs=1"]
    words += [f"seed={seeds}", "method=dorefa,bwn", "bits=w2a32"]
    assert script.main([*words, f"out={tmp_path / 'a'}", "--format=json"]) == 0
    first = json.loads(capsys.readouterr().out)["tables"]
    row = next(row for row in first[1]["rows"] if row["method"] == "dorefa")
    # 288 * 16 / 4 + 4 (79 * 4 + 10) = 2456: a float net of width 1 (1508), an 8-bit one of 2 (1152 + 744 + 40 = 1936)
    assert row["bytes"] == 2456
    assert (row["over float"]["width"], row["over 8-bit"]["width"]) == (1, 2)
    assert [row["bytes"] for row in first[1]["rows"][1:]] == [1508, 1936]
    assert first[-1]["rows"][0]["status"] == "unsupported"
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(sweep, "launch_all", None)
    assert script.main([*words, f"out={tmp_path / 'b'}", "hydra.launcher.n_jobs=1"]) == 0
    printed = capsys.readouterr().out
    assert f"`scripts/unified.py {' '.join(words)}`: " in printed
    assert f"{row['top1_mean']:.2f}" in printed
