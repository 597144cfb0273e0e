"""Data sets of users: arrays, tensors and torch data sets, 8-bit or float, with transforms that are random or not."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Configure
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from qbench.analysis.evaluate import Expected, other_dataset
from qbench.data import own_data
from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.dataset_check import check_dataset, repeated_images
from qbench.data.drawn_split import DrawnSplit
from qbench.data.loader import Loader
from qbench.data.own_data import as_dataset
from qbench.errors import ConfigError, DataError
from qbench.experiment.builders import images_sha256
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.training.random_state import random_state

CPU = torch.device("cpu")
LABELS = torch.arange(40) % 4
IMAGES = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FLOATS = (IMAGES.float() / 255 - 0.5) / 0.25


class Items:
    """A map-style data set as torchvision's: images of PIL or tensors, with a transform."""

    def __init__(self, transform: Callable[[Any], Any] = lambda image: image, images: Tensor = IMAGES) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(LABELS[index])


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.movedim(0, 2).numpy())


def normalized(image: Tensor) -> Tensor:
    return (image.float() / 255 - 0.5) / 0.25


SHIFTS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": lambda: float(np.random.rand()),
    "python": random.random,
}


def shifted(library: str) -> Callable[[Tensor], Tensor]:
    return lambda image: normalized(image) + SHIFTS[library]()


def first_batch(data: Dataset, epoch: int = 0, seed: int = 0) -> Tensor:
    return next(Loader(data, 8, seed, CPU).train(epoch))[0]


UINT8: dict[str, Any] = {
    "tensors": (IMAGES, LABELS),
    "arrays": (IMAGES.numpy(), LABELS.numpy()),
    "labels of another integer type": (IMAGES.numpy(), LABELS.numpy().astype(np.int32)),
    "labels uint8": (IMAGES, LABELS.to(torch.uint8)),
    "a list of both": [IMAGES, LABELS],
    "tensors of a torch data set": Items(),
    "images of PIL": Items(to_pil),
    "torch's own data set": torch.utils.data.TensorDataset(IMAGES, LABELS),
    "a part of a data set": torch.utils.data.Subset(Items(), range(40)),
}  # type: ignore[arg-type]


@pytest.mark.parametrize("form", UINT8)
def test_8_bit_images_in_all_forms_give_one_data_set(form: str) -> None:
    train, val = split_validation(Split(IMAGES, LABELS), 0.2)
    data = as_dataset("mine:data", (UINT8[form], UINT8["tensors"]), 0.2)
    check_dataset(data, "mine:data")
    assert isinstance(data.train, Split)
    assert torch.equal(data.train.images, train.images)
    assert torch.equal(data.val.labels, val.labels)
    assert data.classes == 4
    grey = train.images.double() / 255
    torch.testing.assert_close(torch.tensor(data.mean), grey.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(data.std), grey.std((0, 2, 3), correction=0).float())


FLOAT: dict[str, Any] = {
    "tensors": (FLOATS, LABELS),
    "float64": (FLOATS.double().numpy(), LABELS.numpy()),
    "torch data set": Items(normalized),
}


