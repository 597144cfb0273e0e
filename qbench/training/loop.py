"""The training loop: the one loop, for float pretraining and for fine-tuning alike, and the one evaluation."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Diverged, Interrupted
from qbench.quant.layers import NotFinite, fully_quantized
from qbench.training.checkpoint import copied
from qbench.training.divergence import diverged, total_norm
from qbench.training.evaluation import evaluate
from qbench.training.optimizer import set_learning_rate
from qbench.training.state import State, evaluated_weights
from qbench.training.task import Task


@dataclass(frozen=True)
class Callbacks:
    """Who looks on: `step(state, loss)` after every batch, `epoch(state, record, losses)` after every epoch, when
    `state` stands at the next one, `leave(state)` when an evaluation between the two was interrupted. All may save,
    and raise to stop.
    """

    step: Callable[[State, Tensor], None] = lambda state, loss: None
    epoch: Callable[[State, dict[str, Any], list[Tensor]], None] = lambda state, record, losses: None
    leave: Callable[[State], None] = lambda state: None


def fit(task: Task, state: State, watch: Callbacks = Callbacks()) -> None:
    """Train from where `state` stands to the end, or until early stop."""
    while state.epoch < task.epochs and not state.stopped:
        if state.batch == 0:
            _begin_epoch(task, state)
        train_epoch(task, state, watch)
        rate = task.rate(state.epoch, task.steps - 1)
        record = {"epoch": state.epoch, "lr": rate, **_train_metrics(state)}
        record |= {"seconds": state.seconds, "images": state.images}
        try:
            with evaluated_weights(task.model, state):
                validated = evaluate(task.model, task.validate(), task.logits)
                if validated:
                    record |= {f"val_{key}": value for key, value in asdict(validated).items()}
                if not math.isfinite(record.get("val_loss", 0.0)):
                    raise diverged(task, state, "the validation loss is not finite")
                _keep_best(task, state, record)
        except Interrupted:
            watch.leave(state)
            raise
        except NotFinite as error:
            raise diverged(task, state, str(error)) from None
        losses, state.losses, state.images, state.hits, state.batch = state.losses, [], 0, 0, 0
        state.epoch, state.seconds = state.epoch + 1, 0.0
        watch.epoch(state, record, losses)


def train_epoch(task: Task, state: State, watch: Callbacks = Callbacks()) -> None:
    """Train the rest of the current epoch.

    Raises:
        Diverged: a loss, gradient or what enters a layer is not finite; the weights are those before the step.
    """
    model, method, optim = task.model, task.method, task.optim
    model.train()
    for teacher in method.teachers:
        teacher.eval()
    began = time.perf_counter()
    for batch in task.train(state.epoch, state.batch):
        set_learning_rate(state.optimizer, task.rate(state.epoch, state.batch))
        try:
            logits = task.logits(batch[0])
        except NotFinite as error:
            raise diverged(task, state, str(error), batch[0]) from None
        loss = task.loss(logits, batch)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = total_norm(model)
        if loss.device.type == "cpu" and not math.isfinite(loss.item() + norm.item()):  # a GPU would stop for it
            what = "the gradients' norm" if math.isfinite(loss.item()) else "the loss"
            raise diverged(task, state, f"{what} is not finite", batch[0])
        if optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), optim.clip_norm, norm)
        if method.step is None:
            state.optimizer.step()
        else:
            method.step(model, state.optimizer)
        if state.average:
            state.average.update(model)
        loss = loss.detach()
        state.batch, state.step = state.batch + 1, state.step + 1
        state.losses.append(loss)
        state.images += len(batch[1])
        state.hits = state.hits + (logits.argmax(1) == batch[1]).sum()
        now = time.perf_counter()
        state.seconds, began = state.seconds + now - began, now
        watch.step(state, loss)


def _begin_epoch(task: Task, state: State) -> None:
    """Call the method before an epoch's first batch; at the start of a later phase, forget momentum."""
    if state.epoch and task.phase(state.epoch)[0] == state.epoch:
        state.optimizer.state.clear()
    if task.method.on_epoch is not None:
        task.method.on_epoch(task.model, state.epoch, task.epochs, task.probe)


def _train_metrics(state: State) -> dict[str, float]:
    losses = torch.stack(state.losses)
    if not torch.isfinite(losses).all():
        raise Diverged(f"the loss is not finite in epoch {state.epoch}; try a lower optim.lr")
    return {"train_loss": losses.double().mean().item(), "train_top1": 100 * int(state.hits) / state.images}


def _keep_best(task: Task, state: State, record: dict[str, Any]) -> None:
    """Keep the weights with the best validation top-1 (then loss); stop early after `patience` epochs without.

    An epoch of an incremental method counts only when every layer is fully quantized.
    """
    if "val_top1" not in record or not fully_quantized(task.model):
        return
    rank = [record["val_top1"], -record["val_loss"]]
    if state.best is None or rank > state.best["rank"]:
        state.best = {"rank": rank, "epoch": record["epoch"], "model": copied(task.model.state_dict())}
        state.stale = 0
    else:
        state.stale += 1
    state.stopped = task.optim.patience is not None and state.stale >= task.optim.patience
