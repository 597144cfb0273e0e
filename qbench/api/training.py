"""Trains runs from Python, with the functions of the command line."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.api.host import exclusive_call, recorded_command, torch_settings_restored
from qbench.api.results import Runs
from qbench.api.words import Value, command_words
from qbench.cli.train import new_result, records_of, runs_of, stored_result
from qbench.config.compose import CONFIG_DIRECTORY, MULTIRUN
from qbench.errors import ConfigError
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result

if TYPE_CHECKING:
    from qbench.experiment.planned_run import PlannedRun

logger = logging.getLogger("qbench")


class LogReporter(ProgressReporter):
    """Shows no progress. Messages go to the logger `qbench`, which prints only warnings unless it is set up."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def say(self, text: str) -> None:
        """Log a message, and write it to log.txt."""
        warning = text.startswith("warning: ")
        logger.log(logging.WARNING if warning else logging.INFO, text.removeprefix("warning: "))
        self.keep(text)


def run(*words: str, out: str | Path | None = None, progress: bool = False, **keys: Value) -> Result:
    """Return the result of a run, as `qbench KEY=VALUE ...` does.

    A stored result is returned at once. An unfinished run is continued from its last checkpoint. Otherwise the
    float baseline is trained, unless it is stored, and then the run.

    Example:
        >>> result = qbench.run("method=dorefa", "bits=w2a2")
        >>> result = qbench.run(method="dorefa", seed=1, **{"bits.w": 2})

    A process trains one run at a time. A call from another thread waits. While a run trains, other threads must not
    draw random numbers. Ctrl-C saves a checkpoint and raises `KeyboardInterrupt`; the same call then continues the
    run. Warnings go to the logger `qbench`.

    Args:
        words: `KEY=VALUE`, as typed on the command line.
        out: the directory below which the run is stored; `outputs` by default.
        progress: whether to show the progress on stderr.
        keys: key -> value, instead of `words`. A text is read as on the command line, and None is `null`.

    Raises:
        ConfigError: the configuration is not valid, or the method does not support it.
        QbenchError: the run failed. The message is that of the command line.
    """
    arguments = command_words("run", words, _with_out(keys, out), CONFIG_DIRECTORY)
    with exclusive_call() as stop, recorded_command(arguments):
        planned = runs_of(arguments)
        if len(planned) != 1:
            raise ConfigError(f"run: this is a sweep of {len(planned)} runs; call qbench.sweep")
        result = stored_result(planned[0], logger.warning)
        if result is None:
            from qbench.experiment.context import RunContext

            reporter = _reporter(planned[0], progress)
            with torch_settings_restored(training=True):
                result = new_result(planned[0], RunContext(reporter, stop))
    if result.status == "unsupported":
        raise ConfigError(str(result.reason))
    return result


def sweep(*words: str, out: str | Path | None = None, progress: bool = False, **keys: Value) -> Runs:
    """Return the runs of a sweep, as `qbench -m KEY=VALUE,VALUE ...` does.

    All runs are checked first. If a run fails, the others continue. The `status` of a failed run is not `done`.

    Example:
        >>> runs = qbench.sweep("method=dorefa,lsq", "bits=w2a2,w4a4", "seed=0,1,2")
        >>> runs = qbench.sweep(method=["dorefa", "lsq"], bits="w2a2", seed=range(3))

    With `hydra/launcher=joblib`, several processes train the runs.

    Args:
        words: `KEY=VALUE,...`, as typed on the command line.
        out: the directory below which the runs are stored; `outputs` by default.
        progress: whether to show on stderr which runs are done.
        keys: key -> value or values, instead of `words`.

    Raises:
        ConfigError: a configuration is not valid. No run is then trained.
        CheckpointError: a stored result was measured on other images than the data set contains now.
    """
    typed = command_words("sweep", words, _with_out(keys, out), (*CONFIG_DIRECTORY, *MULTIRUN))
    arguments = [MULTIRUN[0], *(word for word in typed if word not in MULTIRUN)]
    with exclusive_call() as stop, recorded_command(arguments):
        planned = runs_of(arguments)
        with torch_settings_restored(training=True):
            return Runs(records_of(arguments, planned, stop, progress=progress))


def _with_out(keys: dict[str, Value], out: str | Path | None) -> dict[str, Value]:
    return keys if out is None else {**keys, "out": Path(out)}


def _reporter(planned: "PlannedRun", progress: bool) -> ProgressReporter:
    return ProgressReporter(live=planned.config.runtime.progress) if progress else LogReporter()
