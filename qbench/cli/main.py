"""The front door: verbs first, then Hydra. Nothing on the way to `--help` or to a stored result imports torch."""

import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

from qbench.cli.help import PAGES, help_screen
from qbench.config.schema import Config, did_you_mean
from qbench.errors import ConfigError, Interrupted, QbenchError, ResourceError
from qbench.system.signals import stop_on_signals

BUG, SWEEP_WITH_FAILURES = 1, 8
TOO_MUCH = ("allocate memory", "out of memory", "not enough memory", "overflow")
"""What torch says of sizes that no machine has."""
WIDEST = 1000
"""Characters of a line of an error message; of what is longer, the middle is left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or what `qbench.errors` says of the error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not lose a table
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except FileNotFoundError:
        _tell(["the working directory is gone; change to another one"])
        return ResourceError.status
    try:
        status = _answer(arguments)
        print(end="", flush=True)  # here, where it can still be told of, not when Python ends
        return status
    except QbenchError as error:
        if os.environ.get("QBENCH_TRACEBACK"):
            traceback.print_exc()
        _tell(str(error).strip().splitlines() or [type(error).__name__])
        return error.status
    except KeyboardInterrupt:  # before a run began; after that signals are the run's own
        return Interrupted.status
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        _drop_unwritten(sys.stdout)
        return 0
    except (Exception, SystemExit) as error:  # sys.exit in a function of the user's own would look like success
        if refused := _refused(error):
            _tell(refused)
            _drop_unwritten(sys.stdout)
            return ResourceError.status
        if os.environ.get("QBENCH_TRACEBACK"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _tell(
            [
                f"a bug, or an error in your own code: {what}",
                "QBENCH_TRACEBACK=1 shows the traceback; once a run has begun, its log.txt has it too",
            ]
        )
        return BUG


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] == "help" or {"-h", "--help"} & set(arguments):
        print(PAGES.get((*arguments, "")[0]) or help_screen())
        return 0
    if "--version" in arguments:
        print(_version())
        return 0
    word = arguments[0]
    if word in VERBS:
        return VERBS[word](arguments[1:])
    if "=" not in word and word[:1] not in ("-", "+", "~"):
        raise ConfigError(f"{word}: neither a verb nor key=value{did_you_mean(word, VERBS)}\nverbs: {', '.join(VERBS)}")
    return train(arguments)


def _drop_unwritten(stream: TextIO) -> None:
    """Throw away what a stream still holds and cannot write: Python would try again when it ends."""
    if isinstance(stream, io.TextIOWrapper):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refused(error: BaseException) -> list[str]:
    """Say what the system's refusal means, where nobody nearer to it did; nothing where it refused nothing."""
    if isinstance(error, OSError):
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in TOO_MUCH)):
        return [f"out of memory: {error}".splitlines()[0], "try a smaller optim.batch_size, network or data set"]
    return []


def _tell(lines: Iterable[str]) -> None:
    """Print an error in at most three lines that do nothing to a terminal but stand there."""
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines][:3]
    short = [x if len(x) <= WIDEST else f"{x[: WIDEST // 2]} ... {x[-WIDEST // 2 :]}" for x in shown]
    with suppress(OSError):  # nobody to tell; the status says it
        print("\n".join([f"qbench: {short[0]}", *short[1:]]), file=sys.stderr)
    _drop_unwritten(sys.stderr)


def train(arguments: list[str]) -> int:
    """Run what a command line configures, once or (-m) for every combination; print the table."""
    from qbench.config import compose

    sweep = any(flag in arguments for flag in compose.MULTIRUN)
    if not sweep and compose.launcher(arguments):
        raise ConfigError("hydra/launcher works on a sweep: put -m first")
    for word in arguments:
        if not compose.launcher(arguments) and word.lstrip("+").startswith(("hydra.launcher.", "hydra.sweeper.")):
            raise ConfigError(f"{word} has no effect without hydra/launcher=NAME")
    with stop_on_signals() as stop:
        configs = compose.configurations(arguments)
        if not configs:  # Hydra has shown what was asked for
            return 0
        return train_all(arguments, configs, stop) if sweep or len(configs) > 1 else train_one(configs[0], stop)


