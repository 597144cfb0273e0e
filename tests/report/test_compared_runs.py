"""Which runs a comparison contains, and which of them share a row: records, links, copies, versions of images."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Configure
from helpers import evaluation, plant

from qbench.cli.compare import run_compare
from qbench.config import compose
from qbench.errors import Diverged
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.papers import matching, published_table
from qbench.papers.published_figures import published_rows
from qbench.papers.row_types import PublishedRow
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting_table import settings_of
from qbench.report.tables.table import Table, comma_separated
from qbench.report.tables.units import si_format
from qbench.runs import reader
from qbench.runs.reader import FROM_LOGS, RunRecord, dump_records, read
from qbench.runs.result import BaselineResult, Protocol, Result

WORDS = ("method=dorefa", "bits=w2a2")


def write_predictions(path: Path, correct: int, shift: int = 0) -> None:
    hits = np.roll(np.arange(1000) < correct, shift)
    np.save(path / "predictions.npy", np.stack([np.zeros(1000), np.where(hits, 0, 1)], 1).astype(np.int16))


def write_record(file: Path, out: str) -> str:
    file.write_text(run_compare([out, "--format", "record"]))
    return str(file)


@pytest.fixture
def relative(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that plants a run below outputs/, a relative path that all machines have in common."""

    def made(machine: str, *words: str, top1: float = 97.0, images: str = "a", status: str = "done") -> Path:
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / machine)
        values = {"data_sha256": images * 64} if status == "done" else {}
        return plant(configure("out=outputs", *words), top1, 98.0, status, **values)

    return made


