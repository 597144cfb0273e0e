"""Reads claims of papers from the node `claim` of the files below `conf/experiment/claims/`.

A claim consists of comparisons. A comparison has two arms. An arm is a list of command-line overrides that describes a
run, such as `method=ttq bits.w=2`. `scripts/claims.py` trains the runs of all arms with several seeds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.statistics.hypothesis_tests import TESTS

BASELINE = "baseline"
"""Value of the key `second` of a comparison whose second arm consists of the float baselines of the first arm."""
MEASURES = ("top1", "drop", "gradient_mismatch")
CLAIM_KEYS = ("says", "source", "note", "measure", "net", "comparisons")
COMPARISON_KEYS = ("name", "first", "second", "test", "margin")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms and the claimed relation between them.

    Args:
        claim: the name of the claim.
        name: the name of the comparison. If the claim has only one comparison, this is the claim's name.
        first: command-line overrides of the first arm.
        second: command-line overrides of the second arm. None means the float baseline of the first arm.
        test: the kind of hypothesis test, one of `TESTS`.
        margin: the margin of the test, in the unit of the claim's measure.
    """

    claim: str
    name: str
    first: tuple[str, ...]
    second: tuple[str, ...] | None
    test: str
    margin: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, read from the node `claim` of an experiment file.

    Args:
        name: the path of the claim's file below the folder of claims, without suffix.
        says: the claim as a sentence.
        source: the paper, and where in the paper the claim is made.
        note: a remark on how the claim is tested.
        measure: the quantity that is compared. `top1` is the test top-1 in percent after the last epoch. `drop` is this
            top-1 minus the top-1 of the run's float baseline. `gradient_mismatch` is the cosine similarity of
            straight-through gradients and gradients of the smoothed network, averaged over layers. The smoothed network
            has smooth functions in place of the quantizers (`analysis.gradient_mismatch`).
        net: command-line overrides of the trained network on which `gradient_mismatch` is measured.
        comparisons: the comparisons that test the claim.
    """

    name: str
    says: str
    source: str
    note: str = ""
    measure: str = "top1"
    net: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...]

    @property
    def arms(self) -> list[tuple[str, ...]]:
        """Return the different arms whose runs must be trained."""
        if self.measure == "gradient_mismatch":
            return [self.net]
        arms = [arm for c in self.comparisons for arm in (c.first, c.second) if arm is not None]
        return list(dict.fromkeys(arms))


def read_claims(folder: Path) -> list[Claim]:
    """Return the claims below a folder, sorted by name.

    Raises:
        ConfigError: a file has no node `claim`, or the node has an unknown key or a wrong value.
    """
    return [read_claim(path, str(path.relative_to(folder).with_suffix(""))) for path in sorted(folder.rglob("*.yaml"))]


def read_claim(path: Path, name: str) -> Claim:
    """Return the claim in one experiment file.

    Raises the same errors as `read_claims`.
    """
    node = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("claim")
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: the file has no node `claim`, which states what is compared")
    _refuse_unknown(path, node, (*CLAIM_KEYS, *COMPARISON_KEYS))
    single = {key: node.pop(key) for key in COMPARISON_KEYS if key in node}
    entries = node.pop("comparisons", [single] if single else [])
    if not entries or (single and entries != [single]):
        raise ConfigError(f"{path}: claim must have the keys first and second, or a list `comparisons` of such pairs")
    for key in ("says", "source"):
        if not node.get(key):
            raise ConfigError(f"{path}: claim.{key} is missing; every claim needs it")
    if node.get("measure", "top1") not in MEASURES:
        raise ConfigError(f"{path}: claim.measure={node['measure']}: must be one of {', '.join(MEASURES)}")
    node["net"] = tuple(node.get("net", ()))
    claim = Claim(name=name, comparisons=tuple(_comparison(path, name, entry) for entry in entries), **node)
    names = [c.name for c in claim.comparisons]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: the comparisons of a claim must have different names: {', '.join(names)}")
    return claim


def _comparison(path: Path, claim: str, entry: Mapping[str, object]) -> Comparison:
    """Check the entry of a comparison, and return the comparison.

    If the entry has no name, the comparison gets the claim's name.
    """
    _refuse_unknown(path, entry, COMPARISON_KEYS)
    first, second = entry.get("first"), entry.get("second")
    if not isinstance(first, list) or not (isinstance(second, list) or second == BASELINE):
        raise ConfigError(
            f"{path}: first must be a list of command-line arguments; second must be such a list or `{BASELINE}`"
        )
    test, margin = str(entry.get("test", "better")), float(str(entry.get("margin", 0)))
    if test not in TESTS:
        raise ConfigError(f"{path}: test={test}: must be one of {', '.join(TESTS)}")
    if margin < 0 or (test == "equal" and margin == 0):
        raise ConfigError(f"{path}: margin={margin:g}: must be above 0 with test={test}")
    return Comparison(
        claim=claim,
        name=str(entry.get("name", claim)),
        first=tuple(first),
        second=tuple(second) if isinstance(second, list) else None,
        test=test,
        margin=margin,
    )


def _refuse_unknown(path: Path, node: Mapping[str, object], known: Sequence[str]) -> None:
    for key in node:
        if key not in known:
            raise ConfigError(
                f"{path}: claim.{key}: no such key{did_you_mean(key, known)}\nallowed: {', '.join(known)}"
            )


def comparison_values(comparison: Comparison) -> dict[str, object]:
    """Return a comparison as values for JSON. If the second arm is None, its value is `baseline`."""
    values = dataclasses.asdict(comparison)
    return values | {"second": BASELINE if comparison.second is None else comparison.second}
