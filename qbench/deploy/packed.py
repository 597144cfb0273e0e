"""Writes and reads packed files, which store each quantized weight with as many bits as its width.

A file is a container (`qbench.deploy.container`) with two arrays:

    floats   float32: float parameters, scales, codebooks, thresholds, levels
    codes    uint8: the codes of the weights, without gaps

The header contains the steps of the network and the fields of `About`. It also contains the shapes and layouts of all
tensors, in the order in which the arrays store the tensors. The file contains no code. The network calls only functions
in `qbench.deploy.network.FUNCTIONS`.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.about import About, about_fields, read_about
from qbench.deploy.codes import MAX_CODE_BITS, Encoded, Levels, code_bits, code_count, packed_size
from qbench.deploy.container import (
    check_image,
    check_logits,
    check_version,
    guarded,
    natural,
    read_container,
    write_container,
)
from qbench.deploy.network import FUNCTIONS, Argument, Batch, Network, Ref, Step, Stored

VERSION = 1
PARTS = ("floats", "codes")
MAX_STEPS = 2**14
FORMS = ("steps", "span", "book")
LEVELS = ("scale", "low", "book")


class Packed(NamedTuple):
    """The content of a packed file, and the number of bytes of each part."""

    network: Network
    about: About
    sizes: Mapping[str, int]


def pack_network(network: Network, about: About) -> bytes:
    """Return the bytes of a packed file."""
    floats: list[np.ndarray] = []

    def place(tensor: Tensor) -> list[int]:
        """Append a tensor to the array `floats`, and return the shape of the tensor."""
        floats.append(tensor.detach().contiguous().numpy().reshape(-1))
        return list(tensor.shape)

    tensors = {name: place(tensor) for name, tensor in network.tensors.items()}
    weights = {
        name: {
            "shape": list(w.shape), "order": list(w.order), "layout": w.layout, "form": w.levels.form,
            "count": w.levels.count, "first": w.levels.first, "step": w.levels.step,
            "scale": place(w.levels.scale), "low": place(w.levels.low), "book": place(w.levels.book),
        }
        for name, w in network.weights.items()
    }  # fmt: skip
    codes = [w.codes for w in network.weights.values()]
    header = {
        "version": VERSION, "about": about_fields(about),
        "steps": [[s.function, _plain(s.args), {k: _plain(v) for k, v in s.kwargs.items()}]
                  for s in network.steps],
        "output": list(network.output),
        "tensors": tensors,
        "weights": weights,
    }  # fmt: skip
    parts = {
        "floats": np.concatenate([np.empty(0, np.float32), *floats]).astype("<f4"),
        "codes": np.concatenate([np.empty(0, np.uint8), *codes]),
    }
    return write_container(parts, header, "packed")


def _plain(argument: Argument) -> object:
    """Return an argument of a step in a form that JSON can store."""
    match argument:
        case Ref(step, item):
            return {"step": step} if item is None else {"step": step, "item": item}
        case Stored(name):
            return {"tensor": name}
        case Batch(factor):
            return {"images": factor}
        case slice():
            return {"slice": [argument.start, argument.stop, argument.step]}
        case float():
            return argument if np.isfinite(argument) else {"float": str(argument)}
        case tuple():
            return [_plain(item) for item in argument]
    return argument


def unpack_network(data: bytes, source: str) -> Packed:
    """Return the content of a packed file.

    The memory for reading is limited, so a damaged file cannot exhaust it.

    Raises:
        CheckpointError: the file is damaged or truncated, has another version of the format, or contains a network that
            cannot run.
    """

    def read() -> Packed:
        packed = _unpack(data, source)
        check_image(packed.about.shape)
        logits = packed.network.function()(torch.zeros(1, *packed.about.shape))
        check_logits(tuple(logits.shape), packed.about.classes)
        return packed

    return guarded(read, data, source)


def _unpack(data: bytes, source: str) -> Packed:
    parts, header = read_container(data, PARTS, source)
    if parts["floats"].dtype != np.float32:
        raise ValueError("the array floats is not float32")
    check_version(header, VERSION, source)
    about = read_about(header["about"], source)
    floats, codes = (_Parts(torch.from_numpy(parts[name])) for name in PARTS)
    named = {name: floats.tensor(shape) for name, shape in header["tensors"].items()}
    weights = {name: _weight(entry, floats, codes) for name, entry in header["weights"].items()}
    if floats.left or codes.left:
        raise ValueError(f"{floats.left} floats and {codes.left} codes too many")
    if len(header["steps"]) > MAX_STEPS:
        raise ValueError(f"{len(header['steps'])} steps; at most {MAX_STEPS}")
    steps = [_step(i, *entry) for i, entry in enumerate(header["steps"])]
    step, item = header["output"]
    network = Network(steps, _ref(step, item, len(steps)), named, weights)
    sizes = {name: part.nbytes for name, part in parts.items()}
    sizes["header"] = len(data) - sum(sizes.values())
    return Packed(network, about, sizes)


class _Parts:
    """Reads parts of a flat tensor, one after the other."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._place = flat, 0

    @property
    def left(self) -> int:
        """Number of elements that have not been read."""
        return len(self._flat) - self._place

    def tensor(self, sizes: Iterable[object]) -> Tensor:
        """Return the next part as a tensor of the given shape."""
        shape = _sizes(sizes)
        if prod(shape) > self.left:
            raise ValueError(f"a tensor of {shape}, but only {self.left} of {len(self._flat)} elements are left")
        start, self._place = self._place, self._place + prod(shape)
        return self._flat[start : self._place].reshape(shape).clone()


