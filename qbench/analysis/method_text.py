"""Describes a method without a method card as text: its supported widths and its options."""

from qbench.config import compose
from qbench.config.identity import ADDED
from qbench.experiment.builders import build_method

NOT_OPTIONS = ("name", "source", "deviation", ADDED)
"""Keys of a method's configuration node that are not options of the method's function."""


def widths_and_options(name: str) -> str:
    """Return the sections Bits and Options of a method, read from the `Method` and from its function's arguments.

    Raises:
        ConfigError: the method does not exist, or its function raises ValueError.
    """
    (config,) = compose.configurations([f"method={name}"])
    bits = config.bits.resolved()
    method = build_method(config.method, config.activation, bits)
    widths = ", ".join(f"{key} {method.allowed_widths(key)}" for key in "wag")
    options = [f"method.{key}={value}" for key, value in config.method.items() if key not in NOT_OPTIONS]
    sections = {"Bits": [f"{widths}; by default {bits}"], "Options, with their default values": options}
    return "\n\n".join("\n    ".join([head, *lines]) for head, lines in sections.items() if lines)