def train_one(config: Config, stop: Callable[[], int]) -> int:
    """Run one configuration and print its row; a stored one without importing torch."""
    from qbench.report.tables.run_row import row
    from qbench.runs import manifest
    from qbench.runs.directory import RunDirectory

    directory = RunDirectory(config)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    result = None if config.rerun else directory.stored()
    if result:
        for change in manifest.changed_since(directory.path / "manifest.json"):
            print(f"warning: stored under {change}; rerun=true trains it anew", file=sys.stderr)
        print(row([result], width))
        directory.remove_checkpoints()
    else:
        from qbench.experiment.run import run
        from qbench.experiment.session import RunContext
        from qbench.runs.metrics_logger import append_text
        from qbench.runs.progress import ProgressReporter

        result = run(config, RunContext(ProgressReporter(live=config.runtime.progress), stop))
        print(row([result], width))
        append_text(directory.path / "log.txt", row([result]))
    return ConfigError.status if result.status == "unsupported" else 0


def train_all(arguments: list[str], configs: list[Config], stop: Callable[[], int]) -> int:
    """Run a sweep and print the table of its runs."""
    from qbench.config import compose
    from qbench.experiment import sweep
    from qbench.report.comparison.compare import compare as tables_of
    from qbench.report.tables.table import text
    from qbench.runs.directory import RunDirectory
    from qbench.runs.reader import with_parents

    configs = list({RunDirectory(config).path: config for config in configs}.values())
    if any(config.rerun or not RunDirectory(config).stored() for config in configs):
        name = compose.launcher(arguments)
        found = sweep.launch_all(arguments, configs, name, stop) if name else sweep.run_all(configs, stop)
    else:
        found = [sweep.outcome(config) for config in configs]
    print(text(tables_of(with_parents(found))))
    if stop():
        print(f"qbench: stopped by signal {stop()}; the same command goes on from here", file=sys.stderr)
        return Interrupted.status
    return SWEEP_WITH_FAILURES if any(run.status not in ("done", "unsupported") for run in found) else 0


def plan(arguments: list[str]) -> int:
    """Print what a command line would run, what it costs and how long it would take; train nothing."""
    from qbench.analysis.plan import plan as tables_of
    from qbench.config import compose
    from qbench.report.tables.table import text

    print(text(tables_of(compose.configurations(arguments))))
    return 0


def check(arguments: list[str]) -> int:
    """Hold a method against the properties that every method must have; 0 only if all hold."""
    from qbench.config import compose

    names = [word for word in arguments if "=" not in word or word.startswith("method=")]
    if len(names) != 1 or any(word.startswith("-") for word in arguments):
        raise ConfigError("check wants one method and perhaps keys of it: qbench check NAME [method.KEY=VALUE ...]")
    for word in arguments:
        if "=" in word and word.partition("=")[0].partition(".")[0] not in ("method", "activation", "bits"):
            raise ConfigError(f"{word} has no effect on check\nallowed: method.KEY=VALUE, bits.KEY=N, activation=NAME")
    words = [word if "=" in word else f"method={word}" for word in arguments]
    (config,) = compose.configurations(words)
    from qbench.check.kit import check as findings_of
    from qbench.check.kit import report
    from qbench.check.subject import MethodUnderTest
    from qbench.experiment.setup import make_method, widths
    from qbench.quant.method import Unsupported

    default = widths(config)
    try:
        make_method(config, default).check(default)
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None
    subject = MethodUnderTest(config.method_name, lambda bits: make_method(config, bits), default)
    findings = findings_of(subject)
    print(report(subject, findings))
    return BUG if any(finding.failures for finding in findings) else 0


