"""Bit-serial kernels: the run's values, thresholds, other instruction sets, stored code, refusals."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path

import exported
import pytest
import torch
from conftest import Configure, long_tier, tiered
from exported import about_digits, quantized
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.export import export, load_exported
from qbench.cli.main import main as cli
from qbench.deploy.packed import pack_network
from qbench.deploy.trace import trace
from qbench.errors import ConfigError
from qbench.methods import dorefa
from qbench.quant.install import install
from qbench.quant.policy import Policy

pytest.importorskip("numba", reason="needs the extra fast")

from qbench.deploy import kernel_formats
from qbench.deploy.kernel_compile import has
from qbench.deploy.kernel_parameters import FLOAT_NUMBERS, BitWeights, NoKernel, code_thresholds, integer_levels
from qbench.deploy.kernel_plan import NotRunnable, plan
from qbench.deploy.kernel_ramps import identity_ramp
from qbench.deploy.kernel_runtime import in_numba
from qbench.deploy.kernel_tables import product_tables

finished = exported.finished

RUNS = [
    ("method=dorefa", "bits=w1a1"),
    ("method=dorefa", "bits=w1a2"),
    ("method=dorefa", "bits=w2a2", "model.form=post"),
    ("method=dorefa", "bits=w2a2", "model.shortcut=B"),
    ("method=dorefa", "bits=w2a2", "model.shortcut=A_stride", "model.width=10"),
    ("method=pact", "bits=w2a2"),
    ("method=lsq", "bits=w2a2"),
    ("method=xnor",),
    ("method=hwgq",),
    ("method=twn", "activation=lsq", "bits.a=2"),
]
FAST_RUNS = [("method=dorefa", "bits=w2a2", "model.form=post"), ("method=lsq", "bits=w2a2"), ("method=xnor",)]


@pytest.mark.parametrize("words", tiered(RUNS, FAST_RUNS), ids=" ".join)
def test_kernels_agree_with_the_run(words: tuple[str, ...], configure: Configure) -> None:
    """Weights in two's complement and odd integers, activations from 0 and of both signs, all shortcuts."""
    model, batches = quantized(configure, *words)
    run = in_numba(trace(model, batches[0]), about_digits("packed"))
    for images in batches:
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-4)


class Pooled(nn.Module):
    """A network with strides, padding, pooling, several channel counts, a bias, and a linear layer after flatten."""

    def __init__(self, conv: nn.Conv2d, pool: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        channels = conv.in_channels
        self.stem, self.bn, self.conv, self.pool = nn.Conv2d(1, channels, 3, 1, 1), nn.BatchNorm2d(channels), conv, pool
        self.features = nn.LazyLinear(24)
        self.norm, self.fc = nn.BatchNorm1d(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.conv(self.bn(self.stem(x)))).flatten(1)
        logits: Tensor = self.fc(self.norm(self.features(y)).relu())
        return logits


class Residual(nn.Module):
    """A residual block. `only_quantized`: its sum is read by a quantizer alone. `image`: it adds the image itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, channels = kind, 1 if kind == "image" else 20
        self.stem, self.shortcut = nn.Conv2d(1, channels, 3, 1, 1), nn.Conv2d(channels, channels, 1)
        self.conv, self.next, self.last = (
            nn.Conv2d(channels, channels, 3, 1, 1),
            nn.Conv2d(channels, 16, 3),
            nn.LazyLinear(10),
        )
        self.bn, self.norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = self.bn(self.conv(stem.relu())) + {"image": x, "identity": stem}.get(self.kind, self.shortcut(stem))
        logits: Tensor = self.last(self.norm(self.next(y.relu())).relu().flatten(1))
        return logits


@pytest.mark.parametrize("kind", ["only_quantized", "identity", "image"])
def test_a_residual_is_read_with_its_own_strides(kind: str, configure: Configure) -> None:
    """Floats with channels in whole vectors; the image, whose channels are not padded; a sum that is not stored."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = Residual(kind)
    net(images)
    model = install(dorefa.build(w=2, a=2), net, example=images).eval()
    with torch.no_grad():
        model.train()(images)
        expected = model.eval()(images)
        run = in_numba(trace(model, images), about_digits("packed"))
        torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-4)


