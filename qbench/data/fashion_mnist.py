"""Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, 2017, arXiv 1708.07747): grey pictures of clothes, in MNIST's format.

60,000 training and 10,000 test images, 1x28x28, in ten classes of equal size: T-shirt, trouser, pullover, dress, coat,
sandal, shirt, sneaker, bag, ankle boot. Harder than MNIST: shirts resemble T-shirts, pullovers and coats.

Read from `<root>/FashionMNIST/raw/`, files named as MNIST's, or these names with .gz. Augmented as CIFAR is: a crop out
of the image padded by 4 pixels (black, as the ground is), and mirroring.
"""

from qbench.data.dataset import Augment, Dataset
from qbench.data.published import assembled, mnist


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
    """Return Fashion-MNIST; `val` is the part of the training images held out."""
    train, test = mnist("FashionMNIST", root, download)
    return assembled(
        "fashion_mnist", train, test, classes=10, val=val, augment=Augment(pad, flip, replicate),
        normalize=normalize,
    )  # fmt: skip
