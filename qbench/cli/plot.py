"""Implements `qbench plot`: plots the quantizers of one method, or of all methods on a poster."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qbench.cli import parsers
from qbench.config import groups
from qbench.errors import ConfigError
from qbench.system import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qbench.bits import Bits
    from qbench.config.schema import Config
    from qbench.quant.method import Method

GROUPS = ("method", "activation", "bits")
"""The configuration groups that determine how a method quantizes a value."""
USAGE = "qbench plot METHOD [bits.w=2 method.KEY=VALUE ...] [--out FILE], or qbench plot --poster [--out FILE]"
COLOURS = 64
"""Number of colours in a PNG's palette; a small palette keeps the file small."""
MOST_BITS_SHOWN = 5
"""The largest bit width at which a small plot can show all levels."""


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """A parsed command line of `qbench plot`, which plots either one method or the poster of all methods."""

    overrides: tuple[str, ...] = ()
    poster: bool = False
    out: Path | None = None


def draw(arguments: Iterable[str]) -> str:
    """Plot one method (or all methods, with `--poster`) to a file, and return the file's name.

    Raises:
        ConfigError: the method, key, width, flag or file format does not exist.
    """
    options = parse(arguments)
    if options.poster:
        return _save(_poster(), options.out or Path("poster.png"))
    words = list(options.overrides)
    config, method = _method(words)
    path = options.out or Path(f"plot-{config.method_name.replace(':', '-')}-{method.bits}.png")
    from qbench.config import registry
    from qbench.report.quantizer_plots.pages import method_figure

    composed = config.activation["name"] != "none"
    title = "" if composed else registry.card(config.method_name).partition("\n")[0]
    return _save(method_figure(method, title or config.method_name, f"qbench plot {' '.join(words)}"), path)


def parse(arguments: Iterable[str]) -> PlotOptions:
    """Read a command line of `qbench plot`.

    Raises:
        ConfigError: there is no method or more than one, an override does not change the plot, or a
            flag or file format is unknown.
    """
    words, flags = parsers.plot().parse_words(arguments)
    overrides = tuple(word if "=" in word else f"method={word}" for word in words)
    for word in overrides:
        if word.partition("=")[0].partition(".")[0] not in GROUPS:
            raise ConfigError(f"{word} has no effect on plot\nallowed: method.KEY=VALUE, bits.KEY=N, activation=NAME")
    methods = [word for word in overrides if word.startswith("method=")]
    if overrides and "poster" in flags:
        raise ConfigError(f"{overrides[0]} has no effect on plot --poster, which plots every method\n{USAGE}")
    if len(methods) != 1 and "poster" not in flags:
        raise ConfigError(f"plot needs exactly one method, found {len(methods)}\n{USAGE}")
    return PlotOptions(overrides=overrides, **flags)


def _poster() -> "Figure":
    """Return the figure of all methods, each at `illustrative_bits`."""
    from qbench.report.quantizer_plots.pages import poster_figure

    methods = {}
    for name in sorted(groups.option_names("method"), key=lambda name: (name != "float", name)):
        _, default = _method([f"method={name}"])
        _, methods[name] = _method([f"method={name}", f"bits={illustrative_bits(default)}"])
    return poster_figure(methods)


def illustrative_bits(method: "Method") -> "Bits":
    """Return bit widths at which a plot can show all levels of a method.

    A default width of the method is kept if a plot can show all its levels. Otherwise, the width is 2 bits (4 bits for
    gradients) or, if the method does not support this width, the smallest width that the method supports.
    """
    from qbench.bits import FLOAT, Bits

    widths = {}
    for key, default in method.bits._asdict().items():
        supported = [width for width in range(1, FLOAT) if width in method.supported_bits.get(key, ())]
        preferred = 4 if key == "g" else 2
        if default <= MOST_BITS_SHOWN or not supported:
            widths[key] = default
        else:
            widths[key] = preferred if preferred in supported else supported[0]
    return Bits(**widths)


def _method(words: list[str]) -> tuple["Config", "Method"]:
    """Return the configuration of a command line, and the method that it configures."""
    from qbench.config import compose

    (config,) = compose.configurations(words)
    from qbench.experiment.builders import build_method
    from qbench.quant.method import Unsupported

    try:
        bits = config.bits.resolved()
        method = build_method(config.method, config.activation, bits)
        method.check(bits)
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None
    return config, method


def _save(figure: "Figure", path: Path) -> str:
    """Write a figure to a file, and return the file's name.

    Equal figures give files with equal bytes. A PNG file is reduced to a small palette.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    file, suffix = BytesIO(), path.suffix.lower()
    if suffix == ".png":
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    else:
        dates = {"Date": None} if suffix == ".svg" else {"CreationDate": None}
        with rc_context({"svg.hashsalt": "qbench"}):
            figure.savefig(file, format=suffix[1:], metadata=dates)
    files.write(path, file.getvalue())
    return str(path)