SIZES = {
    "stride": (nn.Conv2d(20, 40, 3, 2, 1), nn.Identity()),
    "max": (nn.Conv2d(20, 7, 5, 1, 2, bias=False), nn.MaxPool2d(3, 2, 1)),
    "mean": (nn.Conv2d(20, 33, 1), nn.AvgPool2d(2)),
    "max beyond the edge": (nn.Conv2d(20, 7, 1), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "mean beyond the edge": (nn.Conv2d(20, 7, 1), nn.AvgPool2d(3, 2, ceil_mode=True)),
    "unequal": (nn.Conv2d(20, 16, (3, 1), (1, 2), (0, 2)), nn.AdaptiveAvgPool2d((2, 2))),
    "dilation": (nn.Conv2d(20, 16, 3, 1, (2, 3), dilation=(2, 3)), nn.Identity()),
    "groups": (nn.Conv2d(48, 96, 3, 1, 1, groups=3), nn.Identity()),
}
"""Name -> a convolution of codes, and the pooling after it."""

FAST_SIZES = [("max", "w1a1"), ("max beyond the edge", "w2a2"), ("dilation", "w2a2"), ("groups", "w1a2")]


@pytest.mark.parametrize("case", tiered(product(SIZES, ["w1a1", "w1a2", "w2a2"]), FAST_SIZES), ids=" ".join)
def test_sizes_and_pooling(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes as planes of bits and codes as tables give the logits of torch, and the same bits."""
    name, width = case
    model, images = Pooled(*deepcopy(SIZES[name])), torch.randn(64, 1, 8, 8)
    model(images)
    install(dorefa.build(w=int(width[1]), a=int(width[3])), model, example=images[:1])
    model(images)  # statistics of batch normalization
    with torch.no_grad():
        expected = model.eval()(images)
    logits = in_numba(trace(model, images), about_digits("packed"))(images)
    # torch itself rounds sums, so a code at a threshold may differ in few images
    agree = ((logits - expected).abs().amax(1) < 1e-4).float().mean().item()
    assert agree >= 0.95
    assert torch.equal(in_numba(trace(model, images), about_digits("packed"))(images.double()), logits)
    if has("avx2"):
        others = not kernel_formats.tables_are_faster()
        monkeypatch.setattr(kernel_formats, "tables_are_faster", lambda: others)
        assert torch.equal(in_numba(trace(model, images), about_digits("packed"))(images), logits)


class Flattened(nn.Module):
    """A network that adds a flattened map to a vector, or returns a flattened map."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adds, self.first, self.conv = adds, nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 4, 1)
        self.fc, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.first(x).relu()).flatten(1)
        return self.last(y + self.fc(y.relu())) if self.adds else y


@pytest.mark.parametrize(("adds", "reason"), [(True, "a vector and a flattened map"), (False, "network's output")])
def test_flattened_maps_are_no_vectors(adds: bool, reason: str) -> None:
    """Kernels store maps pixel by pixel, and flattening gives the order channel by channel."""
    images = torch.randn(5, 1, 8, 8)
    model = install(dorefa.build(w=1, a=2), Flattened(adds), Policy(last="same"), example=images[:1]).eval()
    with pytest.raises(NotRunnable, match=reason):
        in_numba(trace(model, images), about_digits("packed"))


class PaddedImage(nn.Module):
    """A network that adds channels of zeros to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.first(F.pad(x, (0, 0, 0, 0, 0, 3))).relu())
        return self.last(y.mean((2, 3)))


def test_images_with_added_channels_are_refused() -> None:
    """The pixels of an image are stored without gaps, so that a copy of 16 numbers also contains the next pixels."""
    images = torch.randn(5, 1, 8, 8)
    model = install(dorefa.build(w=2, a=2), PaddedImage(), Policy(last="same"), example=images[:1]).eval()
    with pytest.raises(NotRunnable, match="channels of zeros beside"):
        in_numba(trace(model, images), about_digits("packed"))


def test_the_largest_sums_do_not_overflow() -> None:
    """A row of 46 pairs of tables is added up in three parts of 16, 16 and 14, each of which fits into a byte."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 368, 1), nn.BatchNorm2d(368), nn.Conv2d(368, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[1].bias.fill_(10.0)
        model[2].weight.fill_(-1.0)  # the bits 00, whose XOR with the code 11 is the largest
        model[2].weight[:, :4] = torch.tensor([-1.0, -0.3, 0.3, 1.0])[:, None, None]  # all levels
    images = torch.randn(4, 1, 8, 8)
    install(dorefa.build(w=2, a=2), model, example=images[:1])
    with torch.no_grad():
        expected = model.eval()(images)
    logits = in_numba(trace(model, images), about_digits("packed"))(images)
    # a byte that overflows changes sums of about 364 by 28; sums of 364 in float32 have errors of about 1e-4
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-2)


def test_tables_by_hand() -> None:
    """Codes 3, 0, 1, 2 and the weights' bits 1, 1, 0, 0: products 3 + 0, or 0 + 3 + 1 + 2 for odd weights."""
    number, place = 0b1001_0101, 0b0011
    assert product_tables(2, odd=False)[number, place] == 3
    assert product_tables(2, odd=True)[number, place] == 6
    assert product_tables(1, odd=False)[0b0101, place] == 1
    assert product_tables(1, odd=True)[0b0101, place] == 2


