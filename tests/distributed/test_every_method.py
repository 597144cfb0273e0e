"""Every method on 1, 2 and 4 processes, and processes that are killed and replaced by another number of them."""

import random
import time
from pathlib import Path

import pytest
from conftest import counted
from helpers import finished_digests
from processes import WORDS, kill_some, run, start

from qbench.config import groups

METHODS = groups.option_names("method")
OPTIONS = {
    "dorefa g6": ["method=dorefa", "bits=w1a2g6"],
    "dorefa abs": ["method=dorefa", "bits=w2a2", "method.activation=abs"],
    "qd stochastic": ["method=qd", "method.stochastic=true"],
    "inq random": ["method=inq", "method.partition=random"],
    "slq random": ["method=slq", "method.partition=random"],
    "gupta nearest": ["method=gupta", "method.rounding=nearest"],
    "gupta fixed": ["method=gupta", "method.momentum=fixed", "optim=sgd"],
    "lsq channel": ["method=lsq", "method.channel=true"],
    "ttq+hwgq": ["method=ttq", "activation=hwgq", "bits.a=2"],
    "distilled": ["method=lsq", "distill=kd"],
    "ema": ["method=dorefa", "optim.ema=0.9"],
    "dropout": ["method=float", "init=scratch", "model=wrn_10_4", "model.widen=1", "pretrain.epochs=1"],
    "accumulated": ["method=dorefa", "optim.accumulate=4"],
    "clipped": ["method=dorefa", "optim.clip_norm=0.5"],
    "fp16": ["method=dorefa", "runtime.precision=fp16", "optim.accumulate=2"],
}
"""Options with random draws, other optimizers, or other losses."""
CASES = {name: [f"method={name}"] for name in METHODS} | OPTIONS


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_processes_changes_no_bit(tmp_path: Path, name: str) -> None:
    words = {word.partition("=")[0]: word for word in [*WORDS, "epochs=4", *CASES[name]]}
    if name == "dropout":
        del words["experiment"]
    found = []
    for size in (1, 2, 4):
        statuses, log = run(list(words.values()), size, tmp_path / str(size))
        assert statuses == [0] * size, (size, log)
        found.append(finished_digests(tmp_path / str(size)))
    assert found[0] == found[1] == found[2]
    assert found[0]
    counted(f"R17: {name}: equal on 1, 2 and 4 processes")


@pytest.mark.full
@pytest.mark.parametrize("count", [40])
def test_killed_processes_are_replaced_by_another_number(tmp_path: Path, count: int) -> None:
    words = [word for word in WORDS if not word.startswith("epochs=")]
    words += ["method=dorefa", "bits=w2a2g6", "epochs=4", "runtime.checkpoint_seconds=0"]
    statuses, log = run(words, 1, tmp_path / "alone")
    assert statuses == [0], log
    expected = finished_digests(tmp_path / "alone")
    began = time.monotonic()
    statuses, log = run(words, 4, tmp_path / "whole")
    took, kills, attempt, draw = time.monotonic() - began, 0, 0, random.Random(count)
    while kills < count:
        out, done = tmp_path / f"run{attempt}", False
        while not done:
            size = draw.choice((1, 2, 4))
            jobs = start(words, size, out)
            if kills < count:
                kill_some(jobs, draw, took)
            statuses = [job.wait() for job in jobs]
            done = set(statuses) == {0}
            kills += -9 in statuses
            assert set(statuses) <= {0, 75, -9}, (statuses, [job.stderr() for job in jobs])
        assert finished_digests(out) == expected, attempt
        attempt += 1
    counted(f"R17: {kills} times one or all processes were killed, {attempt} runs ended equal")
