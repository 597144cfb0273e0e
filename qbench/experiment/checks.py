"""Checks that the parts of an experiment are compatible, before anything is written."""

import shutil
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import nn

from qbench.bits import FLOAT
from qbench.config.registry import defaults
from qbench.config.schema import Distill, Node, Optim, Runtime
from qbench.data.dataset import Dataset
from qbench.data.loader import batch_size_and_steps
from qbench.errors import ConfigError
from qbench.experiment.device import COMPILERS
from qbench.models.normalization import batch_norms
from qbench.quant.graph import eval_mode_keeping_rng
from qbench.quant.method import Method, Requires, Unsupported
from qbench.runs.reader import has_debug_config
from qbench.training.schedule import updates_per_epoch, warmup_steps
from qbench.training.task import compute_logits


def check_model_keys(model: Node, method: Method) -> None:
    """Refuse keys of the network that contradict the method's requirements or have no effect."""
    needs = {
        "norm": method.requires.norm,
        "act": None if method.requires.act == "either" else method.requires.act,
    }
    if method.bits.a == FLOAT:
        del needs["act"]
    for key, need in needs.items():
        value = model.get(key, "auto")
        if need is not None and value not in ("auto", need):
            raise ConfigError(
                f"model.{key}={value} contradicts method={method.name}, which requires {need}; leave model.{key}=auto"
            )
    if model.get("act") == "fused" and method.bits.a == FLOAT:
        raise Unsupported("model.act=fused has no effect at bits.a=32, because no quantizer replaces the activation")


def check_runtime(runtime: Runtime, method: Method, device: torch.device, *, is_baseline: bool) -> None:
    """Refuse runtime keys that have no effect, or that this machine does not support."""
    compressible = "cells_input" in method.traits and method.bits.a <= 8
    if runtime.activation_memory == "codes" and not is_baseline and not compressible:
        why = (
            "no activations are quantized"
            if method.bits.a == FLOAT
            else "the method's backward pass needs the float activations"
        )
        raise ConfigError(f"runtime.activation_memory=codes has no effect with {method.name} {method.bits}: {why}")
    if runtime.precision == "fp16" and "fixed_point_gradients" in method.traits:
        raise ConfigError(
            f"runtime.precision=fp16 scales the loss, but {method.name} {method.bits} rounds gradients with a fixed "
            "step\n"
            "use runtime.precision=bf16 or fp32, or bits.g=32"
        )
    if runtime.compile and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ConfigError(
            f"runtime.compile=true needs a C++ compiler on the CPU; none of these was found: {', '.join(COMPILERS)}"
        )


def check_distill(distill: Distill, method: Method) -> None:
    """Refuse a teacher that the method does not use, or that has no effect because nothing is trained."""
    if distill.name == "method" and not method.requires.teacher:
        raise Unsupported(f"{method.name} does not use a teacher with these options; add distill=none")
    if distill.on and not method.needs_training:
        raise Unsupported(f"a teacher has no effect, because {method.name} is not trained; add distill=none")


def check_starts(init: str | None, distill: Distill) -> None:
    """Refuse initial weights and teachers from debug runs. For a debug run, this function is not called.

    Args:
        init: the file or directory of the initial weights. None means that `init` names no file or directory.
        distill: the node that names the teacher.
    """
    teacher = distill.teacher if distill.on and not distill.by_baseline else None
    for key, name in {"init": init, "distill.teacher": teacher}.items():
        path = Path(name or "")
        if name and has_debug_config(path if path.is_dir() else path.parent):
            raise ConfigError(
                f"{key}={name}: the weights of a run with debug=true mean nothing\n"
                "name a run without debug=true, or add debug=true to this run"
            )


def check_average(optim: Optim, method: Method) -> None:
    """Refuse to average parameters if the method keeps no float copy of the parameters."""
    if optim.ema is not None and "no_master" in method.traits:
        raise Unsupported(f"{method.name} keeps no float weights that could be averaged; remove optim.ema")


