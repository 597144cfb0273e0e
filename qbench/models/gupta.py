"""The networks of Gupta et al. 2015, "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551): one class.

All of it is remembered of the paper, nothing verified. MNIST perceptron: 1000, 1000, classes. MNIST CNN: conv5 8 -
ReLU - MP2 - conv5 16 - ReLU - MP2 - FC 128 - ReLU - FC. CIFAR-10 CNN: three times conv5 64 - ReLU - MP of 3x3/2, then
FC. No batch normalization, every layer with a bias. Weights start Gaussian with deviation 0.01, biases at 0, which is
remembered of the perceptron only.

Open: padding and rounding of sizes. Here the MNIST CNN does not pad, and the CIFAR CNN pads by 2 and its maximum rounds
up, so that 28x28 ends at 4x4 and 32x32 at 4x4.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


class GuptaNet(nn.Sequential):
    """Layers `conv1`, `conv2`, ..., then `fc1`, `fc2`, ..., with activations `act1`, `act2`, ... through both."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        convs: Sequence[int],
        hidden: Sequence[int],
        pad: int,
        pool: int,
        std: float,
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels, height, width = shape
        for i, out in enumerate(convs, 1):
            parts[f"conv{i}"] = nn.Conv2d(channels, out, 5, padding=pad)
            parts |= {f"act{i}": nn.ReLU(), f"pool{i}": nn.MaxPool2d(pool, 2, ceil_mode=True)}
            channels, height, width = out, _after(height, pad, pool), _after(width, pad, pool)
        if min(height, width) < 1:
            raise ValueError(f"convs={list(convs)}: nothing is left of images of {shape[1]}x{shape[2]}")
        parts["flatten"] = nn.Flatten()
        inside = channels * height * width
        for i, out in enumerate(hidden, 1):
            parts |= {f"fc{i}": nn.Linear(inside, out), f"act{len(convs) + i}": nn.ReLU()}
            inside = out
        super().__init__(parts | {f"fc{len(hidden) + 1}": nn.Linear(inside, classes)})
        layers = [name for name in parts if name.startswith(("conv", "fc"))] + [f"fc{len(hidden) + 1}"]
        self.feeds = {f"act{i}": (layer,) for i, layer in enumerate(layers[1:], 1)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0, std)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    convs: Sequence[int] = (),
    hidden: Sequence[int] = (1000, 1000),
    pad: int = 0,
    pool: int = 2,
    std: float = 0.01,
) -> nn.Module:
    """Return a network for images of `shape` (C, H, W): 5x5 convolutions, each with a maximum, then hidden layers.

    Args:
        convs, hidden: channels of the convolutions, units of the hidden layers; none where empty.
        pad: zeros around each convolution.
        pool: size of the maximum behind each convolution, 2 or 3; its stride is 2.
        std: of the weights at the start.
    """
    if min((*convs, *hidden), default=0) < 1:
        raise ValueError(
            f"convs={list(convs)} and hidden={list(hidden)}: allowed are one layer or more, each of 1 or more"
        )
    if not 0 <= pad <= 2:
        raise ValueError(f"pad={pad}: allowed are 0, 1 and 2")
    if pool not in (2, 3):
        raise ValueError(f"pool={pool}: allowed are 2 and 3")
    if std <= 0:
        raise ValueError(f"std={std}: allowed is more than 0")
    return GuptaNet(shape, classes, convs=convs, hidden=hidden, pad=pad, pool=pool, std=std)


def _after(size: int, pad: int, pool: int) -> int:
    """Return the height or width behind a 5x5 convolution and a maximum that rounds up."""
    size += 2 * pad - 4
    return (size - pool + 1) // 2 + 1 if size > 0 else 0
