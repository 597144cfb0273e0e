"""Quantized distillation: a network with quantized weights is trained on the outputs of a float teacher.

Paper
    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018,
    arXiv 1802.05668, algorithm 1. Authors' code: antspy/quantized_distillation (PyTorch 0.3).

Idea
    A small quantized network learns more from labels and the outputs of a float teacher than from
    labels alone. Weights are scaled in short groups (buckets). An outlier therefore affects only
    the levels of its own bucket.

Forward
    The flattened tensor is cut into buckets of k elements, across channels. The last bucket is
    padded with its last element. A tensor shorter than k is one bucket. For each bucket v, beta =
    min v, alpha = max v - min v (1 if the difference is below 1e-10) and x = (v - beta) / alpha. x
    is rounded to one of s = 2^b levels from 0 to 1: w_hat = alpha round(x (s - 1)) / (s - 1) +
    beta. Stochastic rounding of y = x (s - 1) returns floor(y) + 1 with probability y - floor(y),
    else floor(y).

Backward
    dL/dw = dL/dw_hat. L = 0.7 T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + 0.3 CE(labels), T = 2,
    where z_t are the logits of the teacher and z_s are the logits of the student.

Schedule
    Training has one phase.

Sites
    weight. The configuration group `distill` sets the loss and the teacher. By default, the teacher
    is the float baseline.

State
    None.

Bits
    w 1-8 or 32, a and g 32; by default w4a32g32. With b bits, a bucket has 2^b levels.

Protocol
    For CIFAR-10, the students in the authors' code are convolutional networks without shortcuts.
    They are trained from random weights for 200 epochs. The optimizer is SGD with Nesterov momentum
    0.9, weight decay 2.2e-4 and batch size 25. The learning rate starts at 0.001 and is halved
    after 10 epochs without a lower test error. Weights have 2, 4 or 8 bits, k is 256, and rounding
    is deterministic. For CIFAR-100, the networks are wide ResNets. The learning rate starts at 0.1
    and is multiplied by 0.2 after 60, 120 and 160 of 200 epochs.

Choices
    bucket: the number k, by default 256 as in the paper. With 0, the whole tensor is one bucket
    (the paper's "no bucketing").
    stochastic: `false`, as in the authors' experiments, rounds to nearest. `true` rounds
    stochastically in training, and to nearest in evaluation.
    trained: `true` (default) trains the network. `false` (with distill=none) rounds the weights of
    the float baseline and trains nothing. `false` is the paper's control.
    Values are rounded to nearest with ties to even, as in the authors' code.
    The KL divergence is summed over classes and averaged over the batch. The authors' code also
    averages over classes, so its factor on KL is 0.7 T^2 / classes. To average as the authors do,
    type distill.average=classes. (From memory: averaging over classes was the default in the
    authors' version of PyTorch.)
    The authors' code has two options that qbench leaves out: a gradient through minimum and
    maximum, and clipping of gradients at |w| > 1. The authors' experiments do not use these
    options.

Deviations
    qbench quantizes only the weights of convolutions and linear layers. The layer policy (`layers`)
    decides which of these layers are quantized. The authors quantize every parameter, including
    biases and batch normalization.
    By default, training starts from the float baseline. The authors start from random weights
    (init=scratch). By default, the teacher is as large as the student. `distill.teacher` can name a
    larger network.
    Stored bytes include the codes and two floats per bucket. The sizes in the paper are for Huffman
    codes (`huffman_bits`).

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
    """Quantize weights (any shape) to 2^bits equally spaced levels between the minimum and maximum of each bucket.

    Args:
        bits: 1 or more.
        bucket_size: number of consecutive elements of the flattened tensor that share a scale.
            With 0 or None, all elements share one scale.
        stochastic: true rounds at random, so that the mean of the result is w. False rounds to
            nearest, with ties to even.
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
    """Return the flattened tensor as rows (B, K), one bucket per row. The last row is padded with the last element.

    A tensor shorter than a bucket becomes a single row without padding.
    """
    if bucket_size is not None and bucket_size < 0:
        raise ValueError(f"bucket_size={bucket_size}: must be 1 or more, or 0 for the whole tensor")
    flat = w.reshape(-1)
    size = min(bucket_size or flat.numel(), flat.numel())
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % size)]).view(-1, size)


def from_buckets(v_BK: Tensor, like: Tensor) -> Tensor:
    """Return the rows (B, K) as a tensor with the shape of `like`, without the padding."""
    return v_BK.reshape(-1)[: like.numel()].view(like.shape)


def bucket_scale(v_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range alpha (B, 1) and the minimum beta (B, 1) of each bucket. Alpha of a constant bucket is 1."""
    beta, top = v_BK.aminmax(dim=1, keepdim=True)
    alpha = top - beta
    return torch.where(alpha < MIN_RANGE, torch.ones_like(alpha), alpha), beta


def bucketed_grid(w: Tensor, points_L: Tensor, bucket_size: int | None) -> Grid:
    """Return the allowed values: alpha times the points (L,), plus beta. Each bucket of w is one scale group."""
    alpha, beta = bucket_scale(in_buckets(w.detach(), bucket_size))
    return Grid((points_L * alpha + beta).unsqueeze(-1), lambda t: in_buckets(t, bucket_size).unsqueeze(-1))


def scale_bytes(w: Tensor, bucket_size: int | None) -> int:
    """Return the number of bytes that alpha and beta of all buckets of w need: 8 per bucket."""
    return 8 * len(in_buckets(w, bucket_size))


def compression_ratio(bits: int, bucket_size: int = 256, float_bits: int = 32) -> float:
    """Return k f / (k b + 2 f), with b = `bits`, k = `bucket_size` and f = `float_bits`.

    The numerator is the size of k float weights. The denominator is the size of k codes and two floats.
    """
    return bucket_size * float_bits / (bucket_size * bits + 2 * float_bits)


def huffman_bits(counts: Iterable[int]) -> float:
    """Return the mean number of bits per symbol in a Huffman code for these counts, or 0 for a single symbol."""
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
    """Quantizer of one layer's weights, with equally spaced levels in each bucket."""

    def __init__(self, bits: int, bucket: int, stochastic: bool) -> None:
        super().__init__()
        self.bits, self.bucket, self.stochastic = bits, bucket, stochastic

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights. Stochastic rounding is used only in training."""
        return quantize_bucketed(w, self.bits, self.bucket, self.stochastic and self.training)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values, with one scale group per bucket."""
        return bucketed_grid(w, levels_k(self.bits, w), self.bucket)

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of alpha and beta of every bucket."""
        return Storage(w.numel(), self.bits, scale_bytes(w, self.bucket))


def check_bucket(bucket: int) -> None:
    """Raise `ValueError` if the bucket size is negative, 1 or 2. With sizes 1 and 2, no weight would change."""
    if bucket < 0 or bucket in (1, 2):
        raise ValueError(f"bucket={bucket}: must be 3 or more, or 0 for one bucket per tensor")


def build(*, w: int = 4, bucket: int = 256, stochastic: bool = False, trained: bool = True) -> Method:
    """Return the `Method` for quantized distillation. The method card (module docstring) explains the options."""
    check_bucket(bucket)
    return Method(
        name="qd",
        bits=Bits(w),
        supported_bits={"w": (*range(1, 9), FLOAT)},
        requires=Requires(teacher=trained),
        weight=lambda name, layer, bits: QDWeight(bits, bucket, stochastic),
        needs_training=trained,
    )
