"""ResNet-18, 34 and 50 as HWGQ's authors train them (Cai et al. 2017, arXiv 1702.00953).

The layers were checked against the prototxts res18-, res34- and res50-hwgq-3ne-clip-poly of
zhaoweicai/hwgq. The stem is conv7x7/2 64 (bias) - MP - BN. Then come blocks, ReLU, average pooling
and FC. BN is batch normalization, MP is max pooling, and Q is the activation that an input
quantizer replaces. The branch of a block repeats BN - Q - conv two or three times, and ends with a
BN that has scale and shift. The shortcut is added to the output of this BN.

If a block changes the shape, its shortcut is a 1x1 convolution that reads the output of the block's
first Q. A BN with scale and shift follows this convolution. In the other blocks, the shortcut is
the block's input, which is never quantized. The first block does not begin with a BN, because the
stem ends with a BN. If the first block has an identity shortcut, this shortcut therefore carries
normalized values. In a bottleneck, the first 1x1 convolution has the block's stride. Max pooling
rounds sizes up, as Caffe does.

`norm` sets whether the BNs before Q have scale and shift. The authors use `no_affine` (neither
scale nor shift). In the running averages of the authors' BN, a new batch has weight 0.05
(`bn_momentum=0.05`).
"""

from torch import Tensor, nn

from qbench.models.imagenet_resnet import DEPTHS, block_convs
from qbench.models.initialization import init_fan_in
from qbench.models.normalization import NORMS_2D, check_norm, set_bn_momentum
from qbench.models.residual_blocks import Feeds, PreBlock, feeds_of_blocks


class HWGQResNet(nn.Module):
    """ResNet of HWGQ's authors; see the module's docstring."""

    feeds: Feeds

    def __init__(self, channels: int, classes: int, *, depth: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.bn1 = NORMS_2D[norm](width)
        in_channels, ending = width, "none" if norm == "none" else "affine"
        for stage, count in enumerate(DEPTHS[depth]):
            stack = []
            for i in range(count):
                (out, kernel, _), *rest = block_convs(depth, width * 2**stage, 1)
                convs = ((out, kernel, 2 if stage and i == 0 else 1), *rest)
                stack.append(PreBlock(in_channels, convs, norm, first_bn=bool(stage or i), ending=ending))
                in_channels = convs[-1][0]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.act = nn.ReLU()
        self.fc = nn.Linear(in_channels, classes)
        self.feeds = feeds_of_blocks(self)
        init_fan_in(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.bn1(self.maxpool(self.conv1(x_NCHW)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.act(x).mean((2, 3)))
        return logits


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int = 18,
    width: int = 64,
    norm: str = "affine",
    bn_momentum: float = 0.1,
) -> nn.Module:
    """Return a ResNet for images of `shape` (C, H, W), which must be 5x5 or larger.

    `depth` is 18, 34 or 50. `width` is the number of channels of the stem, 64 in the paper.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    check_norm(norm)
    if min(shape[1:]) < 5:
        raise ValueError(f"name=hwgq_resnet: images of {shape[1]}x{shape[2]} are too small; they must be 5x5 or larger")
    model = HWGQResNet(shape[0], classes, depth=depth, width=width, norm=norm)
    set_bn_momentum(model, bn_momentum)
    return model
