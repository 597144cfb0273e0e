"""Makes names for comparisons: titles of tables, labels of methods, and keys by which runs can be selected."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qbench.config.groups import conf_directory, option_file
from qbench.config.identity import added_defaults, whole_floats_as_integers
from qbench.config.schema import RATE, Layers
from qbench.report.comparison import data_versions
from qbench.runs.result import Result
from qbench.system.files import read_yaml


class Block(NamedTuple):
    """The data set, network and protocol hash that all runs in a table share.

    If only a part of the protocol is known, `unknown_protocol` returns the value in place of the hash.
    """

    dataset: str
    model: str
    protocol: str


UNKNOWN = "protocol not known"


def unknown_protocol(keys: Mapping[str, object]) -> str:
    """Return a text in place of a protocol's hash, with the keys that are known."""
    return ", ".join([UNKNOWN, *(f"{key}={value}" for key, value in keys.items())])


def titles(blocks: Mapping[Block, Sequence[Result]]) -> dict[Block, str]:
    """Return one title per block.

    A title names the network, the data set, and the protocol keys that differ between blocks.
    """
    protocols = {block: _protocol_keys(runs[0].protocol.keys) for block, runs in blocks.items()}
    same_network: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for block, keys in protocols.items():
        same_network[block.dataset, block.model] += [] if block.protocol.startswith(UNKNOWN) else [keys]
    differing = {network: _differing(protocols) for network, protocols in same_network.items()}
    named = {}
    for block, keys in protocols.items():
        title = f"{block.model} on {block.dataset}"
        if block.protocol.startswith(UNKNOWN):  # event files do not contain the protocol
            named[block] = f"{title}; {block.protocol}"
            continue
        names = differing[block.dataset, block.model]
        if keys.get("lr_search") == '"grid"':
            names = sorted({*names, "lr_grid.factors", "lr_search"})
        if data_versions.KEY in keys:
            names = sorted({*names, data_versions.KEY})
        typed = [f"{n}={keys.get(n, '?')}" for n in names if n in keys or not n.startswith("lr_grid.")]
        named[block] = title + (f"; protocol with {', '.join(typed)}" if typed else "")
    return named


def directory_name(run: str) -> str:
    """Return the name of a run's directory, which stays the same when a parent folder is moved."""
    return run.rstrip("/").rpartition("/")[2]


