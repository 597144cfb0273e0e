"""Comparison of stored runs: what is averaged, what is kept apart, what is listed, in every format."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import Configure, tiered
from filelock import FileLock
from helpers import epoch_line, evaluation, plant, write_metrics, write_packed
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.bits import Bits
from qbench.cli import compare as command
from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.schema import Config
from qbench.cost.network_cost import NetworkCost
from qbench.errors import ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.papers.published_figures import published_rows
from qbench.papers.published_table import absence_note
from qbench.report.comparison.compare import compare
from qbench.report.comparison.filters import _hint, filter_words, select_runs
from qbench.report.comparison.pairs import conclude
from qbench.report.comparison.setting_table import MissingRuns, settings_of
from qbench.report.html.page import html
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.directory import PACKED_FILE
from qbench.runs.reader import FROM_LOGS, RunRecord, dump_records, read, with_baselines
from qbench.runs.result import BaselineResult, Result, TrainingSpeed, with_checksum


def identity_of(path: Path) -> str:
    return str(json.loads((path / "result.json").read_text())["identity"])


def tables(config: Config) -> list[Table]:
    return compare(read([config.out]))


def test_filter_words_keep_the_runs_of_a_sweep_and_no_others(configure: Configure) -> None:
    def planted(*words: str) -> Path:
        return plant(configure(*words), 97.0, 98.0)

    old = [
        planted("method=dorefa", "bits=w4a4"),
        planted("method=ttq", "bits.w=2"),
        planted("method=dorefa", "epochs=3"),
    ]
    own = [planted("method=dorefa", f"seed={seed}", bits) for seed in (0, 1) for bits in ("bits=w2a2", "bits=w3a3")]
    runs = read([configure().out])
    sweep = [run for run in runs if run.path in own]
    words = filter_words(sweep, runs)
    assert words == ["method=dorefa", "bits=w2a2g32,w3a3g32"]
    kept, _ = select_runs(runs, {key: values.split(",") for key, _, values in (w.partition("=") for w in words)})
    assert [run.path for run in kept] == sorted(own)
    (short,) = (run for run in runs if run.path == old[2])
    assert filter_words([short], runs) == ["method=dorefa", "bits=w2a32g32"]
    planted("method=dorefa")
    assert filter_words([short], read([configure().out]))[-1] == "epochs=3"
    assert filter_words(runs, runs) == []


def test_mean_spread_number_and_difference(configure: Configure) -> None:
    accuracies = {0: (97.0, 98.0), 1: (95.0, 98.5), 2: (96.5, 97.0)}
    for seed, (top1, baseline) in accuracies.items():
        plant(configure("method=dorefa", f"seed={seed}"), top1, baseline)
    plant(configure("method=dorefa", "bits.w=4"), 99.0, 98.0)
    (table,) = tables(configure())
    assert [row[:4] for row in table.rows] == [
        ("float", "32", "32", "32"), ("dorefa", "4", "32", "32"), ("dorefa", "2", "32", "32"),
    ]  # fmt: skip
    _, single, setting = settings_of(table)
    own = [a for a, _ in accuracies.values()]
    assert setting.top1.mean == pytest.approx(mean(own))
    assert setting.top1.std == pytest.approx(stdev(own))
    assert (setting.top1.n, [run.seed for run in setting.runs]) == (3, [0, 1, 2])
    assert setting.difference
    assert setting.difference.mean == pytest.approx(mean([a - b for a, b in accuracies.values()]))
    assert single.top1.std is None
    assert table.rows[1][7:11] == ("-", "1", "", "+1.00")
    assert table.rows[2][6:12] == ("96.17", "1.04", "3", "±2.59", "-1.67", "±3.99"), (
        "4.3027 times 1.0408, 1.6073 / 3^0.5"
    )


def test_the_measured_size_of_an_exported_file_is_next_to_the_ideal_one(configure: Configure) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    (table,) = tables(configure())
    assert "file" not in table.head
    write_packed(path, 7_654, identity_of(path))
    (table,) = tables(configure())
    place = table.head.index("file")
    assert table.head[place - 1] == "size"
    assert [row[place] for row in table.rows] == ["-", "7.65 kB"]
    assert [setting.to_json().get("bytes_file") for setting in settings_of(table)] == [None, 7_654]
    found = read([configure().out])
    assert "7.65 kB" in html(conclude(compare(found)), found)
    record = path.parent / "record.json"
    record.write_text(dump_records(found))
    assert "file" not in compare(read([str(record)]))[0].head, "a record has no files"


def test_only_a_whole_packed_file_of_the_run_is_measured(configure: Configure) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    file, own = path / PACKED_FILE, identity_of(path)

    def measured() -> int | None:
        return read([str(path)])[0].file_bytes

    write_packed(path, 5_000, own)
    assert measured() == 5_000
    whole = file.read_bytes()
    for other in (b"", b"x" * 7_654, whole[:-1], whole[:100], whole + b"x", b"\x02" + bytes(7) + b"[]", b"\xff" * 100):
        file.write_bytes(other)
        assert measured() is None
    write_packed(path, 5_000, "0" * 64)
    assert measured() is None, "the file of another run"
    write_packed(path, 5_000, own, kind="integer")
    assert measured() is None, "another form"


def test_order_of_runs_and_failed_ones_never_change_an_accuracy(configure: Configure) -> None:
    for seed in range(4):
        plant(configure("method=dorefa", f"seed={seed}"), 90.0 + seed**2, 98.0)
    found = read([configure().out])
    before = compare(found)
    assert [t.values for t in compare(found[::-1])] == [t.values for t in before]
    plant(configure("method=dorefa", "seed=9"), 0.0, status="failed", reason="why\nmore")
    plant(configure("method=dorefa", "seed=10"), 0.0, status="diverged", reason="the loss is nan")
    plant(configure("method=dorefa", "bits.w=17"), 0.0, status="unsupported", reason="does not know")
    after = tables(configure())
    assert [(t.rows, t.values) for t in after[:-1]] == [(t.rows, t.values) for t in before]
    assert after[0].notes == ["warning: dorefa w2a32g32: diverged with seed 10, which the mean leaves out"]
    assert [row[0] for row in after[-1].rows] == ["diverged", "failed", "unsupported"]
    assert after[-1].rows[1][2] == "why"


def test_different_protocols_have_tables_of_their_own_that_name_the_keys(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    plant(configure("method=dorefa", "epochs=3", "seed=1"), 50.0, 98.0)
    first, second = tables(configure())
    assert {len(first.values), len(second.values)} == {2}
    assert {first.title, second.title} == {
        "resnet8 on digits; protocol with epochs=30", "resnet8 on digits; protocol with epochs=3",
    }  # fmt: skip


def test_options_of_a_method_are_another_row_named_as_typed(configure: Configure) -> None:
    plant(configure("method=dorefa", "bits=w2a2"), 97.0, 98.0)
    plant(configure("method=dorefa", "bits=w2a2", "method.activation=abs"), 96.0, 98.0)
    (table,) = tables(configure())
    assert [row[0] for row in table.rows] == ["float", "dorefa activation=abs", "dorefa activation=clip"]


def test_float_baselines_on_another_kind_of_network_are_a_row_of_their_own(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    path = plant(configure("method=hwgq"), 95.0, 97.5, network={"norm": "no_affine"})
    stored = json.loads((path / "result.json").read_text())
    stored["baseline"]["run"] = stored["baseline"]["run"].replace("00000000", "11111111")
    (path / "result.json").write_text(json.dumps(with_checksum(stored)))
    (table,) = tables(configure())
    assert [row[0] for row in table.rows] == ["float", "float norm=no_affine", "dorefa", "hwgq"]
    assert [row[6] for row in table.rows] == ["98.00", "97.50", "97.00", "95.00"]
    assert table.notes == ["hwgq: the network and its float baseline use norm=no_affine"]


def test_a_method_trained_from_scratch_says_how_many_epochs_it_lacks(configure: Configure) -> None:
    """Gupta's method has 30 epochs. Other methods have these 30 epochs and the 60 of their float baseline."""
    plant(configure("method=gupta"), 95.0, protocol_changes=["trained from scratch, as the method requires"])
    plant(configure("method=dorefa"), 97.0, 98.0)
    (table,) = tables(configure())
    assert table.notes == [
        "gupta: trained from scratch, as the method requires, for 30 epochs; other methods have 60 more epochs, for "
        "their float baseline"
    ]
    early = ("optim.patience=2", "pretrain.optim.patience=2", "pretrain.epochs=50")
    plant(configure("method=gupta", *early), 95.0, protocol_changes=["trained from scratch, as the method requires"])
    notes = [note for table in tables(configure()) for note in table.notes]
    assert any("for at most 30 epochs; other methods have at most 50 more epochs" in note for note in notes)


