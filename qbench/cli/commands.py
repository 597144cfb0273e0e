"""The subcommands: from their arguments to what is printed."""

import sys
from collections.abc import Callable

from qbench.cli.errors import BUG, SWEEP_WITH_FAILURES, print_error
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError, Interrupted
from qbench.system.signals import stop_on_signals


def plan(arguments: list[str]) -> int:
    """Print what a command line would run, what it costs and how long it would take; train nothing."""
    from qbench.analysis.plan import plan as tables_of
    from qbench.config import compose
    from qbench.experiment.planned_run import planned_run
    from qbench.report.tables.table import text

    print(text(tables_of([planned_run(config) for config in compose.configurations(arguments)])))
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
    from qbench.experiment.builders import build_method
    from qbench.quant.method import Unsupported

    default = config.bits.resolved()
    try:
        build_method(config.method, config.activation, default).check(default)
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None
    subject = MethodUnderTest(
        config.method_name, lambda bits: build_method(config.method, config.activation, bits), default
    )
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
    print(f"\nPicture\n    qbench plot {name}{made}")
    known = registry.known_deviations(name)
    if known:
        print("\nDeviations of public code, run by method.deviation=NAME")
    for key, (what, source) in known.items():
        print(f"    {key}: {what}\n        {source}")
    return 0


def plot(arguments: list[str]) -> int:
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
    from qbench.experiment import jobs, sweep
    from qbench.experiment.planned_run import PlannedRun
    from qbench.runs.reader import RunRecord

    asked = settling.parse(arguments)
    with stop_on_signals() as stop:

        def run(runs: list[PlannedRun]) -> list[RunRecord]:
            missing = [planned for planned in runs if not planned.directory.stored()]
            if missing and asked.launcher == "joblib":
                sweep.launch_all([], missing, asked.launcher, stop)
            elif missing:
                sweep.run_all(missing, stop)
            if stop():
                raise Interrupted(f"stopped by signal {stop()}; the same command goes on from here")
            return [jobs.outcome(planned) for planned in runs]

        try:
            print(settling.settle(asked, run, lambda text: print(text, file=sys.stderr, flush=True)))
        except settling.MissingRunError as lost:
            print_error([str(lost)])
            return SWEEP_WITH_FAILURES
    return 0


def listing(arguments: list[str]) -> int:
    """Print the names in a group, one a line."""

    from qbench.config.groups import group_names, option_names

    groups = {f"{group}s" if group[-1] != "s" else group: group for group in group_names()} | {"runs": ""}
    if arguments[:1] == ["runs"]:
        return runs(arguments[1:] or ["outputs"])
    if len(arguments) != 1 or arguments[0] not in groups:
        typed = " ".join(arguments)
        raise ConfigError(f"list {typed}: which?{did_you_mean(typed, groups)}\nallowed: {', '.join(groups)}")
    print("\n".join(option_names(groups[arguments[0]])))
    return 0


def runs(directories: list[str]) -> int:
    """Print the runs below some directories, a line each."""
    from qbench.runs.reader import read

    for run in read(directories):
        top1 = run.result.top1 if run.status == "done" and run.result else None
        print(f"{run.status:<12}{run.path}" + ("" if top1 is None else f"  {top1:.2f} %"))
    return 0


def published(arguments: list[str]) -> int:
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
    "evaluate": evaluate,
    "inspect": inspect,
    "list": listing,
    "plan": plan,
    "plot": plot,
    "published": published,
    "sensitivity": sensitivity,
    "settle": settle,
}
