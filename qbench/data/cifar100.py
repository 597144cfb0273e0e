"""CIFAR-100: small colour photographs in a hundred classes.

A. Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images". 50,000 training and
10,000 test images, 3x32x32, in a hundred classes of equal size. The twenty coarse labels are not
used. The images are read from `<root>/cifar-100-python/`, which has the files of the Python
version: train, test and meta. Images are augmented as in CIFAR-10.
"""

from qbench.data.augment import Augment
from qbench.data.cifar_files import CIFAR100, read_cifar
from qbench.data.dataset import Dataset
from qbench.data.dataset_files import dataset_from_splits
from qbench.data.normalize import Normalize


def build(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 0.1,
    pad: int = 4,
    flip: bool = True,
    replicate: bool = False,
    normalize: Normalize = "own",
) -> Dataset:
    """Return CIFAR-100. The fraction `val` of the training images is held out for validation."""
    train, test = read_cifar(CIFAR100, root, download)
    return dataset_from_splits(
        "cifar100", train, test, classes=100, val=val, augment=Augment(pad, flip, replicate),
        normalize=normalize,
    )  # fmt: skip
