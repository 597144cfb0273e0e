"""ESLQ: SLQ in which each centroid is replaced by the nearest power of two.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018, arXiv 1803.03289. ESLQ is the extended SLQ of this paper. The authors'
    released code does not contain ESLQ. We remember from the paper that ESLQ replaces centroids by
    powers of two. We have not verified this fact.

Idea
    SLQ clusters the weights. INQ uses powers of two as levels, so that shifts replace
    multiplications. ESLQ combines both ideas: it sets all weights of a cluster to the power of two
    nearest to the cluster's centroid.

Forward
    Clusters are found as in SLQ. The weights of a cluster are then set to the level nearest to the
    cluster's centroid c. The levels are 0, +-2^n2, ..., +-2^n1. If c is halfway between two levels,
    the level with the larger magnitude is taken. n1 = floor(log2(4 max|c| / 3)), n2 = n1 + 1 -
    2^(b-1) / 2.

Backward
    Free weights get their gradient dL/dw. Frozen weights get no gradient.

Schedule
    The schedule is the same as in SLQ.

Sites
    weight.

State
    The state of SLQ, and n1 (int scalar): the largest exponent, set by the first clustering.

Bits
    w 2-8 or 32, a and g 32; by default w5a32g32. With b bits, there are at most 2^(b-1) + 1 levels.

Protocol
    Only the protocol of SLQ is known.

Choices
    The sources do not state the range of exponents. qbench uses INQ's formula with max|c|, the
    largest magnitude of the centroids, in place of max|w|. This ensures that some level is near the
    largest centroid. With max|w| and 2 bits, 0 could be the nearest level of every centroid, and
    all weights of the layer would become 0.
    If two clusters have the same nearest level, they become one cluster. A layer therefore usually
    has fewer levels than in INQ. Portions are fractions of the number of levels that the layer
    uses. If the nearest level of a cluster is already frozen, the cluster is frozen too. Losses and
    distances are measured with the levels, not with the centroids.
    partition, portions: see the method slq.

Deviations
    By default, the first and last layers stay float (`layers.first`, `layers.last`). To quantize
    both layers, type layers.first=same layers.last=same.

Results
    docs/results.md (digits).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.methods import slq
from qbench.methods.inq import largest_exponent, levels_from_exponent, round_to_levels
from qbench.quant.method import Method
from qbench.quant.quantizer import Storage


class ESLQWeight(slq.SLQWeight):
    """Quantizer of one layer's weights. Each frozen weight is the level nearest to the centroid of its cluster."""

    n1: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.register_buffer("n1", torch.tensor(0))

    def shared_values(self, centroids: Tensor) -> Tensor:
        """Return the level nearest to each centroid, a power of two or 0. The first call sets the largest exponent."""
        if not self.settled.any():
            self.n1.fill_(largest_exponent(centroids))
        return round_to_levels(centroids, levels_from_exponent(int(self.n1), self.bits).to(centroids))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of the exponent, which takes one byte."""
        return Storage(w.numel(), self.bits, 1)


def build(*, w: int = 5, partition: str = "probe", portions: Sequence[float] = slq.PORTIONS) -> Method:
    """Return the `Method` for ESLQ, which has the options of SLQ."""
    return slq.build_incremental("eslq", ESLQWeight, w, partition, portions)
