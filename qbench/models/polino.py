"""The teacher and the students of Polino et al. 2018 (arXiv 1802.05668): convolutional networks for
CIFAR-10 without shortcuts.

The layers were checked against the authors' code (antspy/quantized_distillation,
cnn_models/conv_forward_model.py and cifar10_test.py). Each convolution is followed by ReLU and
batch normalization (BN), in this order. After some convolutions, 2x2 max pooling and dropout of
whole channels follow. Each hidden linear layer is followed by ReLU, BN and dropout. Even the output
layer is followed by a ReLU. Every layer has a bias. Convolutions do not change height and width.
Initial weights are drawn from Glorot's uniform distribution.

By our own count, the teacher has 5.346 M parameters, student S0 has 1.000 M, S1 has 0.318 M, S2 has
0.112 M, and the deeper student has 5.83 M. Distilled students are trained without dropout
(`dropout: []` in qbench).

In these networks, a BN is between each activation and the next layer. Input quantizers therefore
cannot replace the activations.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from qbench.models.normalization import NORMS_1D, NORMS_2D, check_norm


class PolinoNet(nn.Sequential):
    """Network with the layers `conv1`, `conv2`, ..., then `fc1`, `fc2`, ....

    The modules `act`, `bn`, `pool` and `drop` are numbered consecutively over convolutions and
    linear layers.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        convs: Sequence[int],
        kernel: int,
        pools: Sequence[int],
        hidden: Sequence[int],
        rates: Sequence[float],
        norm: str,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, next_rate = shape[0], iter(rates)
        for i, out in enumerate(convs, 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
            layers |= {f"act{i}": nn.ReLU(), f"bn{i}": NORMS_2D[norm](out)}
            if i in pools:
                layers |= {f"pool{i}": nn.MaxPool2d(2), f"drop{i}": nn.Dropout2d(next(next_rate))}
            channels = out
        layers["flatten"] = nn.Flatten()
        height, width = (size >> len(pools) for size in shape[1:])
        features = channels * height * width
        for i, out in enumerate(hidden, 1):
            number = len(convs) + i
            layers |= {
                f"fc{i}": nn.Linear(features, out),
                f"act{number}": nn.ReLU(),
                f"bn{number}": NORMS_1D[norm](out),
            }
            layers[f"drop{number}"] = nn.Dropout(next(next_rate))
            features = out
        layers |= {f"fc{len(hidden) + 1}": nn.Linear(features, classes), "relu": nn.ReLU()}
        super().__init__(layers)
        self.norm = norm
        for module in self:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    convs: Sequence[int] = (75, 50, 50, 25),
    kernel: int = 5,
    pools: Sequence[int] = (2, 4),
    hidden: Sequence[int] = (500,),
    dropout: Sequence[float] = (0.2, 0.3, 0.4),
    norm: str = "affine",
) -> nn.Module:
    """Return a teacher or student. The default values describe student S0.

    Args:
        shape: shape (C, H, W) of an image.
        classes: number of classes.
        convs: number of channels of each convolution.
        kernel: kernel size of the convolutions, an odd number.
        pools: numbers of the convolutions that are followed by 2x2 max pooling. The first
            convolution is number 1.
        hidden: number of units of each hidden linear layer.
        dropout: one dropout rate for each max pooling and each hidden layer. An empty list means
            no dropout.
        norm: kind of batch normalization, one of affine, no_affine (without scale and shift) and none.
    """
    if min(convs, default=0) < 1:
        raise ValueError(f"convs={list(convs)}: must contain at least one layer, all with 1 or more channels")
    if min(hidden, default=1) < 1:
        raise ValueError(f"hidden={list(hidden)}: each layer must have 1 or more units")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: must be an odd number")
    if list(pools) != sorted(set(pools) & set(range(1, len(convs) + 1))):
        raise ValueError(f"pools={list(pools)}: must be numbers from 1 to {len(convs)}, ascending")
    rates = list(dropout) or [0.0] * (len(pools) + len(hidden))
    if len(rates) != len(pools) + len(hidden) or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"dropout={list(dropout)}: must be {len(pools) + len(hidden)} rates, each at least 0 and below 1 "
            f"(one per entry of pools and hidden), or empty"
        )
    check_norm(norm)
    if min(size >> len(pools) for size in shape[1:]) < 1:
        raise ValueError(f"pools={list(pools)}: images of {shape[1]}x{shape[2]} are too small for so many poolings")
    return PolinoNet(shape, classes, convs=convs, kernel=kernel, pools=pools, hidden=hidden, rates=rates, norm=norm)
