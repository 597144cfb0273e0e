"""ESLQ: SLQ with its centroids moved to powers of two.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level Quantization", AAAI
    2018, arXiv 1803.03289: the extended SLQ. It is not in the authors' released code; that centroids become powers of
    two is from memory of the paper.

Idea
    SLQ finds clusters that fit the weights, INQ multiplies by shifts: share each cluster at the power of two next to
    its centroid.

Forward
    As SLQ's, with every centroid c moved to the nearest of 0, +-2^n2, ..., +-2^n1 before it is shared, half way up in
    magnitude; n1 = floor(log2(4 max|c| / 3)), n2 = n1 + 1 - 2^(b-1) / 2.

Backward
    dL/dw of free weights; none of frozen ones.

Schedule
    As SLQ's.

Sites
    weight.

State
    SLQ's, and n1 (int scalar): the largest exponent, set by the first clustering.

Bits
    w 2-8 or 32 for at most 2^(b-1) + 1 levels; a and g 32; by default w5a32g32.

Protocol
    Not known apart from SLQ's.

Choices
    The sources give no range of exponents. It is INQ's, of the largest centroid in place of the largest weight: that
    one has a level then, while from max|w| at 2 bits all centroids can move to 0 and the layer is gone.
    Two centroids may move to the same level and are one cluster from then on, so that a layer mostly has fewer levels
    than in INQ; portions count the levels there are. A cluster that moves to a frozen level is absorbed. Losses and
    distances are measured at the power of two.
    partition, portions: as in SLQ.

Deviations
    First and last layer stay float by the layer policy (layers.first=same layers.last=same).

Results
    README (digits).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.methods import slq
from qbench.methods.inq import largest_exponent, levels_from, snapped
from qbench.quant.method import Method
from qbench.quant.quantizer import Storage


class ESLQWeight(slq.SLQWeight):
    """A layer's weights, part of them powers of two next to centroids."""

    n1: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.register_buffer("n1", torch.tensor(0))

    def codes(self, centroids: Tensor) -> Tensor:
        """Return the nearest level of each centroid."""
        if not self.settled.any():
            self.n1.fill_(largest_exponent(centroids))
        return snapped(centroids, levels_from(int(self.n1), self.bits).to(centroids))

    def bytes(self, w: Tensor) -> Storage:
        """Codes and the exponent."""
        return Storage(w.numel(), self.bits, 1)


def build(*, w: int = 5, partition: str = "probe", portions: Sequence[float] = slq.PORTIONS) -> Method:
    """Return ESLQ; see SLQ for its keys."""
    return slq.incremental("eslq", ESLQWeight, w, partition, portions)
