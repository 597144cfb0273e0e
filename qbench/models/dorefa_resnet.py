"""ResNet-18 of DoReFa-Net's authors (Zhou et al. 2016, arXiv 1606.06160; tensorpack's resnet-dorefa.py).

The layers were checked against that script. The script evaluates a trained network, and we do not
know how this network was trained. The layers are conv7x7/2 64 (bias) - MP - blocks - BN - last_act
- average times 49 - FC. BN is batch normalization with eps 1e-4. MP is max pooling. FC is a linear
layer. Q is the activation that an input quantizer replaces. The image is padded with three rows and
columns at the top and left, and with two at the bottom and right. Before MP, the border pixels are
repeated once.

A block adds a shortcut to the branch BN - Q - conv3x3 - BN - Q - conv3x3. In most blocks, the
shortcut is the block's input. In the first block, and in blocks that change the shape, the shortcut
is a 1x1 convolution that reads the output of the block's first Q. A block that halves the
resolution averages its input over 2x2 pixels before its first BN, and its convolutions have
stride 1. The script says that two details are bugs of the trained network: the convolution in the
first block's shortcut, and the factor 49.

`last_act` is the activation before the average. The script clips to [0, 1] there.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models.dorefa_svhn import LAST_ACTS, check_last_act, init_as_tensorpack
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds, ResidualBlock, feeds_of_blocks

AVERAGE_FACTOR = 49
"""Factor by which the average over positions is multiplied: the number of positions for images of 224x224."""


class DoReFaBlock(ResidualBlock):
    """Pre-activation block. If `projected` is true, its shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, projected: bool, norm: str) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        bias = norm == "none"
        self.bn1, self.act1 = NORMS_2D[norm](in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
        self.bn2, self.act2 = NORMS_2D[norm](channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.pad = None
        self.downsample = nn.Conv2d(in_channels, channels, 1, bias=bias) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branch and the shortcut."""
        x = self.pool(x)
        y: Tensor = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv2(self.act2(self.bn2(self.conv1(y))))
        return y + shortcut

    def local_feeds(self) -> Feeds:
        """Return which layers each activation feeds. The first activation also feeds the shortcut's convolution."""
        extra = ("downsample",) if self.downsample is not None else ()
        return {"act1": ("conv1", *extra), "act2": ("conv2",)}


class DoReFaResNet(nn.Module):
    """ResNet-18 of tensorpack; see the module's docstring."""

    feeds: Feeds

    def __init__(self, channels: int, classes: int, *, width: int, last_act: str, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(channels, width, 7, 2)
        blocks, in_channels = list[nn.Module](), width
        for stage in range(4):
            for i in range(2):
                out, stride = width * 2**stage, 2 if stage and i == 0 else 1
                blocks.append(DoReFaBlock(in_channels, out, stride, i == 0, norm))
                in_channels = out
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.act = NORMS_2D[norm](in_channels), LAST_ACTS[last_act]()
        self.fct = nn.Linear(in_channels, classes)
        self.feeds = feeds_of_blocks(self)
        init_as_tensorpack(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.conv1(F.pad(x_NCHW, (3, 2, 3, 2)))
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 2)
        x = self.act(self.bn(self.blocks(x)))
        logits: Tensor = self.fct(x.mean((2, 3)) * AVERAGE_FACTOR)
        return logits


def build(
    shape: tuple[int, int, int], classes: int, *, width: int = 64, last_act: str = "clip", norm: str = "affine"
) -> nn.Module:
    """Return a ResNet-18 for images of `shape` (C, H, W), 32x32 or larger; `width` is 64 in the script."""
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    check_last_act(last_act)
    check_norm(norm)
    if min(shape[1:]) < 32:
        raise ValueError(
            f"name=dorefa_resnet18: images of {shape[1]}x{shape[2]} are too small; they must be 32x32 or larger"
        )
    return DoReFaResNet(shape[0], classes, width=width, last_act=last_act, norm=norm)
