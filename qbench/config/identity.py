"""Defines the identity of a run, which is the set of configuration keys that determine its result.

The identity contains every configuration key that can change the result. It also determines the run's folder. The
protocol is the part of the identity that must be equal in two runs that are compared. `qbench plan` and the search
for stored results need the identity before any data is read. The identity therefore does not contain the fingerprint
of the data. The result records this fingerprint as `data_sha256`.

Some keys were added after results had been stored. They are part of the identity and the protocol only if their value
differs from the default. Stored results therefore keep their identity and stay comparable. On a dataclass field, the
mark `added` declares an added key. In a YAML node, the key `added` maps added keys to their default values.
"""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.bits import Bits
from qbench.config.schema import RATE, SCHEMA, Config, Node, to_dict
from qbench.errors import ConfigError
from qbench.system.caches import cached_for_command
from qbench.system.files import Json, read

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ADDED = "added"
"""The key of a YAML node that maps added keys to their default values."""
WHERE = {"root", "download"}
"""Keys of published data sets for the location and the download of the files. They do not affect the result."""
CACHE = "cache"
"""Key that names the folder of decoded images, for data sets of image files. It does not affect the result."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The identity of a run.

    Args:
        digest: sha256 of `keys`.
        keys: all keys that determine the result, with their values, and the schema's version.
        protocol: the keys whose values must be equal in two runs that are compared.
        protocol_hash: sha256 of `protocol`.
        method: the method's name, such as `ttq+hwgq`.
        options: the options of the method; see `_options`.
        is_baseline: whether the run is a float baseline.
        config: the whole configuration, as config.yaml stores it.
    """

    digest: str
    keys: Node
    protocol: Node
    protocol_hash: str
    method: str
    options: Node
    bits: Bits
    seed: int
    dataset: str
    model: str
    is_baseline: bool
    config: Node


def run_identity(config: Config, recorded: Mapping[str, str] | None = None) -> RunIdentity:
    """Return the identity of the run that a configuration describes.

    Args:
        recorded: maps the keys `init` and `distill.teacher` to the sha256 of the checkpoint that the key named when
            the run was trained. By default, the checkpoints are read to compute these digests.
    """
    keys = _identity_keys(config, recorded or {})
    protocol = _protocol(config, keys)
    key, method, bits = digest(keys), config.method_name, config.bits.resolved()
    dataset, model = str(config.dataset["name"]), str(config.model["name"])
    return RunIdentity(
        digest=key,
        keys=keys,
        protocol=protocol,
        protocol_hash=digest(protocol),
        method=method,
        options=_options(config),
        bits=bits,
        seed=config.seed,
        dataset=dataset,
        model=model,
        is_baseline=config.is_baseline,
        config=to_dict(config),
    )


def _identity_keys(config: Config, recorded: Mapping[str, str]) -> Node:
    """Return all keys that determine the result, with plain values."""
    keys: Node = {"schema": SCHEMA, **decisive_keys(config)}
    for group in ("model", "dataset", "method", "activation"):
        keys[group] = without_added(keys[group])
    dataset = keys["dataset"]
    dataset.pop("recipe", None)  # the recipe's values are under epochs, optim and pretrain
    users_own = ":" in dataset["name"]
    if not users_own and set(dataset) >= WHERE:  # the location of published files does not affect the result
        keys["dataset"] = {key: value for key, value in dataset.items() if key not in WHERE}
    if not users_own:
        keys["dataset"] = {key: value for key, value in keys["dataset"].items() if key != CACHE}
    if rules := keys["layers"].get("rules"):
        keys["layers"]["rules"] = _ordered_if_decisive(rules)
    if config.starts_from_file:
        keys["init"] = recorded.get("init") or file_sha256("init", config.init)
    if config.distill.teacher != "baseline":
        teacher = recorded.get("distill.teacher")
        keys["distill"]["teacher"] = teacher or file_sha256("distill.teacher", config.distill.teacher)
    return keys


def _ordered_if_decisive(rules: Node) -> Json:
    """Return layer rules as they enter the identity: a list of pairs if the order of the rules matters, else a mapping.

    The first rule that matches a layer applies, but the identity ignores the order of a mapping. The order matters if
    two rules have different bit widths, are not in alphabetical order, and could match the same layer. Two patterns can
    match the same layer only if, up to the first wildcard, the text of one begins with the text of the other.
    """
    for (first, width), (second, other) in combinations(rules.items(), 2):
        one, two = (re.split(r"[*?\[]", pattern)[0] for pattern in (first, second))
        if first > second and width != other and (one.startswith(two) or two.startswith(one)):
            return [[pattern, bits] for pattern, bits in rules.items()]
    return rules


def decisive_keys(node: "DataclassInstance") -> Node:
    """Return a dataclass as plain values, without `free` keys and without `added` keys that have default values."""
    keys: Node = {}
    for item in fields(node):
        value = getattr(node, item.name)
        if item.metadata.get("free") or (item.metadata.get("added") and value == _default(item)):
            continue
        keys[item.name] = (
            decisive_keys(value) if is_dataclass(value) and not isinstance(value, type) else copy.deepcopy(value)
        )
    return keys


