"""The command line end to end on the real digits: output, files, exit statuses, resuming.

A test starts a process where it is about one: what is imported, how it exits, which signals it handles.
"""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT
from helpers import qbench, results

from qbench.cli.main import main
from qbench.training.digests import weights_sha256

SMOKE = ["experiment=smoke", "method=dorefa"]
REPEATED = [*SMOKE, "epochs=2", "bits=w2a2g6"]
FEW_STEPS = ["runtime.tensorboard=false", "optim.batch_size=256", "pretrain.optim.batch_size=256"]


class Output(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Return a function that runs a command line in this process."""

    def run_main(*words: str) -> Output:
        capsys.readouterr()
        status = main(list(words))
        return Output(status, *capsys.readouterr())

    return run_main


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("out")
    done = qbench(*REPEATED, f"out={out}", XDG_CACHE_HOME=f"{out}-cache")  # another clone can use the user's own cache
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_row_and_the_progress(run_once: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = run_once
    head, row, *rest = done.stdout.splitlines()
    assert head.split() == [
        "method",
        "W",
        "A",
        "G",
        "levels",
        "bits/weight",
        "float",
        "quantized",
        "diff",
        "size",
        "BitOps",
        "time",
    ]
    assert re.match(r"dorefa +2 +2 +6 +4 +2\.00 +[\d.]+ % +[\d.]+ % +[+-][\d.]+ ", row)
    assert rest[0].startswith("run   ")
    assert "test top-1 after the last epoch" in rest[1]
    assert "float  resnet8 on digits, seed 0: epoch 1" in done.stderr
    assert "dorefa w2a2g6  resnet8 on digits, seed 0: epoch 2" in done.stderr


def test_the_directory(run_once: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = run_once
    (run,) = (out / "digits-resnet8").glob("dorefa-w2a2g6-s0-*")
    names = {re.sub(r"events.out.tfevents.*", "events", p.name) for p in run.iterdir()}
    assert names - {".lock"} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "events",
        "result.json",
        "last.pt",
        "best.pt",
        "predictions.npy",
        "log.txt",
    }
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "done"
    assert set(result["final"]["test"]) == {"top1", "top5", "loss"}
    assert result["bits"] == {"w": 2, "a": 2, "g": 6}
    counts = result["verified"]["layer1.0.conv1"]
    assert counts["w"] == counts["a"] == {"found": 4, "allowed": 4}
    assert counts["g"]["allowed"] == 64
    assert {"params", "macs", "bitops", "bytes_ideal", "bytes_packed"} <= set(result["cost"])
    assert {"images_per_second", "seconds_per_epoch", "peak_bytes"} == set(result["speed"])
    last = torch.load(run / "last.pt", weights_only=True)["model"]
    assert weights_sha256(last) == result["weights_sha256"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
    assert manifest["data"]["test_images"] == 450
    assert yaml.safe_load((run / "config.yaml").read_text())["bits"] == {"w": 2, "a": 2, "g": 6}
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("epoch") == 2
    assert kinds[-1] == "final"
    assert "epoch 2" in (run / "log.txt").read_text()


def test_tensorboard_reads_scalars_histograms_figure_and_hparams_as_one_run(
    run_once: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    out, _ = run_once
    reader = EventMultiplexer().AddRunsFromDirectory(str(out))
    reader.Reload()
    runs = reader.Runs()
    assert len(runs) == 2, sorted(runs)
    (name,) = (n for n in runs if "dorefa" in n)
    tags = runs[name]
    outside = [tag for tag in tags["scalars"] if not tag.startswith("quant/")]
    assert sorted(outside) == [
        "accuracy/train", "accuracy/val", "accuracy/val_top5", "loss/step", "loss/train", "loss/val", "optim/lr",
        "speed/images_per_second", "test/loss", "test/top1", "test/top5",
    ]  # fmt: skip
    shown = {tag.partition("/")[0] for kind in ("scalars", "histograms", "images") for tag in tags[kind]}
    assert sorted(shown)[:2] == ["accuracy", "loss"], "TensorBoard opens the first two groups"
    assert {"quant/latent/layer1.0.conv1", "quant/quantized/layer1.0.conv1"} <= set(tags["histograms"])
    assert tags["images"] == ["quant/levels"]
    texts = {
        tag: reader.GetAccumulator(name).Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag, metadata in reader.GetAccumulator(name).summary_metadata.items()
        if metadata.plugin_data.plugin_name == "text"
    }
    assert set(texts) == {"command/text_summary", "method card/dorefa/text_summary"}
    assert texts["command/text_summary"].startswith("    qbench ")
    assert "DoReFa" in texts["method card/dorefa/text_summary"]
    plugin = reader.GetAccumulator(name).summary_metadata
    assert any(m.plugin_data.plugin_name == "hparams" for m in plugin.values())


def test_a_repeat_prints_the_stored_row_without_torch(
    run_once: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, first = run_once
    (tmp_path / "torch.py").write_text("raise AssertionError('a repeat imported torch')")
    python_path = f"{tmp_path}{os.pathsep}{ROOT}"
    again = qbench(*REPEATED, f"out={out}", PYTHONPATH=python_path, XDG_CACHE_HOME=f"{out}-cache", QBENCH_TRACEBACK="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout


def test_a_stored_row_does_not_stand_for_another_device(
    run_once: tuple[Path, subprocess.CompletedProcess[str]], run: Callable[..., Output]
) -> None:
    out, first = run_once
    words = [*REPEATED, f"out={out}"]
    for name in ("cuda:99", "nope", "meta"):
        for command in (words, ["-m", *words, "seed=0"]):
            refused = run(*command, f"runtime.device={name}")
            assert (refused.status, refused.stdout) == (2, ""), name
            assert refused.stderr.startswith(f"qbench: runtime.device={name}: "), refused.stderr
    assert run("settle", shlex.join(words), shlex.join([*words, "bits.w=3", "runtime.device=cuda:99"])).status == 2
    assert run(*words, "runtime.device=cpu") == (0, first.stdout, "")
    manifest = next(out.rglob("dorefa*")) / "manifest.json"
    stored = manifest.read_text()
    manifest.write_text(stored.replace('"device": "cpu"', '"device": "cuda"'))
    warned = run(*words, "runtime.device=cpu")
    sweep = run("-m", *words, "seed=0", "runtime.device=cpu")
    manifest.write_text(stored)
    assert sweep.stderr == (
        "warning: of 1 stored results, some were computed differently: 1 on cuda; to train these runs again, add "
        "rerun=true\n"
    )
    assert warned == (0, first.stdout, "warning: this result was computed on cuda; to train again, add rerun=true\n")


def test_rerun_trains_a_stored_run_again(
    run_once: tuple[Path, subprocess.CompletedProcess[str]], run: Callable[..., Output]
) -> None:
    out, _ = run_once
    before = (next(out.rglob("dorefa*")) / "result.json").stat().st_mtime_ns
    assert run(*REPEATED, f"out={out}", "rerun=true").status == 0
    assert (next(out.rglob("dorefa*")) / "result.json").stat().st_mtime_ns > before


def test_unsupported_is_recorded_with_its_reason(tmp_path: Path, run: Callable[..., Output]) -> None:
    for done in (run("method=float", "bits.w=2", f"out={tmp_path}") for _ in range(2)):
        assert done.status == 2
        assert "weights are not quantized" in done.stdout
    (result,) = results(tmp_path).values()
    assert result["status"] == "unsupported"


def test_a_sweep_runs_all_lists_the_unsupported_and_repeats_at_once(tmp_path: Path, run: Callable[..., Output]) -> None:
    words = ["-m", *SMOKE, *FEW_STEPS, "bits.w=2,17", "seed=0,1", f"out={tmp_path}"]
    done = qbench(*words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^unsupported ", done.stdout, re.MULTILINE)) == 1
    assert "dorefa w17a32g32, 2 runs" in done.stdout
    assert len(results(tmp_path)) == 6
    assert run(*words)[:2] == (0, done.stdout)
    assert {p.name for p in tmp_path.iterdir()} == {"digits-resnet8"}


def test_a_network_and_a_data_set_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from qbench.data import digits\n"
        "def net(shape, classes, *, width: int = 4):\n"
        "    return nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "        nn.Flatten(), nn.Linear(16 * width, classes))\n"
        "def data(*, val: float = 0.2):\n"
        "    return digits.build(val=val)\n"
    )
    words = [
        "method=dorefa",
        "bits=w2a2",
        "model=mine:net",
        "dataset=mine:data",
        "epochs=1",
        "pretrain.epochs=1",
    ]
    done = qbench(*words, "model.width=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mine.data-mine.net").is_dir()
    wrong = qbench(*words, "model.widht=5", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean model.width?" in wrong.stderr


def test_start_from_a_checkpoint_but_not_from_one_of_another_network(
    run_once: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, run: Callable[..., Output]
) -> None:
    out, _ = run_once
    (baseline,) = (out / "digits-resnet8").glob("float-*")
    done = run(*SMOKE, *FEW_STEPS, f"out={tmp_path}", f"init={baseline}")
    assert done.status == 0, done.stderr
    assert "tensors loaded" in done.stderr
    from_file = run(*SMOKE, *FEW_STEPS, f"out={tmp_path}", f"init={baseline / 'best.pt'}")
    assert from_file.stdout == done.stdout
    wrong = run(*SMOKE, f"out={tmp_path}", f"init={baseline}", "model.width=5")
    assert wrong.status == 4
    assert "conv1.weight (4, 1, 3, 3) for (5, 1, 3, 3)" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) <= 3


@pytest.mark.full
def test_a_damaged_baseline_is_trained_again(tmp_path: Path, run: Callable[..., Output]) -> None:
    words = [*SMOKE, *FEW_STEPS, f"out={tmp_path}"]
    assert run(*words).status == 0
    before = results(tmp_path)
    (weights,) = tmp_path.rglob("float-*/best.pt")
    damaged = bytearray(weights.read_bytes())
    damaged[1000] ^= 1
    weights.write_bytes(damaged)
    assert qbench(*words, f"init={weights}", "bits.w=3").returncode == 4, "a damaged file that is named is an error"
    done = run(*words, "bits.w=3")
    assert done.status == 0, done.stderr
    assert "float  resnet8" in done.stderr
    after = results(tmp_path)
    assert after["float-w32a32g32-s0"]["weights_sha256"] == before["float-w32a32g32-s0"]["weights_sha256"]


@pytest.mark.full
def test_an_interrupted_rerun_resumes(tmp_path: Path, run: Callable[..., Output]) -> None:
    words = [*KILLED, f"out={tmp_path}"]
    assert run(*words).status == 0
    before = results(tmp_path)
    assert _killed(tmp_path, 0.2, signal.SIGTERM, "rerun=true") == 75
    again = run(*words, "rerun=true")
    assert again.status == 0
    assert "continuing from state-" in again.stderr
    assert {n: r["weights_sha256"] for n, r in results(tmp_path).items()} == {
        n: r["weights_sha256"] for n, r in before.items()
    }


def test_a_users_file_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    source = "from qbench.models import mlp\ndef net(shape, classes): return mlp.build(shape, classes, width=%d)\n"
    words = ["method=dorefa", "model=mine:net", "epochs=1", "pretrain.epochs=1", "runtime.tensorboard=false", "out=o"]
    for width in (8, 9):
        (tmp_path / "mine.py").write_text(source % width)
        assert qbench(*words, cwd=tmp_path).returncode == 0
    assert len(results(tmp_path / "o")) == 2
    assert len(list((tmp_path / "o").rglob("result.json"))) == 4, "another network has another baseline"


def test_a_failed_run_leaves_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from qbench.methods import dorefa\n"
        "def broken(*, w: int = 2, a: int = 32, g: int = 32):\n"
        "    def step(model, optimizer): raise ZeroDivisionError('planted')\n"
        "    return dataclasses.replace(dorefa.build(w=w, a=a, g=g), name='broken', step=step)\n"
        "def unquantized(*, w: int = 2, a: int = 32, g: int = 32):\n"
        "    import torch\n"
        "    class Lazy(dorefa.DoReFaWeight):\n"
        "        def forward(self, w): return torch.tanh(w)\n"
        "    return dataclasses.replace(dorefa.build(w=w, a=a, g=g), name='lazy', weight=lambda n, l, b: Lazy(b))\n"
    )
    done = qbench("experiment=smoke", "method=mine:broken", "out=o", cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError: planted" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5, "two lines of progress, two of the error"
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "o" / "digits-resnet8").glob("mine.broken-*")
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    assert "in step" in (run / "log.txt").read_text()
    lazy = qbench("experiment=smoke", "method=mine:unquantized", "out=o", cwd=tmp_path)
    assert lazy.returncode == 1
    assert "layer1.0.conv1: weights" in lazy.stderr
    assert "are not on the 4 levels" in lazy.stderr


def test_a_diverging_run_exits_with_status_6(tmp_path: Path) -> None:
    done = qbench(*SMOKE, f"out={tmp_path}", "optim=sgd", "optim.lr=1e30", "epochs=3")
    assert done.returncode == 6, done.stderr
    (result,) = (r for r in results(tmp_path).values() if r["method"] == "dorefa")
    assert result["status"] == "diverged"


KILLED = [*SMOKE, "bits=w2a2g4", "epochs=6", "pretrain.epochs=4", "runtime.checkpoint_seconds=0"]


def _killed(out: Path, after: float, kind: signal.Signals, *more: str) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "qbench", *KILLED, f"out={out}", *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while not list(out.rglob("state-*.pt")) and process.poll() is None and time.monotonic() - began < 60:
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(kind)
    return process.wait(timeout=60)


@pytest.mark.full
def test_a_signal_stops_with_status_75_and_the_same_line_resumes(tmp_path: Path, run: Callable[..., Output]) -> None:
    status = _killed(tmp_path, 0.2, signal.SIGTERM)
    assert status == 75
    again = run(*KILLED, f"out={tmp_path}")
    assert again.status == 0
    assert "continuing from state-" in again.stderr
    for log in tmp_path.rglob("metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in log.read_text().splitlines() if '"kind": "epoch"' in line]
        assert epochs == list(range(len(epochs)))


def test_missing_data_exits_with_status_3(tmp_path: Path) -> None:
    done = qbench("dataset=mnist", f"dataset.root={tmp_path}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("qbench: ")
    assert len(done.stderr.splitlines()) <= 3
