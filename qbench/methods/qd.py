"""Quantized distillation: weights on even levels in buckets, trained on a teacher's outputs.

Paper
    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668,
    algorithm 1. Authors' code: antspy/quantized_distillation (PyTorch 0.3).

Idea
    A network that is small and quantized learns more from a float teacher's outputs than from labels alone; and a scale
    for each short run of weights keeps an outlier from spoiling the levels of all the others.

Forward
    The flattened tensor is cut into buckets of k elements, across channels; the last one is filled up with its last
    element, a tensor shorter than k is one bucket. Per bucket beta = min v, alpha = max v - min v (1 if below 1e-10),
    x = (v - beta) / alpha, s = 2^b levels with both ends: w_hat = alpha round(x (s - 1)) / (s - 1) + beta. Stochastic:
    floor(y) plus 1 with probability y - floor(y), for y = x (s - 1).

Backward
    dL/dw = dL/dw_hat. L = 0.7 T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + 0.3 CE(labels), T = 2, z_t and z_s the
    logits of teacher and student.

Schedule
    One phase.

Sites
    weight. The loss is that of `distill`, which by default distills from the float parent.

State
    None.

Bits
    w 1-8 or 32 for 2^b levels a bucket, a and g 32; by default w4a32g32.

Protocol
    CIFAR-10, authors' code: plain convolutional students; SGD with Nesterov momentum 0.9 at 0.001, decay 2.2e-4, batch
    25, 200 epochs, the rate halved after 10 epochs without a better test error; 2, 4 and 8 bits, k = 256, rounding
    deterministic, from random weights. CIFAR-100: wide ResNets, 0.1 times 0.2 after 60, 120 and 160 of 200 epochs.

Choices
    bucket: k, 256 as in the paper; 0 takes a tensor as one bucket (the paper's "no bucketing").
    stochastic: false as in the authors' experiments; true draws in training only, evaluation rounds.
    trained: false rounds the parent's weights afterwards and trains nothing, the paper's control (with distill=none).
    Half way goes to the even level, as the authors' round does.
    KL is the mean over the batch of the sum over classes. The authors' code takes the mean over classes too (default
    of its PyTorch version, from memory): per sample its weight is 0.7 T^2 / classes.
    Kept out: their gradient through minimum and maximum, and clipping of gradients at |w| > 1; both unused by them.

Deviations
    Convolutions and linear layers by the layer policy; the authors quantize every parameter, biases and batch
    normalization among them. Starts from the float parent (init=scratch starts as they do), and the parent is as
    large as the student unless `distill` names another run.
    Bytes are codes and two floats a bucket; the paper's sizes count Huffman codes (`huffman_bits`).

Results
    README (digits).
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

# Shapes: B buckets, K elements of one, L levels.

CONSTANT = 1e-10
"""A bucket whose values differ by less is constant: its alpha is 1."""


@in_float32
def quantize_bucketed(
    w: Tensor,
    bits: int,
    bucket_size: int | None = 256,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Quantize weights (any shape) to 2^bits even levels from minimum to maximum of each bucket.

    Args:
        bits: 1 or more.
        bucket_size: elements of the flattened tensor that share a scale; 0 or None is all of them.
        stochastic: round up or down at random, so that the mean is w.
        generator: of the random numbers; torch's global one by default.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: allowed is 1 or more")
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    steps = float(2**bits - 1)
    y = (v_BK - beta) / alpha * steps
    code = stochastic_round(y, generator) if stochastic else y.round()
    return straight_through(w, from_buckets(code / steps * alpha + beta, w))


def in_buckets(w: Tensor, bucket_size: int | None) -> Tensor:
    """Return the flattened tensor in rows (B, K), the last one filled up with its last element.

    A tensor shorter than a bucket is one row of its own length.
    """
    if bucket_size is not None and bucket_size < 0:
        raise ValueError(f"bucket_size={bucket_size}: allowed is 1 or more, 0 for the whole tensor")
    flat = w.reshape(-1)
    size = min(bucket_size or flat.numel(), flat.numel())
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % size)]).view(-1, size)


def from_buckets(v_BK: Tensor, like: Tensor) -> Tensor:
    """Return rows as a tensor of `like`'s shape, without what they were filled up with."""
    return v_BK.reshape(-1)[: like.numel()].view(like.shape)


def bucket_scale(v_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha, the range of a bucket's values or 1 where they are constant, and beta, the least; (B, 1) each."""
    beta, top = v_BK.aminmax(dim=1, keepdim=True)
    alpha = top - beta
    return torch.where(alpha < CONSTANT, torch.ones_like(alpha), alpha), beta


def bucketed_grid(w: Tensor, points_L: Tensor, bucket_size: int | None) -> Grid:
    """Return the grid of scaled points, a group per bucket of w."""
    alpha, beta = bucket_scale(in_buckets(w.detach(), bucket_size))
    return Grid((points_L * alpha + beta).unsqueeze(-1), lambda t: in_buckets(t, bucket_size).unsqueeze(-1))


def scale_bytes(w: Tensor, bucket_size: int | None) -> int:
    """Return the bytes of alpha and beta of all buckets of w."""
    return 8 * len(in_buckets(w, bucket_size))


def compression_ratio(bits: int, bucket_size: int = 256, float_bits: int = 32) -> float:
    """Return how many times smaller codes and two floats a bucket are than floats: k f / (k b + 2 f)."""
    return bucket_size * float_bits / (bucket_size * bits + 2 * float_bits)


def huffman_bits(counts: Iterable[int]) -> float:
    """Return the mean length of a Huffman code, given how often each symbol occurs; 0 where only one does."""
    heap = [count for count in counts if count]
    total, bits = sum(heap), 0
    heapify(heap)
    while len(heap) > 1:
        joined = heappop(heap) + heap[0]
        heapreplace(heap, joined)
        bits += joined
    return bits / total


class QDWeight(Quantizer):
    """A layer's weights on even levels, bucket by bucket."""

    def __init__(self, bits: int, bucket: int, stochastic: bool) -> None:
        super().__init__()
        self.bits, self.bucket, self.stochastic = bits, bucket, stochastic

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights; only training draws."""
        return quantize_bucketed(w, self.bits, self.bucket, self.stochastic and self.training)

    def grid(self, w: Tensor) -> Grid:
        """One group per bucket."""
        return bucketed_grid(w, levels_k(self.bits, w), self.bucket)

    def bytes(self, w: Tensor) -> Storage:
        """Codes, and alpha and beta of every bucket."""
        return Storage(w.numel(), self.bits, scale_bytes(w, self.bucket))


def check_bucket(bucket: int) -> None:
    """Refuse buckets of negative size, and of one or two elements, which quantize nothing."""
    if bucket < 0 or bucket in (1, 2):
        raise ValueError(f"bucket={bucket}: allowed are 3 or more, and 0 for one bucket a tensor")


def build(*, w: int = 4, bucket: int = 256, stochastic: bool = False, trained: bool = True) -> Method:
    """Return quantized distillation; bucket=0 gives every tensor a single scale, trained=false rounds afterwards."""
    check_bucket(bucket)
    return Method(
        name="qd",
        bits=Bits(w),
        supported_bits={"w": (*range(1, 9), FLOAT)},
        requires=Requires(teacher=trained),
        weight=lambda name, layer, bits: QDWeight(bits, bucket, stochastic),
        needs_training=trained,
    )