def test_early_stopping_is_a_note_with_the_numbers_of_epochs(configure: Configure) -> None:
    words = ("optim.patience=2", "epochs=20", "pretrain.optim.patience=3", "pretrain.epochs=30")
    for method, seed, last in (("dorefa", 0, 3), ("dorefa", 1, 7), ("dorefa", 2, 19), ("twn", 0, 4), ("ttq", 0, 19)):
        final = replace(evaluation(95.0), epoch=last)
        plant(configure(f"method={method}", f"seed={seed}", *words), 95.0, 98.0, final=final)
    (table,) = tables(configure())
    assert [note for note in table.notes if "stopped training" in note] == [
        "float w32a32g32: pretrain.optim.patience=3 stopped training after 1 of 30 epochs (3 of 3 runs)",
        "dorefa w2a32g32: optim.patience=2 stopped training after 4-8 of 20 epochs (2 of 3 runs)",
        "twn w2a32g32: optim.patience=2 stopped training after 5 of 20 epochs",
    ]


def test_warnings_of_runs_are_footnotes_of_their_settings(configure: Configure) -> None:
    for seed in range(3):
        found = ["test holds 3 images of train", *(["0.weight had no gradient"] if seed else [])]
        plant(configure("method=dorefa", "bits=w2", f"seed={seed}"), 95.0, 98.0, warnings=found)
        plant(configure("method=lsq", "bits=w2", f"seed={seed}"), 96.0, 98.0, warnings=list("abcd") if seed else [])
    plant(configure("method=ttq"), 97.0, 98.0, warnings=["test holds 3 images of train"])
    plant(configure("method=twn"), 97.0, 98.0)
    (table,) = tables(configure())
    assert [note for note in table.notes if note.startswith("warning: ")] == [
        "warning: dorefa w2a32g32, ttq w2a32g32: test holds 3 images of train",
        "warning: dorefa w2a32g32: 0.weight had no gradient (seed 1, 2)",
        *(f"warning: lsq w2a2g32: {letter} (seed 1, 2)" for letter in "abc"),
        "warning: lsq w2a2g32: further warnings in result.json: 1",
    ]
    by_name = {s.label: s.to_json()["warnings"] for s in settings_of(table)}
    assert by_name["lsq"] == [f"{letter} (seed 1, 2)" for letter in "abcd"]
    assert by_name["twn"] == by_name["float"] == []


def test_sizes_that_differ_between_seeds_are_averaged_and_noted(configure: Configure) -> None:
    """With `dq`, the gradients of the trained network decide the number of levels."""
    for seed, size in enumerate((7000.0, 8000.0, 9900.0)):
        cost = NetworkCost(
            params=1, macs=1, bitops=100 + seed, bytes_float=1, bytes_ideal=size, bytes_packed=int(size),
            bits_per_weight=2.0 + seed,
        )  # fmt: skip
        plant(configure("method=dq", f"seed={seed}"), 95.0, 98.0, cost=cost)
    (table,) = tables(configure())
    cost = settings_of(table)[1].cost
    assert cost is not None
    assert (cost.bytes_ideal, cost.bytes_packed, cost.bits_per_weight, cost.bitops) == (8300.0, 8300, 3.0, 101)
    (note,) = [note for note in table.notes if "size" in note]
    assert note.endswith("the size differs between runs, from 7 kB to 9.9 kB; the mean is shown")


def test_a_warning_of_every_setting_is_written_once_without_names(configure: Configure) -> None:
    for method in ("dorefa", "ttq"):
        plant(configure(f"method={method}", "init=scratch"), 95.0, warnings=["images of test are in train"])
    (table,) = tables(configure())
    assert table.notes == ["warning: all settings: images of test are in train"]


def test_the_float_control_and_the_difference_from_it(configure: Configure) -> None:
    for seed, (control, own) in enumerate([(98.5, 97.0), (98.0, 96.0)]):
        plant(configure("method=float", "init=float", f"seed={seed}"), control, 98.0)
        plant(configure("method=dorefa", "bits=w2", f"seed={seed}"), own, 98.0)
    (table,) = tables(configure())
    over = {s.name: s.over_control and s.over_control.mean for s in settings_of(table)}
    assert [value for value in over.values() if value] == [-1.75]
    assert not [note for note in table.notes if "over float" in note]
    plant(configure("method=dorefa", "bits=w2", "seed=2"), 90.0, 98.0)
    (table,) = tables(configure())
    (note,) = (note for note in table.notes if "over float" in note)
    assert note.startswith("dorefa w2a32g32: over float is a mean over 2 of 3 seeds")


def test_the_float_control_alone_has_another_label_than_its_baseline(configure: Configure) -> None:
    control = plant(configure("method=float", "init=float"), 98.5, 98.0)
    (table,) = compare(read([str(control)]))
    assert [s.label for s in settings_of(table)] == ["float", "float init=float"]


def test_runs_from_logs_are_not_compared_with_the_float_control(configure: Configure) -> None:
    """Logs do not contain the network's normalization, nor that the method trains from scratch."""
    plant(configure("method=float", "init=float"), 98.5, 98.0)
    path = plant(configure("method=gupta"), 97.0, 98.0)
    (path / "result.json").unlink()
    final = {"kind": "final", "test_top1": 97.0, "test_top5": 99.0, "test_loss": 0.1}
    write_metrics(path, [epoch_line(0, 97.0), json.dumps(final)])
    (table,) = tables(configure())
    (logged,) = (s for s in settings_of(table) if s.method == "gupta")
    assert (logged.source, logged.over_control) == (FROM_LOGS, None)
    assert not [note for note in table.notes if "normalization" in note or "over float" in note]


