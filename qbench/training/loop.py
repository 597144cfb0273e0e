"""The training loop: the one loop, for float pretraining and for fine-tuning alike, and the one evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.schema import Optim
from qbench.errors import Diverged, Interrupted
from qbench.quant.layers import NotFinite, fully_quantized, is_quantizer_key
from qbench.quant.method import Batch, Method, Probe
from qbench.training.checkpoint import content_sha256, copied, not_finite, random_state, set_random_state
from qbench.training.optimizer import learning_rate, set_learning_rate

Metrics = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how long. `train(epoch, start)` yields the batches of an epoch from a place on; of
    `classes` 0 means: not known.
    """

    model: nn.Module
    method: Method
    optim: Optim
    epochs: int
    steps: int
    train: Callable[[int, int], Iterable[Batch]]
    validate: Callable[[], Iterable[Batch]]
    probe: Probe
    forward: Callable[[Tensor], Tensor] | None = None
    classes: int = 0

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's output as the run computes it: compiled perhaps, or in another precision."""
        run = self.model if self.forward is None else self.forward
        return run(images)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar: the method's own, else cross entropy."""
        if self.method.loss is not None:
            return self.method.loss(self.model, logits, batch)
        return F.cross_entropy(logits, batch[1], label_smoothing=self.optim.label_smoothing)

    def rate(self, epoch: int, batch: int) -> float:
        """Return the learning rate of a batch; every phase has the schedule from its beginning."""
        start, stop = self.phase(epoch)
        return learning_rate(self.optim, (epoch - start) * self.steps + batch, (stop - start) * self.steps)

    def phase(self, epoch: int) -> tuple[int, int]:
        """Return first and last + 1 epoch of the phase that an epoch belongs to."""
        borders = sorted({0, *self.method.phases(self.epochs), self.epochs})
        return next((start, stop) for start, stop in pairwise(borders) if start <= epoch < stop)


@dataclass
class State:
    """Where training stands: with the random state, all that a resumed run needs to go on bit for bit."""

    optimizer: torch.optim.Optimizer
    average: "Average | None" = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    images: int = 0
    hits: int | Tensor = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    stale: int = 0
    stopped: bool = False

    def save(self, model: nn.Module) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "model": copied(model.state_dict()),
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else None,
            "counters": [
                self.epoch,
                self.batch,
                self.step,
                self.images,
                int(self.hits),
                self.stale,
                self.stopped,
            ],
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
            "best": self.best,
            "random": random_state(),
            "seconds": self.seconds,
        }

    def digest(self, model: nn.Module) -> str:
        """Return the sha256 of everything saved but the time it took: model, optimizer, counters, random states."""
        return content_sha256({name: part for name, part in self.save(model).items() if name != "seconds"})

    def load(self, model: nn.Module, saved: dict[str, Any]) -> None:
        """Take over what `save` returned, into the model too."""
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.values = {k: v.to(self.average.values[k].device) for k, v in saved["average"].items()}
        self.epoch, self.batch, self.step, self.images, self.hits, self.stale, self.stopped = saved["counters"]
        self.losses = list(saved["losses"].unbind())
        self.best, self.seconds = saved["best"], saved["seconds"]
        set_random_state(saved["random"])


class Average:
    """Exponential moving average of the parameters; buffers are the network's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters."""
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Give the network its averaged parameters for a while."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


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
                record |= {f"val_{key}": value for key, value in validated.items()}
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


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return what must be finite: parameters and buffers. Buffers of quantizers may mark as nan what is not set yet."""
    parameters = {name for name, _ in model.named_parameters()}
    return {n: t for n, t in model.state_dict().items() if n in parameters or not is_quantizer_key(n)}


def total_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients, a scalar: not finite if any of them is not."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)


def diverged(task: Task, state: State, what: str, images: Tensor | None = None) -> Diverged:
    """Return the error that says where a number stopped being finite: epoch, step and the first part to blame."""
    where = first_not_finite(task, images)
    at = f"in epoch {state.epoch}, step {state.step}{f', first at {where}' if where else ''}"
    return Diverged(f"{what} {at}; try a lower optim.lr")


def first_not_finite(task: Task, images: Tensor | None) -> str | None:
    """Return what to blame: a parameter or buffer, else the first module whose output is not finite on these images
    though its input is, else the last parameter whose gradient is not, else the one whose gradient is the largest.
    Changes the network's buffers.
    """
    model = task.model
    spoilt = not_finite(numbers(model))
    if spoilt or images is None:
        return spoilt
    if not torch.isfinite(images).all():
        return "the images"
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    except NotFinite as error:
        found.append(str(error))
    finally:
        for hook_handle in hooks:
            hook_handle.remove()
    if found:
        return found[0]
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None}
    if bad := [name for name, value in largest.items() if not math.isfinite(value)]:
        return f"the gradient of {bad[-1]}"
    name = max(largest, key=lambda n: largest[n], default=None)
    return f"the gradient of {name}, up to {largest[name]:.2g}" if name else None


def _begin_epoch(task: Task, state: State) -> None:
    """Call the method before an epoch's first batch; at the start of a later phase, forget momentum."""
    if state.epoch and task.phase(state.epoch)[0] == state.epoch:
        state.optimizer.state.clear()
    if task.method.on_epoch is not None:
        task.method.on_epoch(task.model, state.epoch, task.epochs, task.probe)


def _train_metrics(state: State) -> Metrics:
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


@contextmanager
def evaluated_weights(model: nn.Module, state: State) -> Iterator[None]:
    """Give the network the weights that evaluation uses: the averaged ones where averaging is on."""
    if state.average is None:
        yield
    else:
        with state.average.used(model):
            yield


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Tensor], Tensor] | None = None,
    answers: list[Tensor] | None = None,
) -> Metrics:
    """Return top1 and top5 in percent and the mean cross entropy; nothing for no images. Leaves eval mode on.

    Args:
        forward: what computes the network's output, if not the network itself.
        answers: a list that gets a tensor (N, 2) of labels and predicted classes for every batch.
    """
    model.eval()
    run = model if forward is None else forward
    count, top1, top5, loss = 0, 0, 0, 0.0
    for images, labels in batches:
        logits = run(images).float()
        classes = logits.topk(min(5, logits.shape[1]), 1).indices
        best = classes == labels[:, None]
        if answers is not None:
            answers.append(torch.stack([labels, classes[:, 0]], 1))
        count += len(labels)
        top1 += int(best[:, 0].sum())
        top5 += int(best.sum())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count} if count else {}
