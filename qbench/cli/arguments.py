"""Defines the base class of subcommand parsers. The parsers' error messages state the allowed values.

A flag is typed in full, as `--flag VALUE` or `--flag=VALUE`. Flags and positional arguments may
come in any order.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError

SUMMARIES = {
    "check": "Check the properties that every method must have.",
    "compare": "Compare runs in tables, and test their differences.",
    "completion": "Print the bash completion function.",
    "describe": "Print a method card, or the description of a run.",
    "evaluate": "Evaluate a run or an exported file on test or other data.",
    "export": "Write a finished run to one file, verified against the run.",
    "inspect": "Show each layer of a finished run: levels, SQNR, loss.",
    "list": "List groups with their options, or runs.",
    "plan": "Show the runs of a command line, with costs and time.",
    "plot": "Plot a method's quantizers: staircase, gradient, levels.",
    "published": "Show published results next to measured results.",
    "sensitivity": "Choose a bit width for each layer under a budget.",
    "settle": "Run more seeds of two settings until a test decides.",
}
"""Subcommand -> one-line summary. `qbench --help` and the help text of the subcommand show the summary."""

WIDEST_HELP = 110
"""Maximum line length of a help text. Narrower terminals get shorter lines."""


def help_width() -> int:
    """Return the width of a help text, in characters per line."""
    return min(shutil.get_terminal_size().columns, WIDEST_HELP)


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter with a bounded width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=help_width())


class SubcommandParser(argparse.ArgumentParser):
    """The parser of one subcommand.

    Positional arguments are declared only for the help text and for completion. `parse_words` returns all positional
    arguments in one list. The subcommand then decides which words are directories and which are `KEY=VALUE`.

    Args:
        name: the subcommand, a key of `SUMMARIES`. The name is empty for a parser of flags that several
            subcommands share.
        parents: parsers whose flags this parser accepts too.
        epilog: text printed below the flags.
    """

    def __init__(self, name: str = "", *, parents: Sequence["SubcommandParser"] = (), epilog: str = "") -> None:
        super().__init__(
            prog=f"qbench {name}",
            description=SUMMARIES.get(name),
            epilog=epilog or None,
            parents=list(parents),
            formatter_class=HelpFormatter,
            argument_default=argparse.SUPPRESS,
            add_help=bool(name),
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.name = name
        self.suggestions: dict[str, Callable[[], Iterable[str]]] = {}
        """Flag or positional argument without `choices` -> function that returns the values for completion."""
        for parent in parents:
            self.suggestions |= parent.suggestions

    def parse_words(self, arguments: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
        """Return the positional arguments in the typed order, and the values of the typed flags.

        Raises:
            ConfigError: a flag is unknown, is typed twice or lacks its value, or a value is not allowed.
        """
        arguments = list(arguments)
        self._refuse_repeated(arguments)
        for word in arguments:
            if f"-{word.partition('=')[0]}" in self.flags():  # argparse would read -html as -h
                raise ConfigError(self._unknown_flag(word))
        positionals = [action for action in self._actions if not action.option_strings]
        for action in positionals:
            action.nargs, action.required, action.choices = "*", False, None
        try:
            namespace, unknown = self.parse_known_intermixed_args(arguments)
        except argparse.ArgumentError as error:
            raise ConfigError(self._invalid_value(error)) from None
        if unknown:
            raise ConfigError(self._unknown_flag(next((w for w in unknown if w.startswith("-")), unknown[0])))
        values = vars(namespace)
        words = [word for action in positionals for word in values.pop(action.dest, ())]
        return words, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def _refuse_repeated(self, arguments: Sequence[str]) -> None:
        """Refuse a flag that is typed twice. argparse would silently use the last value."""
        typed = Counter(word.partition("=")[0] for word in arguments)
        for action in self._actions:
            if not isinstance(action, argparse._AppendAction) and sum(typed[o] for o in action.option_strings) > 1:
                raise ConfigError(f"{self.name}: {action.option_strings[-1]} must be typed once")

    def flags(self) -> list[str]:
        """Return the full names of all flags except `--help`."""
        options = [action.option_strings[-1] for action in self._actions if action.option_strings]
        return [option for option in options if option != "--help"]

    def flag_values(self, flag: str) -> list[str] | None:
        """Return the values that completion offers after a flag, or None if the flag takes no value."""
        action = next(action for action in self._actions if flag in action.option_strings)
        if action.nargs == 0:
            return None
        return list(self.suggestions[flag]() if flag in self.suggestions else action.choices or ())

    def positionals(self) -> list[str]:
        """Return the names that the help text gives to the positional arguments."""
        return [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]

    def positional_values(self) -> list[str]:
        """Return the values that completion offers for the positional arguments."""
        actions = [action for action in self._actions if not action.option_strings]
        choices = [self.suggestions.get(str(action.metavar), lambda a=action: a.choices or ())() for action in actions]
        return [str(value) for values in choices for value in values]

    def error(self, message: str) -> NoReturn:
        """Raise a `ConfigError` with argparse's message."""
        raise ConfigError(f"{self.name}: {message}\nsee qbench {self.name} --help")

    def _invalid_value(self, error: argparse.ArgumentError) -> str:
        if isinstance(error.__context__, argparse.ArgumentTypeError):  # a type of `qbench.cli.value_types`
            return f"{self.name} {error.argument_name} {error.message}"
        takes_value = "expected one argument" in error.message
        reason = "needs a value" if takes_value else f": {error.message}"
        return f"{self.name} {error.argument_name} {reason}\nsee qbench {self.name} --help".replace(" :", ":")

    def _unknown_flag(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{self.name}: unexpected argument: {word}\nallowed: {self._all_flags()}"
        flag = word.partition("=")[0]
        return f"{self.name}: no such flag: {word}{did_you_mean(flag, self.flags())}\nallowed: {self._all_flags()}"

    def _all_flags(self) -> str:
        return ", ".join(self.flags()) or "none"
