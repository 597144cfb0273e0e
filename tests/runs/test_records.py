"""Durable files, a run's directory and lock, logs cut to a checkpoint, the progress reporter."""

import copy
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Configure
from filelock import FileLock
from helpers import evaluation, plant

from qbench.cost.network_cost import NetworkCost
from qbench.errors import ConfigError, Interrupted, ResourceError
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.report.comparison.compare import compare
from qbench.report.tables.run_row import row
from qbench.runs import manifest
from qbench.runs.metrics_logger import MetricsLogger, _bars
from qbench.runs.progress import ProgressReporter, _Stage
from qbench.runs.reader import RunRecord, dump_records, load_records, read, read_run
from qbench.runs.result import BaselineResult, Protocol, Result, store_result, with_checksum
from qbench.runs.tensorboard_tags import SPEED, final_metrics, scalar_tags
from qbench.system import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    for name in ("fsync", "replace"):

        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(ResourceError, match=r"a\.json.*bytes needed.*No space left"):
                files.write(path, b"other")
        assert files.read_json(path) == {"x": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "none.json") is None
    path.write_text('{"x": ')
    assert files.read_json(path) is None
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"x": float("nan")})


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.record("epoch", 1, {"loss": 0.5})
    size = logger.size
    logger.record("epoch", 2, {"loss": 0.25})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "ep')
    again = MetricsLogger(tmp_path, size=size, tensorboard=False)
    again.record("epoch", 2, {"loss": 0.125})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.125)]


def test_tensorboard_keeps_every_epoch_once_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(1_700_000_000)  # event files are read in the order of their names, which hold the second
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(size: int, step: int, steps: list[int]) -> int:
        logger = MetricsLogger(tmp_path, size=size, step=step)
        for at in steps:
            logger.record("epoch", at, {"train_loss": float(at)})
        logger.close()
        return logger.size

    write(0, 0, [18])  # killed before the first checkpoint
    size = write(0, 0, [18, 36])
    write(0, 36, [])
    write(size, 36, [54, 72])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [18, 36, 54, 72]


def test_a_command_line_that_is_not_utf8_can_be_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.begin({"w": 2}, ["w"], ["test/top1"], {}, {"command": "qbench dataset.root=\udcff"})
    logger.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert b"dataset.root=\\udcff" in file.read_bytes()


def test_the_final_metrics_are_read_back_from_their_tags() -> None:
    final = {f"{split}_{key}": float(i) for i, key in enumerate(("top1", "top5", "loss")) for split in ("val", "test")}
    assert final_metrics(scalar_tags("final", final)) == final
    epoch = {"epoch": 3, "images": 600, "seconds": 2.0, "train_top1": 90.0, "val_top1": 80.0, "other": "text"}
    assert scalar_tags("epoch", epoch) == {"accuracy/train": 90.0, "accuracy/val": 80.0, SPEED: 300.0}
    assert final_metrics(scalar_tags("epoch", epoch)) == {"val_top1": 80.0}, "without the test split"
    assert scalar_tags("layers", {"epoch": 3, "layers": {}}) == {}


def test_a_stored_result_counts_only_if_it_is_intact_and_of_this_run(configure: Configure) -> None:
    directory = planned_run(configure("method=dorefa")).directory
    assert directory.stored() is None
    assert not directory.path.exists()
    with directory.lock():
        directory.finish(directory.new_result("unsupported"))
    stored = directory.stored()
    assert stored is not None
    assert stored.run == str(directory.path)
    path = directory.path / "result.json"
    good = json.loads(path.read_text())
    for change in (
        {"schema": 99},
        {"status": "failed"},
        {"surprise": 1},
        {"status": "done"},
        {"notes": None},
        {"protocol": {}},
        {"identity": "another"},
    ):
        path.write_text(json.dumps(with_checksum(good | change)))
        assert directory.stored() is None, change
    path.write_text(json.dumps(good | {"seed": 1}))
    assert directory.stored() is None, "the sha256 belongs to another content"
    path.write_text(json.dumps(good)[:-20])
    assert directory.stored() is None


