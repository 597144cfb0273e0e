"""Residual networks for ImageNet of any width, both forms, with torchvision's names: ResNet-18, 34, 50 and ResNet-18B.

`post` (He et al. 2016, Deep residual learning, arXiv 1512.03385; torchvision's ResNet, whose checkpoints fit): 7x7/2
convolution, BN, ReLU, maximum of 3x3/2, four stages of blocks; in a block convolution, BN, ReLU, ..., convolution, BN,
sum, ReLU; a shortcut that changes shape is a 1x1 convolution with BN. The stride is that of the 3x3 convolution. The
ReLU behind a sum feeds the next shortcut too, so a quantizer can take the place of those within blocks only.

`pre` (He et al. 2016, Identity mappings, arXiv 1603.05027): BN, ReLU, convolution; BN and ReLU once more behind the
last block; a shortcut that changes shape is a 1x1 convolution of the activated input. Behind the stem stand BN and
maximum; the ReLU is the first block's, whose own BN is left out, since the stem's has just been there: an identity
there carries the stem's output before ReLU. LSQ and PACT are remembered to use this form (not verified).

`width` is the number of channels of the stem and the first stage; 64 is the ResNet. 96 is ResNet-18B of TWN and TTQ, of
which it is remembered, not verified, that each block has 1.5 times the filters: whether the stem is widened is open; it
is widened here, as in Polino's ResNet-18 with k times the filters (k 1.5 and 2: `width` 96 and 128; verified in
antspy/quantized_distillation, cnn_models/resnet_kfilters.py).
"""

from torch import Tensor, nn

from qbench.models.resnet import NORMS, feeds_of_blocks

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of the four stages; from 50 on a block is a bottleneck."""

Layers = tuple[tuple[int, int, int], ...]
"""Channels, kernel, stride of a block's convolutions."""


def block_layers(depth: int, width: int, stride: int) -> Layers:
    """Return a block's convolutions; a bottleneck has its stride at the 3x3, and four times the channels at its end."""
    if depth < 50:
        return (width, 3, stride), (width, 3, 1)
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class PostBlock(nn.Module):
    """Convolution, BN, activation, ..., convolution, BN; plus shortcut; activation."""

    def __init__(self, inside: int, layers: Layers, norm: str, whole: bool) -> None:
        super().__init__()
        self.count = len(layers)
        channels, stride = inside, 1
        for i, (out, kernel, step) in enumerate(layers, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", NORMS[norm](out))
            self.add_module(f"act{i}", nn.ReLU())
            channels, stride = out, stride * step
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != inside:
            shortcut = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, NORMS[norm](channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum of shortcut and branch."""
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.count:
                y = self.get_submodule(f"act{i}")(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.get_submodule(f"act{self.count}")(y + shortcut)
        return result

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Return the activations within the block, with the layer that each feeds alone."""
        return {f"act{i}": (f"conv{i + 1}",) for i in range(1, self.count)}


class PreBlock(nn.Module):
    """BN, activation, convolution, several times; plus shortcut. `whole` blocks have their first BN.

    `ending` is the norm behind the last convolution and behind that of the shortcut: none in the papers of this form.
    """

    def __init__(self, inside: int, layers: Layers, norm: str, whole: bool, ending: str = "none") -> None:
        super().__init__()
        self.count = len(layers)
        channels, stride = inside, 1
        for i, (out, kernel, step) in enumerate(layers, 1):
            self.add_module(f"bn{i}", NORMS[norm](channels) if i > 1 or whole else nn.Identity())
            self.add_module(f"act{i}", nn.ReLU())
            self.add_module(f"conv{i}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            channels, stride = out, stride * step
        self.bn = NORMS[ending](channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != inside:
            shortcut = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, NORMS[ending](channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of shortcut and branch."""
        y = self.get_submodule("act1")(self.get_submodule("bn1")(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.get_submodule("conv1")(y)
        for i in range(2, self.count + 1):
            for part in ("bn", "act", "conv"):
                y = self.get_submodule(f"{part}{i}")(y)
        result: Tensor = self.bn(y) + shortcut
        return result

    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Return the activations, with the layers that each feeds alone."""
        extra = ("downsample.0",) if self.downsample is not None else ()
        return {f"act{i}": (f"conv{i}", *(extra if i == 1 else ())) for i in range(1, self.count + 1)}


FORMS: dict[str, type[PostBlock] | type[PreBlock]] = {"post": PostBlock, "pre": PreBlock}


class ResNet(nn.Module):
    """See the module's docstring. `feeds` names activations that feed layers alone, and those layers."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, *, depth: int, width: int, form: str, norm: str) -> None:
        super().__init__()
        self.norm, self.form = norm, form
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=norm == "none")
        self.bn1 = NORMS[norm](width)
        self.act = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside = width
        for stage, count in enumerate(DEPTHS[depth]):
            stack = []
            for i in range(count):
                layers = block_layers(depth, width * 2**stage, 2 if stage and i == 0 else 1)
                stack.append(FORMS[form](inside, layers, norm, whole=bool(stage or i)))
                inside = layers[-1][0]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        if form == "pre":
            self.bn = NORMS[norm](inside)
        self.fc = nn.Linear(inside, classes)
        self.feeds = feeds_of_blocks(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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
    """Return a ResNet for images of `shape` (C, H, W) of any size; depth 18, 34 or 50, form pre or post."""
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth}: allowed are {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more channels")
    if form not in FORMS:
        raise ValueError(f"form={form}: allowed are pre (BN, activation, convolution) and post (activation last)")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    return ResNet(shape[0], classes, depth=depth, width=width, form=form, norm=norm)
