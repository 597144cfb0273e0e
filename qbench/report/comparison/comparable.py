"""Finds methods that cannot be ranked against each other, because their widths or protocols differ."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple, TypeVar

from qbench.bits import FLOAT, Bits
from qbench.config import registry
from qbench.config.identity import RunIdentity
from qbench.report.comparison.naming import differing_keys
from qbench.runs.result import Result

T = TypeVar("T")
KEYS_LISTED = 4
"""Maximum number of protocol keys that a message lists."""


class Compared(NamedTuple):
    """The values of a run that decide whether it can be ranked against other runs."""

    method: str
    bits: Bits
    dataset: str
    model: str
    protocol_hash: str
    protocol: Mapping[str, object]


def compared_result(result: Result) -> Compared:
    """Return the values of a run's result that decide whether the run can be ranked against other runs."""
    protocol = result.protocol
    return Compared(result.method, Bits(**result.bits), result.dataset, result.model, protocol.hash, protocol.keys)


class Unlike(NamedTuple):
    """A statement that some methods are not ranked against each other, and what to type so that they are."""

    statement: str
    advice: str = ""


def sweep_warnings(runs: Iterable[RunIdentity]) -> list[str]:
    """Return warnings about methods in a sweep that cannot be ranked against each other."""
    compared = [Compared(r.method, r.bits, r.dataset, r.model, r.protocol_hash, r.protocol) for r in runs]
    found = [*unlike_widths(compared), *unlike_protocols(compared)]
    return [f"warning: {unlike.statement}\n{unlike.advice}".rstrip() for unlike in found]


def unlike_widths(runs: Iterable[Compared]) -> list[Unlike]:
    """Return statements about methods that cannot be ranked, because their widths of activations or gradients differ.

    Only methods with the same width of weights are considered.

    Two methods can be ranked if both have runs with the same widths, or if other methods connect their widths. A method
    connects two widths if it has runs with both widths. These runs show the cost of the difference in width.
    """
    by_width: dict[int, dict[str, set[Bits]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        if run.method != "float":
            by_width[run.bits.w][run.method].add(run.bits)
    found: dict[tuple[tuple[str, ...], ...], dict[tuple[str, ...], list[Bits]]] = {}
    for _, widths in sorted(by_width.items()):
        groups = _connected(widths)
        if len(groups) > 1:
            slot = found.setdefault(groups, {group: [] for group in groups})
            for group in groups:
                slot[group] += sorted(set().union(*(widths[method] for method in group)), reverse=True)
    return [_unlike(by_group) for by_group in found.values()]


def unlike_protocols(runs: Iterable[Compared]) -> list[Unlike]:
    """Return statements about methods that have no protocol in common, for each network and data set."""
    protocols: dict[tuple[str, str], dict[str, dict[str, Mapping[str, object]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for run in runs:
        if run.method != "float":
            protocols[run.model, run.dataset][run.method][run.protocol_hash] = run.protocol
    found = []
    for (model, dataset), by_method in protocols.items():
        groups = _connected({method: set(keys) for method, keys in by_method.items()})
        if len(groups) > 1:
            names = differing_keys([keys for values in by_method.values() for keys in values.values()])
            more = f" and {len(names) - KEYS_LISTED} more keys" if len(names) > KEYS_LISTED else ""
            found.append(
                Unlike(
                    f"{model} on {dataset}: {' and '.join(map(', '.join, groups))} have no protocol in common; "
                    f"these are not ranked against each other",
                    f"for equal protocols, give all methods the same {', '.join(names[:KEYS_LISTED])}{more}",
                )
            )
    return found


def _connected(values: Mapping[str, Set[T]]) -> tuple[tuple[str, ...], ...]:
    """Return groups of names.

    Two names are in the same group if they share a value, or if a chain of other names that share values connects them.
    """
    groups: list[set[str]] = []
    for name, own in values.items():
        linked = [group for group in groups if any(values[other] & own for other in group)]
        groups = [group for group in groups if group not in linked] + [{name}.union(*linked)]
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _unlike(by_group: Mapping[tuple[str, ...], Sequence[Bits]]) -> Unlike:
    widths = [bits for group in by_group.values() for bits in group]
    gradients = any(bits.g != FLOAT for bits in widths)
    what = [
        name for key, name in (("a", "activations"), ("g", "gradients")) if len({b._asdict()[key] for b in widths}) > 1
    ]

    def typed(bits: Bits) -> str:
        return str(bits) if gradients else f"w{bits.w}a{bits.a}"

    parts = [f"{', '.join(group)} {', '.join(map(typed, found))}" for group, found in by_group.items()]
    methods = [method for group in by_group for method in group]
    choices = {
        ",".join(map(typed, found)): None
        for found in by_group.values()
        if all(_takes(method, bits) for method in methods for bits in found)
    }
    return Unlike(
        f"{' and '.join(what)} have different widths: {'; '.join(parts)}; these are not ranked against each other",
        f"for equal widths, type {' or '.join(f'bits={choice}' for choice in choices)}" if choices else "",
    )


def _takes(method: str, bits: Bits) -> bool:
    """Return whether a method can quantize the activations and gradients that `bits` quantizes."""
    parts = [registry.widths(name) for name in method.split("+")]
    if len(parts) > 1 and bits.a == FLOAT:  # the second method would have no effect
        return False
    return all(bits._asdict()[key] == FLOAT or any(key in part for part in parts) for key in "ag")
