"""VGG-small for CIFAR as HWGQ's authors train it (Cai et al. 2017, arXiv 1702.00953; their CIFAR-10 prototxt).

The layers are:

128C3 - BN - Q - 128C3 - MP2 - BN - Q - 256C3 - BN - Q - 256C3 - MP2 - BN - Q - 512C3 - BN - Q -
512C3 - BN - Scale - ReLU - MP2 - FC. 128C3 is a 3x3 convolution with 128 filters, padded by 1,
without bias. MP2 is max pooling of 2x2. BN is batch normalization. Q is the activation that an
input quantizer replaces. The authors use `norm=no_affine` (neither scale nor shift). With
`norm=no_affine` and ten classes, the network has 4,657,546 parameters. In the running averages of
the authors' BN, a new batch has weight 0.05 (`bn_momentum=0.05`).
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

    Each convolution is followed by a `bn` and an `act` of the same number. `norm` sets the kind of the BNs before
    quantizers. The last BN has scale and shift for every `norm` except none. If `norm` is none, there is no BN.
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
