"""Computes top-1, top-5 and mean cross entropy of a network on batches."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.quant.probe import Batch
from qbench.runs.result import Accuracy


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Tensor], Tensor] | None = None,
    predictions: list[Tensor] | None = None,
) -> Accuracy | None:
    """Return a network's accuracy on batches, or None if there are no images. The network is left in eval mode.

    Args:
        model: the network.
        batches: batches of images and labels.
        forward: function that computes the network's output. None means the network itself.
        predictions: a list to which one tensor is added per batch. The tensor has shape (N, 2) for N images and
            contains labels and predicted classes.
    """
    model.eval()
    run = model if forward is None else forward
    count, top1, top5, loss = 0, 0, 0, 0.0
    for images, labels in batches:
        logits = run(images).float()
        top_classes = logits.topk(min(5, logits.shape[1]), 1).indices
        hits = top_classes == labels[:, None]
        if predictions is not None:
            predictions.append(torch.stack([labels, top_classes[:, 0]], 1))
        count += len(labels)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return Accuracy(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count) if count else None
