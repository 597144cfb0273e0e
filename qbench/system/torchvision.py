"""Imports torchvision. A plain import fails with some CPU-only builds of torch.

With such builds the compiled part of torchvision is missing, and `import torchvision` raises
"operator torchvision::nms does not exist". Networks and data sets do not need this operator. If the
operators are declared without an implementation, the import succeeds.
"""

import importlib
import re
import sys
from functools import cache
from types import ModuleType

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING = re.compile(r"operator torchvision::\w+ does not exist")
_declared: list[torch.library.Library] = []
"""The library objects. An operator exists only as long as its library object."""


@cache
def torchvision() -> ModuleType:
    """Import and return torchvision. Declare operators only if the plain import fails."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _MISSING.search(str(error)):
            raise
    _declare("nms", "qnms")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # remove what was imported before the failure
    return importlib.import_module("torchvision")


def _declare(*operators: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in operators:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}{_BOXES}")  # type: ignore[no-untyped-call]
    _declared.append(library)