@pytest.mark.parametrize("form", FLOAT)
def test_float_images_reach_the_network_unchanged(form: str) -> None:
    data = as_dataset("mine:data", (FLOAT[form], FLOAT[form], FLOAT[form]), 0.1)
    check_dataset(data, "mine:data")
    assert isinstance(data.train, Split)
    before = data.train.images.clone()
    loader = Loader(data, 8, 0, CPU)
    for part in ("train", "val", "test"):
        seen = torch.cat([images for images, _ in loader.unaugmented(part, size=7)])
        torch.testing.assert_close(seen, FLOATS, rtol=0, atol=1e-6)
    for images, labels in loader.train(0):
        for image, label in zip(images, labels, strict=True):
            assert label == LABELS[(FLOATS - image).flatten(1).abs().amax(1).argmin()]
    assert torch.equal(data.train.images, before), "stored images must not change"
    low, high = data.image_range
    torch.testing.assert_close(torch.tensor(low), FLOATS.amin((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(high), FLOATS.amax((0, 2, 3)))


@pytest.mark.parametrize("mode", ["P", "PA", "CMYK", "HSV", "YCbCr", "RGBX"])
def test_images_of_pil_in_other_colours_are_those_in_rgb(mode: str) -> None:
    """The pixels of a palette image are numbers of colours. Two colours survive every conversion."""
    white = (IMAGES[:, :1].expand(-1, 3, -1, -1) > 127).to(torch.uint8) * 255
    items = Items(lambda x: to_pil(x).convert("P" if mode == "PA" else mode).convert(mode), white)
    data = as_dataset("mine:data", (items, items), 0.1)
    assert isinstance(data.test, Split)
    assert data.test.images.shape == white.shape
    assert int((data.test.images.int() - white.int()).abs().max()) <= 2


def test_an_image_that_has_no_conversion_to_rgb_is_refused() -> None:
    items = Items(lambda x: Image.new("La", (6, 6)))
    with pytest.raises(DataError, match=r"train: image 0: conversion .*\nconvert it to RGB or L"):
        as_dataset("mine:data", (items, items), 0.1)


def test_the_mean_is_that_of_evenly_spaced_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images may be sorted by class."""
    monkeypatch.setattr(own_data, "STATISTICS_IMAGES", 25)
    images = torch.zeros(40, 3, 6, 6, dtype=torch.uint8)
    images[25:] = 255
    data = as_dataset("mine:data", (Items(lambda image: image.roll(random.randrange(2), 1), images), Items()), 0)
    assert isinstance(data.train, DrawnSplit)
    assert data.mean == pytest.approx((15 / 40,) * 3, abs=0.03)


def test_float_images_of_a_data_set_are_normalized_on_their_own_scale() -> None:
    split = Split(FLOATS, LABELS)
    data = Dataset(name="x", train=split, val=split, test=split, classes=4, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 5.0))
    check_dataset(data, "x")
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    (images, _) = next(Loader(data, 8, 0, CPU).unaugmented("test"))
    torch.testing.assert_close(images, (FLOATS - mean) / std)
    assert torch.equal(split.images, (IMAGES.float() / 255 - 0.5) / 0.25)
    low, _ = data.image_range
    torch.testing.assert_close(torch.tensor(low), ((FLOATS - mean) / std).amin((0, 2, 3)))


@pytest.mark.parametrize("library", SHIFTS)
def test_a_random_transform_is_drawn_in_every_epoch_from_the_seed(library: str) -> None:
    data = as_dataset("mine:data", (Items(shifted(library)), Items(normalized)), 0.2)
    check_dataset(data, "mine:data")
    assert isinstance(data.train, DrawnSplit)
    assert isinstance(data.test, Split)
    assert (len(data.train), len(data.val)) == (32, 8)
    before = random_state()
    once, again = first_batch(data), first_batch(data)
    after = random_state()
    assert str(before) == str(after), "training's own random numbers do not depend on the transform"
    assert torch.equal(once, again)
    assert not torch.equal(once, first_batch(data, epoch=1))
    assert not torch.equal(once, first_batch(data, seed=1))
    loader = Loader(data, 8, 0, CPU)
    batches = list(loader.train(0))
    assert torch.equal(batches[2][0], next(loader.train(0, start=2))[0]), "a run continues with the same images"
    for images, labels in loader.train(1):
        for image, label in zip(images, labels, strict=True):
            difference = (image - FLOATS).flatten(1)
            spread = difference.amax(1) - difference.amin(1)  # 0 for the image itself, which is shifted as a whole
            assert spread.min() < 1e-5
            assert label == LABELS[spread.argmin()]
    evaluated = [torch.cat([x for x, _ in loader.unaugmented("val")]) for _ in range(2)]
    assert torch.equal(*evaluated)
    other = as_dataset("mine:data", (Items(shifted(library)), Items(normalized)), 0.2)
    assert other.fingerprint() == data.fingerprint()
    changed = as_dataset("mine:data", (Items(shifted(library), 255 - IMAGES), Items(normalized)), 0.2)
    assert changed.fingerprint() != data.fingerprint()


class RarelyOwn:
    """Inverts one image of `every`, by a count or a seeded generator of its own."""

    def __init__(self, every: int, seed: int | None) -> None:
        self.every, self.reads, self.rng = every, 0, None if seed is None else np.random.default_rng(seed)

    def __call__(self, image: Tensor) -> Tensor:
        self.reads += 1
        inverted = self.reads % self.every == 0 if self.rng is None else self.rng.random() < 1 / self.every
        return 255 - image if inverted else image


@pytest.mark.parametrize(("every", "seed"), [(25, None), (101, None), (50, 1), (50, 2)])
def test_a_transform_that_rarely_draws_from_its_own_generator_is_refused(every: int, seed: int | None) -> None:
    """In memory, each image would stay as it was first drawn."""
    items = torch.utils.data.ConcatDataset([Items(RarelyOwn(every, seed))] * 25)
    with pytest.raises(DataError, match="changes whenever it is read"):
        as_dataset("mine:data", (items, PAIR), 0.1)


def test_a_data_set_that_does_not_fit_into_memory_is_read_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = as_dataset("mine:data", (Items(to_pil), Items(to_pil)), 0.2)
    monkeypatch.setattr(own_data, "MAX_MEMORY", 100)
    read = as_dataset("mine:data", (Items(to_pil), Items(to_pil)), 0.2)
    assert isinstance(read.train, DrawnSplit)
    assert (read.mean, read.std, read.image_range) == (kept.mean, kept.std, kept.image_range)
    assert torch.equal(first_batch(read), first_batch(kept))
    assert len(repeated_images(read)) == len(repeated_images(kept)) == 1


class OwnGenerator:
    """Draws from a generator that nobody seeds."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def __call__(self, image: Tensor) -> Tensor:
        return normalized(image) + self.rng.random()


class NoLength(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


PAIR = (IMAGES, LABELS)
EXPECTED = (
    "expected: a Dataset, or (train, test) or (train, val, test), each of them (images, labels) or a torch data set"
)
WRONG: dict[str, tuple[Any, str, str]] = {
    "nothing": (None, "returned a NoneType", EXPECTED),
    "one split": (PAIR, "returned a tuple of 2: Tensor, Tensor", EXPECTED),
    "four tensors": ((*PAIR, *PAIR), "returned a tuple of 4: Tensor, Tensor, Tensor, Tensor", EXPECTED),
    "a dictionary": ({"train": PAIR}, "returned a dict", EXPECTED),
    "names of files": (("train.npz", "test.npz"), "train is a str", EXPECTED),
    "loaders": (
        (torch.utils.data.DataLoader(Items()), PAIR),  # type: ignore[arg-type]
        "train is a DataLoader; instead of a DataLoader, return its dataset",
        EXPECTED,
    ),
    "an iterable data set": ((NoLength(), PAIR), "train is a NoLength", EXPECTED),
    "images without labels": ((IMAGES, IMAGES, IMAGES), "returned a tuple of 3", EXPECTED),
    "grey images without channels": (
        ((IMAGES[:, 0], LABELS), PAIR), "train: images are (40, 6, 6): must be (N, C, H, W)", "images[:, None]",
    ),
    "channels last": (
        ((IMAGES.movedim(1, 3).numpy(), LABELS), PAIR), "train: images are (40, 6, 6, 3): must be (N, C, H, W)",
        "images.transpose(0, 3, 1, 2)",
    ),
    "two channels last": (
        ((IMAGES.movedim(1, 3)[..., :2], LABELS), PAIR), "train: images are (40, 6, 6, 2): must", "permute",
    ),
    "five channels last": (
        ((torch.zeros(40, 6, 6, 5, dtype=torch.uint8), LABELS), PAIR), "images are (40, 6, 6, 5): must be", "permute",
    ),
    "many channels last": (
        ((torch.zeros(40, 6, 6, 20), LABELS), PAIR), "images are (40, 6, 6, 20): must", "if the shape is right, return",
    ),
    "items with channels last": (
        (Items(lambda x: x.movedim(0, 2)), PAIR), "image 0 is (6, 6, 3): must be (C, H, W)", "permute(2, 0, 1)",
    ),
    "items with two channels last": (
        (Items(lambda x: x.movedim(0, 2)[..., :2]), PAIR), "image 0 is (6, 6, 2): must be (C, H, W)", "permute",
    ),
    "int64 images": (((IMAGES.long(), LABELS), PAIR), "torch.int64 (40, 3, 6, 6): must be uint8 (N, C", "float()"),
    "float labels": (((IMAGES, LABELS.float()), PAIR), "labels of a split are torch.float32 (40,)", "labels.long()"),
    "one-hot labels": (((IMAGES, torch.eye(4)[LABELS].long()), PAIR), "int64 (40, 4): must be int64", "argmax(1)"),
    "more images than labels": (((IMAGES, LABELS[1:]), PAIR), "train: a split has 40 images but 39 labels", ""),
    "items without labels": ((Items(), [IMAGES[0], IMAGES[1], IMAGES[2]]), "test is a list of 3", EXPECTED),
    "arrays as items": ((Items(lambda x: x.numpy()), PAIR), "train: image 0 is a ndarray: must be", "ToTensor()"),
    "another size": (
        (Items(lambda x: x[:, : 3 + int(x[0, 0, 0]) % 3]), PAIR), "train: image ", "Resize and CenterCrop",
    ),
    "an unseeded generator": ((Items(OwnGenerator()), PAIR), "changes whenever it is read", "torch's generator"),
    "floats from 0 to 255": (
        ((IMAGES.float(), LABELS), (IMAGES.float(), LABELS)), "train: the float images are whole numbers from 0 to 255",
        "astype('uint8')",
    ),
    "nan": (((FLOATS / 0, LABELS), (FLOATS, LABELS)), "train: the images contain inf or nan", ""),
    "two types": (((FLOATS, LABELS), PAIR), "test: images are torch.uint8, but train images are torch.float32", ""),
    "all labels from 1": (((IMAGES, LABELS + 1),) * 2, "labels are 1 to 4: must start at 0", "labels - 1"),
    "all labels from 5": (((IMAGES, LABELS + 5),) * 3, "labels are 5 to 8: must start at 0", "labels - 5"),
    "items from 1": (
        (torch.utils.data.TensorDataset(IMAGES, LABELS + 1),) * 2, "labels are 1 to 4: must start at 0", "labels - 1",
    ),
    "labels from 1": (((IMAGES, LABELS), (IMAGES, LABELS + 1)), "test: labels are 1 to 4: must be 0", "labels - 1"),
}  # fmt: skip


@pytest.mark.parametrize(
    "shape", [(1, 1, 9), (1, 9, 2), (3, 3, 5), (2, 2, 9), (2, 9, 9), (8, 6, 6), (16, 4, 9), (9, 9, 9)]
)
def test_shapes_with_channels_first_are_taken(shape: tuple[int, ...]) -> None:
    images = torch.rand(40, *shape)
    data = as_dataset("mine:data", ((images, LABELS), torch.utils.data.TensorDataset(images, LABELS)), 0.1)
    assert data.shape == data.test.shape == shape


@pytest.mark.parametrize("case", WRONG)
def test_other_forms_are_refused_with_the_expected_form(case: str) -> None:
    returned, found, fix = WRONG[case]
    with pytest.raises(DataError) as raised:
        check_dataset(as_dataset("mine:data", returned, 0.1), "mine:data")
    message = str(raised.value)
    assert found in message
    assert fix in message
    assert len(message.splitlines()) <= 2


MODULE = """
import torch
from torch.utils.data import Dataset
from qbench.data import synthetic

class Noisy(Dataset):
    def __init__(self, split, noise):
        self.split, self.noise = split, noise
    def __len__(self):
        return len(self.split)
    def __getitem__(self, index):
        image = self.split.images[index] / 255 - 0.5
        return image + self.noise * torch.rand(()), self.split.labels[index]

def source():
    return synthetic.build(train=80, test=40, classes=4, channels=1, size=8, val=0.0)

def arrays():
    data = source()
    return (data.train.images.numpy(), data.train.labels), (data.test.images, data.test.labels)

def noisy(*, noise=0.1, val=0.2):
    data = source()
    return Noisy(data.train, noise), Noisy(data.test, 0.0)

def whole():
    return source()
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "users_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    short = ["epochs=2", "pretrain.epochs=2", "optim.batch_size=16", "pretrain.optim.batch_size=16"]
    return ["model=mlp", "model.width=8", "method=lsq", "layers.first=8", *short, "runtime.tensorboard=false"]


@pytest.mark.parametrize(("function", "val"), [("arrays", 8), ("noisy", 16)])
def test_a_run_on_data_of_a_user_is_repeated_bit_for_bit(
    configure: Configure, words: list[str], function: str, val: int, tmp_path: Path
) -> None:
    """The first layer rounds the image over the range of the training images."""
    digests = set()
    for place in ("a", "b"):
        config = configure(*words, f"dataset=users_data:{function}", f"out={tmp_path / place}")
        assert len(assemble(config).data.val) == val
        result = run(planned_run(config))
        assert (result.status, result.levels) == ("done", 4)
        digests.add(result.state_sha256)
    assert len(digests) == 1


def test_the_share_of_validation_images_is_a_key(configure: Configure, words: list[str]) -> None:
    shares = [assemble(configure(*words, "dataset=users_data:arrays", *more)) for more in ([], ["dataset.val=0.25"])]
    assert [len(setup.data.val) for setup in shares] == [8, 20]
    default = planned_run(configure(*words, "dataset=users_data:arrays")).identity
    assert "val" not in default.keys["dataset"], "an added key is no part of the identity at its default"
    with pytest.raises(ConfigError, match=r"dataset\.val=0\.25 has no effect, because users_data:whole returns a val"):
        assemble(configure(*words, "dataset=users_data:whole", "dataset.val=0.25"))


def test_float_and_8_bit_images_are_not_exchanged_in_evaluation(configure: Configure) -> None:
    digits = configure("dataset=digits").dataset
    own = Expected((1, 8, 8), 10, (0.0,), (1.0,), 1, "run")
    with pytest.raises(ConfigError, match="dataset=digits has 8-bit images; the run was trained on float images"):
        other_dataset(own, digits)
    assert other_dataset(own._replace(white=255), digits).mean == (0.0,)


def test_arrays_of_another_byte_order_and_tensors_with_gradients_are_read() -> None:
    arrays = FLOATS.numpy().astype(">f4"), LABELS.numpy().astype(">i2")
    for pair in (arrays, (FLOATS.clone().requires_grad_(), LABELS)):
        data = as_dataset("mine:data", (pair, pair, pair), 0.1)
        plain = as_dataset("mine:data", ((FLOATS, LABELS),) * 3, 0.1)
        assert torch.equal(data.test.images, plain.test.images)
        assert torch.equal(data.test.labels, plain.test.labels)
        assert not data.test.images.requires_grad


def test_a_masked_array_is_refused() -> None:
    masked = np.ma.masked_greater(IMAGES.numpy(), 250)
    with pytest.raises(DataError, match=r"train: images are a masked array; pass value\.filled"):
        as_dataset("mine:data", ((masked, LABELS), (IMAGES, LABELS)), 0.1)


@pytest.mark.parametrize("labels", [np.array(["a", "b"] * 4), np.array([0, 1] * 4, dtype=object)])
def test_arrays_without_numbers_are_refused_with_a_conversion(labels: np.ndarray[Any, Any]) -> None:
    images = np.zeros((8, 1, 4, 4), np.float32)
    with pytest.raises(DataError, match=r"train: labels have the type .*: must be numbers\nto convert: numpy.unique"):
        as_dataset("mine:data", ((images, labels), (images, labels)), 0.1)
    with pytest.raises(DataError, match=r"train: images have the type object: must be numbers\nto convert: numpy.st"):
        as_dataset("mine:data", ((images.astype(object), labels), (images, labels)), 0.1)


CHANGES: list[dict[str, Any]] = [{"mean": (0.4,)}, {"std": (0.3,)}, {"augment": Augment(pad=1)}, {"classes": 4}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_what_a_data_set_of_a_user_says_about_its_images_is_part_of_its_digest(change: dict[str, Any]) -> None:
    split = Split(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 3)
    usual = Dataset(name="d", train=split, val=split, test=split, classes=3, mean=(0.5,), std=(0.5,))
    first, again, other = (
        images_sha256(as_dataset("my:d", one, 0)) for one in (usual, replace(usual), replace(usual, **change))
    )
    assert first == again != other


def test_sparse_tensors_are_refused_with_the_conversion() -> None:
    images, labels = torch.zeros(6, 1, 4, 4), torch.tensor([0, 1, 2] * 2)
    for layout in ("to_sparse", "to_mkldnn"):
        with pytest.raises(
            DataError, match=r"images are a tensor of the layout torch\.\S+\nto convert: images.to_dense"
        ):
            as_dataset("mine:build", ((getattr(images, layout)(), labels), (images, labels)), 0)


def test_class_names_come_from_a_torch_data_set() -> None:
    images, labels = torch.zeros(6, 1, 4, 4), torch.tensor([0, 1, 2] * 2)
    named = TensorDataset(images, labels)
    named.classes = ["ant", "bee", "cat"]  # type: ignore[attr-defined]
    assert as_dataset("mine:build", (named, named), 0).class_names == ("ant", "bee", "cat")
    named.classes = ["ant", "bee"]  # type: ignore[attr-defined]
    assert as_dataset("mine:build", (named, named), 0).class_names == ()
    assert as_dataset("mine:build", ((images, labels), (images, labels)), 0).class_names == ()


def test_a_label_with_two_names_is_refused() -> None:
    """A folder without images of one class gives all later classes other labels."""

    def part(names: list[str], labels: list[int]) -> TensorDataset:
        made = TensorDataset(torch.rand(len(labels), 1, 4, 4), torch.tensor(labels))
        made.classes = names  # type: ignore[attr-defined]
        return made

    train, whole = part(["ant", "bee", "cat"], [0, 1, 2] * 2), part(["ant", "bee", "cat"], [0, 2])
    for test in (whole, part(["ant", "bee"], [0, 1]), part([], [0, 1])):
        assert as_dataset("mine:build", (train, test), 0).class_names == ("ant", "bee", "cat")
    missing, renamed = part(["ant", "cat"], [0, 1]), part(["ant", "bee", "dog"], [0, 1, 2])
    for parts, label, names in (
        ((train, missing), 1, "'bee' in train and 'cat' in test"),
        ((train, renamed), 2, "'cat' in train and 'dog' in test"),
        ((train, missing, whole), 1, "'bee' in train and 'cat' in val"),
        ((Subset(train, range(6)), Subset(missing, [1])), 1, "'bee' in train and 'cat' in test"),
    ):
        with pytest.raises(DataError, match=f"label {label} is {names}: `classes` must begin alike"):
            as_dataset("mine:build", parts, 0)


@pytest.mark.parametrize(("std", "accepted"), [((64.0,) * 3, True), ((1.0,) * 3, False)])
def test_float_images_of_the_scale_of_bytes_need_a_deviation(std: tuple[float, ...], accepted: bool) -> None:
    split = Split(IMAGES.float(), LABELS)
    data = Dataset(name="x", train=split, val=split, test=split, classes=4, mean=(128.0,) * 3, std=std)
    if accepted:
        check_dataset(data, "x")
        return
    with pytest.raises(DataError, match="the float images are whole numbers from 0 to 255"):
        check_dataset(data, "x")
