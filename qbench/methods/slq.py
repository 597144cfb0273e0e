"""SLQ: weights shared within clusters of each layer, the clusters frozen group after group, the rest trained on.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level Quantization", AAAI
    2018, arXiv 1803.03289. Authors' code: yuhuixu1993/SLQ (Caffe; first iteration of AlexNet only).

Idea
    Levels come from the weights themselves, by k-means. What costs most to quantize is quantized first, while weights
    are left that can make up for it; what is quantized last gets no help any more, so let it be what costs least.

Forward
    Per layer k = 2^(b-1) + 1 clusters by one-dimensional k-means, the centroid 0 pinned. Frozen weights are the
    centroid of their cluster, free ones are float.

Backward
    dL/dw of free weights; none of frozen ones.

Schedule
    One phase a portion, of equal length: all weights of every layer are clustered anew with frozen centroids held
    fast, so that a free weight nearest to one is absorbed; the free clusters are ranked, and the next ones frozen. The
    learning rate starts anew and momentum is cleared. In the last phase batch normalization and biases alone train.

Sites
    weight.

State
    frozen (bool, as the weights): the mask; value (float, as the weights): frozen values; centroids (k): of the last
    clustering, ascending, NaN where there are fewer; settled (bool, k): which of them are frozen.

Bits
    w 2-8 or 32 for 2^(b-1) + 1 clusters; a and g 32; by default w5a32g32.

Protocol
    AlexNet at 5 bits, authors' code: 5, 9, 13, 15, 17 of 17 clusters; each time SGD with momentum 0.9, decay 5e-4,
    batch 256, rate 1e-4 falling tenfold every 20,000 of at most 90,000 iterations. Other networks' rates unknown.

Choices
    partition: `probe` is the paper's text as second-hand sources have it: the network's loss when this cluster alone is
    replaced by its centroid, largest first, measured on the probe (clusters x layers passes a phase).
    `weight_error`, the reviewers' reading: the squared distance that sharing moves the weights, summed, largest first.
    `magnitude`, the authors' released code, which measures nothing: zero, then pairs of clusters from outside in (the
    positive one first). `random`: an ablation.
    portions: accumulated parts of the clusters, rounded down, one at least; the default gives the authors' counts.
    Portions that come to the same count of k clusters are one phase. All layers advance in every phase: how the paper
    goes through several layers is not known.
    k-means is exact; the authors take ten Lloyd iterations from powers of two.
    Layers with fewer than k distinct weights have as many clusters as they need, at least one frozen in every phase.

Deviations
    First and last layer stay float by the layer policy; the authors' code quantizes the first, and the last but in
    ResNet-18 (layers.first=same layers.last=same).

Results
    README (digits).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.kmeans import kmeans
from qbench.quant.layers import quantized_layers
from qbench.quant.masks import FrozenWeight, extend_mask, stage, stage_borders
from qbench.quant.method import Method
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Storage

PARTITIONS = ("probe", "weight_error", "magnitude", "random")
PORTIONS = (0.3, 0.55, 0.8, 0.9, 1.0)


def clusters_of(bits: int) -> int:
    """Return k, the number of clusters that a width stands for."""
    return int(2 ** (bits - 1)) + 1


def cluster(w: Tensor, k: int, pinned: float | Sequence[float] | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster weights by k-means, their global optimum.

    Args:
        k: clusters at most; fewer come back where there are fewer distinct weights.
        pinned: centroids that are among them whatever the weights are, and do not move.

    Returns:
        Centroids (m,), ascending and distinct, of w's type; labels (int64, of w's shape), indices into them.
    """
    found = kmeans(w, k, torch.as_tensor(() if pinned is None else pinned, dtype=w.dtype))
    return found.centroids, found.labels