def test_records_of_two_machines_with_the_same_paths(
    relative: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run replaces another one, in whatever order the records are given."""
    relative("one", *WORDS)
    relative("one", *WORDS, "seed=1", top1=97.5)
    one = write_record(tmp_path / "one.json", "outputs")
    relative("two", *WORDS, top1=50.0, images="b")
    relative("two", *WORDS, "seed=1", status="failed")
    two = write_record(tmp_path / "two.json", "outputs")
    monkeypatch.chdir(tmp_path)
    expected = sorted((run.status, run.result.top1 if run.result else None) for run in read(["one", "two"]))
    for names in ([one, two], [two, one]):
        found = read(names)
        assert sorted((run.status, run.result.top1 if run.result else None) for run in found) == expected
        assert len({str(run.path) for run in found}) == 4
        assert all(run.result is None or run.result.run == str(run.path) for run in found)
    assert len(read([one, one])) == 2, "the same record twice has nothing more"


def test_hits_of_an_older_record_belong_to_its_own_runs(relative: Callable[..., Path], tmp_path: Path) -> None:
    """The images were changed and the runs repeated, so the directory and the record have other runs at one path."""
    for seed in range(3):
        write_predictions(relative("m", *WORDS, f"seed={seed}", top1=95.0), 950)
        write_predictions(relative("m", "method=lsq", "bits=w2a2", f"seed={seed}", top1=85.0), 850)
    old = write_record(tmp_path / "old.json", "outputs")
    for seed in range(3):
        write_predictions(relative("m", *WORDS, f"seed={seed}", top1=70.0, images="b"), 700, 7 * seed)
        write_predictions(relative("m", "method=lsq", "bits=w2a2", f"seed={seed}", top1=80.0, images="b"), 800, seed)
    sentence = "lsq 80.00"
    alone = [
        line for line in run_compare(["outputs"]).splitlines() if sentence in line and "significantly above" in line
    ]
    assert len(alone) == 1
    assert alone[0] in run_compare(["outputs", old])


def test_runs_below_a_linked_folder_are_read_once(configure: Configure, tmp_path: Path) -> None:
    out, disk = tmp_path / "outputs", tmp_path / "disk"
    plant(configure(f"out={out}", *WORDS), 97.0, 98.0)
    plant(configure(f"out={disk}", *WORDS, "seed=1"), 96.0, 98.0)
    (out / "more").symlink_to(disk)
    (disk / "back").symlink_to(out)
    (disk / "again").symlink_to(disk / "digits-resnet8")
    (out / "up").symlink_to(tmp_path)
    paths = [str(run.path.relative_to(out)) for run in read([str(out)])]
    assert len(paths) == 2
    assert paths[1].startswith("more/digits-resnet8/dorefa-w2a2g32-s1-")


def test_every_copy_of_a_run_is_left_out(configure: Configure, tmp_path: Path) -> None:
    for folder, images in (("a", "a"), ("b", "b"), ("c", "b"), ("d", "a")):
        plant(configure(f"out={tmp_path / folder}", *WORDS), 97.0, 98.0, data_sha256=images * 64)
    settings = [s for table in compare(read([str(tmp_path)])) for s in settings_of(table) if not s.is_baseline]
    assert [setting.top1.n for setting in settings] == [1, 1]
    assert [len(setting.runs) for setting in settings] == [1, 1]


def test_columns_of_csv_stand_under_their_own_heads() -> None:
    tables = [
        Table(("method", "size", "BitOps"), [("a", "1 kB", "2 M")], title="one"),
        Table(("method", "size", "file", "BitOps"), [("b", "3 kB", "4 B", "5 M")], title="two", notes=["x, y"]),
        Table(("status", "run"), [("failed", "c")], title="three"),
    ]
    rows = list(csv.DictReader(io.StringIO(comma_separated(tables))))
    assert [(row["method"], row["size"], row["file"], row["BitOps"], row["status"]) for row in rows] == [
        ("a", "1 kB", "", "2 M", ""), ("b", "3 kB", "4 B", "5 M", ""), ("", "", "", "", "failed"),
        ("x, y", None, None, None, None),
    ]  # fmt: skip
    assert [row["table"] for row in rows] == ["one", "two", "three", "note"]


def plant_grid(configure: Configure) -> None:
    """Two seeds of a grid of three learning rates, of which the highest diverged with seed 1."""
    words = (*WORDS, "lr_search=grid", "lr_grid.factors=[0.3,1,3]", f"out={configure().out}")
    for config in (c for seed in (0, 1) for c in compose.configurations([*words, f"seed={seed}"])):
        factor = config.optim.lr / (config.lr_grid.lr or 1)
        if factor > 2 and config.seed:
            plant(config, 0.0, status="diverged", reason="inf or nan")
        else:
            plant(config, 90.0 + factor, 98.0, final=evaluation(90 + factor, 91 + factor), data_sha256="a" * 64)


def test_diverged_runs_are_found_although_images_differ(configure: Configure) -> None:
    """Another run with other images changes the protocol of the finished runs, but not that of the diverged run."""
    plant_grid(configure)
    plant(configure(*WORDS, "seed=8"), 95.0, 98.0, data_sha256="a" * 64)
    plant(configure(*WORDS, "seed=9"), 0.0, status="diverged", reason="inf or nan")
    alone = [note for table in compare(read([configure().out])) for note in table.notes if "diverged" in note]
    assert [note.partition(":")[0] for note in alone] == ["dorefa w2a2g32", "warning"]
    plant(configure("method=lsq", "bits=w2a2"), 50.0, 98.0, data_sha256="b" * 64)
    after = [note for table in compare(read([configure().out])) for note in table.notes if "diverged" in note]
    assert sorted(after) == sorted(alone)


def test_a_rate_alone_is_not_the_best_of_a_grid(configure: Configure) -> None:
    plant_grid(configure)
    (note,) = (n for n in run_compare([configure().out, "optim.lr=0.003"]).splitlines() if "best of" in n)
    assert "optim.lr=0.003 is the best of 1 by validation top-1, seeds 0, 1; the search cost 1 x 30 epochs" in note
    assert note.endswith("the compared runs have no other rate of the grid: 0.01, 0.03")


def test_several_control_runs_of_a_seed_are_averaged(configure: Configure) -> None:
    for threads, top1 in ((1, 90.0), (2, 92.0)):
        plant(configure("method=float", "init=float", f"runtime.threads={threads}"), top1, 98.0)
    plant(configure(*WORDS), 91.0, 98.0)
    (table,) = compare(read([configure().out]))
    (setting,) = (s for s in settings_of(table) if s.method == "dorefa")
    assert setting.over_control is not None
    assert setting.over_control.mean == 0


def test_a_control_without_common_seeds_has_a_note(configure: Configure) -> None:
    plant(configure("method=float", "init=float", "seed=7"), 90.0, 98.0)
    plant(configure(*WORDS), 91.0, 98.0)
    (table,) = compare(read([configure().out]))
    assert [note for note in table.notes if "over float" in note] == [
        "dorefa w2a2g32: over float is missing, because the float control has no run with its seeds"
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999.4, "999 "), (999.6, "1 k"), (999_600, "1 M"), (-999.9, "-1 k"), (5e15, "5e+03 T")],
)
def test_numbers_with_prefixes(number: float, text: str) -> None:
    assert si_format(number) == text


def test_a_float_run_stays_beside_runs_of_its_own_protocol(configure: Configure) -> None:
    """The same float run is the baseline of another run, whose table shows it too."""
    baseline = configure("method=float")
    path = plant(baseline, 95.0)
    plant(configure(*WORDS), 93.0, BaselineResult(run=str(path), final=evaluation(95.0)))
    keys = ("init=scratch", "optim=sgd", f"epochs={baseline.pretrain.epochs}")
    scratch = configure(*WORDS, *keys)
    plant(scratch, 90.0)
    assert planned_run(scratch).identity.protocol_hash == planned_run(baseline).identity.protocol_hash
    tables = compare(read([configure().out]))
    assert [sorted(s.method for s in settings_of(table)) for table in tables] == [["dorefa", "float"]] * 2


def from_logs(name: str, epochs: int, top1: float, seed: int) -> RunRecord:
    """Return a run of which only TensorBoard's event files are left."""
    result = Result(
        status="done", method="lsq", bits={"w": 2, "a": 2, "g": 32}, seed=seed, dataset="digits", model="resnet8",
        run=name, protocol=Protocol(hash="", keys={"epochs": epochs}), final=evaluation(top1),
    )  # fmt: skip
    return RunRecord(path=Path(name), status="done", result=result, notes=[FROM_LOGS])


def test_runs_of_other_epochs_are_not_averaged_if_only_the_epochs_are_known(tmp_path: Path) -> None:
    runs = [from_logs("short", 4, 60.0, 0), from_logs("long", 200, 95.0, 1)]
    file = tmp_path / "logs.json"
    file.write_text(dump_records(runs))
    for records in (runs, reader.load_records(file)):
        found = {table.title: settings_of(table)[0].top1.mean for table in compare(records)}
        assert found == {
            "resnet8 on digits; protocol not known, epochs=4": 60.0,
            "resnet8 on digits; protocol not known, epochs=200": 95.0,
        }


RUNNABLE = [
    row
    for row in published_rows()
    if row.metric.startswith("top1") and row.value is not None and not published_table.missing_requirements(row)
]
SAME_EXPERIMENT = 12
"""Largest number of rows whose experiment another row has too, such as two figures of one run."""


def matched(row: PublishedRow, configure: Configure) -> str:
    """Return the published row that a comparison shows beside a run of a row's experiment."""
    (config,) = compose.configurations([f"experiment={row.paper}/{row.id}", f"out={configure().out}", "seed=0"])
    directory = planned_run(config).directory
    result = replace(directory.new_result("done"), final=evaluation(50.0))
    (setting,) = (
        s for t in compare([RunRecord(path=directory.path, status="done", result=result)]) for s in settings_of(t)
    )
    found = matching.rows_for(setting, row.dataset)
    return f"{found[0].paper}/{found[0].id}" if found else ""


@pytest.mark.parametrize(
    "name", ["hwgq/resnet18_w1a2", "inq/resnet18_w5_random", "dorefa/alexnet_repo2017_w1", "inq/resnet18_mxbonn_w5"]
)
def test_a_run_of_an_experiment_stands_beside_its_own_figure(name: str, configure: Configure) -> None:
    (row,) = (row for row in RUNNABLE if f"{row.paper}/{row.id}" == name)
    assert matched(row, configure) == name


def test_a_figure_of_another_option_does_not_replace_one_that_is_not_known(configure: Configure) -> None:
    """The paper shows rounding to nearest only as a curve. Its figure for stochastic rounding is another result."""
    (row,) = (row for row in published_rows() if f"{row.paper}/{row.id}" == "gupta/mnist_cnn_nearest_fl12")
    assert row.value is None
    assert matched(row, configure) == "gupta/mnist_cnn_nearest_fl12"


@pytest.mark.full
def test_runs_of_all_experiments_stand_beside_their_own_figures(configure: Configure) -> None:
    others = [row for row in RUNNABLE if matched(row, configure) != f"{row.paper}/{row.id}"]
    assert len(others) <= SAME_EXPERIMENT, [f"{row.paper}/{row.id}" for row in others]


def test_the_network_of_a_failed_run_is_known(configure: Configure) -> None:
    """Methods that need another normalization would otherwise lose the warning on diverged seeds."""
    words = ("experiment=smoke", "method=hwgq", "init=scratch", "optim=sgd", "optim.lr=1e30")
    config = configure(*words)

    with pytest.raises(Diverged):
        run(planned_run(config))
    stored = json.loads((planned_run(config).path / "result.json").read_text())
    assert (stored["status"], stored["network"]) == ("diverged", {"norm": "no_affine"})