def _default(item: Field[object]) -> object:
    return item.default if item.default_factory is MISSING else item.default_factory()


def added_defaults(kind: "type[DataclassInstance]" = Config) -> Node:
    """Return the `added` keys of the schema with their default values. `decisive_keys` leaves out these values."""
    keys: Node = {}
    for item in fields(kind):
        if item.metadata.get("free"):
            continue
        if isinstance(item.type, type) and is_dataclass(item.type):
            inner = {} if item.metadata.get("added") else added_defaults(item.type)
            keys |= {item.name: inner} if inner else {}
        elif item.metadata.get("added"):
            keys[item.name] = _default(item)
    return keys


def without_added(node: Node) -> Node:
    """Return a YAML node without its key `added`.

    Keys that are named under `added` and have their default value are left out too.
    """
    later = node.get(ADDED) or {}
    return {key: value for key, value in node.items() if key != ADDED and not (key in later and value == later[key])}


def _protocol(config: Config, keys: Node) -> Node:
    """Return the keys whose values must be equal in two runs that are compared.

    If the method requires random initial weights or a teacher, these are part of the method, not of the protocol. The
    network's keys `norm` and `act` are not part of the protocol either. In a run of a learning-rate grid, the protocol
    contains the recipe's learning rate and the grid, but not the run's own learning rate.
    """
    shared = copy.deepcopy(keys)
    for key in ("method", "activation", "bits", "seed", "runtime", "schema"):
        del shared[key]
    if config.init == "method":
        shared["init"] = "float"
    if config.distill.name == "method":
        shared["distill"] |= {"name": "none"}
    shared["model"] = {key: value for key, value in shared["model"].items() if key not in ("norm", "act")}
    if config.lr_grid.lr is not None:
        shared["optim"] |= {"lr": config.lr_grid.lr, "lr_end": config.lr_grid.lr_end}
    if config.lr_search == "grid":
        shared["lr_grid"] = {"factors": list(config.lr_grid.factors)}
    if "precision" in keys["runtime"]:
        shared["precision"] = keys["runtime"]["precision"]
    return shared


def _options(config: Config) -> Node:
    """Return the options of the method. Options of a separate activation method are named `activation.KEY`.

    Random initial weights and a teacher are options too if the method requires them, because a run without them is a
    different run. In a run of a learning-rate grid, the learning rate is also an option. Added keys with default values
    and `deviation: none` are left out.
    """
    options = {key: value for key, value in without_added(config.method).items() if key != "name"}
    composed = without_added(config.activation)
    options |= {f"activation.{key}": value for key, value in composed.items() if key != "name"}
    options |= {"init": "scratch"} if config.init == "method" else {}
    options |= {"distill": "kd"} if config.distill.name == "method" else {}
    options |= {RATE: config.optim.lr} if config.lr_grid.lr is not None else {}
    return {key: value for key, value in options.items() if not key.endswith("deviation") or value != "none"}


def digest(values: Mapping[str, Json]) -> str:
    """Return the sha256 of plain values.

    The digest does not depend on the order of keys, and it is equal for 1.0 and 1.
    """
    return text_digest(canonical_json(values))


def text_digest(canonical: str) -> str:
    """Return the sha256 of a text that `canonical_json` returned."""
    return hashlib.sha256(canonical.encode()).hexdigest()


def canonical_json(values: Json) -> str:
    """Return the JSON of plain values with sorted keys, in ASCII. Whole floats are written as integers."""
    return _CANONICAL.encode(whole_floats_as_integers(values))


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_UNCHANGED = frozenset({str, int, bool, type(None)})
"""Types of values that `whole_floats_as_integers` returns unchanged."""


def whole_floats_as_integers(value: Any) -> Any:
    """Return a value with whole floats as integers, so that 1.0 and 1 give the same digest."""
    kind = type(value)  # comparing types is several times faster than isinstance with an abstract class
    if kind in _UNCHANGED:
        return value
    if kind is float:
        return int(value) if value.is_integer() else value
    plain = whole_floats_as_integers
    if kind is dict or isinstance(value, Mapping):
        return {key: item if type(item) in _UNCHANGED else plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _UNCHANGED else plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cached_for_command(256)
def file_sha256(key: str, path: str) -> str:
    """Return the sha256 of the checkpoint at `path` when this command first asked for it (`current_sha256`)."""
    return current_sha256(key, path)


def current_sha256(key: str, path: str) -> str:
    """Return the sha256 of the checkpoint at `path`.

    Args:
        key: the configuration key that names the checkpoint, for the error message.
        path: the path of a checkpoint file, or of a run's directory, in which best.pt is read.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    try:
        return hashlib.sha256(read(file)).hexdigest()
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot read {file}: {error.strerror}") from None
