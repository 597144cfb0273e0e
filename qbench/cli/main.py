"""The front door: verbs first, then Hydra. Nothing on the way to `--help` or to a stored result imports torch."""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from qbench.cli.commands import VERBS
from qbench.cli.errors import BUG, drop_unwritten, print_error, system_refusal
from qbench.cli.help import PAGES, help_screen
from qbench.cli.train import train
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError, Interrupted, QbenchError, ResourceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or what `qbench.errors` says of the error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not lose a table
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except FileNotFoundError:
        print_error(["the working directory is gone; change to another one"])
        return ResourceError.status
    try:
        status = _answer(arguments)
        print(end="", flush=True)  # here, where it can still be told of, not when Python ends
        return status
    except QbenchError as error:
        if os.environ.get("QBENCH_TRACEBACK"):
            traceback.print_exc()
        print_error(str(error).strip().splitlines() or [type(error).__name__])
        return error.status
    except KeyboardInterrupt:  # before a run began; after that signals are the run's own
        return Interrupted.status
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        drop_unwritten(sys.stdout)
        return 0
    except (Exception, SystemExit) as error:  # sys.exit in a function of the user's own would look like success
        if refused := system_refusal(error):
            print_error(refused)
            drop_unwritten(sys.stdout)
            return ResourceError.status
        if os.environ.get("QBENCH_TRACEBACK"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print_error(
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


def _version() -> str:
    try:
        return f"qbench {version('qbench-papers')}"
    except PackageNotFoundError:
        return "qbench, not installed"


if __name__ == "__main__":
    sys.exit(main())
