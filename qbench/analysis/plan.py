"""What a command line would run, what its network costs and runs on, and about how long it would take: nothing trains.

Published data sets need not be at hand. Networks are built without memory, but for a few steps on random images.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from qbench.bits import FLOAT
from qbench.config.identity import digest
from qbench.config.schema import Config, parent
from qbench.cost.count import count_cost
from qbench.cost.layers import LayerCost, Levels, layer_costs
from qbench.cost.network_cost import NetworkCost
from qbench.cost.runtimes import runs_on
from qbench.data.dataset import batches_of
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.papers.recipe_differences import recipe_differences
from qbench.quant.method import Unsupported
from qbench.report.tables.columns import si_format
from qbench.report.tables.table import Table
from qbench.runs.directory import RunDirectory
from qbench.training import optimizer as optim

HEAD = ("run", "state", "epochs", "steps", "params", "size", "BitOps", "memory", "time")
LAYERS = (
    "layer", "shape", "W", "A", "G", "levels", "scales", "levels a", "quantizers", "params", "MACs", "BitOps",
    "bytes", "packed",
)  # fmt: skip
TIMED_MACS = 2e9
"""Multiply-accumulates of a forward pass that is timed, about: half a second of training on a core."""
PATIENCE = 2.5
"""Seconds spent on timing; kinds of networks that come after are reckoned from those before."""
STEPS = 3
"""Training steps that are timed, after one that is not, where they are short."""


class StepCost(NamedTuple):
    """What training takes: seconds and bytes kept for the backward pass, of an image; bytes kept of the weights."""

    seconds: float
    saved: float
    fixed: float


class RunCost(NamedTuple):
    """What runs have in common that differ in their seed: parts, network, costs and pace; or why they cannot be."""

    parts: ExperimentSetup | None
    model: nn.Module | None
    cost: NetworkCost | None
    pace: StepCost
    unsupported: str = ""


class CostEstimator:
    """Looks at each kind of run once, and times it as long as there is patience for it."""

    def __init__(self) -> None:
        self.known: dict[str, RunCost] = {}
        self.timed: list[tuple[int, StepCost]] = []
        self.spent, self.reckoned = 0.0, 0

    def of(self, config: Config) -> RunCost:
        """Return what kind of run a configuration asks for."""
        key = digest(config.identity() | {"seed": 0})
        if key not in self.known:
            try:
                parts = assemble(config, planned=True)
                model, cost = installed(parts)
                self.known[key] = RunCost(parts, model, cost, self._pace(parts, model))
            except Unsupported as reason:
                self.known[key] = RunCost(None, None, None, StepCost(0, 0, 0), str(reason))
        return self.known[key]

    def _pace(self, parts: ExperimentSetup, model: nn.Module) -> StepCost:
        """Return a network's pace, timed, or reckoned from the one of nearest size by multiply-accumulates."""
        macs = max(1, sum(parts.macs.values()))
        if _least(parts, model) * macs > 2 * TIMED_MACS and parts.device.type == "cpu":
            self.reckoned += 1
            return _reckoned(parts, model, macs)
        if self.spent > PATIENCE:
            self.reckoned += 1
            count, pace = min(self.timed, key=lambda timed: abs(math.log(timed[0] / macs)))
            return StepCost(*(value * macs / count for value in pace))
        began = time.perf_counter()
        pace = _timed(parts, macs, _least(parts, model))
        self.timed.append((macs, pace))
        self.spent += time.perf_counter() - began
        return pace


def plan(configs: Sequence[Config]) -> list[Table]:
    """Return a table of every run that a command line asks for, float parents included, with its costs and time.

    Of a single run, a second table tells every layer, and below it what it runs on and how it departs from its paper.
    """
    table = Table(HEAD, title=f"{len(configs)} run{'s' if len(configs) > 1 else ''}")
    kinds = CostEstimator()
    runs = {RunDirectory(one).path: one for config in configs for one in _with_parent(config, kinds)}
    total = sum(_add(table, one, kinds.of(one)) for one in runs.values())
    last = kinds.of(configs[-1]) if configs else None
    device = last.parts.device.type if last and last.parts else "cpu"
    left_out = "evaluation, and what methods do once before they train, left out"
    table.notes.append(f"about {_duration(total)} one after the other on this machine's {device}; {left_out}")
    table.notes.append("memory: weights, gradients, optimizer and what is kept for the backward pass")
    if kinds.reckoned:
        table.notes.append(f"reckoned from multiply-accumulates, not timed: {kinds.reckoned} of these networks")
    if len(configs) > 1 or last is None or last.parts is None or last.model is None or last.cost is None:
        return [table]
    return [table, _layers(last.parts, last.model, last.cost)]


