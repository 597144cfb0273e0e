"""Device, threads, determinism and memory allocation of this process."""

import ctypes
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from qbench.config.schema import Config
from qbench.errors import ConfigError

COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")))


MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1}
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes."""


def bf16_autocast(run: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a network's function with what autocast chooses computed in bfloat16; its result is float32."""

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return run(images).float()

    return forward


def configure_torch(config: Config) -> None:
    """Set threads and determinism of this process as the run wants them."""
    torch.set_num_threads(config.runtime.threads)
    if config.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS wants it
    torch.use_deterministic_algorithms(config.runtime.deterministic)
    tune_malloc()


def tune_malloc() -> None:
    """Let glibc keep the memory of freed activations: else it goes back to the system, and comes anew, page by page,
    in every training step. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "mallopt"):
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device={name}: allowed are auto, cpu, cuda, cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"runtime.device={name}: allowed are auto, cpu, cuda, cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device={name}: torch finds no such CUDA device here; try runtime.device=cpu")
    return device
