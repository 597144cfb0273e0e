"""Finding the first tensor that is not finite, to name it in the error."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import NotFinite, is_quantizer_key
from qbench.training.checkpoint import not_finite
from qbench.training.state import State
from qbench.training.task import Task


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return what must be finite: parameters and buffers. Buffers of quantizers may mark as nan what is not set yet."""
    parameters = {name for name, _ in model.named_parameters()}
    return {n: t for n, t in model.state_dict().items() if n in parameters or not is_quantizer_key(n)}


def total_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients, a scalar: not finite if any of them is not."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)


def diverged(task: Task, state: State, what: str, images: Tensor | None = None) -> Diverged:
    """Return the error that says where a number stopped being finite: epoch, step and the first part to blame."""
    where = first_not_finite(task, images)
    at = f"in epoch {state.epoch}, step {state.step}{f', first at {where}' if where else ''}"
    return Diverged(f"{what} {at}; try a lower optim.lr")


def first_not_finite(task: Task, images: Tensor | None) -> str | None:
    """Return what to blame: a parameter or buffer, else the first module whose output is not finite on these images
    though its input is, else the last parameter whose gradient is not, else the one whose gradient is the largest.
    Changes the network's buffers.
    """
    model = task.model
    spoilt = not_finite(numbers(model))
    if spoilt or images is None:
        return spoilt
    if not torch.isfinite(images).all():
        return "the images"
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    except NotFinite as error:
        found.append(str(error))
    finally:
        for hook_handle in hooks:
            hook_handle.remove()
    if found:
        return found[0]
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None}
    if bad := [name for name, value in largest.items() if not math.isfinite(value)]:
        return f"the gradient of {bad[-1]}"
    name = max(largest, key=lambda n: largest[n], default=None)
    return f"the gradient of {name}, up to {largest[name]:.2g}" if name else None