def _with_parent(config: Config, kinds: CostEstimator) -> list[Config]:
    """Return the float parent, where the run starts from one, and the run."""
    taught = config.distill.on and config.distill.teacher == "baseline"
    parts = kinds.of(config).parts
    if parts is None or (config.init not in ("float", "method") and not taught):
        return [config]
    return [parent(config, parts.method.requires.norm), config]


def _add(table: Table, config: Config, kind: RunCost) -> float:
    """Add a run's row; return the seconds that are left to train."""
    directory = RunDirectory(config)
    path, stored, parts = str(directory.path), directory.stored(), kind.parts
    state = stored.status if stored else "unfinished" if directory.checkpoints() else "new"
    if parts is None or kind.cost is None:
        table.rows.append((path, f"unsupported: {kind.unsupported}", *"-" * (len(HEAD) - 2)))
        table.values.append({"run": path, "state": "unsupported", "reason": kind.unsupported, "seconds": 0.0})
        return 0.0
    size, steps = batches_of(parts.data, config.optim.batch_size)
    steps *= parts.epochs
    seconds = 0.0 if stored else steps * size * kind.pace.seconds
    memory = _memory(parts, kind.cost.params) + kind.pace.fixed + size * kind.pace.saved
    figures = (
        si_format(kind.cost.params).rstrip(), bytes_of(kind.cost.bytes_ideal),
        si_format(kind.cost.bitops).rstrip(),
        bytes_of(memory), _duration(seconds) if seconds else "-",
    )  # fmt: skip
    table.rows.append((path, "stored" if state == "done" else state, str(parts.epochs), str(steps), *figures))
    values = {"run": path, "state": state, "epochs": parts.epochs, "steps": steps, "seconds": seconds, "memory": memory}
    table.values.append(values | asdict(kind.cost))
    return seconds


def installed(parts: ExperimentSetup) -> tuple[nn.Module, NetworkCost]:
    """Return the quantized network, without memory where its costs can be told so, and these costs."""
    try:
        model = parts.install(parts.float_model("meta"))
        return model, count_cost(model, parts.macs)
    except (NotImplementedError, RuntimeError):  # a quantizer looks at values
        model = parts.install(parts.float_model())
        return model, count_cost(model, parts.macs)


def _layers(parts: ExperimentSetup, model: nn.Module, whole: NetworkCost) -> Table:
    """Return the table of a run's layers, with their sum as `qbench compare` counts it."""
    config, costs = parts.config, layer_costs(model, parts.method, parts.macs)
    table = Table(
        LAYERS, title=f"{config.model['name']} on {config.dataset['name']}, {config.method_name} {config.bits}"
    )
    for layer in costs:
        table.rows.append(_row(layer))
        table.values.append(asdict(layer) | {"bits": layer.bits._asdict()})
    rest = whole.params - sum(layer.params for layer in costs)
    blank = ("",) * 7
    if rest:
        table.rows.append(("the rest", "", *blank, str(rest), "0", "0", str(4 * rest), str(4 * rest)))
    sums = (whole.params, whole.macs, whole.bitops, whole.bytes_ideal, whole.bytes_packed)
    table.rows.append(("all", "", *blank, *(si_format(value).rstrip() for value in sums)))
    table.values.append({"name": "all"} | asdict(whole))
    table.notes += [
        f"weights: {whole.bits_per_weight:.2f} bits each where quantized, scales and codebooks included; "
        f"float: {bytes_of(whole.bytes_float)}",
        *runs_on(costs), *recipe_differences(config), *parts.protocol_changes,
    ]  # fmt: skip
    return table


