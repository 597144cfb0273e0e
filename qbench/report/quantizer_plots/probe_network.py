"""Defines the small network in which quantizers are measured. Its weights follow N(0, 1)."""

import copy
from collections import OrderedDict
from typing import NamedTuple

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
"""Number of epochs in which incremental methods freeze all weights. The network is not trained in these epochs."""


class ProbeNetwork(nn.Sequential):
    """A network of three 1x1 convolutions.

    The middle convolution is quantized. Its input comes from batch normalization and an activation function.
    """

    def __init__(self, rows: int, columns: int, norm: str) -> None:
        bn = nn.Identity() if norm == "none" else nn.BatchNorm2d(columns, affine=norm == "affine", momentum=1)
        first, middle = nn.Conv2d(FEATURES, columns, 1, bias=False), nn.Conv2d(columns, rows, 1, bias=False)
        with torch.no_grad():
            first.weight.normal_(std=FEATURES**-0.5)
            middle.weight.copy_(normal_values(rows * columns).reshape(middle.weight.shape))
        before = OrderedDict(first=first, bn=bn, act=nn.ReLU(), middle=middle)
        super().__init__(OrderedDict(before, last=nn.Conv2d(rows, CLASSES, 1), flat=nn.Flatten()))
        self.feeds = {"act": ("middle",)}

    def middle_inputs(self, images: Tensor) -> Tensor:
        """Return the inputs of the middle layer."""
        x = images
        with torch.no_grad():
            for name in ("first", "bn", "act"):
                x = self.get_submodule(name)(x)
        return x


def normal_values(count: int) -> Tensor:
    """Return `count` quantiles of N(0, 1) in random order, as float32.

    The quantiles are taken at the centers of `count` bins of equal probability.
    """
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ascending: Tensor = torch.special.ndtri(ranks).float()
    return ascending[torch.randperm(count)]


class ProbeLayer(NamedTuple):
    """The probe network, its quantized middle layer, and images for the network."""

    model: ProbeNetwork
    layer: QConv2d
    images: Tensor


def install_in_probe(method: Method, rows: int, columns: int) -> ProbeLayer:
    """Return a probe network whose middle layer is quantized and has weights of shape (rows, columns, 1, 1)."""
    model, images = ProbeNetwork(rows, columns, method.requires.norm or "affine"), torch.randn(IMAGES, FEATURES, 1, 1)
    model.train()(images)  # let the normalization of the float network adapt to its inputs
    install(method, model)
    layer = model.get_submodule("middle")
    assert isinstance(layer, QConv2d)
    return ProbeLayer(model, layer, images)


def prepare(method: Method, probe_layer: ProbeLayer) -> list[tuple[str, Quantizer]]:
    """Prepare a method, start all its epochs without training, and return its weight quantizer in one or two phases.

    A phase is a pair (name, quantizer). The last phase is the state after all epochs. Incremental methods have another
    phase before it: the first epoch in which at least half of the weights are frozen, but not all.
    """
    model, quantizer = probe_layer.model, probe_layer.layer.weight_q
    probe = Probe([(probe_layer.images, torch.arange(IMAGES) % CLASSES)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    model.train()(probe_layer.images)  # so that tracked ranges are set
    model.eval()
    borders = [0, *method.phases(EPOCHS)]
    phases: list[tuple[str, Quantizer]] = []
    begin = method.on_epoch
    for epoch in range(EPOCHS if begin else 0):
        assert begin is not None
        begin(model, epoch, EPOCHS, probe)
        share = quantizer.frozen.float().mean().item() if isinstance(quantizer, FrozenWeight) else 0
        if not phases and 0.5 <= share < 1:
            phase = sum(border <= epoch for border in borders)
            phases.append((f"phase {phase} of {len(borders)}: {100 * share:.0f} % frozen", copy.deepcopy(quantizer)))
    return [*phases, (f"phase {len(borders)} of {len(borders)}: all frozen" if phases else "", quantizer)]
