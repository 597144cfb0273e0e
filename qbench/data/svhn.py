"""SVHN, Street View House Numbers: digits cropped from photographs of house fronts.

Y. Netzer et al., 2011, "Reading Digits in Natural Images with Unsupervised Feature Learning". This is format 2 of the
data set: 3x32x32 images in ten classes. The digit is in the middle, and neighbouring digits are often visible at the
sides. There are 73,257 training images, 26,032 test images and 531,131 easier images, named "extra". Papers train on
different parts: DoReFa uses train and extra together, PACT uses train alone. `split` selects train, extra or both.
`split=both` takes 1.9 GB of memory, or 2.9 GB with size=40. Reading the files takes twice as much memory.

The files are train_32x32.mat, extra_32x32.mat and test_32x32.mat in `<root>/`. Reading them needs scipy. The digit 0
has the label 10 in the files, but is class 0 in qbench. As for CIFAR, the image is padded by 4 pixels and cropped at
random to its original size. There is no `flip`, because mirrored digits are not digits.

DoReFa's training script (tensorpack, examples/DoReFa-Net/svhn-digit-dorefa.py) resizes to 40x40, changes brightness by
up to 30 grey values, multiplies the contrast by 0.5 to 1.5, divides by 256 and does not crop. To do the same, set
`size=40 brightness=30 contrast=0.5 normalize=by256 pad=0 split=both val=0`. One difference remains: after each change,
the script rounds to whole grey values, and qbench does not round.
"""

import torch
import torch.nn.functional as F

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split
from qbench.data.dataset_files import dataset_from_splits, read_svhn
from qbench.data.normalize import Normalize

SIDE = 32
"""Height and width of the images in the files, in pixels."""
CHUNK = 10_000
"""Number of images that are resized at once."""
SPLITS = {"train": ("train",), "extra": ("extra",), "both": ("train", "extra")}
"""Maps a value of `split` to parts of SVHN."""


def build(
    *,
    root: str = "data",
    download: bool = False,
    split: str = "train",
    val: float = 0.1,
    pad: int = 4,
    replicate: bool = False,
    size: int = SIDE,
    brightness: float = 0.0,
    contrast: float = 0.0,
    normalize: Normalize = "own",
) -> Dataset:
    """Return SVHN. The fraction `val` of the images in `split` is held out for validation."""
    if split not in SPLITS:
        raise ValueError(f"split={split}: must be one of {', '.join(SPLITS)}")
    if size < 1:
        raise ValueError(f"size={size}: must be 1 or more (the images in the files have {SIDE} pixels)")
    augment = Augment(pad, replicate=replicate, brightness=brightness, contrast=contrast)
    train, test = (resize_split(part, size) for part in read_svhn(SPLITS[split], root, download))
    return dataset_from_splits("svhn", train, test, classes=10, val=val, augment=augment, normalize=normalize)


def resize_split(split: Split, size: int) -> Split:
    """Return the split with images resized to `size` x `size` by bilinear interpolation. The values are rounded."""
    if split.images.shape[2:] == (size, size):
        return split
    chunks = (F.interpolate(x.float(), (size, size), mode="bilinear") for x in torch.split(split.images, CHUNK))
    return Split(torch.cat([chunk.round_().to(torch.uint8) for chunk in chunks]), split.labels)
