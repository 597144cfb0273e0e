"""Observes the quantized layers of a run at the end of epochs, to print warnings and to write logs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import TypeVar

from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import NotFinite
from qbench.runs.metrics_logger import MetricsLogger, Record
from qbench.runs.progress import ProgressReporter
from qbench.runs.tensorboard_tags import QUANT
from qbench.training.epoch_record import EpochRecord
from qbench.training.health import (
    FIRST_STEPS,
    WITHOUT_TRAINING,
    HealthWarnings,
    at_chance,
    check_scales,
    degenerate_layers,
    exploding_weights,
    initial_magnitudes,
    remedy,
    still_without_gradient,
    to_train,
    untrained,
)
from qbench.training.layer_stats import (
    LayerMetrics,
    LayerTrace,
    gradient_norms,
    input_tensors,
    layer_metrics,
    level_counts,
    observed_images,
    trace_layers,
    weight_codes,
    weight_tensors,
)
from qbench.training.state import State
from qbench.training.task import Task

T = TypeVar("T")
MIN_STEPS_BETWEEN = 100
"""Minimum number of training steps between two observations. An observation costs as much as two steps.

Most epochs have more steps than this. The last epoch is always observed. With `runtime.observe=full`,
every epoch is observed.
"""

HISTOGRAMS_PER_RUN = 10
"""Approximate number of times per run that histograms of weights are written to TensorBoard.

With `runtime.observe=full`, histograms are written after every epoch.
"""


@dataclass
class TrainingMonitor:
    """Observes the layers of one run.

    The state of the monitor does not affect training. Checkpoints contain the state, so that a resumed run writes the
    same logs as an uninterrupted run.

    Args:
        level: "off", "light" or "full" (`runtime.observe`). The level decides what is logged. Warnings are
            printed at every level.
        logger: the logger of metrics and histograms.
        reporter: the object that prints warnings.
        start: the initial magnitude of each layer's weights.
        warned: the warnings that were printed so far, as a map from topic to text.
        codes: the level index of each weight at the previous observation, by layer.
        gradients: the norms of the gradients after the last step.
        without_gradient: the parameters that have had no gradient so far, or None before the first step.
    """

    level: str
    logger: MetricsLogger
    reporter: ProgressReporter
    start: dict[str, float] = field(default_factory=dict)
    warned: dict[str, str] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    gradients: LayerMetrics = field(default_factory=dict)
    without_gradient: list[str] | None = None

    def begin(self, model: nn.Module, step: int) -> None:
        """Initialize the state of the monitor from the network. If a checkpoint has restored the state, keep it."""
        self.start = self.start or initial_magnitudes(model)
        if self.without_gradient is None:
            self.without_gradient = [] if step else to_train(model)

    def step(self, model: nn.Module, step: int) -> None:
        """From `without_gradient`, remove parameters that now have a gradient. After `FIRST_STEPS`, do nothing."""
        if self.without_gradient and step <= FIRST_STEPS:
            self.without_gradient = still_without_gradient(model, self.without_gradient)

    def memory(self, model: nn.Module) -> dict[str, object]:
        """Return the state of the monitor for a checkpoint: the arguments of this class from `start` on.

        At level `off`, `codes` and `gradients` are left out.
        """
        kept: dict[str, object] = {
            "start": self.start, "warned": self.warned, "without_gradient": self.without_gradient,
        }  # fmt: skip
        if self.level == "off":
            return kept
        return kept | {"codes": self.codes, "gradients": gradient_norms(model) or self.gradients}

    def check(self, model: nn.Module, where: str) -> None:
        """Raise `Diverged` if weights explode or a scale is not above zero.

        Args:
            model: the network.
            where: text for messages that says when the check is made, such as `in epoch 3, step 72`.
        """
        check_scales(model, where)
        self._warn(exploding_weights(model, self.start, where))

    def epoch(self, task: Task, state: State, record: EpochRecord | None, where: str) -> list[Record]:
        """Observe the layers at the end of an epoch, print warnings, and write statistics to TensorBoard.

        The layers are not observed if too few steps have passed since the previous observation.

        Args:
            task: the training task.
            state: the state of training.
            record: metrics of the epoch, or None if the network is not trained.
            where: text for messages that says when the observation is made, such as `in epoch 3, step 72`.

        Returns:
            Records (kind, step, values) to write to metrics.jsonl.

        Raises:
            Diverged: weights explode, a scale is not above zero, or the input of a layer is not finite.
        """
        self.check(task.model, where)
        if record:
            self._warn(at_chance(record, task.chance, state.step, where))
        if state.step >= FIRST_STEPS or _is_last_epoch(task, state):
            self._warn(untrained(self.without_gradient or [], state.step))
        period = 1 if self.level == "full" else ceil(MIN_STEPS_BETWEEN / task.steps)
        if not task.probe.batches or not (_is_last_epoch(task, state) or state.epoch % period == 0):
            return []
        images = observed_images(task.probe.batches[0][0], record.images if record else 0)
        try:
            traces = trace_layers(task.model, images)
        except NotFinite as error:
            raise Diverged(f"{error} {where}; {remedy(where != WITHOUT_TRAINING)}") from None
        self._warn(degenerate_layers(task.model, traces, where))
        if self.level == "off" or not traces:
            return []
        self.gradients = gradient_norms(task.model) or self.gradients
        metrics = layer_metrics(task.model, images, traces, self.codes, self.gradients)
        self.codes = weight_codes(traces)
        histogram_period = period * max(1, task.epochs // (HISTOGRAMS_PER_RUN * period))
        with_weights = self.level == "full" or _is_last_epoch(task, state) or state.epoch % histogram_period == 0
        self._log(state.step, traces, metrics, with_weights)
        return [("layers", state.step, {"epoch": record.epoch if record else None, "layers": metrics})]

    def _log(self, step: int, traces: Mapping[str, LayerTrace], metrics: LayerMetrics, with_weights: bool) -> None:
        """Write statistics to TensorBoard, and also histograms if `with_weights` is true."""
        scalars = {f"{key}/{name}": x for name, layer in metrics.items() for key, x in layer.items()}
        self.logger.scalars(step, _quant(scalars))
        if with_weights:
            self.logger.histograms(step, _quant(weight_tensors(traces)))
        if self.level == "full":
            self.logger.histograms(step, _quant(input_tensors(traces)))
            self.logger.counts(step, _quant(level_counts(traces)))

    def _warn(self, warnings: HealthWarnings) -> None:
        """Print each warning whose topic has had no warning before."""
        for subject, text in warnings.items():
            if subject not in self.warned:
                self.warned[subject] = text
                self.reporter.say(f"warning: {text}")


def _quant(values: Mapping[str, T]) -> dict[str, T]:
    """Return values by their tags in TensorBoard."""
    return {f"{QUANT}{name}": value for name, value in values.items()}


def _is_last_epoch(task: Task, state: State) -> bool:
    return state.epoch >= task.epochs or state.stopped
