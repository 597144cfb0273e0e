"""One run of a sweep: checked before the sweep starts, run so that a failure is a result too."""

import json
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from qbench.config.schema import Config, to_dict
from qbench.config.validate import from_node
from qbench.errors import CheckpointError, DataError, Interrupted, QbenchError, ResourceError
from qbench.runs.directory import RunDirectory
from qbench.runs.reader import RunRecord, read_run
from qbench.runs.result import Result, load_result
from qbench.system.signals import stop_on_signals


def run_catching(config: Config, stop: Callable[[], int]) -> Result:
    """Return a run's result, whatever becomes of it: a failure is a result too.

    Raises:
        Interrupted: a signal asked to stop; the run goes on the next time.
    """
    from qbench.experiment.run import run
    from qbench.experiment.session import RunContext
    from qbench.runs.progress import ProgressReporter

    directory = RunDirectory(config)
    try:
        return run(config, RunContext(ProgressReporter(quiet=True), stop))
    except Interrupted:
        raise
    except BaseException as error:  # sys.exit or no memory in one job must not end the others
        stored = load_result(directory.path)
        reason = str(error) if isinstance(error, QbenchError) else f"{type(error).__name__}: {error}"
        return stored if stored and stored.status != "done" else directory.new_result("failed", reason=reason)


def work(config: Config) -> None:
    """Do one cell in a process of its own; what became of it stands in its directory."""
    with stop_on_signals() as stop:
        try:
            run_catching(config, stop)
        except Interrupted:
            return


def work_on(node: DictConfig) -> None:
    """Do one cell in a process that Hydra's launcher started."""
    work(from_node(node))


def outcome(config: Config) -> RunRecord:
    """Return what stands in a run's directory now."""
    path = RunDirectory(config).path
    return read_run(path) if path.is_dir() else RunRecord(path=path, status="not begun")


KINDS = ("model", "dataset", "method", "activation", "bits", "layers", "distill")
"""Parts of a configuration in which cells must differ to be checked each."""


def check(configs: Sequence[Config]) -> None:
    """Build every kind of cell once, so that what does not fit stops the sweep before its first job.

    Raises:
        ConfigError: the first cell's whose keys or values no part takes.
    """
    from qbench.experiment.setup import assemble
    from qbench.quant.method import Unsupported

    seen = set()
    for config in configs:
        kinds = {k: v for k, v in to_dict(config).items() if k in KINDS}
        key = json.dumps([kinds, config.runtime.device], sort_keys=True)
        if key not in seen and not RunDirectory(config).stored():
            seen.add(key)
            try:
                assemble(config)
            except (Unsupported, DataError, CheckpointError, ResourceError):
                continue  # listed with its reason when its turn comes
