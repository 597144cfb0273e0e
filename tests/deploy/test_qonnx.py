"""Files for FINN and hls4ml: the run's classes in the package qonnx, integer codes, refusals."""

import sys
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import torch
from conftest import Configure, tiered
from exported import about_digits, quantized
from torch import Tensor, nn

from qbench.analysis.export import evaluate_file, export
from qbench.cli.main import main as cli
from qbench.deploy.agreement import compare
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.onnx_graph import QONNX_DOMAIN
from qbench.deploy.runtimes import RUNTIMES
from qbench.deploy.trace import NotExportable, trace
from qbench.quant.layers import quantized_layers

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
NARROW, WIDE = 2e-5, 2e-2
finished = exported.finished


def needs_qonnx() -> None:
    """Skip the test if the package qonnx is missing."""
    pytest.importorskip("qonnx", reason="needs the package qonnx")


def read_graph(model: nn.Module, images: Tensor) -> Any:
    """Return the graph of a network's file."""
    return onnx.load_model_from_string(to_onnx(trace(model, images), about_digits("qonnx"))).graph


def quantizers(graph: Any) -> list[tuple[Any, dict[str, Any], list[np.ndarray | None]]]:
    """Return the nodes of QONNX, each with its attributes and its constant inputs."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [
        (
            node,
            {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute},
            [constants.get(name) for name in node.input],
        )
        for node in graph.node
        if node.domain == QONNX_DOMAIN
    ]


FORMS = [
    (("method=dorefa", "bits=w2a2"), NARROW),
    (("method=dorefa", "bits=w1a1"), NARROW),
    (("method=dorefa", "bits=w8a8"), WIDE),
    (("method=pact", "bits=w4a4"), NARROW),
    (("method=lsq", "bits=w4a8", "layers.first=8", "layers.last=8"), WIDE),
    (("method=uniform", "bits=w8a8", "layers.first=8", "layers.last=8"), WIDE),
    (("method=ptq", "bits=w8a8"), WIDE),
    (("method=xnor",), NARROW),
    (("method=hwgq", "method.threshold=half_step"), NARROW),
    (("method=gupta", "bits=w8a8g8"), WIDE),
    (("method=twn",), NARROW),
    (("method=bwn",), NARROW),
    (("method=lsq", "bits=w32a2"), NARROW),
    (("method=lsq", "model=mobilenet_v2", "model.width_mult=0.1", "~model.width"), NARROW),
]
FAST = [FORMS[i] for i in (0, 7, 9)]


@pytest.mark.parametrize("form", tiered(FORMS, FAST), ids=[" ".join(words) for words, _ in FORMS])
def test_qonnx_predicts_the_classes_of_the_run(form: tuple[tuple[str, ...], float], configure: Configure) -> None:
    needs_qonnx()
    words, tolerance = form
    model, batches = quantized(configure, *words)
    about = about_digits("qonnx")
    data = to_onnx(trace(model, batches[0]), about)
    labelled = [(images, torch.zeros(len(images))) for images in batches[:2]]
    found = compare(model, RUNTIMES["qonnx"](data, about, "file"), labelled)
    assert found.same_class == found.images
    assert found.largest <= tolerance * max(1.0, found.magnitude)


@pytest.mark.parametrize("form", tiered(FORMS, FAST), ids=[" ".join(words) for words, _ in FORMS])
def test_weights_are_integers_times_a_scale_within_the_bits_of_their_node(
    form: tuple[tuple[str, ...], float], configure: Configure
) -> None:
    words, _ = form
    model, batches = quantized(configure, *words)
    graph = read_graph(model, batches[0])
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1, "FINN needs a fixed number of images"
    nodes = [one for one in quantizers(graph) if one[2][0] is not None]
    assert len(nodes) == sum(layer.bits.w < 32 for layer in quantized_layers(model).values())
    for node, attributes, (weights, scale, *rest) in nodes:
        assert weights is not None
        assert scale is not None
        integers = weights / scale
        assert np.abs(integers - integers.round()).max() < 1e-4
        if node.op_type == "BipolarQuant":
            assert set(integers.round().flatten()) <= {-1.0, 1.0}
            continue
        zero, bits = rest
        assert zero == 0
        assert attributes["signed"] == 1
        assert integers.round().min() >= -(2 ** (bits - 1)) + attributes["narrow"]
        assert integers.round().max() <= 2 ** (bits - 1) - 1


def test_nodes_by_hand(configure: Configure) -> None:
    """DoReFa W2 has the odd integers -3, -1, 1, 3, which need 3 bits; A2 has 0 to 3. XNOR-Net has signs."""
    model, batches = quantized(configure, "method=dorefa", "bits=w2a2")
    for _, attributes, (weights, scale, zero, bits) in quantizers(read_graph(model, batches[0])):
        is_weight = weights is not None
        assert attributes == {"signed": int(is_weight), "narrow": int(is_weight), "rounding_mode": b"ROUND"}
        assert (scale, zero, bits) == (pytest.approx(1 / 3), 0, 3 if is_weight else 2)
    model, batches = quantized(configure, "method=xnor")
    assert {node.op_type for node, *_ in quantizers(read_graph(model, batches[0]))} == {"BipolarQuant"}


def test_the_cost_that_qonnx_counts_has_three_bits_for_dorefa_with_two(configure: Configure) -> None:
    needs_qonnx()
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.inference_cost import inference_cost

    model, batches = quantized(configure, "method=dorefa", "bits=w2a2")
    data = to_onnx(trace(model, batches[0]), about_digits("qonnx"))
    assert "op_mac_SCALEDINT<2>_SCALEDINT<3>" in str(inference_cost(ModelWrapper(data)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=ttq",), "layer1.0.conv1: qonnx export needs equally spaced weights"),
        (("method=inq",), "layer1.0.conv1: qonnx export needs equally spaced weights"),
        (("method=qcnn",), "layer1.0.conv1: qonnx export needs equally spaced weights"),
        (("method=qd", "bits.w=3"), "layer1.0.conv1: qonnx export needs"),
        (("method=dorefa", "bits=w3a3", "method.activation=tanh"), "qonnx export does not support activation quant"),
        (("method=dorefa", "bits=w2a2", "method.activation=abs"), "qonnx export does not support activation quant"),
        (("method=hwgq",), "qonnx export does not support activation quantizers"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_what_quant_nodes_cannot_compute_is_refused(words: tuple[str, ...], message: str, configure: Configure) -> None:
    model, (images, *_) = quantized(configure, *words)
    with pytest.raises(NotExportable) as error:
        read_graph(model, images)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_export_and_evaluate(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_qonnx()
    file = export(finished, "qonnx", tmp_path / "n.onnx").path
    assert evaluate_file(file).values[0]["top1"] == evaluate_file(export(finished).path).values[0]["top1"]
    assert cli(["evaluate", str(file), "--runtime", "openvino"]) == 2
    assert "runs only in the package qonnx" in capsys.readouterr().err


def test_a_missing_package_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "qonnx", None)
    assert cli(["export", str(finished), "--to", "qonnx", "--out", str(tmp_path / "n.onnx")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "qbench: the package qonnx is missing", "install it: pip install qonnx",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
