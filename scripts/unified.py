#!/usr/bin/env python3
"""Compare all methods at 2, 3 and 4 bits per weight under one recipe, each with controls of equal bytes.

    .venv/bin/python scripts/unified.py [KEY=VALUE ...] [--format md]

The defaults are CIFAR-10, ResNet-20, all methods, float activations and seeds 0 to 2. Overrides of qbench, such as
dataset=glyphs method=dorefa,ttq seed=0,1,2,3,4, replace the defaults. The controls show which accuracy a network with
the same number of bytes reaches without the method. Every quantized network has two controls, a float network and an
8-bit network (uniform, min-max). A control has the largest model.width at which it takes no more bytes than the
quantized network. Controls are trained with the same recipe and for the same number of epochs. Stored runs are not
trained again.

`--record FILE` stores the results. `--from FILE` prints the tables of stored results and runs nothing.
"""

import argparse
import copy
import json
import os
import platform
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.errors import ConfigError, Interrupted, QbenchError
from qbench.experiment import jobs, sweep
from qbench.experiment.planned_run import planned_runs
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import MissingRuns, settings_of
from qbench.report.statistics.differences import Difference, paired
from qbench.report.tables.table import FORMATS, Table
from qbench.report.tables.units import si_format
from qbench.runs.reader import DONE, RunRecord, dump_records, load_records, with_baselines
from qbench.system.signals import stop_on_signals

if TYPE_CHECKING:
    from qbench.experiment.setup import ExperimentSetup

DEFAULTS = {"dataset": "cifar10", "model": "resnet20", "bits": "w2a32,w3a32,w4a32", "seed": "0,1,2"}
DEFAULTS |= {"out": "outputs/unified", "runtime.tensorboard": "false"}
CONTROLS = {
    "float": {"method": "float", "bits": "w32a32", "init": "float"},
    "8-bit": {"method": "uniform", "bits": "w8a32"},
}
"""The kinds of controls, with their overrides.

Like a quantized network, a control starts from a float baseline with the control's `model.width`, and is trained
further for the same number of epochs. `init=float` makes the float control start from the baseline.
"""
QUANTIZED, BASELINE = "quantized", "baseline"

HEAD = (
    *("method", "W", "A", "levels", "bits/weight", "width", "bytes", "top-1 %", "std", "n", "diff"),
    *(f"over {kind}" for kind in CONTROLS),
)


@dataclass
class NetworkRow:
    """One row of the tables: a setting (the runs of all seeds) with the model.width of its network.

    Args:
        role: "quantized", "baseline", or a kind of control.
        top1: test top-1 in percent, by seed.
        controls: kind of control -> the control, and the row's top-1 minus the control's top-1, paired by seed. The
            value is None if no control is small enough.
    """

    setting: Setting
    role: str
    width: int
    top1: Mapping[int, float]
    controls: dict[str, tuple["NetworkRow", Difference] | None] = field(default_factory=dict)

    @property
    def bytes(self) -> float | None:
        """The ideal number of bytes of the network, or None if its cost is not known."""
        return self.setting.cost.bytes_ideal if self.setting.cost else None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/unified.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="overrides of qbench that replace the defaults")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="print the tables of stored results")
    options = parser.parse_args(arguments)
    try:
        with stop_on_signals() as stop:
            launcher = [key for key in options.keys if key.startswith("hydra")]
            if options.stored:
                records = load_records(options.stored)
            else:
                records = train(sweep_keys(options.keys), launcher, stop)
    except QbenchError as error:
        print(f"scripts/unified.py: {error}", file=sys.stderr)
        return error.status
    note = json.loads(options.stored.read_text())["note"] if options.stored else footer(options.keys, records)
    if options.record:
        stored = json.loads(dump_records(records)) | {"note": note}
        options.record.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
    print(FORMATS[options.format](tables(records)))
    if options.format == "md":
        print(f"\n{note}")
    return 8 if any(run.status not in (DONE, "unsupported") for run in records) else 0


def sweep_keys(typed: Iterable[str]) -> dict[str, str]:
    """Return the configuration keys of the quantized networks.

    Keys that were not typed have the defaults of this script.
    """
    keys = dict(word.partition("=")[::2] for word in typed if not word.startswith("hydra"))
    if "init" in keys:
        raise ConfigError(
            f"init={keys['init']}: not allowed, because every network here starts from its float baseline\nremove init"
        )
    methods = [name for name in groups.option_names("method") if name != "float"]
    return {"method": ",".join(methods)} | DEFAULTS | keys


