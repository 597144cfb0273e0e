"""The parser of each subcommand: its positional arguments, flags, allowed values and help texts.

What a subcommand needs for its parser is imported when the parser is made, so that a help text takes no longer than it
must. Training has no parser here: its words are overrides and flags of Hydra (`qbench.config.compose`).
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from qbench.bits import FLOAT
from qbench.cli.arguments import (
    SubcommandParser,
    file_with_suffix,
    integer,
    list_of,
    one_of,
    points,
    some_path,
    some_text,
)
from qbench.config import groups
from qbench.report.comparison import columns
from qbench.report.comparison.verdicts import MARGIN
from qbench.report.tables.table import FORMATS

METHOD, OVERRIDES = "METHOD", "KEY=VALUE"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
PREDICTION_SUFFIXES = (".csv", ".npy")
RECORD = "record"
"""The format besides those of tables: the runs themselves in one small file, which `qbench compare` reads again."""
PAPERS = Path(__file__).parents[1] / "papers" / "figures"
LAUNCHERS = ("hydra/launcher=basic", "hydra/launcher=joblib")


def add_choice(parser: SubcommandParser, flag: str, choices: Iterable[str], help_text: str) -> None:
    """Add a flag that takes one of some names."""
    names = list(choices)
    parser.add_argument(flag, type=one_of(names), choices=names, help=help_text)


def format_flag(*more: str) -> SubcommandParser:
    """Return a parser of `--format`, with formats besides those of tables."""
    parser = SubcommandParser()
    add_choice(parser, "--format", (*FORMATS, *more), "how tables are printed (default: text)")
    return parser


def run_flags() -> SubcommandParser:
    """Return a parser of what the subcommands about one finished run share."""
    parser = SubcommandParser(parents=[format_flag()])
    parser.add_argument("run", metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--device", type=some_text, help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.suggestions["--device"] = lambda: ("auto", "cpu", "cuda")
    return parser


def measurement_flags() -> SubcommandParser:
    """Return a parser of how the effect of a layer on the loss is measured."""
    parser = SubcommandParser()
    parser.add_argument(
        "--images", type=integer(1), metavar="N", help="number of validation images to measure on (default: 500)"
    )
    add_choice(
        parser,
        "--bn-stats",
        ("recompute", "keep"),
        "batch-normalization statistics behind a changed layer (default: recompute)",
    )
    return parser


def weights_flag() -> SubcommandParser:
    """Return a parser of `--weights`."""
    parser = SubcommandParser()
    add_choice(parser, "--weights", ("last", "best"), "which checkpoint of the run (default: last)")
    return parser


def listed_groups() -> dict[str, str]:
    """Return the words behind `qbench list`: the plural of each group, with the group, and `runs`."""
    return {f"{group.removesuffix('s')}s": group for group in groups.group_names()} | {"runs": ""}


def weight_widths(value: str) -> tuple[int, ...]:
    """Convert a comma-separated list of bit widths; return them ascending, each once."""
    parts = value.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 3 and 1 <= int(part) < FLOAT for part in parts):
        raise argparse.ArgumentTypeError(f"{value}: allowed are numbers from 1 to {FLOAT - 1}, such as 2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def prediction_file(value: str) -> Path:
    """Convert the name of a file of predictions, in a directory that exists."""
    path = Path(value)
    if path.suffix not in PREDICTION_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{value}: allowed are files that end in {' or '.join(PREDICTION_SUFFIXES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{value}: no such directory: {path.parent}")
    return path


def _add_method(parser: SubcommandParser, nargs: str | None = None) -> None:
    parser.add_argument("method", metavar=METHOD, nargs=nargs, help="a method, or package.module:function")
    parser.suggestions[METHOD] = lambda: groups.option_names("method")


def _add_method_overrides(parser: SubcommandParser) -> None:
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="method.KEY=VALUE, bits.KEY=N, activation=METHOD"
    )


def check() -> SubcommandParser:
    """Return the parser of `qbench check`."""
    parser = SubcommandParser("check", epilog="The exit status is 0 only if no property is violated.")
    _add_method(parser)
    _add_method_overrides(parser)
    return parser


def compare() -> SubcommandParser:
    """Return the parser of `qbench compare`."""
    parser = SubcommandParser("compare", parents=[format_flag(RECORD)])
    parser.add_argument("places", metavar="PLACE", nargs="+", help="a directory with runs at or below it, or a record")
    parser.add_argument(
        "filters",
        metavar=OVERRIDES,
        nargs="*",
        help="only runs with this value, or one of several: method=dorefa,lsq bits.w=2 seed=0,1 optim.lr=1e-2",
    )
    parser.add_argument("--by", type=list_of(), metavar="KEY,...", help="one table for each value of these keys")
    parser.add_argument(
        "--sort",
        type=some_text,
        metavar="COLUMN",
        help="method, W, size, top-1, diff, ...; or equal-bytes: by accuracy among settings of about the same size",
    )
    parser.suggestions["--sort"] = lambda: (columns.EQUAL_BYTES, *(c.name.split()[0] for c in columns.columns_in(())))
    parser.add_argument(
        "--columns",
        type=list_of(columns.SETS),
        metavar="SET,...",
        help=f"some of {','.join(columns.SETS)} (default: {','.join(columns.DEFAULT)})",
    )
    parser.suggestions["--columns"] = lambda: columns.SETS
    parser.add_argument(
        "--margin",
        type=points,
        metavar="X",
        help=f"two settings are equivalent if their top-1 differs by less than X points (default: {MARGIN:g})",
    )
    parser.add_argument(
        "--published", action="store_true", help="add what was published for each setting, by whom, and the gap"
    )
    parser.add_argument(
        "--html",
        dest="pages",
        type=some_path,
        action="append",
        metavar="FILE",
        help="write one page with tables to sort and filter, plots and the runs; it needs no network",
    )
    parser.add_argument(
        "--plot",
        dest="plots",
        type=some_path,
        action="append",
        metavar="FILE",
        help="write plots as .png, .pdf or .svg; a file named bits, pareto, curves or layers holds that one alone",
    )
    parser.epilog = "--format record prints the runs themselves, small, to be read by compare again."
    return parser


def completion() -> SubcommandParser:
    """Return the parser of `qbench completion`."""
    parser = SubcommandParser("completion", epilog='Switch completion on by: eval "$(qbench completion bash)"')
    parser.add_argument(
        "what",
        choices=("bash", "query"),
        help="bash: the function; query: what that function calls, the candidates for the line in COMP_LINE",
    )
    return parser


def describe() -> SubcommandParser:
    """Return the parser of `qbench describe`."""
    parser = SubcommandParser(
        "describe", epilog="Formulas, what the paper leaves open and what was chosen, flaws of public code."
    )
    _add_method(parser)
    return parser


def evaluate() -> SubcommandParser:
    """Return the parser of `qbench evaluate`."""
    parser = SubcommandParser("evaluate", parents=[run_flags(), weights_flag()])
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="another data set: dataset=NAME dataset.KEY=VALUE ..."
    )
    parser.add_argument(
        "--predictions",
        type=prediction_file,
        metavar="FILE",
        help="write index, label, predicted class and its probability of every image, as .csv or .npy",
    )
    return parser


def inspect() -> SubcommandParser:
    """Return the parser of `qbench inspect`."""
    parser = SubcommandParser("inspect", parents=[run_flags(), weights_flag(), measurement_flags()])
    add_choice(
        parser,
        "--sort",
        ("leave-one-out", "leave-one-in", "sqnr", "order"),
        "worst first: by the change of the loss with this layer alone float (leave-one-out), with this layer alone "
        "quantized (leave-one-in), or by SQNR; or in the order of the network (default: leave-one-out)",
    )
    return parser


def list_() -> SubcommandParser:
    """Return the parser of `qbench list`."""
    parser = SubcommandParser("list", epilog="Without a group, all groups are listed.")
    parser.add_argument(
        "group", nargs="?", metavar="GROUP", choices=list(listed_groups()), help=", ".join(listed_groups())
    )
    parser.add_argument(
        "directories", nargs="*", metavar="DIR", help="behind `runs`: where they are (default: outputs)"
    )
    return parser


def plan() -> SubcommandParser:
    """Return the parser of `qbench plan`; it serves help and completion, since Hydra reads the words."""
    parser = SubcommandParser(
        "plan",
        epilog="It needs no data and trains nothing. It takes the flags of Hydra that a training command takes.",
    )
    parser.add_argument("overrides", metavar=OVERRIDES, nargs="*", help="words of a training command")
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
    from qbench.papers.rows import PROVENANCES

    parser = SubcommandParser("published", parents=[format_flag()])
    parser.add_argument("--paper", type=some_text, metavar="NAME", help="only the rows of this paper")
    parser.suggestions["--paper"] = lambda: [file.stem for file in PAPERS.glob("*.yaml") if file.stem != "names"]
    add_choice(parser, "--provenance", PROVENANCES, "only rows whose source is known at least this well")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="only rows that are not measured yet, with the command that runs each or what it lacks",
    )
    return parser


def sensitivity() -> SubcommandParser:
    """Return the parser of `qbench sensitivity`."""
    parser = SubcommandParser(
        "sensitivity",
        parents=[run_flags(), measurement_flags()],
        epilog="layers=@FILE on the run's command line trains the widths that were written.",
    )
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="another method, width or layer policy: method=NAME bits.w=4"
    )
    parser.add_argument(
        "--budget",
        type=some_text,
        metavar="B",
        help="bytes=20k, bitops=1G, or w=3: mean bits per weight (default: the run's own width)",
    )
    add_choice(
        parser,
        "--measure",
        ("loss", "mse"),
        "what is summed over layers: the validation loss that each adds, or the squared error of its weights "
        "(default: loss)",
    )
    parser.add_argument(
        "--widths", type=weight_widths, metavar="N,...", help="widths to choose from (default: 1,2,3,4,5,6,7,8)"
    )
    parser.add_argument("--out", type=some_text, metavar="FILE", help="where the widths go (default: bits.yaml)")
    return parser


def settle() -> SubcommandParser:
    """Return the parser of `qbench settle`."""
    from qbench.report.comparison.sequential_test import FIRST_LOOK, MAX_SEEDS
    from qbench.report.statistics.power import SEEDS_LIMIT

    parser = SubcommandParser(
        "settle",
        epilog=f"Runs seeds 0 to {FIRST_LOOK - 1} of both settings, then more, until the result is significant or "
        "equivalence is shown. All looks at the data together keep the rate of false decisions below 5 %.",
    )
    parser.add_argument(
        "settings",
        nargs=2,
        metavar="SETTING",
        help='a run\'s directory, or a command line in quotes without seed: "method=dorefa bits=w2a2"',
    )
    parser.add_argument(
        "launcher", nargs="?", metavar="hydra/launcher=NAME", choices=LAUNCHERS, help="joblib: runs on all cores"
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
        help=f"stop undecided at this number of seeds (default: {MAX_SEEDS})",
    )
    return parser


PARSERS: dict[str, Callable[[], SubcommandParser]] = {
    "check": check,
    "compare": compare,
    "completion": completion,
    "describe": describe,
    "evaluate": evaluate,
    "inspect": inspect,
    "list": list_,
    "plan": plan,
    "plot": plot,
    "published": published,
    "sensitivity": sensitivity,
    "settle": settle,
}
