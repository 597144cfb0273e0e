"""Compares the logits of an exported network with the logits of its run."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.quant.probe import Batch


class Agreement(NamedTuple):
    """Differences between the logits of a run and of its exported network.

    Args:
        images: number of images.
        same_class: number of images with the same predicted class.
        largest: the largest absolute difference between corresponding logits.
        magnitude: the largest magnitude of the run's logits.
        identical: whether all logits are bit-identical.
        correct: number of images whose class the exported network predicts correctly.
    """

    images: int
    same_class: int
    largest: float
    magnitude: float
    identical: bool
    correct: int


@torch.no_grad()
def compare(
    run: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> Agreement:
    """Return how far the logits of a run and of an exported network differ."""
    images, same, correct, largest, magnitude, identical = 0, 0, 0, 0.0, 0.0, True
    for batch, labels in batches:
        expected, found = run(batch), exported(batch)
        images += len(batch)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        correct += int((found.argmax(1) == labels).sum())
        difference = (expected - found).abs().max().item()
        largest = max(largest, torch.inf if difference != difference else difference)
        magnitude = max(magnitude, expected.abs().max().item())
        identical &= torch.equal(expected, found)
    return Agreement(images, same, largest, magnitude, identical, correct)


@torch.no_grad()
def batch_noise(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference between logits of a batch and logits of its images one at a time.

    torch adds in an order that depends on the batch size, so the logits differ. A tolerance must
    not be smaller than this difference.
    """
    single = torch.cat([run(image.unsqueeze(0)) for image in images])
    return (run(images) - single).abs().max().item()
