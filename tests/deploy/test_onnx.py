"""ONNX files: the run's classes in ONNX Runtime and OpenVINO, standard operators, refusals, damaged files."""

import json
import platform
import random
import re
import sys
from pathlib import Path
from typing import Any

import exported
import pytest
import torch
from conftest import ROOT, Configure
from exported import about_digits, quantized
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.export import evaluate_file, export
from qbench.cli.main import main as cli
from qbench.deploy.agreement import compare
from qbench.deploy.extras import import_extra
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.runtimes import RUNTIMES, about_onnx
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError, ConfigError
from qbench.methods import dorefa
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.policy import Policy

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
NARROW, WIDE = 2e-5, 2e-2
finished = exported.finished


def runtime(name: str) -> str:
    """Return the name of a runtime, or skip the test if its package is missing."""
    pytest.importorskip(name, reason=f"needs the package {name}")
    return name


def check_onnx(model: nn.Module, batches: list[Tensor], form: str, name: str, tolerance: float) -> Any:
    """Assert that an ONNX file agrees with a network in a runtime; return the file's model."""
    about = about_digits(form)
    data = to_onnx(trace(model, batches[0]), about)
    labelled = [(images, torch.zeros(len(images))) for images in batches]
    found = compare(model, RUNTIMES[runtime(name)](data, about, "file"), labelled)
    assert found.same_class == found.images
    assert found.largest <= tolerance
    read = onnx.load_model_from_string(data)
    assert {node.domain for node in read.graph.node} == {""}, "standard operators only"
    return read


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (("method=dorefa", "bits=w2a2"), NARROW),
        (("method=dorefa", "bits=w8a8"), WIDE),
        (("method=dorefa", "bits=w3a3", "method.activation=tanh"), NARROW),
        (("method=pact", "bits=w4a4"), NARROW),
        (("method=lsq", "bits=w2a2"), NARROW),
        (("method=dorefa", "bits=w2", "model.shortcut=A_stride", "model.form=post"), NARROW),
        (("method=uniform", "bits=w8a8", "layers.first=8", "layers.last=8"), WIDE),
        (("method=ptq", "bits=w4a4"), NARROW),
        (("method=bwn",), NARROW),
        (("method=xnor", "method.scale=K"), NARROW),
        (("method=hwgq",), NARROW),
        (("method=twn",), NARROW),
        (("method=ttq",), NARROW),
        (("method=inq",), NARROW),
        (("method=slq",), NARROW),
        (("method=eslq",), NARROW),
        (("method=mlq",), NARROW),
        (("method=qcnn",), NARROW),
        (("method=qd", "bits.w=3", "method.bucket=50"), NARROW),
        (("method=dq", "bits.w=4"), NARROW),
        (("method=gupta", "bits=w8a8g8"), WIDE),
        (("method=lsq", "model=mobilenet_v2", "model.width_mult=0.1", "~model.width"), NARROW),
        (("method=lsq", "bits=w32a2"), NARROW),
        (("method=float",), NARROW),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)  # fmt: skip
def test_onnx_agrees_with_the_run_and_stores_codes(
    words: tuple[str, ...], tolerance: float, configure: Configure
) -> None:
    model, batches = quantized(configure, *words)
    widths = {weight.bits for weight in trace(model, batches[0]).weights.values()}
    read = check_onnx(model, batches, "onnx", "onnxruntime", tolerance)
    kinds = {
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in read.graph.initializer
        if tensor.name.endswith(".codes")
    }
    assert kinds == {"UINT2" if bits <= 2 else "UINT4" if bits <= 4 else "UINT8" for bits in widths}
    assert bool(kinds) == (words[0] != "method=float" and "bits=w32a2" not in words)


