"""Separates runs that used different images although their data sets have the same name."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from qbench.config.identity import canonical_json, digest
from qbench.runs.result import Result

KEY = "data"
"""Name of the protocol key for the first digits of the images' sha256. The key is added only if images differ."""


def separate_data_versions(results: Sequence[Result]) -> list[Result]:
    """Return the results. If runs used different images, add a key that identifies the images to their protocols.

    A protocol contains the keys that must be equal in all runs of a table.

    Two runs with the same keys of `dataset` use the same images unless the files were changed between the runs. If the
    files were changed, the runs get different protocols. They are then in different tables and are not compared.
    """
    versions: dict[str, set[str]] = defaultdict(set)
    by_object: dict[tuple[str, int], str] = {}  # runs usually share the keys of their protocol
    keys = []
    for result in results:
        shared = result.dataset, id(result.protocol.keys)
        if shared not in by_object:
            by_object[shared] = _dataset_keys(result)
        keys.append(by_object[shared])
        versions[keys[-1]] |= {result.data_sha256} if result.data_sha256 else set()
    return [_marked(r) if len(versions[key]) > 1 else r for r, key in zip(results, keys, strict=True)]


def _dataset_keys(result: Result) -> str:
    return canonical_json([result.dataset, result.protocol.keys.get("dataset")])


def _marked(result: Result) -> Result:
    version = (result.data_sha256 or "unknown")[:8]
    protocol = replace(
        result.protocol,
        hash=digest({"hash": result.protocol.hash, KEY: version}),
        keys=result.protocol.keys | {KEY: version},
    )
    return replace(result, protocol=protocol)
