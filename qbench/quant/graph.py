"""Tracing the calls of a network's layers; the one place with forward hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Collect (layer name, input, output) of the named layers in the order they run. The one place with hooks."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: calls.append((name, args[0], output))

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode_keeping_rng(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while and give the random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
