"""Integer files: codes against a simulation in float64, integer functions by hand, refusals, damaged files."""

import json
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import exported
import msgspec
import numpy as np
import pytest
import torch
from conftest import Configure, long_tier, tiered
from exported import about_digits, header_change, quantized
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.export import evaluate_file, export
from qbench.cli.main import main as cli
from qbench.deploy import container, integer_file, integer_functions
from qbench.deploy.about import About
from qbench.deploy.integer_convert import compare_codes, to_integers
from qbench.deploy.integer_file import pack_integers, unpack_integers
from qbench.deploy.integer_network import FUNCTIONS, IntegerStep
from qbench.deploy.integer_values import Value, integer_thresholds, rescaling
from qbench.deploy.linear import NotLinear, integer_levels
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError
from qbench.methods import dorefa
from qbench.quant.install import install
from qbench.quant.policy import Policy

finished = exported.finished
DIGITS_MEAN, DIGITS_STD = (0.2885513309369991,), (0.354221394542517,)
"""Constants of the training images of digits."""
ABOUT = msgspec.structs.replace(about_digits("integer"), mean=DIGITS_MEAN, std=DIGITS_STD)


def check_integers(model: nn.Module, batches: list[Tensor], about: About = ABOUT) -> integer_file.IntegerFile:
    """Assert that the codes of an integer network are those of a simulation in float64; return its file's content."""
    traced = trace(model, batches[0])
    converted = to_integers(traced, about)
    content = unpack_integers(pack_integers(converted.network, about), "file")
    labelled = [(images, torch.zeros(len(images))) for images in batches]
    found = compare_codes(traced, converted, content.network, labelled, 10**9)
    assert found.codes > 0
    assert found.differing == 0
    with torch.no_grad():
        assert all(torch.equal(content.function()(x).argmax(1), model(x).argmax(1)) for x in batches)
    return content


METHODS = [
    ("method=dorefa", "bits=w2a2"),
    ("method=dorefa", "bits=w8a8"),
    ("method=dorefa", "bits=w2a2", "method.activation=abs"),
    ("method=dorefa", "bits=w3a3", "method.activation=tanh"),
    ("method=pact", "bits=w4a4"),
    ("method=lsq", "bits=w4a4", "model.shortcut=A_stride"),
    ("method=lsq", "bits=w4a8", "layers.first=8", "layers.last=8", "model.form=post", "model.shortcut=B"),
    ("method=uniform", "bits=w8a8", "layers.first=8", "layers.last=8"),
    ("method=ptq", "bits=w4a4"),
    ("method=xnor",),
    ("method=hwgq",),
    ("method=hwgq", "method.threshold=half_step", "bits.a=4"),
    ("method=gupta", "bits=w8a8g8"),
    ("method=twn", "activation=lsq", "bits.a=4"),
    ("method=bwn", "activation=dorefa", "bits.a=2"),
    ("method=lsq", "bits=w4a4", "model=mlp", "model.width=128"),
    ("method=lsq", "bits=w2a2", "model=mobilenet_v2", "model.width_mult=0.1", "~model.width"),
    ("method=dorefa", "bits=w2a2", "model=lenet", "model.pad=2", "~model.width"),
]
FAST = [METHODS[i] for i in (0, 1, 6, 9, 10, 12, 15)]
"""Pre- and post-activation, 8 bits, signs, thresholds that do not round, quantized outputs, linear layers only."""


def printed(value: object) -> str | None:
    """Return the name of a test's parameter. A lambda gets a number from pytest, because its text has an address."""
    return None if "<lambda>" in str(value) else str(value)


@pytest.mark.parametrize("words", tiered(METHODS, FAST), ids=" ".join)
def test_all_codes_are_those_of_a_simulation_in_float64(words: tuple[str, ...], configure: Configure) -> None:
    model, batches = quantized(configure, *words)
    content = check_integers(model, batches)
    types: dict[int, Any] = {}
    content.network.run(batches[0].numpy(), lambda place, result: types.__setitem__(place, result.dtype))
    products = [i for i, step in enumerate(content.network.steps) if step.function in ("conv2d", "linear")]
    assert [types[i] == np.int32 for i in products[1:-1]] == [True] * (len(products) - 2)
    assert all(types[i] == np.int32 for i in range(products[1], products[-2] + 1))


