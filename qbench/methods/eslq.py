"""ESLQ: SLQ with centroids moved to powers of two.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018, arXiv 1803.03289: the extended SLQ. The authors' released code does
    not contain ESLQ. The statement that centroids become powers of two is from memory of the paper.

Idea
    SLQ finds clusters that fit the weights. INQ uses powers of two, which replace multiplications
    by shifts. ESLQ combines both ideas: all weights of a cluster take the power of two that is
    nearest to the cluster's centroid.

Forward
    As in SLQ, but the weights of a cluster do not get the value of its centroid c. They get the
    value nearest to c among 0, +-2^n2, ..., +-2^n1. Ties go to the larger magnitude. n1 =
    floor(log2(4 max|c| / 3)), n2 = n1 + 1 - 2^(b-1) / 2.

Backward
    dL/dw for free weights; no gradient for frozen ones.

Schedule
    As in SLQ.

Sites
    weight.

State
    The state of SLQ. In addition, n1 (int scalar): the largest exponent, set by the first
    clustering.

Bits
    w 2-8 or 32, a and g 32; by default w5a32g32. A width b gives at most 2^(b-1) + 1 levels.

Protocol
    Only the protocol of SLQ is known.

Choices
    The sources do not state the range of exponents. Here INQ's formula is used, but with the
    largest centroid in place of the largest weight. So there is always a level near the largest
    centroid. With a range computed from max|w|, all centroids of a layer could move to 0 at 2 bits,
    and all its weights would become 0.
    Two centroids that move to the same level become one cluster. A layer therefore usually has
    fewer levels than in INQ. Portions are fractions of the levels that the layer really has. A
    cluster that moves to a level that is already frozen is frozen too. Losses and distances are
    measured after the move to powers of two.
    partition, portions: as in SLQ.

Deviations
    The first and last layers stay float, following the layer policy. layers.first=same
    layers.last=same quantizes both.

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
    """Quantizer of one layer's weights. Each frozen weight is the power of two nearest to its centroid."""

    n1: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.register_buffer("n1", torch.tensor(0))

    def shared_values(self, centroids: Tensor) -> Tensor:
        """Return, for each centroid, the nearest power of two or 0. The first call sets the exponent."""
        if not self.settled.any():
            self.n1.fill_(largest_exponent(centroids))
        return round_to_levels(centroids, levels_from_exponent(int(self.n1), self.bits).to(centroids))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage of the codes and of one byte for the exponent."""
        return Storage(w.numel(), self.bits, 1)


def build(*, w: int = 5, partition: str = "probe", portions: Sequence[float] = slq.PORTIONS) -> Method:
    """Return ESLQ, which has the options of SLQ."""
    return slq.build_incremental("eslq", ESLQWeight, w, partition, portions)
