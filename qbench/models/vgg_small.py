"""VGG-small for CIFAR as HWGQ's authors train it (Cai et al. 2017, arXiv 1702.00953; their CIFAR-10 prototxt).

The layers are:

128C3 - BN - Q - 128C3 - MP2 - BN - Q - 256C3 - BN - Q - 256C3 - MP2 - BN - Q - 512C3 - BN - Q -
512C3 - BN - Scale - ReLU - MP2 - FC. Q is the activation that an input quantizer replaces. Pooling
precedes BN, except that the last max pooling follows the last activation. Convolutions are 3x3,
padded by 1, without bias. The authors use `norm=no_affine`. With `norm=no_affine` and ten classes,
the network has 4,657,546 parameters. The authors' BN has momentum 0.05 for the running averages
(`bn_momentum=0.05`).
"""

from collections import OrderedDict

from torch import nn

from qbench.models.normalization import NORMS_2D, check_norm, set_bn_momentum
from qbench.models.residual_blocks import Feeds

POOLED = (2, 4)
"""Numbers of the convolutions that are directly followed by max pooling.

After the sixth convolution, max pooling follows the activation.
"""


class VGGSmall(nn.Sequential):
    """VGG-small with the layers `conv1` to `conv6` and `fc`.

    Each convolution is followed by a `bn` and an `act` of the same number. `norm` applies to the BNs in front of
    quantizers. The last BN always has scale and shift, but it is left out if `norm` is none.
    """

    feeds: Feeds

    def __init__(self, channels: int, classes: int, positions: int, width: int, norm: str) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, factor in enumerate((1, 1, 2, 2, 4, 4), 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, factor * width, 3, padding=1, bias=norm == "none")
            if i in POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = factor * width
            layers[f"bn{i}"] = NORMS_2D["affine" if i == 6 and norm == "no_affine" else norm](channels)
            layers[f"act{i}"] = nn.ReLU()
        super().__init__(layers | {"pool6": nn.MaxPool2d(2), "flatten": nn.Flatten()})
        self.fc = nn.Linear(channels * positions, classes)
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(1, 6)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # Caffe's msra: fan-in


def build(
    shape: tuple[int, int, int], classes: int, *, width: int = 128, norm: str = "affine", bn_momentum: float = 0.1
) -> nn.Module:
    """Return a VGG-small for images of `shape` (C, H, W), which must be 8x8 or larger.

    The first two convolutions have `width` channels, and the last two have 4 times as many.
    """
    if width < 1:
        raise ValueError(f"width={width}: must be 1 or more channels")
    check_norm(norm)
    if min(shape[1:]) < 8:
        raise ValueError(f"name=vgg_small: images of {shape[1]}x{shape[2]} are too small; they must be 8x8 or larger")
    model = VGGSmall(shape[0], classes, (shape[1] // 8) * (shape[2] // 8), width, norm)
    set_bn_momentum(model, bn_momentum)
    return model
