"""SLQ: all weights of a cluster share one value. Clusters are frozen phase by phase; free weights are trained.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018, arXiv 1803.03289. Authors' code: yuhuixu1993/SLQ (Caffe). This code
    contains only the first iteration for AlexNet.

Idea
    K-means on the weights finds the levels. SLQ first quantizes the clusters that raise the loss
    most, while many free weights can still be trained to compensate the error. It quantizes the
    clusters that raise the loss least at the end, when no free weights are left.

Forward
    One-dimensional k-means finds k = 2^(b-1) + 1 clusters per layer, with one centroid pinned at 0.
    A frozen weight is equal to the centroid of its cluster. Free weights are float.

Backward
    Free weights get their gradient dL/dw. Frozen weights get no gradient.

Schedule
    There is one phase per portion. A portion is the fraction of the clusters that is frozen after a
    phase. The phases have equal length. At the start of a phase, all weights of every layer are
    clustered again, with frozen centroids fixed. If the nearest centroid of a free weight is
    frozen, the weight is frozen at this centroid. Then the free clusters are ranked, and the first
    clusters of the ranking are frozen. The learning-rate schedule restarts, and momentum is set to
    zero. In the last phase, only batch normalization, biases and float layers
    are trained.

Sites
    weight.

State
    frozen (bool, shape of the weights): which weights are frozen. value (float, shape of the
    weights): the values of the frozen weights. centroids (k): centroids of the last clustering, in
    ascending order, padded with NaN. settled (bool, k): which centroids are frozen.

Bits
    w 2-8 or 32, a and g 32; by default w5a32g32. With b bits, there are 2^(b-1) + 1 clusters.

Protocol
    The authors' code quantizes AlexNet with 5 bits, which means 17 clusters. After phases 1 to 5,
    the number of frozen clusters is 5, 9, 13, 15 and 17. Each phase uses SGD with momentum 0.9,
    weight decay 5e-4 and batch size 256, for at most 90,000 iterations. The learning rate is 1e-4,
    and is divided by ten every 20,000 iterations. The learning rates for other networks are
    unknown.

Choices
    partition: the order in which clusters are frozen.
    `probe` (default) follows the text of the paper, as secondary sources quote it. For each
    cluster, the network's loss is measured on 256 fixed training images (the probe), while only the
    weights of this cluster are replaced by its centroid. The cluster with the largest loss comes
    first. Every phase needs one pass over the probe for each cluster of each layer.
    `weight_error` follows another interpretation of the paper. The error of a cluster is the sum of
    squared distances between its weights and its centroid. The cluster with the largest error comes
    first.
    `magnitude` is the order in the authors' released code. It needs no measurement. The zero
    cluster comes first. Then come pairs of clusters from the outermost inwards, and in each pair
    the positive cluster is first.
    `random` is an ablation.
    portions: the portion of each phase. The resulting number of clusters is rounded down, but is at
    least one. The default gives the authors' numbers of clusters. Portions with the same number of
    clusters share one phase. Every phase freezes clusters in all layers. The sources do not state
    the order in which the paper quantizes the layers.
    clustering: `exact` (default) finds the optimal clusters. `lloyd` follows the authors' code: ten
    Lloyd iterations that start from the centroids 0 and +-2^(m - j), with m = floor(log2 max|w|)
    and j = 0, 1, and so on. A cluster without weights keeps its centroid. In later phases, free
    centroids start from these powers of two again.
    A layer with fewer than k distinct weights has fewer than k clusters. With lloyd, a cluster
    without weights does not count either. Every phase still freezes at least one cluster of the
    layer.

Deviations
    By default, the first and last layers stay float (`layers.first`, `layers.last`). The authors'
    code quantizes the first layer. It also quantizes the last layer, except in ResNet-18. To
    quantize both layers in qbench, type layers.first=same layers.last=same.

Results
    docs/results.md (digits).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods.inq import check_portions
from qbench.quant.kmeans import kmeans
from qbench.quant.layers import quantized_layers
from qbench.quant.masks import FrozenWeight, extend_mask, optimizer_step, stage, stage_borders
from qbench.quant.method import Method, factory_for
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Storage

PARTITIONS = ("probe", "weight_error", "magnitude", "random")
PORTIONS = (0.3, 0.55, 0.8, 0.9, 1.0)
CLUSTERINGS = ("exact", "lloyd")
LLOYD_STEPS = 10


def cluster_count(bits: int) -> int:
    """Return the number of clusters, k = 2^(bits-1) + 1."""
    return int(2 ** (bits - 1)) + 1


def cluster(w: Tensor, k: int, pinned: float | Sequence[float] | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster weights (any shape) by globally optimal k-means.

    Args:
        k: number of clusters. If there are fewer than k distinct weights, there are fewer clusters.
        pinned: values of fixed centroids. They are counted in k.

    Returns:
        Centroids (m,) and labels. The centroids are distinct, in ascending order, and have the
        dtype of w. The labels are int64 and have the shape of w. The label of a weight is the index
        of its centroid.
    """
    clustering = kmeans(w, k, torch.as_tensor(() if pinned is None else pinned, dtype=w.dtype))
    return clustering.centroids, clustering.labels


