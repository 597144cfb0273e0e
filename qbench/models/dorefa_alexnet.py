"""AlexNet as DoReFa-Net's authors train it (Zhou et al. 2016, arXiv 1606.06160; tensorpack's alexnet-dorefa.py).

Verified in the script, which is not the paper's own code; 60,985,416 parameters for 1000 classes with affine BN. TTQ's
authors train the same network from scratch (czhu95/ternarynet); whether they have its biases in conv0 and fc0 is open.

conv 12x12/4 valid 96 (bias, no maximum) - Q - conv5 256 in 2 groups - BN - MP - Q - conv3 384 - BN - MP - Q - conv3 384
in 2 groups - BN - Q - conv3 256 in 2 groups - BN - MP valid - Q - FC 4096 (bias) - BN - Q - FC 4096 - BN - head - FC, Q
being the activation that an input quantizer replaces: the maximum of 3x3/2 stands between BN and Q. No dropout. BN has
eps 1e-4. The first two maxima pad as TensorFlow's SAME does: at the right and bottom only where the size is even.

`head` is the activation in front of the last layer: where activations are quantized, the script clips to [0, 1] there
and does not round; else it has a ReLU.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models import mlp
from qbench.models.dorefa_svhn import HEADS, start_as_authors
from qbench.models.resnet import NORMS

CONVS = ((96, 12, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2))
"""Channels, kernel, groups of `conv0` to `conv4`."""


class SamePool(nn.Module):
    """Maximum of 3x3 at stride 2, padded as TensorFlow's SAME does: half of the padding, rounded down, comes first."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, C, ceil(H / 2), ceil(W / 2))."""
        height, width = x_NCHW.shape[-2:]
        pads = (width % 2, 1, height % 2, 1)
        return F.max_pool2d(F.pad(x_NCHW, pads, value=float("-inf")), 3, 2)


class DoReFaAlexNet(nn.Sequential):
    """Layers `conv0` to `conv4`, `fc0`, `fc1`, `fct`, with `bn`, `pool`, `act` of their name's ending."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, cells: int, *, factor: float, head: str, norm: str) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (out, kernel, groups) in enumerate(CONVS):
            out = _scaled(out, factor)
            stride, pad = (4, 0) if i == 0 else (1, kernel // 2)
            bias = i == 0 or norm == "none"
            parts[f"conv{i}"] = nn.Conv2d(channels, out, kernel, stride, pad, groups=groups, bias=bias)
            if i > 0:
                parts[f"bn{i}"] = NORMS[norm](out)
            if i in (1, 2):
                parts[f"pool{i}"] = SamePool()
            elif i == 4:
                parts["pool4"] = nn.MaxPool2d(3, 2)
            parts[f"act{i}"] = nn.ReLU()
            channels = out
        parts["flatten"] = nn.Flatten()
        inside, hidden = channels * cells, _scaled(4096, factor)
        for i in (0, 1):
            parts[f"fc{i}"] = nn.Linear(inside, hidden, bias=i == 0 or norm == "none")
            parts[f"bnfc{i}"] = mlp.NORMS[norm](hidden)
            parts[f"actfc{i}"] = HEADS[head]() if i == 1 else nn.ReLU()
            inside = hidden
        super().__init__(parts | {"fct": nn.Linear(hidden, classes)})
        self.norm = norm
        self.feeds = {f"act{i}": (f"conv{i + 1}",) for i in range(4)}
        self.feeds |= {"act4": ("fc0",), "actfc0": ("fc1",), "actfc1": ("fct",)}
        start_as_authors(self)


def build(
    shape: tuple[int, int, int], classes: int, *, width_mult: float = 1.0, head: str = "relu", norm: str = "affine"
) -> nn.Module:
    """Return an AlexNet for images of `shape` (C, H, W), 44x44 or larger, `width_mult` times as wide as DoReFa's."""
    if width_mult <= 0:
        raise ValueError(f"width_mult={width_mult}: allowed is a factor above 0")
    if head not in HEADS:
        raise ValueError(f"head={head}: allowed are {', '.join(HEADS)}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    height, width = (_left(size) for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"name=dorefa_alexnet: images of {shape[1]}x{shape[2]} are too small; allowed are 44x44 and larger, "
            "the paper's are 224x224"
        )
    return DoReFaAlexNet(shape[0], classes, height * width, factor=width_mult, head=head, norm=norm)


def _scaled(channels: int, factor: float) -> int:
    """Return an even number of channels, since some layers have two groups."""
    return max(2, 2 * round(channels * factor / 2))


def _left(size: int) -> int:
    """Return the height or width behind the last maximum."""
    size = (size - 12) // 4 + 1
    for _ in (1, 2):
        size = (size + 1) // 2
    return (size - 3) // 2 + 1