def test_equal_numbers_are_one_setting(configure: Configure) -> None:
    plant(configure("method=pact", "method.initial=10", "seed=0"), 96.0)
    plant(configure("method=pact", "seed=1"), 97.0)
    (table,) = compare(read([configure().out]), by=["method.initial"])
    assert [(s.label, s.top1.n) for s in settings_of(table)] == [("pact", 2)]
    for seed, val in enumerate(("0", "0.0")):
        plant(configure("method=lsq", f"dataset.val={val}", f"seed={seed}"), 96.0, data_sha256=str(seed) * 64)
    assert len(tables(configure())) == 3, "runs of lsq on different images share no table"


def test_the_values_of_a_run_select_it_instead_of_those_of_the_protocol(configure: Configure) -> None:
    out = configure().out
    rates = [
        plant(config, 96.0)
        for config in compose.configurations(["method=lsq", "bits=w2a2", "lr_search=grid", f"out={out}"])
    ]
    gupta, kd = plant(configure("method=gupta"), 97.0), plant(configure("method=qd"), 97.0)
    runs = read([out])

    def selected(key: str, value: str) -> list[Path]:
        return [run.path for run in select_runs(runs, {key: [value]})[0]]

    own = {str(run.path): run.result.options["optim.lr"] for run in runs if run.result and run.path in rates}
    assert len(set(own.values())) == len(rates) > 1
    for path, rate in own.items():
        assert str(path) in map(str, selected("optim.lr", str(rate)))
        assert len(set(selected("optim.lr", str(rate))) & set(rates)) == 1
    assert selected("init", "scratch") == [gupta]
    assert selected("distill.name", "kd") == [kd]


def test_a_baseline_that_was_trained_again_is_a_warning(configure: Configure) -> None:
    """The row float shows the stored baseline; runs that started from other weights of this baseline are named."""
    float_run = plant(configure("method=float"), 98.0)
    before = BaselineResult(run=str(float_run), final=evaluation(97.5))
    plant(configure("method=lsq", "bits=w2a2"), 96.0, baseline=before)
    plant(configure("method=dorefa", "bits=w2a2"), 95.0, baseline=replace(before, final=evaluation(98.0)))
    (table,) = tables(configure())
    (warning,) = (note for note in table.notes if "trained again" in note)
    assert warning.startswith(f"warning: lsq w2a2g32, seed 0: started from other weights of {float_run.name} than")
    shutil.rmtree(float_run)
    (table,) = tables(configure())
    assert sum("trained again" in note for note in table.notes) == 1, "also if the baseline is not stored any more"
    plant(configure("method=lsq", "bits=w2a2"), 96.0, baseline=replace(before, final=evaluation(98.0)))
    (table,) = tables(configure())
    assert not [note for note in table.notes if "trained again" in note]


@pytest.mark.parametrize(
    ("key", "default", "other", "more"),
    [
        ("optim.bias_lr", "1", "2", "optim.bias_lr=2"),
        ("batch_shards", "1", "2", "batch_shards=2"),
        ("runtime.precision", "fp32", "bf16", "runtime.precision=bf16"),
        ("method.channel", "false", "true", "method.channel=true"),
        ("pretrain.optim.warmup", "0", "1", "pretrain.optim.warmup=1"),
    ],
)
def test_a_default_value_selects_the_runs_that_have_it(
    key: str, default: str, other: str, more: str, configure: Configure
) -> None:
    plain = plant(configure("method=lsq", "bits=w2a2", "seed=0"), 96.0)
    changed = plant(configure("method=lsq", "bits=w2a2", "seed=1", more), 97.0)
    runs = read([configure().out])
    for value, expected in ((default, plain), (other, changed)):
        selected, notes = select_runs(runs, {key: [value]})
        assert ([run.path for run in selected], notes) == ([expected], [])
    assert len(select_runs(runs, {key: [default, other]})[0]) == 2
    assert all("=?" not in table.title for table in compare(runs, by=[key]))


def test_the_paper_s_own_form_of_a_method_is_selected_by_no_deviation(configure: Configure) -> None:
    plain = plant(configure("method=dorefa", "bits=w2a2"), 96.0)
    plant(configure("method=dorefa", "bits=w2a2", "method.deviation=rescaled_by_max"), 97.0)
    selected, _ = select_runs(read([configure().out]), {"method.deviation": ["none"]})
    assert [run.path for run in selected] == [plain]


def test_baselines_next_to_runs_are_read_and_none_twice(configure: Configure) -> None:
    float_run = plant(configure("method=float"), 98.0)
    baseline = BaselineResult(run=f"elsewhere/before/{float_run.name}", final=evaluation(98.0))
    child = plant(configure("method=dorefa"), 97.0, baseline=baseline)
    plant(configure("method=dorefa", "seed=1"), 96.0, 98.0)  # its baseline is missing
    below = read([configure().out])
    found = with_baselines([run for run in below if run.path == child])
    assert [run.path for run in found] == [child, float_run]
    assert [row[0] for row in compare(found)[0].rows] == ["float", "dorefa"]
    assert len(with_baselines(below)) == len(below) == 3


def test_different_networks_are_never_averaged(configure: Configure) -> None:
    for seed in (0, 1):
        plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0)
        plant(
            configure("method=dorefa", "model.norm=no_affine", f"seed={seed + 1}"),
            90.0,
            92.0,
            network={"norm": "no_affine"},
        )
    (table,) = tables(configure())
    assert [(s.label, s.top1.n, s.top1.mean) for s in settings_of(table)] == [
        ("float", 2, 98.0), ("float norm=no_affine", 2, 92.0), ("dorefa", 2, 97.0),
        ("dorefa model.norm=no_affine", 2, 90.0),
    ]  # fmt: skip


