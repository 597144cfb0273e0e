"""Packed files: bit-equal logits for every method, true sizes, refusals, damaged files."""

import json
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
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

from qbench.analysis import evaluate
from qbench.analysis.export import evaluate_file, export, load_exported
from qbench.bits import FLOAT
from qbench.cli.main import main as cli
from qbench.config import groups, registry
from qbench.deploy import container, packed
from qbench.deploy.codes import Encoded, encode, pack, unpack
from qbench.deploy.network import Network, quantize
from qbench.deploy.packed import pack_network, unpack_network
from qbench.deploy.steps import NotSteps, step_function
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run as train_run
from qbench.methods import dorefa, lsq, pact
from qbench.models import resnet
from qbench.quant.image import ImageQuantizer
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.policy import Policy
from qbench.quant.quantizer import Grid, Quantizer
from qbench.runs.reader import read_run
from qbench.training.safetensors_file import load_safetensors

METHODS = [name for name in groups.option_names("method") if name != "float"]
FAST = ("dorefa", "gupta", "inq", "lsq", "qcnn", "qd", "xnor")
"""Methods that are packed in the fast tier: equal steps, powers of two, codebooks, buckets and signs."""
ABOUT = about_digits("packed")
finished = exported.finished
DRAWS = np.random.default_rng(0)


def widths(name: str) -> list[str]:
    """Return every pair of widths up to 8, each width of weights and of activations at least once."""
    supported = registry.create("method", {"name": name}).supported_bits
    w, a = ([k for k in range(1, 9) if k in supported.get(key, ())] or [FLOAT] for key in "wa")
    return [f"w{w[min(i, len(w) - 1)]}a{a[min(i, len(a) - 1)]}" for i in range(max(len(w), len(a)))]


def check_packed(model: nn.Module, batches: list[Tensor]) -> packed.Packed:
    """Assert that the packed network returns the same bits; return the content of its file."""
    content = unpack_network(pack_network(trace(model, batches[0]), ABOUT), "file")
    run = content.network.function()
    with torch.no_grad():
        assert all(torch.equal(run(images), model(images)) for images in batches)
    return content


