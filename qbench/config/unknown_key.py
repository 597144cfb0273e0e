"""Makes the message about a key that does not exist.

The message names the most similar key of the whole configuration, and all keys of the node in which the user typed the
unknown key.

A key is suggested only if the user probably meant it. The typed name must be one of the following: a key of another
node, a misspelled key, part of a key (`workers` for `runtime.num_workers`), or a common synonym of a key.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qbench.config.groups import format_names, group_names
from qbench.config.identity import ADDED
from qbench.config.schema import Config

TYPO, SIMILAR = 0.75, 0.6
"""Smallest similarities (difflib's ratio) at which a key of the same node is suggested.

With a similarity of at least `TYPO`, a key is suggested before all other guesses. With a similarity of at least
`SIMILAR`, a key is suggested only if no other guess fits.
"""

FIELD_WORDS = {
    "architecture": "model",
    "gpu": "runtime.device",
    "gradients": "bits.g",
    "learning_rate": "optim.lr",
    "network": "model",
    "optimizer": "optim",
    "weights": "bits.w",
}
"""Common synonym of a key -> the key in qbench."""

NOT_TYPED = ("claim", "lr_grid.lr", "lr_grid.lr_end")
"""Keys that only experiment files or qbench set. Users never type them."""


def unknown_key_message(typed: str, tree: Mapping[Any, object]) -> str:
    """Return the message about a key that a configuration does not have.

    Args:
        typed: the dotted key as typed, without `+` and without a value.
        tree: the composed configuration, as plain dictionaries.
    """
    composed = [path for path in key_paths(tree) if path != typed and not path.startswith(f"{typed}.")]
    declared = [path for path in schema_paths(Config) if path not in composed and path not in NOT_TYPED]
    place = typed.rpartition(".")[0]
    if typed in declared:
        return f"{typed}: no such key in the selected option of {place}\nto add it, type +{typed}=VALUE"
    known = [*composed, *declared, *(group for group in group_names() if group not in composed)]
    nearest = nearest_key(typed, known)
    while place and not _inside(place, known):
        place = place.rpartition(".")[0]
    hint = f"; did you mean {_as_typed(nearest, declared)}?" if nearest else ""
    allowed = format_names(_as_typed(key, declared) for key in _inside(place, known))
    return f"{typed}: no such key{hint}\nallowed: {allowed}"


def nearest_key(typed: str, known: Sequence[str]) -> str | None:
    """Return the known key that the user probably meant, or None if there is no good guess.

    Args:
        typed: the dotted key as typed.
        known: dotted keys; each node comes before the keys inside it.
    """
    place, _, leaf = typed.rpartition(".")
    beside = {_leaf(key): key for key in _inside(place, known)}
    nodes = {key.rpartition(".")[0] for key in known}
    # among keys with the same name, keys inside the typed node come first, then keys with fewer dots
    elsewhere = sorted(known, key=lambda key: (not key.startswith(f"{place}."), key.count(".")))
    leaves = [key for key in elsewhere if key not in nodes and _leaf(key) != "name"]
    if close := difflib.get_close_matches(leaf, beside, n=1, cutoff=TYPO):
        return beside[close[0]]
    if place == "bits" and (initial := f"bits.{leaf[:1]}") in known:
        return initial
    if same := [key for key in leaves if _leaf(key) == leaf]:
        return same[0]
    if FIELD_WORDS.get(leaf) in known:
        return FIELD_WORDS[leaf]
    misplaced = not place or place not in nodes
    candidates = [*leaves, *beside.values()] if misplaced else list(beside.values())
    if partial := [key for key in candidates if leaf in _leaf(key).split("_")]:
        return partial[0]
    if misplaced and (close := difflib.get_close_matches(leaf, map(_leaf, leaves), n=1, cutoff=TYPO)):
        return next(key for key in leaves if _leaf(key) == close[0])
    close = difflib.get_close_matches(leaf, beside, n=1, cutoff=SIMILAR)
    return beside[close[0]] if close else None


def key_paths(tree: Mapping[Any, object], place: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested dictionaries, with each node before the keys inside it."""
    for key, value in tree.items():
        if key == ADDED:  # users never type this key
            continue
        yield f"{place}{key}"
        if isinstance(value, Mapping):
            yield from key_paths(value, f"{place}{key}.")


def schema_paths(schema: type, place: str = "") -> Iterator[str]:
    """Yield the dotted keys that a dataclass declares, with each node before the keys inside it."""
    for item in dataclasses.fields(schema):
        yield f"{place}{item.name}"
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            yield from schema_paths(item.type, f"{place}{item.name}.")


def _as_typed(key: str, declared: Sequence[str]) -> str:
    """Return a key as the user must type it, with a `+` in front if the composed configuration lacks the key."""
    return f"+{key}" if key in declared else key


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _inside(place: str, known: Iterable[str]) -> list[str]:
    """Return the keys directly inside the node `place`. An empty `place` is the root."""
    return [key for key in known if key.rpartition(".")[0] == place]
