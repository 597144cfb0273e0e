"""Defines the parser of each subcommand: arguments, flags, allowed values and help texts.

If only one subcommand needs a module, the module is imported when the subcommand's parser is created. Help texts and
completion therefore stay fast. Training has no parser here, because its arguments are overrides and flags of Hydra
(`qbench.config.compose`).
"""

from collections.abc import Callable
from pathlib import Path

from qbench.cli.arguments import SubcommandParser
from qbench.cli.run_parsers import OVERRIDES, add_choice, evaluate, export, format_flag, inspect, sensitivity
from qbench.cli.value_types import file_with_suffix, integer, list_of, points, some_path, some_text
from qbench.config import groups
from qbench.report.comparison import columns
from qbench.report.comparison.verdicts import MARGIN

METHOD = "METHOD"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
RECORD = "record"
"""The output format that stores all results in one small file, which `qbench compare` can read."""
PAPERS = Path(__file__).parents[1] / "papers" / "figures"
LAUNCHERS = ("hydra/launcher=basic", "hydra/launcher=joblib")


def listed_groups() -> dict[str, str]:
    """Return a map from each argument of `qbench list` to a group, such as `methods` -> `method`.

    The argument `runs` is mapped to an empty string.
    """
    return {f"{group.removesuffix('s')}s": group for group in groups.group_names()} | {"runs": ""}


def _add_method(parser: SubcommandParser, nargs: str | None = None) -> None:
    parser.add_argument("method", metavar=METHOD, nargs=nargs, help="a method, or package.module:function")
    parser.suggestions[METHOD] = lambda: groups.option_names("method")


def _add_method_overrides(parser: SubcommandParser) -> None:
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="method.KEY=VALUE, bits.KEY=N, activation=METHOD"
    )


def check() -> SubcommandParser:
    """Return the parser of `qbench check`."""
    parser = SubcommandParser("check", epilog="The exit status is 0 only if all properties hold.")
    _add_method(parser)
    _add_method_overrides(parser)
    return parser


def _sort_columns() -> list[str]:
    names = [column.name.removesuffix(" %") for column in columns.COLUMNS]
    return [columns.EQUAL_BYTES, *(name for name in names if " " not in name)]


def _add_table_flags(parser: SubcommandParser) -> None:
    parser.add_argument("--by", type=list_of(), metavar="KEY,...", help="make one table per value of these keys")
    parser.add_argument(
        "--sort",
        type=some_text,
        metavar="COLUMN",
        help="a column, such as method, W, size, top-1 or diff; or equal-bytes, which sorts settings of about the same "
        "size by accuracy",
    )
    parser.suggestions["--sort"] = _sort_columns
    parser.add_argument(
        "--columns",
        type=list_of(columns.SETS),
        metavar="SET,...",
        help=f"one or more of {','.join(columns.SETS)} (default: {','.join(columns.DEFAULT)})",
    )
    parser.suggestions["--columns"] = lambda: columns.SETS


def compare() -> SubcommandParser:
    """Return the parser of `qbench compare`."""
    parser = SubcommandParser("compare", parents=[format_flag(RECORD)])
    parser.add_argument(
        "places",
        metavar="PLACE",
        nargs="+",
        help="a run's directory, a folder that contains runs at any depth, or a file that --format record has printed",
    )
    parser.add_argument(
        "filters",
        metavar=OVERRIDES,
        nargs="*",
        help="select runs by one or several values: method=dorefa,lsq bits.w=2 seed=0,1 optim.lr=1e-2",
    )
    _add_table_flags(parser)
    parser.add_argument(
        "--margin",
        type=points,
        metavar="X",
        help=f"two settings are equivalent if their top-1 differs by less than X points (default: {MARGIN:g})",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="add three columns: the published result of each setting, who measured it, and the gap (the result of the "
        "runs minus the published result)",
    )
    parser.add_argument(
        "--html",
        dest="pages",
        type=some_path,
        action="append",
        metavar="FILE",
        help="write one self-contained page: tables to sort and filter, plots, details of the runs",
    )
    parser.add_argument(
        "--plot",
        dest="plots",
        type=some_path,
        action="append",
        metavar="FILE",
        help="write plots as .png, .pdf or .svg; a file named bits, pareto, curves or layers contains only that plot",
    )
    parser.epilog = "--format record prints the runs in a compact form that compare can read again."
    return parser


def completion() -> SubcommandParser:
    """Return the parser of `qbench completion`."""
    parser = SubcommandParser("completion", epilog='To switch completion on: eval "$(qbench completion bash)"')
    parser.add_argument(
        "what",
        choices=("bash", "query"),
        help="bash: print the shell function; query: print the candidates for the command line in COMP_LINE (the "
        "shell function uses query)",
    )
    return parser