@pytest.mark.parametrize("name", tiered(METHODS, FAST))
@pytest.mark.parametrize("place", tiered(["narrow", "middle", "wide"], ["middle"]))
def test_every_method_at_every_width_has_the_same_bits(name: str, place: str, configure: Configure) -> None:
    pairs = widths(name)
    for bits in [pairs[{"narrow": 0, "middle": len(pairs) // 2, "wide": -1}[place]]]:
        # a code of Q-CNN for several weights has at most ten bits
        options = ("method.subspace=1", "method.fc_subspace=1") if name == "qcnn" and bits > "w2" else ()
        model, batches = quantized(configure, f"method={name}", f"bits={bits}g{FLOAT}", *options)
        content = check_packed(model, batches)
        layers = quantized_layers(model)
        assert len(content.network.weights) == len(layers) > 0
        for key, weight in content.network.weights.items():
            layer = layers[key.removesuffix(".weight_q")]
            declared = layer.weight_q.bytes(layer.weight)
            # codes of the declared width; tables of levels are at most 256 floats larger
            assert len(weight.codes) == -(-declared.codes * weight.bits // 8)
            assert weight.bits <= declared.code_bits
            stored = len(weight.codes) + 4 * sum(t.numel() for t in weight.levels.stored)
            assert stored <= declared.ideal + (1024 if weight.layout == "tensor" else 8)


@pytest.mark.parametrize(
    "words",
    [
        long_tier(("method=dorefa", "bits=w2a2g4", "method.activation=abs")),
        long_tier(("method=dorefa", "bits=w3a3", "method.activation=tanh")),
        ("method=xnor", "method.scale=K"),
        long_tier(("method=hwgq", "method.threshold=half_step", "bits.a=3")),
        ("method=hwgq", "bits.a=8", "method.levels=optimal"),
        ("method=uniform", "layers.first=8", "layers.last=8"),
        long_tier(("method=uniform", "bits=w4a4", "method.channel=false")),
        long_tier(("method=qd", "bits.w=8", "method.bucket=50")),
        long_tier(("method=gupta", "bits=w8a8g8")),
        long_tier(("method=twn", "activation=lsq", "bits.a=4")),
        long_tier(("method=lsq", "bits=w32a2")),
        ("method=lsq", "model=mlp", "layers.first=8", "model.width=128"),
        long_tier(("method=lsq", "model=mobilenet_v2", "model.width_mult=0.1", "~model.width")),
        ("method=lsq", "model.form=post", "model.shortcut=B"),
        ("method=float",),
    ],
    ids=" ".join,
)
def test_options_and_networks_have_the_same_bits(words: tuple[str, ...], configure: Configure) -> None:
    check_packed(*quantized(configure, *words))


@pytest.mark.parametrize("channels", [1, 3])
def test_quantized_images_have_the_strides_of_the_run(channels: int) -> None:
    """The strides decide how torch computes a convolution, and a grey image has strides of either memory format."""
    images = torch.rand(9, 8, 8, channels, generator=torch.Generator().manual_seed(0)).movedim(3, 1)
    quantizers: list[Quantizer] = [ImageQuantizer(8, (0.0,) * channels, (1.0,) * channels)]
    for method in (dorefa.build(w=2, a=2), pact.build(w=2, a=2)):
        assert method.input
        quantizers.append(method.input("layer", nn.Conv2d(channels, 4, 3), 2))
    for quantizer in quantizers:
        levels = quantizer.grid(images).points[0, :, 0].detach()
        found = quantize(images, (levels[1:] + levels[:-1]) / 2, levels)
        assert found.stride() == quantizer(images).stride()


def test_levels_of_one_channel_are_not_those_of_another() -> None:
    """Images of three channels with different ranges need one table per channel."""
    ranges = ((-1.0, -2.0, 0.0), (1.0, 3.0, 0.5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    policy = Policy(first="same", last="same", image_range=ranges)
    images = torch.randn(9, 3, 8, 8)
    install(dorefa.build(w=4, a=4), model, policy, example=images[:1])
    network = trace(model, images)
    assert network.tensors["0.input_q.thresholds"].shape == (3, 15)
    assert torch.equal(network.function()(images), model(images))


def test_thresholds_and_levels_are_exact() -> None:
    thresholds, levels = step_function(lambda x: dorefa.quantize_activation(x, 2), torch.zeros(1, 1, 2, 2))
    assert levels.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for edge, expected in zip(thresholds, (0.5 / 3, 1.5 / 3, 2.5 / 3), strict=True):
        assert edge.item() == pytest.approx(expected, abs=1e-7)
        below = torch.nextafter(edge, torch.tensor(-1.0))
        assert dorefa.quantize_activation(edge, 2) != dorefa.quantize_activation(below, 2)
    assert quantize(torch.tensor([[-3.0, 0.4, 9.0]]), thresholds, levels).tolist() == [[0, levels[1].item(), 1]]


def test_a_function_without_steps_is_refused() -> None:
    with pytest.raises(NotSteps, match="more than 256 levels"):
        step_function(torch.relu, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="inf or nan"):
        quantize(torch.tensor([[torch.nan]]), torch.zeros(1), torch.zeros(2))


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_are_packed_without_gaps(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 77)
    data = pack(codes, bits)
    assert len(data) == -(-77 * bits // 8)
    assert (unpack(data, 77, bits) == codes).all()


def test_packed_codes_by_hand() -> None:
    """The levels -1, -1/3, 1/3, 1 as codes 0 to 3, lowest bits first."""
    w = torch.tensor([[-1.0, -1 / 3, 1 / 3, 1.0, 1.0]])
    encoded = encode(dorefa.DoReFaWeight(2), w, dorefa.DoReFaWeight(2)(torch.atanh(w * 0.9)))
    assert encoded.codes.tolist() == [0b11_10_01_00, 0b11]
    assert (encoded.layout, encoded.levels.form, encoded.bits) == ("tensor", "span", 2)
    assert encoded.levels.scale.tolist() == [2.0]
    assert encoded.levels.low.tolist() == [-1.0]


def test_resnet20_with_two_bits_fits_in_85_kilobytes(configure: Configure) -> None:
    """The float network has 1.1 MB. Batch normalization is included, with its four vectors."""
    config = configure("dataset=cifar10", "method=lsq", "bits=w2a2")
    model, images = resnet.build((3, 32, 32), 10, depth=20), torch.randn(5, 3, 32, 32)
    install(lsq.build(w=2, a=2), model, example=images[:1])
    model(images)
    about = msgspec.structs.replace(
        ABOUT, title="lsq w2a2g32, resnet20 trained on cifar10", identity=sha256(b"").hexdigest(),
        dataset=dict(config.dataset), shape=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616),
    )  # fmt: skip
    assert len(pack_network(trace(model.eval(), images), about)) <= 85_000


class Halved(Quantizer):
    """A quantizer of a user, without a formula that qbench knows: two levels per row, not equally spaced groups."""

    def forward(self, w: Tensor) -> Tensor:
        return torch.where(w > 0, 0.5, -0.25) * torch.arange(1, len(w) + 1).reshape(-1, 1)

    def grid(self, w: Tensor) -> Grid:
        rows = torch.arange(1, len(w) + 1).reshape(-1, 1)
        return Grid((torch.tensor([-0.25, 0.5]) * rows).unsqueeze(-1), lambda t: t.reshape(len(t), -1, 1))


def test_any_declared_grid_is_encoded() -> None:
    w = torch.randn(3, 7)
    encoded = encode(Halved(), w, Halved()(w))
    assert torch.equal(encoded.decode(), Halved()(w))
    assert encoded.layout == "channel"


def refusal(model: nn.Module, images: Tensor) -> str:
    with pytest.raises(NotExportable) as error:
        trace(model, images)
    assert error.value.status == 2
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


class InPlace(nn.Module):
    """A network that changes a part of a tensor in place, in a way that depends on the image."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.fc = how, nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.how == "mask":
            y[y > 1000.0] = 0.0
        elif self.how == "base":
            y[:, :2].clamp_(max=1000.0)
        elif self.how == "view":
            flat = y.flatten(2)
            y.clamp_(max=1000.0)
            y = flat.unsqueeze(-1)
        else:
            y = y.view(len(y), 8, -1).clamp_(max=1000.0).unsqueeze(-1)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "reason"), [("mask", "__setitem__"), ("base", "through another tensor"), ("view", "through another tensor")]
)
def test_parts_of_a_tensor_that_change_in_place_are_refused(how: str, reason: str) -> None:
    """No image of the test split may reach the change, so a comparison of logits would not find the fault."""
    images = torch.randn(5, 1, 8, 8)
    assert reason in refusal(install(lsq.build(w=2), InPlace(how), example=images[:1]).eval(), images)


def test_a_view_that_replaces_its_tensor_can_change_in_place() -> None:
    images = torch.randn(5, 1, 8, 8)
    model = install(lsq.build(w=2), InPlace("only the view"), example=images[:1]).eval()
    assert torch.equal(trace(model, images).function()(images), model(images))


def test_what_cannot_be_packed_is_refused_with_its_layer(configure: Configure) -> None:
    model, (images, *_) = quantized(configure, "method=dorefa", "bits=w9a2")
    assert "layer1.0.conv1 has 9-bit weights; exported files have at most 8 bits" in refusal(model, images)
    model, (images, *_) = quantized(configure, "method=dorefa", "bits=w2a16")
    assert "train with bits.a=8 or less, or bits.a=32" in refusal(model, images)
    model, (images, *_) = quantized(configure, "method=inq")
    weight_q = quantized_layers(model)["layer2.0.conv1"].weight_q
    weight_q.frozen[0] = False  # type: ignore[operator, union-attr]
    assert "layer2.0.conv1: some weights are still float" in refusal(model, images)


class Odd(nn.Module):
    """A network with one operation that cannot be exported."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.change = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 3), change

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.change(self.conv(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: torch.special.i0(x), "does not know the function i0"),
        (lambda x: torch.from_numpy(x.detach().numpy().copy()) * x, r"reads values of a tensor .* \(numpy\)"),
        (
            lambda x: torch.tensor(DRAWS.random(len(x))).float().reshape(-1, 1, 1, 1) * x,
            "is not computed by torch functions",
        ),
        (lambda x: x * float(x.sum()), r"reads values of a tensor .* \(__float__\)"),
        (lambda x: x.relu() if x.sum() > -1e9 else x, r"reads values of a tensor .* \(__bool__\)"),
        (lambda x: x * DRAWS.random(), "an argument of mul depends on the images"),
        (lambda x: x.relu() if len(x) == 2 else x, "calls different functions for different images"),
        (lambda x: (x.transpose(2, 3).relu_(), x)[1], "changed in place through another tensor"),
        (lambda x: x / 2 if len(torch.nonzero(x > 1e3)) else x, r"reads values of a tensor .* \(nonzero\)"),
        (lambda x: x / 2 if len(x[x > 1e3]) else x, r"shape of a result depends on the images \(__getitem__\)"),
        (lambda x: x / 2 if len(torch.where(x > 1e3)[0]) else x, r"(nonzero|where)\)"),
        (lambda x: x / 2 if f"{x.max():.0f}" == "1000" else x, r"reads values of a tensor .* \(__format__|item\)"),
        (lambda x: x / 2 if torch.is_nonzero(x.max() > 1e3) else x, r"reads values of a tensor .* \(is_nonzero\)"),
    ],
    ids=[
        "unknown",
        "numpy",
        "constant",
        "value",
        "branch",
        "argument",
        "size",
        "view",
        "nonzero",
        "mask",
        "where",
        "format",
        "is_nonzero",
    ],
)
def test_networks_that_cannot_be_traced_are_refused(change: Any, message: str) -> None:
    model, images = Odd(change), torch.randn(6, 1, 4, 4)
    install(dorefa.build(w=2), model, example=images[:1])
    assert re.search(message, refusal(model, images))


IN_PLACE = {
    "relu": lambda x: F.relu(x, inplace=True), "relu6": lambda x: F.relu6(x, True), "silu": nn.SiLU(inplace=True),
    "hardtanh": nn.Hardtanh(-0.1, 0.2, inplace=True), "leaky": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(0.5, inplace=True), "hardswish": nn.Hardswish(inplace=True), "a method": lambda x: x.relu_(),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_functions_that_change_their_argument_are_exported(name: str) -> None:
    torch.manual_seed(0)
    model, images = Odd(IN_PLACE[name]), torch.randn(6, 1, 4, 4)
    install(dorefa.build(w=2), model, example=images[:1])
    assert torch.equal(trace(model, images).function()(images), model.eval()(images))


def test_a_network_whose_trace_computes_something_else_is_refused(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of the file does not matter, because every file is made from the trace."""
    path = Path(train_run(planned_run(configure("experiment=smoke", "method=dorefa", "bits=w2a2"))).run)

    def another(model: nn.Module, images: Tensor) -> Network:
        network = trace(model, images)
        return replace(network, tensors=network.tensors | {"fc.bias": torch.arange(10.0)})

    monkeypatch.setattr("qbench.analysis.export.trace", another)
    for form in ("packed", "onnx", "integer"):
        with pytest.raises(NotExportable, match=r"compute other logits for \d+ of \d+ test images"):
            export(path, form)


def test_levels_along_another_axis_than_the_channels_are_refused() -> None:
    """A linear layer over (images, tokens, channels) reads pixels whose channels have different ranges."""
    levels = ImageQuantizer(4, (-1.0, -2.0, 0.0), (1.0, 3.0, 0.5), torch.arange(3).reshape(1, 1, 3))
    with pytest.raises(NotSteps, match="another axis"):
        step_function(levels, torch.zeros(2, 4, 3))


def test_sizes_may_depend_on_the_number_of_images() -> None:
    model, images = Odd(lambda x: x.view(2 * len(x), -1).reshape(len(x), 2, 4, 4)), torch.randn(7, 1, 4, 4)
    install(dorefa.build(w=2), model, example=images[:1])
    assert torch.equal(trace(model, images).function()(images), model.eval()(images))


def test_export_and_evaluate_on_the_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "n.qbench"
    assert cli(["export", str(finished), "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {file}: {file.stat().st_size:,} bytes" in said
    assert "verified on 450 test images: all logits equal the run's logits, bit for bit" in said
    tables = []
    for place in (finished, file):
        assert cli(["evaluate", str(place), "--format", "json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["tables"][0]["rows"]
        tables.append({key: value for key, value in row.items() if key != "run"})
    assert tables[0] == tables[1]
    assert cli(["export", str(finished)]) == 0
    assert (finished / "network.qbench").read_bytes() == file.read_bytes()
    assert read_run(finished).file_bytes == file.stat().st_size


@pytest.mark.full
def test_a_file_of_a_run_in_bfloat16_is_compared_in_float32(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run computes in bfloat16, and the file in float32, so their accuracies can differ."""
    result = train_run(
        planned_run(configure("experiment=smoke", "method=lsq", "bits=w2a2", "runtime.precision=bf16", "epochs=1"))
    )
    assert result.final is not None
    assert result.best is not None
    own = "the run's own test top-1 of {}.pt, {:.2f} %, was measured in bfloat16 (runtime.precision=bf16)"
    last, best = own.format("last", result.final.test.top1), own.format("best", result.best.test.top1)
    for form, start in (
        ("packed", "verified on 450 test images, with the run's network in float32: all logits equal the run's"),
        ("onnx", "verified in onnxruntime on 450 test images, with the run's network in float32: the classes are"),
        ("integer", "verified on 450 test images, with the run's network in float32: the classes are equal; "),
    ):
        if form == "onnx" and not (find_spec("onnx") and find_spec("onnxruntime")):
            continue
        exported = export(Path(result.run), form)
        assert any(line.startswith(start) for line in exported.lines)
        (row,) = evaluate_file(exported.path).values
        assert exported.lines[-1] == f"the file's test top-1 is {row['top1']:.2f} %, measured in float32; {last}"
    assert export(Path(result.run), weights="best").lines[-1].endswith(best)
    for words in (["inspect", "--bn-stats", "keep"], ["sensitivity", "--widths", "2"]):
        out = ["--out", str(Path(result.run) / "bits.yaml")] if words[0] == "sensitivity" else []
        assert cli([words[0], result.run, *words[1:], *out]) == 0
        assert f"measured in float32; {last}" in capsys.readouterr().out.replace("\n", " ")


def test_the_file_is_a_safetensors_file(finished: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors")
    export(finished)
    tensors = library.load_file(finished / "network.qbench")
    assert {name: str(t.dtype) for name, t in tensors.items()} == {
        "floats": "float32", "codes": "uint8", "header": "uint8", "sha256": "uint8",
    }  # fmt: skip
    assert json.loads(zlib.decompress(tensors["header"].tobytes()))["about"]["dataset"]["name"] == "digits"


def test_nothing_is_written_if_the_logits_differ(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Encoded, "decode", lambda self, decode=Encoded.decode: decode(self) + 0.5)
    assert cli(["export", str(finished), "--out", str(tmp_path / "n.qbench")]) == 2
    assert not list(tmp_path.iterdir())
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["export"], 2, "exactly one run directory"),
        long_tier(["export", "nowhere"], 2, "no such directory"),
        (["export", "RUN", "--to", "pakced"], 2, "did you mean packed"),
        (["export", "RUN", "--out", "nowhere/n.qbench"], 2, "no such directory: nowhere"),
        long_tier(["export", "RUN", "--out", "FOLDER"], 2, "is a directory"),
        (["export", "RUN", "--out", "n.onnx"], 2, "must end in .qbench for --to packed"),
        long_tier(["export", "RUN", "--to", "onnx", "--out", "n.qbench"], 2, "must end in .onnx for --to onnx"),
        long_tier(["export", "RUN", "bits=w4"], 2, "has no effect"),
        (["export", "EMPTY"], 4, "is not a run directory"),
        long_tier(["evaluate", "nowhere.qbench"], 2, "no such file or directory"),
        long_tier(["evaluate", "FILE", "--weights", "best"], 2, "has no effect on an exported file"),
        (["evaluate", "FILE", "--device", "cuda"], 2, "exported files run on the CPU"),
        long_tier(["evaluate", "FILE", "dataset=synthetic"], 2, "same shape and classes"),
        (["evaluate", "TEXT"], 4, "not a file of qbench export"),
    ],
)
def test_wrong_arguments_and_files(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], status: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.qbench").mkdir()
    (tmp_path / "text").write_text("not a network")
    export(finished, out=tmp_path / "n.qbench")
    places = {"RUN": str(finished), "EMPTY": "empty", "TEXT": "text", "FOLDER": "folder.qbench", "FILE": "n.qbench"}
    assert cli([places.get(word, word) for word in words]) == status
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2


def test_an_unfinished_run_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / finished.name
    shutil.copytree(finished, twin)
    (twin / "result.json").unlink()
    assert cli(["export", str(twin)]) == CheckpointError.status
    assert "is not finished" in capsys.readouterr().err
    assert not (twin / "network.qbench").is_file() or (finished / "network.qbench").is_file()


def test_a_damaged_file_is_refused_at_every_byte(finished: Path) -> None:
    whole = export(finished).path.read_bytes()
    draws = random.Random(0)
    for cut in [0, 7, 8, 100, *draws.choices(range(len(whole)), k=20)]:
        with pytest.raises(CheckpointError):
            unpack_network(whole[:cut], "file")
    for place in [*range(8), *draws.choices(range(len(whole)), k=120)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draws.randrange(8)
        with suppress(CheckpointError):
            content = unpack_network(bytes(damaged), "file")
            # a byte without meaning, such as one in __metadata__
            assert pack_network(content.network, content.about) == whole
    with pytest.raises(CheckpointError):
        unpack_network(whole + b"\0", "file")


def rewritten(whole: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a packed file with a changed header and correct digests, as an attacker would write it."""
    parts = {name: tensor.numpy() for name, tensor in load_safetensors(whole, "").items()}
    header = json.loads(zlib.decompress(parts["header"].tobytes()))
    change(header)
    return container.write_container({name: parts[name] for name in packed.PARTS}, header, "packed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header_change("version", 2), "has version 2 of the format; this qbench reads version 1"),
        (header_change("about", "shape", [1, 2**20, 2**20]), "damaged"),
        long_tier(header_change("about", "shape", [1, 9]), "damaged"),
        (header_change("about", "classes", 3), r"expected: \(1, 3\)"),
        (header_change("weights", "*", "shape", [2**30, 2**30]), "damaged"),
        long_tier(header_change("weights", "*", "shape", [4, 4, 3, 2]), "damaged"),
        long_tier(header_change("weights", "*", "book", [2**39]), "damaged"),
        long_tier(header_change("weights", "*", "layout", "bucket:0"), "damaged"),
        long_tier(header_change("weights", "*", "layout", "subspace:1000000"), "damaged"),
        long_tier(header_change("weights", "*", "count", 2**16 + 1), "damaged"),
        long_tier(header_change("weights", "*", "order", [0, 0, 1, 2]), "damaged"),
        (header_change("tensors", "more", [-1]), "-1 is not a size"),
        long_tier(header_change("tensors", "more", [10**9]), "damaged"),
        long_tier(header_change("tensors", {}), "damaged"),
        (header_change("steps", 0, 0, "system"), "calls an unknown function"),
        (header_change("steps", 0, 1, [{"step": 5}]), "step 0 reads step 5"),
        long_tier(header_change("steps", 0, ["repeat", [{"step": -1}, 2**20, 2**10, 2**10], {}]), "damaged"),
        long_tier(header_change("output", [2**20, None]), "damaged"),
        long_tier(header_change("steps", []), "damaged"),
        long_tier(header_change("about", {}), "damaged"),
    ],
    ids=map(str, range(20)),
)
def test_a_header_that_lies_is_refused(finished: Path, change: Any, message: str) -> None:
    whole = export(finished).path.read_bytes()
    assert rewritten(whole, lambda header: None)  # unchanged headers are accepted
    unpack_network(rewritten(whole, lambda header: None), "file")
    with pytest.raises(CheckpointError, match=message):
        unpack_network(rewritten(whole, change), "file")


def test_a_header_that_unpacks_to_gigabytes_is_refused() -> None:
    parts = {"floats": np.empty(0, np.float32), "codes": np.empty(0, np.uint8)}
    whole = container.write_container(parts, {"version": "0" * 2**26}, "packed")
    with pytest.raises(CheckpointError, match="a header of more than"):
        unpack_network(whole, "file")
    with pytest.raises(CheckpointError, match="truncated"):
        unpack_network(struct.pack("<Q", 2**60) + b"{" + bytes(100), "file")


def test_a_data_set_of_code_is_run_only_if_it_is_typed(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "n.qbench"
    file.write_bytes(
        rewritten(export(finished).path.read_bytes(), header_change("about", "dataset", {"name": "os:system"}))
    )
    with pytest.raises(ConfigError, match="does not contain the function's code"):
        evaluate_file(file)
    assert evaluate_file(file, ["dataset=digits"]).rows


@pytest.mark.parametrize("form", tiered(["packed", "integer"], ["packed"]))
def test_a_file_is_not_evaluated_on_other_images_unless_they_are_typed(
    finished: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes are swapped after the export, as if somebody had renamed their folders."""
    file = export(finished, form, tmp_path / "n.qbench").path
    data = evaluate.build_dataset({"name": "digits"})
    before = evaluate_file(file).values[0]["top1"]
    for part in ("train", "test"):
        labels = getattr(data, part).labels
        swapped = torch.where(labels < 2, 1 - labels, labels)
        other = replace(data, **{part: replace(getattr(data, part), labels=swapped)})
        monkeypatch.setattr(evaluate, "build_dataset", lambda node, other=other: other)
        with pytest.raises(CheckpointError, match="images of dataset=digits have changed"):
            evaluate_file(file)
    assert evaluate_file(file, ["dataset=digits"]).values[0]["top1"] < before


def test_load_exported_gives_a_module(finished: Path) -> None:
    model, about = load_exported(export(finished).path)
    assert model(torch.zeros(3, *about.shape)).shape == (3, about.classes)


@pytest.mark.parametrize("images", [torch.zeros(6, 1, 8, 8), torch.randint(2, (6, 1, 8, 8)).float()])
def test_a_quantizer_that_changes_no_value_of_the_first_images_is_exported(images: Tensor) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    policy = Policy(first=8, image_range=((0.0,), (1.0,)), input=1)
    model = install(dorefa.build(w=2, a=2), nn.Sequential(*layers), policy, example=images).eval()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    network = trace(model, images)
    assert sum(step.function == "quantize" for step in network.steps) == 2
    others = torch.randn(6, 1, 8, 8) * 3
    assert torch.equal(network.function()(others), model(others))


class Strided(nn.Module):
    """A network that takes every second pixel by an index with an Ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.first(x).relu())[..., ::2, ::2]
        return self.last(x[...].flatten(1))  # type: ignore[no-any-return]


def test_an_ellipsis_is_exported_as_slices() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 1, 8, 8)
    model = install(dorefa.build(w=2, a=2), Strided(), example=images).eval()
    data = pack_network(trace(model, images), about_digits("packed"))
    assert torch.equal(unpack_network(data, "file").network.function()(images), model(images))
