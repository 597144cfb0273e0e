"""Parsers of the subcommands about one finished run, and the flags that several subcommands share."""

from collections.abc import Iterable

from qbench.cli.arguments import SubcommandParser
from qbench.cli.value_types import integer, one_of, prediction_file, some_text, weight_widths
from qbench.report.tables.table import FORMATS

OVERRIDES = "KEY=VALUE"


def add_choice(parser: SubcommandParser, flag: str, choices: Iterable[str], help_text: str) -> None:
    """Add a flag whose value is one of `choices`."""
    names = list(choices)
    parser.add_argument(flag, type=one_of(names), choices=names, help=help_text)


def format_flag(*more: str) -> SubcommandParser:
    """Return a parser of the flag `--format`.

    Its allowed values are the table formats and those in `more`.
    """
    parser = SubcommandParser()
    add_choice(parser, "--format", (*FORMATS, *more), "how tables are printed (default: text)")
    return parser


def run_flags() -> SubcommandParser:
    """Return a parser of the flags that all subcommands about one finished run share."""
    parser = SubcommandParser(parents=[format_flag()])
    parser.add_argument("run", metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--device", type=some_text, help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.suggestions["--device"] = lambda: ("auto", "cpu", "cuda")
    return parser


def measurement_flags() -> SubcommandParser:
    """Return a parser of the flags that set how the effect of a layer on the loss is measured."""
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
