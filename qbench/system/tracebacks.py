"""Finds the line of a user's file in which an error occurred."""

import os
import sysconfig
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of qbench."""


def place_in_own_code(error: BaseException) -> str:
    """Return the line of the user's code that raised an error, such as `my_method.py, line 12, in forward`.

    Frames of torch, of other installed packages and of Python's library are left out. The text is empty if the
    innermost of the remaining frames belongs to qbench.
    """
    libraries = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if not file.is_file():  # such as <frozen runpy>
            continue
        folders = set(file.resolve().parents)
        if PACKAGE in folders:
            return ""
        if not libraries & folders:
            path = os.path.relpath(file)
            return f"{file if path.startswith(os.pardir) else path}, line {frame.lineno}, in {frame.name}"
    return ""


def error_text(error: BaseException) -> str:
    """Return an error's class and message, with the line of the user's code that raised it."""
    place = place_in_own_code(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}: {error}"