def power_of_two_starts(w: Tensor, k: int) -> Tensor:
    """Return the k initial centroids of the authors' code, 0 and signed powers of two, in ascending order."""
    largest = torch.floor(torch.log2(w.detach().abs().max().clamp(min=torch.finfo(w.dtype).tiny)))
    powers = torch.exp2(largest - torch.arange(k // 2, device=w.device)).to(w.dtype)
    return torch.cat([-powers, w.new_zeros(1), powers.flip(0)])


def lloyd(w: Tensor, starts: Tensor, fixed: Tensor, steps: int = LLOYD_STEPS) -> tuple[Tensor, Tensor]:
    """Move centroids to the means of their clusters, `steps` times, as in the authors' code.

    Args:
        starts: the initial centroids (k,), in ascending order.
        fixed: true for centroids that do not move (k, bool).

    Returns:
        Centroids (k,) in ascending order, and labels (int64, with the shape of w). A weight halfway
        between two centroids belongs to the lower centroid.
    """
    values, centroids = w.detach().flatten().double(), starts.double()
    for _ in range(steps):
        labels = torch.bucketize(values, (centroids[1:] + centroids[:-1]) / 2)
        counts = labels.bincount(minlength=centroids.numel())
        means = values.new_zeros(centroids.shape).index_add_(0, labels, values) / counts
        centroids = torch.where(fixed | (counts == 0), centroids, means)
    centroids = centroids.to(w.dtype)
    return centroids, torch.bucketize(w.detach().contiguous(), (centroids[1:] + centroids[:-1]) / 2)


def merge_equal(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of `values` in ascending order, and the labels as indices of the distinct values."""
    distinct, index = torch.unique(values, return_inverse=True)
    return distinct, index[labels]


def weight_errors(w: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Return (m,), float64: for each cluster, the sum of squared distances between its weights and its centroid."""
    squares = (w.detach().double() - centroids.double()[labels]) ** 2
    return torch.stack([squares[labels == c].sum() for c in range(centroids.numel())])


def magnitude_order(centroids: Tensor) -> Tensor:
    """Return scores (m,), float. The cluster that the authors freeze first has the highest score.

    The order is the zero cluster, then pairs of clusters from the outermost inwards. In a pair, the
    positive cluster is first.
    """
    index = torch.arange(centroids.numel(), device=centroids.device)
    pair = torch.where(centroids > 0, centroids.numel() - 1 - index, index)
    return torch.where(centroids == 0, 1.0, -2.0 * pair - (centroids < 0).float())


class Clusters(NamedTuple):
    """Centroids and labels of a layer's weights."""

    centroids: Tensor  #: (m,), ascending
    labels: Tensor  #: the cluster of each weight, of the weights' shape
    settled: Tensor  #: (m,), bool: clusters that are frozen
    empty: Tensor  #: (m,), bool: clusters that are not frozen and have no weights


class SLQWeight(FrozenWeight):
    """Quantizer of one layer's weights. A frozen weight is equal to its centroid."""

    centroids: Tensor
    settled: Tensor

    def __init__(self, weight: Tensor, bits: int, pinned: Sequence[float] = (0.0,), clustering: str = "exact") -> None:
        super().__init__(weight)
        self.bits, self.pinned, self.clustering = bits, tuple(pinned), clustering
        self.register_buffer("centroids", weight.new_full((cluster_count(bits),), torch.nan, requires_grad=False))
        self.register_buffer("settled", torch.zeros_like(self.centroids, dtype=torch.bool))

    def shared_values(self, centroids: Tensor) -> Tensor:
        """Return, for each cluster, the value that all its weights share. For SLQ, this value is the centroid."""
        return centroids

    @torch.no_grad()
    def clusters(self, w: Tensor) -> Clusters:
        """Cluster the weights again with the frozen centroids fixed, and return the result. Nothing is frozen."""
        frozen_centroids = self.centroids[self.settled]
        if self.clustering == "lloyd":
            starts = power_of_two_starts(w, self.centroids.numel())
            starts, order = torch.where(self.settled, self.centroids, starts).sort(stable=True)
            centroids, labels = lloyd(self(w), starts, self.settled[order] | (starts == 0))
        else:
            pinned = torch.cat([frozen_centroids, frozen_centroids.new_tensor(self.pinned)])
            centroids, labels = cluster(self(w), self.centroids.numel(), pinned)
        centroids, labels = merge_equal(self.shared_values(centroids), labels)
        settled = torch.isin(centroids, frozen_centroids)
        unused = labels.flatten().bincount(minlength=centroids.numel()) == 0
        return Clusters(centroids, labels, settled, unused & ~settled)

    @torch.no_grad()
    def freeze_clusters(self, clusters: Clusters, settled: Tensor) -> None:
        """Store a clustering, and freeze all weights of the clusters for which `settled` (m,) is true."""
        self.centroids.fill_(torch.nan)[: clusters.centroids.numel()] = clusters.centroids
        self.centroids[: settled.numel()][clusters.empty] = torch.nan  # no level of the layer
        self.settled.zero_()[: settled.numel()] = settled
        self.freeze(settled[clusters.labels], clusters.centroids[clusters.labels])

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: the centroids. The whole tensor is one scale group."""
        return Grid((self.centroids[self.settled] if self.complete else self.centroids).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of the centroids."""
        return Storage(w.numel(), self.bits, 4 * self.centroids.numel())

    def report(self) -> dict[str, float]:
        """Return the number of clusters, the number of frozen clusters, and the fraction of frozen weights."""
        clusters, settled = int((~self.centroids.isnan()).sum()), int(self.settled.sum())
        return {"clusters": clusters, "settled": settled, "frozen": self.frozen.float().mean().item()}


def loss_when_frozen(model: nn.Module, probe: Probe, site: FrozenWeight, clusters: Clusters, chosen: Tensor) -> float:
    """Return the network's loss on the probe images if the clusters `chosen` (m, bool) are also frozen."""
    with site.frozen_for_now(chosen[clusters.labels], clusters.centroids[clusters.labels]):
        return probe.loss(model)


def scores(model: nn.Module, probe: Probe, site: SLQWeight, w: Tensor, clusters: Clusters, partition: str) -> Tensor:
    """Return the scores (m,) of the clusters. The highest score comes first. Scores of frozen clusters are not used."""
    if partition == "magnitude":
        return magnitude_order(clusters.centroids)
    if partition == "weight_error":
        return weight_errors(w, clusters.centroids, clusters.labels)
    if partition == "random":
        return torch.rand(clusters.settled.shape).to(clusters.centroids.device)
    # probe: the loss if, of all free clusters, only this cluster is frozen
    losses = torch.zeros_like(clusters.settled, dtype=torch.float64)
    for alone in torch.eye(losses.numel(), dtype=torch.bool, device=losses.device)[~clusters.settled & ~clusters.empty]:
        losses[alone] = loss_when_frozen(model, probe, site, clusters, alone)
    return losses


@torch.no_grad()
def freeze_next(model: nn.Module, portion: float, partition: str, probe: Probe) -> None:
    """In every layer, freeze one or more clusters, until the fraction `portion` of the clusters is frozen."""
    layers = [(layer.weight_q, layer.weight) for layer in quantized_layers(model).values()]
    unfinished = [(s, w, s.clusters(w)) for s, w in layers if isinstance(s, SLQWeight) and not s.complete]
    # before any measurement, freeze in all layers the free weights whose nearest centroid is frozen
    for site, _, clusters in unfinished:
        site.freeze_clusters(clusters, clusters.settled)
    ranked = [scores(model, probe, site, w, clusters, partition) for site, w, clusters in unfinished]
    for (site, _, clusters), score in zip(unfinished, ranked, strict=True):
        empty = int(clusters.empty.sum())  # these clusters are never frozen
        count = max(_portion_count(portion, score.numel() - empty), int(clusters.settled.sum()) + 1)
        chosen = extend_mask(clusters.settled | clusters.empty, score, (count + empty) / score.numel())
        site.freeze_clusters(clusters, chosen & ~clusters.empty)


def _portion_count(portion: float, clusters: int) -> int:
    """Return `portion` times `clusters`, rounded down, but at least one cluster."""
    return max(1, int(portion * clusters + 1e-9))  # with float rounding, 0.29 * 100 is 28.999...


def build(
    *, w: int = 5, partition: str = "probe", portions: Sequence[float] = PORTIONS, clustering: str = "exact"
) -> Method:
    """Return the `Method` for SLQ. `portions` are the fractions of the clusters that are frozen after each phase."""
    if clustering not in CLUSTERINGS:
        raise ValueError(f"clustering={clustering}: must be one of {', '.join(CLUSTERINGS)}")
    return build_incremental("slq", partial(SLQWeight, clustering=clustering), w, partition, portions)


def build_incremental(
    name: str, quantizer: Callable[[Tensor, int], SLQWeight], w: int, partition: str, portions: Sequence[float]
) -> Method:
    """Return a `Method` that freezes clusters portion by portion. `quantizer` is the class of its weight quantizers."""
    accumulated = check_portions(portions)
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition}: must be one of {', '.join(PARTITIONS)}")
    # portions that give the same number of clusters form one stage
    stages = list({_portion_count(p, cluster_count(w)): p for p in accumulated}.values())

    def on_epoch(model: nn.Module, epoch: int, epochs: int, probe: Probe) -> None:
        if epoch in (0, *stage_borders(epochs, len(stages))):
            freeze_next(model, stages[stage(epoch, epochs, len(stages))], partition, probe)

    return Method(
        name=name,
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        weight=factory_for(w, lambda name, layer, bits: quantizer(layer.weight.detach(), bits)),
        phases=(lambda epochs: stage_borders(epochs, len(stages))) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
        step=optimizer_step if w < FLOAT else None,
    )
