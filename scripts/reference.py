#!/usr/bin/env python3
"""Write docs/reference/configuration.md and docs/reference/commands.md.

    .venv/bin/python scripts/reference.py [--check]

The configuration page is made from qbench/config/schema.py (types, ranges) and from the YAML files in conf/ (defaults,
and the comment next to each key). The page of commands is made from the parsers in qbench/cli and from
qbench/errors.py. With --check, nothing is written. The script then names the pages that would change, and exits with
status 1 if there are such pages.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbench import errors
from qbench.cli.arguments import SUMMARIES, SubcommandParser
from qbench.cli.parsers import PARSERS
from qbench.config import compose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # Python does not add this folder if PYTHONSAFEPATH is set

from configuration_reference import GENERATED, configuration_page, table  # noqa: E402

FOLDER = ROOT / "docs" / "reference"


def commands_page() -> str:
    """Return the page of all subcommands, flags and exit statuses."""
    flags = [(", ".join(f"`{name}`" for name in names), text) for names, text in TRAINING_FLAGS.items()]
    parts = ["# Commands", GENERATED, TRAINING, table(("flag", "what"), flags)]
    for name, make in PARSERS.items():
        parser = make()
        usage = " ".join(["qbench", name, *map(usage_word, parser._actions), *(["[FLAGS]"] if parser.flags() else [])])
        rows = sorted(arguments(parser), key=lambda row: row[0].startswith("`-"))
        parts += [f"## qbench {name}", SUMMARIES[name], "    " + " ".join(usage.split())]
        parts += [table(("argument", "allowed", "what"), rows)]
        parts += [parser.epilog] if parser.epilog else []
    parts += [f"## Exit statuses\n\n{table(('status', 'meaning'), exit_statuses())}"]
    return "\n\n".join(parts) + "\n"


def usage_word(action: argparse.Action) -> str:
    """Return a positional argument as a usage line shows it. For a flag, return an empty text."""
    name = "" if action.option_strings else str(action.metavar or action.dest)
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]", 2: f"{name} {name}"}.get(
        action.nargs or "", name
    )


def arguments(parser: SubcommandParser) -> Iterator[tuple[str, str, str]]:
    """Yield name, allowed values and help text of each argument of a parser."""
    for action in parser._actions:
        if action.option_strings[-1:] == ["--help"]:
            continue
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
        names = [f"{flag}{value}" for flag in action.option_strings] or [str(action.metavar or action.dest)]
        allowed = ", ".join(map(str, action.choices or ()))
        yield ", ".join(f"`{name}`" for name in names), allowed, action.help or ""


def exit_statuses() -> Iterator[tuple[str, str]]:
    """Yield each exit status and its meaning."""
    yield "0", "The command succeeded."
    yield "1", "A bug of qbench or an error in your own code, or a property that `qbench check` refutes."
    classes = [error for error in errors.QbenchError.__subclasses__() if error.status > 1]
    for error in sorted(classes, key=lambda error: error.status):
        if error.status == errors.Interrupted.status:
            yield "8", "Some runs of a sweep failed, diverged or are unfinished."
        yield str(error.status), " ".join((error.__doc__ or "").split())


TRAINING = """\
Every subcommand has `--help`, and `qbench --help` lists subcommands and groups.
`eval "$(qbench completion bash)"` switches shell completion on.

## qbench KEY=VALUE

Train a float baseline and a quantized network, evaluate both, and print a row. The
[configuration](configuration.md) lists all keys.

    qbench [KEY=VALUE ...] [FLAGS]"""

TRAINING_FLAGS = {
    ("-m", "--multirun"): "all combinations of comma-separated values",
    ("-c", "--cfg"): "print the configuration (`job`, `hydra` or `all`) and run nothing",
    ("--resolve",): "with `--cfg`: insert the values of references such as `${dataset.recipe.lr}`",
    ("-i", "--info"): "show Hydra's own data: `all`, `config`, `defaults`, `defaults-tree`, `plugins` or `searchpath`",
    ("-p", "--package"): "with `--cfg`: print only this part of the configuration",
    ("-cd", "--config-dir"): "a folder with your own groups and experiment files",
    ("-r", "--run"): "one run (the default)",
    ("-h", "--help"): "print subcommands, groups and examples",
    ("--hydra-help",): "print the flags of Hydra",
    ("-sc", "--shell-completion"): "used by Hydra's completion",
    ("--version",): "print the version",
}
PAGES = {"configuration.md": configuration_page, "commands.md": commands_page}


def main(words: Sequence[str]) -> int:
    assert {flag for names in TRAINING_FLAGS for flag in names} == set(compose.FLAGS)
    changed = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            changed.append(name)
            if "--check" not in words:
                path.write_text(text, encoding="utf-8")
    if changed and "--check" in words:
        print(f"docs/reference: {', '.join(changed)} out of date; run scripts/reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
