"""dataset=glyphs: what is drawn, that it is reproducible, and that labels match the images."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qbench.data import glyphs
from qbench.data.dataset import Split
from qbench.errors import DataError

FONTS = glyphs.TRAIN_FONTS[:4]


def draw(count: int = 2 * glyphs.CHUNK, seed: int = 5, difficulty: float = 1.0, size: int = 32) -> Split:
    return glyphs.render(count, size=size, fonts=FONTS, seed=seed, difficulty=difficulty)


@pytest.fixture(scope="module")
def split() -> Split:
    return draw()


@pytest.fixture(scope="module")
def clean() -> Split:
    return draw(difficulty=0.0)


def same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(("count", "size"), [(1, 32), (glyphs.CHUNK + 1, 20)])
def test_shape_and_type(count: int, size: int) -> None:
    got = draw(count, size=size)
    assert (got.images.dtype, got.images.shape) == (torch.uint8, (count, 3, size, size))
    assert (got.labels.dtype, got.labels.shape) == (torch.int64, (count,))


def test_every_34_images_hold_each_class_once_in_random_order(split: Split) -> None:
    runs = split.labels.view(-1, len(glyphs.CLASSES))
    assert torch.equal(runs.sort(1).values, torch.arange(34).expand(16, 34))
    assert len(set(map(tuple, runs.tolist()))) == 16


def test_same_arguments_give_the_same_images_for_any_count(split: Split) -> None:
    assert same(draw(), split)
    count = glyphs.CHUNK + 7
    assert same(draw(count), Split(split.images[:count], split.labels[:count]))


def test_another_seed_gives_other_images_and_labels(split: Split) -> None:
    other = draw(seed=6)
    assert not torch.equal(other.labels, split.labels)
    assert (other.images != split.images).flatten(1).any(1).all()
    assert not torch.equal(split.images[: glyphs.CHUNK], split.images[glyphs.CHUNK :])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_images_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    threads(1)
    one = draw(34)
    threads(2)
    assert same(draw(34), one)


def test_knots_are_interpolated_alike_with_any_number_of_threads(threads: Callable[[int], None]) -> None:
    knots = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    threads(1)
    one = glyphs._interpolate_knots(knots, 128)
    threads(2)
    assert torch.equal(glyphs._interpolate_knots(knots, 128), one)  # fails with torch's own interpolation
    torchs = torch.nn.functional.interpolate(knots, size=(128, 128), mode="bilinear", align_corners=True)
    assert torch.allclose(torchs, one, atol=1e-6)


def test_global_generator_is_not_used(split: Split) -> None:
    state = torch.manual_seed(123).get_state()
    assert same(draw(), split)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_and_test_fonts_differ() -> None:
    fonts = [*glyphs.TRAIN_FONTS, *glyphs.TEST_FONTS]
    assert len(set(fonts)) == len(fonts) == 21
    assert 0.2 < len(glyphs.TEST_FONTS) / len(fonts) < 0.3


@pytest.mark.parametrize("font", [*glyphs.TRAIN_FONTS, *glyphs.TEST_FONTS])
def test_every_font_draws_every_letter_inside_the_mask_and_distinct(font: str) -> None:
    masks = glyphs._masks([font], 64)[0].float() / 255
    assert masks[:, [0, -1]].max() == masks[:, :, [0, -1]].max() == 0
    assert masks.flatten(1).sum(1).min() > 50
    a, b = torch.triu_indices(34, 34, 1)
    difference = (masks[a] - masks[b]).abs().sum((1, 2)).min()
    assert difference > 20  # pixels of 64x64; two missing letters would be the same box


def test_glyph_is_brighter_than_the_background_in_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "CLUTTER", 0.0)
    with_glyph = draw().images.int()
    monkeypatch.setattr(glyphs, "CONTRAST", 0.0)
    background = draw().images.int()  # the same draws without the glyph, and another shift of the mean
    clipped = (with_glyph % 255 == 0) | (background % 255 == 0)
    gain = (with_glyph - background).masked_fill(clipped, 0)
    shift = gain[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(1).mode().values[:, None, None, None]
    glyph = gain - shift
    assert (shift <= 0).all()
    assert glyph.masked_fill(clipped, 0).min() >= 0
    assert glyph.flatten(2).max(2).values.min() > 30


def test_mean_of_every_image_is_128(split: Split, clean: Split) -> None:
    for images in (split.images, clean.images):
        assert (images.double().mean((1, 2, 3)) - 128).abs().max() < 2  # rounding, and a few clipped pixels


def test_noise_increases_with_difficulty() -> None:
    def corner_deviation(difficulty: float) -> float:
        images = draw(glyphs.CHUNK, difficulty=difficulty).images.float()
        corner = images[:, :, :3, :3]  # usually without glyph
        return corner.std((2, 3)).median().item()

    levels = [corner_deviation(d) for d in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)]
    assert levels[0] == 0
    assert all(a < b for a, b in itertools.pairwise(levels))


def test_difficulty_keeps_the_labels_and_size_keeps_the_image(split: Split, clean: Split) -> None:
    assert torch.equal(split.labels, clean.labels)
    large = draw(34, difficulty=0.0, size=64).images.float()
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - clean.images[:34]).abs().mean() < 4


def test_labels_match_the_images(clean: Split) -> None:
    """The nearest class mean of clean training images classifies images of the test fonts."""

    def pattern(images: Tensor) -> Tensor:
        grey = images.float().mean(1).flatten(1)
        return torch.nn.functional.normalize(grey - grey.mean(1, keepdim=True))

    train = glyphs.render(2720, fonts=glyphs.TRAIN_FONTS, seed=0, difficulty=0.0)
    means = torch.stack([pattern(train.images[train.labels == c]).mean(0) for c in range(34)])
    test = glyphs.render(680, fonts=glyphs.TEST_FONTS, seed=1, difficulty=0.0)
    right = (pattern(test.images) @ torch.nn.functional.normalize(means).T).argmax(1) == test.labels
    assert right.float().mean() > 0.85


def test_build() -> None:
    data = glyphs.build(train=340, test=68, seed=2)
    assert (data.name, data.classes, data.synthetic, data.shape) == ("glyphs", 34, True, (3, 32, 32))
    assert (len(data.train), len(data.val), len(data.test)) == (306, 34, 68)
    assert all(0.48 < m < 0.52 for m in data.mean)
    assert all(0.05 < s < 0.2 for s in data.std)
    assert same(data.test, glyphs.render(68, fonts=glyphs.TEST_FONTS, seed=5, difficulty=1.1))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"count": 0}, "count=0"),
        ({"size": 7}, "size=7"),
        ({"seed": -1}, "seed=-1"),
        ({"difficulty": 2.1}, "difficulty=2.1"),
        ({"difficulty": float("nan")}, "difficulty=nan"),
        ({"fonts": ()}, "fonts=0"),
    ],
)
def test_errors_name_the_wrong_argument(wrong: dict[str, object], named: str) -> None:
    right: dict[str, object] = {"count": 1, "size": 32, "fonts": FONTS, "seed": 0, "difficulty": 1.0}
    with pytest.raises(ValueError, match=named):
        glyphs.render(**(right | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["train", "test", "seed", "size", "difficulty", "pad"])
def test_errors_name_keys_as_the_user_types_them(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}=-1"):
        glyphs.build(**{"train": 68, "test": 34, key: -1})


def test_error_names_an_unknown_font() -> None:
    with pytest.raises(DataError, match="Comic"):
        glyphs.render(1, fonts=["Comic"], seed=0, difficulty=1.0)
