"""The embedded default: scikit-learn's handwritten digits, 1,797 real images of 8x8 pixels in ten classes.

They are the test part of the "Optical Recognition of Handwritten Digits" set (UCI; E. Alpaydin, C. Kaynak, 1998), with
grey values 0 to 16. A quarter of each class is the test split, always the same images. An error of one image is 0.22
points of top-1, and one run's sampling error is about 0.7 points at 97.5 %: differences below a point are decided over
seeds at best, not by one run.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from qbench.data.dataset import Augment, Dataset, Split, mean_and_std, split_validation

TEST = 0.25


def read() -> Split:
    """Return all 1,797 images as (1797, 1, 8, 8) with grey values 0, 15, ..., 240, and their labels.

    The file is read where scikit-learn installs it, without importing scikit-learn, which takes a second.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-learn is not installed, and the digits are its file; pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8) * 15).to(torch.uint8)
    return Split(images, torch.from_numpy(table[:, -1].copy()))


def build(*, val: float = 0.1, pad: int = 1) -> Dataset:
    """Return the digits; `val` is the part of the training images held out, `pad` the random shift in pixels."""
    if not 0 <= pad < 8:
        raise ValueError(f"pad={pad}: allowed are 0 to 7 pixels")
    rest, test = split_validation(read(), TEST)
    train, held = split_validation(rest, val)
    mean, std = mean_and_std(train.images)
    return Dataset(
        name="digits",
        train=train,
        val=held,
        test=test,
        classes=10,
        mean=mean,
        std=std,
        augment=Augment(pad=pad),
    )
