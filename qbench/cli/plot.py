"""`qbench plot`: pictures of what methods do to single values, of one method or of all on a poster."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.config import groups
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.system import files

if TYPE_CHECKING:
    from qbench.bits import Bits
    from qbench.config.schema import Config
    from qbench.quant.method import Method

SUFFIXES = (".png", ".pdf", ".svg")
GROUPS = ("method", "activation", "bits")
USAGE = "qbench plot NAME [bits.w=2 method.KEY=VALUE ...] [--out FILE], or qbench plot --poster [--out FILE]"
COLOURS = 64
SEEN = 5
"""Bits whose levels a small picture can show."""


def draw(arguments: list[str]) -> str:
    """Draw the method of a command line, or `--poster`, into a file; return its name.

    Raises:
        ConfigError: no such method, key, width, flag or file format.
    """
    words, poster, out = _asked(arguments)
    if poster:
        if words:
            raise ConfigError(f"plot --poster shows every method; {words[0]} has no effect on it\n{USAGE}")
        return _save(_poster(), _path("poster.png" if out is None else out))
    config, method = _method(words)
    path = _path(f"plot-{config.method_name.replace(':', '-')}-{method.bits}.png" if out is None else out)
    from qbench.config import registry
    from qbench.report.quantizer_plots.pages import page

    composed = config.activation["name"] != "none"
    title = "" if composed else registry.card(config.method_name).partition("\n")[0]
    return _save(page(method, title or config.method_name, f"qbench plot {' '.join(words)}"), path)


def _poster() -> Any:
    """Return the picture of all methods, at widths that tell."""
    from qbench.report.quantizer_plots.pages import poster

    methods = {}
    for name in sorted(groups.option_names("method"), key=lambda name: (name != "float", name)):
        _, usual = _method([f"method={name}"])
        _, methods[name] = _method([f"method={name}", f"bits={telling(usual)}"])
    return poster(methods)


def telling(method: "Method") -> "Bits":
    """Return widths that show all that a method does: its own where they have few levels, else 2 bits (4 for
    gradients) where it knows them, else the fewest.
    """
    from qbench.bits import FLOAT, Bits

    widths = {}
    for key, own in method.bits._asdict().items():
        legal = [width for width in range(1, FLOAT) if width in method.supported_bits.get(key, ())]
        wanted = 4 if key == "g" else 2
        widths[key] = own if own <= SEEN or not legal else wanted if wanted in legal else legal[0]
    return Bits(**widths)


def _asked(arguments: list[str]) -> tuple[list[str], bool, str | None]:
    """Return the words that configure, whether the poster is wanted, and the file."""
    words, poster, out = [], False, None
    rest = iter(arguments)
    for word in rest:
        flag, _, value = word.partition("=")
        if flag == "--out":
            out = value or next(rest, "")
        elif flag == "--poster":
            poster = True
        elif word.startswith("-"):
            raise ConfigError(f"plot: no such flag: {word}{did_you_mean(flag, ('--out', '--poster'))}\n{USAGE}")
        elif "=" in word and word.partition("=")[0].partition(".")[0] not in GROUPS:
            raise ConfigError(f"{word} has no effect on draw\nallowed: method.KEY=VALUE, bits.KEY=N, activation=NAME")
        else:
            words.append(word if "=" in word else f"method={word}")
    names = [word for word in words if word.startswith("method=")]
    if not poster and len(names) != 1:
        raise ConfigError(f"plot wants one method\n{USAGE}")
    return words, poster, out


def _method(words: list[str]) -> tuple["Config", "Method"]:
    """Return the method that words configure."""
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


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot --out {name}: the suffix says which format\nallowed: {', '.join(SUFFIXES)}")
    return path


def _save(figure: Any, path: Path) -> str:
    """Write a figure, the same bytes whenever it is the same, a PNG with few colours; return the file's name."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    made, suffix = BytesIO(), path.suffix.lower()
    if suffix == ".png":
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(made, "png", optimize=True)
    else:
        dates = {"Date": None} if suffix == ".svg" else {"CreationDate": None}
        with rc_context({"svg.hashsalt": "qbench"}):
            figure.savefig(made, format=suffix[1:], metadata=dates)
    files.write(path, made.getvalue())
    return str(path)
