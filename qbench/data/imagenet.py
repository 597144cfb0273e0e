"""ImageNet, ILSVRC 2012 (O. Russakovsky et al., 2014, arXiv 1409.0575): photographs in 1,000 classes.

1,281,167 training images and 50,000 validation images, which are the test split here, as in all papers: the real test
labels are not public. With 50,000 images one run's sampling error is about 0.2 points at 70 %.

Read from `<root>/train/nXXXXXXXX/*.JPEG` and `<root>/val/nXXXXXXXX/*.JPEG`, the layout that torchvision and most others
use; classes are sorted by name. The images stream from their files. `augment=plain`: the shorter side is resized to
`resize`, a crop of `size` pixels taken at random, mirrored (XNOR's code, INQ's; HWGQ's, of 227); `augment=inception`:
crops of random area and aspect, with `jitter=0.4` for the colours (He's ImageNet training code in Torch,
fb.resnet.torch, which tensorpack's DoReFa script follows, with noise along the colours' principal components too; that
is not here). Evaluated is the centre crop of the resized image.
"""

from qbench.data.dataset import Dataset
from qbench.data.folder import photo_augment
from qbench.data.folders import assembled_from_files, classes_in, find_images
from qbench.data.published import absolute
from qbench.errors import DataError

CLASSES = 1000


def build(
    *,
    root: str = "data/imagenet",
    download: bool = False,
    val: float = 0.01,
    size: int = 224,
    resize: int = 256,
    augment: str = "inception",
    flip: bool = True,
    jitter: float = 0.0,
    normalize: str = "imagenet",
) -> Dataset:
    """Return ImageNet; `val` is the part of the training images held out."""
    if download:
        raise ValueError("download=true: allowed is false; image-net.org hands ImageNet out to those who register")
    top = absolute(root)
    classes = classes_in(top / "train")
    if len(classes) != CLASSES:
        raise DataError(
            f"{top / 'train'} holds {len(classes)} class folders; ImageNet has {CLASSES}\n"
            f"for a part of it, or other images, type dataset=folder dataset.root={root}"
        )
    return assembled_from_files(
        "imagenet", top, find_images(top, "train", classes), find_images(top, "val", classes), classes=CLASSES, val=val,
        side=resize, augment=photo_augment(augment, size, 0, flip, jitter), normalize=normalize,
    )  # fmt: skip
