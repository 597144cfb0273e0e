"""The widths that a budget buys, one a layer: a table of allocations, one of layers, and a file to train them by."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qbench.analysis.bit_allocation import (
    Budget,
    BudgetInfeasible,
    allocate,
    extremes,
    parse_budget,
    short,
    total,
    uniform,
)
from qbench.analysis.finished_run import said_of_norms
from qbench.analysis.layer_ablation import FloatBaseline, LayerSensitivity, figures, started
from qbench.errors import ConfigError
from qbench.quant.method import Unsupported
from qbench.report.tables.table import Table
from qbench.system import files

HEAD = ("widths by", "bits", "bytes", "BitOps", "predicted loss", "measured loss", "top-1 %")
MARK = "# qbench sensitivity "
MEASURES = {"loss": "loss", "mse": "weight MSE"}


def choices(found: LayerSensitivity, budget: Budget) -> dict[str, dict[str, int] | None]:
    """Return the widths by each measure and, for comparison, the largest uniform width, under a budget.

    Raises:
        ConfigError: no widths keep it; least and most are named.
    """
    costs, rest = found.costs(budget.kind), found.rest[budget.kind]
    unit = sum(found.weights.values()) if budget.kind == "w" else 1
    room = budget.most * unit - rest
    try:
        chosen: dict[str, dict[str, int] | None] = {
            "loss": allocate(found.loss, costs, room),
            "mse": allocate(found.mse, costs, room),
        }
    except BudgetInfeasible:
        low, high = (short((rest + bound) / unit) for bound in extremes(costs))
        raise ConfigError(
            f"--budget {budget}: these layers and widths cost at least {budget.kind}={low}\n"
            f"allowed: from {budget.kind}={low}, at most of use is {budget.kind}={high}"
        ) from None
    return chosen | {"uniform": uniform(costs, room)}


def sensitivity(
    run: Path,
    words: Sequence[str] = (),
    *,
    budget: str = "",
    measure: str = "loss",
    widths: Sequence[int] = tuple(range(1, 9)),
    images: int = 500,
    bn_stats: str = "recompute",
    out: str = "bits.yaml",
    device: str = "auto",
) -> list[Table]:
    """Choose one width a layer, write it to `out`, and return the tables of allocations and of layers.

    Args:
        words: another method or layer policy than the run's; a float run wants a method.
        budget: bytes=20k or bitops=1G of the whole network, w=3 bits a weight; without, the run's own width.
        measure: what is written: the choice by leave-one-in loss, or by weight MSE.
        bn_stats: `recompute` the statistics of batch normalization behind what is quantized, or `keep` them.
    """
    _check_out(Path(out))
    asked = parse_budget(budget) if budget else None
    start, said = started(run, words, images=images, anew=bn_stats == "recompute", device=device)
    asked = asked or Budget("w", start.parts.method.bits.w)
    try:
        found = figures(start, widths)
        chosen = choices(found, asked)
        tables = [_allocations(run, start, found, chosen, asked), _layers(found, chosen)]
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None
    tables[0].notes += [
        f"{said}; the float network: loss {found.base.loss:.4f}, top-1 {found.base.top1:.2f} %",
        "predicted: that loss and what each layer adds alone; measured: all together; nothing was trained",
        f"normalization behind quantizers: {said_of_norms(bn_stats == 'recompute')}",
        f"written to {out}, by {MEASURES[measure]}; train it by layers=@{out} on the run's command line",
    ]
    typed = " ".join([str(run), *words, f"--budget {asked}", f"--measure {measure}", f"--bn-stats {bn_stats}"])
    files.write(Path(out), _file(typed, measure, chosen[measure] or {}, start, tables[0]).encode())
    return tables


def _allocations(
    run: Path,
    start: FloatBaseline,
    found: LayerSensitivity,
    chosen: Mapping[str, dict[str, int] | None],
    budget: Budget,
) -> Table:
    table = Table(HEAD, title=f"{run}: {start.parts.method_name}, not trained, under {budget}")
    labels = MEASURES | {"uniform": "uniform"}
    whole = sum(found.weights.values())
    for key, widths in chosen.items():
        if widths is None:
            table.notes.append("uniform: no width that all layers can have keeps the budget")
            continue
        measured = start.measure(start.quantized(widths))
        values: dict[str, Any] = {
            "widths_by": key, "bits": sum(k * found.weights[name] for name, k in widths.items()) / whole,
            "bytes": found.rest["bytes"] + total(found.bytes, widths),
            "bitops": found.rest["bitops"] + total(found.bitops, widths),
            "predicted_loss": found.base.loss + total(found.loss, widths),
            "measured_loss": measured.loss, "top1": measured.top1, "widths": widths,
        }  # fmt: skip
        table.values.append(values)
        table.rows.append(
            (
                labels[key], f"{values['bits']:.2f}", short(values["bytes"]), short(values["bitops"]),
                f"{values['predicted_loss']:.4f}", f"{values['measured_loss']:.4f}", f"{values['top1']:.2f}",
            )
        )  # fmt: skip
    return table


def _layers(found: LayerSensitivity, chosen: Mapping[str, dict[str, int] | None]) -> Table:
    """Return a row for every layer: the widths chosen, and the loss that each width alone adds."""
    widths = sorted({width for of in found.loss.values() for width in of})
    head = ("layer", "weights", "loss", "MSE", "uniform", *(f"+ at {width}" for width in widths))
    table = Table(head, title="layers: bits chosen, and the loss that one layer alone adds at each width")
    for name, of in found.loss.items():
        bits = [str(by[name]) if by else "-" for by in chosen.values()]
        harms = [f"{of[width]:+.4f}" if width in of else "-" for width in widths]
        table.rows.append((name, str(found.weights[name]), *bits, *harms))
        values: dict[str, Any] = {key: by[name] if by else None for key, by in chosen.items()}
        losses, errors = ({str(k): x for k, x in figure[name].items()} for figure in (found.loss, found.mse))
        table.values.append({"layer": name, "weights": found.weights[name]} | values | {"harm": losses, "mse": errors})
    return table


def _check_out(out: Path) -> None:
    """Refuse to write over what this verb has not written."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: no such directory: {out.parent}")
    try:
        if out.exists() and not files.read(out).startswith(MARK.encode()):
            raise ConfigError(f"--out {out}: is there, and not from qbench sensitivity\nchoose another: --out FILE")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None


def _file(typed: str, measure: str, widths: Mapping[str, int], start: FloatBaseline, table: Table) -> str:
    """Return widths as `layers.rules` takes them; the run's own rules follow, for layers that are not named."""
    by = "the validation loss that each layer alone adds" if measure == "loss" else "the squared error of the weights"
    lines = [
        f"{MARK}{typed}",
        f"# One width a layer, for which the sum of {by} is least under the budget;",
        f"# measured by {start.parts.method_name} without training. Widths by",
        *("#   {}: {} bits, {} bytes, {} BitOps, predicted loss {}".format(*row) for row in table.rows),
        "# To train it, add layers=@FILE to the run's command line.",
    ]
    rules: dict[str, int | str] = {glob.escape(name): width for name, width in widths.items()}
    rules |= {key: width for key, width in start.parts.policy.rules.items() if key not in rules}
    return "\n".join(lines) + "\n" + yaml.safe_dump(rules, sort_keys=False)