def describe(arguments: list[str]) -> int:
    """Print a method's card."""
    from qbench.config import registry

    if len(arguments) != 1:
        raise ConfigError(
            f"describe wants one method: qbench describe NAME\nknown: {', '.join(registry.names('method'))}"
        )
    name = arguments[0].removeprefix("method=")
    print(registry.card(name))
    made = "" if ":" in name else f"; a made one is docs/pictures/{name}.png of the repository"
    print(f"\nPicture\n    qbench draw {name}{made}")
    known = registry.known_deviations(name)
    if known:
        print("\nDeviations of public code, run by method.deviation=NAME")
    for key, (what, source) in known.items():
        print(f"    {key}: {what}\n        {source}")
    return 0


def draw(arguments: list[str]) -> int:
    """Draw what a method does to single values, or (--poster) all methods, into a file."""
    from qbench.cli.plot import draw as drawn

    print(f"wrote {drawn(arguments)}")
    return 0


def compare(arguments: list[str]) -> int:
    """Print the runs below some directories side by side, and what may be concluded."""
    from qbench.cli.compare import run_compare

    print(run_compare(arguments))
    return 0


def settle(arguments: list[str]) -> int:
    """Run more seeds of two cells until they are told apart or as good as each other; print the verdict."""
    from qbench.cli import settle as settling
    from qbench.experiment import sweep
    from qbench.runs.directory import RunDirectory
    from qbench.runs.reader import RunRecord

    asked = settling.parse(arguments)
    with stop_on_signals() as stop:

        def run(configs: list[Config]) -> list[RunRecord]:
            missing = [config for config in configs if not RunDirectory(config).stored()]
            if missing and asked.launcher == "joblib":
                sweep.launch_all([], missing, asked.launcher, stop)
            elif missing:
                sweep.run_all(missing, stop)
            if stop():
                raise Interrupted(f"stopped by signal {stop()}; the same command goes on from here")
            return [sweep.outcome(config) for config in configs]

        try:
            print(settling.settle(asked, run, lambda text: print(text, file=sys.stderr, flush=True)))
        except settling.MissingRunError as lost:
            _tell([str(lost)])
            return SWEEP_WITH_FAILURES
    return 0


def listing(arguments: list[str]) -> int:
    """Print the names in a group, one a line."""
    from qbench.config import compose

    groups = {f"{group}s" if group[-1] != "s" else group: group for group in compose.groups()} | {"runs": ""}
    if arguments[:1] == ["runs"]:
        return runs(arguments[1:] or ["outputs"])
    if len(arguments) != 1 or arguments[0] not in groups:
        typed = " ".join(arguments)
        raise ConfigError(f"list {typed}: which?{did_you_mean(typed, groups)}\nallowed: {', '.join(groups)}")
    print("\n".join(compose.names(groups[arguments[0]])))
    return 0


def runs(directories: list[str]) -> int:
    """Print the runs below some directories, a line each."""
    from qbench.runs.reader import read

    for run in read(directories):
        top1 = run.result.final["test"]["top1"] if run.status == "done" and run.result and run.result.final else None
        print(f"{run.status:<12}{run.path}" + ("" if top1 is None else f"  {top1:.2f} %"))
    return 0


def ledger(arguments: list[str]) -> int:
    """Print what papers published beside what was measured."""
    from qbench.papers.published import ledger as tables

    print(tables(arguments))
    return 0


def inspect(arguments: list[str]) -> int:
    """Print what each layer of a finished run holds, loses, and costs the network."""
    from qbench.cli import run_commands as verbs

    print(verbs.inspect(arguments))
    return 0


def sensitivity(arguments: list[str]) -> int:
    """Choose one width a layer of a run under a budget, print the choices, and write one to a file."""
    from qbench.cli import run_commands as verbs

    print(verbs.sensitivity(arguments))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Print a finished run's figures on its test split, or on other data."""
    from qbench.cli import run_commands as verbs

    print(verbs.evaluate(arguments))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "check": check,
    "compare": compare,
    "describe": describe,
    "draw": draw,
    "evaluate": evaluate,
    "inspect": inspect,
    "ledger": ledger,
    "list": listing,
    "plan": plan,
    "sensitivity": sensitivity,
    "settle": settle,
}


def _version() -> str:
    try:
        return f"qbench {version('qbench-papers')}"
    except PackageNotFoundError:
        return "qbench, not installed"


if __name__ == "__main__":
    sys.exit(main())