def _weight(entry: Mapping[str, Any], floats: _Parts, codes: _Parts) -> Encoded:
    shape, order, form, count = _sizes(entry["shape"]), _sizes(entry["order"]), entry["form"], natural(entry["count"])
    if sorted(order) != list(range(len(shape))) or form not in FORMS or not 1 <= count <= 2**MAX_CODE_BITS:
        raise ValueError(f"weights of {shape} in the form {form} with {count} levels")
    if prod(shape) > 1024 * (codes.left + floats.left + 1):
        raise ValueError(f"weights of {shape}, but only {codes.left} bytes of codes are left")
    levels = Levels(
        form, count, int(entry["first"]), int(entry["step"]), *(floats.tensor(entry[key]) for key in LEVELS)
    )
    size = packed_size(code_count(entry["layout"], shape), code_bits(count))
    return Encoded(shape, order, entry["layout"], levels, codes.tensor([size]).numpy())


def _step(place: int, function: str, args: list[object], kwargs: dict[str, object]) -> Step:
    if function not in FUNCTIONS:
        raise ValueError(f"step {place} calls an unknown function")
    return Step(function, tuple(_argument(v, place) for v in args), {k: _argument(v, place) for k, v in kwargs.items()})


def _argument(value: object, place: int) -> Argument:
    """Return an argument of a step from its JSON form.

    `place` is the index of the step.
    """
    if isinstance(value, list):
        return tuple(_argument(item, place) for item in value)
    if not isinstance(value, dict):
        return value
    if "step" in value:
        return _ref(value["step"], value.get("item"), place)
    if "tensor" in value:
        return Stored(str(value["tensor"]))
    if "images" in value:
        return Batch(natural(value["images"]))
    if "slice" in value:
        return slice(*(None if end is None else int(end) for end in value["slice"]))
    return float(value["float"])


def _ref(step: object, item: object, place: int) -> Ref:
    if not isinstance(step, int) or not -1 <= step < place:
        raise ValueError(f"step {place} reads step {step}")
    return Ref(step, None if item is None else natural(item))


def _sizes(values: Iterable[object]) -> tuple[int, ...]:
    return tuple(natural(value) for value in values)
