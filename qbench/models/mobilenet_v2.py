"""MobileNetV2 for small images (Sandler et al. 2018, arXiv 1801.04381, table 2), layers named as in torchvision.

The stem and the second stage keep the resolution, so that 32x32 images end at 4x4; all else is the paper's, and so are
the parameters: 3,504,872 for 1000 classes. For ImageNet take `model=torchvision model.net=mobilenet_v2`.
"""

from torch import Tensor, nn

from qbench.models.resnet import NORMS, feeds_of_blocks

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 in the paper, as in the stem
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion t, channels c, blocks n, stride s of the first block."""


def _unit(inside: int, outside: int, kernel: int, norm: str, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BN, ReLU6."""
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=norm == "none")
    return nn.Sequential(conv, NORMS[norm](outside), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion (unless t = 1), 3x3 by channel, 1x1 projection without activation; plus x where shapes agree."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        hidden = inside * expansion
        self.residual = stride == 1 and inside == outside
        self.expands = expansion != 1
        self.conv = nn.Sequential(
            *([_unit(inside, hidden, 1, norm)] if self.expands else []),
            _unit(hidden, hidden, 3, norm, stride, groups=hidden),
            nn.Conv2d(hidden, outside, 1, bias=norm == "none"),
            NORMS[norm](outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch, plus x where that is possible."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Return the activations, each with the layer that it feeds alone."""
        if self.expands:
            return {"conv.0.2": ("conv.1.0",), "conv.1.2": ("conv.2",)}
        return {"conv.0.2": ("conv.1",)}


class MobileNetV2(nn.Module):
    """See the module's docstring. `feeds` names activations that feed layers alone, and those layers."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, width_mult: float, dropout: float, norm: str) -> None:
        super().__init__()
        self.norm = norm
        inside = divisible(32 * width_mult)
        parts: list[nn.Module] = [_unit(channels, inside, 3, norm)]
        for expansion, c, blocks, stride in STAGES:
            outside = divisible(c * width_mult)
            for i in range(blocks):
                parts.append(InvertedResidual(inside, outside, stride if i == 0 else 1, expansion, norm))
                inside = outside
        last = divisible(1280 * max(1.0, width_mult))
        self.features = nn.Sequential(*parts, _unit(inside, last, 1, norm))
        self.feeds = feeds_of_blocks(self)
        if not parts[1].residual:
            self.feeds["features.0.2"] = ("features.1.conv.0.0",)
        linear = nn.Linear(last, classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x_NCHW).mean((2, 3)))
        return logits


def divisible(channels: float) -> int:
    """Return the nearest multiple of 8, at least 8, and none that loses more than a tenth of the channels."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def build(
    shape: tuple[int, int, int], classes: int, *, width_mult: float = 1.0, dropout: float = 0.2, norm: str = "affine"
) -> nn.Module:
    """Return a MobileNetV2 for images of `shape` (C, H, W), `width_mult` times as wide as the paper's."""
    if width_mult <= 0:
        raise ValueError(f"width_mult={width_mult}: allowed is a factor above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: allowed is 0 or more and below 1")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    return MobileNetV2(shape[0], classes, width_mult, dropout, norm)
