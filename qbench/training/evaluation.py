"""Computes top-1, top-5 and mean cross entropy of a network on batches."""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.distributed.group import Group
from qbench.quant.graph import eval_mode_keeping_rng, state_restored
from qbench.quant.layers import float_mode
from qbench.quant.probe import Batch
from qbench.runs.result import Accuracy
from qbench.training.random_state import random_state, set_random_state

ROUNDING = 1e-4
"""Largest rounding error of a probability or of a sum of probabilities."""

RELOAD_TOLERANCE = 1e-3
"""Maximum relative difference between the outputs of a network and of its reloaded copy.

The tolerance allows for rounding errors, for example on a GPU.
"""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Tensor], Tensor] | None = None,
    predictions: list[Tensor] | None = None,
    group: Group | None = None,
) -> Accuracy | None:
    """Evaluate a network, and return its accuracy, or None if there are no images. The network stays in eval mode.

    Several processes can share the batches. Sums are computed in the order of the batches, so the results do not depend
    on the number of processes.

    Args:
        model: the network.
        batches: the batches of images and labels for this process. With W processes, process r has batches r, r + W,
            and so on.
        forward: function that computes the network's output. None means the network itself.
        predictions: a list to which one tensor is added per batch. The tensor has the shape (N, 2) for N images, and
            contains labels and predicted classes.
        group: the processes that share the batches. None means that there is only one process.
    """
    model.eval()
    run = model if forward is None else forward
    own = [_measure(run(images).float(), labels, predictions is not None) for images, labels in batches]
    count, top1, top5, loss = 0, 0, 0, 0.0
    for measured in own if group is None else _in_order(group.gather(own)):
        count += measured.images
        top1 += measured.top1
        top5 += measured.top5
        loss += measured.loss
        if predictions is not None and measured.predictions is not None:
            predictions.append(measured.predictions)
    return Accuracy(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count) if count else None


class _Measured(NamedTuple):
    """Sums over the images of one batch and, if requested, the labels and predicted classes, of shape (N, 2)."""

    images: int
    top1: int
    top5: int
    loss: float
    predictions: Tensor | None


def _measure(logits: Tensor, labels: Tensor, keep_predictions: bool) -> _Measured:
    # Half-precision logits are often equal. argmax then returns the first class, but topk returns any of them.
    predicted = logits.argmax(1)
    hits = predicted == labels
    among_five = (logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]).any(1)
    return _Measured(
        images=len(labels),
        top1=int(hits.sum()),
        top5=int((hits | among_five).sum()),
        loss=F.cross_entropy(logits, labels, reduction="sum").item(),
        predictions=torch.stack([labels, predicted], 1).cpu() if keep_predictions else None,
    )


def _in_order(parts: list[list[_Measured]]) -> Iterator[_Measured]:
    """Yield the measurements of all batches in the order of the batches. `parts` has one list for each process."""
    for turn in zip_longest(*parts):
        yield from (measured for measured in turn if measured is not None)


@torch.no_grad()
def unsteady_evaluation(model: nn.Module, images: Tensor) -> str | None:
    """Return a text that says why a network's accuracy depends on more than its weights, or None if it does not.

    The output for an image must not depend on when the image is evaluated, or on the other images of its batch. Outputs
    are compared bit for bit. All compared batches therefore have the same shape, because other shapes cause other
    rounding errors. The buffers of the network are restored afterwards.

    Args:
        images: the images to evaluate, of shape (N, C, H, W). If N < 2, batches are not compared.
    """
    half = len(images) // 2
    mixed = images.clone()  # in the same memory format
    mixed[half:] = images[half:].flip(-1) + 1
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with eval_mode_keeping_rng(model):
        first, second, in_other_batch = (model(x.clone()).nan_to_num() for x in (images, images, mixed))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if not torch.equal(first, second):
        return (
            "two evaluations of the same images differ: the network draws random numbers or changes its state in eval "
            "mode (F.dropout needs training=self.training)"
        )
    if not torch.equal(first[:half], in_other_batch[:half]):
        return (
            "the output for an image depends on the other images of its batch, even in eval mode, so the accuracy "
            "would change with other batches"
        )
    return None


@torch.no_grad()
def state_outside(model: nn.Module, reloaded: nn.Module, images: Tensor) -> str | None:
    """Return a warning if a network's outputs depend on more than its state_dict, and otherwise None.

    Args:
        model: the trained network.
        reloaded: a new network with the state_dict of `model`.
        images: (N, C, H, W).
    """
    outputs = []
    for network in (model, reloaded):
        with eval_mode_keeping_rng(network):
            outputs.append(network(images.clone()).float())
    trained, found = outputs
    if (trained - found).norm() <= RELOAD_TOLERANCE * trained.norm():
        return None
    return (
        "the network has state that is not in its state_dict (an attribute, or a buffer with persistent=False), so "
        "networks loaded from best.pt or last.pt have other outputs, and so do continued runs; the accuracy `best` was "
        "measured with the state after the last epoch"
    )


def unsteady_training(model: nn.Module, images: Tensor) -> str | None:
    """Return a warning if the outputs in training depend on more than the state_dict and the usual random numbers.

    Two passes in training mode start from the same state_dict and the same state of all random number generators. The
    network and the generators are restored afterwards, but not objects outside the network, such as global variables.

    Args:
        images: (N, C, H, W).
    """
    if images.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return None  # equal passes can then differ in rounding errors
    random = random_state()
    with state_restored(model):
        stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        outputs = []
        for _ in range(2):
            set_random_state(random)
            for name, tensor in model.state_dict().items():  # the first pass may have added tensors
                if name in stored:
                    tensor.copy_(stored[name])
            outputs.append(model.train()(images.clone()))
    set_random_state(random)
    logits = [output.detach().nan_to_num() for output in outputs if isinstance(output, Tensor)]
    if len(logits) < 2 or torch.equal(*logits):  # `compute_logits` refuses other outputs
        return None
    return (
        "in training, the network has state that is not in its state_dict (an attribute, a global variable, or its own "
        "random generator), so continued runs, runs on several processes, and runs after others in one process end "
        "with other weights; keep the state in a buffer (register_buffer), and draw from torch's generator"
    )


@torch.no_grad()
def outputs_of_activation(model: nn.Module, images: Tensor) -> str:
    """Return what a network's outputs for images (N, C, H, W) seem to be if they are not logits, else "".

    The loss needs logits, which can have any size.
    """
    with eval_mode_keeping_rng(model):
        outputs = model(images.clone()).float()
        if outputs.amin() < 0 or outputs.amax() > 1 + ROUNDING:
            return ""
        with float_mode(model):  # quantized activations are bounded
            strong = model(1000 * images).float()  # logits that lie between 0 and 1 by chance become larger
    if strong.amin() < 0 or strong.amax() > 1 + ROUNDING:
        return ""
    if torch.allclose(outputs.sum(1), outputs.new_ones(len(outputs)), atol=ROUNDING):
        return "probabilities"
    return "numbers from 0 to 1 only, as after a sigmoid"