INT8 = [
    (("method=dorefa", "bits=w2a2"), NARROW),
    (("method=dorefa", "bits=w7a8"), WIDE),
    (("method=dorefa", "bits=w3a4", "method.activation=tanh"), NARROW),
    (("method=pact", "bits=w4a4"), NARROW),
    (("method=lsq", "bits=w4a8", "layers.first=8", "layers.last=8"), WIDE),
    (("method=uniform", "bits=w8a8", "layers.first=8", "layers.last=8"), WIDE),
    (("method=ptq", "bits=w8a8"), WIDE),
    (("method=xnor",), NARROW),
    (("method=hwgq",), NARROW),
    (("method=hwgq", "method.threshold=half_step", "bits.a=4"), NARROW),
    (("method=gupta", "bits=w8a8g8"), WIDE),
]


SATURATING = [("method=dorefa", "bits=w7a8"), ("method=ptq", "bits=w8a8")]
"""Runs whose codes of weights and activations both use all 8 bits. Products of two such codes need 16 bits."""


def has_vnni() -> bool:
    """Return whether the processor adds products of 8-bit integers in 32 bits. Other processors than x86 do."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    information = Path("/proc/cpuinfo")
    return not information.exists() or "_vnni" in information.read_text()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("words", "tolerance"), INT8, ids=[" ".join(words) for words, _ in INT8])
def test_int8_agrees_with_the_run_in_both_runtimes(
    words: tuple[str, ...], tolerance: float, name: str, configure: Configure
) -> None:
    if name == "openvino" and words in SATURATING and not has_vnni():
        pytest.skip("OpenVINO clips sums of products of 8-bit codes on x86 processors without VNNI")
    model, batches = quantized(configure, *words)
    read = check_onnx(model, batches, "int8", name, tolerance)
    codes = [tensor for tensor in read.graph.initializer if tensor.name.endswith(".codes")]
    assert codes
    assert all(tensor.data_type == onnx.TensorProto.INT8 for tensor in codes)


@pytest.mark.parametrize("words", [("method=lsq", "bits=w8a8"), ("method=hwgq",)], ids=" ".join)
def test_openvino_computes_the_quantized_layers_in_integers(words: tuple[str, ...], configure: Configure) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    model, batches = quantized(configure, *words)
    core = openvino.Core()
    read = core.read_model(to_onnx(trace(model, batches[0]), about_digits("int8")))
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    information = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    convolutions = [rt for rt in information if rt["layerType"].astype(str) == "Convolution"]
    integer = [rt for rt in convolutions if rt["runtimePrecision"].astype(str) in ("u8", "i8")]
    assert len(integer) >= len(quantized_layers(model)) - 1 > 0


class Rounding(nn.Module):
    """A network whose only layer with quantized activations reads the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Conv2d(1, 1, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.first(x).flatten(1))
        return logits


def test_a_value_on_a_threshold_gets_the_level_of_the_run() -> None:
    """torch rounds 0.5 and 2.5 of a step down and 1.5 up; so do the comparisons of an ONNX file."""
    model = Rounding()
    with torch.no_grad():
        model.first.weight.fill_(1.0)
        model.first.bias.zero_()  # type: ignore[union-attr]
    install(dorefa.build(w=2, a=2), model, Policy(last="same"), example=torch.zeros(1, 1, 8, 8))
    images = torch.tensor([0.5, 1.5, 2.5, 7.0]).div(3).repeat(6, 16).reshape(6, 1, 8, 8)
    check_onnx(model.eval(), [images], "onnx", "onnxruntime", NARROW)


