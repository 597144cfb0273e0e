"""VGG-small for CIFAR as HWGQ's authors train it (Cai et al. 2017, arXiv 1702.00953; their CIFAR-10 prototxt).

128C3 - BN - Q - 128C3 - MP2 - BN - Q - 256C3 - BN - Q - 256C3 - MP2 - BN - Q - 512C3 - BN - Q - 512C3 - BN - Scale -
ReLU - MP2 - FC, Q being the activation that an input quantizer replaces: pooling stands before BN, and the last
maximum behind the last activation. Convolutions are 3x3, padded by 1, without bias; with `norm=no_affine`, the authors'
form, the network for ten classes has 4,657,546 parameters.
"""

from collections import OrderedDict

from torch import nn

from qbench.models.resnet import NORMS

POOLED = (2, 4)
"""Numbers of the convolutions with a maximum right behind; the sixth one's stands behind its activation."""


class VGGSmall(nn.Sequential):
    """Layers `conv1` to `conv6` with `bn` and `act` of the same number, and `fc`.

    `norm` is that of the BNs in front of quantizers; the last one has scale and shift unless there is none at all.
    """

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, cells: int, width: int, norm: str) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, factor in enumerate((1, 1, 2, 2, 4, 4), 1):
            parts[f"conv{i}"] = nn.Conv2d(channels, factor * width, 3, padding=1, bias=norm == "none")
            if i in POOLED:
                parts[f"pool{i}"] = nn.MaxPool2d(2)
            channels = factor * width
            parts[f"bn{i}"] = NORMS["affine" if i == 6 and norm == "no_affine" else norm](channels)
            parts[f"act{i}"] = nn.ReLU()
        super().__init__(parts | {"pool6": nn.MaxPool2d(2), "flatten": nn.Flatten()})
        self.fc = nn.Linear(channels * cells, classes)
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(1, 6)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # Caffe's msra: fan-in


def build(shape: tuple[int, int, int], classes: int, *, width: int = 128, norm: str = "affine") -> nn.Module:
    """Return a VGG-small for images of `shape` (C, H, W), 8x8 or larger; `width` channels at first, 4 width at last."""
    if width < 1:
        raise ValueError(f"width={width}: allowed is 1 or more channels")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    if min(shape[1:]) < 8:
        raise ValueError(f"name=vgg_small: images of {shape[1]}x{shape[2]} are too small; allowed are 8x8 and larger")
    return VGGSmall(shape[0], classes, (shape[1] // 8) * (shape[2] // 8), width, norm)
