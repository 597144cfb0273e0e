"""Your own images, with one folder per class.

The files are root/train/CLASS/*.jpg, and root/val/CLASS/*.jpg or root/test/CLASS/*.jpg. Classes are the folders of
train, sorted by name. Images may be in subfolders. A link to a folder that is read already is refused. Files with the
suffix of an image format (JPEG, PNG, PPM, PGM, BMP, TIFF or WebP) are images. Other files are counted and ignored.
Grey, CMYK, palette and 16-bit images become RGB. White is 65535 in 16-bit images, and sets that use fewer bits are
refused. The EXIF orientation is ignored, as in torchvision. The validation split is the share `val` of the images in
the folder train. The test split is the folder val or test.

With `test=0.2`, the files are root/CLASS/*.jpg. The test split is a fifth of the images of each class, always the same
images.

With `augment=plain`, the shorter side is resized to `resize`. Then `size` x `size` pixels are
cropped, at random in training and in the centre in evaluation. With `augment=inception`, training
crops have a random area, 8 % to 100 % of the image, and a random aspect, 3/4 to 4/3 (Szegedy et al.
2014, arXiv 1409.4842, section 6). They are resized to `size`. `jitter=0.4` also changes brightness,
contrast and saturation.

Images are kept in memory if all have the same size and together fit into 2 GiB. Otherwise, and always with
`augment=inception`, `runtime.num_workers` processes decode them when they are needed. Both ways give the same batches.
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
"""Maps a value of `augment` to the smallest share of the image in a crop, or to 0 for crops of fixed size."""


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
        cache: folder for decoded images, or nothing.
        test: folder of the test images, or the share of test images in one folder of classes.
        val: share of the training images in the validation split.
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
        "folder", top, train, test_images, classes=len(classes), val=val, side=resize,
        augment=photo_augment(augment, size, pad, flip, jitter), normalize=normalize, cache=cache,
    )  # fmt: skip


def photo_augment(name: str, size: int, pad: int, flip: bool, jitter: float) -> Augment:
    """Return the augmentation for a value of `augment`."""
    if name not in MIN_AREA:
        raise ValueError(f"augment={name}: must be one of {', '.join(MIN_AREA)}")
    if pad and MIN_AREA[name]:
        raise ValueError(f"pad={pad} has no effect with augment={name}: must be 0")
    return Augment(pad, flip, size=size, area=MIN_AREA[name], jitter=jitter)
