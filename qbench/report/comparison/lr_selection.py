"""`lr_search=grid`: the learning rate of a method at its widths, chosen on validation without a look at test
figures.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from qbench.config.schema import RATE, scaled
from qbench.runs.result import Result


@dataclass(kw_only=True)
class SelectedLearningRate:
    """Among the runs of one method at its widths, those of the learning rate that is best on validation.

    `validation` holds for each rate of the grid, lowest first, the mean over `seeds` of validation top-1 in percent
    after the last epoch; None: it was no candidate. `rate` None: nothing could be chosen.
    """

    rate: float | None
    runs: list[Result]
    validation: dict[float, float | None]
    seeds: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """The choice as plain values."""
        grid = [{RATE: rate, "val_top1_mean": figure} for rate, figure in self.validation.items()]
        return {RATE: self.rate, "chosen_on_seeds": self.seeds, "grid": grid}


def choose(name: str, runs: Sequence[Result], lost: Sequence[Result] = ()) -> SelectedLearningRate:
    """Return the rate with the best mean validation top-1 over the seeds that all candidates have.

    Of equal ones it is the rate nearest the recipe's own. A rate that diverged is no candidate, whatever its other
    seeds say; one without any figure yet is none either.

    Args:
        name: what notes call the method at its widths.
        runs: of one method, protocol and widths, all with a figure, in any order.
        lost: those of the same that ended without one.
    """
    own, rates = _grid(runs[0])
    figures: dict[float, dict[int, float]] = defaultdict(dict)
    for run in sorted(runs, key=lambda r: r.run):
        if run.final and run.final.val:
            figures[run.options[RATE]].setdefault(run.seed, run.final.val.top1)
    diverged = {run.options[RATE] for run in lost if run.status == "diverged"}
    candidates = [rate for rate in rates if figures[rate] and rate not in diverged]
    seeds = sorted(set.intersection(*(set(figures[rate]) for rate in candidates))) if candidates else []
    validation = {r: mean(figures[r][s] for s in seeds) if r in candidates and seeds else None for r in rates}

    def rank(rate: float) -> tuple[float, float, float]:
        return round(validation[rate] or 0.0, 9), -round(abs(math.log(rate / own)), 9), -rate

    best = max(candidates, key=rank) if seeds else None
    chosen = [run for run in runs if run.options[RATE] == best and run.seed in figures[run.options[RATE]]]
    found = SelectedLearningRate(rate=best, runs=chosen, validation=validation, seeds=seeds)
    epochs = runs[0].protocol.keys.get("epochs", "?")
    found.notes = [f"{name}: {_told(found, epochs)}", *_missing(name, rates, figures, lost)]
    return found


def _grid(run: Result) -> tuple[float, list[float]]:
    """Return the recipe's own rate and those of the grid, lowest first."""
    keys = run.protocol.keys
    own = float(keys["optim"]["lr"])
    return own, sorted({scaled(own, factor) for factor in keys["lr_grid"]["factors"]})


def _told(choice: SelectedLearningRate, epochs: Any) -> str:
    rates = list(choice.validation)
    if choice.rate is None:
        return f"no {RATE} of {len(rates)} chosen: no seed has a validation figure at every rate that did not diverge"
    told = f"{RATE}={choice.rate:g} chosen of {len(rates)} on validation top-1, {_seeds(choice.seeds)}"
    told += f"; {len(rates)} x {epochs} epochs a seed"
    if choice.rate in (rates[0], rates[-1]):
        told += f"; it is the {'lowest' if choice.rate == rates[0] else 'highest'} of the grid, beyond may be better"
    return told


def _missing(
    name: str, rates: Sequence[float], figures: dict[float, dict[int, float]], lost: Sequence[Result]
) -> list[str]:
    """Say which rates lack which seeds, of those that any rate has, and why."""
    ended = {(run.options[RATE], run.seed): run.status for run in lost}
    seeds = {seed for found in figures.values() for seed in found} | {seed for _, seed in ended}
    gaps: dict[float, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rate in rates:
        for seed in sorted(seeds - set(figures[rate])):
            gaps[rate][ended.get((rate, seed), "not there")].append(seed)
    told = [f"{rate:g} ({'; '.join(f'{why}, {_seeds(s)}' for why, s in own.items())})" for rate, own in gaps.items()]
    return [f"{name}: no validation figure at {RATE} {', '.join(told)}"] if told else []


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def is_candidate(run: Result) -> bool:
    """Whether a run is one of a grid of learning rates, as its protocol says it."""
    keys = run.protocol.keys
    return isinstance(run.options.get(RATE), int | float) and {"optim", "lr_grid"} <= set(keys)
