"""MobileNetV2 for small images (Sandler et al. 2018, arXiv 1801.04381, table 2), with torchvision's layer names.

Unlike in the paper, the stem and the second stage do not halve the resolution. The feature maps of
a 32x32 image are therefore not smaller than 4x4. Everything else follows the paper. With 1000
classes the network has 3,504,872 parameters, as many as the paper's network. For ImageNet use
`model=torchvision model.net=mobilenet_v2`.
"""

from torch import Tensor, nn

from qbench.models.initialization import init_fan_out
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds, ResidualBlock, feeds_of_blocks

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 in the paper, as in the stem
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""One entry per stage: expansion factor t, channels c, number of blocks n, and stride s of the first block."""


def _conv_unit(
    in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a sequence of convolution, BN and ReLU6."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=norm == "none")
    return nn.Sequential(conv, NORMS_2D[norm](out_channels), nn.ReLU6())


class InvertedResidual(ResidualBlock):
    """Block of a 1x1 expansion, a 3x3 depthwise convolution and a 1x1 projection without activation.

    With t = 1 there is no expansion. If input and output have the same shape, the input is added to
    the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.expands = expansion != 1
        self.conv = nn.Sequential(
            *([_conv_unit(in_channels, hidden, 1, norm)] if self.expands else []),
            _conv_unit(hidden, hidden, 3, norm, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=norm == "none"),
            NORMS_2D[norm](out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output. If the output has the shape of x, add x."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y

    def local_feeds(self) -> Feeds:
        """Return which layers each activation feeds. A block without expansion has only one activation."""
        if self.expands:
            return {"conv.0.2": ("conv.1.0",), "conv.1.2": ("conv.2",)}
        return {"conv.0.2": ("conv.1",)}


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images; see the module's docstring."""

    feeds: Feeds

    def __init__(self, channels: int, classes: int, width_mult: float, dropout: float, norm: str) -> None:
        super().__init__()
        self.norm = norm
        in_channels = multiple_of_8(32 * width_mult)
        blocks: list[InvertedResidual] = []
        stem = _conv_unit(channels, in_channels, 3, norm)
        for expansion, c, count, stride in STAGES:
            out_channels = multiple_of_8(c * width_mult)
            for i in range(count):
                blocks.append(InvertedResidual(in_channels, out_channels, stride if i == 0 else 1, expansion, norm))
                in_channels = out_channels
        last = multiple_of_8(1280 * max(1.0, width_mult))
        self.features = nn.Sequential(stem, *blocks, _conv_unit(in_channels, last, 1, norm))
        self.feeds = feeds_of_blocks(self)
        if not blocks[0].residual:  # else the stem's activation also feeds the shortcut of the first block
            self.feeds["features.0.2"] = ("features.1.conv.0.0",)
        linear = nn.Linear(last, classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        init_fan_out(self)
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x_NCHW).mean((2, 3)))
        return logits


def multiple_of_8(channels: float) -> int:
    """Return the multiple of 8 that is nearest to `channels`, but at least 8.

    If the nearest multiple is more than 10 % below `channels`, return the next higher multiple.
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def build(
    shape: tuple[int, int, int], classes: int, *, width_mult: float = 1.0, dropout: float = 0.2, norm: str = "affine"
) -> nn.Module:
    """Return a MobileNetV2 for images of `shape` (C, H, W), with `width_mult` times the paper's channels."""
    if width_mult <= 0:
        raise ValueError(f"width_mult={width_mult}: must be a factor above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
    check_norm(norm)
    return MobileNetV2(shape[0], classes, width_mult, dropout, norm)
