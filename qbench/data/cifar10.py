"""CIFAR-10: small colour photographs in ten classes.

A. Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images". 50,000 training and
10,000 test images, 3x32x32, in ten classes of equal size: airplane, automobile, bird, cat, deer,
dog, frog, horse, ship, truck. At a top-1 of 92 % on 10,000 test images, the sampling error of one
run is about 0.5 points.

The images are read from `<root>/cifar-10-batches-py/`, which has the files of the Python version:
data_batch_1 to data_batch_5, test_batch and batches.meta. The augmentation is that of He et al.
2015 (arXiv 1512.03385, section 4.2): the image is padded by 4 black pixels, cropped at random to
its original size, and mirrored with probability 1/2. With `replicate`, the padding repeats the
border pixels.
"""

from qbench.data.augment import Augment
from qbench.data.cifar_files import CIFAR10, read_cifar
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
    """Return CIFAR-10. The fraction `val` of the training images is held out for validation."""
    train, test = read_cifar(CIFAR10, root, download)
    return dataset_from_splits(
        "cifar10", train, test, classes=10, val=val, augment=Augment(pad, flip, replicate),
        normalize=normalize,
    )  # fmt: skip
