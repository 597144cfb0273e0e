"""Reads weights from other programs: finds the state_dict in a file, and renames its tensors for qbench's network.

A file contains the state_dict itself, or a dictionary with the state_dict under one of the keys `WRAPPERS`. Names of
tensors may begin with prefixes that DataParallel, torch.compile and training frameworks add. The last layer may have
another name than in qbench's network. Notes list everything that is renamed or left out.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from qbench.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema")
"""Keys under which programs store a state_dict. If a file has several of these keys, the first key is used."""

PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.")
"""Prefixes that DataParallel, torch's `AveragedModel`, Lightning, torch.compile and other frameworks add."""

HEADS = ("fc", "linear", "classifier", "head")
"""Usual names of a network's last layer."""

COUNTERS = ("n_averaged",)
"""Names of tensors that are not weights. `AveragedModel` stores the number of its updates under such a name."""


class RenamedWeights(NamedTuple):
    """Tensors with the names that the network uses, and notes on what was renamed or left out."""

    tensors: dict[str, Tensor]
    notes: list[str]


def find_state_dict(content: Mapping[str, object], source: str) -> tuple[Mapping[str, object], list[str], list[str]]:
    """Return the state_dict in a file's content, notes, and the names of other state_dicts in the file.

    If the state_dict is under a key, a note names this key.

    Raises:
        CheckpointError: the value under such a key is not a state_dict.
    """
    present = [key for key in WRAPPERS if key in content and not isinstance(content[key], Tensor)]
    key, *others = [name for name in present if isinstance(content[name], dict)] or present or [""]
    if not key:
        return content, [], []
    found = content[key]
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: its key `{key}` contains a {type(found).__name__}, not a state_dict")
    others += [name for name, value in content.items() if name not in present and _similar(value, found)]
    usual = key == "model" and not others  # as in qbench's own files
    unused = [printable(str(other)) for other in others]
    return found, [] if usual else [f"taken from the key {key}", *(f"{name} not used" for name in unused)], unused


def _similar(value: object, weights: Mapping[str, object]) -> bool:
    """Return whether a value seems to be another state_dict: a dictionary with at least half as many tensors."""
    tensors = sum(isinstance(one, Tensor) for one in value.values()) if isinstance(value, dict) else 0
    return 2 * tensors >= max(1, len(weights))


def rename_weights(
    weights: Mapping[str, object], model: nn.Module, source: str, last: str | None = None
) -> RenamedWeights:
    """Rename a file's tensors: remove prefixes, and give the last layer its name in the network.

    Args:
        last: the name of the network's last layer; by default, of the linear layer that was registered last.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    known = model.state_dict().keys()
    tensors: dict[str, Tensor] = {}
    prefixes: dict[str, None] = {}
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor) or name in COUNTERS]
    for name, value in weights.items():
        if str(name) in others or not isinstance(value, Tensor):
            continue
        short = _without_prefixes(str(name), known)
        if short in tensors:
            raise CheckpointError(f"{source}: two of its tensors would be named {printable(short)}")
        tensors[short] = value
        if len(short) < len(str(name)):
            prefixes[str(name)[: -len(short)]] = None
    notes = [f"prefix {', '.join(list(prefixes)[:3])} removed"] if prefixes else []
    if renamed := _head_names(tensors, model, last or last_linear(model)):
        found, last = renamed
        tensors = {f"{last}{k.removeprefix(found)}" if k.startswith(f"{found}.") else k: v for k, v in tensors.items()}
        notes.append(f"{found} renamed to {last}")
    if others:
        more = ", ..." if len(others) > 3 else ""
        notes.append(f"not weights, so left out: {', '.join(map(printable, others[:3]))}{more}")
    return RenamedWeights(tensors, notes)


def _without_prefixes(name: str, known: Iterable[str]) -> str:
    """Remove prefixes from a name until the network has a tensor of this name or no prefix is left."""
    while name not in known:
        prefix = next((p for p in PREFIXES if name.startswith(p) and name != p), "")
        if not prefix:
            break
        name = name.removeprefix(prefix)
    return name


def last_linear(model: nn.Module) -> str | None:
    """Return the name of the linear layer that was registered last, or None if there is no linear layer."""
    return next((name for name, m in reversed([*model.named_modules()]) if isinstance(m, nn.Linear)), None)


def _head_names(tensors: Mapping[str, Tensor], model: nn.Module, last: str | None) -> tuple[str, str] | None:
    """Return the name of the last layer in the file, and its name in the network.

    Return None if both names are equal, if no layer of the file fits, or if several layers fit.
    """
    known = model.state_dict()
    if last is None or f"{last}.weight" in tensors or f"{last}.weight" not in known:
        return None
    inputs = known[f"{last}.weight"].shape[1:]
    unknown = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and name not in known]
    heads = [name for name in unknown if set(name.split(".")) & set(HEADS) and tensors[f"{name}.weight"].ndim == 2]
    fitting = [name for name in heads if tensors[f"{name}.weight"].shape[1:] == inputs]
    return (fitting[0], last) if len(fitting) == 1 else None


def printable(text: str, length: int = 99) -> str:
    """Return at most `length` characters of a text from a file, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:length])
