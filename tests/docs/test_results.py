"""docs/results.md: the settings of scripts/cifar10.py can be run, and a partial record is shown as one."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import evaluation, plant

sys.path.insert(0, str(ROOT / "scripts"))

import cifar10

from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.setup import assemble
from qbench.models import resnet
from qbench.runs.hits import Hits
from qbench.runs.reader import RunRecord, read
from qbench.runs.result import BaselineResult, Protocol, Result

TINY = ["dataset=synthetic", "dataset.channels=3", "dataset.size=8", "dataset.train=64", "dataset.test=32",
        "dataset.val=0", "model=resnet8", "model.width=4"]  # fmt: skip


RESULT = Result(
    status="done", method="lsq", bits={"w": 2, "a": 2, "g": 32}, seed=0, dataset="cifar10", model="resnet20",
    protocol=Protocol(hash="", keys={}),
)  # fmt: skip
Planned = Callable[[Sequence[cifar10.Wanted], str], list[PlannedRun]]
WANTED = cifar10.wanted_settings()


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Return a function from settings and seeds to their runs on tiny data."""
    model = resnet.build((3, 8, 8), 10, depth=8, width=4, form="post", shortcut="A_stride")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    words = {"keys": TINY, "root": "", "init": str(tmp_path / "tiny.pt"), "out": str(tmp_path / "out"), "epochs": "4"}
    return lambda wanted, seeds: cifar10.planned(argparse.Namespace(**words, seeds=seeds), wanted)


@pytest.mark.full
def test_every_setting_can_be_run_from_a_checkpoint(planned: Planned) -> None:
    runs = planned(WANTED, "0")
    for each, run in zip(WANTED, runs, strict=True):
        setup = assemble(run.config)
        assert not setup.needs_baseline
        assert (setup.method_name, setup.method.bits) == each.key
        assert run.identity.protocol_hash == runs[0].identity.protocol_hash, "all settings share a table"


def test_all_settings_of_a_seed_come_before_the_next_seed(planned: Planned) -> None:
    runs = planned(WANTED[:3], "0,1")
    assert [run.config.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    assert len({each.key for each in WANTED}) == len(WANTED) >= 36


def test_a_partial_record_states_n_and_what_is_missing(planned: Planned, tmp_path: Path) -> None:
    pretrained = BaselineResult(run="tiny.pt", final=evaluation(91.0), sha256="12" * 32)
    top1 = {"float": [90.0, 92.0], "ptq": [80.0], "lsq": [85.0, 85.5], "ttq": []}
    chosen = [each for each in WANTED if each.method in top1 and each.bits in ("w32a32", "w8a8", "w2a2")]
    for run in planned(chosen, "0,1"):
        values = top1[run.identity.method]
        if run.config.seed < len(values):
            plant(run.config, values[run.config.seed], pretrained)
    (failed,) = planned([each for each in WANTED if each.method == "ttq"], "0")
    plant(failed.config, 0.0, status="failed", reason="no luck")
    record = tmp_path / "record.json"
    cifar10.store(record, read([str(tmp_path / "out")]), [tmp_path], cifar10.note_on)
    assert str(tmp_path) not in record.read_text()
    *tables, missing = cifar10.tables(cifar10.stored_results(record)[0])
    rows = {(row[0], row[1], row[2]): row for table in tables for row in table.rows}
    assert rows["float tiny.pt", "32", "32"][6:] == ("91.00", "-", "1", "-", "-")
    assert rows["float control", "32", "32"][6:10] == ("91.00", "1.41", "2", "+0.00")
    assert rows["ptq", "8", "8"][6:] == ("80.00", "-", "1", "-11.00", "-10.00")
    assert rows["lsq", "2", "2"][10].startswith("-5.75 ±")
    assert f"3 of {len(WANTED)} settings are measured, each with at most 2 seeds" in missing.notes
    assert "measured with fewer than 2 seeds: ptq w8a8" in missing.notes
    assert any("no luck" in note for note in missing.notes)
    (not_measured,) = [note for note in missing.notes if note.startswith("not measured")]
    assert not_measured.count(",") == len(WANTED) - 4
    assert "ttq w2a32" in not_measured
    assert cifar10.stored_results(tmp_path / "none.json") == ([], "No run is recorded yet.")


def test_effect_of_a_claim_with_one_seed_and_with_two() -> None:
    """Hits 1 1 0 0 and 1 0 0 0: mean 25, deviation 50, so the margin is 1.96 * 50 / 2; with seeds, Student's t."""

    def record(*correct: int) -> RunRecord:
        top1 = 100 * sum(correct) / len(correct)
        result = replace(RESULT, final=evaluation(top1))
        hits = Hits("", np.array(correct, dtype=bool))
        return RunRecord(path=Path("run"), status="done", result=result, hits=hits)

    one = (record(1, 1, 0, 0), record(1, 0, 0, 0))
    assert cifar10._effect([one]) == pytest.approx((25.0, 49.0))
    two = (record(1, 1, 1, 0), record(1, 0, 0, 0))
    assert cifar10._effect([one, two]) == pytest.approx((37.5, 12.7062 * 12.5), rel=1e-4)


def test_the_table_of_claims_has_only_measured_pairs(tmp_path: Path) -> None:
    records = cifar10.stored_results(cifar10.RECORD)[0]
    table = cifar10.claims(records)
    named = {path.stem for path in (ROOT / "conf" / "experiment" / "claims").glob("*.yaml")}
    assert {row[0] for row in table.rows} <= {claim[0] for claim in cifar10.CLAIMS} <= named
    rows = {(row[1], row[2]): row for row in table.rows}
    top1 = {r.path.name.partition("-s0")[0]: r.result.top1 for r in records if r.result and r.result.seed == 0}
    effect = (top1["qd-w2a32g32"] or 0) - (top1["ptq-w2a32g32"] or 0)
    assert rows["qd w2a32", "ptq w2a32"][4] == f"{effect:+.2f}"
