"""Implements the training loop, which trains float baselines and quantized networks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import Diverged, Interrupted
from qbench.quant.layers import NotFinite, fully_quantized
from qbench.quant.probe import Batch
from qbench.runs.result import Accuracy
from qbench.system.signals import step_in_progress
from qbench.training.checkpoint import cpu_copy
from qbench.training.divergence import divergence_error, gradient_norm
from qbench.training.epoch_record import EpochRecord
from qbench.training.evaluation import evaluate
from qbench.training.gradients import compute_gradients, images_of, unscale_gradients
from qbench.training.optimizer import set_learning_rate
from qbench.training.random_state import seed_everything
from qbench.training.state import BestWeights, State, evaluated_weights
from qbench.training.task import Task


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training loop calls.

    Each function may save a checkpoint, or raise an exception to stop training.

    Args:
        on_step: function of (state, loss) that is called after every batch.
        on_epoch: function of (state, record, losses) that is called after every epoch. When it is called, `state.epoch`
            is already the number of the next epoch.
        on_interrupt: function of (state) that is called if the validation after an epoch is interrupted.
    """

    on_step: Callable[[State, Tensor], None] = lambda state, loss: None
    on_epoch: Callable[[State, EpochRecord, list[Tensor]], None] = lambda state, record, losses: None
    on_interrupt: Callable[[State], None] = lambda state: None


def train(task: Task, state: State, callbacks: Callbacks = Callbacks()) -> None:
    """Continue training from `state` until the last epoch, or until early stopping.

    Raises:
        Diverged: a loss, a gradient or the input of a layer is not finite.
    """
    while state.epoch < task.epochs and not state.stopped:
        if state.batch == 0:
            _begin_epoch(task, state)
        train_epoch(task, state, callbacks)
        train_loss, train_top1 = _training_metrics(state)
        try:
            validation = _validate(task, state)
        except Interrupted:
            callbacks.on_interrupt(state)
            raise
        except NotFinite as error:
            raise divergence_error(task, state, str(error)) from None
        record = EpochRecord(
            epoch=state.epoch, lr=task.rate(state.epoch, task.steps - 1), train_loss=train_loss,
            train_top1=train_top1, seconds=state.seconds, images=state.images, validation=validation,
        )  # fmt: skip
        losses, state.losses, state.images, state.hits, state.batch = state.losses, [], 0, 0, 0
        state.epoch, state.seconds = state.epoch + 1, 0.0
        callbacks.on_epoch(state, record, losses)


def train_epoch(task: Task, state: State, callbacks: Callbacks = Callbacks()) -> None:
    """Train the rest of the current epoch.

    Raises:
        Diverged: a loss, a gradient or the input of a layer is not finite. The network then has the
            weights that it had before the step.
    """
    model, method = task.model, task.method
    model.train()
    for teacher in method.teachers:
        teacher.eval()
    began = time.perf_counter()
    shards = iter(task.train(state.epoch, state.batch))
    for batch in zip(*[shards] * len(task.shards.own), strict=True):
        with step_in_progress():
            loss, hits = _train_step(task, state, batch)
        state.batch, state.step = state.batch + 1, state.step + 1
        state.losses.append(loss)
        state.images += len(batch[0][1]) * task.shards.count
        state.hits = state.hits + hits
        now = time.perf_counter()
        state.seconds, began = state.seconds + now - began, now
        callbacks.on_step(state, loss)


