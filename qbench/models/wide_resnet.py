"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146) as Polino et al. 2018 train them.

The layers were checked against the code of Polino et al. (antspy/quantized_distillation,
cnn_models/wide_resnet.py). A network of depth 6 n + 4 has a stem with 16 channels, and three stages
of n pre-activation blocks. The stages have 16, 32 and 64 times `widen` channels. The branch of a
block is BN - ReLU - conv3x3 - dropout - BN - ReLU - conv3x3. These networks differ from the
original paper in three ways: the second convolution of a block has the stride, every convolution
has a bias, and a shortcut that changes the shape is a 1x1 convolution that reads the block's input.
This input has no activation that a quantizer could replace. Methods that replace activations must
therefore keep the shortcut's convolution in float (`layers.downsample=float`).

The last block is followed by one more BN and ReLU. This BN has a momentum of 0.9 in torch's
definition, so its running averages are nearly the statistics of the last batch. Initial weights of
convolutions are drawn from Glorot's uniform distribution with the gain sqrt(2). By our own count,
for ten classes, WRN-28-20 has 145.8 M parameters and WRN-16-22 has 82.7 M.
"""

import math

from torch import Tensor, nn

from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds, ResidualBlock, feeds_of_blocks


class WideBlock(ResidualBlock):
    """Block whose branch is BN, activation, convolution, dropout, BN, activation, strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.bn1 = NORMS_2D[norm](in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = NORMS_2D[norm](out_channels)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Sequential(*([] if same else [nn.Conv2d(in_channels, out_channels, 1, stride)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and shortcut."""
        y: Tensor = self.dropout(self.conv1(self.act1(self.bn1(x))))
        y = self.conv2(self.act2(self.bn2(y)))
        shortcut: Tensor = self.shortcut(x)
        return y + shortcut

    def local_feeds(self) -> Feeds:
        """Return which layers each activation feeds. The shortcut reads the output of neither activation."""
        return {"act1": ("conv1",), "act2": ("conv2",)}


class WideResNet(nn.Module):
    """Wide ResNet of Polino et al.; see the module's docstring."""

    feeds: Feeds

    def __init__(self, channels: int, classes: int, *, blocks: int, widen: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        in_channels = 16
        for stage in range(3):
            out_channels = 16 * widen * 2**stage
            stack = []
            for i in range(blocks):
                stack.append(WideBlock(in_channels, out_channels, 2 if stage and i == 0 else 1, dropout, norm))
                in_channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.bn1 = NORMS_2D[norm](in_channels)
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.bn1.momentum = 0.9
        self.act = nn.ReLU()
        self.linear = nn.Linear(in_channels, classes)
        self.feeds = feeds_of_blocks(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.conv1(x_NCHW)
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.linear(self.act(self.bn1(x)).mean((2, 3)))
        return logits


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int = 16,
    widen: int = 4,
    dropout: float = 0.3,
    norm: str = "affine",
) -> nn.Module:
    """Return a wide ResNet for images of `shape` (C, H, W).

    `depth` is 6 n + 4 for n blocks per stage. The stages have 16, 32 and 64 times `widen` channels.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}: must be 6 n + 4, such as 10, 16, 22, 28 or 40")
    if widen < 1:
        raise ValueError(f"widen={widen}: must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
    check_norm(norm)
    return WideResNet(shape[0], classes, blocks=(depth - 4) // 6, widen=widen, dropout=dropout, norm=norm)