def _row(layer: LayerCost) -> tuple[str, ...]:
    widths = (str(width) if width < FLOAT else "float" for width in layer.bits)
    quantizers = " ".join(dict.fromkeys(layer.quantizers.values())) or "-"
    numbers = (layer.params, layer.macs, layer.bitops, layer.bytes_ideal, layer.bytes_packed)
    shape = "x".join(map(str, layer.shape))
    scales = layer.weights.per if layer.weights else "-"
    return (
        layer.name, shape, *widths, _count(layer.weights), scales, _count(layer.inputs), quantizers,
        *(f"{number:.0f}" if number < 1e4 else si_format(number).rstrip() for number in numbers),
    )  # fmt: skip


def _count(levels: Levels | None) -> str:
    if levels is None:
        return "-"
    return str(levels.number) if levels.dimension == 1 else f"{levels.number} of {levels.dimension}"


def _memory(parts: ExperimentSetup, params: int) -> float:
    """Return the bytes of weights, gradients, the optimizer's state and an average of the weights."""
    recipe = parts.config.optim
    state = 2 if recipe.name.startswith("adam") else 1 if recipe.momentum else 0
    return 4 * params * (2 + state + (recipe.ema is not None))


def _least(parts: ExperimentSetup, model: nn.Module) -> int:
    """Return the least images of a training batch: batch normalization wants two values of a channel."""
    norms = any("BatchNorm" in type(module).__name__ for module in model.modules())
    return min(batches_of(parts.data, parts.config.optim.batch_size)[0], 2 if norms else 1)


def _timed(parts: ExperimentSetup, macs: int, least: int) -> StepCost:
    """Run training steps on a few random images, on the run's device."""
    model = parts.install(parts.float_model()).to(parts.device).train()
    optimizer = optim.build(model, parts.config.optim)
    whole = batches_of(parts.data, parts.config.optim.batch_size)[0]
    size = whole if parts.device.type == "cuda" else min(whole, max(least, int(TIMED_MACS / macs)))
    images = torch.randn(size, *parts.data.shape, device=parts.device).to(memory_format=torch.channels_last)
    labels = torch.randint(parts.data.classes, (size,), device=parts.device)
    saved, fixed = _saved(model, images)
    steps = 1 if size * macs > TIMED_MACS / 2 else STEPS
    return StepCost(_seconds(parts, model, optimizer, (images, labels), steps) / size, saved / size, fixed)


def _reckoned(parts: ExperimentSetup, model: nn.Module, macs: int) -> StepCost:
    """Reckon the pace of a network too large to try: its operations at a convolution's speed, its memory by shapes."""
    size = _least(parts, model)
    images = torch.empty(size, *parts.data.shape, device=next(model.parameters()).device)
    try:
        saved, fixed = _saved(model.train(), images)
    except (NotImplementedError, RuntimeError):  # a quantizer looks at values: as its float network then
        saved, fixed = _saved(parts.float_model("meta").train(), images.to("meta"))
    conv = nn.Conv2d(128, 128, 3, padding=1)
    batch = torch.randn(4, 128, 28, 28, requires_grad=True)
    count = 4 * 28 * 28 * conv.weight.numel()
    conv(batch).sum().backward()
    began = time.perf_counter()
    conv(batch).sum().backward()
    return StepCost((time.perf_counter() - began) / count * macs, saved / size, fixed)


def _saved(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps for the backward pass: of the images, and of the weights."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[bool, int]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = (x.dim() > 0 and len(x) == len(images), storage.nbytes())
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        logits = model(images)
    del logits
    of_images, fixed = (
        sum(count for place, (by, count) in kept.items() if by == wanted and place not in own)
        for wanted in (True, False)
    )
    return of_images, fixed


def _seconds(
    parts: ExperimentSetup, model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], steps: int
) -> float:
    """Return the time of one training step, forward, backward and optimizer."""
    step: Callable[[], object] = optimizer.step
    if parts.method.step is not None:
        step = partial(parts.method.step, model, optimizer)
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch[0]), batch[1]))
        step()
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def bytes_of(count: float) -> str:
    """Write a number of bytes with three digits and a unit: 7.18 kB."""
    return f"{si_format(count)}B"


def _duration(seconds: float) -> str:
    """Write a time with its two largest units: 3 h 20 min."""
    rest = round(seconds)
    found: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if rest >= size or (unit == "s" and not found):
            found.append(f"{rest // size} {unit}")
            rest %= size
    return " ".join(found[:2])