def _train_step(task: Task, state: State, shards: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Train on one batch. Return the loss and the number of correct predictions.

    With `optim.accumulate`, several batches of equal size share one update of the weights. The network is updated after
    the last of these batches, with the gradient of the mean loss over all images of these batches. Batch normalization
    normalizes each batch (or each shard, if the batch is divided) separately.

    In float16, an update is skipped if one of its gradients is not finite, because the loss scale was too large.
    """
    model, method = task.model, task.method
    set_learning_rate(state.optimizer, task.rate(state.epoch, state.batch), decay=task.decays(state.epoch, state.batch))
    loss, hits = compute_gradients(task, state, shards)
    state.in_update = state.batch != task.update(state.batch)[-1]
    if not _gradients_are_ready(task, state, loss, shards):
        return loss, hits
    _seed_shared_draws(task, state, "step")
    if method.step is None:
        state.optimizer.step()
    else:
        method.step(model, state.optimizer)
    if state.average:
        state.average.update(model)
    return loss, hits


def _gradients_are_ready(task: Task, state: State, loss: Tensor, shards: Sequence[Batch]) -> bool:
    """Check that the loss and the gradients are finite, and clip the gradients of a complete update.

    Return whether the weights can be updated: the update has all its batches and, in float16, finite gradients.

    Raises:
        Diverged: the loss or a gradient is not finite. In float16, a gradient that is not finite raises this error only
            if the loss scale is 1 or less, because reducing the scale further would not help.
    """
    scaler, on_cpu = state.scaler, loss.device.type == "cpu"
    # On a GPU, the loss is not checked here, because reading its value would make training wait for the GPU.
    if on_cpu and not math.isfinite(loss.item()):
        raise divergence_error(task, state, "the loss is not finite", images_of(shards))
    if scaler is not None:
        if state.in_update:
            return False
        scale = scaler.get_scale()
        if not unscale_gradients(scaler, state.optimizer):
            if scale <= 1:
                raise divergence_error(task, state, "the norm of the gradients is not finite", images_of(shards))
            return False
    norm = gradient_norm(task.model)
    if on_cpu and not math.isfinite(norm.item()):
        raise divergence_error(task, state, "the norm of the gradients is not finite", images_of(shards))
    if state.in_update:
        return False
    if task.optim.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(task.model.parameters(), task.optim.clip_norm, norm)
    return True


def _seed_shared_draws(task: Task, state: State, purpose: str) -> None:
    """If batches are divided into shards, seed the random numbers for work that must be equal in all processes."""
    if task.shards.count > 1:
        seed_everything(task.shards.draw_seed(purpose, state.step))


def _begin_epoch(task: Task, state: State) -> None:
    """Reset the optimizer if a new phase of the method begins, and call the method's `on_epoch`."""
    if state.epoch and task.phase(state.epoch)[0] == state.epoch:
        state.optimizer.state.clear()
    if task.method.on_epoch is not None:
        _seed_shared_draws(task, state, "epoch")
        task.method.on_epoch(task.model, state.epoch, task.epochs, task.probe)


def _training_metrics(state: State) -> tuple[float, float]:
    """Return the mean loss and the top-1 accuracy in percent over the training batches of the epoch."""
    losses = torch.stack(state.losses)
    if not torch.isfinite(losses).all():
        raise Diverged(f"the loss is not finite in epoch {state.epoch}; try a lower optim.lr")
    return losses.double().mean().item(), 100 * int(state.hits) / state.images


def _validate(task: Task, state: State) -> Accuracy | None:
    """Evaluate the network on the validation split. Keep its weights if the result is the best so far.

    Return the accuracy, or None if there is no validation split.
    """
    with evaluated_weights(task.model, state):
        accuracy = evaluate(task.model, task.validate(), task.logits, group=task.shards.group)
        if accuracy is None:
            return None
        if not math.isfinite(accuracy.loss):
            raise divergence_error(task, state, "the validation loss is not finite")
        _keep_best(task, state, accuracy)
    return accuracy


def _keep_best(task: Task, state: State, accuracy: Accuracy) -> None:
    """Keep the weights if their validation top-1 is the best so far. If top-1 is equal, the lower loss decides.

    Training stops after `patience` epochs without a better result. With an incremental method, only epochs in which
    every layer is fully quantized are considered.
    """
    if not fully_quantized(task.model):
        return
    rank = (accuracy.top1, -accuracy.loss)
    if state.best is None or rank > state.best.rank:
        state.best = BestWeights(rank, state.epoch, cpu_copy(task.model.state_dict()))
        state.stale = 0
    else:
        state.stale += 1
    state.stopped = task.optim.patience is not None and state.stale >= task.optim.patience
