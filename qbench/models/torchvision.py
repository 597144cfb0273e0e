"""torchvision's classification networks by name, from scratch: `model=torchvision model.net=vgg16_bn`.

They are torchvision's own modules, so their checkpoints load. AlexNet and VGG, which are chains, say which layer each
activation feeds; the others do not, and none takes another normalization: methods that need either cannot be used on
them. For ResNets there is qbench/models/imagenet_resnet.py, with torchvision's names, for HWGQ its own networks.
"""

import difflib
from itertools import chain
from typing import Any

import torch
from torch import nn

from qbench.system.torchvision import torchvision

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
    if feeds := _feeds(model, shape):
        model.feeds = feeds  # type: ignore[assignment]
    return model


def _misfit(model: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """Return why a network cannot take images of a shape, found out without computing anything."""
    try:
        _on_meta(model, shape)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def _on_meta(model: nn.Module, shape: tuple[int, int, int]) -> Any:
    """Return what a network makes of an image of a shape, on the meta device."""
    state = {name: tensor.to("meta") for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    model.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(model, state, (torch.empty(1, *shape, device="meta"),))
    finally:
        model.train()


def _feeds(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, tuple[str, ...]]:
    """Return the activations of AlexNet or VGG with the layer that each feeds alone, for images of a shape.

    Between the two may stand what the ReLU may as well follow: a maximum, dropout, the average where it averages
    nothing. So the networks' features must be as large as the average wants them.
    """
    if type(model).__name__ not in ("AlexNet", "VGG"):
        return {}
    found: dict[str, tuple[str, ...]] = {}
    size = _on_meta(model.get_submodule("features"), shape).shape[-2:]
    fed: str | None = None
    for part in ("features", "avgpool", "classifier"):
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, nn.ReLU):
                fed = name
            elif isinstance(module, nn.Conv2d | nn.Linear):
                found |= {fed: (name,)} if fed else {}
                fed = None
            elif isinstance(module, nn.AdaptiveAvgPool2d):
                fed = fed if tuple(size) == module.output_size else None
            elif not isinstance(module, nn.MaxPool2d | nn.Dropout | nn.Sequential):
                fed = None
    return found
