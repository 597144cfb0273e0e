"""Provides the network and the training step that all contenders use (ResNet-20, 3x32x32, batch 64, SGD)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models.resnet import build
from qbench.quant.feeds import feeds
from qbench.quant.weights_first import WeightsFirst

Work = Callable[[], Tensor]
Hook = Callable[[], object]
Make = Callable[..., Work]  # (device, layout=NCHW)
Device = torch.device | str
Layout = torch.memory_format
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SHAPE, CLASSES, BATCH = (3, 32, 32), 10, 64


def plain(
    convolution: Callable[[nn.Conv2d], nn.Module] = lambda layer: layer,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: str = "affine",
) -> nn.Module:
    """Return a ResNet-20 in which the given layers and activations replace the original ones.

    The first layer, the last layer and the last activation are not replaced.
    """
    torch.manual_seed(0)
    net = build(SHAPE, CLASSES, norm=norm).train()
    for name, layers in feeds(net).items():
        net.set_submodule(name, activation())
        for layer in layers:
            net.set_submodule(layer, convolution(net.get_submodule(layer)))  # type: ignore[arg-type]
    return net


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return torch's SGD with learning rate 0.01 and momentum 0.9, and all other options at their defaults."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def placed(net: nn.Module, device: Device, layout: Layout) -> nn.Module:
    """Move a network to a device and a memory format in place, and return the network."""
    return net.to(device).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def training_step(
    net: nn.Module,
    device: Device,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    layout: Layout = NCHW,
    before: Hook = lambda: None,
    between: Hook = lambda: None,
    after: Hook = lambda: None,
    update: Hook | None = None,
    batch: int = BATCH,
    shape: tuple[int, int, int] = SHAPE,
) -> Work:
    """Return a function that makes one training step on a fixed batch.

    The step consists of zero_grad, `before`, forward, backward, `between`, update and `after`, in this order. By
    default, the update is the optimizer's `step`.
    """
    placed(net, device, layout).train()
    optimizer = optimizer or sgd(net.parameters())
    images, labels = data(device, layout, batch, shape)
    update = update or optimizer.step
    weights = WeightsFirst()

    def work() -> Tensor:
        optimizer.zero_grad()
        before()
        with weights.forward():
            logits = net(images)
        loss = F.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        between()
        update()
        after()
        return loss.detach()

    return work


def data(
    device: Device, layout: Layout, batch: int = BATCH, shape: tuple[int, int, int] = SHAPE
) -> tuple[Tensor, Tensor]:
    """Return random images and labels, which are the same in every call."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=draw).to(device, memory_format=layout)
    return images, torch.randint(CLASSES, (batch,), generator=draw).to(device)


class Conv(nn.Conv2d):
    """A convolution whose weights are the weights of `layer`, quantized by a function or module."""

    def __init__(self, layer: nn.Conv2d, quantize: Callable[[Tensor], Tensor]) -> None:
        size = layer.weight.shape[2]
        super().__init__(layer.in_channels, layer.out_channels, size, layer.stride[0], size // 2, bias=False)
        self.load_state_dict(layer.state_dict())
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.quantize(self.weight), None, self.stride, self.padding)


class Act(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
