"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146) as Polino et al. 2018 train them.

Verified in their code (antspy/quantized_distillation, cnn_models/wide_resnet.py): pre-activation; depth 6 n + 4, a stem
of 16 channels, three stages of n blocks of 16, 32 and 64 times `widen` channels. A block is BN - ReLU - conv3 -
dropout - BN - ReLU - conv3; unlike in the paper of the network, its stride is that of the second convolution, every
convolution has a bias, and a shortcut that changes shape is a 1x1 convolution of the block's raw input. So no
activation feeds that convolution: methods that take an activation's place leave it float (`layers.downsample=float`).
BN and ReLU once more behind the last block, whose running averages move by 0.9 in torch's sense: nearly the last
batch's. Convolutions start Glorot-uniform, sqrt(2) times as wide. Parameters for ten classes, counted: WRN-28-20
145.8 M, WRN-16-22 82.7 M.
"""

import math

from torch import Tensor, nn

from qbench.models.resnet import NORMS


class WideBlock(nn.Module):
    """BN, activation, convolution, dropout, BN, activation, strided convolution; plus shortcut."""

    def __init__(self, inside: int, outside: int, stride: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.bn1 = NORMS[norm](inside)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = NORMS[norm](outside)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, stride, 1)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Sequential(*([] if same else [nn.Conv2d(inside, outside, 1, stride)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of shortcut and branch."""
        y = self.dropout(self.conv1(self.act1(self.bn1(x))))
        result: Tensor = self.conv2(self.act2(self.bn2(y))) + self.shortcut(x)
        return result


class WideResNet(nn.Module):
    """See the module's docstring. `feeds` names activations that feed layers alone, and those layers."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, *, blocks: int, widen: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        inside = 16
        self.feeds = {}
        for stage in range(3):
            outside = 16 * widen * 2**stage
            stack = []
            for i in range(blocks):
                stack.append(WideBlock(inside, outside, 2 if stage and i == 0 else 1, dropout, norm))
                prefix = f"layer{stage + 1}.{i}"
                self.feeds |= {f"{prefix}.act{j}": (f"{prefix}.conv{j}",) for j in (1, 2)}
                inside = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.bn1 = NORMS[norm](inside)
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.bn1.momentum = 0.9
        self.act = nn.ReLU()
        self.linear = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                assert module.bias is not None
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
    """Return a wide ResNet for images of `shape` (C, H, W): depth 6 n + 4, channels `widen` times those of a ResNet."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}: allowed are 6 n + 4: 10, 16, 22, 28, 40")
    if widen < 1:
        raise ValueError(f"widen={widen}: allowed is 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: allowed is 0 or more and below 1")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    return WideResNet(shape[0], classes, blocks=(depth - 4) // 6, widen=widen, dropout=dropout, norm=norm)
