"""ImageNet, ILSVRC 2012: photographs in 1,000 classes.

O. Russakovsky et al., 2014, arXiv 1409.0575. ImageNet has 1,281,167 training images and 50,000 validation images. As in
the papers, the validation images are the test split, because the labels of the official test images are not public. At
a top-1 of 70 %, the sampling error of one run on 50,000 images is about 0.2 points.

The images are read from `<root>/train/nXXXXXXXX/*.JPEG` and `<root>/val/nXXXXXXXX/*.JPEG`. torchvision and most
programs use these folders. Classes are sorted by name. The images stay in their files and are decoded when they are
needed.

`augment=plain` resizes the shorter side of an image to `resize` pixels, crops `size` x `size` pixels at random and
mirrors half of the images. The code of XNOR, INQ and HWGQ does the same (HWGQ with 227 pixels). `augment=inception`
crops a random area with a random aspect ratio, and `jitter=0.4` also changes the colours. Both settings follow the
ImageNet training code of He et al. (fb.resnet.torch). tensorpack's DoReFa script follows the same code. The code of He
et al. also adds noise along the principal components of the colours. qbench does not add this noise. Evaluation uses
the centre crop of the resized image.
"""

from qbench.data.dataset import Dataset
from qbench.data.dataset_files import absolute_root
from qbench.data.folder import photo_augment
from qbench.data.image_folders import classes_in, dataset_from_files, find_images
from qbench.data.normalize import Normalize
from qbench.errors import DataError

CLASSES = 1000


def build(
    *,
    root: str = "data/imagenet",
    download: bool = False,
    cache: str = "",
    val: float = 0.01,
    size: int = 224,
    resize: int = 256,
    augment: str = "inception",
    flip: bool = True,
    jitter: float = 0.0,
    normalize: Normalize = "imagenet",
) -> Dataset:
    """Return ImageNet.

    Args:
        cache: folder in which decoded images are kept, or '' to keep none.
        val: fraction of the training images that becomes the validation split.
    """
    if download:
        raise ValueError("download=true: must be false, because image-net.org requires registration for ImageNet")
    top = absolute_root(root)
    classes = classes_in(top, "train")
    if len(classes) != CLASSES:
        raise DataError(
            f"{top / 'train'} contains {len(classes)} class folders, but ImageNet has {CLASSES}\n"
            f"for other images or a subset, type dataset=folder dataset.root={root}"
        )
    train = find_images(top, "train", classes)
    return dataset_from_files(
        "imagenet", top, train, find_images(top, "val", classes, train), classes=classes, val=val, side=resize,
        augment=photo_augment(augment, size, 0, flip, jitter), normalize=normalize, cache=cache,
    )  # fmt: skip
