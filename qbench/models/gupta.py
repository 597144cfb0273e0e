"""One class for the networks of Gupta et al. 2015, "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551).

This paragraph is remembered from the paper and not verified. The MNIST perceptron has two hidden
layers of 1000 units. The MNIST CNN is conv5x5 8 - ReLU - MP2x2 - conv5x5 16 - ReLU - MP2x2 - FC 128
- ReLU - FC. The CIFAR-10 CNN repeats conv5x5 64 - ReLU - MP3x3/2 three times, and ends with FC. MP
is max pooling. FC is a linear layer. There is no batch normalization. Every layer has a bias.
Initial weights are Gaussian with standard deviation 0.01, and initial biases are 0. We remember
this initialization for the perceptron only.

We do not know how the paper pads convolutions, or whether its max pooling rounds sizes up or down.
In qbench, the MNIST CNN does not pad, the CIFAR CNN pads by 2, and max pooling rounds sizes up.
With these choices, the input of the first linear layer is 4x4, both for MNIST (28x28) and for CIFAR
(32x32).
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from qbench.models.residual_blocks import Feeds


class GuptaNet(nn.Sequential):
    """Network with the layers `conv1`, `conv2`, ..., then `fc1`, `fc2`, ....

    The activations `act1`, `act2`, ... are numbered consecutively over convolutions and linear
    layers.
    """

    feeds: Feeds

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
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, height, width = shape
        for i, out in enumerate(convs, 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, out, 5, padding=pad)
            layers |= {f"act{i}": nn.ReLU(), f"pool{i}": nn.MaxPool2d(pool, 2, ceil_mode=True)}
            channels, height, width = out, _output_size(height, pad, pool), _output_size(width, pad, pool)
        if min(height, width) < 1:
            raise ValueError(f"convs={list(convs)}: images of {shape[1]}x{shape[2]} are too small for these layers")
        layers["flatten"] = nn.Flatten()
        features = channels * height * width
        for i, out in enumerate(hidden, 1):
            layers |= {f"fc{i}": nn.Linear(features, out), f"act{len(convs) + i}": nn.ReLU()}
            features = out
        super().__init__(layers | {f"fc{len(hidden) + 1}": nn.Linear(features, classes)})
        weighted = [name for name in layers if name.startswith(("conv", "fc"))] + [f"fc{len(hidden) + 1}"]
        self.feeds = {f"act{i}": (layer,) for i, layer in enumerate(weighted[1:], 1)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0, std)
                if module.bias is not None:
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
    """Return a network of 5x5 convolutions with max pooling, followed by linear layers.

    Args:
        shape: shape (C, H, W) of an image.
        classes: number of classes.
        convs: number of channels of each convolution. An empty list means no convolutions.
        hidden: number of units of each hidden linear layer. An empty list means no hidden layers.
        pad: number of zeros that each convolution adds on each side of its input, 0 to 2.
        pool: size of the max pooling after each convolution, 2 or 3. Its stride is always 2.
        std: standard deviation of the initial weights.
    """
    if min((*convs, *hidden), default=0) < 1:
        raise ValueError(
            f"convs={list(convs)} and hidden={list(hidden)}: must contain at least one layer, all of size 1 or more"
        )
    if not 0 <= pad <= 2:
        raise ValueError(f"pad={pad}: must be 0, 1 or 2")
    if pool not in (2, 3):
        raise ValueError(f"pool={pool}: must be 2 or 3")
    if std <= 0:
        raise ValueError(f"std={std}: must be more than 0")
    return GuptaNet(shape, classes, convs=convs, hidden=hidden, pad=pad, pool=pool, std=std)


def _output_size(size: int, pad: int, pool: int) -> int:
    """Return the height or width after a 5x5 convolution and max pooling (rounded up), or 0 if no pixel is left."""
    size += 2 * pad - 4
    return (size - pool + 1) // 2 + 1 if size > 0 else 0
