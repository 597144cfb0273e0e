"""CIFAR-100 (A. Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images"): CIFAR-10's finer sister.

50,000 training and 10,000 test images, 3x32x32, in a hundred classes of equal size; the twenty coarse labels are not
used. Read from `<root>/cifar-100-python/`, the Python version's files: train, test and meta. Augmented as CIFAR-10 is.
"""

from qbench.data.dataset import Augment, Dataset
from qbench.data.published import assembled, cifar


def build(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 0.1,
    pad: int = 4,
    flip: bool = True,
    replicate: bool = False,
    normalize: str = "own",
) -> Dataset:
    """Return CIFAR-100; `val` is the part of the training images held out."""
    train, test = cifar("CIFAR100", root, download)
    return assembled(
        "cifar100", train, test, classes=100, val=val, augment=Augment(pad, flip, replicate),
        normalize=normalize,
    )  # fmt: skip
