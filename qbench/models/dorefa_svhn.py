"""DoReFa-Net's networks for SVHN, models A to D (Zhou et al. 2016, arXiv 1606.06160).

Model A is that of the authors' script, tensorpack's svhn-digit-dorefa.py (verified; that it is the paper's A follows
from the paper's 80 MFLOP): images of 40x40, seven convolutions of 3, 4, 4, 8, 8, 8 and 32 times `width` channels,
`width` being 16. That it is 8, 4 and 2 in B, C and D is remembered of the paper, not verified. Counted: A has 2,082,378
parameters with affine BN, and 41.7 M multiply-adds.

conv5 (bias) - MP2 - Q - conv3 - BN - Q - conv3 - BN - MP2 - Q - conv3 valid - BN - Q - conv3 - BN - Q - conv3 valid -
BN - Q - dropout - conv5 valid - BN - head - FC, Q being the activation that an input quantizer replaces. There is no BN
behind the first layer, and the maximum stands in front of Q, behind BN. BN has eps 1e-4.

`head` is the activation in front of the last layer: where activations are quantized, the script clips to [0, 1] there
(min(1, |x|) until 2018) and does not round; else it has a ReLU.

Dropout stands behind Q, which is within the layer here. So values are dropped in front of Q unscaled, and the layer's
output, which has no bias, is scaled in their stead: the same wherever Q(0) = 0.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qbench.models.resnet import NORMS, start_by_fan_in

CONVS = ((3, 5, 0), (4, 3, 1), (4, 3, 1), (8, 3, 0), (8, 3, 1), (8, 3, 0), (32, 5, 0))
"""Channels in widths, kernel, padding of `conv0` to `conv6`."""

POOLED = (0, 2)
"""Numbers of the convolutions with a maximum of 2x2 behind."""


class Magnitude(nn.Module):
    """min(1, |x|)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return it."""
        return x.abs().clamp(max=1)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "clip": lambda: nn.Hardtanh(0, 1),
    "magnitude": Magnitude,
}


class Drop(nn.Module):
    """Set values to zero with probability p in training, without scaling those that are left."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return what is left of x."""
        return x * torch.empty_like(x).bernoulli_(1 - self.p) if self.training and self.p else x


class Restore(nn.Module):
    """Divide by 1 - p in training, behind a linear map without bias of what `Drop` has left."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, y: Tensor) -> Tensor:
        """Return y scaled."""
        return y / (1 - self.p) if self.training and self.p else y


def start_as_authors(model: nn.Module) -> None:
    """Start as tensorpack's scripts do: weights by fan-in, biases at 0, and an eps of 1e-4 in every BN."""
    start_by_fan_in(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 1e-4


class SVHNNet(nn.Sequential):
    """Layers `conv0` to `conv6` with `bn`, `pool`, `act` of the same number behind, and `fc1`."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(
        self, channels: int, classes: int, cells: int, *, width: int, dropout: float, head: str, norm: str
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (factor, kernel, pad) in enumerate(CONVS):
            bias = i == 0 or (norm == "none" and i < 6)
            parts[f"conv{i}"] = nn.Conv2d(channels, factor * width, kernel, padding=pad, bias=bias)
            channels = factor * width
            if i == 6:
                parts["restore6"] = Restore(dropout)
            if i > 0:
                parts[f"bn{i}"] = NORMS[norm](channels)
            if i in POOLED:
                parts[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)  # TensorFlow's SAME
            parts[f"act{i}"] = HEADS[head]() if i == 6 else nn.ReLU()
            if i == 5:
                parts["drop5"] = Drop(dropout)
        super().__init__(parts | {"flatten": nn.Flatten(), "fc1": nn.Linear(channels * cells, classes)})
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(6)}
        self.feeds["act6"] = ("fc1",)
        start_as_authors(self)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 16,
    dropout: float = 0.5,
    head: str = "relu",
    norm: str = "affine",
) -> nn.Module:
    """Return a model A (`width` 16), B (8), C (4) or D (2) for images of `shape` (C, H, W), 37x37 or larger."""
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more; models A to D have 16, 8, 4 and 2")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: allowed is 0 or more and below 1")
    if head not in HEADS:
        raise ValueError(f"head={head}: allowed are {', '.join(HEADS)}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    height, columns = (_left(size) for size in shape[1:])
    if min(height, columns) < 1:
        raise ValueError(
            f"name=dorefa_svhn: images of {shape[1]}x{shape[2]} are too small; allowed are 37x37 and larger, "
            "the paper's are 40x40"
        )
    return SVHNNet(shape[0], classes, height * columns, width=width, dropout=dropout, head=head, norm=norm)


def _left(size: int) -> int:
    """Return the height or width behind conv6."""
    pooled = (size - 4 + 1) // 2
    return (pooled + 1) // 2 - 2 - 2 - 4
