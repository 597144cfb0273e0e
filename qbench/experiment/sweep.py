"""Many runs: checked before the first, one after the other or by a launcher, shown while they work, summed up."""

import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from qbench.config.schema import Config
from qbench.errors import ConfigError, Interrupted, QbenchError
from qbench.experiment.jobs import check, outcome, run_catching, work_on
from qbench.experiment.sweep_progress import view
from qbench.experiment.workers import most_workers, run_in_processes
from qbench.runs.directory import RunDirectory
from qbench.runs.reader import RunRecord
from qbench.runs.result import load_result

LAUNCHERS = {"joblib": "hydra.launcher.n_jobs", "submitit_local": "hydra.sweeper.max_batch_size", "submitit_slurm": ""}
"""Name -> the key that limits the jobs at a time. joblib's processes are ours, submitit's come by Hydra's plugin."""


def run_all(configs: Sequence[Config], stop: Callable[[], int]) -> list[RunRecord]:
    """Run the cells one after the other; return what became of each."""
    check(configs)
    failed: dict[str, RunRecord] = {}
    with view(configs, 1):
        for config in configs:
            try:
                result = run_catching(config, stop)
            except Interrupted:
                break
            if load_result(RunDirectory(config).path) is None:  # it never came to have a directory
                path = RunDirectory(config).path
                failed[str(path)] = RunRecord(path=path, status=result.status, reason=result.reason or "")
    return [failed.get(str(RunDirectory(c).path)) or outcome(c) for c in configs]


def launch_all(arguments: list[str], configs: Sequence[Config], name: str, stop: Callable[[], int]) -> list[RunRecord]:
    """Let a launcher run the cells in processes of its own; return what became of each.

    Workers times threads never exceed the cores.
    """
    if name not in LAUNCHERS:
        raise ConfigError(f"hydra/launcher={name}: no such launcher\nallowed: basic, {', '.join(LAUNCHERS)}")
    key = LAUNCHERS[name]
    typed = [a.partition("=")[2] for a in arguments if key and a.startswith(f"{key}=")]
    for word in (w for w in arguments if name == "joblib" and w.lstrip("+").startswith("hydra.")):
        if not re.fullmatch(rf"{key}=(-1|[1-9]\d{{,5}})|hydra\.searchpath=.*", word):
            raise ConfigError(f"{word}: with joblib, allowed is {key}=N, N jobs at a time or -1 for one on every core")
    workers = most_workers(configs, typed[-1] if typed else "")
    with view(configs, workers):
        if name == "joblib":
            run_in_processes(configs, workers, stop)
        else:
            limit = [f"{key}={workers}"] if key else []
            _by_hydra([a for a in arguments if not key or not a.startswith(f"{key}=")] + limit, configs)
    return [outcome(config) for config in configs]


def _by_hydra(arguments: list[str], configs: Sequence[Config]) -> None:
    from qbench.config import compose

    try:
        installed = find_spec("hydra_plugins.hydra_submitit_launcher") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ConfigError("hydra/launcher=submitit_... is not installed\nin a clone: pip install -e '.[slurm]'")
    check(configs)
    try:
        compose.dispatch(arguments, work_on)
    except QbenchError:
        raise
    except Exception as error:  # a worker was killed; what it had in hand is unfinished
        print(f"warning: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
