"""Runs ONNX files on the CPU, in ONNX Runtime, OpenVINO or the package qonnx."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qbench.deploy.about import About, read_about
from qbench.deploy.extras import import_extra
from qbench.deploy.onnx_graph import DIGEST, METADATA, graph_digest
from qbench.errors import CheckpointError

Function = Callable[[Tensor], Tensor]
"""Function from normalized images (N, C, H, W) to logits (N, classes)."""


def in_onnxruntime(data: bytes, about: About, source: str) -> Function:
    """Load an ONNX file in ONNX Runtime, and return the network as a function.

    Raises:
        CheckpointError: the file is damaged, or ONNX Runtime lacks an operator.
        ConfigError: the package onnxruntime is missing.
    """
    library = import_extra("onnxruntime", "onnx")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = about.threads, 4
    if about.form == "onnx":
        # without this option, ONNX Runtime converts weights of fewer than 8 bits to floats in every call
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    with _named_errors(source, "ONNX Runtime"):
        session = library.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with _named_errors(source, "ONNX Runtime"):
            return torch.from_numpy(session.run(["logits"], {"images": images.float().contiguous().numpy()})[0])

    return run


def in_openvino(data: bytes, about: About, source: str) -> Function:
    """Load an ONNX file in OpenVINO, and return the network as a function.

    Raises:
        CheckpointError: the file is damaged, or OpenVINO lacks an operator or type.
        ConfigError: the package openvino is missing.
    """
    library = import_extra("openvino", "openvino")
    with _named_errors(source, "OpenVINO"):
        core = library.Core()
        settings = {"INFERENCE_NUM_THREADS": about.threads, "INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(core.read_model(data), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        with _named_errors(source, "OpenVINO"):
            return torch.from_numpy(model({"images": images.float().contiguous().numpy()})["logits"].copy())

    return run


def in_qonnx(data: bytes, about: About, source: str) -> Function:
    """Load an ONNX file in the package qonnx, and return the network as a function.

    qonnx runs one node after the other.

    Raises:
        CheckpointError: the file is damaged, or qonnx lacks an operator.
        ConfigError: the package qonnx is missing.
    """
    import_extra("qonnx", "qonnx")
    wrapper = import_extra("qonnx.core.modelwrapper", "qonnx")
    execution = import_extra("qonnx.core.onnx_exec", "qonnx")
    shapes = import_extra("qonnx.transformation.infer_shapes", "qonnx")
    models: dict[int, object] = {}

    def model_for(count: int) -> object:
        """Return the model for a batch of `count` images."""
        if count not in models:
            model = wrapper.ModelWrapper(data)
            model.set_tensor_shape("images", [count, *about.shape])
            model.set_tensor_shape("logits", [count, about.classes])
            models[count] = model.transform(shapes.InferShapes())
        return models[count]

    def run(images: Tensor) -> Tensor:
        with _named_errors(source, "qonnx"):
            inputs = {"images": images.float().contiguous().numpy()}
            return torch.from_numpy(execution.execute_onnx(model_for(len(images)), inputs)["logits"].copy())

    return run


RUNTIMES: Mapping[str, Callable[[bytes, About, str], Function]] = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "qonnx": in_qonnx,
}


def about_onnx(data: bytes, source: str) -> About:
    """Return an ONNX file's description of its run.

    Raises:
        CheckpointError: the file is damaged, or `qbench export` did not write it.
        ConfigError: the package onnx is missing.
    """
    onnx = import_extra("onnx", "onnx")
    with _named_errors(source, "onnx"):
        model = onnx.load_model_from_string(data)
        values = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA not in values:
        raise CheckpointError(f"{source} is not a file of qbench export: it has no metadata `{METADATA}`")
    if values.get(DIGEST) != graph_digest(model, values[METADATA]):
        raise CheckpointError(f"{source} is damaged: its sha256 does not match its content")
    try:
        return read_about(json.loads(values[METADATA]), source)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{source} is damaged: the metadata is not JSON") from None


@contextmanager
def _named_errors(source: str, reader: str) -> Iterator[None]:
    """Convert any error of a runtime to a `CheckpointError` that names the file."""
    try:
        yield
    except Exception as error:
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:200]).strip() or type(error).__name__
        raise CheckpointError(f"{source} cannot be run by {reader}: {reason}") from None