def check_splits(data: Dataset, optim: Optim, name: str, lr_search: str) -> None:
    """Refuse early stopping and a search of learning rates without validation images, and an empty test split."""
    if optim.patience is not None and not len(data.val):
        raise ConfigError("optim.patience needs a validation split; type dataset.val=0.1 or remove optim.patience")
    if lr_search == "grid" and not len(data.val):
        raise ConfigError("lr_search=grid needs a validation split; type dataset.val=0.1 or lr_search=none")
    if not len(data.test):
        raise ConfigError(f"dataset={name}: the test split is empty; choose another data set")


def check_updates(data: Dataset, optim: Optim, key: str, borders: Sequence[int]) -> None:
    """Refuse `accumulate` above the number of batches in an epoch, and a warm-up as long as a phase of the method.

    Args:
        key: the dotted key of the recipe in the configuration, such as `pretrain.optim`.
        borders: the first epoch of each phase, followed by the number of epochs.
    """
    _, batches = batch_size_and_steps(data, optim.batch_size)
    if optim.accumulate > batches:
        raise ConfigError(
            f"{key}.accumulate={optim.accumulate}: must be at most {batches}, the number of batches in an epoch"
        )
    steps = updates_per_epoch(optim, batches)
    shortest = min((stop - start for start, stop in pairwise(sorted(set(borders)))), default=0)
    if shortest and warmup_steps(optim, steps) >= shortest * steps:
        raise ConfigError(
            f"{key}.warmup={optim.warmup:g}: must be shorter than each phase of training; "
            f"the shortest phase has {shortest} epochs of {steps} steps"
        )


def check_quantizer_decay(optim: Optim, nodes: Iterable[Node]) -> None:
    """Refuse two keys that both set the weight decay of the method's quantizers."""
    for node in nodes:
        own = node.get("decay")
        if None not in (own, optim.quantizer_decay) and own != defaults("method", str(node["name"])).get("decay"):
            raise ConfigError(
                f"method.decay={own} and optim.quantizer_decay={optim.quantizer_decay}: both are the weight decay of "
                f"{node['name']}'s quantizers\ntype one of them"
            )


def check_outputs(model: nn.Module, data: Dataset, name: str) -> None:
    """Refuse a user's network that fails on the images, or that does not return one logit per class.

    On the meta device, even a correct network may fail. The function then raises the network's own error.

    Raises:
        ConfigError: the network does not fit the images or the classes.
    """
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"model={name}: {key} in the network's state_dict is a {type(value).__name__}, but runs store only "
                "tensors\nkeep this state in a buffer (register_buffer) instead of get_extra_state"
            )
    try:
        with eval_mode_keeping_rng(model), torch.no_grad():
            compute_logits(model, torch.zeros(2, *data.shape, device=device), data.classes)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if device.type == "meta" or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"model={name}: the network fails on images of shape {(2, *data.shape)} (N, C, H, W): {reason}\n"
            "make the network fit the images: qbench passes their (C, H, W) to an argument with the name shape"
        ) from error


def check_shards(data: Dataset, optim: Optim, shards: int) -> None:
    """Refuse a number of shards that does not divide the batch size. The training set limits the batch size."""
    size, _ = batch_size_and_steps(data, optim.batch_size)
    if size % shards:
        raise ConfigError(
            f"batch_shards={shards} does not divide {size}, the number of training images; "
            f"optim.batch_size={optim.batch_size} is reduced to this number\n"
            f"type optim.batch_size={size - size % shards or 1}"
        )


def check_norm(model: nn.Module, requires: Requires, method_name: str) -> None:
    """Refuse a user's network without the normalization that the method requires.

    A network of qbench whose normalization can be chosen has an attribute `norm`, a text, and always meets the
    requirement. Any other network is searched for batch normalization layers.
    """
    if isinstance(getattr(model, "norm", None), str):
        return
    norms = batch_norms(model)
    affine = any(getattr(m, "affine", False) for m in norms)
    if requires.norm == "none" and norms:
        raise Unsupported(
            f"{method_name} requires a network without batch normalization; {type(model).__name__} has "
            f"{len(norms)} such layers"
        )
    if requires.norm == "no_affine" and (affine or not norms):
        why = "has scale and shift" if affine else "has no batch normalization"
        raise Unsupported(
            f"{method_name} requires batch normalization without scale and shift; {type(model).__name__} {why}"
        )
