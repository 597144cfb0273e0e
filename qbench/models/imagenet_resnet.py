"""ResNet-18, 34 and 50 for ImageNet, in post- and pre-activation form, with torchvision's layer names.

`post` (He et al. 2016, Deep residual learning, arXiv 1512.03385) is torchvision's ResNet, so
torchvision's checkpoints can be loaded. The stem is a 7x7 convolution at stride 2, batch
normalization (BN), ReLU and max pooling of 3x3 at stride 2. Four stages of blocks follow. A block
is convolution, BN, ReLU, ..., convolution, BN, sum, ReLU. A shortcut that changes the shape is a
1x1 convolution with BN. In a bottleneck block, the 3x3 convolution has the stride. The ReLU after a
sum also feeds the next shortcut. A quantizer must not change a shortcut, so a quantizer can replace
only the other ReLUs of a block.

`pre` (He et al. 2016, Identity mappings, arXiv 1603.05027): a block repeats BN, ReLU, convolution.
The last block is followed by one more BN and ReLU. A shortcut that changes the shape is a 1x1
convolution that reads the output of the block's first ReLU. The stem is a convolution, BN and max
pooling. The first block begins with a ReLU instead of a BN, because the stem has a BN already. If
the shortcut of the first block is the identity, the shortcut carries the input of that first ReLU. LSQ
and PACT use the form `pre` (from memory, not verified).

`width` is the number of channels of the stem and of the first stage. The original ResNet has
`width` 64. With `width` 96, ResNet-18 becomes the ResNet-18B of TWN and TTQ, whose blocks have 1.5
times as many filters (from memory, not verified). We do not know whether the stem of ResNet-18B is
wider too. In qbench the stem is wider, as in Polino's ResNet-18 with k times as many filters
(verified in antspy/quantized_distillation, cnn_models/resnet_kfilters.py). `width` 96 means k =
1.5, and `width` 128 means k = 2.
"""

from torch import Tensor, nn

from qbench.models.initialization import init_fan_out
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import ConvSpec, Feeds, PostBlock, PreBlock, ResidualBlock, feeds_of_blocks

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Maps a depth to the number of blocks in each stage. Networks of depth 50 have bottleneck blocks."""

FORMS = ("pre", "post")


def block_convs(depth: int, width: int, stride: int) -> tuple[ConvSpec, ...]:
    """Return the convolutions of a block with `width` channels.

    In a bottleneck block, the 3x3 convolution has the stride, and the last convolution has four
    times as many channels.
    """
    if depth < 50:
        return (width, 3, stride), (width, 3, 1)
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class ImageNetResNet(nn.Module):
    """ResNet for ImageNet; see the module's docstring."""

    feeds: Feeds

    def __init__(self, channels: int, classes: int, *, depth: int, width: int, form: str, norm: str) -> None:
        super().__init__()
        self.norm, self.form = norm, form
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=norm == "none")
        self.bn1 = NORMS_2D[norm](width)
        self.act = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = width
        for stage, count in enumerate(DEPTHS[depth]):
            stack: list[ResidualBlock] = []
            for i in range(count):
                convs = block_convs(depth, width * 2**stage, 2 if stage and i == 0 else 1)
                if form == "pre":
                    stack.append(PreBlock(in_channels, convs, norm, first_bn=bool(stage or i)))
                else:
                    stack.append(PostBlock(in_channels, convs, norm))
                in_channels = convs[-1][0]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        if form == "pre":
            self.bn = NORMS_2D[norm](in_channels)
        self.fc = nn.Linear(in_channels, classes)
        self.feeds = feeds_of_blocks(self)
        init_fan_out(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.bn1(self.conv1(x_NCHW))
        x = self.maxpool(self.act(x) if self.form == "post" else x)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        if self.form == "pre":
            x = self.act(self.bn(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int = 18,
    width: int = 64,
    form: str = "post",
    norm: str = "affine",
) -> nn.Module:
    """Return a ResNet for images of any size.

    Args:
        shape: shape (C, H, W) of an image.
        classes: number of classes.
        depth: number of layers with weights, as in the network's name: 18, 34 or 50.
        width: number of channels of the stem and the first stage.
        form: order of the layers in a block, `pre` (activation first) or `post` (activation last).
        norm: kind of batch normalization, one of affine, no_affine (without scale and shift) and none.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    if form not in FORMS:
        raise ValueError(f"form={form}: must be pre (BN, activation, convolution) or post (activation last)")
    check_norm(norm)
    return ImageNetResNet(shape[0], classes, depth=depth, width=width, form=form, norm=norm)
