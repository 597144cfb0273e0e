"""Loads the float weights that a run starts from. The weights come from another run or from a checkpoint file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from qbench.errors import CheckpointError
from qbench.quant.layers import is_quantizer_key
from qbench.runs.result import load_result
from qbench.system import files
from qbench.training.checkpoint import (
    DoesNotFit,
    Saved,
    check_fit,
    first_nonfinite,
    has_digest,
    is_zip,
    load_float_weights,
    load_torch_file,
    unpack,
)
from qbench.training.digests import weights_sha256
from qbench.training.foreign_weights import find_state_dict, last_linear, rename_weights
from qbench.training.safetensors_file import is_safetensors, load_safetensors


class InitialWeights(NamedTuple):
    """A summary of the weights that were loaded.

    Args:
        message: one line that states the file, the number of tensors, and everything that was
            renamed or left out.
        is_float: whether all weights come from a float network in the file. The accuracy of this network can then be
            used as a float baseline. False if the file contains quantizers or the latent weights of a run's quantized
            network, or if the last layer is new.
        quantizers: the tensors of quantizers in the file. The run also starts from these tensors.
        unused: names of other state_dicts in the file, such as averaged weights.
        layers: the `StoredLayers` of a run's checkpoint. Empty for other files.
    """

    message: str
    is_float: bool
    quantizers: dict[str, Tensor]
    unused: list[str]
    layers: Mapping[str, Any]


def is_intact(file: Path, identity: str) -> bool:
    """Return whether a file of weights exists, is undamaged, and belongs to the run with this identity."""
    try:
        return unpack(files.read(file), str(file)).get("identity") == identity
    except (OSError, CheckpointError):
        return False


def load_published(run: Path, name: str = "best.pt") -> Saved:
    """Return the content of a finished run's best.pt or last.pt.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: the file is damaged, or the result.json in its directory belongs to another
            run or to other weights.
    """
    file = run / name
    state = unpack(files.read(file), str(file))
    result = load_result(run)
    if result is None and (run / "result.json").exists():
        raise CheckpointError(f"{run / 'result.json'} is damaged; to restore it, repeat the command of that run")
    if result and result.identity != state.get("identity"):
        raise CheckpointError(f"{file} and the result.json next to it belong to different runs")
    if result and name == "last.pt" and result.weights_sha256 not in (None, weights_sha256(state["model"])):
        raise CheckpointError(f"{file} does not contain the weights that the result.json next to it describes")
    return state


def load_initial_weights(
    model: nn.Module,
    path: Path,
    identity: str | None = None,
    *,
    new_head: bool = False,
    last: str | None = None,
    foreign_names: Mapping[str, str] = {},
) -> InitialWeights:
    """Load float weights into a network.

    Args:
        path: a checkpoint file, or a run's directory with best.pt.
        identity: the identity of the run to which the checkpoint must belong. None allows any run.
        new_head: whether the last layer keeps its random weights instead of weights from the file.
        last: the name of the network's last layer; by default, of the linear layer that was registered last.
        foreign_names: names of quantizers' tensors in files of other programs; see `Method`.

    Raises:
        DoesNotFit: the file belongs to another network.
        CheckpointError: the file is missing or damaged, belongs to another run, or has a different
            number of classes.
    """
    file, (content, notes) = str(_file(path)), _read(path)
    if identity is not None and content.get("identity") != identity:
        raise CheckpointError(f"{file} belongs to another run; to train the float baseline again, add rerun=true")
    weights, found, unused = find_state_dict(content, file)
    tensors, renamed = rename_weights(weights, model, file, last)
    quantizers = _renamed_quantizers(tensors, foreign_names)
    tensors = {name: tensor for name, tensor in tensors.items() if not _ending(name, foreign_names)}
    head = _tensors_of(model, last or last_linear(model))
    if new_head:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
    else:
        _check_classes(tensors, head, file)
    skipped, new = load_float_weights(model, tensors | head if new_head else tensors, file)
    notes = [*found, *renamed, *_cast(tensors), *notes]
    notes += [f"{len(skipped)} skipped ({', '.join(skipped[:3])}, ...)"] if skipped else []
    notes += [f"{len(new)} new ({', '.join(new[:3])}, ...)"] if new else []
    notes += [f"the last layer is new ({', '.join(head)})"] if new_head else []
    notes += [f"{len(quantizers)} tensors of quantizers"] if quantizers else []
    latent = _is_quantized(content, path)
    notes += ["latent weights of a quantized network"] if latent else []
    message = f"weights from {file}: {len(tensors) - len(skipped)} tensors loaded"
    is_float = not (skipped or quantizers or new_head or latent)
    layers = content.get("layers") if "identity" in content else None
    layers = layers if isinstance(layers, dict) else {}
    return InitialWeights(message + "".join(f"; {note}" for note in notes), is_float, quantizers, unused, layers)


def _is_quantized(content: Mapping[str, object], path: Path) -> bool:
    """Return whether a checkpoint of a run contains the latent weights of a quantized network.

    Such weights need no quantizers in the file: DoReFa, for example, computes its levels from the weights alone.
    """
    if "identity" not in content:  # not a file of qbench
        return False
    layers = content.get("layers")  # the key `LAYERS` of `qbench.experiment.trained_network`
    if isinstance(layers, dict):
        return bool(layers.get("quantized"))
    result = load_result(path if path.is_dir() else path.parent)
    return result is not None and bool(result.verified)


def load_quantizers(model: nn.Module, quantizers: Mapping[str, Tensor], source: str) -> None:
    """Load tensors of quantizers into a quantized network.

    Raises:
        CheckpointError: tensors are missing, have wrong shapes or are not finite, or the network
            lacks their quantizers.
    """
    current = model.state_dict()
    ends = {name.rpartition(".")[2] for name in quantizers}
    expected = [n for n in current if is_quantizer_key(n, model) and n.rpartition(".")[2] in ends] if quantizers else []
    differing = sorted(set(expected) ^ set(quantizers))
    differing += [n for n in quantizers if n in current and quantizers[n].shape != current[n].shape]
    if differing:
        raise CheckpointError(
            f"{source}: its quantizers do not fit: {', '.join(differing[:4])}\n"
            "quantize the same layers as the file: set bits and layers.*"
        )
    if bad := first_nonfinite(dict(quantizers)):
        raise CheckpointError(f"{source}: {bad} contains inf or nan")
    model.load_state_dict(quantizers, strict=False)


def _ending(name: str, foreign_names: Mapping[str, str]) -> str | None:
    """Return the key of `foreign_names` with which a tensor's name ends, or None."""
    return next((ending for ending in foreign_names if name.endswith(f".{ending}")), None)


