"""What runs are called, and asked by: titles of protocols, labels of methods, keys as one types them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from qbench.config.schema import RATE
from qbench.runs.result import Result

Block = tuple[str, str, str]
"""Data set, network, hash of the protocol: what runs share that may stand in one table."""


def titles(blocks: Mapping[Block, list[Result]]) -> dict[Block, str]:
    """Name every block: network, data set, and, where several protocols share them, the keys that differ."""
    shown = {key: _protocol(runs[0].protocol.keys) for key, runs in blocks.items()}
    rivals: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for key, own in shown.items():
        rivals[key[:2]] += [own] if key[2] else []
    differing = {pair: _differing(found) for pair, found in rivals.items()}
    named = {}
    for key, own in shown.items():
        dataset, model, protocol = key
        if not protocol:  # event files tell no protocol
            named[key] = f"{model} on {dataset}; protocol not known"
            continue
        names = differing[key[:2]]
        if own.get("lr_search") == '"grid"':
            names = sorted({*names, "lr_grid.factors", "lr_search"})
        told = [f"{n}={own.get(n, '?')}" for n in names if n in own or not n.startswith("lr_grid.")]
        named[key] = f"{model} on {dataset}" + (f"; protocol with {', '.join(told)}" if told else "")
    return named


def _differing(rivals: list[dict[str, str]]) -> list[str]:
    names = sorted(set().union(*rivals))
    return [n for n in names if len({rival.get(n, "?") for rival in rivals}) > 1]


def _protocol(keys: dict[str, Any]) -> dict[str, str]:
    """Return a protocol's keys as typed; `lr_search` is left out of those that have the usual one."""
    return flat({"lr_search": "none"} | keys if "optim" in keys else keys)


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Return nested values as `a.b` -> JSON."""
    if not isinstance(values, dict):
        return {prefix: json.dumps(values)}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def facts(run: Result) -> dict[str, str]:
    """Return what a run may be asked by, key -> JSON: its protocol, method with options, widths, network, seed."""
    own = {"method": run.method, "dataset": run.dataset, "model": run.model, "seed": run.seed, "status": run.status}
    own |= {"bits": run.widths} | {f"bits.{key}": width for key, width in run.bits.items()}
    nested = {"method": run.options, "model": run.network}
    return flat({"lr_search": "none"} | run.protocol.keys) | flat(nested) | flat(own)


def labels(results: Iterable[Result]) -> dict[str, str]:
    """Name each method with its options as typed, those that differ between runs of the same method only."""
    seen: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        seen[result.method].setdefault(identity(result), variant(result))
    named = {}
    for name, variants in seen.items():
        keys = sorted(set().union(*variants.values()))
        unlike = [k for k in keys if len({json.dumps(o.get(k)) for o in variants.values()}) > 1]
        for own, one in variants.items():
            typed = [f"{k}={one[k]}" for k in keys if k in one and (k in unlike or k.endswith("deviation"))]
            named[own] = " ".join([name, *typed])
    return named


def identity(result: Result) -> str:
    """Return what runs of one method with the same options on the same kind of network share, whatever their widths."""
    return result.method + json.dumps(variant(result), sort_keys=True)


def cell(result: Result) -> tuple[str, ...]:
    """Return what the runs of one cell share."""
    return result.dataset, result.model, result.protocol.hash, identity(result), result.widths


def options(result: Result) -> dict[str, Any]:
    """Return a method's options, not the rate to be chosen; a fine-tuned float network says that it is no parent."""
    init = result.protocol.keys.get("init")
    own = {key: value for key, value in result.options.items() if key != RATE}
    return own | ({"init": init} if result.method == "float" and init else {})


def variant(result: Result) -> dict[str, Any]:
    """Return a method's options and, as keys of the network, what this has of its own: runs that differ in either are
    cells of their own.
    """
    return options(result) | {f"model.{key}": value for key, value in result.network.items()}


def network(result: Result) -> str:
    """Return what a run's network has that the method asked for, as typed."""
    return " ".join(f"{key}={value}" for key, value in sorted(result.network.items()))


def is_parent(result: Result) -> bool:
    """Whether a run is a float network from scratch, from which others start."""
    return result.method == "float" and result.protocol.keys.get("init") == "scratch"
