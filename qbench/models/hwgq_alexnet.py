"""AlexNet as HWGQ's authors train it (Cai et al. 2017, arXiv 1702.00953).

The layers were checked against the authors' prototxt (zhaoweicai/hwgq,
alex-hwgq-3ne-clip-poly-320k). They are:

conv11/4 96 - MP - BN - Q - conv5 256 - MP - BN - Q - conv3 384 - BN - Q - conv3 384 - BN - Q -
conv3 256 - MP - BN - Q - FC 4096 - BN - Q - FC 4096 - BN - ReLU - FC. BN is batch normalization. Q
is the activation that an input quantizer replaces. MP is max pooling of 3x3 at stride 2. There are
no groups and no dropout, and only the last layer has a bias. The authors use `norm=no_affine`
(neither scale nor shift) for every BN, including the BN after fc7. With `norm=no_affine` and 1000
classes, the network has 62,368,776 parameters.

The authors' images are 227x227. Initial weights are Gaussian with standard deviation 0.005 in fc6
and fc7, and 0.01 in the other layers. In the running averages of the authors' BN, a new batch has
weight 0.05 (`bn_momentum=0.05`).
"""

from collections import OrderedDict

from torch import nn

from qbench.models.normalization import NORMS_1D, NORMS_2D, check_norm, set_bn_momentum
from qbench.models.residual_blocks import Feeds

CONVS = ((96, 11, 0), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1))
"""Number of channels, kernel size and padding of each layer from `conv1` to `conv5`."""

POOLED = (1, 2, 5)
"""Numbers of the convolutions that are directly followed by max pooling."""


class HWGQAlexNet(nn.Sequential):
    """AlexNet with the layers `conv1` to `conv5` and `fc6` to `fc8`.

    A module `pool`, `bn` or `act` has the number of the layer that it follows.
    """

    feeds: Feeds

    def __init__(self, channels: int, classes: int, positions: int, factor: float, norm: str) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        bias = norm == "none"
        for i, (out, kernel, pad) in enumerate(CONVS, 1):
            out = max(1, round(out * factor))
            layers[f"conv{i}"] = nn.Conv2d(channels, out, kernel, 4 if i == 1 else 1, pad, bias=bias)
            if i in POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(3, 2, ceil_mode=True)  # rounds up as Caffe does
            layers |= {f"bn{i}": NORMS_2D[norm](out), f"act{i}": nn.ReLU()}
            channels = out
        layers["flatten"] = nn.Flatten()
        features, hidden = channels * positions, max(1, round(4096 * factor))
        for i in (6, 7):
            layers[f"fc{i}"] = nn.Linear(features, hidden, bias=bias)
            layers |= {f"bn{i}": NORMS_1D[norm](hidden), f"act{i}": nn.ReLU()}
            features = hidden
        super().__init__(layers | {"fc8": nn.Linear(hidden, classes)})
        self.norm = norm
        weighted = [name for name in self._modules if name.startswith(("conv", "fc"))]
        self.feeds = {f"act{i}": (layer,) for i, layer in enumerate(weighted[1:], 1)}
        for name, module in self.named_children():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0, 0.005 if name in ("fc6", "fc7") else 0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    width_mult: float = 1.0,
    norm: str = "affine",
    bn_momentum: float = 0.1,
) -> nn.Module:
    """Return an AlexNet for images of `shape` (C, H, W), which must be 39x39 or larger.

    Each layer has `width_mult` times as many channels as in HWGQ's network.
    """
    if width_mult <= 0:
        raise ValueError(f"width_mult={width_mult}: must be a factor above 0")
    check_norm(norm)
    if min(shape[1:]) < 39:
        raise ValueError(
            f"name=hwgq_alexnet: images of {shape[1]}x{shape[2]} are too small; they must be 39x39 or larger "
            "(the paper uses 227x227)"
        )
    height, width = (_pooled_size(_pooled_size(_pooled_size((size - 11) // 4 + 1))) for size in shape[1:])
    model = HWGQAlexNet(shape[0], classes, height * width, width_mult, norm)
    set_bn_momentum(model, bn_momentum)
    return model


def _pooled_size(size: int) -> int:
    """Return the height or width after max pooling of 3x3 at stride 2, rounded up."""
    return (size - 2) // 2 + 1
