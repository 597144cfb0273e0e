"""torchvision's classification networks by name, with random initial weights: `model=torchvision model.net=vgg16_bn`.

The networks are torchvision's own modules, so torchvision's checkpoints can be loaded. AlexNet and VGG are chains of
layers, so qbench gives them the attribute `feeds` (which layers read each activation's output). If a method needs the
feeds of another network, qbench runs the network to find them. The normalization of each network is fixed, so methods
that require another normalization cannot be used. For ResNets with other normalization, use
qbench/models/imagenet_resnet.py, which has torchvision's layer names. For HWGQ, use the networks of HWGQ's authors,
hwgq_alexnet and hwgq_resnet.
"""

import difflib
from itertools import chain

import torch
from torch import Tensor, nn

from qbench.models.residual_blocks import Feeds
from qbench.system.torchvision import torchvision

OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
"""Maps a network to its arguments for torchvision.

The networks are built without auxiliary heads, because no loss in qbench uses the outputs of these
heads. torchvision warns if `init_weights` is not set.
"""


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
        raise ValueError(f"net={net}: the images have {shape[0]} channel(s); torchvision's networks need 3")
    model: nn.Module = models.get_model(net, weights=None, num_classes=classes, **OPTIONS.get(net, {}))
    if error := _shape_error(model, shape):
        raise ValueError(f"net={net}: does not support images of {shape[1]}x{shape[2]}\ntorch's error: {error}")
    if feeds := _feeds_of_chain(model, shape):
        model.feeds = feeds  # type: ignore[assignment]
    return model


def _shape_error(model: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """Return torch's error for images of this shape, or None if the network supports them. No values are computed."""
    try:
        _run_on_meta(model, shape)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def _run_on_meta(module: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """Return a module's output for one image of this shape, on the meta device."""
    state = {name: tensor.to("meta") for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    module.eval()
    try:
        with torch.no_grad():
            output: Tensor = torch.func.functional_call(module, state, (torch.empty(1, *shape, device="meta"),))
            return output
    finally:
        module.train()


def _feeds_of_chain(model: nn.Module, shape: tuple[int, int, int]) -> Feeds:
    """Return which layers each activation of AlexNet or VGG feeds, or an empty map for another network.

    Other modules may be between an activation and the next layer, if they commute with ReLU. Such
    modules are max pooling, dropout, and average pooling that does not change the size.
    """
    if type(model).__name__ not in ("AlexNet", "VGG"):
        return {}
    feeds: Feeds = {}
    features = model.get_submodule("features")
    size = tuple(_run_on_meta(features, shape).shape[-2:])
    activation: str | None = None  # the last activation, or None after a module that does not commute with ReLU
    for part in ("features", "avgpool", "classifier"):
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, nn.ReLU):
                activation = name
            elif isinstance(module, nn.Conv2d | nn.Linear):
                feeds |= {activation: (name,)} if activation else {}
                activation = None
            elif isinstance(module, nn.AdaptiveAvgPool2d):
                activation = activation if size == module.output_size else None
            elif not isinstance(module, nn.MaxPool2d | nn.Dropout | nn.Sequential):
                activation = None
    return feeds
