"""Plain convolutional networks for CIFAR-10 of Polino et al. 2018 (arXiv 1802.05668): teacher, students, one class.

Verified in the authors' code (antspy/quantized_distillation, cnn_models/conv_forward_model.py and cifar10_test.py):
convolution - ReLU - BN, in this order, a maximum of 2x2 and dropout of whole channels behind some; linear - ReLU - BN -
dropout; and a ReLU on the logits. Every layer has a bias; convolutions keep the size; Glorot's uniform start. Counted:
teacher 5.346 M parameters, students S0, S1, S2 1.000, 0.318 and 0.112 M, the deeper student 5.83 M. Distilled students
are trained without dropout (`dropout: []`).

Since BN stands between an activation and the next layer, no quantizer can take an activation's place here.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from qbench.models import mlp
from qbench.models.resnet import NORMS


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
    """Return a network for images of `shape` (C, H, W); student S0 unless told otherwise.

    Args:
        convs, kernel: channels of the convolutions, and their size, odd.
        pools: numbers of the convolutions, from 1, with a maximum of 2x2 behind.
        hidden: units of the hidden linear layers.
        dropout: one rate for each maximum and each hidden layer; none where empty.
    """
    if min(convs, default=0) < 1:
        raise ValueError(f"convs={list(convs)}: allowed are one layer or more, each of 1 or more channels")
    if min(hidden, default=1) < 1:
        raise ValueError(f"hidden={list(hidden)}: allowed are layers of 1 or more units")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: allowed are odd sizes")
    if list(pools) != sorted(set(pools) & set(range(1, len(convs) + 1))):
        raise ValueError(f"pools={list(pools)}: allowed are numbers from 1 to {len(convs)}, rising")
    rates = list(dropout) or [0.0] * (len(pools) + len(hidden))
    if len(rates) != len(pools) + len(hidden) or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"dropout={list(dropout)}: allowed are {len(pools) + len(hidden)} rates from 0 to below 1, one for each of "
            "pools and hidden, or none"
        )
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: allowed are auto, {', '.join(NORMS)}")
    height, width = (size >> len(pools) for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(f"pools={list(pools)}: nothing is left of images of {shape[1]}x{shape[2]}")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[0]
    for i, out in enumerate(convs, 1):
        parts[f"conv{i}"] = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
        parts |= {f"act{i}": nn.ReLU(), f"bn{i}": NORMS[norm](out)}
        if i in pools:
            parts |= {f"pool{i}": nn.MaxPool2d(2), f"drop{i}": nn.Dropout2d(rates.pop(0))}
        channels = out
    parts["flatten"] = nn.Flatten()
    inside = channels * height * width
    for i, out in enumerate(hidden, 1):
        number = len(convs) + i
        parts |= {f"fc{i}": nn.Linear(inside, out), f"act{number}": nn.ReLU(), f"bn{number}": mlp.NORMS[norm](out)}
        parts[f"drop{number}"] = nn.Dropout(rates.pop(0))
        inside = out
    parts |= {f"fc{len(hidden) + 1}": nn.Linear(inside, classes), "relu": nn.ReLU()}
    for module in parts.values():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    model = nn.Sequential(parts)
    model.norm = norm  # type: ignore[assignment]
    return model