def compose_sweep(keys: Mapping[str, str]) -> list[Config]:
    """Return the configurations of a sweep."""
    return compose.configurations(["-m", *(f"{key}={value}" for key, value in keys.items())])


def train(keys: dict[str, str], launcher: list[str], stop: Callable[[], int]) -> list[RunRecord]:
    """Train the runs that are not stored, and return all runs with their float baselines.

    The methods are trained first, and then the controls, whose bytes depend on the methods.

    Raises:
        Interrupted: a signal was received.
    """
    quantized = compose_sweep(keys)
    controls = {kind: compose_sweep(keys | changed) for kind, changed in CONTROLS.items()}
    if "width" not in controls["float"][0].model:
        raise ConfigError(f"model={keys['model']}: the network has no key `width`, which the controls need")
    records = run([*quantized, *controls["float"]], launcher, stop)
    budgets = {row.bytes for row in network_rows(list(records.values())) if row.role == QUANTIZED and row.bytes}
    narrow = [
        with_width(config, width) for kind, width in control_widths(budgets, controls) for config in controls[kind]
    ]
    return with_baselines(list((records | run(narrow, launcher, stop)).values()))


def run(configs: list[Config], launcher: list[str], stop: Callable[[], int]) -> dict[Path, RunRecord]:
    """Run the configurations that have no stored result, and return the outcomes of all configurations by path."""
    runs = planned_runs(configs)
    if any(not planned.directory.stored() for planned in runs):
        sweep.launch_all(launcher, runs, "joblib", stop)
    if stop():
        raise Interrupted(f"stopped by signal {stop()}; to continue, repeat the command")
    return {planned.path: jobs.outcome(planned) for planned in runs}


def control_widths(budgets: Iterable[float], controls: Mapping[str, list[Config]]) -> list[tuple[str, int]]:
    """Return the controls for each of several numbers of bytes, as pairs (kind, model.width)."""
    from qbench.experiment.setup import assemble

    setups = {kind: assemble(configs[0], planned=True) for kind, configs in controls.items()}
    widths = {(kind, widest_within(setup, budget)) for kind, setup in setups.items() for budget in budgets}
    return sorted((kind, width) for kind, width in widths if width)


def widest_within(setup: "ExperimentSetup", budget: float) -> int:
    """Return the largest `model.width` at which the network takes at most `budget` bytes.

    The result is at most the network's original width. If no width is small enough, the result is 0.
    """
    widths = range(1, setup.config.model["width"] + 1)
    return bisect_right(widths, budget, key=lambda width: bytes_at(setup, width))


def bytes_at(setup: "ExperimentSetup", width: int) -> float:
    """Return the ideal bytes of a run's network at a given model.width. The network is built on the meta device."""
    from qbench.cost.count import count_cost

    narrow = replace(setup, config=with_width(setup.config, width))
    return count_cost(narrow.install(narrow.float_model("meta")), {}).bytes_ideal


def with_width(config: Config, width: int) -> Config:
    return replace(copy.deepcopy(config), model=config.model | {"width": width})


def network_rows(records: Sequence[RunRecord]) -> list[NetworkRow]:
    """Return one row for each setting (runs of all seeds). Rows of quantized networks contain their controls."""
    available = {run.result.run for run in records if run.status == DONE and run.result}
    rows: list[NetworkRow] = []
    for setting in (setting for table in compare(records) for setting in settings_of(table)):
        top1 = {one.seed: one.top1 for one in setting.runs if one.run in available}
        if not top1:  # a float baseline whose directory is missing
            continue
        role = "8-bit" if (setting.method, setting.bits.w) == ("uniform", 8) else QUANTIZED
        if setting.is_float:
            role = BASELINE if setting.is_baseline else "float"
        rows.append(NetworkRow(setting, role, int(str(setting.model_keys["width"])), top1))
    for row in rows:
        if row.role == QUANTIZED:
            row.controls = {kind: compare_with_control(row, kind, rows) for kind in CONTROLS}
    return rows