@pytest.mark.parametrize(
    ("words", "form", "message"),
    [
        (
            ("method=dorefa", "bits=w8a8"),
            "int8",
            "int8 export needs integer weights from -127 to 127, but these reach 255",
        ),
        (("method=ttq", "activation=lsq", "bits.a=4"), "int8", "int8 export needs equally spaced weights"),
        (("method=qd", "activation=lsq", "bits.a=4"), "int8", "layer1.0.conv1: int8 export needs"),
        (("method=bwn",), "int8", "train with bits.a=8 or less"),
        (("method=hwgq", "bits.a=3", "method.levels=optimal"), "int8", "levels are not multiples of one step"),
        (("method=hwgq", "bits.a=8", "method.levels=optimal"), "onnx", "more than 4 bits whose thresholds"),
    ],
)
def test_what_onnx_files_cannot_hold_is_refused(
    words: tuple[str, ...], form: str, message: str, configure: Configure
) -> None:
    model, (images, *_) = quantized(configure, *words)
    network = trace(model, images)
    with pytest.raises(NotExportable) as error:
        to_onnx(network, about_digits(form))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


class Inserted(nn.Module):
    """A quantized convolution, a module or function under test, a mean over the image, and a linear layer."""

    def __init__(self, inserted: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.inserted = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), inserted
        channels = inserted(torch.zeros(2, 4, 8, 8)).flatten(2).shape[1]
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.inserted(self.conv(self.first(x))).flatten(2).mean(2))
        return logits


