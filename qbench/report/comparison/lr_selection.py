"""Selects the learning rate of a setting by validation accuracy, for `lr_search=grid`."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from qbench.config.schema import RATE, scaled
from qbench.runs.result import Result

Accuracies = Mapping[float, Mapping[int, float]]
"""Validation top-1 in percent after the last epoch, by learning rate and seed."""


@dataclass(frozen=True, kw_only=True)
class SelectedLearningRate:
    """The learning rate with the best validation accuracy in a grid of rates.

    `validation` maps each rate of the grid, in ascending order, to the mean validation top-1 over `seeds`. The value is
    None if the rate is not a candidate. `rate` is None if no rate could be selected.
    """

    rate: float | None
    validation: Mapping[float, float | None]
    seeds: tuple[int, ...]

    def to_json(self) -> dict[str, object]:
        """Return the selection as values for JSON."""
        grid = [{RATE: rate, "val_top1_mean": accuracy} for rate, accuracy in self.validation.items()]
        return {RATE: self.rate, "seeds": list(self.seeds), "grid": grid}


class Selection(NamedTuple):
    """The selected learning rate, the runs with this rate, and notes on the selection."""

    learning_rate: SelectedLearningRate
    runs: list[Result]
    notes: list[str]


def select_learning_rate(name: str, runs: Sequence[Result], failed: Sequence[Result] = ()) -> Selection:
    """Select the learning rate with the best mean validation top-1.

    The mean is over the seeds for which all candidate rates have a validation accuracy.

    If several rates have the same accuracy, the rate nearest to the recipe's rate is selected. A rate is not a
    candidate if a run with this rate diverged, or if no run with this rate has a validation accuracy.

    Args:
        name: the method and its widths, for notes.
        runs: runs of one method, protocol and widths, in any order. All runs have a result.
        failed: runs of the same method, protocol and widths that ended without a result.
    """
    recipe_rate, rates = _grid(runs[0])
    accuracies: dict[float, dict[int, float]] = defaultdict(dict)
    for run in sorted(runs, key=lambda r: r.run):
        if run.final and run.final.val:
            accuracies[run.options[RATE]].setdefault(run.seed, run.final.val.top1)
    diverged = {run.options[RATE] for run in failed if run.status == "diverged"}
    candidates = [rate for rate in rates if accuracies[rate] and rate not in diverged]
    seeds = sorted(set.intersection(*(set(accuracies[rate]) for rate in candidates))) if candidates else []
    means = {rate: mean(accuracies[rate][seed] for seed in seeds) for rate in candidates} if seeds else {}

    def rank(rate: float) -> tuple[float, float, float]:
        return round(means[rate], 9), -round(abs(math.log(rate / recipe_rate)), 9), -rate

    best = max(means, key=rank) if means else None
    selected = SelectedLearningRate(rate=best, validation={rate: means.get(rate) for rate in rates}, seeds=tuple(seeds))
    kept = [run for run in runs if run.options[RATE] == best and run.seed in accuracies[run.options[RATE]]]
    keys = runs[0].protocol.keys
    stops_early = keys["optim"].get("patience") is not None
    epochs = ("at most " if stops_early else "") + str(keys.get("epochs", "?"))
    tried = [rate for rate in rates if any(run.options[RATE] == rate for run in (*runs, *failed))]
    notes = [
        f"{name}: {_selection_note(selected, tried, epochs)}",
        *_missing_notes(name, tried, accuracies, failed),
    ]
    return Selection(selected, kept, notes)


def _grid(run: Result) -> tuple[float, list[float]]:
    """Return the recipe's learning rate, and all rates of the grid in ascending order."""
    keys = run.protocol.keys
    recipe_rate = float(keys["optim"]["lr"])
    return recipe_rate, sorted({scaled(recipe_rate, factor) for factor in keys["lr_grid"]["factors"]})


def _selection_note(selected: SelectedLearningRate, tried: Sequence[float], epochs: str) -> str:
    """Return a note on a selection from the rates of a grid. `tried` are the rates with a run, in ascending order."""
    rates = list(selected.validation)
    if selected.rate is None:
        return (
            f"{RATE}: none of {len(rates)} rates is selected, because no seed has a validation accuracy at all "
            "rates that converged"
        )
    note = f"{RATE}={selected.rate:g} is the best of {len(tried)} by validation top-1, {_seeds(selected.seeds)}"
    note += f"; the search cost {len(tried)} x {epochs} epochs per seed"
    if len(tried) < len(rates):  # not trained yet, or the user compares only some of the runs
        others = ", ".join(f"{rate:g}" for rate in rates if rate not in tried)
        note += f"; the compared runs have no other rate of the grid: {others}"
    elif selected.rate == rates[0]:
        note += "; it is the lowest rate of the grid, so a lower rate may be better"
    elif selected.rate == rates[-1]:
        note += "; it is the highest rate of the grid, so a higher rate may be better"
    return note


def _missing_notes(name: str, rates: Sequence[float], accuracies: Accuracies, failed: Sequence[Result]) -> list[str]:
    """Return a note on rates for which some seeds have no validation accuracy, with the reasons."""
    statuses = {(run.options[RATE], run.seed): run.status for run in failed}
    seeds = {seed for by_seed in accuracies.values() for seed in by_seed} | {seed for _, seed in statuses}
    gaps: dict[float, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rate in rates:
        for seed in sorted(seeds - set(accuracies[rate])):
            gaps[rate][statuses.get((rate, seed), "missing")].append(seed)
    parts = [
        f"{rate:g} ({'; '.join(f'{status}, {_seeds(lacking)}' for status, lacking in by_status.items())})"
        for rate, by_status in gaps.items()
    ]
    return [f"{name}: validation accuracy is missing at {RATE} {', '.join(parts)}"] if parts else []


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def is_candidate(run: Result) -> bool:
    """Return whether a run belongs to a grid of learning rates, according to the run's protocol."""
    keys = run.protocol.keys
    return isinstance(run.options.get(RATE), int | float) and {"optim", "lr_grid"} <= set(keys)
