"""Pre-activation residual networks for small images (He et al. 2016, arXiv 1603.05027): BN, activation, convolution.

Depth is 6 n + 2: a 3x3 stem, three stages of n basic blocks of width, 2 width and 4 width channels at full, half and
quarter resolution, then BN, activation, global average and one linear layer. Every activation in a block feeds
convolutions alone, so a quantizer can take its place; the shortcut carries the block's raw input. Layers are named as
in torchvision's ResNet.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shapes: N batch, C channels, H height, W width.

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "affine": nn.BatchNorm2d,
    "plain": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "none": lambda channels: nn.Identity(),
}


class Pad(nn.Module):
    """Shortcut A without parameters: halve the resolution by averaging 2x2, fill new channels with zeros."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, C + new channels, H / stride, W / stride)."""
        if self.stride > 1:
            x_NCHW = F.avg_pool2d(x_NCHW, self.stride, ceil_mode=True)
        return F.pad(x_NCHW, (0, 0, 0, 0, self.new_channels // 2, self.new_channels - self.new_channels // 2))


class Block(nn.Module):
    """A basic pre-activation block; shortcut B is a 1x1 convolution of the activated input, A is `Pad`."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut: str, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bn1 = norm(inside)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = norm(outside)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.pad: nn.Module | None = None
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            if shortcut == "B":
                self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))
            else:
                self.pad = Pad(outside - inside, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut + branch."""
        inner = self.act1(self.bn1(x))
        if self.downsample is not None:
            x = self.downsample(inner)
        elif self.pad is not None:
            x = self.pad(x)
        return x + self.conv2(self.act2(self.bn2(self.conv1(inner))))  # type: ignore[no-any-return]


class PreActResNet(nn.Module):
    """See the module's docstring. `feeds` names, for every activation that feeds layers alone, those layers."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(
        self, channels: int, classes: int, blocks: int, width: int, stem_stride: int, shortcut: str, norm: str
    ) -> None:
        super().__init__()
        self.norm = norm
        make_norm = NORMS[norm]
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=norm == "none")
        inside = width
        for stage in range(3):
            outside = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stack = []
            for stride in strides:
                stack.append(Block(inside, outside, stride, shortcut, make_norm))
                inside = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.bn = make_norm(inside)
        self.act = nn.ReLU()
        self.fc = nn.Linear(inside, classes)
        self.feeds = {}
        for name, block in self.named_modules():
            if isinstance(block, Block):
                extra = (f"{name}.downsample.0",) if block.downsample is not None else ()
                self.feeds[f"{name}.act1"] = (f"{name}.conv1", *extra)
                self.feeds[f"{name}.act2"] = (f"{name}.conv2",)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.conv1(x_NCHW)
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        return self.fc(torch.mean(self.act(self.bn(x)), (2, 3)))  # type: ignore[no-any-return]


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int = 20,
    width: int = 16,
    stem_stride: int = 1,
    shortcut: str = "A",
    norm: str = "affine",
) -> nn.Module:
    """Return a pre-activation ResNet for images of `shape` (C, H, W); depth 6 n + 2, shortcut A or B."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth}: allowed are 6 n + 2: 8, 14, 20, 32, 44, 56, 110")
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more channels")
    if stem_stride < 1:
        raise ValueError(f"stem_stride={stem_stride}: allowed is 1 or more")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut}: allowed are A (average, zero channels) and B (1x1 convolution)")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    return PreActResNet(shape[0], classes, (depth - 2) // 6, width, stem_stride, shortcut, norm)
