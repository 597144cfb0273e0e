"""Implements `qbench KEY=VALUE ...` and `qbench -m ...`: trains one run or a sweep and prints results."""

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qbench.cli.errors import SWEEP_WITH_FAILURES
from qbench.distributed.group import Group
from qbench.distributed.launch import STARTED_BY, launch, refuse_processes
from qbench.errors import ConfigError, Interrupted
from qbench.system.signals import end_with_parent, stop_on_signals

if TYPE_CHECKING:
    from qbench.experiment.context import RunContext
    from qbench.experiment.planned_run import PlannedRun
    from qbench.runs.reader import RunRecord
    from qbench.runs.result import Result


def train(arguments: list[str]) -> int:
    """Train one run and print its row. With -m, train a run for each combination of values, and print a table."""
    from qbench.config import compose

    sweep = any(flag in arguments for flag in compose.MULTIRUN)
    with stop_on_signals() as stop, joined_group() as group:
        runs = runs_of(arguments)
        if not runs:  # with a flag such as --cfg job, Hydra only prints something
            return 0
        many = "-m" if sweep else "lr_search=grid" if len(runs) > 1 else ""
        if group.size > 1 and many:
            raise ConfigError(
                f"{many} is not possible with {group.size} processes, because they share a single run\n"
                "for a sweep, start one process, with hydra/launcher=joblib or submitit_local"
            )
        refuse_processes(group.size, runs[0].config.batch_shards)
        return train_all(arguments, runs, stop) if many else train_one(runs[0], stop, group)


@contextmanager
def joined_group() -> Iterator[Group]:
    """Join the processes that torchrun has started. torch is imported only if there is more than one process."""
    if launch() is None:
        yield Group()
    else:
        from qbench.distributed import torch_group

        if starter := os.environ.get(STARTED_BY):  # a signal can end torchrun just after it has started this process
            end_with_parent(int(starter))
        with torch_group.joined_group() as group:
            yield group


def runs_of(arguments: list[str]) -> "list[PlannedRun]":
    """Return the runs that a training command defines. Nothing is written.

    Raises:
        ConfigError: the arguments do not define valid runs.
    """
    from qbench.config import compose
    from qbench.experiment.planned_run import planned_runs

    launcher = compose.launcher(arguments)
    if launcher and not any(flag in arguments for flag in compose.MULTIRUN):
        raise ConfigError("hydra/launcher is allowed only in a sweep; to start a sweep, put -m first")
    for word in arguments:
        if not launcher and word.lstrip("+").startswith(("hydra.launcher.", "hydra.sweeper.")):
            raise ConfigError(f"{word} has no effect without hydra/launcher=NAME")
    configs = compose.configurations(arguments)
    refuse_missing_devices(config.runtime.device for config in configs)
    return planned_runs(configs)


def refuse_missing_devices(devices: Iterable[str]) -> None:
    """Refuse a device that this machine does not have, even if the run's result is already stored.

    torch is imported only if the command line names a device other than the CPU.
    """
    for name in dict.fromkeys(devices):
        if name not in ("auto", "cpu"):
            from qbench.experiment.device import choose_device

            choose_device(name)


