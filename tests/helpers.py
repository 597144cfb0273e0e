"""Functions that test modules share. They run the command, and write runs with known results and folders of images."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import numpy as np
from conftest import ROOT
from PIL import Image

from qbench.bits import FLOAT
from qbench.config import registry
from qbench.config.schema import Config
from qbench.cost.network_cost import NetworkCost
from qbench.deploy.container import write_container
from qbench.experiment.planned_run import planned_run
from qbench.runs.directory import PACKED_FILE
from qbench.runs.result import Accuracy, BaselineResult, Evaluation, load_result


def qbench(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process without a terminal.

    The process is forked from a server that has imported torch, unless the command has an environment or starts
    further processes.
    """
    if not environment and not any("launcher" in word for word in words):
        with faults.server() as server:
            job = server.start(words, cwd=cwd)
            return subprocess.CompletedProcess(words, job.wait(), job.stdout(), job.stderr())
    return subprocess.run(
        [sys.executable, "-m", "qbench", *words],
        capture_output=True, text=True, cwd=cwd, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def processes_of(session: int) -> list[int]:
    """Return the ids of the processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if int(own) == session and state != "Z" else []
    return sorted(found)


def semaphores(pid: int) -> list[str]:
    """Return the names of joblib's semaphores that a main process made."""
    return sorted(path.name for path in Path("/dev/shm").glob(f"sem.*-{pid}-*"))


def results(out: Path) -> dict[str, dict[str, object]]:
    return {p.parent.name.rsplit("-", 1)[0]: json.loads(p.read_text()) for p in out.rglob("result.json")}


def evaluation(top1: float, val: float | None = None) -> Evaluation:
    """Return an evaluation after the first epoch with the given test top-1 and, if given, validation top-1."""
    validated = None if val is None else Accuracy(top1=val, top5=99.0, loss=0.1)
    return Evaluation(test=Accuracy(top1=top1, top5=99.0, loss=0.1), val=validated, epoch=0)


def plant(
    config: Config, top1: float, baseline: float | BaselineResult | None = None, status: str = "done", **values: Any
) -> Path:
    """Write a run with the given top-1 and, if given, the top-1 of its float baseline. Return the run's directory."""
    directory = planned_run(config).directory
    with directory.lock():
        directory.write_config()
        if isinstance(baseline, int | float):
            place = directory.path.parent / f"float-w32a32g32-s{config.seed}-00000000"
            baseline = BaselineResult(run=str(place), final=evaluation(baseline))
        cost = NetworkCost(
            params=1, macs=1, bitops=16_842_752, bytes_float=1, bytes_ideal=7176, bytes_packed=7176, bits_per_weight=2.0
        )
        done = {"final": evaluation(top1), "baseline": baseline, "cost": cost, "levels": 4}
        filled = (done if status == "done" else {}) | values
        directory.finish(dataclasses.replace(directory.new_result(status), **filled))
    return directory.path


def write_packed(path: Path, size: int, identity: str, kind: str = "packed") -> None:
    """Write a packed file of a run with a size in bytes into a directory."""
    data, codes = b"", 0
    while len(data) != size:
        codes += size - len(data)
        parts = {"floats": np.zeros(0, np.float32), "codes": np.zeros(codes, np.uint8)}
        data = write_container(parts, {"about": {"identity": identity}}, kind)
    (path / PACKED_FILE).write_bytes(data)


def write_metrics(path: Path, lines: list[str]) -> None:
    (path / "metrics.jsonl").write_text("\n".join(lines))


def epoch_line(number: int, top1: float) -> str:
    return json.dumps({"kind": "epoch", "step": number, "epoch": number, "val_top1": top1})


def quantizing_bits(name: str) -> str:
    """Return widths at which a method quantizes everything that it can quantize, such as `w2a2g4`.

    Each width is 2 bits (gradients: 4 bits), or the smallest width that the method supports.
    """
    method = registry.create("method", {"name": name})
    supported = {key: [k for k in range(1, FLOAT) if k in method.supported_bits.get(key, ())] for key in "wag"}
    chosen = {key: (4 if key == "g" else 2) for key in "wag"}
    return "".join(f"{k}{chosen[k] if chosen[k] in supported[k] else (supported[k] or [FLOAT])[0]}" for k in "wag")


def finished_digests(out: Path) -> dict[str, str | None]:
    results = [(path.parent.name, load_result(path.parent)) for path in out.rglob("result.json")]
    return {name: result.state_sha256 for name, result in results if result and result.status == "done"}


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return a picture of large structures, which JPEG keeps well."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def write_images(
    root: Path, count: int = 6, suffix: str = "jpg", size: tuple[int, int] | None = None, tested: str = "val"
) -> Path:
    """Write images of three classes into the folders `train` and `tested`.

    `size` is the size of all images. If it is None, the images have different sizes.
    """
    for part, many in (("train", count), (tested, count // 2)):
        for c, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(many):
                seed = 1000 * (part == "train") + 100 * c + i
                picture(seed, *(size or (20 + 3 * i, 18 + 2 * c))).save(root / part / name / f"{i}.{suffix}")
    return root


CLASSES = ("ant", "bee", "cow")