def test_weights_of_both_kinds_are_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table holds products with one kind of weights."""
    one = torch.ones(1)
    odd, even = (BitWeights(one, one, one, odd=odd) for odd in (True, False))
    monkeypatch.setattr(kernel_formats, "tables_are_faster", lambda: True)
    formats = [kernel_formats.code_format(weights).tables for weights in ([odd], [even, even], [odd, even])]
    assert formats == [True, True, False]


def test_thresholds_are_exact_for_each_channel() -> None:
    """The next smaller float has the lower code; codes fall where the slope is negative."""
    slope, offset = torch.tensor([0.3, -2.0, 1e-3]), torch.tensor([0.1, 0.5, -7.0])
    levels = torch.tensor([0.0, 1.0, 2.0])

    def quantizer(x: Tensor) -> Tensor:
        return (x * slope + offset).clamp(0, 2).round()

    found, falling = code_thresholds(quantizer, levels, 3, FLOAT_NUMBERS)
    assert falling.tolist() == [False, True, False]
    at, below = quantizer(FLOAT_NUMBERS.value(found)), quantizer(FLOAT_NUMBERS.value(found - 1))
    ups = torch.tensor([[1.0], [2.0]])
    assert torch.equal(at[:, ~falling], ups.expand(2, 2).where(at[:, ~falling] >= 0, ups))
    assert torch.equal(below[:, ~falling], at[:, ~falling] - 1)
    assert torch.equal(at[:, falling], below[:, falling] - 1)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.0, 0.5], (0, 1)), ([-0.5, 0.5], (-1, 2)), ([-3.0, -1.0, 1.0, 3.0], (-3, 2)),
        ([-0.4, -0.2, 0.0, 0.2], (-2, 1)),
        ([-1.0, 0.0, 1.0], (-1, 1)), ([0.0, 1 / 3, 2 / 3, 1.0], (0, 1)),
    ],
)  # fmt: skip
def test_levels_as_integers(levels: list[float], expected: tuple[int, int]) -> None:
    assert integer_levels(torch.tensor([levels]))[:2] == expected


@pytest.mark.parametrize("levels", [[0.0, 1.0, 3.0], [-0.8, 0.1, 1.0, 1.9], [0.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
def test_other_levels_are_refused(levels: list[float]) -> None:
    with pytest.raises(NoKernel, match="levels"):
        integer_levels(torch.tensor([levels]))


def test_a_ramp_after_a_bounded_ramp() -> None:
    ramp = identity_ramp(2).then(2.0, 1.0, low=0.0).then(torch.tensor([-1.0, 0.0]), 3.0)
    x = torch.tensor([-5.0, 0.0, 4.0], dtype=torch.float64)[:, None]
    found = (x * ramp.slope + ramp.offset).clamp(ramp.low, ramp.high)
    assert found.tolist() == [[3.0, 3.0], [2.0, 3.0], [-6.0, 3.0]]


REFUSED = [
    (("method=dorefa", "bits=w4a2"), "layer1.0.conv1: the numba kernels do not support 16 levels; .*1 or 2 bits"),
    (("method=dorefa", "bits=w2a4"), "do not support 16 levels"),
    (("method=bwn",), "no layer has both weights and activations of 1 or 2 bits"),
    (("method=xnor", "method.scale=K"), "do not support"),
    (("method=ttq", "activation=lsq", "bits.a=2"), "do not support"),
    (("method=lsq", "bits=w2a2", "layers.first=2"), "conv1: .* not integers times one scale"),
    (("method=lsq", "bits=w32a2"), "float weights with quantized activations"),
    long_tier(
        ("method=lsq", "bits=w2a2", "model=mobilenet_v2", "model.width_mult=0.1", "~model.width"),
        "features.1.conv.0.0: .* groups of 1 output channels; must be a multiple of 16",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_kernels_cannot_run_is_refused(words: tuple[str, ...], message: str, configure: Configure) -> None:
    model, (images, *_) = quantized(configure, *words)
    with pytest.raises(NotRunnable, match=message) as error:
        plan(trace(model, images), (1, 8, 8))
    assert len(str(error.value).splitlines()) == 2
    assert "without --runtime" in str(error.value)


def test_evaluate_with_numba_predicts_the_same_classes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = export(finished).path
    tables = []
    for words in ([], ["--runtime", "numba"]):
        predictions = finished / "predictions.csv"
        assert cli(["evaluate", str(file), "--predictions", str(predictions), "--format", "csv", *words]) == 0
        classes = [line.split(",")[:3] for line in predictions.read_text().splitlines()]
        tables.append((capsys.readouterr().out.splitlines()[1].split(",")[:6], classes))
    assert tables[0] == tables[1]


def test_the_wrong_runtime_or_images_are_named(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = export(finished).path
    assert cli(["evaluate", str(file), "--runtime", "openvino"]) == 2
    assert "packed files run in torch, or with --runtime numba" in capsys.readouterr().err
    onnx = finished / "empty.onnx"
    onnx.write_bytes(b"")
    assert cli(["evaluate", str(onnx), "--runtime", "numba"]) == 2
    assert "type: qbench export RUN --to packed" in capsys.readouterr().err
    for runtime in (None, "numba"):
        network, _ = load_exported(file, runtime)
        with pytest.raises(
            ConfigError, match=r"images have shape \(2, 3, 8, 8\); the network in the file needs \(N, 1, 8, 8\)"
        ):
            network(torch.zeros(2, 3, 8, 8))
        with pytest.raises(ValueError, match="inf or nan"):
            network(torch.full((1, 1, 8, 8), torch.nan))
    monkeypatch.setitem(sys.modules, "numba", None)
    assert cli(["evaluate", str(file), "--runtime", "numba"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "qbench: the package numba is missing", "install it: pip install numba"
    ]  # fmt: skip


PROGRAM = """
import pathlib, sys, torch
from numba.core import event
from qbench.analysis.export import load_exported
with event.install_recorder("numba:compile") as compiled:
    network, _ = load_exported(pathlib.Path(sys.argv[1]), "numba")
