"""Completes subcommands, flags, groups and options in the shell.

Hydra completes the keys inside groups.

Packages that complete argparse parsers (argcomplete, shtab) are not used. The most frequent command line has no
subcommand, and its arguments are overrides, which only Hydra can complete. Hydra and such a package would need one
shell function each, but the shell allows only one function per command. The shell function therefore calls `qbench
completion query`. This subcommand completes other subcommands by their parsers, and passes overrides to Hydra.
"""

import glob
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout

from qbench.cli.arguments import SubcommandParser
from qbench.cli.parsers import PARSERS
from qbench.cli.run_parsers import OVERRIDES
from qbench.config.groups import group_names, option_names
from qbench.errors import ConfigError

PLACES = ("PLACE", "RUN", "SETTING", "DIR")
"""Positional arguments that are directories. The shell completes their names."""

BASH_FUNCTION = r"""_qbench_complete() {
    # bash splits words at `=` and `:`, so the text before the last of them is removed from the candidates
    local word="${COMP_LINE:0:COMP_POINT}" breaks="${COMP_WORDBREAKS//[^=:]/}" typed=""
    word="${word##* }"
    [[ -n $breaks && $word == *[$breaks]* ]] && typed="${word%"${word##*[$breaks]}"}"
    mapfile -t COMPREPLY < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" "$1" completion query 2> /dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$typed"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -o default -F _qbench_complete qbench"""
"""The shell function. With `-o default`, bash completes file names if there is no candidate."""


def candidates(line: str, point: str = "") -> list[str]:
    """Return completions of the word before the cursor. The list is empty where a file name is expected.

    Args:
        line: the command line, starting with the program's name.
        point: the cursor's position in `line` as a decimal number; empty for the end of `line`.
    """
    before = line[: int(point)] if point.isdecimal() else line
    words = before.split()[1:]
    current = "" if before[-1:].isspace() or not words else words.pop()
    if words and words[0] in PARSERS:
        found = _of_subcommand(PARSERS[words[0]](), words[1:], current)
    else:
        found = _of_training(words, current)
    return sorted({word for word in found if word.startswith(current)})


def _of_subcommand(parser: SubcommandParser, words: Sequence[str], current: str) -> Iterable[str]:
    flag, equals, value = current.partition("=")
    if equals and flag in parser.flags():
        return [f"{flag}={v}" for v in _listed(value, parser.flag_values(flag) or ())]
    if words and words[-1] in parser.flags() and (values := parser.flag_values(words[-1])) is not None:
        return _listed(current, values)
    if current.startswith("-"):
        return [*parser.flags(), "--help"]
    names = parser.positionals()
    if names[:1] and names[0] in PLACES and (not current or glob.glob(f"{glob.escape(current)}*")):
        return []
    values = parser.positional_values() if current or not words else []
    return [*values, *(_overrides(words, current) if OVERRIDES in names else ())]


def _of_training(words: Sequence[str], current: str) -> Iterable[str]:
    from qbench.config.compose import FLAGS

    if words == ["help"]:
        return PARSERS
    if words and (values := FLAGS.get(words[-1])):
        return values
    if current.startswith("-"):
        return list(FLAGS)
    return [*([*PARSERS, "help"] if not words else ()), *_overrides(words, current)]


def _overrides(words: Sequence[str], current: str) -> list[str]:
    """Return the completions of an override.

    After `GROUP=`, the completions are the options of the group. All other completions come from Hydra.
    """
    key, equals, value = current.partition("=")
    group = key.partition("@")[0]
    if equals and group in group_names():
        return [f"{key}={v}" for v in _listed(value, option_names(group))]
    from qbench.config import compose

    os.environ["COMP_LINE"] = " ".join(["qbench", *(word for word in words if "=" in word), current])
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            compose.configurations(["--shell-completion", "query=bash"])
    except ConfigError:  # a word before the cursor is not valid
        return []
    groups = group_names()
    names = (f"{name}=" if name in groups else name for name in printed.getvalue().split())
    return [name for name in names if current or not name.startswith("hydra")]


def _listed(typed: str, values: Iterable[str]) -> list[str]:
    """Return completions of the last item of a comma-separated list.

    Each completion consists of the earlier items of the list and one of `values`.
    """
    before = typed[: typed.rfind(",") + 1]
    return [f"{before}{value}" for value in values]
