"""What a sweep shows while it runs: a live view of the runs in progress, or a line for each event."""

import io
import json
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Configure, tiered
from helpers import plant, qbench
from rich.console import Console

from qbench.experiment import sweep_progress
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.sweep_progress import EventLines, LiveView, duration
from qbench.experiment.sweep_status import SweepStatus, read_epoch, run_names


def write_epoch(path: Path, epoch: int, **values: float) -> None:
    """Append the records of an epoch of 600 images and 2 s: a long one of layers, then that of the epoch."""
    record = {"epoch": epoch, "lr": 0.1, "train_loss": 0.25, "train_top1": 91.04, "seconds": 2.0, "images": 600}
    lines = [{"kind": "layers", "layers": {"conv": list(range(2000))}}, {"kind": "epoch", **record, **values}]
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_runs_are_followed_from_start_to_result(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [("method=dorefa", f"seed={seed}", "epochs=4") for seed in range(3)]
    runs = [planned_run(configure(*word)) for word in words]
    plant(configure(*words[2]), 95.0)
    status = SweepStatus(runs)
    lines = EventLines(status)

    def shown() -> list[str]:
        lines.show(status.look())
        return capsys.readouterr().err.splitlines()

    assert shown() == ["[1/3] already stored"]
    with runs[0].directory.lock():
        assert shown() == [], "a run without a configuration has not begun"
        runs[0].directory.write_config()
        assert shown() == ["[1/3] dorefa w2a32g32 s0: running, 0 of 4 epochs done"]
        write_epoch(runs[0].path, 0, val_top1=90.06)
        assert shown() == [], "epochs are not shown more often than every 30 s"
        assert status.completed == 1.25
        monkeypatch.setattr(sweep_progress, "EPOCH_SECONDS", -1)
        write_epoch(runs[0].path, 1, val_top1=90.06)
        (line,) = shown()
        assert re.fullmatch(
            r"\[1/3\] dorefa w2a32g32 s0: epoch 2/4, loss 0.2500, train 91.0 %, val 90.1 %, 300 images/s, 0:0\d left",
            line,
        )
        assert shown() == [], "an epoch is shown once"
    plant(configure(*words[0]), 94.0, wall_seconds=3.25)
    (line,) = shown()
    assert re.fullmatch(r"\[2/3\] dorefa w2a32g32 s0: 94.00 %, 3.2 s; 0:0\d left for the sweep", line)
    plant(configure(*words[1]), 0.0, status="failed", reason="no \x1b[2J\nmore")
    assert shown() == ["[3/3] dorefa w2a32g32 s1: failed: no ?[2J"]
    assert not status.in_work


def test_the_baseline_that_runs_wait_for_is_shown(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("method=dorefa", "pretrain.epochs=7")
    baseline = planned_run(configure("method=float", "init=scratch", "pretrain.epochs=7", "epochs=7"))
    status = SweepStatus([planned_run(config)])
    with ExitStack() as stack:
        for directory in (planned_run(config).directory, baseline.directory):
            stack.enter_context(directory.lock())
        baseline.directory.write_config()
        write_epoch(baseline.path, 2)
        EventLines(status).show(status.look())
        assert status.completed == 0
    assert capsys.readouterr().err == "[0/1] float baseline s0: running, 3 of 7 epochs done\n"


def test_the_time_left_is_that_of_the_epochs_seen(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a continued run took 10 s for an epoch, the other four take 40 s, of which 3 are over."""
    planned = planned_run(configure("method=dorefa", "epochs=7"))
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    status = SweepStatus([planned])
    with planned.directory.lock():
        planned.directory.write_config()
        for epoch in range(2):
            write_epoch(planned.path, epoch)
        status.look()
        (run,) = status.in_work.values()
        assert run.seconds_left == pytest.approx(2.0 * 5), "so far, by the time of the last epoch"
        clock[0] = 110.0
        write_epoch(planned.path, 2)
        status.look()
        clock[0] = 113.0
        assert run.seconds_left == pytest.approx(37.0)


def test_records_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    assert read_epoch(tmp_path) is None
    write_epoch(tmp_path, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epoch", "epoch": 5}\n[1]\n{"kind": "ep')
    found = read_epoch(tmp_path)
    assert found is not None
    assert (found.epoch, found.images_per_second, found.val_top1) == (4, 300.0, None)


def planned_runs(configure: Configure, *lines: str) -> list[PlannedRun]:
    return [planned_run(configure(*line.split())) for line in lines]


def test_runs_of_a_sweep_have_different_names(configure: Configure) -> None:
    runs = planned_runs(
        configure, "method=lsq", "method=lsq seed=1", "method=dorefa", "method=dorefa method.activation=abs",
        "method=ttq epochs=3", "method=ttq epochs=4",
    )  # fmt: skip
    names = list(run_names(runs).values())
    assert names[:2] == ["lsq w2a2g32 s0", "lsq w2a2g32 s1"]
    assert names[2:4] == ["dorefa activation=clip w2a32g32 s0", "dorefa activation=abs w2a32g32 s0"]
    assert len(set(names)) == len(names)
    assert all(name.startswith("ttq w2a32g32 s0 ") for name in names[4:])
    assert "digits-mlp" in run_names(planned_runs(configure, "method=lsq", "method=lsq model=mlp")).popitem()[1]


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_fits_the_terminal(width: int, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = planned_runs(configure, *(f"method=dorefa seed={seed} epochs=100" for seed in range(9)))
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "10")
    status = SweepStatus(runs)
    view = LiveView(status, workers=8)
    with ExitStack() as stack:
        for planned in runs[:8]:
            stack.enter_context(planned.directory.lock())
            planned.directory.write_config()
            write_epoch(planned.path, 24, val_top1=90.0)
        view.show(status.look())
        console = Console(file=io.StringIO(), width=width, height=10, color_system=None)
        with console.capture() as capture:
            console.print(view._picture())
    view.stop()
    first, head, *rows, hidden = capture.get().splitlines()
    assert "0 of 9 runs done, 8 running, 1 waiting" in first
    assert head.split() == ["running", "epoch", "loss", "train", "%", "val", "%", "images/s", "left"]
    assert rows[0].split()[:9] == ["dorefa", "w2a32g32", "s0", "25/100", "0.2500", "91.0", "90.0", "300", "2:30"]
    assert (len(rows), hidden) == (6, "and 2 more runs in progress")
    assert all(len(line) <= width for line in capture.get().splitlines())


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 90061)] == ["0:00", "1:00", "1:01", "1:00:00", "25:01:01"]


@pytest.mark.parametrize("epochs", tiered([8, 30], []))
def test_without_a_terminal_there_is_a_line_for_each_event(tmp_path: Path, epochs: int) -> None:
    words = [
        "-m",
        "experiment=smoke",
        "method=dorefa",
        "bits=w2a2",
        "seed=0,1",
        f"epochs={epochs}",
        "runtime.tensorboard=false",
    ]
    done = qbench(*words, "out=o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    left = (r"; \d+:\d\d left for the sweep", "")
    for seed in (0, 1):
        about = [line for line in lines if f"dorefa w2a2g32 s{seed}: " in line]
        assert re.search(rf"running, \d+ of {epochs} epochs done$", about[0]), done.stderr
        assert re.fullmatch(
            rf"\[{seed + 1}/2\] dorefa w2a2g32 s{seed}: \d+\.\d\d %, \d+\.\d s{left[seed]}", about[-1]
        ), done.stderr
    assert all(line.isprintable() for line in lines), done.stderr
