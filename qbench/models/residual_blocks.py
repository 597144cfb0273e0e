"""Residual blocks in pre- and post-activation form, and `feeds`, the map from activations to the layers they feed.

`feeds` maps the name of an activation module to the names of the layers that read its output. If anything else also
reads the output, such as a shortcut, the activation is left out of `feeds`. An input quantizer may replace only
activations that are in `feeds`.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models.normalization import NORMS_2D

# Shapes: N batch, C channels, H height, W width.

Feeds = dict[str, tuple[str, ...]]
"""Maps the name of an activation to the names of all layers that read its output."""

ConvSpec = tuple[int, int, int]
"""Number of output channels, kernel size and stride of one convolution of a block."""


SHORTCUTS = ("A", "A_stride", "B")
"""Kinds of shortcut in blocks that change the shape.

A averages over 2x2 pixels, and A_stride takes every second pixel. Both A and A_stride then add
channels of zeros. B is a 1x1 convolution.
"""


class PadShortcut(nn.Module):
    """Shortcut A or A_stride. It reduces height and width, then adds channels of zeros. It has no parameters.

    Args:
        new_channels: number of channels that are added.
        stride: factor by which height and width are reduced.
        average: whether to average over 2x2 pixels (A) instead of taking every second pixel (A_stride).
    """

    def __init__(self, new_channels: int, stride: int, *, average: bool) -> None:
        super().__init__()
        self.new_channels, self.stride, self.average = new_channels, stride, average

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return a tensor of shape (N, C + new channels, H / stride, W / stride).

        Half of the new channels come before the input's channels, and half come after them.
        """
        if self.stride > 1 and self.average:
            x_NCHW = F.avg_pool2d(x_NCHW, self.stride, ceil_mode=True)
        elif self.stride > 1:
            x_NCHW = x_NCHW[:, :, :: self.stride, :: self.stride]
        return F.pad(x_NCHW, (0, 0, 0, 0, self.new_channels // 2, self.new_channels - self.new_channels // 2))


class ResidualBlock(nn.Module):
    """Base class of blocks whose output is the sum of a branch and a shortcut."""

    pad: nn.Module | None
    downsample: nn.Module | None

    def local_feeds(self) -> Feeds:
        """Return which layers each activation of the block feeds. Names are relative to the block."""
        raise NotImplementedError

    def add_shortcut(self, in_channels: int, out_channels: int, stride: int, kind: str, norm: str) -> None:
        """If the block changes the shape, create the module `pad` (shortcut A or A_stride) or `downsample` (B)."""
        self.pad = self.downsample = None
        if stride == 1 and in_channels == out_channels:
            return
        if kind != "B":
            self.pad = PadShortcut(out_channels - in_channels, stride, average=kind == "A")
        else:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, NORMS_2D[norm](out_channels))


class PreBlock(ResidualBlock):
    """Pre-activation block. Its branch repeats batch normalization (BN), activation, convolution.

    Shortcut B is a 1x1 convolution that reads the output of the first activation. Shortcut A reads
    the block's input.

    Args:
        convs: the convolutions of the branch.
        first_bn: whether the block begins with a BN.
        ending: kind of normalization after the branch's last convolution and after the shortcut's
            convolution. The papers that use pre-activation have no normalization after these
            convolutions (`none`).
    """

    def __init__(
        self,
        in_channels: int,
        convs: Sequence[ConvSpec],
        norm: str,
        *,
        shortcut: str = "B",
        first_bn: bool = True,
        ending: str = "none",
    ) -> None:
        super().__init__()
        self.count = len(convs)
        channels, stride = in_channels, 1
        for i, (out, kernel, step) in enumerate(convs, 1):
            self.add_module(f"bn{i}", NORMS_2D[norm](channels) if i > 1 or first_bn else nn.Identity())
            self.add_module(f"act{i}", nn.ReLU())
            self.add_module(f"conv{i}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            channels, stride = out, stride * step
        self.bn = NORMS_2D[ending](channels)
        self.add_shortcut(in_channels, channels, stride, shortcut, ending)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and shortcut."""
        y: Tensor = self.get_submodule("act1")(self.get_submodule("bn1")(x))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(y)
        elif self.pad is not None:
            shortcut = self.pad(x)
        y = self.get_submodule("conv1")(y)
        for i in range(2, self.count + 1):
            for part in ("bn", "act", "conv"):
                y = self.get_submodule(f"{part}{i}")(y)
        y = self.bn(y)
        return y + shortcut

    def local_feeds(self) -> Feeds:
        """Return which layers each activation feeds. The first activation also feeds the convolution of shortcut B."""
        extra = ("downsample.0",) if self.downsample is not None else ()
        return {f"act{i}": (f"conv{i}", *(extra if i == 1 else ())) for i in range(1, self.count + 1)}


class PostBlock(ResidualBlock):
    """Post-activation block. Its branch repeats convolution, BN, activation. The last activation follows the sum.

    Shortcut B is a 1x1 convolution with BN.

    Args:
        convs: the convolutions of the branch.
    """

    def __init__(self, in_channels: int, convs: Sequence[ConvSpec], norm: str, *, shortcut: str = "B") -> None:
        super().__init__()
        self.count = len(convs)
        channels, stride = in_channels, 1
        for i, (out, kernel, step) in enumerate(convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", NORMS_2D[norm](out))
            self.add_module(f"act{i}", nn.ReLU())
            channels, stride = out, stride * step
        self.add_shortcut(in_channels, channels, stride, shortcut, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last activation of the sum of branch and shortcut."""
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.count:
                y = self.get_submodule(f"act{i}")(y)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        elif self.pad is not None:
            shortcut = self.pad(x)
        activated: Tensor = self.get_submodule(f"act{self.count}")(y + shortcut)
        return activated

    def local_feeds(self) -> Feeds:
        """Return which layers the activations before the sum feed.

        The last activation is not included, because it also feeds the next block's shortcut.
        """
        return {f"act{i}": (f"conv{i + 1}",) for i in range(1, self.count)}


def feeds_of_blocks(model: nn.Module) -> Feeds:
    """Return the `feeds` of all blocks in a network, with names relative to the network."""
    return {
        f"{name}.{act}": tuple(f"{name}.{layer}" for layer in layers)
        for name, block in model.named_modules()
        if isinstance(block, ResidualBlock)
        for act, layers in block.local_feeds().items()
    }
