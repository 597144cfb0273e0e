"""Files that decide what a finished run computes: an edit after the run is refused with status 4."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiered

from qbench.cli.main import main as cli
from qbench.errors import CheckpointError
from qbench.runs.reader import read_run
from qbench.system.caches import clear_caches
from qbench.training.checkpoint import pack, unpack

SMOKE = [
    "experiment=smoke", "runtime.tensorboard=false", "optim.batch_size=256", "pretrain.optim.batch_size=256",
]  # fmt: skip
WORDS = [*SMOKE, "method=dorefa", "bits=w2a2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert cli([*WORDS, f"out={out}"]) == 0
    (path,) = out.glob("*/dorefa-*")
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, with its float baseline beside it."""
    shutil.copytree(trained.parents[1], tmp_path / "o")
    return tmp_path / "o" / trained.parent.name / trained.name


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    change(values)
    (run / "config.yaml").write_text(yaml.safe_dump(values))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "width": lambda c: c["bits"].update(w=8),
    "policy": lambda c: c["layers"].update(first=8),
    "option": lambda c: c["method"].update(grad_noise=False),
    "network": lambda c: c["model"].update(act="keep"),
    "images": lambda c: c["dataset"].update(val=0.3),
    "seed": lambda c: c.update(seed=5),
    "init": lambda c: c.update(init="scratch"),
}


@pytest.mark.parametrize("edited", EDITS)
def test_an_edited_configuration_is_refused(
    run: Path, edited: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["evaluate", str(run)]) == 0
    before = (run / "config.yaml").read_text()
    edit(run, EDITS[edited])
    assert (run / "config.yaml").read_text() != before
    out = [f"out={tmp_path / 'other'}"]
    commands = {
        "width": (["evaluate", str(run)], ["inspect", str(run)], ["sensitivity", str(run), "--out", "b.yaml"],
                  [*WORDS, "distill=kd", f"distill.teacher={run}", *out],
                  ["settle", str(run), " ".join([*SMOKE, "method=dorefa", "bits=w3", *out])]),
    }  # fmt: skip
    for command in commands.get(edited, (["evaluate", str(run)],)):
        capsys.readouterr()
        assert cli(command) == CheckpointError.status, command
        error = capsys.readouterr().err
        assert f"{run / 'config.yaml'} was edited after the run" in error, command
        assert len(error.strip().splitlines()) <= 3


def test_keys_that_do_not_decide_the_result_may_be_edited(run: Path) -> None:
    edit(run, lambda c: c["runtime"].update(progress=False, num_workers=7))
    edit(run, lambda c: c.update(out="elsewhere"))
    assert cli(["evaluate", str(run)]) == 0


def test_logs_of_an_edited_configuration_give_no_row(run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.yaml", "metrics.jsonl"):
            path.unlink()
    assert read_run(run).status == "done"
    edit(run, lambda c: c["bits"].update(w=8))
    record = read_run(run)
    assert (record.status, record.result) == ("corrupt", None)
    assert "config.yaml was edited" in record.reason


@pytest.mark.full
def test_the_checkpoint_that_a_run_started_from_may_be_gone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (baseline,) = run.parent.glob("float-*")
    start, teacher = tmp_path / "start.pt", tmp_path / "teacher"
    shutil.copy(baseline / "best.pt", start)
    shutil.copytree(baseline, teacher)
    words = [*WORDS, f"init={start}", "distill=kd", f"distill.teacher={teacher}", f"out={tmp_path / 'p'}"]
    assert cli(words) == 0
    (child,) = (tmp_path / "p").glob("*/dorefa-*")
    assert cli(["sensitivity", str(child), "--out", str(tmp_path / "b.yaml"), "--images", "32"]) == 0
    other = unpack((run / "best.pt").read_bytes(), "other")
    start.write_bytes(pack({"model": other["model"]}))
    clear_caches()  # each command is usually a process of its own
    assert cli(["sensitivity", str(child), "--out", str(tmp_path / "b.yaml"), "--images", "32"]) == 4
    assert "was changed after the run" in capsys.readouterr().err
    start.unlink()
    shutil.rmtree(teacher)
    assert cli(["evaluate", str(child)]) == 0
    edit(child, lambda c: c["bits"].update(w=8))
    assert cli(["evaluate", str(child)]) == 4


def test_weights_of_another_epoch_in_place_of_the_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = unpack((run / "last.pt").read_bytes(), "last")
    first = next(name for name, tensor in state["model"].items() if tensor.is_floating_point())
    state["model"][first].mul_(1.01)
    (run / "last.pt").write_bytes(pack(state))
    assert cli(["evaluate", str(run)]) == CheckpointError.status
    assert "does not contain the weights that the result.json" in capsys.readouterr().err


@pytest.mark.parametrize("renamed", tiered(["the folder", "the baseline", "the run"], ["the folder"]))
def test_sensitivity_finds_the_baseline_of_renamed_directories(run: Path, tmp_path: Path, renamed: str) -> None:
    (baseline,) = run.parent.glob("float-*")
    if renamed == "the folder":
        run = run.parent.rename(run.parent.with_name("mine")) / run.name
    elif renamed == "the baseline":
        baseline.rename(baseline.with_name("baseline"))
    else:
        run = run.rename(run.with_name("best-so-far"))
    assert cli(["sensitivity", str(run), "--out", str(tmp_path / "b.yaml"), "--images", "32"]) == 0


def test_a_result_of_another_run_is_corrupt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It used to count as a second copy of the other run, so that one run of each setting was missing unnoticed."""
    (baseline,) = run.parent.glob("float-*")
    renamed = run.with_name("renamed")
    shutil.copytree(run, renamed)
    assert read_run(renamed).status == "done"
    shutil.copy(baseline / "result.json", run / "result.json")
    record = read_run(run)
    assert (record.status, record.reason) == (
        "corrupt", "result.json belongs to another run: float w32a32g32, seed 0"
    )  # fmt: skip
    assert cli(["compare", str(run.parents[1])]) == 0
    assert "result.json belongs to another run" in capsys.readouterr().out