def test_several_runs_of_one_seed_are_noted_and_count_once(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    plant(configure("method=dorefa", "runtime.threads=2"), 96.0, 98.0)
    (table,) = tables(configure())
    setting = settings_of(table)[1]
    assert (setting.top1.n, setting.top1.mean, setting.top1.std) == (1, 96.5, None)
    assert setting.difference
    assert setting.difference.mean == -1.5
    assert any("some seeds have several runs" in note for note in table.notes)


def test_a_copy_of_a_run_is_not_a_second_run(configure: Configure, tmp_path: Path) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    shutil.copytree(path, path.with_name("copy"))
    (table,) = tables(configure())
    assert settings_of(table)[1].top1.n == 1
    assert "duplicate runs are left out" in table.notes[-1]


def test_runs_moved_out_of_their_folder_keep_their_baselines(configure: Configure, tmp_path: Path) -> None:
    baseline = plant(configure("method=float"), 98.0)
    plant(configure("method=dorefa"), 97.0, baseline=BaselineResult(run=str(baseline), final=evaluation(98.0)))
    before = [(t.title, t.rows) for t in tables(configure())]
    baseline.parent.rename(tmp_path / "moved")
    assert [(t.title, t.rows) for t in compare(read([str(tmp_path / "moved")]))] == before


def test_a_run_that_others_start_from_has_its_own_row_and_their_rows_the_loaded_weights(configure: Configure) -> None:
    """best.pt of the float run has 98 %, its last epoch 91 %: with init=RUN, differences are from 98 %."""
    start = plant(configure("method=float", "init=scratch", "epochs=4"), 91.0)
    (start / "best.pt").write_bytes(b"weights")
    loaded = BaselineResult(run=str(start), final=evaluation(98.0), sha256="0" * 64)
    plant(configure("method=dorefa", f"init={start}"), 97.0, baseline=loaded)
    found = read([configure().out])
    for records in (found, with_baselines(found), found[::-1]):
        rows = {row[0]: (row[6], row[10]) for table in compare(records) for row in table.rows}
        assert rows == {f"float {start.name}": ("98.00", "-"), "dorefa": ("97.00", "-1.00"), "float": ("91.00", "-")}
    kept, _ = select_runs(found, {"method": ["dorefa"]})
    assert [[row[6] for row in table.rows] for table in compare(kept)] == [["98.00", "97.00"]]


def test_a_run_whose_protocol_does_not_fit_its_hash_changes_no_other_title(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    path = plant(configure("method=twn"), 96.0, 98.0)
    stored = json.loads((path / "result.json").read_text())
    changed = stored | {"protocol": {"hash": "", "keys": {"epochs": 30}, "identity": ""}}
    (path / "result.json").write_text(json.dumps(with_checksum(changed)))
    assert sorted(t.title for t in tables(configure())) == ["failed or unsupported", "resnet8 on digits"]


def test_an_invalid_result_is_corrupt_and_harms_no_other(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    odd = [
        {"final": None},
        {"final": {}},
        {"protocol": {}},
        {"notes": None},
        {"bits": {}},
        {"cost": 3},
        {"options": []},
    ]
    for seed, change in enumerate(odd, start=1):
        path = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0) / "result.json"
        path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | change)))
    first, rest = tables(configure())
    assert settings_of(first)[1].top1.n == 1
    assert [row[0] for row in rest.rows] == ["corrupt"] * len(odd)


def test_corrupt_running_and_unfinished_runs_are_named(configure: Configure) -> None:
    good = plant(configure("method=dorefa"), 97.0, 98.0)
    for seed, text in ((1, '{"schema": 1, "sta'), (2, "[]"), (3, '{"schema": 99}'), (4, "\xff\x00")):
        corrupt = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0)
        (corrupt / "result.json").write_text(text, encoding="latin-1")
    for seed in (5, 6):
        begun = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0)
        (begun / "result.json").unlink()
        (begun / "metrics.jsonl").write_text('{"kind": "epoch", "step": 18, "epoch": 0}\n{"kind": "epo')
    with FileLock(begun / ".lock"):
        *_, unfinished, rest = tables(configure())
    assert [row[0] for row in rest.rows] == ["corrupt"] * 4
    assert [row[0] for row in unfinished.rows] == ["running", "unfinished"]
    assert unfinished.rows[-1][2] == "1 epochs done"
    assert good.name not in str(rest.rows + unfinished.rows)


def test_from_the_logs_where_the_result_is_missing(smoke: Configure) -> None:
    from qbench.experiment.run import run

    config = smoke("method=dorefa", "runtime.tensorboard=true")
    result = run(planned_run(config))
    expected = result.top1
    path = Path(result.run)
    for missing in (["result.json"], ["config.yaml", "metrics.jsonl"]):
        for name in missing:
            (path / name).unlink()
        rows = [s for t in tables(config) for s in settings_of(t) if s.method == "dorefa"]
        assert [s.top1.mean for s in rows] == [pytest.approx(expected, rel=1e-5)], missing
        assert rows[0].source == FROM_LOGS
        assert rows[0].bits == Bits(2, 32, 32)
        assert any(FROM_LOGS in note for t in tables(config) for note in t.notes)
    for event in path.glob("events.*"):
        event.write_bytes(event.read_bytes()[:100])
    (rest,) = (t for t in tables(config) if t.title in ("failed or unsupported", "not finished"))
    assert rest.rows[0][0] == {"failed or unsupported": "corrupt", "not finished": "unfinished"}[rest.title]


def test_runs_can_be_moved_and_named_one_by_one(configure: Configure, tmp_path: Path) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    before = compare(read([str(tmp_path)]))
    shutil.move(tmp_path / "digits-resnet8", tmp_path / "elsewhere")
    assert [t.rows for t in compare(read([str(tmp_path / "elsewhere" / path.name)]))] == [t.rows for t in before]
    with pytest.raises(ConfigError, match="no such directory"):
        read([str(tmp_path / "nowhere")])


def test_markdown_does_not_read_cells_as_html() -> None:
    written = FORMATS["md"]([Table(("a",), [("<b>x</b> | <8,8>",)])])
    assert written.splitlines()[-1] == "| &lt;b>x&lt;/b> \\| <8,8> |"


def test_a_run_that_can_still_finish_is_not_among_the_failed(configure: Configure) -> None:
    plant(configure("method=dorefa", "seed=3"), 0.0, status="failed", reason="why")
    unfinished = plant(configure("method=dorefa"), 97.0)
    (unfinished / "result.json").unlink()
    begun = RunRecord(path=Path("elsewhere"), status="not begun")
    made = compare([*read([configure().out]), begun])
    assert [(t.title, [row[0] for row in t.rows]) for t in made] == [
        ("not finished", ["not begun", "unfinished"]),
        ("failed or unsupported", ["failed"]),
    ]
    planned = planned_run(configure("method=dorefa"))
    with planned.directory.lock():
        found = read([configure().out])
    assert next((t.title, t.rows[0][0]) for t in compare(found)) == ("not finished", "running")


def test_every_format_holds_every_accuracy(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.25, 98.0)
    plant(configure("method=dorefa", "seed=3"), 0.0, status="failed", reason="a | b & c_d")
    found = tables(configure())
    written = {name: form(found) for name, form in FORMATS.items()}
    for name, document in written.items():
        assert "97.25" in document, name
        assert "failed" in document, name
    assert next(csv.reader(io.StringIO(written["csv"])))[:3] == ["table", "method", "W"]
    assert json.loads(written["json"])["tables"][0]["rows"][1]["top1_mean"] == 97.25
    assert r"a \| b" in written["md"]
    assert r"\& c\_d" in written["latex"]
    for line in written["md"].splitlines():
        if line.startswith("|") and "status" not in line and "failed" not in line and "---" not in line:
            assert line.replace(r"\|", "").count("|") == len(found[0].head) + 1


# --- each format, whole: two seeds of one method, a run that failed

