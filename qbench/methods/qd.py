"""Quantized distillation: weights on uniform levels, scaled bucket by bucket, trained on a teacher's outputs.

Paper
    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018,
    arXiv 1802.05668, algorithm 1. Authors' code: antspy/quantized_distillation (PyTorch 0.3).

Idea
    A small quantized network learns more from the outputs of a float teacher than from labels
    alone. Weights are scaled in short groups (buckets), so that an outlier spoils the levels of its
    own bucket only.

Forward
    The flattened tensor is cut into buckets of k elements, across channels. The last bucket is
    padded with its last element. A tensor shorter than k is one bucket. For each bucket v, beta =
    min v, alpha = max v - min v (1 if below 1e-10) and x = (v - beta) / alpha. With s = 2^b levels
    including both ends, w_hat = alpha round(x (s - 1)) / (s - 1) + beta. Stochastic rounding of y =
    x (s - 1) returns floor(y) + 1 with probability y - floor(y), else floor(y).

Backward
    dL/dw = dL/dw_hat. L = 0.7 T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + 0.3 CE(labels), T = 2,
    with z_t and z_s the logits of teacher and student.

Schedule
    One phase.

Sites
    weight. The option `distill` sets the loss; by default the teacher is the float baseline.

State
    None.

Bits
    w 1-8 or 32, a and g 32; by default w4a32g32. b bits mean 2^b levels per bucket.

Protocol
    CIFAR-10, authors' code: plain convolutional students are trained from random weights for 200
    epochs. The optimizer is SGD with Nesterov momentum 0.9, weight decay 2.2e-4 and batch size 25.
    The learning rate starts at 0.001 and is halved after 10 epochs without a better test error.
    Widths are 2, 4 and 8 bits, k = 256, with deterministic rounding. CIFAR-100: wide ResNets; the
    learning rate starts at 0.1 and is multiplied by 0.2 after 60, 120 and 160 of 200 epochs.

Choices
    bucket: the number k, by default 256 as in the paper. 0 makes the whole tensor one bucket (the
    paper's "no bucketing").
    stochastic: `false`, as in the authors' experiments, rounds to nearest. `true` rounds
    stochastically in training, and to nearest in evaluation.
    trained: `false` (with distill=none) rounds the weights of the float baseline and trains
    nothing. This is the paper's control.
    Values are rounded to nearest with ties to even, as in the authors' code.
    KL is summed over classes and averaged over the batch. The authors' code also averages over
    classes, so there the weight of KL is 0.7 T^2 / classes; distill.average=classes does so here.
    (From memory, this is the default of the authors' version of PyTorch.)
    The authors' code has two options that its experiments do not use: a gradient through minimum
    and maximum, and clipping of gradients at |w| > 1. They are left out here.

Deviations
    Only the weights of convolutions and linear layers are quantized, as chosen by the layer policy.
    The authors quantize every parameter, including biases and batch normalization.
    Training starts from the float baseline. With init=scratch it starts from random weights, as the
    authors do. The teacher is as large as the student unless `distill` names another run.
    Stored bytes include the codes and two floats per bucket. The paper computes its sizes with
    Huffman codes (`huffman_bits`).

Results
    docs/results.md (digits).
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import stochastic_round
from qbench.quant.method import Method, Requires
from qbench.quant.ops import in_float32, levels_k, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

# Shapes: B buckets, K elements of a bucket, L levels.

MIN_RANGE = 1e-10
"""A bucket with a smaller range is treated as constant, and its alpha is 1."""


@in_float32
def quantize_bucketed(
    w: Tensor,
    bits: int,
    bucket_size: int | None = 256,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Quantize weights (any shape) to 2^bits uniform levels between the extremes of each bucket.

    Args:
        bits: 1 or more.
        bucket_size: number of consecutive elements of the flattened tensor that share a scale.
            With 0 or None, all elements share one.
        stochastic: whether to round at random, so that the mean result is w. Otherwise values are
            rounded to nearest, with ties to even.
        generator: source of the random numbers, by default torch's global generator.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: must be 1 or more")
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    # y = x (s - 1): scaled to 0 ... 2^bits - 1
    steps = float(2**bits - 1)
    y = (v_BK - beta) / alpha * steps
    code = stochastic_round(y, generator) if stochastic else y.round()
    return straight_through(w, from_buckets(code / steps * alpha + beta, w))


def in_buckets(w: Tensor, bucket_size: int | None) -> Tensor:
    """Return the flattened tensor as rows (B, K). The last row is padded with the last element.

    A tensor shorter than a bucket becomes a single row without padding.
    """
    if bucket_size is not None and bucket_size < 0:
        raise ValueError(f"bucket_size={bucket_size}: must be 1 or more, or 0 for the whole tensor")
    flat = w.reshape(-1)
    size = min(bucket_size or flat.numel(), flat.numel())
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % size)]).view(-1, size)


def from_buckets(v_BK: Tensor, like: Tensor) -> Tensor:
    """Return the rows (B, K) as a tensor of the shape of `like`, without the padding."""
    return v_BK.reshape(-1)[: like.numel()].view(like.shape)


def bucket_scale(v_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each bucket's range alpha (1 for a constant bucket) and minimum beta, both of shape (B, 1)."""
    beta, top = v_BK.aminmax(dim=1, keepdim=True)
    alpha = top - beta
    return torch.where(alpha < MIN_RANGE, torch.ones_like(alpha), alpha), beta


