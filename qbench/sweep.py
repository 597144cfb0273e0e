"""Many runs: checked before the first, one after the other or by a launcher, shown while they work, summed up."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from qbench.config import Config, to_dict
from qbench.errors import ConfigError, Interrupted, QbenchError
from qbench.filling import from_node
from qbench.interrupt import signals
from qbench.record.run import Result, RunDirectory, load_result
from qbench.report.runs import Found, read_run

LAUNCHERS = {  # name -> (module that must be installed, extra that brings it, key that limits the jobs at a time)
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "sweep", "hydra.launcher.n_jobs"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm", "hydra.sweeper.max_batch_size"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm", ""),
}
KINDS = ("model", "dataset", "method", "activation", "bits", "layers", "distill")
"""Parts of a configuration in which cells must differ to be checked each."""

POLL = 0.5
"""Seconds between two looks at the runs' directories."""


def check(configs: Sequence[Config]) -> None:
    """Build every kind of cell once, so that what does not fit stops the sweep before its first job.

    Raises:
        ConfigError: the first cell's whose keys or values no part takes.
    """
    from qbench.assembly import assemble
    from qbench.quant.method import Unsupported

    seen = set()
    for config in configs:
        kinds = {k: v for k, v in to_dict(config).items() if k in KINDS}
        key = json.dumps([kinds, config.runtime.device], sort_keys=True)
        if key not in seen and not RunDirectory(config).stored():
            seen.add(key)
            try:
                assemble(config)
            except Unsupported:
                continue  # listed with its reason when its turn comes


def attempt(config: Config, stop: Callable[[], int]) -> Result:
    """Return a run's result, whatever becomes of it: a failure is a result too.

    Raises:
        Interrupted: a signal asked to stop; the run goes on the next time.
    """
    from qbench.experiment import run
    from qbench.record.screen import Screen
    from qbench.session import Desk

    directory = RunDirectory(config)
    try:
        return run(config, Desk(Screen(quiet=True), stop))
    except Interrupted:
        raise
    except BaseException as error:  # sys.exit or no memory in one job must not end the others
        stored = load_result(directory.path)
        reason = str(error) if isinstance(error, QbenchError) else f"{type(error).__name__}: {error}"
        return stored if stored and stored.status != "done" else directory.new_result("failed", reason=reason)


def work(node: DictConfig) -> None:
    """Do one cell in a launcher's process; what became of it stands in its directory."""
    with signals() as stop:
        try:
            attempt(from_node(node), stop)
        except Interrupted:
            return


def run_all(configs: Sequence[Config], stop: Callable[[], int]) -> list[Found]:
    """Run the cells one after the other; return what became of each."""
    failed: dict[str, Found] = {}
    with view(configs, 1):
        for config in configs:
            try:
                result = attempt(config, stop)
            except Interrupted:
                break
            if load_result(RunDirectory(config).path) is None:  # it never came to have a directory
                path = RunDirectory(config).path
                failed[str(path)] = Found(path=path, status=result.status, reason=result.reason or "")
    return [failed.get(str(RunDirectory(c).path)) or outcome(c) for c in configs]


def launch_all(arguments: list[str], configs: Sequence[Config], name: str) -> list[Found]:
    """Let a launcher run the cells in processes of its own; return what became of each.

    Workers times threads never exceed the cores. A worker that is killed costs the runs it had in hand; those that
    are finished stay, and the same command completes the rest.
    """
    from qbench import compose

    if name not in LAUNCHERS:
        raise ConfigError(f"hydra/launcher={name}: no such launcher\nallowed: basic, {', '.join(LAUNCHERS)}")
    module, extra, key = LAUNCHERS[name]
    try:
        installed = find_spec(module) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ConfigError(f"hydra/launcher={name} is not installed\nin a clone: pip install -e '.[{extra}]'")
    workers = max(1, (os.cpu_count() or 1) // max(c.runtime.threads for c in configs))
    if key:
        typed = [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")]
        wanted = int(typed[-1]) if typed and typed[-1].isdecimal() else workers
        workers = min(wanted, workers) or workers
        arguments = [a for a in arguments if not a.startswith(f"{key}=")] + [f"{key}={workers}"]
    with view(configs, workers):
        try:
            compose.dispatch(arguments, work)
        except QbenchError:
            raise
        except Exception as error:  # a worker was killed; what it had in hand is unfinished
            print(f"warning: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    return [outcome(config) for config in configs]


def outcome(config: Config) -> Found:
    """Return what stands in a run's directory now."""
    path = RunDirectory(config).path
    return read_run(path) if path.is_dir() else Found(path=path, status="not begun")


@contextmanager
def view(configs: Sequence[Config], workers: int) -> Iterator[None]:
    """Show, while the cells are worked on, how many are done, running and left, and the time left.

    A thread looks at the directories, so that it is the same for every launcher.
    """
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(configs, workers, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(configs: Sequence[Config], workers: int, ended: threading.Event) -> None:
    directories = {d.path: d for d in map(RunDirectory, configs)}
    old = {path for path, d in directories.items() if d.stored()}
    seen = set(old)
    bar: Any = None
    if sys.stderr.isatty():
        from qbench.record.screen import live_bar

        bar = live_bar()
        bar.start()
        bar.add_task(f"sweep of {len(directories)}", total=len(directories), completed=len(old), text="")
    elif old:
        print(f"[{len(old)}/{len(directories)}] stored already", file=sys.stderr, flush=True)
    began = time.time()
    while True:
        last = ended.wait(POLL)
        for path in [p for p in directories if p not in seen]:
            result = load_result(path)
            if result and (path / "result.json").stat().st_mtime >= began - 1:
                seen.add(path)
                if not bar:
                    print(f"[{len(seen)}/{len(directories)}] {_line(result)}", file=sys.stderr, flush=True)
        if bar:
            left = len(directories) - len(seen)
            running = sum((p / "config.yaml").exists() for p in directories if p not in seen)
            text = f"{len(seen)} done, {min(running, workers)} running, {left - min(running, workers)} left"
            bar.update(bar.task_ids[0], completed=len(seen), text=text)
        if last:
            break
    if bar:
        bar.stop()


def _line(result: Result) -> str:
    name = f"{result.method} {result.widths} s{result.seed}"
    if result.status != "done" or result.final is None:
        return f"{name}: {result.status}: {(result.reason or '').partition(chr(10))[0]}"
    return f"{name}: {result.final['test']['top1']:.2f} %, {result.wall_seconds or 0:.1f} s"
