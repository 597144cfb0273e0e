"""docs/results.md: the settings of scripts/cifar10.py can be run, and a partial record is shown as one."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import evaluation, plant

sys.path.insert(0, str(ROOT / "scripts"))

import cifar10

from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.setup import assemble
from qbench.models import resnet
from qbench.runs.reader import read
from qbench.runs.result import BaselineResult

TINY = ["dataset=synthetic", "dataset.channels=3", "dataset.size=8", "dataset.train=64", "dataset.test=32",
        "dataset.val=0", "model=resnet8", "model.width=4"]  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[PlannedRun]:
    """The runs of two seeds on tiny data."""
    model = resnet.build((3, 8, 8), 10, depth=8, width=4, form="post", shortcut="A_stride")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    options = argparse.Namespace(
        keys=TINY, root="", init=str(tmp_path / "tiny.pt"), out=str(tmp_path / "out"), seeds="0,1", epochs="4"
    )
    return cifar10.planned(options, cifar10.wanted_settings())


def test_every_setting_can_be_run_from_a_checkpoint(runs: list[PlannedRun]) -> None:
    wanted = cifar10.wanted_settings()
    assert len({each.key for each in wanted}) == len(wanted) >= 36
    assert [run.config.seed for run in runs] == [0] * len(wanted) + [1] * len(wanted), "one seed of all first"
    for each, run in zip(wanted, runs, strict=False):
        setup = assemble(run.config)
        assert not setup.needs_baseline
        assert (setup.method_name, setup.method.bits) == each.key
        assert run.identity.protocol_hash == runs[0].identity.protocol_hash, "all settings share a table"


def test_a_partial_record_states_n_and_what_is_missing(runs: list[PlannedRun], tmp_path: Path) -> None:
    pretrained = BaselineResult(run="tiny.pt", final=evaluation(91.0), sha256="12" * 32)
    wanted = cifar10.wanted_settings()
    chosen = {"float": [90.0, 92.0], "ptq": [80.0], "lsq": [85.0, 85.5]}
    for i, run in enumerate(runs):
        each = wanted[i % len(wanted)]
        values = chosen.get(each.method, [])
        if each.bits in ("w32a32", "w8a8", "w2a2") and run.config.seed < len(values):
            plant(run.config, values[run.config.seed], pretrained)
    plant(next(run.config for run in runs if run.identity.method == "ttq"), 0.0, status="failed", reason="no luck")
    record = tmp_path / "record.json"
    cifar10.store(record, read([str(tmp_path / "out")]))
    *tables, missing = cifar10.tables(cifar10.stored_results(record)[0])
    rows = {(row[0], row[1], row[2]): row for table in tables for row in table.rows}
    assert rows["float tiny.pt", "32", "32"][6:] == ("91.00", "-", "1", "-", "-")
    assert rows["float, trained for as long", "32", "32"][6:10] == ("91.00", "1.41", "2", "+0.00")
    assert rows["ptq", "8", "8"][6:] == ("80.00", "-", "1", "-11.00", "-10.00")
    assert rows["lsq", "2", "2"][10].startswith("-5.75 ±")
    assert f"3 of {len(wanted)} settings are measured, with 2 seeds at most" in missing.notes
    assert "measured with fewer than 2 seeds: ptq w8a8" in missing.notes
    assert any("no luck" in note for note in missing.notes)
    (not_measured,) = [note for note in missing.notes if note.startswith("not measured")]
    assert not_measured.count(",") == len(wanted) - 4
    assert "ttq w2a32" in not_measured
    assert cifar10.stored_results(tmp_path / "none.json") == ([], "No run is recorded yet.")
