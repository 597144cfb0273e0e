"""Lists the runs of a command line, with their costs and with estimates of time and memory.

No network is trained, and the data sets need not be on disk. Networks are built on the meta device, where tensors
use no memory. Time is measured on a few training steps with random images on the run's device.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from qbench.analysis.export_forms import export_lines, refused_forms
from qbench.analysis.step_cost import CostEstimator, RunCost, UnsupportedRun, network_key
from qbench.bits import FLOAT
from qbench.config.schema import Runtime, baseline_config
from qbench.cost.count import coverage, idle_layers
from qbench.cost.gpu_speed import SHARES, training_seconds
from qbench.cost.layers import LayerCost, Levels, layer_costs
from qbench.cost.runtimes import runs_on
from qbench.data.loader import batch_size_and_steps
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.setup import ExperimentSetup
from qbench.experiment.sweep_status import read_epoch
from qbench.papers.recipe_differences import recipe_differences
from qbench.report.tables.table import Table
from qbench.report.tables.units import si_format
from qbench.runs.directory import PACKED_FILE, packed_bytes

LONG_SECONDS = 86_400
"""Times on GPUs are estimated too if the total time on the CPU exceeds this number of seconds."""
HEAD = ("run", "state", "epochs", "steps", "params", "size", "BitOps", "memory", "time")
LAYERS_HEAD = (
    "layer", "shape", "W", "A", "G", "levels", "scales", "levels a", "quantizers", "params", "MACs", "BitOps",
    "bytes", "packed",
)  # fmt: skip


def plan(planned: Sequence[PlannedRun], say: Callable[[str], object] = lambda text: None) -> list[Table]:
    """Return a table of all runs, including float baselines, with costs and times.

    If there is only one run, a second table lists its layers. The notes of this table name the supported
    runtimes and the differences from the paper's recipe.

    Args:
        say: prints a message while a measurement takes long.
    """
    trained = [run.config for run in planned if not run.config.is_baseline and not run.config.starts_from_file]
    baselines = [planned_run(baseline_config(config)) for config in trained]
    estimator = CostEstimator(len({network_key(run) for run in [*planned, *baselines]}), say)
    runs = {run.path: run for one in planned for run in with_baseline(one, estimator)}
    table = Table(HEAD, title=_count(len({one.path for one in planned}), len(runs)))
    total = sum(_add_run(table, run, estimator.run_cost(run)) for run in runs.values())
    for path, run in runs.items():
        if measured := packed_bytes(path, run.identity.digest):
            table.notes.append(f"{path / PACKED_FILE}: {measured:,} bytes, measured; the table shows the ideal size")
    last = estimator.run_cost(planned[-1]) if planned else None
    device = last.setup.device.type if isinstance(last, RunCost) else "cpu"
    table.notes.append(
        f"about {format_duration(total)} in total on this machine's {device}, one run at a time; evaluation and "
        f"preparation before training are not included"
    )
    if device == "cpu" and total > LONG_SECONDS:
        table.notes.append(_on_gpus(table, planned[-1]))
    table.notes.append("memory: weights, gradients, optimizer state, and tensors kept for the backward pass")
    table.notes += _not_estimated(planned)
    if estimator.estimated:
        table.notes.append(f"the time of {estimator.estimated} of these networks is estimated from MACs, not measured")
    if len(planned) > 1 or not isinstance(last, RunCost):
        return [table]
    return [table, _layers_table(planned[-1], last)]


def _on_gpus(table: Table, planned: PlannedRun) -> str:
    """Return a note on how long one GPU needs for all runs without a result. The estimate uses published speeds."""
    runtime = planned.config.runtime
    precision = runtime.precision if runtime.precision != "fp32" else "tf32" if runtime.tf32 else "fp32"
    macs = sum(
        values["images"] * values["macs"] for values in table.values if isinstance(values, dict) and values["seconds"]
    )
    times = training_seconds(macs, precision)
    listed = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in times.items())
    share = f"{SHARES[precision]:.0%}".replace("%", " %")
    return f"on one GPU, not measured: {listed}; estimated from MACs and {share} of the published {precision} speed"


def _count(planned: int, with_baselines: int) -> str:
    """Return the number of runs, and the number of float baselines that these runs also need, as text."""
    added = with_baselines - planned
    baselines = f" and {added} float baseline{'s' * (added > 1)}" if added else ""
    return f"{planned} run{'s' * (planned != 1)}{baselines}"


def with_baseline(planned: PlannedRun, estimator: CostEstimator) -> list[PlannedRun]:
    """Return the run, preceded by its float baseline if it needs one."""
    cost = estimator.run_cost(planned)
    if isinstance(cost, UnsupportedRun) or not cost.setup.needs_baseline:
        return [planned]
    # the setup may have another seed, but the baseline must have this run's seed
    return [replace(cost.setup, config=planned.config).baseline, planned]


def _not_estimated(runs: Sequence[PlannedRun]) -> list[str]:
    """Return a note on keys that change the time or the memory of a run, but not their estimates, or an empty list."""
    usual, found = Runtime(), list[str]()
    for config in (planned.config for planned in runs):
        for key in ("precision", "compile", "activation_memory"):
            if (value := getattr(config.runtime, key)) != getattr(usual, key):
                found.append(f"runtime.{key}={str(value).lower()}")
        found += ["the teacher"] if config.distill.on else []
    return [f"time and memory are estimated without {', '.join(dict.fromkeys(found))}"] if found else []


def _add_run(table: Table, planned: PlannedRun, cost: RunCost | UnsupportedRun) -> float:
    """Add the row of a run to the table, and return the run's remaining training time in seconds."""
    directory = planned.directory
    path, stored = str(directory.path), None if planned.config.rerun else directory.stored()
    if isinstance(cost, UnsupportedRun):
        reason, *advice = cost.reason.splitlines()
        table.rows.append((path, f"unsupported: {reason}", *"-" * (len(HEAD) - 2)))
        table.notes += [line for line in advice if line not in table.notes]
        table.values.append({"run": path, "state": "unsupported", "reason": cost.reason, "seconds": 0.0})
        return 0.0
    state = stored.status if stored else "unfinished" if directory.checkpoints() else "new"
    epochs = cost.setup.epochs
    batch_size, steps = batch_size_and_steps(cost.setup.data, cost.setup.optim.batch_size)
    steps *= epochs
    newest = read_epoch(directory.path) if state == "unfinished" and not planned.config.rerun else None
    remaining = 1 - (newest.epoch + 1) / epochs if newest and epochs else 1.0
    seconds = 0.0 if stored else remaining * steps * batch_size * cost.step.seconds
    at_once = batch_size / planned.config.batch_shards  # a process computes its shards one after another
    memory = _parameter_bytes(cost.setup, cost.cost.params) + cost.step.fixed + at_once * cost.step.saved
    cells = (
        si_format(cost.cost.params).rstrip(), format_bytes(cost.cost.bytes_ideal),
        si_format(cost.cost.bitops).rstrip(), format_bytes(memory), format_duration(seconds) if seconds else "-",
    )  # fmt: skip
    table.rows.append((path, "stored" if state == "done" else state, str(epochs), str(steps), *cells))
    values = {"run": path, "state": state, "epochs": epochs, "steps": steps, "seconds": seconds, "memory": memory}
    values["images"] = round(remaining * steps * batch_size)
    table.values.append(values | asdict(cost.cost))
    return seconds


