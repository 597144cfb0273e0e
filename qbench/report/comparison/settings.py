"""One cell of a comparison: the plain values of the runs of one method at its widths, by seed and as means."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from qbench.bits import LevelCount
from qbench.report.comparison import naming
from qbench.report.statistics.differences import paired
from qbench.runs.result import Result


def values(label: str, members: list[Result], source: str) -> dict[str, Any]:
    """Return a cell's plain values; `seeds`, `runs`, `top1` and `float_top1` have an entry for each run, in order.

    `top1_half` and `diff_half` are half of the 95 % intervals of the means, None for one seed: it has no spread. `n`
    counts seeds; of one that stands more than once, its mean is averaged.
    """
    first, seeds = members[0], [r.seed for r in members]
    top1 = [r.final.test.top1 for r in members if r.final]
    base = [r.baseline_top1 for r in members]
    diffs = [a - b for a, b in zip(top1, base, strict=True) if b is not None]
    has_diff = len(diffs) == len(top1)
    own = by_seed(seeds, top1)
    cost = next((asdict(r.cost) for r in members if r.cost), {})
    return {
        "method": label,
        "bits": first.bits,
        "levels": next((r.levels for r in members if r.levels is not None), None),
        "bits_per_weight": cost.get("bits_per_weight"),
        "top1_mean": mean(own),
        "top1_std": stdev(own) if len(own) > 1 else None,
        "top1_half": _half(own),
        "n": len(own),
        "seeds": seeds,
        "top1": top1,
        "float_top1": base if has_diff else None,
        "diff_mean": mean(by_seed(seeds, diffs)) if has_diff else None,
        "diff_half": _half(by_seed(seeds, diffs)) if has_diff else None,
        "bytes": cost.get("bytes_ideal"),
        "bytes_packed": cost.get("bytes_packed"),
        "params": cost.get("params"),
        "macs": cost.get("macs"),
        "bitops": cost.get("bitops"),
        **_speed(members),
        **_verified(members),
        "runs": [r.run for r in members],
        "parents": [r.baseline.run for r in members if r.baseline],
        "source": source,
        "is_parent": naming.is_parent(first),
        "name": first.method,
        "options": naming.options(first),
        "network": first.network,
        "dataset": first.dataset,
        "model": first.model,
        "model_keys": first.protocol.keys.get("model"),
        "protocol": first.protocol.hash[:8],
    }


def by_seed(seeds: Sequence[int], figures: Sequence[float]) -> list[float]:
    """Return a figure for each seed: of one that stands more than once, the mean."""
    own: dict[int, list[float]] = defaultdict(list)
    for seed, figure in zip(seeds, figures, strict=True):
        own[seed].append(figure)
    return [mean(values) for values in own.values()]


def _half(figures: Sequence[float]) -> float | None:
    """Return half the 95 % interval of a mean over seeds; None for one seed."""
    if len(figures) < 2:
        return None
    spread = paired(figures, [0.0] * len(figures))
    return spread.high - spread.mean


def _speed(members: Sequence[Result]) -> dict[str, float | None]:
    """Return the mean speed of a cell's runs and the most memory that one of them took."""
    known = [r.speed for r in members if r.speed]
    return {
        "images_per_second": mean(s.images_per_second for s in known) if known else None,
        "seconds_per_epoch": mean(s.seconds_per_epoch for s in known) if known else None,
        "peak_bytes": max(s.peak_bytes for s in known) if known else None,
    }


def _verified(members: Sequence[Result]) -> dict[str, Any]:
    """Return how many layers were verified; for w, a, g the least and most levels found in one, and those allowed."""
    known = [r.verified for r in members if r.verified is not None]
    slots: dict[str, list[LevelCount]] = defaultdict(list)
    for layer in (layer for verified in known for layer in verified.values()):
        for key, count in layer.items():
            slots[key].append(count)
    levels = {
        key: (min(c.found for c in own), max(c.found for c in own), max(c.allowed for c in own))
        for key, own in slots.items()
    }
    return {"verified_layers": min(map(len, known)) if known else None, "levels_found": levels}
