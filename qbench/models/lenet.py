"""LeNet as quantization papers use it: Caffe's (examples/mnist), not LeCun's of 1998.

20 filters of 5x5, 2x2 maximum, 50 filters of 5x5, 2x2 maximum, 500 units, classes: 431,080 parameters on MNIST
without batch normalization. Caffe has one ReLU, in front of the last layer. Here BN and ReLU stand in front of every
layer but the first, behind the maximum as in HWGQ's networks, so that each has an input that a quantizer can take over.
"""

from collections import OrderedDict

from torch import nn

from qbench.models import mlp, resnet


class LeNet(nn.Sequential):
    """Layers `conv1`, `conv2`, `fc1`, `fc2`, with `bn` and `act` of the number of the layer before them."""

    feeds: dict[str, tuple[str, ...]]

    def __init__(self, channels: int, classes: int, units: int, pad: int, norm: str) -> None:
        bias = norm == "none"
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5, padding=pad, bias=bias),
            pool1=nn.MaxPool2d(2),
            bn1=resnet.NORMS[norm](20),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(20, 50, 5, padding=pad, bias=bias),
            pool2=nn.MaxPool2d(2),
            bn2=resnet.NORMS[norm](50),
            flatten=nn.Flatten(),
            act2=nn.ReLU(),
            fc1=nn.Linear(units, 500, bias=bias),
            bn3=mlp.NORMS[norm](500),
            act3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
        super().__init__(parts)
        self.norm = norm
        self.feeds = {"act1": ("conv2",), "act2": ("fc1",), "act3": ("fc2",)}


def build(shape: tuple[int, int, int], classes: int, *, pad: int = 0, norm: str = "affine") -> nn.Module:
    """Return a LeNet for images of `shape` (C, H, W), of 16x16 or more; with `pad=2` zeros around, of 4x4 or more."""
    if not 0 <= pad <= 2:
        raise ValueError(f"pad={pad}: allowed are 0 (as Caffe), 1 and 2")
    if norm not in resnet.NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(resnet.NORMS)}")
    height, width = (_after(_after(size, pad), pad) for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(f"pad={pad}: nothing is left of an image of {shape[1]}x{shape[2]}; allowed is 2 from 4x4 on")
    return LeNet(shape[0], classes, 50 * height * width, pad, norm)


def _after(size: int, pad: int) -> int:
    """Return the height or width behind a 5x5 convolution and a 2x2 maximum."""
    return (size + 2 * pad - 4) // 2
