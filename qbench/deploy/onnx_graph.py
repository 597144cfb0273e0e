"""Builds an ONNX graph node by node, and writes the graph as a file."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qbench.deploy.about import About, about_fields
from qbench.deploy.extras import import_extra

if TYPE_CHECKING:
    from onnx import ModelProto

Attribute = int | float | str | Sequence[int]
"""An attribute of a node."""

METADATA, DIGEST = "qbench", "qbench_sha256"
"""Keys of the file's metadata: the fields of `About` as JSON, and the sha256 over the graph and this JSON."""

QONNX_DOMAIN, QONNX_OPSET = "qonnx.custom_op.general", 1
"""Domain and version of QONNX's operators Quant and BipolarQuant."""

OPSET, OPSET_WITH_UINT2 = (21, 10), (25, 13)
"""Each pair contains the version of the ONNX operators and the version of the file format that these operators need."""


class OnnxGraph:
    """An ONNX graph to which nodes are added. Its input is `images` and its output is `logits`.

    Args:
        shape: channels, height and width of an image.
        form: onnx, int8 (runtimes compute in 8-bit integers) or qonnx.
    """

    def __init__(self, shape: tuple[int, ...], form: str) -> None:
        self._onnx = import_extra("onnx", "onnx")
        self.int8, self.qonnx = form == "int8", form == "qonnx"
        self._nodes: list[object] = []
        self._initializers: dict[str, object] = {}
        self._counts: Counter[str] = Counter()
        self._shapes: dict[str, tuple[int, ...]] = {"images": (2, *shape)}
        self._has_uint2 = False

    def node(self, operator: str, *inputs: str, **attributes: Attribute) -> str:
        """Add a node, and return the name of its output. The name is derived from the operator."""
        return self._named_node(self._unique(operator), operator, inputs, attributes)

    def output(self, value: str) -> None:
        """Make a value the output of the graph."""
        self._named_node("logits", "Identity", [value], {})

    def _named_node(self, name: str, operator: str, inputs: Sequence[str], attributes: Mapping[str, Attribute]) -> str:
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def constant(self, name: str, array: np.ndarray, kind: str | None = None) -> str:
        """Add a constant, and return the name of the constant.

        Args:
            kind: name of an ONNX integer type, such as UINT4. The default is the type of the array.
        """
        name = self._unique(name)
        if kind is None:
            tensor = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        else:
            number = getattr(self._onnx.TensorProto, kind)
            tensor = self._onnx.helper.make_tensor(name, number, array.shape, array.flatten().tolist())
            self._has_uint2 |= kind == "UINT2"
        self._initializers[name] = tensor
        self.set_shape(name, tuple(array.shape))
        return name

    def floats(self, *values: float) -> str:
        """Add a float constant, and return its name. One value becomes a scalar, several values become a vector."""
        return self.constant("constant", np.array(values if len(values) > 1 else values[0], np.float32))

    def integers(self, *values: int) -> str:
        """Add an int64 vector, and return its name."""
        return self.constant("constant", np.array(values, np.int64))

    def shape(self, value: str) -> tuple[int, ...]:
        """Return the shape of a value for a batch of two images."""
        return self._shapes[value]

    def set_shape(self, value: str, shape: tuple[int, ...]) -> None:
        """Set the shape of a value for a batch of two images."""
        self._shapes[value] = shape

    def file(self, about: About) -> bytes:
        """Return the bytes of the ONNX file."""
        helper, float32 = self._onnx.helper, self._onnx.TensorProto.FLOAT
        images = 1 if self.qonnx else "N"  # FINN needs a fixed number of images
        inputs = [helper.make_tensor_value_info("images", float32, [images, *about.shape])]
        outputs = [helper.make_tensor_value_info("logits", float32, [images, about.classes])]
        graph = helper.make_graph(self._nodes, "qbench", inputs, outputs, list(self._initializers.values()))
        opset, version = OPSET_WITH_UINT2 if self._has_uint2 else OPSET
        opsets = [helper.make_opsetid("", opset)]
        opsets += [helper.make_opsetid(QONNX_DOMAIN, QONNX_OPSET)] if self.qonnx else []
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="qbench")
        text = json.dumps(about_fields(about))
        helper.set_model_props(model, {METADATA: text, DIGEST: graph_digest(model, text)})
        self._onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString()
        return data

    def _unique(self, name: str) -> str:
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}_{self._counts[name]}"


def graph_digest(model: "ModelProto", about: str) -> str:
    """Return the sha256 of an ONNX model's operator versions, graph and description."""
    opsets = "".join(f"{entry.domain}:{entry.version} " for entry in model.opset_import)
    graph = model.graph.SerializeToString(deterministic=True)
    return hashlib.sha256(opsets.encode() + about.encode() + graph).hexdigest()
