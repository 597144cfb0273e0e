"""Tiny ImageNet (Stanford CS231n's class project, 2015): 200 of ImageNet's classes at 64x64 pixels.

There are 100,000 training images and 10,000 validation images. The validation images are the test split, because the
labels of the official test images are not public. `<root>/` is the published folder tiny-imagenet-200. The images are
read from train/nXXXXXXXX/images/*.JPEG and val/images/*.JPEG, and the test labels from val/val_annotations.txt. A val
folder with class folders is also accepted. Classes are sorted by name. All images are decoded once and kept in memory,
which takes 1.4 GB. The image is padded by 8 pixels, cropped at random to its original size, and mirrored with
probability 1/2. For CIFAR-10, the padding is 4 pixels.
"""

from pathlib import Path

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.dataset_files import absolute_root
from qbench.data.image_folders import SUFFIXES, ImageFiles, classes_in, dataset_from_files, find_images
from qbench.data.normalize import Normalize
from qbench.errors import DataError

CLASSES, SIDE = 200, 64
ANNOTATIONS = "val_annotations.txt"


def build(
    *,
    root: str = "data/tiny-imagenet-200",
    download: bool = False,
    cache: str = "",
    val: float = 0.1,
    pad: int = 8,
    flip: bool = True,
    replicate: bool = False,
    normalize: Normalize = "own",
) -> Dataset:
    """Return Tiny ImageNet.

    Args:
        cache: folder in which decoded images are kept, or '' to keep none.
        val: fraction of the training images that becomes the validation split.
    """
    if download:
        raise ValueError(
            "download=true: must be false; download tiny-imagenet-200.zip from cs231n.stanford.edu by hand"
        )
    top = absolute_root(root)
    classes = classes_in(top, "train")
    if len(classes) != CLASSES:
        raise DataError(
            f"{top / 'train'} contains {len(classes)} class folders, but Tiny ImageNet has {CLASSES}\n"
            f"for other images or a subset, type dataset=folder dataset.root={root}"
        )
    annotated = (top / "val" / ANNOTATIONS).is_file() and (top / "val" / "images").is_dir()
    train = find_images(top, "train", classes)
    test = _annotated_images(top, classes) if annotated else find_images(top, "val", classes, train)
    return dataset_from_files(
        "tiny_imagenet", top, train, test, classes=classes, val=val, side=SIDE,
        augment=Augment(pad, flip, replicate, size=SIDE), normalize=normalize, shape=(SIDE, SIDE),
        cache=cache,
    )  # fmt: skip


def _annotated_images(root: Path, classes: list[str]) -> ImageFiles:
    """Return the image files that val_annotations.txt lists.

    Each line contains the file name, the class and the bounding box of one image, separated by tabs.
    """
    path, names, labels = root / "val" / ANNOTATIONS, [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label not in classes or "/" in name:
            raise DataError(
                f"{path}, line {number}: must be a file name, a tab, and the name of a class folder of train/"
            )
        names.append(f"val/images/{name}")
        labels.append(classes.index(label))
    existing = {f"val/images/{entry.name}" for entry in (root / "val" / "images").iterdir()}
    unlisted = sorted(name for name in existing - set(names) if name.lower().endswith(SUFFIXES))
    if unlisted or not names:
        example = f", such as {unlisted[0]}" if unlisted else ""
        raise DataError(f"{path} lists {len(names)} images; {len(unlisted)} image files are not listed{example}")
    return ImageFiles(tuple(names), tuple(labels), len(existing - set(names)))