def test_a_layer_with_integer_images_computes_in_integers() -> None:
    """With mean 0.5 and std 0.5, the levels of an 8-bit image are odd multiples of 1/255."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10)).eval()
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    policy = Policy(first="same", last="same", image_range=((-1.0,), (1.0,)))
    install(dorefa.build(w=4, a=8), model, policy, example=images)
    about = msgspec.structs.replace(about_digits("integer"), mean=(0.5,), std=(0.5,))
    content = check_integers(model, [images], about)
    assert [step.function for step in content.network.steps] == [
        "quantize", "conv2d", "flatten", "quantize", "linear", "affine",
    ]  # fmt: skip
    assert content.network.steps[0].arrays["levels"].tolist() == list(range(-255, 256, 2))


def test_thresholds_count_what_the_real_thresholds_count() -> None:
    """For every integer q, with scales of both signs and 0, and after a clamp."""
    rng = np.random.default_rng(0)
    q = np.arange(-60, 61)
    for floor, ceiling in [(-np.inf, np.inf), (0.0, np.inf), (-0.5, 0.7)]:
        scale = np.concatenate([rng.normal(0, 0.05, 20), [0.0, 0.25, -0.25]])
        shift = np.concatenate([rng.normal(0, 1, 20), [0.3, 0.5, -0.5]])
        edges = np.array([-np.inf, -0.5, 0.0, 0.25, 0.7, np.inf])
        ends = np.full_like(scale, -60.0), np.full_like(scale, 60.0)
        found, sign = integer_thresholds(Value(0, True, scale, shift, *ends, floor, ceiling), edges[None])
        values = np.clip(scale[:, None] * q + shift[:, None], floor, ceiling)
        expected = (values[:, :, None] >= edges).sum(-1)
        assert ((q * sign[:, None].astype(int))[:, :, None] >= found[:, None]).sum(-1).tolist() == expected.tolist()


def test_rescaling_rounds_to_the_nearest_number() -> None:
    """Within half a unit, and 2^-32 of the value for the rounding of the multiplier, for all sizes of scales."""
    rng = np.random.default_rng(0)
    scale, shift = 10.0 ** rng.uniform(-8, 2, 200) * rng.choice([-1, 1], 200), rng.normal(0, 3, 200)
    ends = np.full_like(scale, -1000.0), np.full_like(scale, 1000.0)
    value = Value(0, True, scale, shift, *ends)
    fraction = (29 - np.ceil(np.log2(1000 * np.abs(scale) + np.abs(shift)))).astype(np.int64)
    arrays = rescaling(value, fraction)
    q = rng.integers(-1000, 1001, (50, 200)).astype(np.int32)
    found = FUNCTIONS["rescale"](q, **arrays)
    exact = np.ldexp(scale * q + shift, fraction)
    assert np.abs(found - exact).max() <= 1.01
    clipped = rescaling(Value(0, True, scale, shift, *ends, floor=0.0), fraction)
    assert FUNCTIONS["rescale"](q, **clipped).min() == 0


@pytest.mark.parametrize(
    ("levels", "integers", "unit"),
    [
        ([0.0, 1 / 3, 2 / 3, 1.0], [0, 1, 2, 3], 1 / 3),
        ([-1.0, 1.0], [-1, 1], 1.0),
        ([0.0, 0.7], [0, 1], 0.7),
        ([-0.6, -0.2, 0.2, 0.6], [-3, -1, 1, 3], 0.2),
        ([1.0, 0.5, 0.0, 0.5, 1.0], [2, 1, 0, 1, 2], 0.5),
        ([-0.5, 0.0, 1.5], [-1, 0, 3], 0.5),
    ],
)
def test_levels_as_integers_by_hand(levels: list[float], integers: list[int], unit: float) -> None:
    found, one = integer_levels(torch.tensor(levels))
    assert found.tolist() == integers
    assert one == pytest.approx(unit)


@pytest.mark.parametrize("levels", [[0.3, 1.0, 1.7], [0.0, 1.0, 2.5, 3.7], [0.5, 0.5]])
def test_other_levels_are_refused(levels: list[float]) -> None:
    with pytest.raises(NotLinear):
        integer_levels(torch.tensor(levels))


def test_functions_by_hand() -> None:
    x = np.array([[[[-3, 4], [0, 2]]]], np.int32)
    edges, levels = np.array([[-1, 0, 3]]), np.array([-2, 0, 5, 7], np.int32)
    assert FUNCTIONS["quantize"](x, thresholds=edges, levels=levels).tolist() == [[[[-2, 7], [5, 5]]]]
    half = {"multiplier": np.array([1]), "offset": np.array([0]), "shift": np.array([1])}
    ends = {"low": np.array([-1]), "high": np.array([9])}
    assert FUNCTIONS["rescale"](x, **half, **ends).tolist() == [[[[-1, 2], [0, 1]]]]
    assert FUNCTIONS["max_pool2d"](x, kernel=[2, 2], stride=[2, 2], padding=[0, 0], sign=np.array([-1])).item() == 3
    assert FUNCTIONS["sum_pool2d"](x, kernel=[2, 2], stride=[2, 2]).item() == 3
    assert FUNCTIONS["fixed_point"](np.array([[0.75, -0.3]]), fraction=np.array([2, 2])).tolist() == [[3, -1]]
    assert FUNCTIONS["pad"](x, amounts=[[1, 0], [0, 0], [0, 0]])[0, 0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_that_of_torch(groups: int) -> None:
    x, w = torch.randint(-9, 9, (2, 4, 7, 6)), torch.randint(-9, 9, (6, 4 // groups, 3, 2))
    expected = F.conv2d(x.double(), w.double(), None, (2, 1), (1, 2), (1, 2), groups)
    found = FUNCTIONS["conv2d"](
        x.int().numpy(), weight=w.numpy(), stride=[2, 1], padding=[1, 2], dilation=[1, 2], groups=groups
    )
    assert found.dtype == np.int32
    assert found.tolist() == expected.tolist()


def test_arrays_are_stored_in_few_bytes_and_read_again() -> None:
    rows = np.ceil(np.arange(255) * np.array([[1234.567], [0.4]]) - 7.0).astype(np.int32)
    weights = np.array([[-3, 3, 1], [-1, 1, -3]])
    arrays = {"thresholds": rows, "weight": weights, "levels": np.array([0, 300], np.int32)}
    step = IntegerStep("conv2d", (-1,), {}, arrays | {"scale": np.array([0.1])})
    kinds = {name: integer_file._smallest(array, name) for name, array in step.arrays.items()}
    assert {name: (kind, data.nbytes) for name, (kind, data) in kinds.items()} == {
        "thresholds": ("thresholds", 2 * (8 + 253)), "weight": ([2, -3, 2], 2), "levels": ("<i2", 4),
        "scale": ("<f8", 8),
    }  # fmt: skip
    for name, array in step.arrays.items():
        kind, data = kinds[name]
        found = integer_file._Bytes(data.tobytes()).array(kind, list(array.shape))
        assert found.tolist() == array.tolist()


def test_a_sum_beyond_32_bits_raises() -> None:
    x = np.full((1, 2), 2**31 - 1, np.int32)
    with pytest.raises(ValueError, match="outside the range"):
        FUNCTIONS["linear"](x, weight=np.array([[1, 1]]))
    with pytest.raises(ValueError, match="outside the range"):
        FUNCTIONS["add"](x, x)


def test_images_outside_the_range_raise(configure: Configure) -> None:
    """Fixed-point numbers hold every image of 8-bit pixels, and another value is an error, not another number."""
    model, batches = quantized(configure, "method=lsq", "bits=w2a2")
    content = check_integers(model, batches)
    ends = [(end - DIGITS_MEAN[0]) / DIGITS_STD[0] for end in (0, 1)]
    for value in ends:
        content.function()(torch.full((1, 1, 8, 8), value))
    for value in (ends[0] - 0.01, ends[1] + 0.01, torch.nan):
        with pytest.raises(ValueError, match="outside the range of 8-bit pixels"):
            content.function()(torch.full((1, 1, 8, 8), value))
    with pytest.raises(ValueError, match="outside the range for which"):
        content.network.run(np.full((1, 1, 8, 8), 1e4))


@pytest.mark.parametrize(("mean", "std"), [(0.1307, 0.3081), long_tier(0.2860, 0.3530), long_tier(0.4914, 0.2470)])
def test_black_and_white_images_are_within_the_range(configure: Configure, mean: float, std: float) -> None:
    """The first layer's largest results are those of images whose float32 values are rounded outwards."""
    model, _ = quantized(configure, "method=gupta", "bits=w8a8g8")
    first = model.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    first.weight.data = torch.tensor([1.0, -1.0, 0.9, -0.7]).reshape(4, 1, 1, 1).expand(4, 1, 3, 3).clone()
    ends = (torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.2]) - mean) / std
    images = ends.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    check_integers(model, [images], msgspec.structs.replace(ABOUT, mean=(mean,), std=(std,)))


