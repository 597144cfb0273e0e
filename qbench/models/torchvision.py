"""torchvision's classification networks by name, from scratch: `model=torchvision model.net=vgg16_bn`.

They are torchvision's own modules, so their checkpoints load. They do not say which layers their activations feed,
nor do they take another normalization: methods that need either cannot be used on them.
"""

import difflib
from itertools import chain
from typing import Any

import torch
from torch import nn

from qbench.vision import torchvision

OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
"""No auxiliary heads, whose outputs no loss here takes; the initialization that torchvision warns about unless told."""


def build(shape: tuple[int, int, int], classes: int, *, net: str = "resnet18") -> nn.Module:
    """Return torchvision's network `net` for images of `shape` (3, H, W)."""
    models = torchvision().models
    known: list[str] = models.list_models(module=models)
    if net not in known:
        close = difflib.get_close_matches(net, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        some = [name for name in known if name.startswith(("alexnet", "googlenet", "mobilenet", "resnet", "vgg"))]
        raise ValueError(
            f"net={net}: torchvision has no such classification network{hint}\n"
            f"allowed: {', '.join(some)} and {len(known) - len(some)} more (torchvision.models.list_models)"
        )
    if shape[0] != 3:
        raise ValueError(f"net={net}: images of {shape[0]} channel(s); torchvision's networks take 3")
    model: nn.Module = models.get_model(net, weights=None, num_classes=classes, **OPTIONS.get(net, {}))
    if reason := _misfit(model, shape):
        raise ValueError(f"net={net}: does not take images of {shape[1]}x{shape[2]}\ntorch says: {reason}")
    return model


def _misfit(model: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """Return why a network cannot take images of a shape, found out without computing anything."""
    state = {name: tensor.to("meta") for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (torch.empty(1, *shape, device="meta"),))
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    finally:
        model.train()
    return None