def compare_with_control(
    row: NetworkRow, kind: str, rows: Iterable[NetworkRow]
) -> tuple[NetworkRow, Difference] | None:
    """Return the widest control of a kind within the row's bytes, and the row's top-1 minus the control's top-1."""
    fitting = [r for r in rows if r.role == kind and (r.bytes or 0) <= (row.bytes or -1)]
    for control in sorted(fitting, key=lambda r: -r.width)[:1]:
        if seeds := sorted(row.top1.keys() & control.top1.keys()):
            return control, paired(*([r.top1[seed] for seed in seeds] for r in (row, control)))
    return None


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """Return a table of float networks, a table for each number of weight bits, and one of runs without a result."""
    rows, compared = network_rows(records), compare(records)
    full_width = max((row.width for row in rows), default=0)
    floats = [row for row in rows if row.role in (BASELINE, "float") and row.width == full_width]
    result = [rows_table("Float", floats, full_width)]
    for bits in sorted({row.setting.bits.w for row in rows if row.role == QUANTIZED}):
        block = [row for row in rows if row.role == QUANTIZED and row.setting.bits.w == bits]
        pairs = [row.controls[kind] for kind in CONTROLS for row in block]
        controls = {id(pair[0]): pair[0] for pair in pairs if pair}
        title = f"{bits} bits per weight, followed by controls of equal bytes"
        result.append(rows_table(title, [*block, *controls.values()], full_width))
        result[-1].notes.extend(control_sentence(kind, block) for kind in CONTROLS)
    result[-1].notes.extend(dict.fromkeys(note for table in compared for note in table.notes))
    return result + [table for table in compared if any(isinstance(value, MissingRuns) for value in table.values)]


def rows_table(title: str, rows: list[NetworkRow], full_width: int) -> Table:
    return Table(HEAD, [cells(row, full_width) for row in rows], [plain_values(row) for row in rows], title)


def control_sentence(kind: str, block: list[NetworkRow]) -> str:
    """Return a sentence that says which methods are above, below or not significantly different from their control."""
    bits = block[0].setting.bits.w
    sides: dict[str, list[str]] = {"above their control": [], "below": [], "not significantly different": []}
    pairs = [(row, *pair) for row in block if (pair := row.controls[kind])]
    if not pairs:
        return f"W{bits}: no {kind} network fits into these bytes"
    for row, _, d in pairs:
        side = "above their control" if d.low > 0 else "below" if d.high < 0 else "not significantly different"
        sides[side].append(row.setting.label)
    percents = sorted(round(100 * (control.bytes or 0) / (row.bytes or 1)) for row, control, _ in pairs)
    share = f"{percents[0]} % to {percents[-1]} %" if percents[0] < percents[-1] else f"{percents[0]} %"
    methods = "; ".join(f"{side}: {', '.join(names) or 'none'}" for side, names in sides.items())
    size = f"{share} of the bytes of the quantized networks"
    return f"W{bits} compared with {kind} controls, which have {size}. Methods {methods}"


def cells(row: NetworkRow, full_width: int) -> tuple[str, ...]:
    """Return the cells of a row, in the order of `HEAD`."""
    setting, names = row.setting, {"float": "float, fine-tuned", "8-bit": "8-bit (uniform)"}
    pairs = [row.controls.get(kind) for kind in CONTROLS]
    difference = setting.difference
    return (
        names.get(row.role, setting.label) + (", narrowed" if row.width < full_width else ""),
        str(setting.bits.w),
        str(setting.bits.a),
        str(setting.levels or "-"),
        "-" if setting.cost is None else f"{setting.cost.bits_per_weight:.2f}",
        str(row.width),
        "-" if row.bytes is None else f"{si_format(row.bytes)}B",
        f"{setting.top1.mean:.2f}",
        "-" if setting.top1.std is None else f"{setting.top1.std:.2f}",
        str(setting.top1.n),
        "-" if difference is None else f"{difference.mean:+.2f}",
        *("-" if pair is None else format_difference(pair[1]) for pair in pairs),
    )


def format_difference(d: Difference) -> str:
    return f"{d.mean:+.2f}" + (f" ±{d.high - d.mean:.2f}" if d.n > 1 else "")


def plain_values(row: NetworkRow) -> dict[str, object]:
    """Return a row as plain values for JSON."""
    values = row.setting.to_json() | {"role": row.role, "width": row.width}
    for kind, pair in row.controls.items():
        values[f"over {kind}"] = pair and {
            "width": pair[0].width,
            "mean": pair[1].mean,
            "interval": [pair[1].low, pair[1].high] if pair[1].n > 1 else None,
        }
    return values


def footer(typed: Sequence[str], records: Sequence[RunRecord]) -> str:
    """Return a sentence that states which command was run, and how long its runs took.

    Overrides that do not change results, such as `out`, are left out.
    """
    seconds = [run.result.wall_seconds or 0 for run in records if run.result and run.status == DONE]
    command = " ".join(["scripts/unified.py", *(word for word in typed if not word.startswith(("out=", "hydra")))])
    return (
        f"`{command}`: {len(seconds)} runs are done, which include float baselines. "
        f"Sum of the times of the runs: {sum(seconds):.0f} s, "
        f"with one thread per run ({os.cpu_count()} cores, "
        f"{platform.machine()}, {platform.system()}, torch {version('torch')})."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
