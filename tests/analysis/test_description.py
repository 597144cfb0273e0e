"""`qbench describe RUN`: the description of a run, from the files in its directory."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Configure
from helpers import epoch_line, evaluation, plant, write_metrics

import qbench
from qbench.analysis.description import description, recipe_text
from qbench.cli.main import main
from qbench.config.schema import Optim
from qbench.errors import ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run


def test_a_description_has_the_command_and_the_records(
    smoke: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = smoke("method=lsq", "bits=w2a2", "debug=true", "optim.batch_size=32")
    result = run(planned_run(config))
    assert result.final is not None
    lines = dict(line.split(maxsplit=1) for line in description(Path(result.run)).splitlines())
    assert lines["status"] == "done"
    assert f"test top-1 {result.final.test.top1:.2f} %" in lines["last"]
    assert lines["command"].startswith("qbench method=lsq bits=w2a2g32 ")
    assert "debug=true" in lines["command"]
    assert lines["method"].startswith("Learned step size quantization") or lines["method"].startswith("LSQ")
    assert lines["data"].startswith("digits 32 train, 64 val, 64 test images; sha256 ")
    assert lines["recipe"].startswith("1 epoch of adam, learning rate 0.01 to 0.0001 (exponential), batch size 32")
    assert "torch" in lines["versions"]
    assert main(["describe", result.run]) == 0
    shown = capsys.readouterr().out
    assert "debug=true: trained on 32 images in one step" in shown
    (Path(result.run) / "config.yaml").write_text("seed: 1\n")
    assert "config      " in description(Path(result.run)), "an edited configuration is not described"


def test_a_description_does_not_import_torch(smoke: Configure) -> None:
    result = run(planned_run(smoke("method=dorefa", "debug=true", "optim.batch_size=32")))
    code = "import sys; from qbench.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "describe", result.run], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((Path(result.run) / "manifest.json").read_text())
    assert manifest["versions"]["torch"] in done.stdout


def test_the_recipe_of_a_run_from_logs(configure: Configure) -> None:
    path = plant(configure("method=lsq", "epochs=2"), 97.0)
    (path / "result.json").unlink()
    final = {"kind": "final", "test_top1": 97.0, "test_top5": 99.0, "test_loss": 0.1}
    for trained, expected in ((2, "2 epochs of adam"), (0, "nothing was trained")):
        write_metrics(path, [*(epoch_line(epoch, 97.0) for epoch in range(trained)), json.dumps(final)])
        lines = dict(line.split(maxsplit=1) for line in description(path).splitlines())
        assert lines["recipe"].startswith(expected)
        assert "stopped" not in lines["recipe"]


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        description(tmp_path)


def test_recipes_in_words() -> None:
    optim = Optim(name="sgd", lr=0.1, schedule="step", milestones=[0.5], accumulate=4, ema=0.9, decay_until=0.5)
    assert recipe_text(optim, 3) == (
        "3 epochs of sgd, learning rate 0.1 (step: times 0.1 at 0.5 of the training), batch size 64 x 4, "
        "weight decay 0, ema 0.9, decay_until 0.5"
    )
    optim = Optim(name="sgd", lr=1, schedule="step", milestones=[0.25, 0.5], factors=[1, 0.5, 0.01], momentum=0.5)
    assert recipe_text(optim, 1) == (
        "1 epoch of sgd, learning rate 1 (step: factors 1 0.5 0.01, changing at 0.25 0.5 of the training), "
        "batch size 64, weight decay 0, momentum 0.5"
    )


def test_the_recipe_and_the_start_are_those_that_the_run_used(configure: Configure) -> None:
    def lines(*words: str, epoch: int | None) -> dict[str, str]:
        path = plant(configure(*words), 90.0, final=replace(evaluation(90.0), epoch=epoch))
        return {line[:12].strip(): line[12:] for line in description(path).splitlines()}

    assert lines("method=ptq", "bits=w4a4", epoch=None)["recipe"] == "nothing was trained"
    words = ["pretrain.epochs=7", "pretrain.optim.lr=0.5", "epochs=3", "optim.lr=0.25"]
    baseline = lines("method=float", "init=scratch", *words, epoch=6)
    assert baseline["recipe"].startswith("7 epochs of ")
    assert "learning rate 0.5 " in baseline["recipe"]
    run = lines("method=dorefa", *words, epoch=2)
    assert run["recipe"].startswith("3 epochs of ")
    assert "learning rate 0.25 " in run["recipe"]
    assert run["start"] == "the float baseline"
    assert lines("method=dorefa", "debug=true", epoch=0)["start"] == "random weights"


def test_a_run_from_python_records_its_own_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--mine"])
    words = ["experiment=smoke", "method=float", "init=scratch", "debug=true", "optim.batch_size=32"]
    result = qbench.run(*words, seed=1, out=tmp_path)
    command = json.loads((Path(result.run) / "manifest.json").read_text())["command"]
    assert command[: len(words)] == words
    assert "seed=1" in command
    assert not {"--mine", "train.py"} & {*command}
    assert sys.argv == ["train.py", "--mine"]


def test_the_command_of_a_run_with_own_code_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "described_network.py").write_text(
        "from torch import nn\n\ndef build(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["experiment=smoke", "method=dorefa", "bits=w2a2", "model=described_network:build", "debug=true"]
    result = qbench.run(*words, "layers.rules={1: w4, 3: w3}", out=tmp_path)
    (command,) = [line for line in description(Path(result.run)).splitlines() if line.startswith("command")]
    typed = command.partition("started with: qbench ")[2]
    assert shlex.split(typed) == json.loads((Path(result.run) / "manifest.json").read_text())["command"]
    (Path(result.run) / "manifest.json").unlink()
    (command,) = [line for line in description(Path(result.run)).splitlines() if line.startswith("command")]
    assert command.endswith("the run uses code of your own")
