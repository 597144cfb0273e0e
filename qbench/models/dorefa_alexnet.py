"""AlexNet as DoReFa-Net's authors train it (Zhou et al. 2016, arXiv 1606.06160; tensorpack's alexnet-dorefa.py).

The layers were checked against that script, which is not the paper's original code. With 1000
classes and affine batch normalization (BN), the network has 60,985,416 parameters. TTQ's authors
train the same network from scratch (czhu95/ternarynet). We do not know whether their network also
has biases in conv0 and fc0. The layers are:

conv 12x12/4 valid 96 (bias, no pooling) - Q - conv5 256 in 2 groups - BN - MP - Q - conv3 384 - BN
- MP - Q - conv3 384 in 2 groups - BN - Q - conv3 256 in 2 groups - BN - MP valid - Q - FC 4096
(bias) - BN - Q - FC 4096 - BN - last_act - FC. "conv12x12/4 96" means 96 filters of 12x12 at stride
4. "valid" means without padding. Q is the activation that an input quantizer replaces. MP is max
pooling of 3x3 at stride 2. There is no dropout. BN has eps 1e-4. The first two poolings pad as
TensorFlow's SAME does. For even sizes, SAME pads only at the right and bottom.

`last_act` is the activation before the last layer. In the script, it depends on the bit width of
the activations. With quantized activations, it clips to [0, 1] without rounding. With float
activations, it is a ReLU.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models.dorefa_svhn import LAST_ACTS, check_last_act, init_as_tensorpack
from qbench.models.normalization import NORMS_1D, NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds

CONVS = ((96, 12, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2))
"""Number of channels, kernel size and number of groups of each layer from `conv0` to `conv4`."""


class SamePool(nn.Module):
    """Max pooling of 3x3 at stride 2, padded as TensorFlow's SAME does.

    Half of the padding, rounded down, is at the top and left. The rest is at the bottom and right.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the pooled images, of shape (N, C, ceil(H / 2), ceil(W / 2))."""
        height, width = x_NCHW.shape[-2:]
        pads = (width % 2, 1, height % 2, 1)
        return F.max_pool2d(F.pad(x_NCHW, pads, value=float("-inf")), 3, 2)


class DoReFaAlexNet(nn.Sequential):
    """AlexNet with the layers `conv0` to `conv4`, `fc0`, `fc1` and `fct`.

    A module `bn`, `pool` or `act` has the number of the layer that it follows. For example, `bn1`
    follows `conv1`, and `bnfc0` follows `fc0`.
    """

    feeds: Feeds

    def __init__(self, channels: int, classes: int, positions: int, *, factor: float, last_act: str, norm: str) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (out, kernel, groups) in enumerate(CONVS):
            out = _scaled(out, factor)
            stride, pad = (4, 0) if i == 0 else (1, kernel // 2)
            bias = i == 0 or norm == "none"
            layers[f"conv{i}"] = nn.Conv2d(channels, out, kernel, stride, pad, groups=groups, bias=bias)
            if i > 0:
                layers[f"bn{i}"] = NORMS_2D[norm](out)
            if i in (1, 2):
                layers[f"pool{i}"] = SamePool()
            elif i == 4:
                layers["pool4"] = nn.MaxPool2d(3, 2)
            layers[f"act{i}"] = nn.ReLU()
            channels = out
        layers["flatten"] = nn.Flatten()
        features, hidden = channels * positions, _scaled(4096, factor)
        for i in (0, 1):
            layers[f"fc{i}"] = nn.Linear(features, hidden, bias=i == 0 or norm == "none")
            layers[f"bnfc{i}"] = NORMS_1D[norm](hidden)
            layers[f"actfc{i}"] = LAST_ACTS[last_act]() if i == 1 else nn.ReLU()
            features = hidden
        super().__init__(layers | {"fct": nn.Linear(hidden, classes)})
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(4)}
        self.feeds |= {"act4": ("fc0",), "actfc0": ("fc1",), "actfc1": ("fct",)}
        init_as_tensorpack(self)


def build(
    shape: tuple[int, int, int], classes: int, *, width_mult: float = 1.0, last_act: str = "relu", norm: str = "affine"
) -> nn.Module:
    """Return an AlexNet for images of `shape` (C, H, W), which must be 44x44 or larger.

    Each layer has `width_mult` times as many channels as in DoReFa's network.
    """
    if width_mult <= 0:
        raise ValueError(f"width_mult={width_mult}: must be a factor above 0")
    check_last_act(last_act)
    check_norm(norm)
    height, width = (_output_size(size) for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"name=dorefa_alexnet: images of {shape[1]}x{shape[2]} are too small; they must be 44x44 or larger "
            "(the paper uses 224x224)"
        )
    return DoReFaAlexNet(shape[0], classes, height * width, factor=width_mult, last_act=last_act, norm=norm)


def _scaled(channels: int, factor: float) -> int:
    """Return `channels` times `factor`, rounded to an even number, because some convolutions have two groups."""
    return max(2, 2 * round(channels * factor / 2))


def _output_size(size: int) -> int:
    """Return the height or width of the last pooling's output."""
    size = (size - 12) // 4 + 1
    for _ in (1, 2):
        size = (size + 1) // 2
    return (size - 3) // 2 + 1
