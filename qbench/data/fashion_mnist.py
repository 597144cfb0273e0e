"""Fashion-MNIST: grey pictures of clothes, in MNIST's format.

H. Xiao, K. Rasul, R. Vollgraf, 2017, arXiv 1708.07747. 60,000 training and 10,000 test images,
1x28x28, in ten classes of equal size: T-shirt, trouser, pullover, dress, coat, sandal, shirt,
sneaker, bag, ankle boot. Fashion-MNIST is harder than MNIST, because shirts resemble T-shirts, pullovers and coats.

The images are read from `<root>/FashionMNIST/raw/`. The files have the names of MNIST's files, with or without .gz. As
in CIFAR-10, the image is padded by 4 black pixels, cropped at random to its original size, and mirrored with
probability 1/2.
"""

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.dataset_files import dataset_from_splits, read_mnist
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
    """Return Fashion-MNIST. The fraction `val` of the training images is held out for validation."""
    train, test = read_mnist("FashionMNIST", root, download)
    return dataset_from_splits(
        "fashion_mnist", train, test, classes=10, val=val, augment=Augment(pad, flip, replicate),
        normalize=normalize,
    )  # fmt: skip
