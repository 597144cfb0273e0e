"""MLQ: ternary weights; outer clusters are frozen before the middle one, and layers in the order of a measured loss.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018, arXiv 1803.03289. Authors' code: yuhuixu1993/SLQ. In that repository,
    MLQ exists only in an editor's backup file, with the order of the layers written by hand.

Idea
    With three clusters per layer, freezing a cluster leaves few free weights in the layer for
    retraining. The layers are therefore not quantized all at once. The layers whose quantization
    raises the loss most come first, and the layers that are still free compensate.

Forward
    One-dimensional k-means finds k = 2^(b-1) + 1 clusters per layer. A layer starts float. First
    the weights of the boundary clusters (the outer ones) are frozen at their centroids, while the
    zero cluster (the middle one) is trained further. Then all weights are clustered again with the
    frozen centroids fixed, and the zero cluster is frozen too.

Backward
    dL/dw for free weights; no gradient for frozen weights.

Schedule
    One phase for each group of clusters: first the boundary clusters, then the zero cluster. The
    phases have equal length. In a step, a layer freezes its next clusters. In the first half of a
    phase, the layers take their steps one after another. The steps are spread as evenly as the
    number of epochs allows. In the second half, all free weights are trained further. The
    learning-rate schedule restarts and momentum is cleared at the start of a phase, not at each
    step.
    Before steps are taken, the loss is measured once for each remaining layer. For this
    measurement, the next clusters of this layer are frozen, but those of the other remaining layers
    are not. The loss is the network's loss on the probe, a fixed part of the training images. The
    layers with the largest loss take their step.

Sites
    weight.

State
    frozen, value, centroids, settled: as in SLQ.
    turn (int, one per group of clusters): the position of this layer's step among all steps of all
    layers, or 0 before the step.
    loss (float64, one per group): the loss measured for this step, or NaN if no loss was measured.

Bits
    w 2 (three values), 3 (five), 4 (nine) or 32; a and g 32; by default w2a32g32.

Protocol
    ResNet-20 on CIFAR-10, and ImageNet networks. There are at least 18 iterations, judging by the
    authors' file names. The learning rates are unknown.

Choices
    zero: `mean`, as in the authors' code, freezes the zero cluster at its mean. This mean is not
    exactly 0, and the boundary clusters are then not symmetric. `pinned` keeps one centroid at
    exactly 0.
    All layers freeze their boundary clusters before any layer freezes its zero cluster. This is our
    reading of "boundary before zero". The sources describe only the states of single layers. The
    loss of the remaining layers is measured again whenever steps are due.
    The order at 3 and 4 bits, with five and nine clusters, is entirely our reading. The outermost
    two clusters are frozen first, then the next two inwards, and so on to the middle cluster.
    depth: `false` is the ablation, in which all layers take their step at the start of a phase, and
    no loss is measured.

Deviations
    k-means is exact here. The authors run ten Lloyd iterations that start from powers of two.
    The first and last layers stay float, following the layer policy. The authors' code quantizes
    the first layer. It also quantizes the last layer, except in ResNet-18. layers.first=same
    layers.last=same quantizes both here.

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
from qbench.quant.masks import stage, stage_borders
from qbench.quant.method import Method, Unsupported
from qbench.quant.probe import Probe

CLUSTER_GROUPS = {
    2: ("boundary", "zero"),
    3: ("outer", "inner", "zero"),
    4: ("outer", "second", "third", "inner", "zero"),
}
"""Weight width in bits -> the groups of clusters, in the order in which they are frozen."""
PINNED: dict[str, tuple[float, ...]] = {"mean": (), "pinned": (0.0,)}
ADVANCING_SHARE = 0.5
"""Share of a phase in which layers take their step; in the rest, all free weights are trained further."""


class MLQWeight(slq.SLQWeight):
    """Quantizer of one layer's weights. The boundary clusters are frozen first, then all others."""

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
        """Return the current clustering, and the mask (m,) of the clusters that are frozen after the next step.

        The mask covers the clusters frozen so far, the lowest free cluster and the highest free
        cluster. In the last step, it covers all clusters.
        """
        clusters = self.clusters(w)
        frozen, free = clusters.settled.clone(), (~clusters.settled).nonzero().flatten()
        last_step = self.frozen_groups == self.turn.numel() - 1
        if last_step:
            frozen[free] = True
        elif free.numel() > 1:
            frozen[free[[0, -1]]] = True
        return clusters, frozen

    def report(self) -> dict[str, float]:
        """Return SLQ's report, with the turn and the measured loss of each group of clusters added."""
        report = super().report()
        for name, turn, loss in zip(CLUSTER_GROUPS[self.bits], self.turn.tolist(), self.loss.tolist(), strict=True):
            report[f"turn_{name}"] = turn
            if not isnan(loss):
                report[f"loss_{name}"] = loss
        return report


def steps_due(epoch: int, epochs: int, layers: int, groups: int, depth: bool = True) -> int:
    """Return how many of the `layers * groups` single-layer steps are done before an epoch is trained."""
    current = stage(epoch, epochs, groups)
    if not depth:
        return (current + 1) * layers
    borders = [0, *stage_borders(epochs, groups), epochs]
    start, stop = max(b for b in borders if b <= epoch), min(b for b in borders if b > epoch)
    share = min(1, (epoch - start + 1) / ceil(ADVANCING_SHARE * (stop - start)))
    return current * layers + ceil(layers * share)


@torch.no_grad()
def freeze_next(model: nn.Module, count: int, depth: bool, probe: Probe) -> None:
    """Freeze the next clusters of one layer after another, until `count` single-layer steps are done.

    The layers with the largest loss come first. A group of clusters is frozen in all layers before
    the next group begins.
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
    """Return MLQ. The method card explains `depth` and `zero`."""
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
    )
