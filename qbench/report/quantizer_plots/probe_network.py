"""A small network for a method to be looked at in: one quantized layer, its weights and inputs close to N(0, 1)."""

import copy
from collections import OrderedDict
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.quant.install import install
from qbench.quant.layers import QConv2d
from qbench.quant.masks import FrozenWeight
from qbench.quant.method import Method
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Quantizer

VALUES = 4096
IMAGES, FEATURES, CLASSES = 64, 64, 3
EPOCHS = 20
"""Epochs that incremental methods get to finish in, without training in between."""


class ProbeNetwork(nn.Sequential):
    """Three 1x1 convolutions; the middle one, behind normalization and activation, is the one that is quantized."""

    def __init__(self, rows: int, columns: int, norm: str) -> None:
        bn = nn.Identity() if norm == "none" else nn.BatchNorm2d(columns, affine=norm == "affine", momentum=1)
        first, middle = nn.Conv2d(FEATURES, columns, 1, bias=False), nn.Conv2d(columns, rows, 1, bias=False)
        with torch.no_grad():
            first.weight.normal_(std=FEATURES**-0.5)
            middle.weight.copy_(normal_values(rows * columns).reshape(middle.weight.shape))
        before = OrderedDict(first=first, bn=bn, act=nn.ReLU(), middle=middle)
        super().__init__(OrderedDict(before, last=nn.Conv2d(rows, CLASSES, 1), flat=nn.Flatten()))
        self.feeds = {"act": ("middle",)}

    def read_by_middle(self, images: Tensor) -> Tensor:
        """Return what the middle layer's quantizer is given."""
        with torch.no_grad():
            return cast(Tensor, self.act(self.bn(self.first(images))))  # type: ignore[operator]


def normal_values(count: int) -> Tensor:
    """Return the quantiles of N(0, 1) at the middles of `count` equal parts, in random order, float32."""
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ascending: Tensor = torch.special.ndtri(ranks).float()
    return ascending[torch.randperm(count)]


class ProbeLayer(NamedTuple):
    """The network, its middle layer, and images for it."""

    model: ProbeNetwork
    layer: QConv2d
    images: Tensor


def installed(method: Method, rows: int, columns: int) -> ProbeLayer:
    """Return the network with a method in its middle layer, of weights (rows, columns, 1, 1)."""
    model, images = ProbeNetwork(rows, columns, method.requires.norm or "affine"), torch.randn(IMAGES, FEATURES, 1, 1)
    model.train()(images)  # a float network whose normalization has seen what it gets
    install(method, model)
    return ProbeLayer(model, cast(QConv2d, model.middle), images)


def prepared(method: Method, subject: ProbeLayer) -> list[tuple[str, Quantizer]]:
    """Prepare a method and begin all its epochs; return the weights' quantizer with its phase, at the end, and before
    that when half or more of the weights are frozen but not all, if that ever is.
    """
    model, site = subject.model, subject.layer.weight_q
    probe = Probe([(subject.images, torch.arange(IMAGES) % CLASSES)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    model.train()(subject.images)  # for ranges that follow what passes
    model.eval()
    borders = [0, *method.phases(EPOCHS)]
    found: list[tuple[str, Quantizer]] = []
    begin = method.on_epoch
    for epoch in range(EPOCHS if begin else 0):
        assert begin is not None
        begin(model, epoch, EPOCHS, probe)
        share = site.frozen.float().mean().item() if isinstance(site, FrozenWeight) else 0
        if not found and 0.5 <= share < 1:
            phase = sum(border <= epoch for border in borders)
            found.append((f"phase {phase} of {len(borders)}: {100 * share:.0f} % frozen", copy.deepcopy(site)))
    return [*found, (f"phase {len(borders)} of {len(borders)}: all frozen" if found else "", site)]