def differing_keys(protocols: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the keys whose values differ between protocols, such as `optim.lr`."""
    return _differing([_protocol_keys(keys) for keys in protocols])


def _differing(protocols: Sequence[Mapping[str, str]]) -> list[str]:
    names = sorted(set().union(*protocols))
    return [n for n in names if len({keys.get(n, "?") for keys in protocols}) > 1]


def _protocol_keys(keys: Mapping[str, object]) -> dict[str, str]:
    """Return the keys of a protocol in dotted form, with values as JSON. Keys at their defaults are added."""
    return (_default_keys() if "optim" in keys else {}) | flat(keys)


@cache
def _default_keys() -> dict[str, str]:
    """Return the keys that a protocol leaves out at their default values, in dotted form, with these values as JSON."""
    defaults = added_defaults()
    precision = defaults.pop("runtime")["precision"]
    return flat({**defaults, "precision": precision})


def flat(values: object, prefix: str = "") -> dict[str, str]:
    """Return nested values as a flat dictionary from dotted keys, such as `a.b`, to values as JSON.

    Whole floats are written as integers, so that equal values have the same JSON.
    """
    if not isinstance(values, Mapping):
        return {prefix: _json(values)}
    flattened: dict[str, str] = {}
    for key, value in values.items():
        flattened |= flat(value, f"{prefix}.{key}" if prefix else key)
    return flattened


def _json(value: object) -> str:
    return json.dumps(whole_floats_as_integers(value), sort_keys=True)


def run_keys(run: Result) -> dict[str, str]:
    """Return the keys by which a user can select a run, with values as JSON.

    These are the keys of the protocol, the method, the method's options, the widths and the seed. If the run's own
    value of a key of the protocol is an option of its method, such as the learning rate of a grid search, the result
    contains the run's own value.
    """
    keys: dict[str, object] = {
        "method": run.method, "dataset": run.dataset, "model": run.model, "seed": run.seed, "status": run.status,
        "bits": run.widths,
    }  # fmt: skip
    keys |= {f"bits.{key}": width for key, width in run.bits.items()}
    protocol = _default_keys() | flat(run.protocol.keys)
    keys |= {"runtime.precision": json.loads(protocol["precision"])}
    added = {"method": _added_keys("method", run.method.partition("+")[0]), "model": _added_keys("model", run.model)}
    own = flat({option_key(option): value for option, value in run.options.items()})
    return flat(added) | protocol | own | flat({"model": run.network}) | flat(keys)


def option_key(option: str) -> str:
    """Return the configuration key of an option of a result, such as `method.clip` or `activation.levels`."""
    if option in (RATE, "init") or option.startswith("activation."):
        return option
    return "distill.name" if option == "distill" else f"method.{option}"


@cache
def _added_keys(group: str, name: str) -> Mapping[str, object]:
    """Return the keys that runs with an option of qbench leave out at their default values, with these values."""
    content = _option_file(group, name)
    shared = read_yaml(conf_directory() / "config.yaml").get(group) or {}
    deviations = {key: "none" for key in content if key.endswith("deviation")}
    return {**deviations, **shared.get("added", {}), **content.get("added", {})}


def labels(results: Sequence[Result]) -> dict[int, str]:
    """Return a map from `id(result)` to a label: the method, and the options by which readers tell variants apart.

    These are the options that differ between the results, and options of qbench's methods that are not at their
    defaults.
    """
    by_method: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    identities = [method_identity(result) for result in results]
    for identity, result in zip(identities, results, strict=True):
        if identity not in by_method[result.method]:
            by_method[result.method][identity] = variant(result)
    named = {}
    for method, variants in by_method.items():
        keys = sorted(set().union(*variants.values()))
        differing = [k for k in keys if len({_json(v.get(k)) for v in variants.values()}) > 1]
        for identity, used in variants.items():
            chosen = {*differing, *(key for key in used if not is_default_option(method, key, used[key]))}
            typed = [f"{k}={_as_typed(used[k])}" for k in keys if k in used and k in chosen]
            named[identity] = " ".join([method, *typed])
    return {id(result): named[identity] for identity, result in zip(identities, results, strict=True)}


def is_default_option(method: str, key: str, value: object) -> bool:
    """Return whether an option of a method has its default value. Options without a known default count as defaults.

    A float network is trained from scratch by default, as a float baseline.
    """
    group, _, option = key.rpartition(".")
    if option.endswith("deviation"):
        return False
    if (method, key) == ("float", "init"):
        return value == "scratch"
    weights, _, activations = method.partition("+")
    known = {"": weights, "activation": activations}
    usual = _option_file("method", known[group]) if group in known else {}
    return option not in usual or usual[option] == value


@cache
def _option_file(group: str, name: str) -> Mapping[str, Any]:
    """Return the content of an option's YAML file. The result is empty for a user's function, which has no file."""
    file = option_file(group, name)
    return read_yaml(file) if file.is_file() else {}


def _as_typed(value: object) -> str:
    """Return a value as on the command line, such as `true`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def method_identity(result: Result) -> str:
    """Return a text that identifies a method with its options and network keys, but without the widths."""
    return result.method + _json(variant(result))


def setting_key(result: Result) -> tuple[str, ...]:
    """Return the key of a run's setting. All runs of a setting have the same key."""
    return result.dataset, result.model, result.protocol.hash, method_identity(result), result.widths


def options(result: Result) -> dict[str, object]:
    """Return a method's options, without the learning rate that a grid search varies.

    For float networks, the result also contains `init`.
    """
    options = {key: value for key, value in result.options.items() if key != RATE}
    init = result.protocol.keys.get("init")
    if result.baseline and result.baseline.sha256:  # the protocol has only the file's sha256
        init = Path(result.baseline.run).name
    return options | ({"init": init} if result.method == "float" and init else {})


def variant(result: Result) -> dict[str, object]:
    """Return the options of a run's method, and the network keys of the run as `model.KEY`.

    Runs with different options or network keys belong to different settings.
    """
    return options(result) | {f"model.{key}": value for key, value in result.network.items()}


def changed_layers(layers: Mapping[str, object]) -> str:
    """Return the keys of a layer policy that are not at their defaults, written as `layers.key=value`."""
    usual = asdict(Layers())
    typed = {key: value for key, value in layers.items() if key in usual and value != usual[key]}
    return " ".join(f"layers.{key}={_as_typed(value)}" for key, value in typed.items())


def normalization(network: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a network that its float baseline has too, as the normalization. `act` needs quantizers."""
    return {key: value for key, value in network.items() if key != "act"}


def network_keys(result: Result) -> str:
    """Return the network keys that a run shares with its float baseline, written as `key=value`."""
    return " ".join(f"{key}={value}" for key, value in sorted(normalization(result.network).items()))


def is_baseline(result: Result) -> bool:
    """Return whether a run trained a float network from scratch, so that other runs can start from it."""
    return result.method == "float" and result.protocol.keys.get("init") == "scratch"
