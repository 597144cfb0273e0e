"""Computes the gradients of a batch, as a whole or in parts (shards)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.distributed.shards import Pass, ShardedStep
from qbench.errors import ConfigError
from qbench.quant.layers import NotFinite
from qbench.quant.probe import Batch
from qbench.training.divergence import divergence_error
from qbench.training.random_state import seed_everything
from qbench.training.state import State
from qbench.training.task import Task


def compute_gradients(task: Task, state: State, shards: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a batch, and add them to the gradients of earlier batches of the same update.

    Return the loss and the number of correct predictions of the batch, both as tensors of shape ().

    Args:
        task: the training task.
        state: the state of training.
        shards: the shards of the batch that this process computes. An undivided batch is one shard.

    Raises:
        Diverged: the input of a layer is not finite.
        ConfigError: the loss does not depend on the parameters, or the forward pass over a shard changes the
            parameters.
    """
    if state.batch == task.update(state.batch)[0]:
        state.optimizer.zero_grad()
    if task.shards.count == 1:
        return _forward_and_backward(task, state, shards[0])

    def pass_over(number: int, shard: Batch) -> Pass:
        def run() -> tuple[Tensor, Tensor]:
            seed_everything(task.shards.draw_seed("pass", state.step, number))
            return _forward_and_backward(task, state, shard)

        return run

    step = ShardedStep(task.model, task.shards)
    return step.compute(pass_over(number, shard) for number, shard in zip(task.shards.own, shards, strict=True))


def _forward_and_backward(task: Task, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
    """Add the gradients of a shard to the gradients of the update.

    Return the loss, divided by the number of shards, and the number of correct predictions.
    """
    images, labels = batch
    try:
        with task.weights.forward():
            logits = task.logits(images)
    except NotFinite as error:
        raise divergence_error(task, state, str(error), images) from None
    loss = task.loss(logits, batch)
    if not loss.requires_grad:
        raise ConfigError(
            "the loss does not depend on any parameter that is trained\n"
            "the network's forward function must not end with detach(), .data or torch.no_grad()"
        )
    if task.shards.count > 1:
        loss = loss / task.shards.count
    batches = len(task.update(state.batch))
    share = loss if batches == 1 else loss / batches
    if state.scaler is not None:
        share = state.scaler.scale(share)
    try:
        share.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "returned nan values" not in str(error):  # the message of torch's detect_anomaly
            raise
        raise divergence_error(task, state, str(error).rstrip("."), images) from error
    return loss.detach(), (logits.argmax(1) == labels).sum()


def unscale_gradients(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Divide the gradients of an update by the scale of the loss, and set the scale of the next update.

    The scale is a power of two, so the division is exact. If a gradient is not finite, the scale is halved. After 2,000
    updates with finite gradients, the scale is doubled.

    Return whether all gradients are finite.
    """
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def images_of(shards: Sequence[Batch]) -> Tensor:
    """Return the images of all shards. The search for the cause of divergence needs these images."""
    return shards[0][0] if len(shards) == 1 else torch.cat([images for images, _ in shards])
