"""Measures or estimates the time and the memory of a training step.

Measurements are made on the run's device. Estimates are computed from MACs and tensor shapes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Timer
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from qbench.config.identity import digest
from qbench.cost.count import count_cost
from qbench.cost.network_cost import NetworkCost
from qbench.data.loader import batch_size_and_steps
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.models.normalization import batch_norms
from qbench.quant.method import Unsupported
from qbench.training import optimizer as optim
from qbench.training.task import compute_logits

PATIENCE_SECONDS = 2.0
"""Seconds after which a message says which network is measured."""
TIMED_MACS = 2e9
"""Approximate number of MACs in a timed forward pass.

A training step with this many MACs takes about 0.5 s on one core.
"""
TIMING_SECONDS = 2.5
"""Seconds after which no more networks are timed. The times of later networks are estimated from the timed ones."""
TIMED_STEPS = 3
"""Number of short training steps that are timed, after one untimed step."""


class StepCost(NamedTuple):
    """The cost of a training step.

    Args:
        seconds: time per image, in seconds.
        saved: bytes kept for the backward pass, per image.
        fixed: bytes kept for the backward pass, independent of the number of images.
    """

    seconds: float
    saved: float
    fixed: float


@dataclass(frozen=True)
class RunCost:
    """The setup, the network and the costs of a run. Runs that differ only in the seed share these values."""

    setup: ExperimentSetup
    model: nn.Module
    cost: NetworkCost
    step: StepCost


@dataclass(frozen=True)
class UnsupportedRun:
    """The reason why a method does not support a run's configuration."""

    reason: str


class CostEstimator:
    """Estimates the costs of runs.

    Each network is built only once. After timing has taken `TIMING_SECONDS` in total, further networks are not timed,
    and their times are estimated. `estimated` counts all networks that were not timed.

    Args:
        networks: about how many networks there will be, for messages.
        say: prints a message if a network takes longer than `PATIENCE_SECONDS`.
    """

    def __init__(self, networks: int = 1, say: Callable[[str], object] = lambda text: None) -> None:
        self.networks, self.say = networks, say
        self.known: dict[str, RunCost | UnsupportedRun] = {}
        self.timed: list[tuple[int, StepCost]] = []
        self.spent, self.estimated = 0.0, 0

    def run_cost(self, planned: PlannedRun) -> RunCost | UnsupportedRun:
        """Return the cost of a run, or the reason why its method does not support its configuration."""
        key = network_key(planned)
        if key not in self.known:
            number = len(self.known) + 1
            message = f"measuring network {number} of {max(number, self.networks)}: {planned.path.name} ..."
            timer = Timer(PATIENCE_SECONDS, self.say, (message,))
            timer.daemon = True
            timer.start()
            try:
                setup = assemble(planned.config, planned=True)
                model, cost = quantized_network(setup)
                self.known[key] = RunCost(setup, model, cost, self._step_cost(setup, model))
            except Unsupported as reason:
                self.known[key] = UnsupportedRun(str(reason))
            finally:
                timer.cancel()
        return self.known[key]

    def _step_cost(self, setup: ExperimentSetup, model: nn.Module) -> StepCost:
        """Return the step cost of a network.

        A small network is timed if `TIMING_SECONDS` are not used up. For a network that is too large to be timed on a
        CPU, `estimate_step` estimates the cost. Otherwise, the cost is computed from the timed network with the closest
        number of MACs: the cost of this network is multiplied by the ratio of the two numbers of MACs.
        """
        macs = max(1, sum(setup.macs.values()))
        if _smallest_batch(setup, model) * macs > 2 * TIMED_MACS and setup.device.type == "cpu":
            self.estimated += 1
            return estimate_step(setup, model, macs)
        if self.spent > TIMING_SECONDS:
            self.estimated += 1
            timed_macs, step = min(self.timed, key=lambda timed: abs(math.log(timed[0] / macs)))
            return StepCost(*(value * macs / timed_macs for value in step))
        start = time.perf_counter()
        step = time_step(setup, macs, _smallest_batch(setup, model))
        self.timed.append((macs, step))
        self.spent += time.perf_counter() - start
        return step


def network_key(planned: PlannedRun) -> str:
    """Return a digest that is the same for runs that differ only in their seed, and therefore have the same costs."""
    return digest(planned.identity.keys | {"seed": 0})


