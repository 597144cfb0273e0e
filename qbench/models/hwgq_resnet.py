"""ResNet-18, 34 and 50 as HWGQ's authors train them (Cai et al. 2017, arXiv 1702.00953; res18-, res34- and
res50-hwgq-3ne-clip-poly in zhaoweicai/hwgq).

Verified in the prototxts: conv7/2 64 (bias) - MP - BN, then blocks, ReLU, average, FC. A block is BN - Q - conv, two or
three times, Q being the activation that an input quantizer replaces, and then one more BN, which has scale and shift,
in front of the sum. Where shapes change, the shortcut is a 1x1 convolution of the same Q, with such a BN as well; else
it is the block's input, never quantized. The first block has no BN of its own in front: the stem's stands there, in
place, so its identity is normalized. A bottleneck has its stride at the first 1x1. The maximum rounds up as Caffe does.

`norm` is that of the BNs in front of Q; the authors' is `plain`. Their BN's running averages move by 0.05; here by
torch's 0.1.
"""

from torch import Tensor, nn

from qbench.models.imagenet_resnet import DEPTHS, PreBlock, block_layers
from qbench.models.resnet import NORMS, feeds_of_blocks, start_by_fan_in


class HWGQResNet(nn.Module):
    """See the module's docstring. `feeds` names activations that feed layers alone, and those layers."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, *, depth: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.bn1 = NORMS[norm](width)
        inside, ending = width, "none" if norm == "none" else "affine"
        for stage, count in enumerate(DEPTHS[depth]):
            stack = []
            for i in range(count):
                (out, kernel, _), *rest = block_layers(depth, width * 2**stage, 1)
                layers = ((out, kernel, 2 if stage and i == 0 else 1), *rest)
                stack.append(PreBlock(inside, layers, norm, whole=bool(stage or i), ending=ending))
                inside = layers[-1][0]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.act = nn.ReLU()
        self.fc = nn.Linear(inside, classes)
        self.feeds = feeds_of_blocks(self)
        start_by_fan_in(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.bn1(self.maxpool(self.conv1(x_NCHW)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.act(x).mean((2, 3)))
        return logits


def build(
    shape: tuple[int, int, int], classes: int, *, depth: int = 18, width: int = 64, norm: str = "affine"
) -> nn.Module:
    """Return a ResNet for images of `shape` (C, H, W), 5x5 or larger; depth 18, 34 or 50, `width` 64 in the paper."""
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth}: allowed are {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more channels")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    if min(shape[1:]) < 5:
        raise ValueError(f"name=hwgq_resnet: images of {shape[1]}x{shape[2]} are too small; allowed are 5x5 and larger")
    return HWGQResNet(shape[0], classes, depth=depth, width=width, norm=norm)
