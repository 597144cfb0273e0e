"""Comparison from records: what is averaged, what is not, what is listed, in every format."""

import csv
import io
import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import Configure
from filelock import FileLock

from qbench.config import Config
from qbench.errors import ConfigError
from qbench.record.run import RunDirectory, sealed
from qbench.report.compare import compare
from qbench.report.runs import FROM_LOGS, read
from qbench.report.table import FORMATS, Table


def plant(config: Config, top1: float, parent: float | None = None, status: str = "done", **values: Any) -> Path:
    """Write a run with a known figure, as a run would."""
    directory = RunDirectory(config)
    with directory.held():
        directory.write_config()
        final = {"test": {"top1": top1, "top5": 99.0, "loss": 0.1}, "val": {}, "epoch": 0}
        base = {
            "run": str(directory.path.parent / f"float-w32a32g32-s{config.seed}-00000000"),
            "final": None,
            "best": None,
        }
        if parent is not None:
            base["final"] = {"test": {"top1": parent, "top5": 99.0, "loss": 0.1}, "val": {}}
        cost = {"bits_per_weight": 2.0, "bytes_ideal": 7176, "bitops": 16_842_752, "bytes_float": 1, "macs": 1}
        done = {"final": final, "float": base if parent is not None else None, "cost": cost, "levels": 4}
        directory.conclude(directory.new_result(status, **(done if status == "done" else {}) | values))
    return directory.path


def tables(config: Config) -> list[Table]:
    return compare(read([config.out]))


def test_mean_spread_number_and_difference(configure: Configure) -> None:
    figures = {0: (97.0, 98.0), 1: (95.0, 98.5), 2: (96.5, 97.0)}
    for seed, (own, parent) in figures.items():
        plant(configure("method=dorefa", f"seed={seed}"), own, parent)
    plant(configure("method=dorefa", "bits.w=4"), 99.0, 98.0)
    (table,) = tables(configure())
    assert [row[:4] for row in table.rows] == [
        ("float", "32", "32", "32"), ("dorefa", "4", "32", "32"), ("dorefa", "2", "32", "32"),
    ]  # fmt: skip
    cell = table.values[2]
    own = [a for a, _ in figures.values()]
    assert cell["top1_mean"] == pytest.approx(mean(own))
    assert cell["top1_std"] == pytest.approx(stdev(own))
    assert (cell["n"], cell["seeds"]) == (3, [0, 1, 2])
    assert cell["diff_mean"] == pytest.approx(mean([a - b for a, b in figures.values()]))
    assert table.values[1]["top1_std"] is None
    assert table.rows[1][7] == "-", "one run has no spread"
    assert table.rows[2][6:10] == ("96.17", "1.04", "3", "-1.67")


def test_order_of_runs_and_failed_ones_never_change_a_figure(configure: Configure) -> None:
    for seed in range(4):
        plant(configure("method=dorefa", f"seed={seed}"), 90.0 + seed**2, 98.0)
    found = read([configure().out])
    before = compare(found)
    assert [t.values for t in compare(found[::-1])] == [t.values for t in before]
    plant(configure("method=dorefa", "seed=9"), 0.0, status="failed", reason="why\nmore")
    plant(configure("method=dorefa", "seed=10"), 0.0, status="diverged", reason="the loss is nan")
    plant(configure("method=dorefa", "bits.w=17"), 0.0, status="unsupported", reason="does not know")
    after = tables(configure())
    assert after[:-1] == before
    assert [row[0] for row in after[-1].rows] == ["diverged", "failed", "unsupported"]
    assert after[-1].rows[1][2] == "why"


def test_unlike_protocols_stand_apart_and_say_what_differs(configure: Configure) -> None:
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


