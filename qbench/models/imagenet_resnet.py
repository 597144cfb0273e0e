"""ResNet-18, 34 and 50 for ImageNet, of any width, in post- and pre-activation form, with torchvision's layer names.

`post` (He et al. 2016, Deep residual learning, arXiv 1512.03385) is also torchvision's ResNet, so
torchvision's checkpoints load. The stem is a 7x7 convolution at stride 2, BN, ReLU and max pooling
of 3x3 at stride 2. Four stages of blocks follow. A block is convolution, BN, ReLU, ...,
convolution, BN, sum, ReLU. A shortcut that changes the shape is a 1x1 convolution with BN. In a
bottleneck block the 3x3 convolution has the stride. The ReLU after a sum also feeds the next
shortcut. A quantizer must not change a shortcut, so a quantizer can replace only the ReLUs within
blocks.

`pre` (He et al. 2016, Identity mappings, arXiv 1603.05027): a block repeats BN, ReLU, convolution.
BN and ReLU follow once more after the last block. A shortcut that changes the shape is a 1x1
convolution of the activated input. The stem is followed by BN and max pooling, and the first ReLU
is in the first block. The first block does not begin with a BN, since the stem's BN comes right
before it. If the shortcut of the first block is the identity, it carries the stem's output before
the ReLU. As far as remembered (not verified), LSQ and PACT use this form.

`width` is the number of channels of the stem and of the first stage. In the original ResNet it is
64. With `width` 96, ResNet-18 becomes the ResNet-18B of TWN and TTQ. The blocks of ResNet-18B have
1.5 times the filters, which is remembered and not verified. It is not known whether its stem is
wider too. In qbench the stem is wider, as in Polino's ResNet-18 with k times the filters (verified
in antspy/quantized_distillation, cnn_models/resnet_kfilters.py). The factors k = 1.5 and k = 2
correspond to `width` 96 and 128.
"""

from torch import Tensor, nn

from qbench.models.initialization import init_fan_out
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import ConvSpec, Feeds, PostBlock, PreBlock, ResidualBlock, feeds_of_blocks

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Maps a depth to the number of blocks per stage. From depth 50 on, blocks are bottlenecks."""

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
        depth: number of weighted layers as in the network's name, 18, 34 or 50.
        width: number of channels of the stem and the first stage.
        form: order of the layers in a block, `pre` (activation first) or `post` (activation last).
        norm: kind of batch normalization, one of affine, no_affine and none.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    if form not in FORMS:
        raise ValueError(f"form={form}: must be pre (BN, activation, convolution) or post (activation last)")
    check_norm(norm)
    return ImageNetResNet(shape[0], classes, depth=depth, width=width, form=form, norm=norm)
