"""Imports torchvision. `import torchvision` fails with some CPU-only builds of torch.

With such builds, the compiled part of torchvision is missing, and the import raises "operator
torchvision::nms does not exist". Networks and data sets do not need this operator. After the
missing operators are declared without an implementation, the import succeeds.
"""

import hashlib
import importlib
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from qbench.errors import CheckpointError

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING = re.compile(r"operator torchvision::\w+ does not exist")
_declared: list[torch.library.Library] = []
"""The library objects that declare operators. An operator exists only as long as its library object does."""


@cache
def torchvision() -> ModuleType:
    """Import and return torchvision. Missing operators are declared only if the ordinary import fails."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _MISSING.search(str(error)):
            raise
    _declare("nms", "qnms")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # remove what was imported before the failure
    return importlib.import_module("torchvision")


def imagenet_weights(net: str, *, download: bool) -> Path:
    """Return the path of a network's ImageNet weights in torch's download cache. The version is IMAGENET1K_V1.

    Args:
        download: whether to fetch the file if it is missing.

    Raises:
        ValueError: torchvision has no weights for a network of this name.
        CheckpointError: the file is damaged, or it is missing and was not fetched.
    """
    models = torchvision().models
    if net not in models.list_models(module=models):
        raise ValueError(f"torchvision has no ImageNet weights for {net}; name a checkpoint: init=FILE")
    url = str(models.get_model_weights(net).IMAGENET1K_V1.url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        if not download:
            raise CheckpointError(f"init=imagenet: {path} is missing\nfetch {url}, or add dataset.download=true")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise CheckpointError(f"init=imagenet: {error}\ndownload {url} to {path} yourself") from None
    stated = path.stem.rpartition("-")[2]  # torchvision's names end with the first digits of the file's sha256
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(stated):
        raise CheckpointError(
            f"init=imagenet: {path} is damaged: its sha256 does not begin with {stated}; delete the file"
        )
    return path


def _declare(*operators: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in operators:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}{_BOXES}")  # type: ignore[no-untyped-call]
    _declared.append(library)