FUNCTIONS = {
    "conv2d groups": nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2),
    "conv2d same": nn.Conv2d(4, 3, 3, padding="same", dilation=2),
    "conv2d valid": nn.Conv2d(4, 3, 3, padding="valid"),
    "conv_transpose2d": nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1),
    "batch_norm no affine": nn.BatchNorm2d(4, affine=False), "layer_norm": nn.LayerNorm([4, 8, 8]),
    "max_pool2d": nn.MaxPool2d(3, 2, 1), "max_pool2d ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "avg_pool2d": nn.AvgPool2d(3, 2, 1), "avg_pool2d no pad": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d((2, 4)), "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), "pad reflect": lambda x: F.pad(x, (1, 2, 3, 0), "reflect"),
    "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "hardsigmoid": nn.Hardsigmoid(), "silu": nn.SiLU(),
    "gelu": nn.GELU(), "gelu tanh": nn.GELU("tanh"), "leaky_relu": nn.LeakyReLU(0.2),
    "hardtanh": nn.Hardtanh(-0.3, 0.4),
    "softmax": nn.Softmax(1), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "clamp": lambda x: x.clamp(min=-0.1),
    "arithmetic": lambda x: 1 - (2 * x + 0.5 - x * x) / 3, "abs, sqrt, exp, neg": lambda x: -(x.abs().sqrt().exp()),
    "cat": lambda x: torch.cat([x, x[:, 1:3]], 1), "slice": lambda x: x[:, :, 1:, 2:5],
    "transpose": lambda x: x.transpose(2, 3).contiguous(), "permute": lambda x: x.permute(0, 1, 3, 2).clone(),
    "view": lambda x: x.view(len(x), 2, -1), "reshape": lambda x: x.reshape(-1, 4, 16, 4),
    "one axis": lambda x: x.reshape(len(x) * 256).reshape(len(x), 4, 8, 8),
    "flatten": lambda x: x.flatten(1, 2), "unsqueeze": lambda x: x.unsqueeze(2).squeeze(2),
    "sum": lambda x: x.sum(3, keepdim=True), "in place": lambda x: F.relu_(x + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_torch(name: str) -> None:
    """Both forms: the packed network has the same bits, and ONNX Runtime the same logits."""
    model, images = Inserted(FUNCTIONS[name]), torch.randn(6, 1, 8, 8)
    install(dorefa.build(w=4), model, Policy(rules={"inserted*": "float"} if name.startswith("conv") else {}),
            example=images[:1])  # fmt: skip
    model(images)  # statistics of batch normalization
    model.eval()
    with torch.no_grad():
        assert torch.equal(trace(model, images).function()(images), model(images))
    check_onnx(model, [images], "onnx", "onnxruntime", NARROW)


class Unusual(nn.Module):
    """A network with a function that only packed files know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(F.pixel_unshuffle(self.conv(x), 2).mean((2, 3)))
        return logits


def test_a_function_without_a_converter_is_refused_by_its_name() -> None:
    model, images = Unusual(), torch.randn(6, 1, 8, 8)
    install(dorefa.build(w=2), model, example=images[:1])
    with pytest.raises(NotExportable, match=r"does not support the function pixel_unshuffle\ntry: .* --to packed"):
        to_onnx(trace(model, images), about_digits("onnx"))


@pytest.mark.parametrize("form", ["onnx", "int8"])
def test_export_and_evaluate_on_the_command_line(form: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["export", str(finished), "--to", form]) == 0
    said = capsys.readouterr().out
    assert "verified in onnxruntime on 450 test images: the classes are equal; logits differ by at most" in said
    file = finished / {"onnx": "network.onnx", "int8": "network-int8.onnx"}[form]
    top1 = []
    for place in (finished, file):
        assert cli(["evaluate", str(place), "--format", "csv"]) == 0
        top1.append(capsys.readouterr().out.splitlines()[1].split(",")[:6])
    assert top1[0][2:4] == top1[1][2:4]
    assert cli(["evaluate", str(finished), "--runtime", "openvino"]) == 2
    assert "has no effect on a run" in capsys.readouterr().err


def test_the_scripts_of_the_guide_give_the_accuracy_of_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "guides" / "export.md").read_text(encoding="utf-8").partition("## Without qbench")[2]
    use, write_data = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[:2]
    export(finished, "onnx", tmp_path / "network.onnx")
    monkeypatch.chdir(tmp_path)
    exec(write_data, {})
    exec(use, {})
    result = json.loads((finished / "result.json").read_text())
    assert float(capsys.readouterr().out) == pytest.approx(result["final"]["test"]["top1"])


@pytest.mark.parametrize("shift", [torch.eye(10)[0] * 100, torch.full((10,), 0.01)], ids=["class", "logits"])
def test_a_file_that_disagrees_is_not_written(
    shift: Tensor, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qbench.analysis import verify_export as module

    monkeypatch.setattr(
        module, "RUNTIMES", {"onnxruntime": lambda *a: lambda x: RUNTIMES["onnxruntime"](*a)(x) + shift}
    )
    assert cli(["export", str(finished), "--to", "onnx", "--out", str(tmp_path / "n.onnx")]) == 2
    error = capsys.readouterr().err
    assert "predicts the run's class for" in error
    assert "try: qbench export RUN --to packed" in error
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    whole = export(finished, "onnx").path.read_bytes()
    assert about_onnx(whole, "file").classes == 10
    file, draws = tmp_path / "n.onnx", random.Random(0)
    for i in range(80):
        damaged = bytearray(whole)
        place = draws.randrange(len(whole))
        damaged[place] ^= 1 << draws.randrange(8)
        data = bytes(damaged) if i % 4 else whole[:place]
        file.write_bytes(data)
        try:
            row = evaluate_file(file).values[0]
        except (CheckpointError, ConfigError):
            continue
        # a byte that changes neither the graph nor its description, such as the producer's name
        assert row["top1"] == evaluate_file(finished / "network.onnx").values[0]["top1"]
    model = onnx.load_model_from_string(whole)
    del model.metadata_props[:]
    with pytest.raises(CheckpointError, match="not a file of qbench export"):
        about_onnx(model.SerializeToString(), "file")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(
    missing: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli(["export", str(finished), "--to", "onnx"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"qbench: the package {missing} is missing", "install it: pip install onnx onnxruntime",
    ]  # fmt: skip


def test_without_openvino_the_other_runtime_verifies(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    lines = export(finished, "int8", tmp_path / "n.onnx").lines
    assert any("verified in onnxruntime" in line for line in lines)
    assert lines[-1] == "not verified in openvino: the package openvino is missing; install it: pip install openvino"
    with pytest.raises(ConfigError, match="pip install openvino"):
        import_extra("openvino", "openvino")