def quantized_network(setup: ExperimentSetup) -> tuple[nn.Module, NetworkCost]:
    """Return the quantized network and its cost.

    The network is on the meta device, where it uses no memory, unless its quantizers need the values of the weights.
    """
    try:
        model = setup.install(setup.float_model("meta"))
        return model, count_cost(model, setup.macs)
    except (NotImplementedError, RuntimeError):  # a quantizer needs values
        model = setup.install(setup.float_model())
        return model, count_cost(model, setup.macs)


def _smallest_batch(setup: ExperimentSetup, model: nn.Module) -> int:
    """Return the smallest batch size with which the network can be trained.

    The size is 2 if the network has batch normalization, which needs two values per channel. Otherwise the size is 1.
    """
    norms = bool(batch_norms(model))
    return min(batch_size_and_steps(setup.data, setup.optim.batch_size)[0], 2 if norms else 1)


def time_step(setup: ExperimentSetup, macs: int, smallest: int) -> StepCost:
    """Return the step cost of a network, measured with random images on the run's device.

    On a CPU, the timed batches may be smaller than the run's batches.

    Args:
        setup: the setup of the run.
        macs: MACs of the network for one image.
        smallest: the smallest batch size at which the network can be trained.
    """
    model = setup.install(setup.float_model()).to(setup.device).train()
    optimizer = optim.build_optimizer(model, setup.optim)
    batch_size = batch_size_and_steps(setup.data, setup.optim.batch_size)[0]
    size = batch_size if setup.device.type == "cuda" else min(batch_size, max(smallest, int(TIMED_MACS / macs)))
    images = torch.randn(size, *setup.data.shape, device=setup.device).to(memory_format=torch.channels_last)
    labels = torch.randint(setup.data.classes, (size,), device=setup.device)
    saved, fixed = saved_bytes(model, images)
    steps = 1 if size * macs > TIMED_MACS / 2 else TIMED_STEPS
    return StepCost(_step_seconds(setup, model, optimizer, (images, labels), steps) / size, saved / size, fixed)


def estimate_step(setup: ExperimentSetup, model: nn.Module, macs: int) -> StepCost:
    """Return an estimate of the step cost, for a network that is too large to be timed.

    The time is the network's MACs divided by the measured speed of one convolution. The memory is computed from tensor
    shapes.
    """
    size = _smallest_batch(setup, model)
    images = torch.empty(size, *setup.data.shape, device=next(model.parameters()).device)
    try:
        saved, fixed = saved_bytes(model.train(), images)
    except (NotImplementedError, RuntimeError):  # a quantizer needs values, so use the float network
        saved, fixed = saved_bytes(setup.float_model("meta").train(), images.to("meta"))
    conv = nn.Conv2d(128, 128, 3, padding=1)
    batch = torch.randn(4, 128, 28, 28, requires_grad=True)
    conv_macs = 4 * 28 * 28 * conv.weight.numel()
    torch.autograd.backward(conv(batch).sum())  # warm up
    start = time.perf_counter()
    torch.autograd.backward(conv(batch).sum())
    return StepCost((time.perf_counter() - start) / conv_macs * macs, saved / size, fixed)


def saved_bytes(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return how many bytes a forward pass keeps for the backward pass, as two numbers.

    The first number counts tensors whose first dimension is the number of images. The second number counts all other
    tensors except parameters.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, tuple[bool, int]] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage._cdata] = (x.dim() > 0 and len(x) == len(images), storage.nbytes())
        return x

    with saved_tensors_hooks(record, lambda x: x):
        logits = compute_logits(model, images)
    del logits
    per_image, fixed = (
        sum(size for key, (by_image, size) in saved.items() if by_image == wanted and key not in parameters)
        for wanted in (True, False)
    )
    return per_image, fixed


def _step_seconds(
    setup: ExperimentSetup, model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], steps: int
) -> float:
    """Return the time in seconds of one training step, which is a forward pass, a backward pass and an update."""
    method_step, classes = setup.method.step, setup.data.classes
    step: Callable[[], object] = optimizer.step if method_step is None else lambda: method_step(model, optimizer)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(compute_logits(model, batch[0], classes), batch[1]))
        step()
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps
