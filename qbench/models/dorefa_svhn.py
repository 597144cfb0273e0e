"""DoReFa-Net's networks for SVHN, models A to D (Zhou et al. 2016, arXiv 1606.06160).

The layers were checked against the authors' script, tensorpack's svhn-digit-dorefa.py. The paper states 80 MFLOP for
model A, which fits the network of this script. The images are 40x40. The seven convolutions have 3, 4, 4, 8, 8, 8 and
32 times `width` channels. `width` is 16 in model A. The values 8, 4 and 2 for models B, C and D are remembered from the
paper and not verified. By our own count, model A has 2,082,378 parameters with affine batch normalization (BN), and
41.7 M multiply-adds. The layers are:

conv5 (bias) - MP2 - Q - conv3 - BN - Q - conv3 - BN - MP2 - Q - conv3 valid - BN - Q - conv3 - BN -
Q - conv3 valid - BN - Q - dropout - conv5 valid - BN - last_act - FC. Q is the activation that an
input quantizer replaces. MP2 is max pooling of 2x2. "valid" means without padding. The first layer
has no BN. BN has eps 1e-4.

`last_act` is the activation before the last layer. In the script, it depends on the bit width of
the activations. With quantized activations, it clips to [0, 1] without rounding (until 2018 it was
min(1, |x|)). With float activations, it is a ReLU.

The script applies dropout after Q. In qbench, Q is a part of the next layer, so dropout comes
before Q. This dropout does not divide its output by 1 - p. Instead, the output of the next layer is
divided by 1 - p, which is correct because the next layer has no bias. Both orders give the same
result if Q(0) = 0.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qbench.models.initialization import init_fan_in
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds

CONVS = ((3, 5, 0), (4, 3, 1), (4, 3, 1), (8, 3, 0), (8, 3, 1), (8, 3, 0), (32, 5, 0))
"""Channels as a multiple of `width`, kernel size and padding of each layer from `conv0` to `conv6`."""

POOLED = (0, 2)
"""Numbers of the convolutions that are followed by 2x2 max pooling."""


class ClippedMagnitude(nn.Module):
    """Activation min(1, |x|)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return min(1, |x|)."""
        return x.abs().clamp(max=1)


LAST_ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "clip": lambda: nn.Hardtanh(0, 1),
    "magnitude": ClippedMagnitude,
}
"""Maps each value of `last_act` to the activation before the last layer."""


def check_last_act(last_act: str) -> None:
    """Raise `ValueError` if `last_act` is not one of `LAST_ACTS`."""
    if last_act not in LAST_ACTS:
        raise ValueError(f"last_act={last_act}: must be one of {', '.join(LAST_ACTS)}")


class UnscaledDropout(nn.Module):
    """Set values to zero with probability p in training, without dividing the other values by 1 - p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some values set to zero."""
        return x * torch.empty_like(x).bernoulli_(1 - self.p) if self.training and self.p else x


class DropoutScale(nn.Module):
    """Divide the input by 1 - p in training.

    Use this module after a layer without bias if the layer's input comes from `UnscaledDropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, y: Tensor) -> Tensor:
        """Return y divided by 1 - p in training, else y."""
        return y / (1 - self.p) if self.training and self.p else y


def init_as_tensorpack(model: nn.Module) -> None:
    """Initialize weights by fan-in, set biases to 0, and set eps to 1e-4 in every BN, as tensorpack's scripts do."""
    init_fan_in(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 1e-4


class SVHNNet(nn.Sequential):
    """Network with the layers `conv0` to `conv6` and `fc1`.

    A module `bn`, `pool` or `act` has the number of the layer that it follows.
    """

    feeds: Feeds

    def __init__(
        self, channels: int, classes: int, positions: int, *, width: int, dropout: float, last_act: str, norm: str
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (factor, kernel, pad) in enumerate(CONVS):
            bias = i == 0 or (norm == "none" and i < 6)
            layers[f"conv{i}"] = nn.Conv2d(channels, factor * width, kernel, padding=pad, bias=bias)
            channels = factor * width
            if i == 6:
                layers["restore6"] = DropoutScale(dropout)
            if i > 0:
                layers[f"bn{i}"] = NORMS_2D[norm](channels)
            if i in POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)  # as TensorFlow's SAME
            layers[f"act{i}"] = LAST_ACTS[last_act]() if i == 6 else nn.ReLU()
            if i == 5:
                layers["drop5"] = UnscaledDropout(dropout)
        super().__init__(layers | {"flatten": nn.Flatten(), "fc1": nn.Linear(channels * positions, classes)})
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(6)}
        self.feeds["act6"] = ("fc1",)
        init_as_tensorpack(self)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 16,
    dropout: float = 0.5,
    last_act: str = "relu",
    norm: str = "affine",
) -> nn.Module:
    """Return a network for images of `shape` (C, H, W), which must be 37x37 or larger.

    Model A has `width` 16, B has 8, C has 4 and D has 2.
    """
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more; models A to D have 16, 8, 4 and 2")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
    check_last_act(last_act)
    check_norm(norm)
    height, columns = (_output_size(size) for size in shape[1:])
    if min(height, columns) < 1:
        raise ValueError(
            f"name=dorefa_svhn: images of {shape[1]}x{shape[2]} are too small; they must be 37x37 or larger "
            "(the paper uses 40x40)"
        )
    return SVHNNet(shape[0], classes, height * columns, width=width, dropout=dropout, last_act=last_act, norm=norm)


def _output_size(size: int) -> int:
    """Return the height or width after conv6."""
    pooled = (size - 4 + 1) // 2
    return (pooled + 1) // 2 - 2 - 2 - 4
