"""Trains runs and sweeps from Python, as the command line does."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.api.host import exclusive_call, recorded_command, torch_settings_restored
from qbench.api.results import Runs, absolute_paths
from qbench.api.words import Value, command_words
from qbench.cli.train import new_result, records_of, runs_of, stored_result, stored_warnings
from qbench.config.compose import CONFIG_DIRECTORY, MULTIRUN
from qbench.errors import ConfigError
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import Result

if TYPE_CHECKING:
    from qbench.experiment.planned_run import PlannedRun

logger = logging.getLogger("qbench")


class LogReporter(ProgressReporter):
    """Sends messages to the logger `qbench`, and shows no progress. By default, this logger prints only warnings."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def say(self, text: str) -> None:
        """Log a message, and write it to log.txt."""
        warning = text.startswith("warning: ")
        logger.log(logging.WARNING if warning else logging.INFO, text.removeprefix("warning: "))
        self.keep(text)


def run(*words: str, out: str | Path | None = None, progress: bool = False, **keys: Value) -> Result:
    """Train a run, as `qbench KEY=VALUE ...` does, and return its result.

    A stored result is returned at once. An unfinished run continues from its last checkpoint. A new run
    trains its float baseline first, unless the baseline is stored already.

    Example:
        >>> result = qbench.run("method=dorefa", "bits=w2a2")
        >>> result = qbench.run(method="dorefa", seed=1, **{"bits.w": 2})

    A process trains one run at a time, so a call from another thread waits. While a run trains, other threads must not
    draw random numbers. Ctrl-C saves a checkpoint and raises `KeyboardInterrupt`. To continue the run, make the same
    call again. Warnings go to the logger `qbench`.

    Args:
        words: `KEY=VALUE`, as typed on the command line.
        out: the directory below which the run is stored; `outputs` by default.
        progress: whether to show the progress on stderr.
        keys: overrides as keyword arguments, key -> value. A string is parsed as on the command line, and None means
            `null`.

    Raises:
        ConfigError: the configuration is not valid, or the method does not support it.
        QbenchError: the run failed. The message is the one that the command line prints.
    """
    arguments = command_words("run", words, _with_out(keys, out), CONFIG_DIRECTORY)
    with exclusive_call() as stop, recorded_command(arguments):
        planned = runs_of(arguments)
        if len(planned) != 1:
            raise ConfigError(f"run: the arguments define a sweep of {len(planned)} runs; call qbench.sweep")
        result = stored_result(planned[0], logger.warning)
        if result is None:
            from qbench.experiment.context import RunContext

            reporter = _reporter(planned[0], progress)
            with torch_settings_restored(training=True):
                result = new_result(planned[0], RunContext(reporter, stop))
    if result.status == "unsupported":
        raise ConfigError(str(result.reason))
    return replace(result, run=os.path.abspath(result.run))  # stays valid if the working directory changes


def sweep(*words: str, out: str | Path | None = None, progress: bool = False, **keys: Value) -> Runs:
    """Train a sweep, as `qbench -m KEY=VALUE,VALUE ...` does, and return its runs.

    All configurations are checked before the first run. If a run fails, the other runs continue. The `status` of a
    failed run is not `done`.

    Example:
        >>> runs = qbench.sweep("method=dorefa,lsq", "bits=w2a2,w4a4", "seed=0,1,2")
        >>> runs = qbench.sweep(method=["dorefa", "lsq"], bits="w2a2", seed=range(3))

    With `hydra/launcher=joblib`, several processes train the runs.

    Args:
        words: `KEY=VALUE,...`, as typed on the command line.
        out: the directory below which the runs are stored; `outputs` by default.
        progress: whether to show the progress of the sweep on stderr.
        keys: overrides as keyword arguments, key -> value or list of values.

    Raises:
        ConfigError: a configuration is not valid. No run is then trained.
        CheckpointError: the images of a data set have changed since a stored result was measured.
    """
    typed = command_words("sweep", words, _with_out(keys, out), (*CONFIG_DIRECTORY, *MULTIRUN))
    arguments = [MULTIRUN[0], *(word for word in typed if word not in MULTIRUN)]
    with exclusive_call() as stop, recorded_command(arguments):
        planned = runs_of(arguments)
        for warning in stored_warnings(planned):
            logger.warning(warning)
        with torch_settings_restored(training=True):
            return absolute_paths(records_of(arguments, planned, stop, progress=progress))


def _with_out(keys: dict[str, Value], out: str | Path | None) -> dict[str, Value]:
    return keys if out is None else {**keys, "out": Path(out)}


def _reporter(planned: "PlannedRun", progress: bool) -> ProgressReporter:
    return ProgressReporter(live=planned.config.runtime.progress) if progress else LogReporter()
