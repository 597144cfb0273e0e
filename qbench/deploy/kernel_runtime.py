"""Runs networks with 1-bit or 2-bit weights and activations in bit-serial kernels, compiled by numba.

The whole network is one compiled function. Its source text contains only sizes and addresses, so networks of equal
sizes and bit widths share the function. The source text is written to the folder `qbench/kernels` below $XDG_CACHE_HOME
or ~/.cache. numba stores the compiled code next to the source text.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.about import About
from qbench.deploy.extras import import_extra
from qbench.deploy.network import Network
from qbench.system import files

if TYPE_CHECKING:
    from qbench.deploy.kernel_plan import Plan

FOLDER = Path(__file__).parent


def in_numba(network: Network, about: About) -> Callable[[Tensor], Tensor]:
    """Return a single-threaded function from normalized images (N, C, H, W) to logits (N, classes).

    The function is compiled before it is returned, unless compiled code is stored. All calls use the same memory, so
    concurrent calls are not possible.

    Raises:
        NotRunnable: no kernel exists for one of the network's functions or bit widths.
        ConfigError: the package numba is missing.
    """
    import_extra("numba", "fast")
    from qbench.deploy.kernel_plan import plan

    planned = plan(network, about.shape)
    memory = planned.memory
    compiled = _compiled(
        _text(planned), (np.empty((0, *about.shape), np.float32), np.empty((0, 1), np.float32), memory)
    )

    def run(images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise ValueError("the images contain inf or nan")
        logits = np.empty((len(images), about.classes), np.float32)
        compiled(images.float().contiguous().numpy(), logits, memory)
        return torch.from_numpy(logits)

    return run


def _text(planned: "Plan") -> str:
    """Return the source text of a plan's function. Layers of the same sizes share a kernel."""
    kernels = {kernel: f"layer{i}" for i, kernel in enumerate(dict.fromkeys(layer.kernel for layer in planned.layers))}
    image, logits = planned.image, planned.logits
    lines = [
        "from qbench.deploy.kernel_layers import *",
        "",
        *(f"{name} = {kernel}" for kernel, name in kernels.items()),
        "",
        "",
        "def network(images, logits, memory):",
        "    for n in range(len(images)):",
        f"        read_image(memory, {image.address}, {image.strides.row}, {image.strides.pixel}, images[n])",
        *(f"        {kernels[layer.kernel]}(memory, At{tuple(layer.at)})" for layer in planned.layers),
        f"        write_logits(memory, {logits.address}, logits[n])",
    ]
    return "\n".join(lines) + "\n"


def _compiled(text: str, examples: tuple[np.ndarray, ...]) -> Callable[..., None]:
    """Compile the function in a source text for arguments with the types of the examples."""
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("kernel_*.py"))]
    name = hashlib.sha256(b"".join([text.encode(), *sources])).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(folder) / "qbench" / "kernels" / f"network_{name}.py"
    try:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.make_directory(path.parent)
            files.write(path, text.encode())
        return _compile(text, path, examples, cache=True)
    except Exception:  # the folder is not writable, or what is stored is damaged
        return _compile(text, path, examples, cache=False)


def _compile(text: str, path: Path, examples: tuple[np.ndarray, ...], cache: bool) -> Callable[..., None]:
    numba = import_extra("numba", "fast")
    module = ModuleType(path.stem)
    sys.modules[module.__name__] = module  # numba looks for this module when it loads compiled code
    exec(compile(text, str(path), "exec"), module.__dict__)  # the result of `_text`, not the file's content
    function: Callable[..., None] = numba.njit(cache=cache)(module.network)
    function(*examples)
    return function
