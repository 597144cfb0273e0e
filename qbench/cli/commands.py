"""Implements the subcommands. Each function receives the words after the subcommand and returns the exit status."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from qbench.cli import parsers, run_options
from qbench.cli.errors import BUG, SWEEP_WITH_FAILURES, print_error
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError, Interrupted
from qbench.report.tables.escape import printable
from qbench.report.tables.table import FORMATS
from qbench.system.signals import stop_on_signals


def plan(arguments: list[str]) -> int:
    """Print the runs that a training command would start, with their costs and times. Nothing is trained."""
    from qbench.config import compose

    configs = compose.configurations(arguments)
    from qbench.analysis.plan import plan as plan_tables
    from qbench.experiment.planned_run import planned_run
    from qbench.report.comparison.comparable import sweep_warnings

    runs = [planned_run(config) for config in configs]
    print(FORMATS["text"](plan_tables(runs, lambda text: print(text, file=sys.stderr, flush=True))))
    for warning in sweep_warnings(planned.identity for planned in runs):
        print(warning, file=sys.stderr)
    return 0


def check(arguments: list[str]) -> int:
    """Check the properties that every method must have. Return 0 only if all properties hold."""
    from qbench.config import compose

    arguments, _ = parsers.check().parse_words(arguments)
    names = [word for word in arguments if "=" not in word or word.startswith("method=")]
    if len(names) != 1:
        raise ConfigError(
            f"check needs exactly one method, found {len(names)}\ntype: qbench check METHOD [method.KEY=VALUE "
            f"...] [bits.KEY=N ...]"
        )
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
    """Print a method card, or the description of a run."""
    from qbench.config import registry
    from qbench.config.groups import option_names

    words, _ = parsers.describe().parse_words(arguments)
    if len(words) == 1 and words[0] not in option_names("method") and os.path.isdir(words[0]):
        from qbench.analysis.description import description

        print(description(Path(words[0])))
        return 0
    if len(words) != 1:
        known = ", ".join(registry.names("method"))
        raise ConfigError(f"describe needs exactly one method or run directory, found {len(words)}\nmethods: {known}")
    name = words[0].removeprefix("method=")
    card = registry.card(name)
    print(card)
    if "Bits" not in registry.sections(card):
        from qbench.analysis.method_text import widths_and_options

        print(f"\n{widths_and_options(name)}")
    stored = "" if ":" in name else f"; the repository contains this plot: docs/pictures/{name}.png"
    print(f"\nPlot\n    qbench plot {name}{stored}")
    deviations = registry.known_deviations(name)
    if deviations:
        print("\nDeviations in public code (to run one: method.deviation=NAME)")
    for key, (what, source) in deviations.items():
        print(f"    {key}: {what}\n        {source}")
    return 0


def plot(arguments: list[str]) -> int:
    """Plot the quantizers of one method or, with `--poster`, of all methods, to a file."""
    from qbench.cli.plot import draw

    print(f"wrote {draw(arguments)}")
    return 0


def compare(arguments: list[str]) -> int:
    """Print tables of the runs in the given directories, with notes on significant differences."""
    from qbench.cli.compare import run_compare

    print(run_compare(arguments))
    return 0


def settle(arguments: list[str]) -> int:
    """Run seeds of two settings until the settings differ significantly or are equivalent. Print the verdict."""
    from qbench.cli.settle import parse
    from qbench.cli.train import stored_warnings
    from qbench.experiment import jobs, sweep
    from qbench.experiment.data_check import check_stored
    from qbench.experiment.planned_run import PlannedRun
    from qbench.report.comparison.sequential_test import MissingRunError, run_sequential_test
    from qbench.runs.reader import RunRecord

    test = parse(arguments)
    used: list[PlannedRun] = []
    with stop_on_signals() as stop:

        def run(runs: list[PlannedRun]) -> list[RunRecord]:
            used[:] = runs
            check_stored(runs)
            missing = [planned for planned in runs if not planned.directory.stored()]
            if missing and test.launcher == "joblib":
                sweep.launch_all([], missing, test.launcher, stop)
            elif missing:
                sweep.run_all(missing, stop)
            if stop():
                raise Interrupted(f"stopped by signal {stop()}; to continue, repeat the command")
            return [jobs.outcome(planned) for planned in runs]

        try:
            print(run_sequential_test(test, run, lambda line: print(line, file=sys.stderr, flush=True)))
        except MissingRunError as error:
            print_error([str(error)])
            return SWEEP_WITH_FAILURES
    for warning in stored_warnings(used, "to train a setting again, type: qbench -m SETTING seed=0,1,2 rerun=true"):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def list_names(arguments: list[str]) -> int:
    """Print all groups with their options, the options of one group, or the runs in given directories."""
    from qbench.cli.help import group_lines
    from qbench.config.groups import option_names

    words, _ = parsers.list_().parse_words(arguments)
    listed = parsers.listed_groups()
    if not words:
        print(f"{group_lines()}\n\nqbench list methods   the options of one group: {', '.join(listed)}")
        print("qbench list runs      the runs below outputs; for the runs below DIR: qbench list runs DIR")
        return 0
    if words[0] == "runs":
        return list_runs(words[1:] or ["outputs"])
    if words[0] not in listed or len(words) > 1:
        typed = " ".join(words)
        raise ConfigError(f"list {typed}: no such group{did_you_mean(typed, listed)}\nallowed: {', '.join(listed)}")
    print("\n".join(option_names(listed[words[0]])))
    return 0


def list_runs(directories: list[str]) -> int:
    """Print one line per run in the given directories: status, directory, test top-1 in percent."""
    from qbench.runs.reader import read

    for run in read(directories):
        print(printable(str(run)))
    return 0


def published(arguments: list[str]) -> int:
    """Print published results next to the results measured here."""
    from qbench.papers.published_table import published_tables

    words, flags = parsers.published().parse_words(arguments)
    assert not words
    tables = published_tables(flags.get("paper"), flags.get("provenance"), flags.get("missing", False))
    print(FORMATS[flags.get("format", "text")](tables))
    return 0


def inspect(arguments: list[str]) -> int:
    """For each quantized layer of a finished run, print levels, errors and the effect on the loss."""
    options = run_options.parse_inspect(arguments)
    from qbench.analysis.inspect import inspect as inspect_run

    table = inspect_run(
        options.run,
        weights=options.weights,
        images=options.images,
        bn_stats=options.bn_stats,
        sort=options.sort,
        device=options.device,
    )
    print(FORMATS[options.format]([table]))
    return 0


def sensitivity(arguments: list[str]) -> int:
    """Choose a bit width for each layer of a run under a budget. Print the widths, and write them to a file."""
    options = run_options.parse_sensitivity(arguments)
    from qbench.analysis.sensitivity import sensitivity as allocate_bits

    tables = allocate_bits(
        options.run,
        options.overrides,
        budget=options.budget,
        measure=options.measure,
        widths=options.widths,
        images=options.images,
        bn_stats=options.bn_stats,
        out=options.out,
        device=options.device,
    )
    print(FORMATS[options.format](tables))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Print the accuracy of a finished run or an exported file on test images."""
    options = run_options.parse_evaluate(arguments)
    if not options.run.is_dir():
        from qbench.analysis.export import evaluate_file

        of_file = evaluate_file(
            options.run, options.overrides, predictions=options.predictions, runtime=options.runtime
        )
        print(FORMATS[options.format]([of_file]))
        return 0
    from qbench.analysis.evaluate import evaluate as evaluate_run

    table = evaluate_run(
        options.run,
        options.overrides,
        weights=options.weights,
        predictions=options.predictions,
        device=options.device,
    )
    print(FORMATS[options.format]([table]))
    return 0


def export(arguments: list[str]) -> int:
    """Write a finished run to one file, after verifying that the file computes the same as the run."""
    options = run_options.parse_export(arguments)
    from qbench.analysis.export import export as export_run

    print("\n".join(export_run(options.run, options.to, options.out, weights=options.weights).lines))
    return 0


def completion(arguments: list[str]) -> int:
    """Print the shell's completion function or, for `completion query`, one candidate per line."""
    from qbench.cli import completion as shell

    words, _ = parsers.completion().parse_words(arguments)
    if words == ["bash"]:
        print(shell.BASH_FUNCTION)
    elif words == ["query"]:
        for word in shell.candidates(os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT", "")):
            print(word)
    else:
        raise ConfigError(
            f"completion {' '.join(words) or 'without a shell'}: must be bash\ntype: qbench completion bash"
        )
    return 0


SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "check": check,
    "compare": compare,
    "completion": completion,
    "describe": describe,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "list": list_names,
    "plan": plan,
    "plot": plot,
    "published": published,
    "sensitivity": sensitivity,
    "settle": settle,
}
