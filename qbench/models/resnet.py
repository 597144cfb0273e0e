"""Residual networks for small images, in pre-activation and post-activation form.

A network of depth 6 n + 2 has three stages of n basic blocks. The stem is a 3x3 convolution. The
stages have `width`, 2 `width` and 4 `width` channels, at full, half and quarter resolution. A
global average and one linear layer follow. Layers have the same names as in torchvision's ResNet.

`pre` (He et al. 2016, Identity mappings, arXiv 1603.05027): a block repeats batch normalization
(BN), activation, convolution. The last block is followed by one more BN and activation. Every
activation in a block feeds only convolutions, so a quantizer can replace it. In blocks that change
the shape, shortcut A reads the block's input and has no parameters, as in the code of TTQ's
authors. Shortcut B is a 1x1 convolution that reads the output of the block's first activation.

`post` (He et al. 2016, Deep residual learning, arXiv 1512.03385): a block repeats convolution, BN,
activation. The second activation follows the sum of branch and shortcut. This activation also feeds
the next block's shortcut, so a quantizer can replace only the first activation of a block. Shortcut
B is a 1x1 convolution with BN.

In both forms, shortcut A averages over 2x2 pixels, as TTQ's authors do. Shortcut A_stride takes every
second pixel, as in the paper of the post form (section 4.2). Both shortcuts add half of the zero
channels before the input's channels, and half after them. With form=post and shortcut=A_stride, the
checkpoints of akamaster/pytorch_resnet_cifar10 have the test errors that their README states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbench.models.initialization import init_fan_out
from qbench.models.normalization import NORMS_2D, check_norm
from qbench.models.residual_blocks import (
    SHORTCUTS,
    ConvSpec,
    Feeds,
    PostBlock,
    PreBlock,
    ResidualBlock,
    feeds_of_blocks,
)

FORMS = ("pre", "post")


class CifarResNet(nn.Module):
    """ResNet for small images; see the module's docstring."""

    feeds: Feeds

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        blocks: int,
        width: int,
        stem_stride: int,
        shortcut: str,
        norm: str,
        form: str,
    ) -> None:
        super().__init__()
        self.norm, self.form = norm, form
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=norm == "none")
        if form == "post":
            self.bn1 = NORMS_2D[norm](width)
            self.act = nn.ReLU()
        in_channels = width
        for stage in range(3):
            out_channels = width * 2**stage
            stack = []
            for stride in [1 if stage == 0 else 2] + [1] * (blocks - 1):
                convs = ((out_channels, 3, stride), (out_channels, 3, 1))
                stack.append(_block(form, in_channels, convs, norm, shortcut))
                in_channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        if form == "pre":
            self.bn = NORMS_2D[norm](in_channels)
            self.act = nn.ReLU()
        self.fc = nn.Linear(in_channels, classes)
        self.feeds = feeds_of_blocks(self)
        init_fan_out(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.conv1(x_NCHW)
        if self.form == "post":
            x = self.act(self.bn1(x))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        if self.form == "pre":
            x = self.act(self.bn(x))
        logits: Tensor = self.fc(torch.mean(x, (2, 3)))
        return logits


def _block(form: str, in_channels: int, convs: Sequence[ConvSpec], norm: str, shortcut: str) -> ResidualBlock:
    if form == "pre":
        return PreBlock(in_channels, convs, norm, shortcut=shortcut)
    return PostBlock(in_channels, convs, norm, shortcut=shortcut)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int = 20,
    width: int = 16,
    stem_stride: int = 1,
    shortcut: str = "A",
    norm: str = "affine",
    form: str = "pre",
) -> nn.Module:
    """Return a ResNet for small images.

    Args:
        shape: shape (C, H, W) of an image.
        classes: number of classes.
        depth: number of layers, 6 n + 2 for n blocks per stage.
        width: number of channels of the stem and the first stage.
        stem_stride: stride of the stem's convolution.
        shortcut: kind of shortcut in blocks that change the shape, one of A, A_stride and B.
        norm: kind of batch normalization, one of affine, no_affine (without scale and shift) and none.
        form: order of the layers in a block, `pre` (activation first) or `post` (activation last).
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth}: must be 6 n + 2, such as 8, 14, 20, 32, 44, 56 or 110")
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    if stem_stride < 1:
        raise ValueError(f"stem_stride={stem_stride}: must be 1 or more")
    if shortcut not in SHORTCUTS:
        allowed = "A (average, zero channels), A_stride (every second pixel, zero channels) or B (1x1 convolution)"
        raise ValueError(f"shortcut={shortcut}: must be {allowed}")
    check_norm(norm)
    if form not in FORMS:
        raise ValueError(f"form={form}: must be pre (BN, activation, convolution) or post (activation last)")
    blocks, channels = (depth - 2) // 6, shape[0]
    return CifarResNet(
        channels, classes, blocks=blocks, width=width, stem_stride=stem_stride, shortcut=shortcut, norm=norm, form=form
    )
