"""Restores the state of the user's process after a call of qbench, and allows one call at a time."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from qbench.errors import ConfigError
from qbench.system.caches import clear_caches
from qbench.system.signals import stop_on_interrupt

_one_call = threading.RLock()


@contextmanager
def exclusive_call() -> Iterator[Callable[[], int]]:
    """Allow only one call at a time, because random generators, torch's settings and Hydra's state are global.

    Caches of files are cleared first, because the files may have changed since the last call. Yield a function that
    returns SIGINT after Ctrl-C, and 0 before Ctrl-C; see `stop_on_interrupt`.
    """
    with _one_call:
        clear_caches()
        with stop_on_interrupt() as stop:
            yield stop


@contextmanager
def recorded_command(arguments: Sequence[str]) -> Iterator[None]:
    """Record the arguments of this call, not those of the user's program, in manifest.json and TensorBoard.

    During the call, `sys.argv` contains these arguments, and worker processes inherit them.
    """
    before = sys.argv
    sys.argv = ["qbench", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def torch_settings_restored(*, training: bool) -> Iterator[None]:
    """Restore torch's random generators, number of threads, and settings of determinism and TF32 after a call.

    Args:
        training: whether the `with` block trains a run.

    Raises:
        ConfigError: the user's settings of torch would change a run's result, but are not part of the run's identity.
    """
    import torch

    from qbench.training.random_state import random_state, set_random_state

    _check_defaults(training)
    generators, threads = random_state(), torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    cudnn, matmul, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul, None
    with suppress(RuntimeError):  # torch refuses to answer if the program sets single operations
        tf32 = cudnn.allow_tf32, matmul.allow_tf32
    try:
        yield
    finally:
        if tf32 is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = tf32
        set_random_state(generators)
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)
        if "torch._inductor.config" in sys.modules:  # the block may have compiled: restore the compiler's option too
            torch.use_deterministic_algorithms(deterministic > 0, warn_only=deterministic == 1)


def _check_defaults(training: bool) -> None:
    """Refuse settings of torch that change computed values but are not part of a run's configuration."""
    import torch

    if torch.get_default_dtype() != torch.float32:
        raise _changed(f"the default dtype is {torch.get_default_dtype()}", "torch.set_default_dtype(torch.float32)")
    if torch.get_default_device().type != "cpu":
        raise _changed(f"the default device is {torch.get_default_device()}", "torch.set_default_device(None)")
    if not training:
        return
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ConfigError("a run cannot be trained inside torch.no_grad, torch.inference_mode or torch.autocast")


def _changed(found: str, fix: str) -> ConfigError:
    return ConfigError(f"torch has a setting that would change the results: {found}\nfirst call {fix}")
