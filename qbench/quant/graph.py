"""Records the calls of a network's layers. Only this file uses forward hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One call of a module: its name in the network, its first argument and its result."""

    name: str
    input: Tensor
    output: Tensor


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[list[Call]]:
    """Record the calls of the named modules in execution order, until the context ends."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: calls.append(Call(name, args[0], output))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode_keeping_rng(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode; on exit, restore the modules' modes and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
