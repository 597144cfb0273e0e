"""What is kept an eye on while a run trains: its layers at the end of epochs, for warnings and for the logs."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import NotFinite
from qbench.runs.metrics_logger import MetricsLogger
from qbench.runs.progress import ProgressReporter
from qbench.training import health as sentinels
from qbench.training import layer_stats as observe
from qbench.training.state import State
from qbench.training.task import Task

STEPS = 100
"""Steps between two looks, at least, since one costs as much as two steps. Most epochs are longer; a run's last one is
looked at whatever its length, and with `full` every one."""
HISTOGRAMS = 10
"""Times a run's weights are written to TensorBoard as histograms, about; with `full` at every look."""


@dataclass
class TrainingMonitor:
    """Looks at the layers of one run. What it must remember for a resumed run to tell the same is no part of training.

    Args:
        level: off, light or full: how much is told; see `qbench.training.layer_stats`. Warnings are given in any case.
        start: the largest weight of every layer before training.
        warned: what was said already, by what it is about.
        codes: of the weights at the last look.
        gradients: norms of the last step's.
    """

    level: str
    book: MetricsLogger
    screen: ProgressReporter
    start: dict[str, float] = field(default_factory=dict)
    warned: dict[str, str] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    gradients: observe.LayerMetrics = field(default_factory=dict)

    def begin(self, model: nn.Module) -> None:
        """Note what a network starts from, unless that was noted before an interruption."""
        self.start = self.start or sentinels.starts(model)

    def memory(self, model: nn.Module) -> dict[str, Any]:
        """Return what a checkpoint keeps: the arguments that begin with `start`."""
        kept: dict[str, Any] = {"start": self.start, "warned": self.warned}
        if self.level == "off":
            return kept
        return kept | {"codes": self.codes, "gradients": observe.gradients(model) or self.gradients}

    def check(self, model: nn.Module, at: str) -> None:
        """Raise `Diverged` where weights have run away or a scale is not above zero; `at` says where the run stands."""
        sentinels.check_scales(model, at)
        self._warn(sentinels.exploding_weights(model, self.start, at))

    def epoch(self, task: Task, state: State, record: dict[str, Any], at: str) -> list[tuple[str, int, dict[str, Any]]]:
        """Look at the layers when an epoch is over, unless one was a few steps ago: warn, add to TensorBoard.

        Args:
            record: the epoch's own record; `images` 0 where nothing is trained.

        Returns:
            What belongs into metrics.jsonl.

        Raises:
            Diverged: see `check`; or what a layer reads is not finite.
        """
        self.check(task.model, at)
        self._warn(sentinels.at_chance(record, task.classes, state.step, at))
        every = 1 if self.level == "full" else ceil(STEPS / task.steps)
        if not task.probe.batches or not (_last(task, state) or state.epoch % every == 0):
            return []
        images = observe.few(task.probe.batches[0][0], record["images"])
        try:
            seen = observe.trace_layers(task.model, images)
        except NotFinite as error:
            raise Diverged(f"{error} {at}; try a lower optim.lr") from None
        self._warn(sentinels.degenerate_layers(task.model, seen, at))
        if self.level == "off" or not seen:
            return []
        self.gradients = observe.gradients(task.model) or self.gradients
        told = observe.layer_metrics(task.model, images, seen, self.codes, self.gradients)
        self.codes = observe.codes(seen)
        sparsely = every * max(1, task.epochs // (HISTOGRAMS * every))
        self._show(state.step, seen, told, self.level == "full" or _last(task, state) or state.epoch % sparsely == 0)
        return [("layers", state.step, {"epoch": record.get("epoch"), "layers": told})]

    def _show(self, step: int, seen: dict[str, observe.LayerTrace], told: observe.LayerMetrics, weights: bool) -> None:
        self.book.scalars(step, {f"{what}/{name}": x for name, own in told.items() for what, x in own.items()})
        if weights:
            self.book.histograms(step, observe.weight_tensors(seen))
        if self.level == "full":
            self.book.histograms(step, observe.input_tensors(seen))
            self.book.counts(step, observe.occupancy(seen))

    def _warn(self, found: sentinels.HealthWarnings) -> None:
        """Say what was not said before."""
        for what, said in found.items():
            if what not in self.warned:
                self.warned[what] = f"warning: {said}"
                self.screen.say(self.warned[what])


def _last(task: Task, state: State) -> bool:
    return state.epoch >= task.epochs or state.stopped