def test_the_newest_two_checkpoints_are_kept(configure: Configure) -> None:
    directory = planned_run(configure("method=dorefa")).directory
    with directory.lock():
        for step in (5, 9, 10, 100):
            directory.save_state(step, b"x")
        assert [p.name for p in directory.checkpoints()] == ["state-100.pt", "state-10.pt"]
        (directory.path / ".result.json.77.tmp").write_text("half")
    with directory.lock():
        assert not list(directory.path.glob(".*.tmp"))
        directory.finish(directory.new_result("failed"))
        assert len(directory.checkpoints()) == 2, "a failed run can continue"
        directory.finish(directory.new_result("done"))
        assert directory.checkpoints() == []


def test_only_one_process_locks_a_directory(configure: Configure) -> None:
    first, second = (planned_run(configure("method=dorefa")).directory for _ in range(2))

    class Waited(Exception):
        pass

    def waiting() -> None:
        raise Waited

    with first.lock(), pytest.raises(Waited), second.lock(waiting):
        raise AssertionError("two locks at once")
    with second.lock(waiting):
        pass


NO_ANSWER = ("EROFS", "EACCES", "ENOSYS", "EOPNOTSUPP", "ENOLCK")


@pytest.mark.parametrize("error", NO_ANSWER)
@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_lock_that_cannot_be_asked_is_not_held(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, error: str, call: str
) -> None:
    path = plant(configure("method=dorefa", "bits=w2"), 90.0)
    original, code = os.open, getattr(errno, error)

    def fail(file: Any, *arguments: Any, **options: Any) -> Any:
        if call == "open" and not str(file).endswith(".lock"):
            return original(file, *arguments, **options)
        raise OSError(code, os.strerror(code), str(file))

    assert read_run(path).status == "done"
    monkeypatch.setattr(*((os, "open") if call == "open" else (fcntl, "flock")), fail)
    assert read_run(path).status == "done"
    (path / "result.json").unlink()
    assert read_run(path).status == "unfinished"


@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, code = planned_run(configure("method=dorefa")).directory, getattr(errno, error)
    with directory.lock():
        pass  # leaves a lock file

    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    began = time.monotonic()
    with directory.lock(lambda: pytest.fail("another process does not hold it")):
        assert (directory.path / ".lock").exists()
    assert time.monotonic() - began < 1
    assert "the file system does not support locks" in capsys.readouterr().err


def test_a_lock_on_a_read_only_directory_is_seen(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = plant(configure("method=dorefa", "bits=w2"), 90.0), os.open

    def read_only(file: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return original(file, flags, *arguments, **options)

    with FileLock(path / ".lock"):
        monkeypatch.setattr(os, "open", read_only)
        assert read_run(path).status == "running"
    assert read_run(path).status == "done"


def test_new_directories_are_synced_in_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_directory", synced.append)
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    files.make_directory(tmp_path / "a" / "d")
    files.make_directory(tmp_path / "a" / "d")
    assert synced[3:] == [tmp_path / "a"]
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file"):
        files.make_directory(tmp_path / "file")


def test_changes_since_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert manifest.changed_since(path) == []
    files.write_json(path, {"commit": manifest.commit(), "versions": dict(manifest.versions())})
    assert manifest.changed_since(path) == []
    files.write_json(path, {"commit": manifest.commit(), "versions": {"torch": "1.0"}})
    (change,) = manifest.changed_since(path)
    assert change.startswith("torch 1.0 (now ")
    files.write_json(path, {"device": "cuda"})
    assert manifest.changed_since(path) == manifest.changed_since(path, "cuda") == []
    assert manifest.changed_since(path, "cpu") == ["device cuda (now cpu)"]


def test_a_run_that_goes_on_on_another_device(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    reporter = ProgressReporter(quiet=True)
    monkeypatch.setattr(reporter, "say", said.append)
    polls = iter([0, 15, 15])
    planned = planned_run(smoke("method=float"))
    with suppress(Interrupted):
        run(planned, RunContext(reporter, lambda: next(polls)))
    path = planned.path / "manifest.json"
    begun = files.read_json(path) or {}
    assert begun["devices"] == ["cpu"]
    files.write_json(path, {**begun, "device": "cuda", "devices": ["cuda"]})
    result = run(planned, RunContext(reporter))
    assert any("the run began with device cuda (now cpu)" in line for line in said), said
    assert any("trained on cuda, then on cpu" in warning for warning in result.warnings)
    again = run(planned_run(dataclasses.replace(planned.config, rerun=True)), RunContext(reporter))
    assert not any("trained on" in warning for warning in again.warnings), "a new start keeps no older device"


def test_a_run_that_goes_on_under_another_commit(
    smoke: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It warns, its manifest, result and row name all commits, and so does a table of such runs."""
    said: list[str] = []
    reporter = ProgressReporter(quiet=True)
    monkeypatch.setattr(reporter, "say", said.append)
    monkeypatch.setattr(manifest, "changed", lambda: False)
    polls = iter([0, 15, 15])
    planned = planned_run(smoke("method=float"))
    for commit, stop in (("a" * 40, lambda: next(polls)), ("b" * 40, lambda: 0)):
        monkeypatch.setattr(manifest, "commit", lambda: commit)  # noqa: B023
        with suppress(Interrupted):
            result = run(planned, RunContext(reporter, stop))
    stored = files.read_json(planned.path / "manifest.json")
    assert stored is not None
    assert stored["commits"] == result.commits == ["a" * 40, "b" * 40]
    assert any(f"the run began with commit {'a' * 40} (now {'b' * 40})" in line for line in said), said
    assert "trained by several commits of qbench: aaaaaaaa, bbbbbbbb" in row([result])
    monkeypatch.setattr(manifest, "changed", lambda: True)
    again = run(planned_run(dataclasses.replace(planned.config, rerun=True)), RunContext(reporter))
    assert again.commits == ["b" * 40 + "+changes"], "a new start keeps no older commit"
    other = run(planned_run(smoke("method=float", "seed=1")), RunContext(reporter))
    assert not any("several commits" in note for table in compare(read([str(tmp_path)])) for note in table.notes)
    monkeypatch.setattr(manifest, "changed", lambda: False)
    run(planned_run(dataclasses.replace(planned.config, rerun=True)), RunContext(reporter))
    notes = [note for table in compare(read([str(tmp_path)])) for note in table.notes]
    assert other.commits == again.commits
    assert any("bbbbbbbb (1 run), bbbbbbbb+changes (1 run)" in note for note in notes), notes


def test_a_rerun_that_goes_on_under_another_commit(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not advise to add rerun=true, which was typed already and continues the run."""
    said: list[str] = []
    reporter = ProgressReporter(quiet=True)
    monkeypatch.setattr(reporter, "say", said.append)
    polls = iter([0, 15, 15])
    planned = planned_run(smoke("method=float", "rerun=true"))
    for commit, stop in (("a" * 40, lambda: next(polls)), ("b" * 40, lambda: 0)):
        monkeypatch.setattr(manifest, "commit", lambda: commit)  # noqa: B023
        with suppress(Interrupted):
            run(planned, RunContext(reporter, stop))
    (warning,) = (line for line in said if "the run began with commit" in line)
    assert warning.endswith("to start over, delete the run's directory")


def test_a_run_that_goes_on_after_its_baseline_was_trained_again(
    smoke: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the accuracy of the baseline it started from, and the highest peak memory of its processes."""
    planned = planned_run(smoke("method=dorefa", "bits=w2a2"))
    quiet, polls = ProgressReporter(quiet=True), iter([0, 15, 15])
    baseline = run(assemble(planned.config).baseline, RunContext(quiet))
    with monkeypatch.context() as patch:
        patch.setattr("qbench.experiment.session._peak_bytes", lambda: 2**50)
        with pytest.raises(Interrupted):
            run(planned, RunContext(quiet, lambda: next(polls)))
    assert baseline.final is not None
    test = dataclasses.replace(baseline.final.test, top1=1.5)
    other = dataclasses.replace(baseline, final=dataclasses.replace(baseline.final, test=test))
    store_result(Path(baseline.run), other)
    result = run(planned, RunContext(quiet))
    assert result.baseline_top1 == baseline.top1 != 1.5
    assert any("was trained again, with another outcome" in warning for warning in result.warnings)
    assert result.speed is not None
    assert result.speed.peak_bytes == 2**50


def test_plain_lines_are_few_and_all_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ProgressReporter(live=False)
    reporter.log = tmp_path / "log.txt"
    reporter.start("stage", 1000, 0, 64)
    for epoch in range(100):
        reporter.step(10 * epoch + 10, lambda: 0.5)
        reporter.epoch(10 * epoch + 10, {"epoch": epoch, "train_loss": 0.5, "train_top1": 50.0, "val_top1": 40.0})
    reporter.say("hello")
    shown = capsys.readouterr().err.splitlines()
    assert 10 <= len(shown) <= 13
    assert "epoch 100, step 1000 of 1000  loss 0.5000  train 50.0 %  val 40.0 %" in shown[-2]
    assert shown[-1] == "hello"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 101


def _result(**values: Any) -> Result:
    bits = {"w": 2, "a": 32, "g": 32}
    cost = NetworkCost(
        params=19_074, macs=189_248, bitops=16_842_752, bytes_float=76_296, bytes_ideal=7176, bytes_packed=7176,
        bits_per_weight=2.0,
    )  # fmt: skip
    result = Result(
        status="done", method="dorefa", bits=bits, seed=0, dataset="digits", model="resnet8",
        protocol=Protocol(hash="", keys={}), run="outputs/x", levels=4, wall_seconds=3.21, final=evaluation(90.0),
        cost=cost,
    )  # fmt: skip
    return dataclasses.replace(result, **values)


def test_the_row() -> None:
    child = _result(baseline=BaselineResult(run="outputs/f", final=evaluation(91.25)), notes=["a hint"])
    text = row([child, _result(method="float", levels=None), _result(status="unsupported", final=None, reason="why")])
    narrow = row([child], width=80).splitlines()
    assert max(map(len, narrow)) <= 80
    assert narrow[0].split() == ["method", "dorefa"]
    assert narrow[6].split() == ["float", "91.25", "%"]
    assert row([child], width=200) == row([child])
    head, first, baseline, unsupported, *rest = text.splitlines()
    assert head.split()[:4] == ["method", "W", "A", "G"]
    assert " ".join(first.split()) == (
        "dorefa 2 32 32 4 2.00 91.25 % 90.00 % -1.25 7.18 kB of 76.3 kB 16.8 M of 194 M 3.2 s"
    )
    assert " ".join(baseline.split()).startswith("float 2 32 32 - 2.00 90.00 % - - 7.18 kB")
    assert unsupported.split()[-1] == "unsupported"
    assert "      a hint" in rest
    assert "      why" in rest


def test_a_record_keeps_hits_and_weights(tmp_path: Path) -> None:
    """One bit an image, in a file that is read without the runs' directories."""
    labels, predicted = np.arange(11) % 3, np.zeros(11, dtype=np.int64)
    run = tmp_path / "run"
    run.mkdir()
    np.save(run / "predictions.npy", np.stack([labels, predicted], 1).astype(np.int16))
    top1 = 100 * 4 / 11
    result = Result(
        status="done", run=str(run), final=evaluation(top1), method="x", bits={"w": 2, "a": 32, "g": 32}, seed=0,
        dataset="d", model="m", protocol=Protocol(hash="1", keys={}), weights_sha256="abc",
    )  # fmt: skip
    text = dump_records([RunRecord(path=run, status="done", result=result)])
    (run / "predictions.npy").unlink()
    record = tmp_path / "record.json"
    record.write_text(text)
    (loaded,) = load_records(record)
    assert loaded.hits is not None
    assert loaded.hits.correct.tolist() == [label == 0 for label in labels]
    assert loaded.result is not None
    assert loaded.result.weights_sha256 == "abc"
    assert dump_records([loaded]) == text, "a record of a record is the same"
    values = json.loads(text)
    assert len(values["runs"][0]["hits"]["bits"]) == 4, "11 images are two bytes"
    for change in ({"images": 12}, {"images": 90}, {"bits": "!"}, {"bits": "AAA="}, {"labels_sha256": None}):
        damaged = copy.deepcopy(values)
        damaged["runs"][0]["hits"] |= change
        record.write_text(json.dumps(damaged))
        with pytest.raises(ConfigError, match="not a record of runs"):
            load_records(record)


def test_a_process_that_does_not_write_leaves_the_directory_as_it_is(configure: Configure) -> None:
    """It returns the result that it would have stored, because all processes of a run return the same result."""
    planned = planned_run(configure("method=dorefa"))
    directory = planned.directory.read_only()
    result = directory.new_result("done")
    directory.write_config()
    assert directory.finish(result) is result
    directory.save_state(1, b"state")
    directory.remove_checkpoints()
    assert not directory.path.exists()


def test_a_record_contains_no_number_that_json_cannot_have(configure: Configure) -> None:
    plant(configure("method=dorefa"), 96.0)
    (record,) = read([configure().out])
    assert record.result
    record.result = dataclasses.replace(record.result, wall_seconds=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_records([record])


def test_bars_of_a_histogram_end_at_the_upper_edges() -> None:
    """TensorBoard draws a bar from the limit before to its own limit; the first one begins at the minimum."""
    added: list[Any] = []

    class Writer:
        def add_histogram_raw(self, *values: Any) -> None:
            added.extend(values)

    counts, edges = np.array([3, 1]), np.array([-1.0, 0.5, 2.0])
    _bars(Writer(), "latent", 7, counts, edges, (4.0, 1.0, 5.0))  # type: ignore[arg-type]
    assert added[:6] == ["latent", -1.0, 2.0, 4.0, 1.0, 5.0]
    assert added[6].tolist() == [0.5, 2.0]
    assert (added[7].tolist(), added[8]) == ([3, 1], 7)


def test_lines_of_metrics_are_on_the_disk_when_record_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        original(handle)
        synced.append(Path(f"/proc/self/fd/{handle}").read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    MetricsLogger(tmp_path, tensorboard=False).record("epoch", 1, {"loss": 0.5})
    assert synced == [b'{"kind": "epoch", "step": 1, "loss": 0.5}\n']


def test_speed_counts_the_steps_and_seconds_since_the_start_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A continued run began at step 2: five steps of 32 images in ten seconds."""
    monkeypatch.setattr(time, "perf_counter", lambda: 110.0)
    assert _Stage("training", total=10, first=2, images=32, since=100.0).speed(7) == 16.0


def test_a_continued_run_adds_the_commit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cpu = tmp_path / "manifest.json", torch.device("cpu")
    found = []
    for code, resumed in (("a", False), ("a", True), ("b", True), ("b", True), ("a", True), ("c", False)):
        monkeypatch.setattr(manifest, "code_version", lambda code=code: code)
        manifest.write(path, numerics={}, device=cpu, data={}, resumed=resumed)
        found.append("".join(manifest.code_versions(path)))
    assert found == ["a", "a", "ab", "ab", "aba", "c"]