def _renamed_quantizers(tensors: Mapping[str, Tensor], foreign_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of quantizers, renamed from foreign names to the names that qbench uses."""
    return {
        f"{name.removesuffix(ending)}{foreign_names[ending]}": tensor
        for name, tensor in tensors.items()
        if (ending := _ending(name, foreign_names))
    }


def fits(model: nn.Module, path: Path) -> bool:
    """Return whether a checkpoint file contains weights that fit this network."""
    file = str(_file(path))
    weights, *_ = find_state_dict(_read(path)[0], file)
    tensors = rename_weights(weights, model, file).tensors
    try:
        check_fit({k: t for k, t in tensors.items() if not is_quantizer_key(k, model)}, model.state_dict(), file)
    except DoesNotFit:
        return False
    return True


def _file(path: Path) -> Path:
    return path / "best.pt" if path.is_dir() else path


def _read(path: Path) -> tuple[Mapping[str, object], list[str]]:
    """Return the content of a weights file, and notes on its format."""
    file = _file(path)
    try:
        if path.is_dir():
            return load_published(path), []
        data = files.read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; the initial weights are missing") from None
    unchecked = [] if is_zip(data) else ["the format has no checksums, so damage would not be noticed"]
    if is_safetensors(data):
        return load_safetensors(data, str(file)), unchecked
    return unpack(data, str(file)) if has_digest(data) else load_torch_file(data, str(file)), unchecked


def _tensors_of(model: nn.Module, layer: str | None) -> dict[str, Tensor]:
    """Return the tensors of a layer by name. The result is empty if `layer` is None."""
    return {name: tensor for name, tensor in model.state_dict().items() if layer and name.startswith(f"{layer}.")}


def _check_classes(tensors: Mapping[str, Tensor], head: Mapping[str, Tensor], source: str) -> None:
    """Raise `CheckpointError` if the file's last layer differs from the network's only in the number of classes."""
    for name, current in head.items():
        if name in tensors and name.endswith("weight") and tensors[name].ndim == current.ndim:
            (theirs, *inputs), (ours, *expected) = tensors[name].shape, current.shape
            if theirs != ours and inputs == expected:
                raise CheckpointError(
                    f"{source}: its last layer has {theirs} classes, but the data set has {ours}\n"
                    "add model.head=new to start with a new last layer (transfer learning)"
                )


def _cast(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a note if the file contains floats in a precision other than float32."""
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    others = [dtype for dtype in dtypes if dtype != "float32"]
    return [f"{', '.join(others)} converted to float32"] if others else []