SAMPLE_NOTE = (
    "95 % confidence intervals: ±1.29 to ±1.53 from the test sample of 400 images, ±3.18 to ±6.35 from seeds; "
    "the error from seeds is larger"
)
GOLDEN = {
    "text": """\
resnet8 on digits
method   W   A   G  top-1 %   std  n  95 % CI   diff  diff 95 % CI
float   32  32  32    98.25  0.35  2    ±3.18      -
dorefa   2  32  32    97.50  0.71  2    ±6.35  -0.75         ±3.18
NOTE

failed or unsupported
status  run  reason
failed  RUN  a | b & c_d""",
    "md": """\
**resnet8 on digits**

| method | W | A | G | top-1 % | std | n | 95 % CI | diff | diff 95 % CI |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| float | 32 | 32 | 32 | 98.25 | 0.35 | 2 | ±3.18 | - |  |
| dorefa | 2 | 32 | 32 | 97.50 | 0.71 | 2 | ±6.35 | -0.75 | ±3.18 |

- NOTE

**failed or unsupported**

| status | run | reason |
| --- | --- | --- |
| failed | RUN | a \\| b & c_d |""",
    "csv": """\
table,method,W,A,G,top-1 %,std,n,95 % CI,diff,diff 95 % CI,status,run,reason
resnet8 on digits,float,32,32,32,98.25,0.35,2,±3.18,-,,,,
resnet8 on digits,dorefa,2,32,32,97.50,0.71,2,±6.35,-0.75,±3.18,,,
failed or unsupported,,,,,,,,,,,failed,RUN,a | b & c_d
note,"NOTE\"""",
    "latex": """\
% resnet8 on digits
\\begin{tabular}{lrrrrrrrrr}
\\toprule
method & W & A & G & top-1 \\% & std & n & 95 \\% CI & diff & diff 95 \\% CI \\\\
\\midrule
float & 32 & 32 & 32 & 98.25 & 0.35 & 2 & $\\pm$3.18 & - &  \\\\
dorefa & 2 & 32 & 32 & 97.50 & 0.71 & 2 & $\\pm$6.35 & -0.75 & $\\pm$3.18 \\\\
\\bottomrule
\\end{tabular}
% NOTE

% failed or unsupported
\\begin{tabular}{lll}
\\toprule
status & run & reason \\\\
\\midrule
failed & RUN & a | b \\& c\\_d \\\\
\\bottomrule
\\end{tabular}""",
}
"""97 and 98, baselines 98 and 98.5: std 1 / 2^0.5 and 0.5 / 2^0.5, half intervals t(1) 12.706 times 0.5 and 0.25; the
differences -1 and -0.5 have the latter too. 98.25 % and 97.5 % of 400: 196 (0.9825 0.0175 / 400)^0.5 = 1.29, 1.53.
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Configure]:
    """Return what makes a folder that several tests share, as `configure` for it."""

    def folder() -> Configure:
        out = tmp_path_factory.mktemp("runs")
        return lambda *words: compose.configurations([f"out={out}", *words])[0]

    return folder


@pytest.fixture(scope="module")
def planted(elsewhere: Callable[[], Configure]) -> tuple[str, Path]:
    """Two seeds of a method and one that failed; the folder, and the directory of the latter."""
    configure = elsewhere()
    for seed, top1, baseline in ((0, 97.0, 98.0), (1, 98.0, 98.5)):
        path = plant(configure("method=dorefa", f"seed={seed}"), top1, baseline)
        (path / "manifest.json").write_text('{"data": {"test_images": 400}}')
    failed = plant(configure("method=dorefa", "seed=3"), 0.0, status="failed", reason="a | b & c_d\nmore")
    return configure().out, failed


@pytest.mark.parametrize("form", GOLDEN)
def test_golden(form: str, planted: tuple[str, Path]) -> None:
    out, failed = planted
    written = command.run_compare([out, "--columns", "accuracy", "--format", form])
    path = str(failed).replace("_", r"\_") if form == "latex" else str(failed)
    tidy = re.sub(r"run +reason", "run  reason", written.replace(path, "RUN"))  # a column is as wide as the path was
    assert tidy == GOLDEN[form].replace("NOTE", SAMPLE_NOTE)


def test_golden_json(planted: tuple[str, Path]) -> None:
    out, failed = planted
    block, rest = json.loads(command.run_compare([out, "--format=json"]))["tables"]
    child = block["rows"][1]
    numbers = {
        key: child[key]
        for key in ("top1_mean", "top1_std", "top1_ci95_half", "diff_mean", "diff_ci95_half", "test_sample_ci95_half")
    }
    assert numbers == pytest.approx(
        {"top1_mean": 97.5, "top1_std": 0.5**0.5, "top1_ci95_half": 6.3531, "diff_mean": -0.75,
         "diff_ci95_half": 3.1766, "test_sample_ci95_half": 1.5300}, abs=1e-4,
    )  # fmt: skip
    plain = {
        "label": "dorefa", "method": "dorefa", "n": 2, "seeds": [0, 1], "top1": [97.0, 98.0],
        "baseline_top1": [98.0, 98.5], "bytes": 7176, "bitops": 16_842_752, "test_images": 400, "is_baseline": False,
        "pairs": [], "winner": False,
    }  # fmt: skip
    assert {key: child[key] for key in plain} == plain
    assert block["rows"][0]["is_baseline"]
    assert rest["rows"] == [{"status": "failed", "runs": [str(failed)], "reason": "a | b & c_d\nmore"}]


# --- runs in one file


def test_a_record_gives_the_tables_of_its_runs(planted: tuple[str, Path], tmp_path: Path) -> None:
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "few.json"
    shutil.copytree(planted[0], here)
    (here / "corrupt").mkdir()
    (here / "corrupt" / "result.json").write_text("{")
    file.write_text(command.run_compare([str(here), "--format", "record"]))
    here.rename(there)
    assert command.run_compare([str(file), "--format", "record"]) == file.read_text()
    for words in (["--format", "md"], ["--format", "csv", "method=dorefa"]):
        whole = command.run_compare([str(there), *words]).replace(str(there), str(here))
        without_sample = re.sub(
            r'(?m)^- 95 % confidence intervals: .*\n\n?|\n^note,"95 % confidence intervals: .*$', "", whole
        )
        assert without_sample != whole
        assert command.run_compare([str(file), *words]).replace("\n\n\n", "\n\n") == without_sample
    shutil.rmtree(there / Path(planted[1]).relative_to(planted[0]))
    both = command.run_compare([str(there), str(file)])
    assert "duplicate runs are left out" in both
    assert re.search(r"^failed +\S+here", both, re.MULTILINE), "what only the record has"


def test_a_directory_stands_before_its_record(planted: tuple[str, Path], tmp_path: Path) -> None:
    other = json.loads(command.run_compare([planted[0], "--format", "record"]))
    for run in other["runs"]:
        run["path"] = run["path"].replace(planted[0], "0/first")
    done = next(run["result"] for run in other["runs"] if run["status"] == "done")
    done["final"]["test"]["top1"] -= 10
    (tmp_path / "a.json").write_text(json.dumps(other))
    both = command.tables(command.parse([str(tmp_path / "a.json"), planted[0]]))
    alone = command.tables(command.parse([planted[0]]))
    assert [settings for table in both if (settings := settings_of(table))] == [settings_of(alone[0])]
    notes = "\n".join(note for table in both for note in table.notes)
    assert "duplicate runs are left out: 0/first/digits-resnet8/dorefa-w2a32g32-s0" in notes
    assert re.search(r"duplicates with a different top-1 \(1\).* 87\.00, kept 97\.00$", notes, re.MULTILINE)


WRONG = [None, {}, [], "x", "", -40, 9600, True, float("nan"), [[]], {"a": None}]


@pytest.mark.parametrize("every", tiered([1, 7], [7]))
def test_no_change_to_one_value_of_a_record_is_a_bug(planted: tuple[str, Path], tmp_path: Path, every: int) -> None:
    """Every change is refused or read; an accuracy that is no number is refused. The fast tier tests a sample."""
    whole = command.run_compare([planted[0], "--format", "record"])
    file = tmp_path / "x.json"

    def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [path, *(p for key, value in inner for p in places(value, (*path, key)))]

    changed = json.loads(whole)
    changed["runs"] = changed["runs"][:2]
    kept = json.dumps(changed)
    refused = 0
    changes = [(place, value) for place in places(changed) if place for value in WRONG]
    for (*path, key), value in changes[::every]:
        values = json.loads(kept)
        node = values
        for part in path:
            node = node[part]
        node[key] = value
        file.write_text(json.dumps(values))
        try:
            command.run_compare([str(file), "--published", "seed=0,1,3"])
        except ConfigError:
            refused += 1
            continue
        assert key != "top1" or "final" not in path or "val" in path, (path, value)
    assert refused > 100 // every


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [{"path": "x"}], "protocols": {}}', "\x00"])
def test_another_file_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert cli(["compare", str(tmp_path / "x.json")]) == ConfigError.status
    assert "x.json: not a record of runs" in capsys.readouterr().err


# --- options of the command line


@pytest.fixture(scope="module")
def several(elsewhere: Callable[[], Configure]) -> str:
    """Two methods, one at two widths, at most two seeds, and one that failed."""
    configure = elsewhere()
    accuracies = {("dorefa", "w2a2"): (97.0, 96.0), ("dorefa", "w4a4"): (98.0,), ("lsq", "w2a2"): (95.0, 94.5)}
    for (method, bits), own in accuracies.items():
        for seed, top1 in enumerate(own):
            plant(configure(f"method={method}", f"bits={bits}", f"seed={seed}"), top1, 98.0 + seed)
    plant(configure("method=dorefa", "bits=w2a2", "seed=2"), 0.0, status="failed", reason="why")
    return configure().out


@pytest.mark.parametrize(
    ("words", "settings_found", "others"),
    [
        ([], {("dorefa", 2, 2), ("dorefa", 4, 1), ("lsq", 2, 2)}, 1),
        (["method=lsq"], {("lsq", 2, 2)}, 0),
        (["method=lsq,dorefa", "bits.w=2"], {("dorefa", 2, 2), ("lsq", 2, 2)}, 1),
        (["bits=w4"], {("dorefa", 4, 1)}, 0),
        (["seed=0"], {("dorefa", 2, 1), ("dorefa", 4, 1), ("lsq", 2, 1)}, 0),
        (["optim.lr=1e-2", "optim.schedule=exponential", "seed=1"], {("dorefa", 2, 1), ("lsq", 2, 1)}, 0),
        (["method.activation=clip"], {("dorefa", 2, 2), ("dorefa", 4, 1)}, 1),
        (["layers.rules=null", "model=resnet8", "dataset=digits", "dataset.val=0.1,0.2", "status=done"],
         {("dorefa", 2, 2), ("dorefa", 4, 1), ("lsq", 2, 2)}, 0),
    ],
)  # fmt: skip
def test_filters(several: str, words: list[str], settings_found: set[tuple[str, int, int]], others: int) -> None:
    found = command.tables(command.parse([several, *words]))
    rows = [s for t in found for s in settings_of(t)]
    assert {(s.method, s.bits.w, s.top1.n) for s in rows if not s.is_baseline} == settings_found
    assert sum(isinstance(v, MissingRuns) for t in found for v in t.values) == others
    baseline_seeds = [[run.seed for run in s.runs] for s in rows if s.is_baseline]
    assert baseline_seeds == (
        [sorted({run.seed for s in rows if not s.is_baseline for run in s.runs})] if settings_found else []
    )


def test_labels_name_options_that_are_not_at_their_defaults(configure: Configure) -> None:
    """All runs have the same option, so no difference between runs would show it."""
    plant(configure("method=lsq", "bits=w2a2", "method.channel=true"), 97.0, 98.0)
    plant(configure("method=ttq", "activation=dorefa", "activation.activation=abs", "bits=w2a2"), 97.0, 98.0)
    plant(configure("method=dorefa", "bits=w2a2"), 97.0, 98.0)
    labels = [label for table in tables(configure()) for label in (s.label for s in settings_of(table))]
    assert labels == ["float", "dorefa", "lsq channel=true", "ttq+dorefa activation.activation=abs"]


def test_a_note_names_a_layer_policy_that_is_not_the_default(configure: Configure) -> None:
    plant(configure("method=lsq", "bits=w2a2", "layers.first=8", "layers.rules={fc: 4}"), 97.0, 98.0)
    (table,) = tables(configure())
    assert "not the default layer policy: layers.first=8 layers.rules={'fc': 4}" in table.notes
    plant(configure("method=lsq", "bits=w2a2", f"out={configure().out}-default"), 97.0, 98.0)
    (table,) = compare(read([f"{configure().out}-default"]))
    assert not [note for note in table.notes if "layer policy" in note]


def test_networks_with_other_activations_are_other_settings(configure: Configure) -> None:
    """With model.act=fused, a quantizer replaces the activation function, so the network computes something else."""
    for seed in range(4):
        config = configure("method=dorefa", "bits=w2a2", f"model.act={'fused' if seed > 1 else 'auto'}", f"seed={seed}")
        plant(config, 97.0 - seed, 98.0, network=assemble(config).network)
    plant(configure("method=float", "init=float"), 97.5, 98.0)
    (table,) = compare(read([configure().out]))
    rows = {setting.label: (setting.top1.mean, setting.top1.n) for setting in settings_of(table)}
    assert (rows["dorefa"], rows["dorefa model.act=fused"]) == ((96.5, 2), (94.5, 2))
    assert all(s.over_control for s in settings_of(table) if s.method == "dorefa" and s.runs[0].seed == 0)
    assert not [note for note in table.notes if "float baseline use" in note or "normalization" in note]
    (fused,) = command.tables(command.parse([configure().out, "model.act=fused"]))
    assert [s.label for s in settings_of(fused) if s.method == "dorefa"] == ["dorefa"]


def test_seeds_with_the_same_weights_have_a_warning(configure: Configure) -> None:
    for seed, weights in enumerate("xyx"):
        plant(configure("method=ptq", f"seed={seed}"), 97.0, 98.0, weights_sha256=weights * 64)
    (table,) = compare(read([configure().out]))
    assert [note for note in table.notes if "same weights" in note] == [
        "warning: ptq w8a8g32: seeds 0, 2 have the same weights; they are one network, and show nothing about other "
        "seeds"
    ]


def test_a_method_that_does_not_train_has_no_training_speed(configure: Configure) -> None:
    speed = TrainingSpeed(images_per_second=0.0, seconds_per_epoch=0.0, peak_bytes=10)
    plant(configure("method=ptq"), 97.0, 98.0, speed=speed)
    (table,) = command.tables(command.parse([configure().out, "--columns", "speed"]))
    ((row, values),) = [
        (row, s.to_json()) for row, s in zip(table.rows, settings_of(table), strict=True) if s.method == "ptq"
    ]
    assert row[-3:] == ("-", "-", "10 B")
    assert values["images_per_second"] is values["seconds_per_epoch"] is None
    assert values["peak_bytes"] == 10


def test_speeds_under_different_conditions_have_a_warning(configure: Configure) -> None:
    speed = TrainingSpeed(images_per_second=100.0, seconds_per_epoch=1.0, peak_bytes=10)
    conditions = (
        {"device": "cpu", "threads": 1, "processes": 1},
        {"device": "cpu", "threads": 2, "processes": 1},
        {"device": "cpu", "threads": 2, "processes": 2},
        {"device": "cuda", "device_name": "GPU", "threads": 2, "processes": 1},
        {"device": "cpu", "threads": 1, "processes": 1, "compile": True, "deterministic": False},
        {"device": "cpu", "threads": 1, "processes": 1, "activation_memory": "keep", "compiled_quantizers": True},
    )
    for seed, manifest in enumerate(conditions):
        path = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0, speed=speed)
        (path / "manifest.json").write_text(json.dumps(manifest))
    out = configure().out
    (table,) = command.tables(command.parse([out, "--columns", "speed"]))
    assert (
        "warning: speeds and memory were measured under different conditions: cpu, threads 1, processes 1 (1 run); "
        "cpu, threads 2, processes 1 (1 run); cpu, threads 2, processes 2 (1 run); "
        "cuda, GPU, threads 2, processes 1 (1 run); cpu, threads 1, processes 1, compile, not deterministic (1 run); "
        "cpu, threads 1, processes 1, activation_memory=keep, extra fast (1 run)"
    ) in table.notes
    for words in ([out], [out, "--columns", "speed", "seed=0"]):
        assert not [note for table in command.tables(command.parse(words)) for note in table.notes if "speeds" in note]


def test_the_allowed_levels_of_layers_of_other_widths_are_a_range(configure: Configure) -> None:
    counts = {name: {"w": {"found": 4, "allowed": allowed}} for name, allowed in (("conv", 4), ("fc", 16))}
    plant(configure("method=dorefa", "bits.w=2"), 97.0, 98.0, verified=counts)
    (table,) = command.tables(command.parse([configure().out, "--columns", "verification"]))
    assert "w 4 of 4-16" in table.rows[-1]


def test_columns_order_and_parts(several: str) -> None:
    (block, _) = command.tables(command.parse([several, "--columns", "cost,verification,speed"]))
    assert block.head == ("method", "W", "A", "G", "levels", "bits/weight", "size", "BitOps", "images/s", "s/epoch",
                          "peak memory", "verified layers", "levels found")  # fmt: skip
    order = {
        "top-1": ["float", "dorefa", "dorefa", "lsq"], "-": [], "diff": ["dorefa", "dorefa", "lsq", "float"],
        "w": ["dorefa", "lsq", "dorefa", "float"], "95 %": ["lsq", "float", "dorefa", "dorefa"],
        "95 % CI": ["lsq", "float", "dorefa", "dorefa"], "levels found": ["float", "dorefa", "dorefa", "lsq"],
    }  # fmt: skip
    for key, methods in order.items():
        if methods:
            (table, *_) = command.tables(command.parse([several, f"--sort={key}"]))
            assert [s.label for s in settings_of(table)] == methods, key
    titles = [t.title for t in command.tables(command.parse([several, "--by", "bits.w,seed"]))]
    assert titles == [f"resnet8 on digits; bits.w={w}; seed={s}" for w, s in ((2, 0), (2, 1), (4, 0))] + [
        "failed or unsupported"
    ]


def test_accuracy_at_equal_bytes(configure: Configure) -> None:
    """100, 105 and 106 bytes: the third is more than 5 % above the first and opens the next group."""
    for seed, (bytes_ideal, top1) in enumerate(((100, 90.0), (105, 95.0), (106, 94.0), (111, 96.0))):
        cost = NetworkCost(
            params=1, macs=1, bitops=1, bytes_float=1, bytes_ideal=bytes_ideal, bytes_packed=1, bits_per_weight=2.0
        )
        plant(configure("method=dorefa", f"bits=w{seed + 2}"), top1, cost=cost)
    (table,) = command.tables(command.parse([configure().out, "--sort", "equal-bytes"]))
    assert [(s.bytes_group, s.cost and s.cost.bytes_ideal, s.top1.mean) for s in settings_of(table)] == [
        (1, 105, 95.0), (1, 100, 90.0), (2, 111, 96.0), (2, 106, 94.0),
    ]  # fmt: skip
    assert table.head[0] == "equal-bytes"


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["metod=lsq"], "metod: no run has this key; did you mean method"),
        (["--by", "bits.x"], "did you mean bits"),
        (["--sort", "acuracy"], "no such column; did you mean accuracy"),
        (["--sort", "gap"], "add --published"),
        (["--columns", "acuracy"], "did you mean accuracy"),
        (["--columns"], "needs a value"),
        (["--margin", "0"], "above 0"),
        (["--margin=wide"], "above 0"),
        (["--format", "txt"], "did you mean text"),
        (["--publishe"], "did you mean --published"),
        (["method=dorefaa"], "method=dorefaa: no run has this value; did you mean dorefa?\nvalues found: dorefa, lsq"),
        (["epochs=3"], "epochs=3: no run has this value\nvalues found: 30"),
        (["bits=w4a2"], "bits=w4a2: no run has this value; did you mean w4a4g32?\nvalues found: w2a2g32, w4a4g32"),
        (["bits.w=3"], "bits.w=3: no run has this value\nvalues found: 2, 4"),
        *((["bits=" + word], f"bits={word}: no run has this value") for word in ("2", "foo", "w2x", "W", "32")),
        (["seed=True"], "seed=True: no run has this value"),
        (["seed=false"], "seed=false: no run has this value"),
    ],
)
def test_wrong_words_are_refused(
    several: str, words: list[str], phrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["compare", several, *words]) == ConfigError.status
    assert phrase in capsys.readouterr().err


def test_a_value_that_no_run_has_is_noted_if_another_is_found(several: str) -> None:
    assert "no run has method=twn" in command.run_compare([several, "method=lsq,twn"])
    assert "no run has method=lsqq; did you mean lsq?" in command.run_compare([several, "method=dorefa,lsqq"])
    assert "no run has" not in command.run_compare([several, "method=lsq"])


def test_the_module_of_a_users_method_is_similar_to_its_name() -> None:
    assert _hint("my_ternary", ["dorefa", "my_ternary:build", "ternary"]) == "; did you mean my_ternary:build?"
    assert _hint("2", ["2:build"]) == ""


def test_the_margin_is_stated(several: str) -> None:
    assert "equivalence margin ±2 points" in command.run_compare([several, "--margin", "2"])
    assert "equivalence margin ±0.5 points" in command.run_compare([several])


def test_a_claim_without_a_value_is_shown_as_a_question_mark(configure: Configure) -> None:
    unknown = next(r for r in published_rows() if r.metric.startswith("top1") and r.value is None and r.words)
    config = configure(f"experiment={unknown.paper}/{unknown.id}")
    plant(config, 90.0, 92.0)
    text = command.run_compare([config.out, "--published", "--sort", "published", "--format", "json"])
    (setting,) = [v for v in json.loads(text)["tables"][0]["rows"] if v.get("method") == unknown.method]
    assert (setting["published"][0]["top1"], setting["published"][0]["text"]) == (None, "?")


def test_published_results_and_the_gap_to_them(configure: Configure) -> None:
    """TTQ's ResNet-20 error on CIFAR-10 is 8.87 (verified), 91.13 % right; DoReFa's paper has no CIFAR-10, and a third
    party's figure is of a known deviation from it.
    """
    words = ("model=resnet20", "dataset=cifar10")
    plant(configure(*words, "method=ttq"), 90.0, 92.0)
    plant(configure(*words, "method=dorefa"), 89.0, 92.0)
    plant(configure(*words, "method=dorefa", "method.deviation=rescaled_by_max"), 88.0, 92.0)
    plant(configure(*words, "method=ttq", "model.width=8"), 80.0, 82.0)
    tables = command.tables(command.parse([configure().out, "--published"]))
    own, thin = sorted(tables, key=lambda t: len(t.rows), reverse=True)
    published = {s.label: s.published or () for s in settings_of(own)}
    assert published["ttq"][0].claimed == 8.87
    assert published["ttq"][0].gap == pytest.approx(90 - 91.13)
    row = next(row for row in own.rows if row[0] == "ttq")
    place = own.head.index("published")
    assert own.head[place : place + 3] == ("published", "gap", "ran by")
    assert row[place : place + 2] == ("91.13", "-1.13")
    assert not published["dorefa"]
    (third,) = {match.ran_by for match in published["dorefa deviation=rescaled_by_max"]}
    assert third.startswith("third party")
    assert absence_note("dorefa", "resnet20", "cifar10") in own.notes
    assert all(s.published == () for s in settings_of(thin)), "a thinner network is not the paper's"
    made = plant(configure("method=dorefa", f"out={configure().out}/digits"), 97.0, 98.0)
    (digits,) = command.tables(command.parse([str(made), "--published"]))
    assert "no published results on digits are known" in digits.notes


# --- accuracies do not depend on other runs

NAMES = st.tuples(st.sampled_from(["dorefa", "lsq", "ttq"]), st.sampled_from([1, 2, 4]), st.integers(0, 4))
ENDED = st.tuples(NAMES, st.sampled_from(["failed", "diverged", "unsupported", "unfinished", "corrupt", "running"]))


@pytest.fixture(scope="module")
def model_result() -> Result:
    (config,) = compose.configurations(["method=dorefa"])
    return planned_run(config).directory.new_result("done")


def _run(model: Result, place: str, method: str, width: int, seed: int, status: str, top1: float = 0.0) -> RunRecord:
    bits, final = {"w": width, "a": 32, "g": 32}, evaluation(top1) if status == "done" else None
    result = replace(
        model, method=method, bits=bits, seed=seed, status=status, run=place, identity=place, final=final, options={}
    )
    known = status not in ("unfinished", "corrupt", "running")
    return RunRecord(path=Path(place), status=status, reason="why", result=result if known else None)


def without_diverged(tables: list[Table]) -> list[Table]:
    """Return tables without their notes on seeds that diverged."""
    return [
        replace(table, notes=[note for note in table.notes if ": diverged with seed" not in note]) for table in tables
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, st.floats(0, 100, width=16), min_size=1, max_size=12),
    st.lists(ENDED, max_size=6),
    st.randoms(),
)
def test_neither_order_nor_missing_runs_change_accuracies(
    model_result: Result, done: dict[tuple[str, int, int], float], ended: list[Any], random: Any
) -> None:
    runs = [_run(model_result, f"o/{m}{w}{s}", m, w, s, "done", top1) for (m, w, s), top1 in done.items()]
    before = compare(runs)
    concluded = conclude(before)
    others = [_run(model_result, f"o/e{i}", *name, status) for i, (name, status) in enumerate(ended)]
    shuffled = [*runs, *others]
    random.shuffle(shuffled)
    after = compare(shuffled)
    assert without_diverged(after)[: len(before)] == before
    assert without_diverged(conclude(after))[: len(before)] == concluded
    names = {run for t in after[len(before) :] for v in t.values for run in v.runs}
    assert names == {f"o/e{i}" for i in range(len(ended))}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_damaged_directories_are_named_and_harm_nothing(tmp_path_factory: Any, model_result: Result, data: Any) -> None:
    out = tmp_path_factory.mktemp("damaged")
    for seed in (0, 1):
        path = out / f"dorefa-w2a32g32-s{seed}-0000000{seed}"
        path.mkdir()
        whole = asdict(replace(model_result, seed=seed, final=evaluation(97.0 + seed), identity=f"0000000{seed}"))
        del whole["run"]
        text = json.dumps(with_checksum(whole))
        for name, content in (
            ("result.json", text),
            ("manifest.json", "{}"),
            ("predictions.npy", "x"),
            ("config.yaml", ""),
        ):
            (path / name).write_text(content)
    victim = path / data.draw(st.sampled_from(["result.json", "manifest.json", "predictions.npy", "config.yaml"]))
    old = bytearray(victim.read_bytes())
    at = data.draw(st.integers(0, max(len(old) - 1, 0)))
    victim.write_bytes(
        data.draw(st.sampled_from([old[:at], old[:at] + b"\xff" + old[at + 1 :], b"", b"{}", b"[1, 2]"]))
    )
    found = command.tables(command.parse([str(out)]))
    runs = [run for t in found for s in settings_of(t) for run in s.runs]
    missing = [v for t in found for v in t.values if isinstance(v, MissingRuns)]
    named = [run.run for run in runs] + [run for v in missing for run in v.runs]
    assert sorted(named) == sorted(str(p) for p in out.iterdir())
    assert [run.top1 for run in runs[:1]] == [97.0]
    statuses = [v.status for v in missing]
    assert statuses == (["corrupt"] if victim.name == "result.json" and victim.read_bytes() != bytes(old) else [])


def test_columns_of_text_are_aligned_by_the_width_in_a_terminal() -> None:
    table = Table(("a", "b"), [("漢字", "1"), ("x", "22")], title="t", notes=["n"])
    lines = ["t", "a      b", "漢字   1", "x     22", "n"]
    assert FORMATS["text"]([table, table]).split("\n") == [*lines, "", *lines]