torch.manual_seed(0)
print(len(compiled.buffer) > 0, network(torch.randn(64, 1, 8, 8)).tolist())
"""


@pytest.mark.full
def test_code_is_stored_and_agrees_with_that_of_other_processors(finished: Path, tmp_path: Path) -> None:
    """Processors with AVX2 or without it compute the same bits; a damaged or forbidden store is not used."""
    file = export(finished).path

    def run(folder: Path, **variables: str) -> tuple[str, str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(folder)} | variables
        words = [sys.executable, "-c", PROGRAM, str(file)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        compiled, _, logits = done.stdout.partition(" ")
        return compiled, logits

    store = tmp_path / "store"
    first, second = run(store), run(store)
    assert (first[0], second[0]) == ("True", "False")
    (code,) = store.rglob("*.nbc")
    code.write_bytes(b"damaged")
    (tmp_path / "file").write_text("")
    avx2 = run(store, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx,+avx2,+popcnt,+bmi2,+fma")
    assert avx2[0] == "True"
    forbidden = run(tmp_path / "file")
    assert second[1] == run(store)[1] == avx2[1] == forbidden[1] == first[1]


LOAD = """
import pathlib, sys, torch
from qbench.analysis.export import load_exported
networks = [load_exported(pathlib.Path(file), "numba")[0] for file in sys.argv[1:]]
torch.manual_seed(0)
images = torch.randn(8, 1, 8, 8)
for network in networks:
    print(network(images).tolist())
"""


@pytest.mark.full
def test_networks_that_other_processes_compiled_do_not_mix(configure: Configure, tmp_path: Path) -> None:
    """Stored functions of one network are not called by another: each file has its own values in every process."""
    files = []
    for width in (16, 10, 20):
        model, (images, *_) = quantized(configure, "method=dorefa", "bits=w2a2", f"model.width={width}")
        files.append(tmp_path / f"{width}.qbench")
        files[-1].write_bytes(pack_network(trace(model, images), about_digits("packed")))

    def run(*wanted: Path) -> list[str]:
        words = [sys.executable, "-c", LOAD, *map(str, wanted)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()

    alone = [logits for file in files for logits in run(file)]
    assert run(*files) == alone
    assert run(*reversed(files)) == alone[::-1]


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alpha": lambda x, y: torch.add(x, y, alpha=-1),
    "alpha of the shortcut": lambda x, y: torch.add(y, x, alpha=0.25),
    "broadcast branch": lambda x, y: x + F.adaptive_avg_pool2d(y, 1),
    "broadcast shortcut": lambda x, y: y + F.adaptive_avg_pool2d(x, 1),
}


class OtherSum(nn.Module):
    """A network with a sum of a map and a branch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.stem, self.conv = kind, nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.next, self.last, self.bn = nn.Conv2d(16, 16, 3), nn.Linear(16 * 36, 10), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = SUMS[self.kind](x, self.bn(self.conv(x.relu())))
        return self.last(self.next(y.relu()).relu().flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", SUMS)
def test_other_sums_are_refused_or_computed(kind: str) -> None:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = install(dorefa.build(w=2, a=2), OtherSum(kind), example=images).eval()
    about = about_digits("packed")
    try:
        runtime = in_numba(trace(model, images), about)
    except ConfigError as refused:
        assert "the numba kernels do not support" in str(refused)  # noqa: PT017
        return
    with torch.no_grad():
        torch.testing.assert_close(runtime(images), model(images), rtol=1e-4, atol=1e-4)
