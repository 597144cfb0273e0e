"""scripts/unified.py: the control's width by hand, the table from made results, the command if CIFAR-10 is there."""

import importlib.util
import json
import re
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, Configure

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.cost.count import count_cost
from qbench.errors import ConfigError
from qbench.experiment import sweep
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.quant.method import Unsupported
from qbench.runs.reader import RunRecord, read

THIN = ("dataset=digits", "model=resnet8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("unified_script", str(ROOT / "scripts" / "unified.py"))
    spec = importlib.util.spec_from_loader("unified_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# --- the control's width


def float_bytes(width: int) -> int:
    """Of ResNet-8 on digits, n = 1, one channel, ten classes, w the width: convolutions 9 (w + 2 w^2 + 2 w^2 + 4 w^2 +
    8 w^2 + 16 w^2), batch norms 2 (w + w + w + 2 w + 2 w + 4 w + 4 w), the linear layer 40 w + 10; four bytes each.
    """
    return 4 * (9 * width + 288 * width**2 + 30 * width + 40 * width + 10)


def int8_bytes(width: int) -> int:
    """The same with a byte a weight in all but the first and last layer, and a scale of four bytes for each of the
    w + w + 2 w + 2 w + 4 w + 4 w output channels.
    """
    return 288 * width**2 + 4 * 14 * width + 4 * (79 * width + 10)


@pytest.mark.parametrize(("kind", "expected"), [("float", float_bytes), ("8-bit", int8_bytes)])
def test_bytes_of_a_narrowed_network(script: ModuleType, configure: Configure, kind: str, expected: Any) -> None:
    words = [f"{key}={value}" for key, value in script.CONTROLS[kind].items()]
    parts = assemble(configure(*THIN, *words))
    assert [script.bytes_at(parts, width) for width in (1, 2, 5, 8)] == [expected(w) for w in (1, 2, 5, 8)]
    whole = count_cost(parts.install(parts.float_model()), {})
    assert script.bytes_at(parts, 8) == whole["bytes_ideal"], "with memory and without"


@pytest.mark.parametrize(
    ("kind", "budget", "width"),
    [
        ("float", 7176, 2),  # dorefa W2 at width 8: 18432 weights in 4608 bytes, 642 floats; 5280 <= 7176 < 11356
        ("float", 9480, 2),  # W3
        ("float", 11784, 3),  # W4
        ("float", 5280, 2),  # exactly
        ("float", 5279, 1),
        ("float", 1507, 0),  # a width of 1 takes 1508
        ("float", 10**9, 8),  # never wider than the network itself
        ("8-bit", 7176, 4),  # 4608 + 224 + 1304 = 6136; a width of 5 takes 9100
        ("8-bit", 9480, 5),
        ("8-bit", 11784, 5),  # a width of 6 takes 12640
    ],
)
def test_width_of_the_control(script: ModuleType, configure: Configure, kind: str, budget: int, width: int) -> None:
    words = [f"{key}={value}" for key, value in script.CONTROLS[kind].items()]
    assert script.narrowed(assemble(configure(*THIN, *words)), budget) == width


def test_resnet20_on_cifar10(script: ModuleType, configure: Configure) -> None:
    """1044 w^2 + 153 w + 10 parameters; at w = 16, W2: 267264 / 4 + 4 * 2458 = 76648 bytes, which a float net of
    width 4 (69304) fits into and one of width 5 (107500) does not. No image is needed to say so.
    """
    words = [f"{key}={value}" for key, value in script.CONTROLS["float"].items()]
    parts = assemble(configure("dataset=cifar10", "model=resnet20", *words), planned=True)
    assert script.bytes_at(parts, 16) == 4 * 269_722
    assert [script.narrowed(parts, budget) for budget in (69_303, 76_648, 107_499, 107_500)] == [3, 4, 4, 5]
    quantized = configure("dataset=cifar10", "model=resnet20", "method=dorefa", "bits=w2a32")
    assert script.bytes_at(assemble(quantized, planned=True), 16) == 76_648


# --- the table


def plant(config: Config, top1: float, size: float, parent: tuple[Config, float]) -> None:
    """Write a run with a known figure and size, and its parent's place and figure."""
    directory = planned_run(config).directory
    final = {"test": {"top1": top1, "top5": 99.0, "loss": 0.1}, "val": {}, "epoch": 0}
    own, figure = parent
    base = {"run": str(planned_run(own).path), "final": {"test": {"top1": figure}, "val": {}}, "best": None}
    cost = {"bits_per_weight": 2.0, "bytes_ideal": size, "bitops": 1, "bytes_float": 1, "macs": 1}
    with directory.lock():
        directory.write_config()
        alone = config.is_baseline
        directory.finish(
            directory.new_result("done", final=final, float=None if alone else base, cost=cost, wall_seconds=1.0)
        )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Three methods at W2, one at W3, float at width 8; controls of 700 and 900 bytes; three seeds."""
    figures = {  # words -> bytes, top-1 of the three seeds
        ("method=float",): (4000, [95.0, 96.0, 97.0]),
        ("method=float", "init=float", "bits=w32a32"): (4000, [95.5, 96.5, 97.5]),
        ("method=dorefa", "bits=w2a32"): (1000, [94.0, 95.0, 96.0]),
        ("method=lsq", "bits=w2a32"): (900, [91.0, 93.0, 95.0]),
        ("method=ttq", "bits=w2a32"): (800, [88.0, 88.1, 87.9]),
        ("method=dorefa", "bits=w3a32"): (600, [95.0, 95.0, 95.0]),
        ("method=float", "init=float", "bits=w32a32", "model.width=3"): (700, [90.0, 90.0, 90.0]),
        ("method=uniform", "bits=w8a32", "model.width=5"): (900, [92.0, 94.0, 96.0]),
    }
    out = tmp_path_factory.mktemp("found")
    for words, (size, top1) in figures.items():
        width = [word for word in words if word.startswith("model.width")]
        made = [composed(out, *words), composed(out, "method=float", *width)]
        for seed, figure in enumerate(top1):
            config, parent = (replace(config, seed=seed) for config in made)
            plant(config, figure, size, (parent, 97.0))
    return read([str(out)])


def composed(out: Path, *words: str) -> Config:
    (config,) = compose.configurations([f"out={out}", *THIN, *words])
    return config


def test_every_network_is_set_against_what_fits_into_its_bytes(script: ModuleType, found: list[RunRecord]) -> None:
    rows = {
        (row["method"].split()[0], row["bits"]["w"], row["width"], row["role"]): row for row in script.rows_of(found)
    }
    against = {key[:2]: row["against"] for key, row in rows.items() if key[3] == "cell"}
    widths = {key: {kind: pair and pair[0]["width"] for kind, pair in row.items()} for key, row in against.items()}
    assert widths == {
        ("dorefa", 2): {"float": 3, "8-bit": 5},
        ("lsq", 2): {"float": 3, "8-bit": 5},  # exactly the 8-bit control's bytes
        ("ttq", 2): {"float": 3, "8-bit": None},
        ("dorefa", 3): {"float": None, "8-bit": None},
    }
    _, d = against["dorefa", 2]["float"]  # 4, 5, 6: mean 5, standard error 1 / sqrt(3), t(2) quantile 4.302653
    assert (d.mean, d.n) == (5.0, 3)
    assert d.high - d.mean == pytest.approx(4.302653 / 3**0.5, abs=1e-6)
    _, d = against["lsq", 2]["8-bit"]  # -1, -1, -1: paired by seed, though both spread by two points
    assert (d.mean, d.low, d.high) == (-1.0, -1.0, -1.0)


def test_the_table(script: ModuleType, found: list[RunRecord]) -> None:
    whole, two, three = script.tables(found)
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
    assert three.notes[:2] == [f"W3: no {kind} network within these bytes" for kind in script.CONTROLS]


def test_the_sentence_of_a_width(script: ModuleType, found: list[RunRecord]) -> None:
    """dorefa: +4 +5 +6; lsq: +1 +3 +5, 3 +- 4.97; ttq: -2 -1.9 -2.1. Of the 8-bit net: +2 +1 +0, and -1 -1 -1."""
    _, two, _ = script.tables(found)
    against_float, against_int8 = two.notes[:2]
    # 700 of 1000, 900 and 800 bytes; 900 of 1000 and 900
    assert against_float.startswith("W2 against the float network within their bytes (70 % to 88 % of them): ")
    assert against_float.endswith("above: dorefa; below: ttq; not told apart: lsq")
    assert against_int8.startswith("W2 against the 8-bit network within their bytes (90 % to 100 % of them): ")
    assert against_int8.endswith("above: none; below: lsq; not told apart: dorefa")


def test_a_seed_that_a_control_lacks_is_left_out(script: ModuleType, found: list[RunRecord]) -> None:
    some = [run for run in found if run.result and not (run.result.bits["w"] == 8 and run.result.seed == 0)]
    row = next(r for r in script.rows_of(some) if r["method"] == "dorefa" and r["bits"]["w"] == 2)
    assert (row["n"], row["against"]["8-bit"][1].n) == (3, 2)


def test_failed_runs_are_listed(script: ModuleType, found: list[RunRecord]) -> None:
    failed = replace(found[0], status="failed", reason="why", result=None)
    assert script.tables([failed, *found[1:]])[-1].values[0]["reason"] == "why"


# --- the command


def test_the_command_where_cifar10_is_at_hand(script: ModuleType) -> None:
    assert (script.words_of([])["bits"], script.words_of([])["seed"]) == ("w2a32,w3a32,w4a32", "0,1,2")
    words = script.words_of(["seed=0", "bits=w2a32"])
    cells = {c.method["name"]: c for c in script.composed(words)}
    assert {*cells} == {*groups.option_names("method")} - {"float"}
    assert {(c.dataset["name"], c.model["name"], c.model["width"]) for c in cells.values()} == {
        ("cifar10", "resnet20", 16),
    }  # fmt: skip
    assert {(c.bits.w, c.bits.a) for c in cells.values()} == {(2, 32)}
    unsupported = set()
    for name, config in cells.items():
        try:
            assemble(config, planned=True)
        except Unsupported:
            unsupported.add(name)
    assert {"bwn", "gupta", "hwgq", "xnor"} <= unsupported
    assert not {"dorefa", "inq", "lsq", "ttq", "twn", "uniform"} & unsupported
    for keys in script.CONTROLS.values():
        (control,) = script.composed(words | keys)
        narrow = script.at_width(control, 5)
        assert (narrow.model["width"], control.model["width"]) == (5, 16)
        assert not control.is_baseline, "it is fine-tuned too: the same epochs in all"
        ours, theirs = ((c.pretrain, c.epochs, c.optim, c.dataset, c.layers, c.init) for c in (narrow, cells["dorefa"]))
        assert ours == theirs


def test_the_documents_table_is_the_commands(script: ModuleType) -> None:
    text = (ROOT / "docs" / "unified.md").read_text(encoding="utf-8")
    ((command, body),) = re.findall(r"<!-- table: (scripts/unified.py .*?) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert f"`{command}`" in body, "run scripts/readme_tables.py unified"
    assert not re.search(r"^\| (failed|diverged|unfinished|running|corrupt) ", body, re.MULTILINE)
    (config,) = script.composed(script.words_of([*command.split()[1:], "method=ttq", "bits=w2a32", "seed=0"]))
    assert f"| ttq | 2 | 32 | 3 | 2.00 | {config.model['width']} |" in body


def test_what_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["init=scratch"]) == ConfigError.status
    assert "leave init out" in capsys.readouterr().err
    assert script.main(["model=lenet", "dataset=synthetic", "method=dorefa", "seed=0"]) == ConfigError.status
    assert "width" in capsys.readouterr().err


def test_from_training_to_table(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thin and short, in this process; the repeat trains nothing, also where the folder was moved."""
    monkeypatch.setattr(sweep, "launch_all", lambda words, configs, name, stop: sweep.run_all(configs, stop))
    words = [*THIN, "model.width=4", "epochs=1", "pretrain.epochs=1", "seed=0,1", "method=dorefa,bwn", "bits=w2a32"]
    assert script.main([*words, f"out={tmp_path / 'a'}", "--format=json"]) == 0
    first = json.loads(capsys.readouterr().out)["tables"]
    cell = next(row for row in first[1]["rows"] if row["method"] == "dorefa")
    # 288 * 16 / 4 + 4 (79 * 4 + 10) = 2456: a float net of width 1 (1508), an 8-bit one of 2 (1152 + 744 + 40 = 1936)
    assert cell["bytes"] == 2456
    assert (cell["over float"]["width"], cell["over 8-bit"]["width"]) == (1, 2)
    assert [row["bytes"] for row in first[1]["rows"][1:]] == [1508, 1936]
    assert first[-1]["rows"][0]["status"] == "unsupported"
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(sweep, "launch_all", None)
    assert script.main([*words, f"out={tmp_path / 'b'}", "hydra.launcher.n_jobs=1"]) == 0
    shown = capsys.readouterr().out
    assert f"`scripts/unified.py {' '.join(words)}`: " in shown
    assert f"{cell['top1_mean']:.2f}" in shown