def bucketed_grid(w: Tensor, points_L: Tensor, bucket_size: int | None) -> Grid:
    """Return the grid with one group per bucket of w, the points (L,) scaled by the bucket's alpha and beta."""
    alpha, beta = bucket_scale(in_buckets(w.detach(), bucket_size))
    return Grid((points_L * alpha + beta).unsqueeze(-1), lambda t: in_buckets(t, bucket_size).unsqueeze(-1))


def scale_bytes(w: Tensor, bucket_size: int | None) -> int:
    """Return the bytes of alpha and beta of all buckets of w, 8 per bucket."""
    return 8 * len(in_buckets(w, bucket_size))


def compression_ratio(bits: int, bucket_size: int = 256, float_bits: int = 32) -> float:
    """Return the size of float weights, divided by the size of codes and two floats per bucket: k f / (k b + 2 f)."""
    return bucket_size * float_bits / (bucket_size * bits + 2 * float_bits)


def huffman_bits(counts: Iterable[int]) -> float:
    """Return the mean length in bits of a Huffman code for symbols with these counts (0 for one symbol)."""
    heap = [count for count in counts if count]
    total, bits = sum(heap), 0
    heapify(heap)
    while len(heap) > 1:
        # merge the two rarest nodes, which adds one bit to each symbol below them
        merged = heappop(heap) + heap[0]
        heapreplace(heap, merged)
        bits += merged
    return bits / total


class QDWeight(Quantizer):
    """Quantizer of one layer's weights to uniform levels in buckets."""

    def __init__(self, bits: int, bucket: int, stochastic: bool) -> None:
        super().__init__()
        self.bits, self.bucket, self.stochastic = bits, bucket, stochastic

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights. Stochastic rounding is used only in training."""
        return quantize_bucketed(w, self.bits, self.bucket, self.stochastic and self.training)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group per bucket."""
        return bucketed_grid(w, levels_k(self.bits, w), self.bucket)

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage of the codes and of alpha and beta of every bucket."""
        return Storage(w.numel(), self.bits, scale_bytes(w, self.bucket))


def check_bucket(bucket: int) -> None:
    """Raise `ValueError` if the bucket size is negative, 1 or 2. Sizes 1 and 2 would quantize nothing."""
    if bucket < 0 or bucket in (1, 2):
        raise ValueError(f"bucket={bucket}: must be 3 or more, or 0 for one bucket per tensor")


def build(*, w: int = 4, bucket: int = 256, stochastic: bool = False, trained: bool = True) -> Method:
    """Return quantized distillation. The method card explains the options."""
    check_bucket(bucket)
    return Method(
        name="qd",
        bits=Bits(w),
        supported_bits={"w": (*range(1, 9), FLOAT)},
        requires=Requires(teacher=trained),
        weight=lambda name, layer, bits: QDWeight(bits, bucket, stochastic),
        needs_training=trained,
    )
