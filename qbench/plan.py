"""What a command line would run, and about how long it would take, before anything is trained."""

import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from qbench.assembly import Parts, assemble
from qbench.config import Config
from qbench.data.dataset import Loader
from qbench.quant.method import Unsupported
from qbench.record.run import RunDirectory
from qbench.report.table import Table
from qbench.train import optim

STEPS = 3
"""Training steps that are timed, after one that is not."""


def plan(configs: Sequence[Config]) -> Table:
    """Return a row for every run that a command line asks for, float parents included, and the time it would take.

    The estimate times a few steps of each kind of network on the run's own data, in memory; nothing is written.
    """
    table = Table(("run", "state", "epochs", "steps", "estimate"), title=f"{len(configs)} runs")
    speeds: dict[str, float] = {}
    listed: set[str] = set()
    total = 0.0
    for config in configs:
        for one in _with_parent(config):
            path = RunDirectory(one).path
            if str(path) in listed:
                continue
            listed.add(str(path))
            state, steps, seconds = _state(one, speeds)
            total += seconds
            shown = f"{seconds:.0f} s" if seconds else "-"
            table.rows.append((str(path), state, str(one.epochs), str(steps or "-"), shown))
            table.values.append({"run": str(path), "state": state, "epochs": one.epochs, "seconds": seconds})
    table.notes.append(f"about {_duration(total)} one after the other, from {STEPS} steps of each kind of network")
    return table


def _with_parent(config: Config) -> list[Config]:
    """Return the float parent, where the run starts from one, and the run."""
    taught = config.distill.on and config.distill.teacher == "parent"
    if config.init not in ("float", "method") and not taught:
        return [config]
    try:
        return [assemble(config).parent, config]
    except Unsupported:
        return [config]


def _state(config: Config, speeds: dict[str, float]) -> tuple[str, int, float]:
    """Return what stands in the run's directory, the steps it takes and the seconds they would take."""
    directory = RunDirectory(config)
    if stored := directory.stored():
        return ("stored" if stored.status == "done" else stored.status), 0, 0.0
    try:
        parts = assemble(config)
    except Unsupported as reason:
        return f"unsupported: {reason}", 0, 0.0
    loader = Loader(parts.data, config.optim.batch_size, config.seed, parts.device, config.runtime.workers)
    steps = parts.epochs * loader.steps
    parts_of_speed = (config.method, config.activation, config.bits, config.optim.batch_size, config.model)
    kind = " ".join(map(str, (directory.path.parent.name, *parts_of_speed)))
    if kind not in speeds:
        speeds[kind] = _seconds_per_step(parts, loader)
    return ("unfinished" if directory.states() else "new"), steps, steps * speeds[kind]


def _seconds_per_step(parts: Parts, loader: Loader) -> float:
    """Return the time of one training step, forward, backward and optimizer."""
    model = parts.install(parts.float_model()).to(parts.device).train()
    optimizer = optim.build(model, parts.config.optim)
    images, labels = next(iter(loader.train(0)))
    began = 0.0
    for step in range(STEPS + 1):
        if step == 1:
            began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        if parts.method.step is None:
            optimizer.step()
        else:
            parts.method.step(model, optimizer)
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
