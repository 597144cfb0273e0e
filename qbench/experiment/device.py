"""Sets the device, number of threads, determinism and memory allocation of this process."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from qbench.config.schema import Runtime
from qbench.distributed.launch import launch
from qbench.errors import ConfigError
from qbench.system.lazy_compiler import delay_import_of_compiler

COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")))
"""C++ compilers that torch.compile can use on the CPU."""
MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1}
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes."""


HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of `runtime.precision` -> the half-precision type in which convolutions and matrix products are computed."""


REDUCING_VARIABLES = {
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"), "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "NVIDIA_TF32_OVERRIDE": ("", "0"), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("", "0"),
}  # fmt: skip
"""Environment variables that make torch's libraries compute float32 with fewer bits, and their harmless values."""


def with_autocast(
    run: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return a function that calls `run` under autocast to `dtype`, and returns the output of `run` in float32."""

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return run(images).float()

    return forward


def as_half_network(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change a network in place so that its forward pass runs under autocast to `dtype`, and return the network."""
    base = type(model)

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return with_autocast(partial(base.forward, self), images.device, dtype)(images)

    model.__class__ = type(base.__name__, (base,), {"forward": forward})
    return model


def loss_scaler(runtime: Runtime, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaler of a run in float16. Other precisions need none.

    Small gradients would be rounded to zero in float16, whose smallest positive number is 6e-8. The loss is therefore
    multiplied by a power of two.
    """
    return torch.amp.GradScaler(device.type) if runtime.precision == "fp16" else None


def slow_half(runtime: Runtime, device: torch.device) -> str | None:
    """Return the reason why half precision is slow here, or None.

    On the CPU, torch computes convolutions in float16 slowly. It computes them in bfloat16 slowly if the processor has
    no AVX-512.
    """
    if device.type != "cpu":
        return None
    if runtime.precision == "fp16":
        return "float16 is meant for GPUs"
    if runtime.precision == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "this processor has no AVX-512"
    return None


def configure_torch(runtime: Runtime) -> None:
    """Set the number of threads, determinism, float32 precision and memory allocation of this process."""
    torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        # cuBLAS is deterministic only with a fixed workspace. CUDA reads this variable when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error" if runtime.deterministic else "default")
    if runtime.compile:
        torch.use_deterministic_algorithms(runtime.deterministic)  # also sets an option of the compiler
    else:
        delay_import_of_compiler()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = runtime.tf32  # cuDNN's default is true
    tune_malloc()


def check_float32(runtime: Runtime) -> None:
    """Refuse settings that make torch compute float32 with fewer bits. A run's identity does not contain them.

    The modules of the user's network, data and method must have been imported, because they may change the settings.

    Raises:
        ConfigError: such a setting was found. The message names it.
    """
    for name, harmless in REDUCING_VARIABLES.items():
        if (value := os.environ.get(name, "")).upper() not in harmless:
            raise ConfigError(
                f"{name}={value} would change the results, because float32 would be computed with fewer bits\n"
                f"unset {name}; for faster training, type runtime.precision=bf16 or, on a GPU, runtime.tf32=true"
            )
    on_gpus = () if runtime.tf32 else ("cuda.matmul", "cudnn.conv")
    for name in ("mkldnn.conv", "mkldnn.matmul", "mkldnn.rnn", *on_gpus):
        precision = attrgetter(f"{name}.fp32_precision")(torch.backends)
        if precision not in ("none", "ieee"):
            raise ConfigError(
                f"torch.backends.{name}.fp32_precision is {precision}, which would change the results\n"
                "leave out torch.set_float32_matmul_precision and similar calls in your code; for faster training, "
                "type runtime.precision=bf16 or, on a GPU, runtime.tf32=true"
            )


def tune_malloc() -> None:
    """Make glibc keep the memory of freed activations.

    By default, glibc returns large blocks to the system, and requests the same blocks again in every training step,
    page by page. With other C libraries, this function does nothing.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "mallopt"):
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of this process or of a CUDA device, as far as the system allows it.

    Memory that an earlier run has freed is returned to the system first.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    with suppress(OSError):  # not on Linux, or forbidden
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def choose_device(name: str) -> torch.device:
    """Return the device for a value of `runtime.device`. `auto` means the first CUDA device or, without CUDA, the CPU.

    If several processes of a run are on one machine, the CUDA devices of this machine are assigned in turn.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available() and (place := launch()) is not None:
        return torch.device("cuda", place.local_rank % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device={name}: must be one of auto, cpu, cuda, cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"runtime.device={name}: must be one of auto, cpu, cuda, cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device={name}: this CUDA device is not available; try runtime.device=cpu")
    return device
