"""One image file: conversions, resizing and crops against slow references."""

import warnings
from pathlib import Path

import image_sets
import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image

from qbench.data import images
from qbench.data.augment import Augment, random_box
from qbench.system.torchvision import torchvision

temporary_cache = image_sets.temporary_cache


def test_resizing_and_centre_crop_equal_torchvision(tmp_path: Path) -> None:
    torchvision()
    from torchvision.transforms import functional as theirs

    for width, height in ((31, 20), (20, 31), (50, 17), (16, 16), (9, 13)):
        path = tmp_path / "image.png"
        picture(width, width, height).save(path)
        for side, size in ((16, 16), (16, 11), (17, 12), (18, 7)):
            expected = np.array(theirs.center_crop(theirs.resize(Image.open(path).convert("RGB"), side), size))
            assert np.array_equal(images.load_crop(path, side, Augment(size=size), None).numpy(), expected)


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("size", [(31, 20), (20, 31), (18, 18)])
def test_a_plain_crop_equals_the_reference(size: tuple[int, int], pad: int, tmp_path: Path) -> None:
    path, augment = tmp_path / "image.png", Augment(pad, flip=True, size=12)
    picture(1, *size).save(path)
    whole = torch.from_numpy(images.decode_image(path, 16)).movedim(2, 0)
    padded = torch.zeros(3, whole.shape[1] + 2 * pad, whole.shape[2] + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + whole.shape[1], pad : pad + whole.shape[2]] = whole
    for draw in torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).tolist():
        top, left = int(draw[0] * (padded.shape[1] - 11)), int(draw[1] * (padded.shape[2] - 11))
        expected = torch.zeros(12, 12, 3, dtype=torch.uint8)
        for y in range(12):
            for x in range(12):
                expected[y, x] = padded[:, top + y, left + (11 - x if draw[2] < 0.5 else x)]
        assert torch.equal(images.load_crop(path, 16, augment, draw), expected)


def test_an_inception_crop_equals_torchvision_with_the_same_box(tmp_path: Path) -> None:
    torchvision()
    from torchvision.transforms import functional as theirs

    path, augment = tmp_path / "image.png", Augment(flip=True, size=12, area=0.08)
    picture(2, 40, 30).save(path)
    for draw in torch.rand(20, augment.draws, generator=torch.Generator().manual_seed(0)).tolist():
        top, left, rows, columns = random_box(30, 40, draw, 0.08)
        expected = theirs.resized_crop(Image.open(path), top, left, rows, columns, [12, 12])
        expected = theirs.hflip(expected) if draw[2] < 0.5 else expected
        assert np.array_equal(images.load_crop(path, 99, augment, draw).numpy(), np.array(expected))


CONVERTED = {
    "grey.png": lambda: (picture(0, 9, 8).convert("L"), picture(0, 9, 8).convert("L").convert("RGB")),
    "grey_alpha.png": lambda: (picture(0, 9, 8).convert("LA"), picture(0, 9, 8).convert("L").convert("RGB")),
    "alpha.png": lambda: (picture(0, 9, 8).convert("RGBA"), picture(0, 9, 8)),
    "bits.png": lambda: (picture(0, 9, 8).convert("1"), picture(0, 9, 8).convert("1").convert("RGB")),
    "plain.ppm": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
    "plain.bmp": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
    "plain.tif": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_images_of_all_modes_become_rgb(name: str, tmp_path: Path) -> None:
    image, expected = CONVERTED[name]()
    image.save(tmp_path / name)
    assert np.array_equal(images.decode_image(tmp_path / name), np.array(expected))


def test_sixteen_bits_cmyk_palettes_and_orientation(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(images.decode_image(tmp_path / "deep.png"), np.repeat((values >> 8)[:, :, None], 3, 2))
    picture(0, 40, 30).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    found = images.decode_image(tmp_path / "cmyk.jpg").astype(int)
    assert np.abs(found - np.array(picture(0, 40, 30)).astype(int)).mean() < 6
    flat = picture(0, 9, 8).quantize(7)
    flat.save(tmp_path / "palette.png", transparency=bytes([0, 128] + [255] * 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(images.decode_image(tmp_path / "palette.png"), np.array(flat.convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(0, 40, 30).save(tmp_path / "turned.jpg", exif=exif)
    assert images.decode_image(tmp_path / "turned.jpg").shape == (30, 40, 3), "not rotated, as in torchvision"
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floats"):
        images.decode_image(tmp_path / "float.tiff")
