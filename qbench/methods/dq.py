"""Differentiable quantization: the quantization points are trained, and the weights stay fixed.

Paper
    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018,
    arXiv 1802.05668, algorithm 2. Authors' code: antspy/quantized_distillation (PyTorch 0.3).

Idea
    The output of a quantized network is a differentiable function of its quantization points. The
    points can therefore be trained by gradient descent. A layer gets more points if the gradient of
    its weights is larger.

Forward
    As in the method qd, the flattened tensor is cut into buckets of k elements. Each bucket has a
    minimum beta and a range alpha (maximum minus minimum). A weight w of the bucket is scaled to x
    = (w - beta) / alpha in [0, 1]. All buckets of a layer share the layer's points p_1 <= ... <=
    p_m. w_hat = alpha p_i + beta, where p_i is the point nearest to x. If x is halfway between two
    points, the upper point is taken.

Backward
    dL/dp_i is the sum of alpha_j dL/dw_hat_j over all weights j that are assigned to p_i, where
    alpha_j is the range of the bucket of weight j. Weights get no gradient.
    The gradient treats the assignment of weights to points as constant, although this assignment
    changes when a point moves. With few points and buckets of large range, a step can therefore
    increase the loss.
    L = 0.7 T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + 0.3 CE(labels), T = 2, where z_t are the
    logits of the teacher and z_s are the logits of the quantized network. By default, the teacher
    is the float baseline, which is the same network before quantization.

Schedule
    Training has one phase and starts from a float network. Points are sorted after every step.

Sites
    weight. The configuration group `distill` sets the loss and the teacher.

State
    points (4 * 2^b floats): the points of a layer on the scale of x, in ascending order. Unused
    entries repeat the last point.
    count (integer scalar): the number of points in use.

Bits
    w 2-8 or 32, a and g 32; by default w4a32g32. With b bits, a layer has 2^b points on average.

Protocol
    CIFAR-10, authors' code: training starts from the distilled float student. Only the points are
    trained, by SGD with Nesterov momentum 0.9, learning rate 1e-6 and batch size 25. Training takes
    10 epochs with 4 bits, and 20 epochs with 2 bits. For CIFAR-100, the learning rate is 1e-4, and
    training takes 20 epochs. The authors have no run with 8 bits.

Choices
    initial: the initial points. `quantiles` takes the percentiles linspace(0, 100, m) of the scaled
    weights. `uniform` spaces the points evenly, as in the paper's ablation.
    allocation: `gradient` or `even`. `even` gives every layer 2^b points. `gradient` distributes
    the same total number of points, 2^b times the number of layers. First, every layer gets 2^b / 2
    points. Then the remaining points are distributed in proportion to the 2-norm of each layer's
    dL/dw in the float network. The number of points of each layer is rounded to an integer. If the
    sum of these integers is below the total, the missing points are added one at a time, each to
    the layer with the fewest points at that moment. If the sum is above the total, points are
    removed one at a time, each from the layer with the most points at that moment. (The authors'
    code adds or removes all of these points in a single layer.) In qbench, a layer has at most 4 *
    2^b points. The authors set no such limit. Points are distributed only among layers with the
    same bits.w.
    For the allocation, dL/dw is the gradient of the cross entropy on 256 training images (the
    probe), in evaluation mode. The authors average the gradients of five minibatches.
    As in the authors' code, the points are sorted after a step, and the optimizer's momentum is not
    sorted. If two points swap places, each of them therefore continues with the other point's
    momentum.
    Points are trained at the learning rate of the recipe. The authors use small learning rates with
    SGD, because the gradient of a point is a sum over thousands of weights. Adam rescales this sum
    and does not need such small learning rates. A trained point may be outside [0, 1].
    bucket: the number k, by default 256 as in the paper. With 0, the whole tensor is one bucket.
    The KL divergence is averaged as in the method qd.

Deviations
    qbench quantizes only the weights of convolutions and linear layers. The layer policy (`layers`)
    decides which of these layers are quantized. The authors quantize every parameter, including
    biases and batch normalization.
    As in the authors' code, only the parameters of quantizers are trained. All other parameters are
    frozen from the start, but the running statistics of batch normalization are still updated.
    Stored bytes include ceil(log2 m) bits per code, two floats per bucket, and 4 bytes per point.
    The authors' sizes do not include the points.

Results
    docs/results.md (digits).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods.qd import bucket_scale, bucketed_grid, check_bucket, from_buckets, in_buckets, scale_bytes
from qbench.quant.layers import QLayer, float_mode, is_quantizer_key, quantized_layers
from qbench.quant.method import Method, Requires
from qbench.quant.ops import in_float32
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Quantizer, Storage

INITIALS, ALLOCATIONS = ("quantiles", "uniform"), ("gradient", "even")
CAPACITY = 4
"""Maximum number of points of a layer, as a multiple of 2^bits."""


@in_float32
def quantize_to_points(w: Tensor, points: Tensor, bucket_size: int | None = 256) -> Tensor:
    """Scale each bucket of weights (any shape) to [0, 1], round to the nearest of `points` (m,), and scale back.

    Only the points get a gradient.

    Args:
        points: quantization points for the scaled weights, in ascending order. An infinite point is
            allowed, but no weight is rounded to it.
        bucket_size: number of consecutive elements of the flattened tensor that share a scale.
            With 0 or None, all elements share one scale.
    """
    # scale each bucket to [0, 1]
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    points = points.to(v_BK.dtype)
    # find the nearest point from the midpoints between neighbours; the index has no gradient
    edges = (points[1:] + points[:-1]).detach() / 2
    nearest = torch.bucketize((v_BK - beta) / alpha, edges, right=True)
    # the backward pass of indexing sums alpha times the gradient over the weights of each point
    return from_buckets(points[nearest] * alpha + beta, w)


@in_float32
def initial_points(w: Tensor, count: int, bucket_size: int | None = 256, initial: str = "quantiles") -> Tensor:
    """Return `count` ascending points in [0, 1], at quantiles of the scaled weights or equally spaced (`uniform`)."""
    evenly = torch.linspace(0, 1, count, dtype=w.dtype, device=w.device)
    if initial == "uniform":
        return evenly
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    ordered = from_buckets((v_BK - beta) / alpha, w).flatten().sort().values
    # linear interpolation by hand, since torch.quantile rejects large tensors
    position = evenly * (len(ordered) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)


def allocate_points(norms: Sequence[float], points: int, maximum: int | None = None) -> list[int]:
    """Return the number of points of each layer, computed from the gradient norms of the layers.

    Args:
        norms: 2-norm of the gradient of each layer's weights.
        points: average number of points per layer, 2 or more. Every layer gets half of this number.
            The remaining points are distributed in proportion to the norms.
        maximum: largest number of points of a layer, at least `points`. None means no limit.
    """
    total, base, sum_of_norms = points * len(norms), points // 2, sum(norms)
    if not sum_of_norms > 0:  # all zero, or NaN
        return [points] * len(norms)
    shared = total - base * len(norms)
    counts = [min(base + round(norm / sum_of_norms * shared), maximum or total) for norm in norms]
    # rounding and the maximum may have changed the sum: restore the total, one point at a time
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < total:
        counts[counts.index(min(counts))] += 1
    return counts


class DQWeight(Quantizer):
    """Quantizer that maps one layer's frozen weights to trained points."""

    count: Tensor

    def __init__(self, weight: Tensor, bits: int, bucket: int, initial: str) -> None:
        super().__init__()
        self.bucket, self.initial = bucket, initial
        self.points = nn.Parameter(weight.new_zeros(CAPACITY * 2**bits))
        self.register_buffer("count", torch.tensor(0))
        self.reset_points(weight, 2**bits)

    @torch.no_grad()
    def reset_points(self, w: Tensor, count: int) -> None:
        """Set the points to `count` initial points for the weights w."""
        points = initial_points(w, count, self.bucket, self.initial)
        self.points.copy_(torch.cat([points, points[-1:].expand(len(self.points) - count)]))
        self.count.fill_(count)

    @torch.no_grad()
    def sort_points(self) -> None:
        """Sort the points in use, and set the unused entries to the largest point."""
        ordered = self._used_points().sort().values
        unused = ordered.isinf()
        self.points.copy_(torch.where(unused, ordered.masked_fill(unused, -torch.inf).max(), ordered))

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_to_points(w, self._used_points(), self.bucket)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: alpha times the layer's points, plus beta. Each bucket is one scale group."""
        return bucketed_grid(w, self.points.detach()[: int(self.count)].to(w.dtype), self.bucket)

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes, the points, and alpha and beta of every bucket."""
        count = int(self.count)
        return Storage(w.numel(), (count - 1).bit_length(), 4 * count + scale_bytes(w, self.bucket))

    def report(self) -> dict[str, int]:
        """Return the number of points of the layer."""
        return {"points": int(self.count)}

    def _used_points(self) -> Tensor:
        """Return the points, with infinity in unused entries.

        The value of `count` stays on the device, so the CPU does not wait for a GPU.
        """
        rank = torch.arange(len(self.points), device=self.points.device)
        return torch.where(rank < self.count, self.points, torch.inf)


def _sites(model: nn.Module) -> dict[str, tuple[QLayer, DQWeight]]:
    layers = quantized_layers(model)
    return {name: (layer, layer.weight_q) for name, layer in layers.items() if isinstance(layer.weight_q, DQWeight)}


def allocate_and_freeze(model: nn.Module, probe: Probe, allocation: str) -> None:
    """Set the initial points of every layer, and freeze all parameters outside quantizers."""
    sites = _sites(model)
    if not sites:
        return
    norms: dict[str, float] = {}
    if allocation == "gradient":
        for layer, _ in sites.values():
            layer.weight.requires_grad_(True)  # the norm counts for layers that the network freezes, too
        with float_mode(model):
            gradients = probe.gradients(model)
        norms = {name: gradients[f"{name}.weight"].norm().item() for name in sites}
    for bits in {layer.bits.w for layer, _ in sites.values()}:
        same_width = {name: site for name, site in sites.items() if site[0].bits.w == bits}
        counts = allocate_points([norms.get(name, 1.0) for name in same_width], 2**bits, CAPACITY * 2**bits)
        for (layer, site), count in zip(same_width.values(), counts, strict=True):
            site.reset_points(layer.weight, count)
    for name, p in model.named_parameters():
        if not is_quantizer_key(name, model):
            p.requires_grad_(False)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, then sort the points."""
    optimizer.step()
    for _, site in _sites(model).values():
        site.sort_points()


def build(*, w: int = 4, bucket: int = 256, initial: str = "quantiles", allocation: str = "gradient") -> Method:
    """Return the `Method` for differentiable quantization. The method card (module docstring) explains the options."""
    check_bucket(bucket)
    if initial not in INITIALS:
        raise ValueError(f"initial={initial}: must be one of {', '.join(INITIALS)}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation={allocation}: must be one of {', '.join(ALLOCATIONS)}")
    return Method(
        name="dq",
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        requires=Requires(teacher=True),
        weight=lambda name, layer, bits: DQWeight(layer.weight.detach(), bits, bucket, initial),
        prepare=lambda model, probe: allocate_and_freeze(model, probe, allocation),
        step=optimizer_step,
    )
