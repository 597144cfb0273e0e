"""Residual networks for small images, both forms: pre-activation and post-activation.

Depth is 6 n + 2: a 3x3 stem, three stages of n basic blocks of width, 2 width and 4 width channels at full, half and
quarter resolution, global average and one linear layer. Layers are named as in torchvision's ResNet.

`pre` (He et al. 2016, Identity mappings, arXiv 1603.05027): BN, activation, convolution; BN and activation once more
behind the last block. Every activation in a block feeds convolutions alone, so a quantizer can take its place. With
shortcut A (no parameters, as TTQ's authors have it) the sum gets the block's raw input, with B (a 1x1 convolution) the
convolved activated input where the shape changes.

`post` (He et al. 2016, Deep residual learning, arXiv 1512.03385): convolution, BN, activation; the block's second
activation stands behind the sum. It feeds the next shortcut too, so a quantizer can take the first one's place only.
Shortcut B is a 1x1 convolution with BN.

Shortcut A averages 2x2, as TTQ's authors do, and puts half of the zero channels on either side; the paper of the post
form takes every second pixel instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shapes: N batch, C channels, H height, W width.

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "affine": nn.BatchNorm2d,
    "no_affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
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


class PreBlock(nn.Module):
    """BN, activation, convolution, twice; shortcut B is a 1x1 convolution of the activated input, A is `Pad`."""

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
        result: Tensor = x + self.conv2(self.act2(self.bn2(self.conv1(inner))))
        return result

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Return the activations that feed layers alone, with those layers."""
        extra = ("downsample.0",) if self.downsample is not None else ()
        return {"act1": ("conv1", *extra), "act2": ("conv2",)}


class PostBlock(nn.Module):
    """Convolution, BN, activation, convolution, BN, sum, activation; shortcut B is a 1x1 convolution with BN."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut: str, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = norm(outside)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = norm(outside)
        self.pad: nn.Module | None = None
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            if shortcut == "B":
                self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))
            else:
                self.pad = Pad(outside - inside, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum of shortcut and branch."""
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.pad is not None:
            x = self.pad(x)
        result: Tensor = self.act2(x + branch)
        return result

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Return the activation within the block, with the layer that it feeds alone."""
        return {"act1": ("conv2",)}


FORMS: dict[str, type[PreBlock] | type[PostBlock]] = {"pre": PreBlock, "post": PostBlock}


def feeds_of_blocks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return what the blocks of a network say by their `feeds()`, with the names that all have in the network."""
    return {
        f"{name}.{act}": tuple(f"{name}.{layer}" for layer in layers)
        for name, block in model.named_modules()
        if name and hasattr(block, "feeds")
        for act, layers in block.feeds().items()
    }


def start_by_fan_in(model: nn.Module) -> None:
    """Draw weights from a Gaussian by their inputs (He et al. 2015, arXiv 1502.01852; Caffe's msra); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ResNet(nn.Module):
    """See the module's docstring. `feeds` names activations that feed layers alone, and those layers."""

    feeds: dict[str, tuple[str, ...]]

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
        make_norm = NORMS[norm]
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=norm == "none")
        if form == "post":
            self.bn1 = make_norm(width)
            self.act = nn.ReLU()
        inside = width
        for stage in range(3):
            outside = width * 2**stage
            stack = []
            for stride in [1 if stage == 0 else 2] + [1] * (blocks - 1):
                stack.append(FORMS[form](inside, outside, stride, shortcut, make_norm))
                inside = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        if form == "pre":
            self.bn = make_norm(inside)
            self.act = nn.ReLU()
        self.fc = nn.Linear(inside, classes)
        self.feeds = feeds_of_blocks(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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
    """Return a ResNet for images of `shape` (C, H, W); depth 6 n + 2, shortcut A or B, form pre or post."""
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
    if form not in FORMS:
        raise ValueError(f"form={form}: allowed are pre (BN, activation, convolution) and post (activation last)")
    blocks, channels = (depth - 2) // 6, shape[0]
    return ResNet(
        channels, classes, blocks=blocks, width=width, stem_stride=stem_stride, shortcut=shortcut, norm=norm, form=form
    )