def test_float_parents_on_another_kind_of_network_are_a_row_of_their_own(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    path = plant(configure("method=hwgq"), 95.0, 97.5, network={"norm": "plain"})
    stored = json.loads((path / "result.json").read_text())
    stored["float"]["run"] = stored["float"]["run"].replace("00000000", "11111111")
    (path / "result.json").write_text(json.dumps(sealed(stored)))
    (table,) = tables(configure())
    assert [row[0] for row in table.rows] == ["float", "float norm=plain", "dorefa", "hwgq"]
    assert [row[6] for row in table.rows] == ["98.00", "97.50", "97.00", "95.00"]
    assert table.notes == ["hwgq is on a network with norm=plain, as its float parent is"]


def test_the_same_seed_twice_is_said(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.0, 98.0)
    plant(configure("method=dorefa", "runtime.threads=2"), 96.0, 98.0)
    (table,) = tables(configure())
    assert any("more than once" in note for note in table.notes)


def test_a_copy_of_a_run_is_not_a_second_run(configure: Configure, tmp_path: Path) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    shutil.copytree(path, path.with_name("copy"))
    (table,) = tables(configure())
    assert table.values[1]["n"] == 1
    assert "copies of runs listed already" in table.notes[-1]


def test_an_odd_result_is_torn_and_harms_no_other(configure: Configure) -> None:
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
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
    first, rest = tables(configure())
    assert first.values[1]["n"] == 1
    assert [row[0] for row in rest.rows] == ["torn"] * len(odd)


def test_torn_running_and_unfinished_runs_are_named(configure: Configure) -> None:
    good = plant(configure("method=dorefa"), 97.0, 98.0)
    for seed, text in ((1, '{"schema": 1, "sta'), (2, "[]"), (3, '{"schema": 99}'), (4, "\xff\x00")):
        torn = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0)
        (torn / "result.json").write_text(text, encoding="latin-1")
    for seed in (5, 6):
        begun = plant(configure("method=dorefa", f"seed={seed}"), 97.0, 98.0)
        (begun / "result.json").unlink()
        (begun / "metrics.jsonl").write_text('{"kind": "epoch", "step": 18, "epoch": 0}\n{"kind": "epo')
    with FileLock(begun / ".lock"):
        *_, rest = tables(configure())
    assert [row[0] for row in rest.rows] == ["running", "torn", "torn", "torn", "torn", "unfinished"]
    assert rest.rows[-1][2] == "1 epochs done"
    assert good.name not in str(rest.rows)


def test_from_the_logs_where_the_result_is_missing(smoke: Configure) -> None:
    from qbench.experiment import run

    config = smoke("method=dorefa", "runtime.tensorboard=true")
    result = run(config)
    expected = result.final["test"]["top1"]  # type: ignore[index]
    path = Path(result.run)
    for missing in (["result.json"], ["config.yaml", "metrics.jsonl"]):
        for name in missing:
            (path / name).unlink()
        rows = [v for t in tables(config) for v in t.values if v["method"] == "dorefa"]
        assert [row["top1_mean"] for row in rows] == [pytest.approx(expected, rel=1e-5)], missing
        assert rows[0]["source"] == FROM_LOGS
        assert rows[0]["bits"] == {"w": 2, "a": 32, "g": 32}
        assert any(FROM_LOGS in note for t in tables(config) for note in t.notes)
    for event in path.glob("events.*"):
        event.write_bytes(event.read_bytes()[:100])
    (rest,) = (t for t in tables(config) if t.title == "without a figure")
    assert rest.rows[0][0] in ("unfinished", "torn")


def test_runs_can_be_moved_and_named_one_by_one(configure: Configure, tmp_path: Path) -> None:
    path = plant(configure("method=dorefa"), 97.0, 98.0)
    before = compare(read([str(tmp_path)]))
    shutil.move(tmp_path / "digits-resnet8", tmp_path / "elsewhere")
    assert [t.rows for t in compare(read([str(tmp_path / "elsewhere" / path.name)]))] == [t.rows for t in before]
    with pytest.raises(ConfigError, match="no such directory"):
        read([str(tmp_path / "nowhere")])


def test_every_format_holds_every_figure(configure: Configure) -> None:
    plant(configure("method=dorefa"), 97.25, 98.0)
    plant(configure("method=dorefa", "seed=3"), 0.0, status="failed", reason="a | b & c_d")
    found = tables(configure())
    shown = {name: form(found) for name, form in FORMATS.items()}
    for name, document in shown.items():
        assert "97.25" in document, name
        assert "failed" in document, name
    assert next(csv.reader(io.StringIO(shown["csv"])))[:3] == ["table", "method", "W"]
    assert json.loads(shown["json"])["tables"][0]["rows"][1]["top1_mean"] == 97.25
    assert r"a \| b" in shown["md"]
    assert r"\& c\_d" in shown["latex"]
    for line in shown["md"].splitlines():
        if line.startswith("|") and "status" not in line and "failed" not in line and "---" not in line:
            assert line.replace(r"\|", "").count("|") == len(found[0].head) + 1