def train_one(planned: "PlannedRun", stop: Callable[[], int], group: Group) -> int:
    """Train one run and print its row.

    A stored row is printed without importing torch.
    """
    from qbench.report.tables.run_row import row

    result = group.from_first(lambda: stored_result(planned, lambda text: print(f"warning: {text}", file=sys.stderr)))
    if not result:
        from qbench.experiment.context import RunContext
        from qbench.runs.progress import ProgressReporter

        result = new_result(planned, RunContext(ProgressReporter(live=planned.config.runtime.progress), stop, group))
    print(row([result], shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return ConfigError.status if result.status == "unsupported" else 0


def stored_result(planned: "PlannedRun", warn: Callable[[str], object]) -> "Result | None":
    """Return the stored result of a run, or None if the run must be trained. torch is not imported.

    Args:
        warn: function that is called with a warning if another version of the code or another device computed the
            result.

    Raises:
        CheckpointError: the images of the data set have changed since the result was measured.
    """
    from qbench.experiment.data_check import check_stored

    check_stored([planned])
    directory = planned.directory
    result = None if planned.config.rerun else directory.stored()
    if result:
        for change in _changes_since(planned):
            warn(f"this result was computed {change}; to train again, add rerun=true")
        directory.remove_checkpoints()
    return result


def stored_warnings(
    runs: "Sequence[PlannedRun]", advice: str = "to train these runs again, add rerun=true"
) -> list[str]:
    """Return a warning if other versions or another device computed stored results of some runs, else an empty list.

    Args:
        advice: what to type to train these runs again.
    """
    stored = [planned for planned in runs if not planned.config.rerun and planned.directory.has_result()]
    counts = Counter(change for planned in stored for change in _changes_since(planned))
    if not counts:
        return []
    listed = ", ".join(f"{count} {change}" for change, count in counts.items())
    return [f"of {len(stored)} stored results, some were computed differently: {listed}; {advice}"]


def _changes_since(planned: "PlannedRun") -> list[str]:
    """Return texts such as `with torch 2.6.0 (now 2.7.0)` or `on cuda` on how a stored result was computed.

    A text states a difference from the current commit, the current version of torch or the typed device.
    """
    from qbench.report.tables.escape import printable
    from qbench.runs import manifest
    from qbench.system import files

    path = planned.path / "manifest.json"
    changes = [f"with {printable(change)}" for change in manifest.changed_since(path)]
    device = str((files.read_json(path) or {}).get("device") or "auto")
    typed = planned.config.runtime.device.partition(":")[0]
    return changes + ([] if typed in ("auto", device) else [f"on {printable(device)}"])


def new_result(planned: "PlannedRun", context: "RunContext") -> "Result":
    """Execute a run, append its row to log.txt, and return the result."""
    from qbench.experiment.run import run
    from qbench.report.tables.run_row import row
    from qbench.runs.metrics_logger import append_text

    result = run(planned, context)
    if context.writes:
        append_text(planned.path / "log.txt", row([result]))
    return result


def train_all(arguments: list[str], runs: "list[PlannedRun]", stop: Callable[[], int]) -> int:
    """Train the runs of a sweep. Print tables with notes on significant differences, and useful next commands."""
    from qbench.report.comparison.compare import compare as comparison_tables
    from qbench.report.comparison.pairs import conclude
    from qbench.report.tables.table import text
    from qbench.runs.reader import with_baselines

    for warning in stored_warnings(runs):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    records = records_of(arguments, runs, stop)
    print(text(conclude(comparison_tables(with_baselines(records)))))
    if stop():
        print(f"qbench: stopped by signal {stop()}; to continue, repeat the command", file=sys.stderr)
        return Interrupted.status
    print(next_commands((planned.config.out for planned in runs), records))
    return SWEEP_WITH_FAILURES if any(record.status not in ("done", "unsupported") for record in records) else 0


def records_of(
    arguments: list[str], runs: "list[PlannedRun]", stop: Callable[[], int], *, progress: bool = True
) -> "list[RunRecord]":
    """Train the runs of a sweep that have no stored result, and return the records of all runs.

    Args:
        arguments: the command line, which names the launcher.
        progress: whether to show the runs in progress on stderr, and to warn about settings that will not be compared
            with each other.

    Raises:
        CheckpointError: the images of a data set have changed since a stored result was measured.
    """
    from qbench.config import compose
    from qbench.experiment import jobs, sweep
    from qbench.experiment.data_check import check_stored
    from qbench.report.comparison.comparable import sweep_warnings

    check_stored(runs)
    if all(planned.directory.stored() and not planned.config.rerun for planned in runs):
        return [jobs.outcome(planned) for planned in runs]
    for warning in sweep_warnings(planned.identity for planned in runs) if progress else ():
        print(warning, file=sys.stderr, flush=True)
    if name := compose.launcher(arguments):
        return sweep.launch_all(arguments, runs, name, stop, progress=progress)
    return sweep.run_all(runs, stop, progress=progress)


def next_commands(folders: Iterable[str], records: "Sequence[RunRecord]") -> str:
    """Return the lines that end a sweep: the folders of the runs, and what to type to compare these runs again.

    Args:
        records: the runs of the sweep. If the folders also contain other runs, the commands have filters that leave
            those runs out.
    """
    from qbench.report.comparison.filters import filter_words
    from qbench.runs.reader import read

    places = list(dict.fromkeys(folders))
    words = filter_words(records, read(filter(os.path.isdir, places)))
    folder, names = shlex.join(places), shlex.join([*places, *words])
    return f"\nruns   {folder}\nnext   qbench compare {names}\n       qbench compare {names} --html report.html"
