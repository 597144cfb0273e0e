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


Logits = list[tuple[Tensor, Tensor]]
"""For each batch, the logits of a run and the logits of its exported network."""


@torch.no_grad()
def compare(
    run: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    kept: Logits | None = None,
) -> Agreement:
    """Return how far the logits of a run and of an exported network differ. Append both logits to `kept`, if given."""
    images, same, correct, largest, magnitude, identical = 0, 0, 0, 0.0, 0.0, True
    for batch, labels in batches:
        expected, found = run(batch), exported(batch)
        if kept is not None:
            kept.append((expected, found))
        images += len(batch)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        correct += int((found.argmax(1) == labels).sum())
        difference = (expected - found).abs().max().item()
        largest = max(largest, torch.inf if difference != difference else difference)
        magnitude = max(magnitude, expected.abs().max().item())
        identical &= torch.equal(expected, found)
    return Agreement(images, same, largest, magnitude, identical, correct)


class RoundingErrors(NamedTuple):
    """Numbers of images for which results differ from those of the run's network in float64.

    A rounding error can move an activation that is close to a threshold to the neighbouring level. The levels of the
    next layers then differ too, and so may the class. No network that computes in float32 or in integers of 32 bits
    avoids this for every image.

    Args:
        exported: number of images for which the exported network differs from the float64 network.
        run: number of images for which the run's network in float32 differs from the float64 network.
    """

    exported: int
    run: int

    @property
    def comparable(self) -> bool:
        """Whether the exported network differs from float64 for at most twice as many images as the run does."""
        return self.exported <= 2 * self.run


@torch.no_grad()
def rounding_errors(
    logits: Logits, in_float64: Callable[[Tensor], Tensor], batches: Iterable[Batch], tolerance: float
) -> RoundingErrors:
    """Count the images whose class differs from float64, or whose logits differ by more than the tolerance."""
    counts = [0, 0]
    for (run, exported), (batch, _) in zip(logits, batches, strict=True):
        exact = in_float64(batch.double())
        for place, found in enumerate((exported, run)):
            near = (found.double() - exact).abs().amax(1) <= tolerance  # false for nan
            counts[place] += int((~near | (found.argmax(1) != exact.argmax(1))).sum())
    return RoundingErrors(*counts)


@torch.no_grad()
def batch_noise(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference between logits of a batch and logits of its images one at a time.

    torch adds in an order that depends on the batch size, so the logits differ. A tolerance must
    not be smaller than this difference.
    """
    single = torch.cat([run(image.unsqueeze(0)) for image in images])
    return (run(images) - single).abs().max().item()
