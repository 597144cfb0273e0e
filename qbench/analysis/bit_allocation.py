"""One width a layer under a budget, by integer programming."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from qbench.errors import ConfigError

By = Mapping[str, Mapping[int, float]]
"""Layer -> width -> figure."""

KINDS = {"bytes": "bytes", "bitops": "BitOps", "w": "bits per weight"}
SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SLACK = 1e-6
"""How far, relative to the budget, the solver may step over a bound."""


class Budget(NamedTuple):
    """What may be spent: `kind` is bytes or bitops of the whole network, or w, mean bits of the weights quantized."""

    kind: str
    most: float

    def __str__(self) -> str:
        return f"{self.kind}={short(self.most)}"


class BudgetInfeasible(ValueError):
    """No choice of widths keeps the budget."""


def short(value: float) -> str:
    """Write a figure with four digits and a suffix: 20k, 1.234G."""
    suffix = next((s for s, factor in reversed(SUFFIXES.items()) if abs(value) >= factor), "")
    return f"{value / SUFFIXES[suffix]:.4g}{suffix}"


def parse_budget(text: str) -> Budget:
    """Read bytes=20k, bitops=1G or w=3.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(bytes|bitops|w)=(\d+(?:\.\d*)?|\.\d+)([kMGT]?)", text)
    if not match or (match[1] == "w" and match[3]):
        raise ConfigError(f"--budget {text}: allowed are bytes=20k, bitops=1G (k, M, G, T are powers of 1000) or w=3")
    return Budget(match[1], float(match[2]) * SUFFIXES[match[3]])


def total(figures: By, widths: Mapping[str, int]) -> float:
    """Return the sum of the figures of the widths chosen."""
    return sum(figures[name][width] for name, width in widths.items())


def extremes(costs: By) -> tuple[float, float]:
    """Return the least and the most that can be spent."""
    return sum(min(of.values()) for of in costs.values()), sum(max(of.values()) for of in costs.values())


def allocate(harm: By, costs: By, most: float) -> dict[str, int]:
    """Return the width of every layer for which the sum of harms is least and the sum of costs at most `most`.

    Solved by scipy's milp (HiGHS) with a binary variable for every layer and width.

    Args:
        harm, costs: of the same layers and widths; at least one width a layer.

    Raises:
        TooLittle: even the cheapest widths cost more.
    """
    if extremes(costs)[0] > most:
        raise BudgetInfeasible(f"{extremes(costs)[0]:g} is the least")
    for bound in (most, most * (1 - SLACK), most * (1 - 10 * SLACK)):
        found = _solve(harm, costs, bound)
        if found and total(costs, found) <= most:
            return found
    return {name: min(of, key=lambda width: of[width]) for name, of in costs.items()}


def _solve(harm: By, costs: By, most: float) -> dict[str, int] | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(name, width) for name, of in harm.items() for width in of]
    value = np.array([harm[name][width] for name, width in pairs])
    spent = np.array([costs[name][width] for name, width in pairs])
    once = np.array([[name == layer for name, _ in pairs] for layer in harm], dtype=float)
    unit, scale = max(most, 1e-300), float(np.abs(value).max()) or 1.0
    solved = milp(
        value / scale,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(spent[None] / unit, -np.inf, most / unit)],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return {name: width for (name, width), x in zip(pairs, solved.x, strict=True) if x > 0.5}


def uniform(costs: By, most: float) -> dict[str, int] | None:
    """Return the largest width that all layers can have under the budget; None where there is none."""
    shared = set.intersection(*(set(of) for of in costs.values()))
    for width in sorted(shared, reverse=True):
        if sum(of[width] for of in costs.values()) <= most:
            return dict.fromkeys(costs, width)
    return None
