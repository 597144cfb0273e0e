"""Networks and finished runs for the tests of exported files."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config import compose
from qbench.deploy.about import About
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run as train_run
from qbench.experiment.setup import assemble
from qbench.quant.probe import Probe

EPOCHS = 12


def about_digits(form: str) -> About:
    """Return a description of a network for digits."""
    return About(
        form=form, title="a test", identity="0", weights="last", dataset={"name": "digits"}, shape=(1, 8, 8),
        classes=10, mean=(0.5,), std=(0.5,), threads=1,
    )  # fmt: skip


def quantized(configure: Configure, *words: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a network with a method's quantizers in their final state, and two batches of test images."""
    parts = assemble(configure("experiment=smoke", "init=scratch", *words))
    model = parts.install(parts.float_model())
    probe = Probe(list(parts.loader().unaugmented("train", 64)), F.cross_entropy)
    if parts.method.prepare:
        parts.method.prepare(model, probe)
    for epoch in range(EPOCHS if parts.method.on_epoch else 0):
        parts.method.on_epoch(model, epoch, EPOCHS, probe)  # type: ignore[misc]
    for images, _ in probe.batches:  # statistics of batch normalization, ranges of activations
        model(images)
    return model.eval(), [images for images, _ in parts.loader().unaugmented("test", 100)]


@functools.cache
def _finished_run(out: Path) -> Path:
    """Return the directory below `out` of a finished run on digits, which is trained at the first call."""
    torch.set_num_threads(1)
    (config,) = compose.configurations(
        [f"out={out}", "experiment=smoke", "runtime.tensorboard=false", "runtime.threads=1", "method=lsq", "bits=w2a2"]
    )
    planned = planned_run(config)
    train_run(planned, RunContext())
    return planned.directory.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the directory of a finished run on digits, with its float baseline beside it."""
    whole = tmp_path_factory.getbasetemp() / "exported"
    path = _finished_run(whole).relative_to(whole)
    return shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "o") / path


def header_change(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets one value in a file's header; `*` stands for the first key.

    Args:
        path: keys, and then the value.
    """
    *keys, last, value = path

    def change(header: dict[str, Any]) -> None:
        node: Any = header
        for key in keys:
            node = next(iter(node.values())) if key == "*" else node[key]
        node[last] = value

    return change
