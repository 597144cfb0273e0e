"""MLQ: weights become ternary in steps, outer clusters first. A measured loss sets the order of the layers.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018, arXiv 1803.03289. Authors' code: yuhuixu1993/SLQ. In that repository,
    only a backup file of a text editor contains code of MLQ. This file contains the order of the
    layers as a constant.

Idea
    If a layer has only three clusters, few of its weights are still free after one cluster is
    frozen. MLQ therefore does not quantize all layers at once. It starts with the layers that raise
    the loss most if they are quantized. The layers that are still free are trained to compensate
    this loss.

Forward
    One-dimensional k-means finds k = 2^(b-1) + 1 clusters per layer. The boundary clusters are the
    outer two clusters, and the zero cluster is the middle cluster. At the start, all weights of a
    layer are free. First the weights of the boundary clusters are frozen at their centroids, and
    the weights of the zero cluster are trained further. Then all weights are clustered again with
    the frozen centroids fixed, and the zero cluster is frozen too.

Backward
    Free weights get their gradient dL/dw. Frozen weights get no gradient.

Schedule
    Each group of clusters has one phase. The phase of the boundary clusters is the first, and the
    phase of the zero cluster is the last. The phases have equal length. A freezing step freezes the
    next group of clusters in one layer. The freezing steps of all layers are spread over the first
    half of a phase, as evenly as the number of epochs allows. In the second half of a phase, all
    free weights are trained further. At the start of each phase, the learning-rate schedule
    restarts and momentum is set to zero. A freezing step changes neither the schedule nor the
    momentum.
    Before each round of freezing steps, the loss of the network is measured once for each layer
    that has not taken its step in this phase. During the measurement for a layer, only the weights
    in the next clusters of this layer are replaced by their centroids. The loss is measured on 256
    fixed training images (the probe). The layers with the largest loss take their freezing step.

Sites
    weight.

State
    frozen, value, centroids, settled: see the method slq.
    turn (int, one per group of clusters): the position of the group's freezing step among the
    freezing steps of all layers, counted from 1. Before this step, turn is 0.
    loss (float64, one per group): the loss measured for the group's freezing step, or NaN if no
    loss was measured.

Bits
    w 2 (three values), 3 (five), 4 (nine) or 32; a and g 32; by default w2a32g32.

Protocol
    The authors train ResNet-20 on CIFAR-10, and other networks on ImageNet. The names of the
    authors' files suggest at least 18 iterations of freezing and training. The learning rates are
    unknown.

Choices
    zero: the value of the zero cluster. `mean` is the mean of the cluster's weights, as in the
    authors' code. The mean is not exactly 0. `pinned` keeps the value at exactly 0.
    In qbench, all layers freeze their boundary clusters before any layer freezes its zero cluster.
    This is our interpretation of "boundary before zero", because the sources describe only single
    layers. The losses of the remaining layers are measured again before every round of freezing
    steps. With 3 bits there are five clusters, and with 4 bits there are nine clusters. The sources
    do not state the order of freezing for these widths. qbench freezes the outermost two clusters
    first, then the next two inwards, and the middle cluster last.
    depth: `true` (default) is the order described above.
    `false` is an ablation: all layers take their freezing step at the start of a phase, and no loss
    is measured.

Deviations
    qbench finds the optimal k-means clusters. The authors run ten Lloyd iterations that start from
    powers of two.
    By default, the first and last layers stay float (`layers.first`, `layers.last`). The authors'
    code quantizes the first layer. It also quantizes the last layer, except in ResNet-18. To
    quantize both layers in qbench, type layers.first=same layers.last=same.

Results
    docs/results.md (digits).
"""

from math import ceil, isnan

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods import slq
from qbench.methods.slq import Clusters, loss_when_frozen
from qbench.quant.layers import FloatLayer, quantized_layers
from qbench.quant.masks import optimizer_step, stage, stage_borders
from qbench.quant.method import Method, Unsupported
from qbench.quant.probe import Probe

CLUSTER_GROUPS = {
    2: ("boundary", "zero"),
    3: ("outer", "inner", "zero"),
    4: ("outer", "second", "third", "inner", "zero"),
}
"""Maps a width in bits to the names of the groups of clusters, in the order in which they are frozen."""
PINNED: dict[str, tuple[float, ...]] = {"mean": (), "pinned": (0.0,)}
ADVANCING_SHARE = 0.5
"""Fraction of a phase in which layers take their freezing steps. The rest of the phase only trains free weights."""


