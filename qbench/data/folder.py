"""Images of your own, in one folder a class: root/train/CLASS/*.jpg, and root/val/CLASS or root/test/CLASS.

Classes are the folders of train, sorted by name; images may lie deeper. JPEG, PNG, PPM, PGM, BMP, TIFF and WebP count
as images by their suffix, other files are counted and passed over. Grey, CMYK, palette and 16-bit images become RGB;
EXIF's orientation is ignored, as torchvision ignores it. Train is parted by `val` for selection; the other folder is
the test split.

The shorter side is resized to `resize`, and `size` x `size` pixels are cropped: at random in training, in the centre in
evaluation (`augment=plain`). `augment=inception` trains on crops of random area, 8 % of the image to all, and aspect,
3/4 to 4/3 (Szegedy et al. 2014, arXiv 1409.4842, section 6), resized to `size`. `jitter=0.4` changes brightness,
contrast and saturation too.

Images that all have the same height and width and fit into 2 GiB are kept in memory (not with `augment=inception`);
others are decoded by `runtime.num_workers` processes as they are wanted. The batches are the same either way.
"""

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.folders import assembled_from_files, classes_in, evaluated_part, find_images
from qbench.data.published import absolute

AREAS = {"plain": 0.0, "inception": 0.08}


def build(
    *,
    root: str = "data",
    test: str = "auto",
    val: float = 0.1,
    size: int = 224,
    resize: int = 256,
    augment: str = "plain",
    pad: int = 0,
    flip: bool = True,
    jitter: float = 0.0,
    normalize: str = "imagenet",
) -> Dataset:
    """Return the images of a folder; `val` is the part of the training images held out."""
    top = absolute(root)
    classes = classes_in(top / "train")
    train = find_images(top, "train", classes)
    tested = find_images(top, evaluated_part(top, test), classes)
    return assembled_from_files(
        "folder", top, train, tested, classes=len(classes), val=val, side=resize,
        augment=photo_augment(augment, size, pad, flip, jitter), normalize=normalize,
    )  # fmt: skip


def photo_augment(name: str, size: int, pad: int, flip: bool, jitter: float) -> Augment:
    """Return what a value of `augment` stands for."""
    if name not in AREAS:
        raise ValueError(f"augment={name}: allowed are {', '.join(AREAS)}")
    if pad and AREAS[name]:
        raise ValueError(f"pad={pad} has no effect with augment={name}: allowed is 0")
    return Augment(pad, flip, size=size, area=AREAS[name], jitter=jitter)
