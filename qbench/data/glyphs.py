"""Digits and capital letters in matplotlib's fonts; training and test images use different fonts.

By default, the images have CIFAR's shape. The images are rendered on this machine, in any number. The same seed always
gives the same images. There are 34 classes: 0-9 and A-Z without I and O. In many fonts, I looks like a 1 and O like a
0. Lowercase letters are left out, because many of them look like smaller capitals, and the size is random.

21 of matplotlib's 40 fonts have ordinary digits and letters (DejaVu Sans, Sans Mono and Serif; STIXGeneral; cmb, cmr,
cmss, cmti, cmtt). 16 of these fonts are used for training images and 5 for test images. Symbol fonts (STIXSiz*,
STIXNonUni*, cmex10, cmsy10, DejaVu*Display, LastResort) are not used. cmmi10 is not used because its digits are
old-style. The validation images are taken from the training images, so they show the training fonts.

The glyph is brighter than the background in every channel, and every image is shifted to mean 128. Both rules make the
task easier to learn. We also tried images without these rules: the glyph was randomly brighter or darker in each
channel, and the mean was random. On such images, a small network stayed at chance level for ten epochs.

`difficulty` scales these random properties: rotation, shear, size, proportions, position, loss of contrast, uneven
background, fragments of other glyphs at the border, and noise. It does not change colours and fonts. At difficulty 0,
glyphs are upright, centred and clean. A seed gives the same glyphs, fonts and colours at every difficulty and image
size.

We measured top-1 in % on the 10,000 test images (sampling error +-0.5 points) for the float baseline of this command:

    qbench dataset=glyphs model.width=16 model.stem_stride=2 dataset.difficulty=D

The network is a pre-activation ResNet-8. It was trained for 10 epochs of the 10,810 training images on one thread, with
SGD, learning rate 0.1, a cosine schedule and batches of 64. With one seed, top-1 was 95.7 at D = 1, 93.1 at D = 1.1 and
88.1 at D = 1.2. With batches of 128, and therefore half the steps, top-1 was 99.9 at D = 0.5 and 93.3 at D = 1 (mean of
three seeds, with values from 92.9 to 93.6). At D = 1.5, top-1 was 52 and still rising. The default is D = 1.1, where
float networks reach about 92 % and different bit widths give different accuracy.

Rendering 22,000 images and computing their mean and standard deviation takes 1.8 to 2.5 s on one
core.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.normalize import mean_and_std
from qbench.errors import DataError

# Shapes: N images, C channels, H height, W width; F fonts, L letters, S the side of a mask.

CLASSES = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
TEST_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    *("DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmr10", "cmti10", "cmtt10"),
)

# Number of images that are rendered at once, with each label eight times. This number is fixed, so that image i does
# not depend on the total number of images.
CHUNK = 8 * len(CLASSES)
CAPITAL_HEIGHT = 0.5  # height of an H, as a fraction of the image's side
CONTRAST = 0.5  # glyph minus background, as a fraction of the full scale
TINT = 0.1  # largest tint of a channel in either direction, as a fraction of the full scale
# Fragments of other glyphs: their number, their distance from the centre, and the spread of this distance. Distance and
# spread are in half sides.
FRAGMENTS, DISTANCE, DISTANCE_SPREAD = 2, 0.95, 0.15
# At difficulty 1:
TURN = 0.45  # largest rotation to either side, in radians
SHEAR = 0.3  # largest shear, in widths per height
SHRINK = 0.35  # largest change of log(size)
STRETCH = 0.15  # largest change of log(width), with the opposite change of log(height)
SHIFT = 0.2  # largest shift, in half sides
FADE = 1.5  # the lowest contrast is CONTRAST / (1 + FADE)
SHADE = 0.12  # unevenness of the background, as a fraction of the full scale
CLUTTER = 0.85  # highest opacity of a fragment
NOISE = 0.08  # highest standard deviation of a pixel, as a fraction of the full scale; the lowest is half as high


def build(
    *,
    train: int = 12000,
    test: int = 10000,
    size: int = 32,
    difficulty: float = 1.1,
    seed: int = 0,
    val: float = 0.1,
    pad: int = 2,
) -> Dataset:
    """Return the rendered data set.

    Args:
        train, test: number of training images (including validation images), and number of test images.
        size: height and width in pixels, 8 or more.
        difficulty: from 0 (clean) to 2. The module's docstring explains the default of 1.1.
        seed: seed of the images, 0 or more. Training and test images use separate sequences of random numbers.
        val: fraction of the training images that becomes the validation split.
        pad: number of pixels that are added on each side before the random crop. The added pixels repeat the border
            pixels, because the background is not black.
    """
    _check_minimum(0, seed=seed, pad=pad)
    _check_minimum(1, train=train, test=test)
    rendered = render(train, size=size, fonts=TRAIN_FONTS, seed=2 * seed, difficulty=difficulty)
    train_split, val_split = split_validation(rendered, val)
    mean, std = mean_and_std(train_split.images)
    return Dataset(
        name="glyphs",
        train=train_split,
        val=val_split,
        test=render(test, size=size, fonts=TEST_FONTS, seed=2 * seed + 1, difficulty=difficulty),
        classes=len(CLASSES),
        mean=mean,
        std=std,
        augment=Augment(pad=pad, replicate=True),
        synthetic=True,
    )


def render(count: int, *, size: int = 32, fonts: Sequence[str], seed: int, difficulty: float) -> Split:
    """Return `count` images uint8 (N, 3, size, size) and labels int64 (N,).

    Every image has mean 128 before clipping.

    Image i depends on `seed`, i, `size`, `difficulty` and the fonts. It does not depend on `count`, on the number of
    threads or on any global state. The bytes are the same on the same kind of CPU with the same builds of torch and
    Pillow. Each group of 34 consecutive images (0-33, 34-67, ...) contains every class once.

    Raises:
        ValueError: an argument is out of its range.
        DataError: matplotlib does not ship one of the fonts.
    """
    _check_minimum(0, seed=seed)
    _check_minimum(1, count=count, fonts=len(fonts))
    _check_minimum(8, size=size)
    if not 0 <= difficulty <= 2:
        raise ValueError(f"difficulty={difficulty}: must be 0 (clean) to 2 (hardly legible)")
    masks = _masks(fonts, 2 * size)
    chunks = [_render_chunk(masks, size, seed, k, difficulty) for k in range(-(-count // CHUNK))]
    images, labels = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    return Split(images, labels)


def _check_minimum(minimum: int, **values: int) -> None:
    for key, value in values.items():
        if value < minimum:
            raise ValueError(f"{key}={value}: must be {minimum} or more")


def _masks(fonts: Sequence[str], side: int) -> Tensor:
    """Return the centred masks of L letters in F fonts: uint8 (F, L, S, S), with S x S pixels per mask."""
    from PIL import Image, ImageDraw, ImageFont

    masks = np.zeros((len(fonts), len(CLASSES), side, side), np.uint8)
    for i, name in enumerate(fonts):
        path = _font_path(name)
        basic = ImageFont.Layout.BASIC  # do not use Raqm, which places the same letters differently
        _, top, _, bottom = ImageFont.truetype(path, 256, layout_engine=basic).getbbox("H")
        font = ImageFont.truetype(path, 256 * CAPITAL_HEIGHT * side / (bottom - top), layout_engine=basic)
        for j, letter in enumerate(CLASSES):
            left, top, right, bottom = font.getbbox(letter)
            page = Image.new("L", (side, side))
            corner = (round((side - left - right) / 2), round((side - top - bottom) / 2))
            ImageDraw.Draw(page).text(corner, letter, fill=255, font=font)
            masks[i, j] = np.asarray(page)
    return torch.from_numpy(masks)


def _font_path(font: str) -> str:
    # Not matplotlib.get_data_path(): importing matplotlib takes 0.2 s and makes a folder in the
    # user's home.
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise DataError("dataset=glyphs needs matplotlib, which is not installed: pip install matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        raise DataError(f"no font at {path}; use a font of TRAIN_FONTS or TEST_FONTS, or reinstall matplotlib")
    return str(path)


def _render_chunk(masks_FLSS: Tensor, size: int, seed: int, k: int, d: float) -> tuple[Tensor, Tensor]:
    """Return the images and labels of chunk k: uint8 (CHUNK, 3, size, size) and (CHUNK,).

    The random numbers are drawn in a fixed order. A change of this order changes all images.
    """
    generator = Generator().manual_seed(int(np.random.SeedSequence([seed, k]).generate_state(1)[0]))

    def symmetric(*shape: int) -> Tensor:  # uniform in [-1, 1)
        return torch.rand(CHUNK, *shape, generator=generator) * 2 - 1

    def uniform(*shape: int) -> Tensor:  # in [0, 1)
        return torch.rand(CHUNK, *shape, generator=generator)

    def place(label_N: Tensor, centre_N2: Tensor | float) -> Tensor:
        font_N = torch.randint(len(masks_FLSS), (CHUNK,), generator=generator)
        return _warp(masks_FLSS[font_N, label_N], symmetric(4), centre_N2 + SHIFT * d * symmetric(2), size, d)

    labels = torch.rand(CHUNK // len(CLASSES), len(CLASSES), generator=generator).argsort(1).flatten()
    ink = place(labels, 0.0)
    for _ in range(FRAGMENTS):
        angle = torch.pi * symmetric(1)
        centre = torch.cat([angle.cos(), angle.sin()], 1) * (DISTANCE + DISTANCE_SPREAD * symmetric(1))
        opacity = (CLUTTER * d * uniform(1, 1, 1)).clamp(max=1)
        other = place(torch.randint(len(CLASSES), (CHUNK,), generator=generator), centre)
        ink = ink + (1 - ink) * opacity * other
    contrast = CONTRAST / (1 + FADE * d * uniform(3, 1, 1))
    background = TINT * symmetric(3, 1, 1) + SHADE * d * _interpolate_knots(symmetric(3, 4, 4), size)
    deviation = NOISE * d * (1 + uniform(1, 1, 1)) / 2
    # The noise is drawn last, because the number of its draws depends on the image size.
    noise = deviation * torch.randn(CHUNK, 3, size, size, generator=generator)
    x = (255 * (background + contrast * ink + noise)).round_()
    # A sum of whole numbers is exact in any order, so the number of threads does not change it.
    mean = x.sum((1, 2, 3), keepdim=True, dtype=torch.float64) / x[0].numel()
    return (x - mean.round().float() + 128).clamp_(0, 255).to(torch.uint8), labels


def _interpolate_knots(knots_NC44: Tensor, size: int) -> Tensor:
    """Interpolate grids of 4x4 values linearly to (N, C, size, size).

    F.interpolate is not used, because the last bit of its results depends on the number of threads.
    """
    place = 3 * torch.arange(size) / (size - 1)
    w = (1 - (place - torch.arange(4)[:, None]).abs()).clamp(min=0)
    k = knots_NC44[..., None]
    k = k[:, :, :, 0] * w[0] + k[:, :, :, 1] * w[1] + k[:, :, :, 2] * w[2] + k[:, :, :, 3] * w[3]
    k, w = k[..., None, :], w[..., None]
    return k[:, :, 0] * w[0] + k[:, :, 1] * w[1] + k[:, :, 2] * w[2] + k[:, :, 3] * w[3]


def _warp(mask_NSS: Tensor, u_N4: Tensor, centre_N2: Tensor, size: int, d: float) -> Tensor:
    """Rotate, shear, scale and move masks of glyphs. Return values in [0, 1] of shape (N, 1, size, size).

    A pixel at position p shows the mask at position inv(turn @ shear @ scale) (p - centre).
    Coordinates are 0 in the middle of the image and 1 at its border. The products are written out,
    because torch's matrix product may sum in an order that depends on the number of threads.
    """
    turn, shear, shrink, stretch = (d * u_N4)[:, :, None, None].unbind(1)
    wide, tall = (SHRINK * shrink + STRETCH * stretch).exp(), (SHRINK * shrink - STRETCH * stretch).exp()
    cos, sin, lean = (TURN * turn).cos(), (TURN * turn).sin(), SHEAR * shear
    axis = (2 * torch.arange(size) + 1) / size - 1
    x = axis[None, None, :] - centre_N2[:, 0, None, None]
    y = axis[None, :, None] - centre_N2[:, 1, None, None]
    at_x = (cos + lean * sin) / wide * x + (sin - lean * cos) / wide * y
    at_y = cos / tall * y - sin / tall * x
    at_NHW2 = torch.stack([at_x, at_y], -1)
    return F.grid_sample(mask_NSS[:, None].float() / 255, at_NHW2, mode="bilinear", align_corners=False)