def describe() -> SubcommandParser:
    """Return the parser of `qbench describe`."""
    parser = SubcommandParser(
        "describe",
        epilog="The card lists formulas, choices where the paper is silent, and deviations in public code. The "
        "description of a run states the data, the recipe, the accuracy, versions, notes, and a command that repeats "
        "the run.",
    )
    parser.add_argument("method", metavar=METHOD, help="a method, package.module:function, or a run's directory")
    parser.suggestions[METHOD] = lambda: groups.option_names("method")
    return parser


def list_() -> SubcommandParser:
    """Return the parser of `qbench list`."""
    parser = SubcommandParser("list", epilog="Without a group, all groups are listed.")
    parser.add_argument(
        "group", nargs="?", metavar="GROUP", choices=list(listed_groups()), help=", ".join(listed_groups())
    )
    parser.add_argument(
        "directories", nargs="*", metavar="DIR", help="after `runs`: the folders of the runs (default: outputs)"
    )
    return parser


def plan() -> SubcommandParser:
    """Return the parser of `qbench plan`.

    It is used only for help and completion, because Hydra reads the arguments.
    """
    parser = SubcommandParser(
        "plan",
        epilog="This subcommand trains nothing, and needs no images of published data sets. It accepts the Hydra flags "
        "of a training command.",
    )
    parser.add_argument("overrides", metavar=OVERRIDES, nargs="*", help="arguments of a training command")
    parser.add_argument("-m", "--multirun", action="store_true", help="all combinations of comma-separated values")
    return parser


def plot() -> SubcommandParser:
    """Return the parser of `qbench plot`."""
    parser = SubcommandParser("plot")
    _add_method(parser, nargs="?")
    _add_method_overrides(parser)
    parser.add_argument("--poster", action="store_true", help="plot all methods in one figure")
    parser.add_argument(
        "--out",
        type=file_with_suffix(*PLOT_SUFFIXES),
        metavar="FILE",
        help=f"a file that ends in {', '.join(PLOT_SUFFIXES)} (default: plot-METHOD-BITS.png, poster.png)",
    )
    return parser


def published() -> SubcommandParser:
    """Return the parser of `qbench published`."""
    from qbench.papers.row_types import PROVENANCES

    parser = SubcommandParser("published", parents=[format_flag()])
    parser.add_argument("--paper", type=some_text, metavar="NAME", help="show only the rows of this paper")
    parser.suggestions["--paper"] = lambda: [file.stem for file in PAPERS.glob("*.yaml") if file.stem != "names"]
    add_choice(parser, "--provenance", PROVENANCES, "show only rows whose source has at least this quality")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="show only rows that are not measured with their own recipe, each with a command that measures the row, "
        "or with the reason why there is no such command",
    )
    return parser


def settle() -> SubcommandParser:
    """Return the parser of `qbench settle`."""
    from qbench.report.comparison.sequential_test import FIRST_LOOK, MAX_SEEDS
    from qbench.report.statistics.power import SEEDS_LIMIT

    parser = SubcommandParser(
        "settle",
        epilog=f"Runs seeds 0 to {FIRST_LOOK - 1} of the two settings, then more seeds, until a difference or "
        "equivalence is significant. All tests together have a significance level of 5 %, even if you add seeds later.",
    )
    parser.add_argument(
        "settings",
        nargs=2,
        metavar="SETTING",
        help='a run\'s directory, or a command line in quotes without seed: "method=dorefa bits=w2a2"',
    )
    parser.add_argument(
        "launcher",
        nargs="?",
        metavar="hydra/launcher=NAME",
        choices=LAUNCHERS,
        help="joblib: train several runs at once, on all cores",
    )
    parser.add_argument(
        "--margin",
        type=points,
        metavar="X",
        help=f"the settings are equivalent if their top-1 differs by less than X points (default: {MARGIN:g})",
    )
    parser.add_argument(
        "--max-seeds",
        type=integer(FIRST_LOOK, SEEDS_LIMIT, "a number of seeds"),
        metavar="N",
        help=f"stop at this number of seeds, even if no test has decided (default: {MAX_SEEDS})",
    )
    return parser


PARSERS: dict[str, Callable[[], SubcommandParser]] = {
    "check": check,
    "compare": compare,
    "completion": completion,
    "describe": describe,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "list": list_,
    "plan": plan,
    "plot": plot,
    "published": published,
    "sensitivity": sensitivity,
    "settle": settle,
}