class MLQWeight(slq.SLQWeight):
    """Quantizer of one layer's weights. The outermost clusters are frozen first, and the middle cluster last."""

    turn: Tensor
    loss: Tensor

    def __init__(self, weight: Tensor, bits: int, pinned: tuple[float, ...] = ()) -> None:
        super().__init__(weight, bits, pinned)
        self.register_buffer("turn", torch.zeros(len(CLUSTER_GROUPS[bits]), dtype=torch.long))
        self.register_buffer("loss", torch.full((len(CLUSTER_GROUPS[bits]),), torch.nan, dtype=torch.float64))

    @property
    def frozen_groups(self) -> int:
        """Return the number of groups of clusters that are frozen."""
        return int((self.turn > 0).sum())

    def next_clusters(self, w: Tensor) -> tuple[Clusters, Tensor]:
        """Return the current clustering, and the mask (m,) of clusters that are frozen after the next freezing step.

        The mask is true for the clusters frozen so far, the lowest free cluster and the highest
        free cluster. In the last step, the mask is true for all clusters.
        """
        clusters = self.clusters(w)
        frozen, free = clusters.settled.clone(), (~clusters.settled & ~clusters.empty).nonzero().flatten()
        last_step = self.frozen_groups == self.turn.numel() - 1
        if last_step:
            frozen[free] = True
        elif free.numel() > 1:
            frozen[free[[0, -1]]] = True
        return clusters, frozen

    def report(self) -> dict[str, float]:
        """Return SLQ's report and, for each group of clusters, the turn and the measured loss."""
        report = super().report()
        for name, turn, loss in zip(CLUSTER_GROUPS[self.bits], self.turn.tolist(), self.loss.tolist(), strict=True):
            report[f"turn_{name}"] = turn
            if not isnan(loss):
                report[f"loss_{name}"] = loss
        return report


def steps_due(epoch: int, epochs: int, layers: int, groups: int, depth: bool = True) -> int:
    """Return how many of the `layers * groups` freezing steps must be done before an epoch is trained."""
    current = stage(epoch, epochs, groups)
    if not depth:
        return (current + 1) * layers
    borders = [0, *stage_borders(epochs, groups), epochs]
    start, stop = max(b for b in borders if b <= epoch), min(b for b in borders if b > epoch)
    share = min(1, (epoch - start + 1) / ceil(ADVANCING_SHARE * (stop - start)))
    return current * layers + ceil(layers * share)


@torch.no_grad()
def freeze_next(model: nn.Module, count: int, depth: bool, probe: Probe) -> None:
    """Freeze the next clusters of one layer after another, until `count` freezing steps are done.

    The layers with the largest measured loss come first. The next group of clusters begins when all
    layers have frozen the current group.
    """
    sites = _sites(model)
    while (done := sum(site.frozen_groups for site, _ in sites)) < count:
        group = done // len(sites)
        # measure the loss for each remaining layer, with only that layer's next clusters frozen
        waiting = [(site, *site.next_clusters(w)) for site, w in sites if site.frozen_groups == group]
        losses = [loss_when_frozen(model, probe, *step) if depth else torch.nan for step in waiting]
        order = torch.tensor(losses, dtype=torch.float64).argsort(descending=True, stable=True).tolist()
        for turn, i in enumerate(order[: count - done], done + 1):
            site, clusters, frozen = waiting[i]
            site.freeze_clusters(clusters, frozen)
            site.turn[group], site.loss[group] = turn, losses[i]


def _sites(model: nn.Module) -> list[tuple[MLQWeight, Tensor]]:
    layers = quantized_layers(model).values()
    return [(layer.weight_q, layer.weight) for layer in layers if isinstance(layer.weight_q, MLQWeight)]


def build(*, w: int = 2, depth: bool = True, zero: str = "mean") -> Method:
    """Return the `Method` for MLQ. The method card (module docstring) explains `depth` and `zero`."""
    if zero not in PINNED:
        raise ValueError(f"zero={zero}: must be one of {', '.join(PINNED)}")
    groups = len(CLUSTER_GROUPS.get(w, CLUSTER_GROUPS[2]))

    def site(name: str, layer: FloatLayer, bits: int) -> MLQWeight:
        if bits != w:  # layers take turns group by group, so all layers need the same groups
            raise Unsupported(f"mlq needs the same width in all layers, but {name} has {bits} bits and bits.w={w}")
        return MLQWeight(layer.weight.detach(), bits, PINNED[zero])

    def on_epoch(model: nn.Module, epoch: int, epochs: int, probe: Probe) -> None:
        freeze_next(model, steps_due(epoch, epochs, len(_sites(model)), groups, depth), depth, probe)

    return Method(
        name="mlq",
        bits=Bits(w),
        supported_bits={"w": (*CLUSTER_GROUPS, FLOAT)},
        weight=site,
        phases=(lambda epochs: stage_borders(epochs, groups)) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
        step=optimizer_step if w < FLOAT else None,
    )
