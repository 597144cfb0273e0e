"""Compares an exported network with its run, on images."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.quant.probe import Batch


class Agreement(NamedTuple):
    """How far the logits of two networks agree.

    Args:
        images: number of images.
        same_class: number of images with the same predicted class.
        largest: the largest difference of two logits.
        magnitude: the largest magnitude of the run's logits.
        identical: whether all logits have the same bits.
    """

    images: int
    same_class: int
    largest: float
    magnitude: float
    identical: bool


@torch.no_grad()
def compare(
    run: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> Agreement:
    """Compare the logits of a run and of an exported network."""
    images, same, largest, magnitude, identical = 0, 0, 0.0, 0.0, True
    for batch, _ in batches:
        expected, found = run(batch), exported(batch)
        images += len(batch)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        difference = (expected - found).abs().max().item()
        largest = max(largest, torch.inf if difference != difference else difference)
        magnitude = max(magnitude, expected.abs().max().item())
        identical &= torch.equal(expected, found)
    return Agreement(images, same, largest, magnitude, identical)


@torch.no_grad()
def batch_noise(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference of logits between the images in one batch and one by one.

    torch adds in another order for other batch sizes. No tolerance can be below this difference.
    """
    single = torch.cat([run(image.unsqueeze(0)) for image in images])
    return (run(images) - single).abs().max().item()