def _parameter_bytes(setup: ExperimentSetup, params: int) -> float:
    """Return the bytes that a run needs for weights, averaged weights (if any), gradients and optimizer state."""
    recipe = setup.optim
    state = 2 if recipe.name != "sgd" else 1 if recipe.momentum else 0
    return 4 * params * (2 + state + (recipe.ema is not None))


def _layers_table(planned: PlannedRun, cost: RunCost) -> Table:
    """Return the table of a run's layers. The totals of this table equal the costs in `qbench compare`."""
    setup, whole, run = cost.setup, cost.cost, planned.identity
    layers = layer_costs(cost.model, setup.method, setup.macs)
    table = Table(LAYERS_HEAD, title=f"{run.model} on {run.dataset}, {run.method} {run.bits}")
    for layer in layers:
        table.rows.append(_layer_cells(layer))
        table.values.append(asdict(layer) | {"bits": layer.bits._asdict()})
    rest = whole.params - sum(layer.params for layer in layers)
    refused = refused_forms(setup, whole.params)
    blank = ("",) * 7
    if rest:
        table.rows.append(("the rest", "", *blank, str(rest), "0", "0", str(4 * rest), str(4 * rest)))
    sums = (whole.params, whole.macs, whole.bitops, whole.bytes_ideal, whole.bytes_packed)
    table.rows.append(("all", "", *blank, *(si_format(value).rstrip() for value in sums)))
    table.values.append({"name": "all"} | asdict(whole))
    table.notes += [
        *filter(None, [coverage(cost.model, setup.macs)]), *idle_layers(cost.model, setup.macs),
        f"weights: {whole.bits_per_weight:.2f} bits per quantized weight, with scales and codebooks; float "
        f"network: {format_bytes(whole.bytes_float)}",
        *runs_on(layers, refused), *export_lines(refused or {}), *recipe_differences(run), *setup.protocol_changes,
    ]  # fmt: skip
    return table


def _layer_cells(layer: LayerCost) -> tuple[str, ...]:
    widths = (str(width) if width < FLOAT else "float" for width in layer.bits)
    quantizers = " ".join(dict.fromkeys(layer.quantizers.values())) or "-"
    numbers = (layer.params, layer.macs, layer.bitops, layer.bytes_ideal, layer.bytes_packed)
    shape = "x".join(map(str, layer.shape)) or "-"
    scales = layer.weights.per if layer.weights else "-"
    return (
        layer.name, shape, *widths, _format_levels(layer.weights), scales, _format_levels(layer.inputs), quantizers,
        *(f"{number:.0f}" if number < 1e4 else si_format(number).rstrip() for number in numbers),
    )  # fmt: skip


def _format_levels(levels: Levels | None) -> str:
    """Return the number of levels as text, such as 4.

    For product quantization, a text such as `128 codewords of 8` means codewords of 8 weights each.
    """
    if levels is None:
        return "-"
    return str(levels.number) if levels.dimension == 1 else f"{levels.number} codewords of {levels.dimension}"


def format_bytes(count: float) -> str:
    """Return a number of bytes as text with three digits and a unit, such as 7.18 kB."""
    return f"{si_format(count)}B"


def format_duration(seconds: float) -> str:
    """Return a time as text with its two largest units, such as 3 h 20 min."""
    rest = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if rest >= size or (unit == "s" and not parts):
            parts.append(f"{rest // size} {unit}")
            rest %= size
    return " ".join(parts[:2])
