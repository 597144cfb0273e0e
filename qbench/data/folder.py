"""Your own images, with one folder per class.

Training images are root/train/CLASS/IMAGE. Test images are root/val/CLASS/IMAGE or root/test/CLASS/IMAGE. The fraction
`val` of the training images becomes the validation split. Classes are the folders in train, sorted by name. Images may
also be in subfolders of a class. A link to a folder that was already read is an error.

Files with the suffix of an image format (JPEG, PNG, PPM, PGM, BMP, TIFF or WebP) are images. Other files are counted
and ignored. Grey, CMYK, palette and 16-bit images are converted to RGB. In 16-bit images, the value 65535 must mean
white. Data sets that use fewer of the 16 bits are refused. The EXIF orientation is ignored, as in torchvision.

With `test=0.2`, all images are root/CLASS/IMAGE, and a fifth of the images of each class form the test split. The test
split is the same in every run, as long as the images are the same.

With `augment=plain`, the shorter side of an image is resized to `resize` pixels. Then `size` x `size` pixels are
cropped, at a random position in training and in the centre in evaluation. With `augment=inception`, a training crop
covers a random 8 % to 100 % of the image and has a random aspect ratio from 3/4 to 4/3 (Szegedy et al. 2014, arXiv
1409.4842, section 6). The crop is resized to `size` x `size` pixels. `jitter=0.4` also changes brightness, contrast and
saturation.

With `augment=plain`, images are kept in memory if all have the same size and together fit into 2 GiB. In all other
cases, `runtime.num_workers` processes decode images when they are needed. The batches are the same in both cases.
"""

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.dataset_files import absolute_root
from qbench.data.image_folders import (
    classes_in,
    classes_of_one_folder,
    dataset_from_files,
    find_images,
    find_test_folder,
    hold_out_test,
)
from qbench.data.normalize import Normalize

MIN_AREA = {"plain": 0.0, "inception": 0.08}
"""Maps a value of `augment` to the smallest fraction of the image that a crop covers. 0 means crops of fixed size."""


def build(
    *,
    root: str = "data",
    cache: str = "",
    test: str | float = "auto",
    val: float = 0.1,
    size: int = 224,
    resize: int = 256,
    augment: str = "plain",
    pad: int = 0,
    flip: bool = True,
    jitter: float = 0.0,
    normalize: Normalize = "imagenet",
) -> Dataset:
    """Return the data set of a folder.

    Args:
        cache: folder in which decoded images are kept, or '' to keep none.
        test: name of the folder of test images. If `root` contains the class folders, `test` is the fraction of the
            images that becomes the test split.
        val: fraction of the training images that becomes the validation split.
    """
    top = absolute_root(root)
    if isinstance(test, str):
        classes = classes_in(top, "train")
        train = find_images(top, "train", classes)
        test_images = find_images(top, find_test_folder(top, test), classes, train)
    else:
        classes = classes_of_one_folder(top)
        train, test_images = hold_out_test(find_images(top, ".", classes), test)
    return dataset_from_files(
        "folder", top, train, test_images, classes=classes, val=val, side=resize,
        augment=photo_augment(augment, size, pad, flip, jitter), normalize=normalize, cache=cache,
    )  # fmt: skip


def photo_augment(name: str, size: int, pad: int, flip: bool, jitter: float) -> Augment:
    """Return the augmentation that a value of `augment` stands for."""
    if name not in MIN_AREA:
        raise ValueError(f"augment={name}: must be one of {', '.join(MIN_AREA)}")
    if pad and MIN_AREA[name]:
        raise ValueError(f"pad={pad} has no effect with augment={name}: must be 0")
    return Augment(pad, flip, size=size, area=MIN_AREA[name], jitter=jitter)
