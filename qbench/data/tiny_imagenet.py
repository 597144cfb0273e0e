"""Tiny ImageNet (Stanford CS231n's class project, 2015): 200 of ImageNet's classes at 64x64 pixels.

100,000 training images and 10,000 validation images, which are the test split here: the labels of its own test images
are not public. Read from `<root>/`, the folder tiny-imagenet-200 as published: train/nXXXXXXXX/images/*.JPEG,
val/images/*.JPEG and val/val_annotations.txt; or with val in class folders, as many have sorted it. Classes are sorted
by name. All images are decoded once and kept in memory, 1.4 GB. The augmentation is CIFAR's with twice the pixels: a
crop out of the image padded by 8, and mirroring.
"""

from pathlib import Path

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.folders import SUFFIXES, ImageFiles, assembled_from_files, classes_in, find_images
from qbench.data.published import absolute
from qbench.errors import DataError

CLASSES, SIDE = 200, 64
ANNOTATIONS = "val_annotations.txt"


def build(
    *,
    root: str = "data/tiny-imagenet-200",
    download: bool = False,
    val: float = 0.1,
    pad: int = 8,
    flip: bool = True,
    replicate: bool = False,
    normalize: str = "own",
) -> Dataset:
    """Return Tiny ImageNet; `val` is the part of the training images held out."""
    if download:
        raise ValueError(
            "download=true: allowed is false; fetch tiny-imagenet-200.zip from cs231n.stanford.edu by hand"
        )
    top = absolute(root)
    classes = classes_in(top / "train")
    if len(classes) != CLASSES:
        raise DataError(
            f"{top / 'train'} holds {len(classes)} class folders; Tiny ImageNet has {CLASSES}\n"
            f"for a part of it, or other images, type dataset=folder dataset.root={root}"
        )
    annotated = (top / "val" / ANNOTATIONS).is_file() and (top / "val" / "images").is_dir()
    test = _annotated(top, classes) if annotated else find_images(top, "val", classes)
    return assembled_from_files(
        "tiny_imagenet", top, find_images(top, "train", classes), test, classes=CLASSES, val=val, side=SIDE,
        augment=Augment(pad, flip, replicate, size=SIDE), normalize=normalize, shape=(SIDE, SIDE),
    )  # fmt: skip


def _annotated(root: Path, classes: list[str]) -> ImageFiles:
    """Return the images that val_annotations.txt lists: a line each, file, class and box parted by tabs."""
    path, names, labels = root / "val" / ANNOTATIONS, [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label not in classes or "/" in name:
            raise DataError(f"{path}, line {number}: expected are a file's name, a tab and one of train's classes")
        names.append(f"val/images/{name}")
        labels.append(classes.index(label))
    here = {f"val/images/{entry.name}" for entry in (root / "val" / "images").iterdir()}
    unlisted = sorted(name for name in here - set(names) if name.lower().endswith(SUFFIXES))
    if unlisted or not names:
        such = f", such as {unlisted[0]}" if unlisted else ""
        raise DataError(f"{path} lists {len(names)} images; without a line there are {len(unlisted)}{such}")
    return ImageFiles(tuple(names), tuple(labels), len(here - set(names)))
