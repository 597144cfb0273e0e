"""MNIST: handwritten digits.

Y. LeCun, C. Cortes, C. J. C. Burges, 1998. The digits come from NIST's forms. 60,000 training and 10,000 test images,
1x28x28, in ten classes of about equal size. Each digit fits into a box of 20x20 pixels, which is placed on black so
that the digit's centre of mass is in the middle. Most networks reach more than 99 %, so methods hardly differ here.

The images are read from `<root>/MNIST/raw/`: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
and t10k-labels-idx1-ubyte, or these names with .gz. By default, images are not augmented, as in most papers. `pad=2`
shifts images at random by up to 2 pixels. This shift rarely cuts off a part of a digit. There is no `flip`, because
mirrored digits are not digits.
"""

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.dataset_files import dataset_from_splits, read_mnist
from qbench.data.normalize import Normalize


def build(
    *, root: str = "data", download: bool = False, val: float = 0.1, pad: int = 0, normalize: Normalize = "own"
) -> Dataset:
    """Return MNIST. The fraction `val` of the training images is held out for validation."""
    train, test = read_mnist("MNIST", root, download)
    return dataset_from_splits("mnist", train, test, classes=10, val=val, augment=Augment(pad), normalize=normalize)
