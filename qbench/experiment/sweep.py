"""Many runs: checked before the first, one after the other or by a launcher, shown while they work, summed up."""

import gc
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import active_children
from typing import Any

from omegaconf import DictConfig

from qbench.config.schema import RATE, Config, digest, parent, to_dict
from qbench.config.validate import from_node
from qbench.errors import CheckpointError, ConfigError, DataError, Interrupted, QbenchError, ResourceError
from qbench.runs.directory import Result, RunDirectory, load_result
from qbench.runs.reader import RunRecord, read_run
from qbench.system.signals import stop_on_signals

LAUNCHERS = {"joblib": "hydra.launcher.n_jobs", "submitit_local": "hydra.sweeper.max_batch_size", "submitit_slurm": ""}
"""Name -> the key that limits the jobs at a time. joblib's processes are ours, submitit's come by Hydra's plugin."""
KINDS = ("model", "dataset", "method", "activation", "bits", "layers", "distill")
"""Parts of a configuration in which cells must differ to be checked each."""

POLL = 0.5
"""Seconds between two looks at the runs' directories."""


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
            _in_processes(configs, workers, stop)
        else:
            limit = [f"{key}={workers}"] if key else []
            _by_hydra([a for a in arguments if not key or not a.startswith(f"{key}=")] + limit, configs)
    return [outcome(config) for config in configs]


def most_workers(configs: Sequence[Config], wanted: str = "") -> int:
    """Return how many processes may work at a time: as many as wanted, and never more threads than cores."""
    most = max(1, (os.cpu_count() or 1) // max(config.runtime.threads for config in configs))
    return min(int(wanted) if wanted.isdecimal() else most, most) or most


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


def _in_processes(configs: Sequence[Config], workers: int, stop: Callable[[], int]) -> None:
    """Run the cells in processes of joblib's.

    Where one is killed, what was in hand waits until the end; then each gets a process to itself, one after the other:
    what kills its process then has harmed nobody else.
    """
    left, suspects = parents_first(configs), list[Config]()
    checked = False
    while left and not stop():
        with _pool(workers) as pool:
            if not checked:
                pool.submit(check, configs).result()
                checked = True
            if in_hand := _finish(pool, left, workers, stop):
                print(f"warning: a worker was killed; it had one of {len(in_hand)} runs in hand", file=sys.stderr)
                suspects += in_hand
    for config in suspects:
        with _pool(1) as pool:
            if _finish(pool, [config], 1, stop):
                print(f"warning: the process of {RunDirectory(config).path} was killed again", file=sys.stderr)


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    pool = ProcessPoolExecutor(workers, initializer=_ready)
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


def _ready() -> None:
    """Import what every run needs, out of the garbage collector's sight; leave signals between runs to the sweep."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    for module in ("qbench.experiment.run", "torch.utils.tensorboard"):
        import_module(module)
    import torch

    torch.optim.SGD([torch.zeros(1)])  # torch imports half of itself at its first optimizer
    gc.freeze()  # joblib's workers collect after every second of work


def _finish(pool: Any, left: list[Config], workers: int, stop: Callable[[], int]) -> list[Config]:
    """Let a pool run the cells, taking them from `left` one by one; return those in hand when a process was killed."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    working: dict[Future[None], Config] = {}
    while working or (left and not stop()):
        while left and len(working) < workers and not stop():
            config = left.pop(0)
            working[pool.submit(work, config)] = config
        ended, _ = wait(working, POLL, FIRST_COMPLETED)
        if any(isinstance(job.exception(), BrokenProcessPool) for job in ended):
            return [config for job, config in working.items() if not job.done() or job.exception()]
        for job in ended:
            job.result()
            del working[job]
        for process in active_children() if stop() else ():
            process.terminate()  # it saves what it has in hand
    return []


def parents_first(configs: Sequence[Config]) -> list[Config]:
    """Return the cells, those first that are the first to need a float parent: processes side by side train several
    parents then, where they would wait for one.
    """
    parents = [digest(parent(config).identity()) for config in configs]
    return [c for _, c in sorted(enumerate(configs), key=lambda cell: parents.index(parents[cell[0]]) != cell[0])]


def outcome(config: Config) -> RunRecord:
    """Return what stands in a run's directory now."""
    path = RunDirectory(config).path
    return read_run(path) if path.is_dir() else RunRecord(path=path, status="not begun")


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
        from qbench.runs.progress import live_bar

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
    if rate := result.options.get(RATE):
        name += f" {RATE}={rate:g}"
    if result.status != "done" or result.final is None:
        return f"{name}: {result.status}: {(result.reason or '').partition(chr(10))[0]}"
    seconds = f"{result.wall_seconds or 0:.1f} s"
    if rate:  # among those to choose from: only what is chosen shows its test figure
        return f"{name}: validation {result.final['val'].get('top1', float('nan')):.2f} %, {seconds}"
    return f"{name}: {result.final['test']['top1']:.2f} %, {seconds}"
