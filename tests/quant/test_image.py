"""Which layers read the image, and how the image is rounded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import LevelCount
from qbench.methods import dorefa
from qbench.quant.image import ImageQuantizer
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.policy import Policy, PolicyError
from qbench.quant.verify import verify

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).reshape(1, -1, 1, 1), torch.tensor([0.2, 0.3, 0.4]).reshape(1, -1, 1, 1)
BYTES = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
X = (BYTES / 255 - MEAN) / STD
LOW, HIGH = (-MEAN / STD).flatten().tolist(), ((1 - MEAN) / STD).flatten().tolist()
POLICY = Policy(first=8, last=8, image_range=(tuple(LOW), tuple(HIGH)))


class Front(nn.Module):
    """A network that computes something with the image in front of its first layer."""

    def __init__(self, first: nn.Module, front: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.first, self.front = first, front
        self.pool, self.last = nn.Flatten(), nn.LazyLinear(10)
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.pool(self.first(self.front(self, x))))
        return y


def patchify(net: Front, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, 4 * c)


REARRANGED: dict[str, tuple[Callable[[], nn.Module], Callable[[Front, Tensor], Tensor]]] = {
    "image": (lambda: nn.Conv2d(3, 4, 3), lambda net, x: x),
    "pixel_unshuffle": (lambda: nn.Conv2d(12, 4, 3), lambda net, x: F.pixel_unshuffle(x, 2)),
    "patchify": (lambda: nn.Linear(12, 4), patchify),
    "unfold": (lambda: nn.Linear(27, 4), lambda net, x: F.unfold(x, 3).transpose(1, 2)),
    "flatten": (lambda: nn.Linear(192, 4), lambda net, x: x.flatten(1)),
    "some channels": (lambda: nn.Conv2d(2, 4, 3), lambda net, x: x[:, 1:]),
    "focus": (
        lambda: nn.Conv2d(12, 4, 1),
        lambda net, x: torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
    ),
    "channels last": (lambda: nn.Linear(3, 4), lambda net, x: x.permute(0, 2, 3, 1)),
    "rows": (lambda: nn.Conv1d(24, 4, 1), lambda net, x: x.flatten(1, 2)),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_a_rearranged_image_is_rounded_over_the_range_of_each_channel(name: str) -> None:
    """8-bit images do not change at 8 bits. At 2 bits, each value goes to the nearest of its own channel's four."""
    first, front = REARRANGED[name]
    model = install(dorefa.build(w=2, a=2), Front(first(), front), POLICY, example=X).eval()
    quantizer = model.first.input_q
    assert isinstance(quantizer, ImageQuantizer)
    seen = front(model, X)
    torch.testing.assert_close(quantizer(seen), seen, atol=1e-6, rtol=0)
    assert verify(model, X)["first"]["a"].allowed == 256
    quantizer.bits = 2
    nearest = (torch.round(BYTES / 85) / 3 - MEAN) / STD
    torch.testing.assert_close(quantizer(seen), front(model, nearest), atol=1e-6, rtol=0)
    assert verify(model, X)["first"]["a"] == LevelCount(4, 4)


