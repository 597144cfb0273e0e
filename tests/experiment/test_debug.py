"""debug=true: one step on a few images, in a folder of its own, and in no comparison."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Configure
from helpers import quantizing_bits
from torch import Tensor

from qbench.analysis.evaluate import evaluate
from qbench.analysis.export import evaluate_file, export
from qbench.cli.main import main
from qbench.config import compose, groups
from qbench.config.identity import run_identity
from qbench.errors import ConfigError, Diverged
from qbench.experiment import run as experiment
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.runs.reader import read, read_run
from qbench.training import loop

FAST = ("dorefa", "inq", "qd")
OTHERS = [name for name in groups.option_names("method") if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_every_method_takes_one_step_without_a_baseline(name: str, smoke: Configure, tmp_path: Path) -> None:
    config = smoke(f"method={name}", f"bits={quantizing_bits(name)}", "debug=true", "optim.batch_size=32")
    result = run(planned_run(config))
    assert result.status == "done"
    assert result.baseline is None
    what = "trained on " if result.final and result.final.epoch is not None else "nothing was trained; "
    assert result.warnings[0].startswith(f"debug=true: {what}")
    assert not [warning for warning in result.warnings if "pretrain.epochs" in warning], "not typed"
    folder = Path(result.run)
    assert folder.parent.parent == tmp_path / "debug"
    assert list(tmp_path.rglob("result.json")) == [folder / "result.json"], "no float baseline"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert len(epochs) <= 1
    images = config.pretrain.optim.batch_size if config.is_baseline else 32
    assert [(line["images"], line["step"]) for line in epochs] == [(images, 1)] * len(epochs)


def test_the_step_has_the_batches_of_one_update(smoke: Configure) -> None:
    config = smoke("method=lsq", "debug=true", "optim.batch_size=32", "optim.accumulate=3", "optim.warmup=0.5")
    setup = assemble(config)
    assert (len(setup.data.train), len(setup.data.val), len(setup.data.test)) == (96, 64, 64)
    assert setup.loader().steps == 3
    assert setup.data.train.labels.unique().numel() == 10
    assert config.optim.warmup == 0


def test_a_debug_run_is_another_run_and_runs_every_time(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["method=dorefa", "optim.batch_size=32"]
    plain, debug = smoke(*words), smoke(*words, "debug=true")
    assert "debug" not in run_identity(plain).keys
    assert run_identity(debug).protocol["debug"] is True
    results = [run(planned_run(debug)) for _ in range(2)]
    assert results[0].weights_sha256 == results[1].weights_sha256
    assert results[0].wall_seconds != results[1].wall_seconds, "the second one was not read from disk"


def test_no_comparison_has_debug_runs(smoke: Configure, tmp_path: Path) -> None:
    config = smoke("method=dorefa", "debug=true", "optim.batch_size=32")
    folder = Path(run(planned_run(config)).run)
    assert read_run(folder).status == "done"
    assert read([str(tmp_path)]) == []
    (folder / "result.json").unlink()
    assert read([str(folder)]) == [], "an unfinished one is left out too"
    assert main(["settle", str(folder), str(folder)]) == ConfigError.status


@pytest.mark.parametrize("words", ["-m seed=0,1", "-m", "lr_search=grid"])
def test_a_sweep_of_debug_runs_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="debug=true is for a single run"):
        compose.configurations(["method=dorefa", "debug=true", *words.split()])


@pytest.mark.filterwarnings("ignore:Error detected")
def test_nan_in_the_backward_pass_names_the_operation(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(task: object, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (logits.sum() * 0).abs().sqrt() + logits.square().mean()  # the root of 0 has no finite gradient

    monkeypatch.setattr(loop.Task, "loss", loss)
    with pytest.raises(Diverged, match="returned nan values"):
        run(planned_run(smoke("method=dorefa", "debug=true", "optim.batch_size=32")))
    assert not torch.is_anomaly_enabled(), "restored"
    assert experiment.Diverged is Diverged


def test_no_other_run_starts_from_a_debug_run_or_learns_from_it(smoke: Configure) -> None:
    words = ["method=dorefa", "optim.batch_size=32"]
    folder = run(planned_run(smoke(*words, "debug=true"))).run
    plain = run(planned_run(smoke("method=float", "init=scratch", "pretrain.epochs=1"))).run
    for start in ("init={}", "init={}/best.pt", "init={}/last.pt", "distill=kd distill.teacher={}"):
        typed = start.format(folder).split()
        with pytest.raises(ConfigError, match=f"{typed[-1]}: the weights of a run with debug=true mean nothing"):
            assemble(smoke(*words, *typed))
        assemble(smoke("method=float", "init=float", *start.format(plain).split()))
    assemble(smoke(*words, "debug=true", "distill=kd", f"distill.teacher={folder}"))


def test_the_accuracy_of_a_debug_run_and_of_its_export_has_a_warning(smoke: Configure) -> None:
    warning = "warning: with debug=true, training has only one step, so the accuracy means nothing"
    for words, notes in (["debug=true"], [warning]), ([], []):
        config = smoke("method=float", "init=scratch", "optim.batch_size=32", "pretrain.epochs=1", *words)
        folder = Path(run(planned_run(config)).run)
        tables = [evaluate(folder), evaluate(folder, ["dataset=digits"]), evaluate_file(export(folder).path)]
        assert [[note for note in table.notes if "debug" in note] for table in tables] == [notes] * 3
