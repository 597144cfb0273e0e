"""Command-line entry point. Runs a subcommand or, if none is typed, trains.

Commands that print help, a list or a stored row do not import torch.
"""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence

from qbench.cli.arguments import SUMMARIES
from qbench.cli.errors import BUG, drop_unwritten, print_error, resource_error
from qbench.distributed.launch import passed_on
from qbench.errors import ConfigError, Interrupted, QbenchError, ResourceError
from qbench.system.signals import ignore_stop_signals
from qbench.system.streams import keep_running_without_reader
from qbench.system.tracebacks import error_text, place_in_own_code

STARTUP_OBJECTS = 100_000
"""Number of new objects after which Python collects garbage.

Start-up creates fewer objects than this number, so Python does not collect garbage then. A collection at start-up would
take 30 ms and free nothing.
"""

TRACEBACK = "QBENCH_TRACEBACK"
"""Name of the environment variable that makes qbench print errors with their traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status, which is 0 if there was no error.

    The exit statuses of errors are in `qbench.errors`.
    """
    status = exit_status(arguments)
    if arguments is None:  # the process belongs to qbench, and ends now
        ignore_stop_signals()
    return passed_on(status)


def exit_status(arguments: Sequence[str] | None) -> int:
    """Run a command line and return its exit status. Errors are printed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(STARTUP_OBJECTS)
    atexit.register(gc.freeze)  # without this, Python would search all objects for garbage at exit (50 ms)
    keep_running_without_reader()
    # Processes that this process starts must not import modules from the working directory.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        os.getcwd()
    except FileNotFoundError:
        print_error(["the working directory no longer exists; change to another directory"])
        return ResourceError.status
    try:
        status = run_command(arguments)
        print(end="", flush=True)  # flush here: a failure at Python's exit could not be reported
        return status
    except KeyboardInterrupt:  # during start-up only, because a run handles signals itself
        return Interrupted.status
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's function may call sys.exit, which would otherwise look like success
        return report(error)


def run_command(arguments: list[str]) -> int:
    """Run a subcommand or train, and return the exit status."""
    first = arguments[0] if arguments else "help"
    if first == "help" or {"-h", "--help"} & set(arguments):
        return show_help(arguments[1] if first == "help" and len(arguments) > 1 else first)
    if "--version" in arguments:
        print(installed_version())
        return 0
    if first in SUMMARIES:
        from qbench.cli.commands import SUBCOMMANDS

        return SUBCOMMANDS[first](arguments[1:])
    if "=" not in first and first[:1] not in ("-", "+", "~"):
        from qbench.config.typed_words import unknown_word_message

        raise ConfigError(unknown_word_message(first, arguments[1:], list(SUMMARIES)))
    from qbench.cli.train import train

    return train(arguments)


def show_help(word: str) -> int:
    """Print the help text of a subcommand.

    For any other word, print the help text of the whole program.
    """
    if word in SUMMARIES:
        from qbench.cli.parsers import PARSERS

        print(PARSERS[word]().format_help(), end="")
    else:
        from qbench.cli.help import help_screen

        print(help_screen())
    return 0


def report(error: BaseException) -> int:
    """Print an error in at most three lines, and return its exit status."""
    resources = [] if isinstance(error, QbenchError) else resource_error(error)
    if os.environ.get(TRACEBACK) and not resources:
        traceback.print_exception(error)
    if isinstance(error, QbenchError):
        print_error(str(error).strip().splitlines() or [type(error).__name__])
        return error.status
    if resources:
        print_error(resources)
        drop_unwritten(sys.stdout)
        return ResourceError.status
    cause = "" if place_in_own_code(error) else "bug in qbench or in your own code: "
    print_error(
        [
            f"{cause}{error_text(error).partition(chr(10))[0]}",
            f"to see the traceback, set {TRACEBACK}=1; "
            "after a run has started, the run's log.txt contains the traceback too",
        ]
    )
    return BUG


def installed_version() -> str:
    """Return the line that `qbench --version` prints."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"qbench {version('qbench-papers')}"
    except PackageNotFoundError:
        return "qbench, not installed"


if __name__ == "__main__":
    sys.exit(main())