def test_thresholds_that_no_value_reaches_are_left_out(configure: Configure) -> None:
    """After ReLU, a quantizer with the levels -128 to 127 needs those from 0 to 127."""
    model, batches = quantized(configure, "method=gupta", "bits=w8a8g8")
    content = check_integers(model, batches[:1])
    tables = [step.arrays["levels"] for step in content.network.steps if step.function == "quantize"]
    assert tables[0].tolist() == list(range(128))
    assert tables[1].tolist() == list(range(-128, 128))


def refusal(model: nn.Module, images: Tensor, about: About = ABOUT) -> str:
    with pytest.raises(NotExportable) as error:
        to_integers(trace(model, images), about)
    assert error.value.status == 2
    assert len(str(error.value).splitlines()) == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=ttq", "activation=lsq", "bits.a=4"), "layer1.0.conv1: integer export needs equally spaced weights"),
        long_tier(
            ("method=inq", "activation=lsq", "bits.a=4"), "layer1.0.conv1: integer export needs equally spaced weights"
        ),
        long_tier(
            ("method=slq", "activation=lsq", "bits.a=4"), "layer1.0.conv1: integer export needs equally spaced weights"
        ),
        long_tier(("method=qd", "activation=lsq", "bits.a=4"), "layer1.0.conv1: integer export needs"),
        (
            ("method=bwn",),
            "layer1.0.conv1: integer export needs quantized activations, but the activations of this layer are float",
        ),
        (
            ("method=xnor", "method.scale=K"),
            "does not support output scales that are computed for each image",
        ),
        (
            ("method=hwgq", "bits.a=4", "method.levels=optimal"),
            "layer1.0.conv1: integer export does not support activations",
        ),
        long_tier(("method=lsq", "bits=w32a2"), "no layer has quantized weights and quantized activations"),
        (("method=float",), "train with bits.w=8 and bits.a=8 or less, or: qbench export RUN --to packed"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_what_has_no_integer_form_is_refused_with_its_layer(
    words: tuple[str, ...], message: str, configure: Configure
) -> None:
    model, (images, *_) = quantized(configure, *words)
    assert message in refusal(model, images)


class Changed(nn.Module):
    """A network with a function between two quantized layers."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.first, self.conv, self.change = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), change
        self.fc = nn.Linear(change(torch.zeros(2, 4, 8, 8)).flatten(1).shape[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.change(self.conv(self.first(x))).flatten(1))
        return logits


@pytest.mark.parametrize(
    "change",
    [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(2), nn.ReLU6(),
        nn.Hardtanh(-0.3, 0.4), nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2)), lambda x: F.pad(x, (1, 2, 0, 3)),
        lambda x: x[:, 1:3, ::2], lambda x: x + F.relu(x), lambda x: F.avg_pool2d(F.relu(x), 2),
        lambda x: x.clamp(max=0.2), lambda x: x.clamp(1.5, 2.0) + x.clamp(-2.0, -1.5),
        lambda x: F.pad(F.relu(x) + x, (0, 0, 0, 0, 1, 2)),
    ],
    ids=printed,
)  # fmt: skip
def test_functions_between_quantizers(change: Any) -> None:
    torch.manual_seed(0)
    model = Changed(change)
    images = (torch.rand(20, 1, 8, 8) - DIGITS_MEAN[0]) / DIGITS_STD[0]
    install(dorefa.build(w=4, a=4), model, Policy(last="same"), example=images[:1])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.tensor([1.0, -1.0, 0.0, 2.0])
    model(images)  # statistics of batch normalization
    check_integers(model.eval(), [images])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.Sigmoid(), "does not support the function sigmoid"),
        (lambda x: torch.cat([x, x], 1), "does not support the function cat"),
        (lambda x: x + 1, "does not support sums with constants"),
        (lambda x: x.mean((1, 2)), "supports only means over height and width"),
        (nn.AvgPool2d(3, padding=1), "does not support average pooling with padding"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "with ceil_mode=True"),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), "does not support padding with mode=constant, value=1.0"),
    ],
    ids=printed,
)
def test_functions_without_an_integer_form_are_refused(change: Any, message: str) -> None:
    model, images = Changed(change).eval(), torch.rand(6, 1, 8, 8)
    install(dorefa.build(w=4, a=4), model, Policy(last="same"), example=images[:1])
    assert message in refusal(model, images)


def test_sums_that_need_more_than_32_bits_are_refused() -> None:
    """38,399 products of 255 times 255."""
    model = nn.Sequential(nn.Conv2d(1, 600, 1), nn.ReLU(), nn.Flatten(), nn.Linear(38_400, 10)).eval()
    images = torch.rand(6, 1, 8, 8)
    install(dorefa.build(w=8, a=8), model, Policy(last="same"), example=images[:1])
    model[3].weight.data.fill_(1.0)[:, 0] = -1.0  # type: ignore[union-attr, operator, index]
    assert "3: integer export needs sums of products of at most 2,147,483,647, but they reach 2,496,894,975" in refusal(
        model, images
    )


def test_export_and_evaluate_on_the_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", str(finished), "--to", "integer"]) == 0
    said = capsys.readouterr().out
    assert "verified on 450 test images: the classes are equal; 0 of 489,600 activation codes of 450 images" in said
    assert "differ from a simulation in float64 (allowed 0)" in said
    file = finished / "network-integer.qbench"
    top1 = []
    for place in (finished, file):
        assert cli(["evaluate", str(place), "--format", "json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["tables"][0]["rows"]
        top1.append(row["top1"])
    assert top1[0] == top1[1]
    assert cli(["evaluate", str(file), "--runtime", "openvino"]) == 2
    assert "integer files run in NumPy only" in capsys.readouterr().err
    assert cli(["export", str(finished), "--to", "integer", "--out", str(tmp_path / "n.onnx")]) == 2
    assert "must end in .qbench for --to integer" in capsys.readouterr().err


def test_nothing_is_written_if_a_code_differs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(*args: Any) -> Any:
        thresholds, sign = integer_thresholds(*args)
        return thresholds + 1, sign

    monkeypatch.setattr(integer_functions, "integer_thresholds", shifted)
    assert cli(["export", str(finished), "--to", "integer", "--out", str(tmp_path / "n.qbench")]) == 2
    error = capsys.readouterr().err
    assert (
        "in 450 images; the run's own codes in float32 differ in 0 images\ntry: qbench export RUN --to packed" in error
    )
    assert "try: qbench export RUN --to packed" in error
    assert not list(tmp_path.iterdir())


def test_the_network_runs_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import qbench.deploy.integer_network"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_file_is_refused(finished: Path, tmp_path: Path) -> None:
    whole = export(finished, "integer", tmp_path / "n.qbench").path.read_bytes()
    draws = random.Random(0)
    for cut in [0, 7, 8, 100, *draws.choices(range(len(whole)), k=20)]:
        with pytest.raises(CheckpointError):
            unpack_integers(whole[:cut], "file")
    for place in [*range(8), *draws.choices(range(len(whole)), k=120)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draws.randrange(8)
        with suppress(CheckpointError):
            content = unpack_integers(bytes(damaged), "file")
            # a byte without meaning, such as one in __metadata__
            assert pack_integers(content.network, content.about) == whole
    (tmp_path / "cut.qbench").write_bytes(whole[:-1])
    assert cli(["evaluate", str(tmp_path / "cut.qbench")]) == CheckpointError.status


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header_change("version", 2), "has version 2 of the format; this qbench reads version 1"),
        (header_change("about", "shape", [1, 2**20, 2**20]), "damaged"),
        long_tier(header_change("about", "classes", 3), r"expected: \(1, 3\)"),
        long_tier(header_change("about", {}), "damaged"),
        long_tier(header_change("steps", []), "damaged"),
        (header_change("steps", 0, 0, "system"), "calls an unknown function"),
        (header_change("steps", 0, 1, [5]), r"step 0 reads the steps \[5\]"),
        long_tier(header_change("steps", 0, 2, {"stride": [0, 0]}), "damaged"),
        long_tier(header_change("steps", 0, 2, {"command": "ls"}), "damaged"),
        long_tier(header_change("steps", 0, 3, "weight", ["<f8", [2**30, 2**30]]), "damaged"),
        (header_change("steps", 0, 3, "weight", ["O", [1]]), "is not a type"),
        (header_change("steps", 0, 3, "weight", [[40, 0, 1], [8]]), "codes of 40 bits"),
        long_tier(header_change("steps", 0, 3, "weight", ["<i1", [-1]]), "-1 is not a size"),
        long_tier(header_change("steps", 0, 3, "weight", ["thresholds", [2**30, 4]]), "damaged"),
        long_tier(header_change("steps", 0, 3, "weight", ["thresholds", [1, 1]]), "damaged"),
        long_tier(
            header_change("steps", 0, ["pad", [-1], {"amounts": [[0, 2**20], [0, 2**10], [0, 2**10]]}, {}]), "damaged"
        ),
    ],
    ids=map(str, range(16)),
)
def test_a_header_that_lies_is_refused(finished: Path, tmp_path: Path, change: Any, message: str) -> None:
    whole = export(finished, "integer", tmp_path / "n.qbench").path.read_bytes()
    parts, header = container.read_container(whole, integer_file.PARTS, "file")
    unpack_integers(container.write_container(parts, header, "integer"), "file")  # unchanged headers are accepted
    change(header)
    with pytest.raises(CheckpointError, match=message):
        unpack_integers(container.write_container(parts, header, "integer"), "file")


def test_an_integer_file_is_not_read_as_a_packed_file(finished: Path, tmp_path: Path) -> None:
    file = export(finished, "integer", tmp_path / "n.qbench").path
    assert container.kind_of(file.read_bytes()) == "integer"
    assert container.kind_of(b"") == container.kind_of(b"x" * 100) == ""
    assert evaluate_file(file).rows


class NearThresholds(nn.Module):
    """A network that repeats its only channel, plus a small number, in front of a quantizer with a threshold at 0.5."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 4, 1)
        self.last = nn.Linear(4 * 64, 10)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.fill_(offset)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)).flatten(1))  # type: ignore[no-any-return]


def test_codes_of_values_next_to_a_threshold_are_compared_with_those_of_float32() -> None:
    """The threshold is the smallest number of float32 above 0.5. Numbers just below it are rounded up to it."""
    torch.manual_seed(0)
    model = install(dorefa.build(w=1, a=1), NearThresholds(2.0**-24 - 2.0**-40), example=torch.rand(2, 1, 8, 8)).eval()
    x = torch.rand(6, 1, 8, 8)
    x[:2, 0, 0, 0] = 0.5
    traced = trace(model, x)
    converted = to_integers(traced, ABOUT)
    content = unpack_integers(pack_integers(converted.network, ABOUT), "file")
    found = compare_codes(traced, converted, content.network, [(x, torch.zeros(6))], 10**9)
    assert found == (6, 6 * 64, 2, 2, 2)