def merged(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ones among `values` (k,), ascending, and the labels that belong to them."""
    distinct, place = torch.unique(values, return_inverse=True)
    return distinct, place[labels]


def weight_errors(w: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Return for each cluster the squared distance of its weights to its centroid, summed: (m,), float64."""
    squares = (w.detach().double() - centroids.double()[labels]) ** 2
    return torch.stack([squares[labels == c].sum() for c in range(centroids.numel())])


def magnitude_order(centroids: Tensor) -> Tensor:
    """Return scores (m,), float, that fall in the authors' order: 0, then pairs by decreasing magnitude, + first."""
    index = torch.arange(centroids.numel(), device=centroids.device)
    pair = torch.where(centroids > 0, centroids.numel() - 1 - index, index)
    return torch.where(centroids == 0, 1.0, -2.0 * pair - (centroids < 0).float())


class Clusters(NamedTuple):
    """A layer's clustering: centroids (m,) ascending, labels as the weights, and the clusters (m,) that nothing is left
    to do about: they are frozen, or have no weights.
    """

    centroids: Tensor
    labels: Tensor
    settled: Tensor


class SLQWeight(FrozenWeight):
    """A layer's weights, part of them centroids."""

    centroids: Tensor
    settled: Tensor

    def __init__(self, weight: Tensor, bits: int, pinned: Sequence[float] = (0.0,)) -> None:
        super().__init__(weight)
        self.bits, self.pinned = bits, tuple(pinned)
        self.register_buffer("centroids", weight.new_full((clusters_of(bits),), torch.nan, requires_grad=False))
        self.register_buffer("settled", torch.zeros_like(self.centroids, dtype=torch.bool))

    def codes(self, centroids: Tensor) -> Tensor:
        """Return what clusters with these centroids are shared at: the centroids."""
        return centroids

    @torch.no_grad()
    def clusters(self, w: Tensor) -> Clusters:
        """Cluster frozen values and free weights together, frozen centroids held fast; changes nothing."""
        fast = self.centroids[self.settled]
        pinned = torch.cat([fast, fast.new_tensor(self.pinned)])
        centroids, labels = cluster(self(w), self.centroids.numel(), pinned)
        centroids, labels = merged(self.codes(centroids), labels)
        dead = labels.flatten().bincount(minlength=centroids.numel()) == 0
        return Clusters(centroids, labels, torch.isin(centroids, fast) | dead)

    @torch.no_grad()
    def settle(self, found: Clusters, settled: Tensor) -> None:
        """Take over a clustering and freeze the weights of its clusters `settled` (m,)."""
        self.centroids.fill_(torch.nan)[: found.centroids.numel()] = found.centroids
        self.settled.zero_()[: settled.numel()] = settled
        self.freeze(settled[found.labels], found.centroids[found.labels])

    def grid(self, w: Tensor) -> Grid:
        """One group: the centroids."""
        return Grid((self.centroids[self.settled] if self.complete else self.centroids).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Codes and the centroids."""
        return Storage(w.numel(), self.bits, 4 * self.centroids.numel())

    def report(self) -> dict[str, float]:
        """Clusters of the last clustering, how many are frozen, and the part of the weights that is."""
        found, settled = int((~self.centroids.isnan()).sum()), int(self.settled.sum())
        return {"clusters": found, "settled": settled, "frozen": self.frozen.float().mean().item()}


def loss_when_frozen(model: nn.Module, probe: Probe, site: FrozenWeight, found: Clusters, chosen: Tensor) -> float:
    """Return the network's loss on the probe when, of what is free, these clusters (m,) alone are shared."""
    with site.frozen_for_now(chosen[found.labels], found.centroids[found.labels]):
        return probe.loss(model)


def scores(model: nn.Module, probe: Probe, site: SLQWeight, w: Tensor, found: Clusters, partition: str) -> Tensor:
    """Return a score for each cluster (m,); the highest is frozen first. Only those of free clusters mean anything."""
    if partition == "magnitude":
        return magnitude_order(found.centroids)
    if partition == "weight_error":
        return weight_errors(w, found.centroids, found.labels)
    if partition == "random":
        return torch.rand(found.settled.shape).to(found.centroids.device)
    losses = torch.zeros_like(found.settled, dtype=torch.float64)
    for alone in torch.eye(losses.numel(), dtype=torch.bool, device=losses.device)[~found.settled]:
        losses[alone] = loss_when_frozen(model, probe, site, found, alone)
    return losses


@torch.no_grad()
def freeze_next(model: nn.Module, portion: float, partition: str, probe: Probe) -> None:
    """Freeze every layer's next clusters, up to an accumulated portion of them, one at least."""
    layers = [(layer.weight_q, layer.weight) for layer in quantized_layers(model).values()]
    open_ = [(s, w, s.clusters(w)) for s, w in layers if isinstance(s, SLQWeight) and not s.complete]
    for site, _, found in open_:
        site.settle(found, found.settled)  # absorbs
    ranked = [scores(model, probe, site, w, found, partition) for site, w, found in open_]
    for (site, _, found), score in zip(open_, ranked, strict=True):
        count = max(_count(portion, score.numel()), int(found.settled.sum()) + 1)
        site.settle(found, extend_mask(found.settled, score, count / score.numel()))


def _count(portion: float, clusters: int) -> int:
    return max(1, int(portion * clusters + 1e-9))


def build(*, w: int = 5, partition: str = "probe", portions: Sequence[float] = PORTIONS) -> Method:
    """Return SLQ; `portions` are accumulated parts of the clusters, ascending, the last one 1."""
    return incremental("slq", SLQWeight, w, partition, portions)


def incremental(
    name: str, site: Callable[[Tensor, int], SLQWeight], w: int, partition: str, portions: Sequence[float]
) -> Method:
    """Return a method that freezes clusters portion by portion; `site` makes its weight quantizer."""
    steps = [float(p) for p in portions]
    if not steps or steps != sorted(set(steps)) or steps[0] <= 0 or steps[-1] != 1:
        raise ValueError(f"portions={steps}: allowed are ascending parts above 0, the last one 1")
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition}: allowed are {', '.join(PARTITIONS)}")
    stages = list({_count(p, clusters_of(w)): p for p in steps}.values())

    def on_epoch(model: nn.Module, epoch: int, epochs: int, probe: Probe) -> None:
        if epoch in (0, *stage_borders(epochs, len(stages))):
            freeze_next(model, stages[stage(epoch, epochs, len(stages))], partition, probe)

    return Method(
        name=name,
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        weight=lambda name, layer, bits: site(layer.weight.detach(), bits),
        phases=(lambda epochs: stage_borders(epochs, len(stages))) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
    )