def changed(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """Return a copy of the images, in which `change` has changed the first channel through a view."""
    copied = x.clone()
    change(copied[:, :1])
    return copied


COMPUTED: dict[str, tuple[Callable[[Front, Tensor], Tensor], str]] = {
    "batch normalization": (lambda net, x: net.bn(x), "the result of BatchNorm2d bn"),
    "arithmetic": (lambda net, x: 2 * x - 1, "the result of sub"),
    "in place": (lambda net, x: x.clone().mul_(2), "the result of mul_"),
    "in place through a view": (lambda net, x: changed(x, lambda part: part.mul_(5)), "the result of mul_"),
    "written to a view": (lambda net, x: changed(x, lambda part: torch.mul(part, 5, out=part)), "the result of mul"),
    "a module on a view": (lambda net, x: changed(x, net.relu), "the result of ReLU relu"),
    "padding": (lambda net, x: F.pad(x, (1, 1, 1, 1)), "the result of pad"),
    "pooling": (lambda net, x: F.avg_pool2d(x, 2), "the result of avg_pool2d"),
    "dropout": (lambda net, x: net.drop(x), "the result of Dropout drop"),
    "shuffled": (lambda net, x: F.pixel_unshuffle(net.bn(x), 2)[:, :3], "the result of BatchNorm2d bn"),
    "coordinates": (lambda net, x: torch.cat([x[:, :2], torch.zeros_like(x[:, :1])], 1), "the result of zeros_like"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_first_layer_that_reads_computed_values_is_refused(name: str) -> None:
    front, reads = COMPUTED[name]
    with pytest.raises(Unsupported) as caught:
        install(dorefa.build(w=2, a=2), Front(nn.Conv2d(3, 4, 1), front), POLICY, example=X)
    assert str(caught.value) == (
        f"first, the first layer, does not read the image but {reads}\nleave its input float: layers.input=float"
    )
    policy = Policy(first=8, input="float")
    model = install(dorefa.build(w=2, a=2), Front(nn.Conv2d(3, 4, 1), front), policy, example=X)
    assert verify(model, X)["first"].keys() == {"w"}


def test_every_layer_that_reads_the_image_rounds_it() -> None:
    """The method's quantizer would clip a normalized image at 0 and 1."""

    class Stems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.last = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.c(self.a(x) + self.b(x)).mean((2, 3)))
            return y

    kinds = {
        name: type(layer.input_q).__name__
        for name, layer in quantized_layers(install(dorefa.build(w=2, a=4), Stems(), POLICY, example=X)).items()
    }
    assert kinds == {"a": "ImageQuantizer", "b": "ImageQuantizer", "c": "DoReFaActivation", "last": "DoReFaActivation"}


def test_the_range_of_the_image_is_not_guessed() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10))

    with pytest.raises(Unsupported, match=r"0 reads the image, and the range of the image is not known\npass Policy"):
        install(dorefa.build(w=2, a=2), net(), Policy(first=8), example=X)
    with pytest.raises(Unsupported, match="0: the input of this layer is not known; call install with example="):
        install(dorefa.build(w=2, a=2), net(), Policy(first=8, image_range=((0.0,), (1.0,))))
    with pytest.raises(Unsupported, match="image_range has 2 lowest and 2 highest values, but images have 3 chan"):
        install(dorefa.build(w=2, a=2), net(), Policy(first=8, image_range=((0.0, 0), (1.0, 1))), example=X)
    one = install(dorefa.build(w=2, a=2), net(), Policy(first=8, image_range=((-3.0,), (3.0,))), example=X)
    assert one[0].input_q(torch.full((1, 3, 8, 8), -9.0)).unique().tolist() == [-3]


READS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "two orders in two calls": lambda first, x: first(x) + first(x.flip(1)),
    "two orders in one call": lambda first, x: sum(first(torch.cat([x, x.flip(1)])).chunk(2)),  # type: ignore[return-value]
    "one order in two calls": lambda first, x: first(x.flip(1)) + first(x.flip(1)),
}


@pytest.mark.parametrize("name", READS)
def test_channels_in_several_orders_are_refused(name: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(144, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(READS[name](self.first, x).flatten(1))
            return y

    if name.startswith("two"):
        with pytest.raises(Unsupported, match=r"first reads the image several times.*\n.*layers\.input=float"):
            install(dorefa.build(w=2, a=2), Reader(), POLICY, example=X)
        return
    model = install(dorefa.build(w=2, a=2), Reader(), POLICY, example=X)
    flipped = X.flip(1)
    torch.testing.assert_close(quantized_layers(model)["first"].input_q(flipped), flipped, rtol=0, atol=1e-5)


class TwoReaders(nn.Module):
    """A network with two convolutions that read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.middle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle((self.first(x) + self.other(x)).relu())
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("width", "first", "other"), [("float", 32, 32), (8, 8, 8), ("same", 32, 2)])
def test_the_width_of_the_image_applies_to_every_layer_that_reads_it(width: int | str, first: int, other: int) -> None:
    policy = Policy(input=width, image_range=POLICY.image_range)
    model = install(dorefa.build(w=2, a=2), TwoReaders(), policy, example=X)
    assert isinstance(model, TwoReaders)
    layers = quantized_layers(model)
    assert [layer.bits.a for layer in (model.first, model.other, model.middle)] == [first, other, 2]  # type: ignore[union-attr]
    rounded = {name for name, layer in layers.items() if isinstance(layer.input_q, ImageQuantizer)}
    assert rounded == {name for name, bits in (("first", first), ("other", other)) if bits < 32}
    verify(model, X)


def test_widths_of_weights_are_no_widths_of_the_image() -> None:
    with pytest.raises(PolicyError, match="got 'w4'; allowed: float, same, or a number of bits from 1 to 32"):
        install(dorefa.build(w=2, a=2), TwoReaders(), Policy(input="w4"), example=X)


def test_a_users_class_with_the_name_of_a_rearranging_module_does_not_pass_the_image() -> None:
    class Flatten(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * 4

    model = nn.Sequential(Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(Unsupported, match="does not read the image but the result of own Flatten 0"):
        install(dorefa.build(w=2, a=2), model, POLICY, example=X)


def test_a_channel_with_one_value_is_kept() -> None:
    """A mask channel that is 1 everywhere has no range to divide by."""
    levels = ImageQuantizer(8, (0.0, 1.0), (1.0, 1.0))
    x = torch.rand(2, 2, 4, 4)
    x[:, 1] = 1
    assert torch.equal(levels(x)[:, 1], x[:, 1])
    torch.testing.assert_close(levels(x), x, atol=0.5 / 255, rtol=0)
