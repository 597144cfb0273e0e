"""Defines the parsers of subcommands that analyse one finished run, and their common flags."""

from collections.abc import Iterable

from qbench.cli.arguments import SubcommandParser
from qbench.cli.value_types import integer, one_of, prediction_file, some_path, some_text, weight_widths
from qbench.report.tables.table import FORMATS

OVERRIDES = "KEY=VALUE"
EXPORT_FORMS = ("packed", "onnx", "int8", "qonnx", "integer")
RUNTIMES = ("onnxruntime", "openvino", "numba")


def add_choice(parser: SubcommandParser, flag: str, choices: Iterable[str], help_text: str) -> None:
    """Add a flag whose value is one of `choices`."""
    names = list(choices)
    parser.add_argument(flag, type=one_of(names), choices=names, help=help_text)


def format_flag(*more: str) -> SubcommandParser:
    """Return a parser of the flag `--format`.

    The allowed values are the table formats and the values in `more`.
    """
    parser = SubcommandParser()
    add_choice(parser, "--format", (*FORMATS, *more), "output format of the tables (default: text)")
    return parser


def run_flags() -> SubcommandParser:
    """Return a parser of the flags that all subcommands for one finished run share."""
    parser = SubcommandParser(parents=[format_flag()])
    parser.add_argument("run", metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--device", type=some_text, help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.suggestions["--device"] = lambda: ("auto", "cpu", "cuda")
    _add_trust(parser)
    return parser


def _add_trust(parser: SubcommandParser) -> None:
    parser.add_argument("--trust", action="store_true", help="run code outside qbench that the run's config.yaml names")


def measurement_flags() -> SubcommandParser:
    """Return a parser of the flags that control how the effect of a layer on the loss is measured."""
    parser = SubcommandParser()
    parser.add_argument(
        "--images", type=integer(1), metavar="N", help="number of validation images to measure on (default: 500)"
    )
    add_choice(
        parser,
        "--bn-stats",
        ("recompute", "keep"),
        "recompute or keep batch normalization statistics after quantizers are switched on or off (default: recompute)",
    )
    return parser


def weights_flag() -> SubcommandParser:
    """Return a parser of `--weights`."""
    parser = SubcommandParser()
    add_choice(
        parser,
        "--weights",
        ("last", "best"),
        "weights of the last epoch, or of the epoch with the best validation accuracy (default: last)",
    )
    return parser


def evaluate() -> SubcommandParser:
    """Return the parser of `qbench evaluate`."""
    parser = SubcommandParser(
        "evaluate",
        parents=[run_flags(), weights_flag()],
        epilog="Instead of a run's directory, you can type a file that qbench export has written.",
    )
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="another data set: dataset=NAME dataset.KEY=VALUE ..."
    )
    parser.add_argument(
        "--predictions",
        type=prediction_file,
        metavar="FILE",
        help="write a .csv or .npy file with index, label, predicted class and its probability for every image",
    )
    add_choice(
        parser,
        "--runtime",
        RUNTIMES,
        "runtime for an exported file: onnxruntime (default) or openvino for ONNX files, numba for packed files with "
        "weights and activations of 1 or 2 bits",
    )
    return parser


def export() -> SubcommandParser:
    """Return the parser of `qbench export`."""
    parser = SubcommandParser(
        "export",
        parents=[weights_flag()],
        epilog="The file is written only if it agrees with the run on all test images. See docs/guides/export.md.",
    )
    parser.add_argument("run", metavar="RUN", help="the directory of a finished run")
    add_choice(
        parser,
        "--to",
        EXPORT_FORMS,
        "form of the file (default: packed). packed: codes that take exactly their bit width, with logits that are "
        "bit-identical to the run's; onnx: ONNX with integer weights and standard operators; int8: ONNX that runtimes "
        "compute in 8-bit integers; qonnx: ONNX with Quant nodes, for FINN and hls4ml; integer: integer arithmetic "
        "with thresholds, in NumPy",
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="FILE",
        help="file to write (default: network.qbench, network.onnx, network-FORM.onnx or network-integer.qbench in the "
        "run's directory)",
    )
    _add_trust(parser)
    return parser


def inspect() -> SubcommandParser:
    """Return the parser of `qbench inspect`."""
    parser = SubcommandParser("inspect", parents=[run_flags(), weights_flag(), measurement_flags()])
    add_choice(
        parser,
        "--sort",
        ("leave-one-out", "leave-one-in", "sqnr", "order"),
        "order of rows (default: leave-one-out). order: as in the network. The others put the worst layer first: "
        "leave-one-out by the loss decrease when only this layer is in float, leave-one-in by the loss increase when "
        "only this layer is quantized, sqnr by SQNR",
    )
    return parser


def sensitivity() -> SubcommandParser:
    """Return the parser of `qbench sensitivity`."""
    parser = SubcommandParser(
        "sensitivity",
        parents=[run_flags(), measurement_flags()],
        epilog="To train with the chosen widths, add layers=@FILE to the run's command.",
    )
    parser.add_argument(
        "overrides", metavar=OVERRIDES, nargs="*", help="another method, width or layer policy: method=NAME bits.w=4"
    )
    parser.add_argument(
        "--budget",
        type=some_text,
        metavar="B",
        help="bytes=20k, bitops=1G, or w=3 for a mean of 3 bits per weight (default: the run's own width)",
    )
    add_choice(
        parser,
        "--measure",
        ("loss", "mse"),
        "what to minimize (default: loss). loss: the sum over all layers of the loss increase when only this layer is "
        "quantized; mse: the squared error of the weights",
    )
    parser.add_argument(
        "--widths", type=weight_widths, metavar="N,...", help="widths to choose from (default: 1,2,3,4,5,6,7,8)"
    )
    parser.add_argument(
        "--out", type=some_text, metavar="FILE", help="file to write the widths to (default: bits.yaml)"
    )
    return parser
