"""LeNet as used in quantization papers: Caffe's network (examples/mnist), not LeCun's network of 1998.

The network has 20 filters of 5x5, 2x2 max pooling, 50 filters of 5x5, 2x2 max pooling, 500 units, and the output layer.
For MNIST images and without batch normalization (BN), the network has 431,080 parameters. Caffe's network has a single
ReLU, before the last layer. In qbench, BN and ReLU precede every layer except the first. Max pooling comes before BN
and ReLU, as in HWGQ's networks. Every layer except the first therefore has an activation that an input
quantizer can replace.
"""

from collections import OrderedDict

from torch import nn

from qbench.models.normalization import NORMS_1D, NORMS_2D, check_norm
from qbench.models.residual_blocks import Feeds


class LeNet(nn.Sequential):
    """LeNet with the layers `conv1`, `conv2`, `fc1` and `fc2`.

    Modules `bn` and `act` are numbered in the order in which they are applied.
    """

    feeds: Feeds

    def __init__(self, channels: int, classes: int, units: int, pad: int, norm: str) -> None:
        bias = norm == "none"
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5, padding=pad, bias=bias),
            pool1=nn.MaxPool2d(2),
            bn1=NORMS_2D[norm](20),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(20, 50, 5, padding=pad, bias=bias),
            pool2=nn.MaxPool2d(2),
            bn2=NORMS_2D[norm](50),
            flatten=nn.Flatten(),
            act2=nn.ReLU(),
            fc1=nn.Linear(units, 500, bias=bias),
            bn3=NORMS_1D[norm](500),
            act3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
        super().__init__(layers)
        self.norm = norm
        self.feeds = {"act1": ("conv2",), "act2": ("fc1",), "act3": ("fc2",)}


def build(shape: tuple[int, int, int], classes: int, *, pad: int = 0, norm: str = "affine") -> nn.Module:
    """Return a LeNet for images of `shape` (C, H, W).

    `pad` is the number of zeros that each convolution adds on each side of its input. With `pad=0`,
    images must be 16x16 or larger. With `pad=2`, images must be 4x4 or larger.
    """
    if not 0 <= pad <= 2:
        raise ValueError(f"pad={pad}: must be 0 (as in Caffe), 1 or 2")
    check_norm(norm)
    height, width = (_output_size(_output_size(size, pad), pad) for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"pad={pad}: images of {shape[1]}x{shape[2]} are too small; with pad=2, they must be 4x4 or larger"
        )
    return LeNet(shape[0], classes, 50 * height * width, pad, norm)


def _output_size(size: int, pad: int) -> int:
    """Return the height or width after a 5x5 convolution and 2x2 max pooling."""
    return (size + 2 * pad - 4) // 2
