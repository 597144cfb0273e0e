"""SVHN, Street View House Numbers (Y. Netzer et al., 2011): digits cropped out of photographs of house fronts.

The paper is "Reading Digits in Natural Images with Unsupervised Feature Learning"; this is the set's format 2: 3x32x32,
ten classes, the digit in the middle, its neighbours often at the sides. 73,257 training and 26,032 test images, and
531,131 easier ones, "extra". Papers differ in what they train on: DoReFa on train and extra mixed, PACT on train alone.
`split` says which: train, extra or both; "both" takes 1.9 GB, and 4.5 GB while it is read.

Read from `<root>/`: train_32x32.mat, extra_32x32.mat, test_32x32.mat, with scipy. Digit 0, which the files call 10, is
class 0. The random crop out of an image padded by 4 pixels is CIFAR's; digits are not mirrored, so there is no `flip`.
"""

from qbench.data.dataset import Augment, Dataset
from qbench.data.published import assembled, svhn

SPLITS = {"train": ("train",), "extra": ("extra",), "both": ("train", "extra")}


def build(
    *,
    root: str = "data",
    download: bool = False,
    split: str = "train",
    val: float = 0.1,
    pad: int = 4,
    replicate: bool = False,
) -> Dataset:
    """Return SVHN; `val` is the part of the images of `split` held out."""
    if split not in SPLITS:
        raise ValueError(f"split={split}: allowed are {', '.join(SPLITS)}")
    train, test = svhn(SPLITS[split], root, download)
    return assembled("svhn", train, test, classes=10, val=val, augment=Augment(pad, replicate=replicate))
