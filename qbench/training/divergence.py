"""Finds the first tensor that is not finite, so that the error message can name it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import NotFinite, is_quantizer_key
from qbench.training.checkpoint import first_nonfinite
from qbench.training.state import State
from qbench.training.task import Task


def must_be_finite(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that must be finite: all parameters, and all buffers outside quantizers.

    A buffer of a quantizer may be nan until the quantizer sets it.
    """
    parameters = {name for name, _ in model.named_parameters()}
    return {n: t for n, t in model.state_dict().items() if n in parameters or not is_quantizer_key(n, model)}


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of the vector of all gradients. The norm is not finite if a gradient is not finite."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)


def divergence_error(task: Task, state: State, what: str, images: Tensor | None = None) -> Diverged:
    """Return an error that names the epoch, the step and the likely cause.

    Args:
        task: the training task.
        state: the state of training.
        what: the problem, such as `the loss is not finite`. The message begins with this text.
        images: the images of the step. They are used to find the first layer whose output is not finite. If None, only
            parameters and buffers are examined.
    """
    cause = find_cause(task, images)
    where = f"in epoch {state.epoch}, step {state.step}{f' (likely cause: {cause})' if cause else ''}"
    bf16 = " or runtime.precision=bf16" if state.scaler is not None else ""
    return Diverged(f"{what} {where}; try a lower optim.lr{bf16}")


def find_cause(task: Task, images: Tensor | None) -> str | None:
    """Return a text that names the likely cause, or None. The search changes the network's buffers.

    The following causes are tried in this order:

    1. a parameter or buffer that is not finite
    2. images that are not finite
    3. the first module whose output is not finite although its input is finite
    4. the last parameter whose gradient is not finite
    5. the parameter with the largest gradient
    """
    model = task.model
    tensor = first_nonfinite(must_be_finite(model))
    if tensor or images is None:
        return tensor
    if not torch.isfinite(images).all():
        return "the images"
    if layer := _first_nonfinite_output(model, images):
        return layer
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None}
    if nonfinite := [name for name, value in largest.items() if not math.isfinite(value)]:
        return f"the gradient of {nonfinite[-1]}"
    name = max(largest, key=lambda n: largest[n], default=None)
    return f"the gradient of {name}, up to {largest[name]:.2g}" if name else None


def _first_nonfinite_output(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of the first module whose output is not finite.

    If a quantized layer first raises an error about its input, return the error's message. If all outputs are finite,
    return None.
    """
    names: list[str] = []
    with _nonfinite_outputs(model, names), torch.no_grad():
        try:
            model(images)
        except NotFinite as error:
            names.append(str(error))
    return names[0] if names else None


@contextmanager
def _nonfinite_outputs(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Within a `with` block, append the name of each executed module with a non-finite output to `names`."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                names.append(name)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
