"""Implements `qbench KEY=VALUE ...` and `qbench -m ...`: trains one run or a sweep and prints results."""

import shutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qbench.cli.errors import SWEEP_WITH_FAILURES
from qbench.errors import ConfigError, Interrupted
from qbench.system.signals import stop_on_signals

if TYPE_CHECKING:
    from qbench.experiment.planned_run import PlannedRun


def train(arguments: list[str]) -> int:
    """Train one run and print its row. With -m, train all combinations and print a table."""
    from qbench.config import compose
    from qbench.experiment.planned_run import planned_runs

    sweep = any(flag in arguments for flag in compose.MULTIRUN)
    if not sweep and compose.launcher(arguments):
        raise ConfigError("hydra/launcher is allowed only in a sweep; to start a sweep, put -m first")
    for word in arguments:
        if not compose.launcher(arguments) and word.lstrip("+").startswith(("hydra.launcher.", "hydra.sweeper.")):
            raise ConfigError(f"{word} has no effect without hydra/launcher=NAME")
    with stop_on_signals() as stop:
        configs = compose.configurations(arguments)
        if not configs:  # with a flag such as --cfg job, Hydra only prints something
            return 0
        refuse_missing_devices(config.runtime.device for config in configs)
        runs = planned_runs(configs)
        return train_all(arguments, runs, stop) if sweep or len(configs) > 1 else train_one(runs[0], stop)


def refuse_missing_devices(devices: Iterable[str]) -> None:
    """Refuse a device that this machine lacks, even if a result from another device is stored.

    torch is imported only if a device other than the CPU is typed.
    """
    for name in dict.fromkeys(devices):
        if name not in ("auto", "cpu"):
            from qbench.experiment.device import choose_device

            choose_device(name)


def train_one(planned: "PlannedRun", stop: Callable[[], int]) -> int:
    """Train one run and print its row.

    If the row is already stored, it is printed without importing torch.
    """
    from qbench.experiment.data_check import check_stored
    from qbench.report.tables.escape import printable
    from qbench.report.tables.run_row import row
    from qbench.runs import manifest
    from qbench.system import files

    check_stored([planned])
    directory = planned.directory
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    result = None if planned.config.rerun else directory.stored()
    if result:
        for change in manifest.changed_since(directory.path / "manifest.json"):
            print(
                f"warning: this result was stored under {printable(change)}; to train again, add rerun=true",
                file=sys.stderr,
            )
        device = str((files.read_json(directory.path / "manifest.json") or {}).get("device") or "auto")
        if planned.config.runtime.device.partition(":")[0] not in ("auto", device):
            print(
                f"warning: this result was computed on {printable(device)}; to train again, add rerun=true",
                file=sys.stderr,
            )
        print(row([result], width))
        directory.remove_checkpoints()
    else:
        from qbench.experiment.context import RunContext
        from qbench.experiment.run import run
        from qbench.runs.metrics_logger import append_text
        from qbench.runs.progress import ProgressReporter

        result = run(planned, RunContext(ProgressReporter(live=planned.config.runtime.progress), stop))
        print(row([result], width))
        append_text(directory.path / "log.txt", row([result]))
    return ConfigError.status if result.status == "unsupported" else 0


def train_all(arguments: list[str], runs: "list[PlannedRun]", stop: Callable[[], int]) -> int:
    """Train the runs of a sweep and print their table."""
    from qbench.config import compose
    from qbench.experiment import jobs, sweep
    from qbench.experiment.data_check import check_stored
    from qbench.report.comparison.compare import compare as comparison_tables
    from qbench.report.tables.table import text
    from qbench.runs.reader import with_baselines

    check_stored(runs)
    if any(planned.config.rerun or not planned.directory.stored() for planned in runs):
        name = compose.launcher(arguments)
        records = sweep.launch_all(arguments, runs, name, stop) if name else sweep.run_all(runs, stop)
    else:
        records = [jobs.outcome(planned) for planned in runs]
    print(text(comparison_tables(with_baselines(records))))
    if stop():
        print(f"qbench: stopped by signal {stop()}; to continue, repeat the command", file=sys.stderr)
        return Interrupted.status
    return SWEEP_WITH_FAILURES if any(record.status not in ("done", "unsupported") for record in records) else 0
