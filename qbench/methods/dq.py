"""Differentiable quantization: the weights stay as they are, the values that they are rounded to are trained.

Paper
    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668,
    algorithm 2. Authors' code: antspy/quantized_distillation (PyTorch 0.3).

Idea
    A quantized network depends smoothly on where its quantization points lie: descend on these, and give more of them
    to the layers whose weights matter more.

Forward
    As in qd, weights are scaled to x in [0, 1] in buckets of k elements of the flattened tensor, with alpha and beta of
    each bucket. A layer's points p_1 <= ... <= p_m serve all its buckets: w_hat = alpha p_i + beta for the nearest p_i;
    half way the upper one.

Backward
    dL/dp_i = sum over weights j assigned to p_i of alpha(bucket of j) dL/dw_hat_j; none to the weights.
    Assignments count as given: that a moved point hands weights to its neighbour is not in the gradient, so that with
    few points and wide buckets a step can raise the loss.
    L = 0.7 T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + 0.3 CE(labels), T = 2, z_t and z_s the logits of the float
    network and of the quantized one: its teacher is the network itself before quantization, which is the parent.

Schedule
    One phase, from a float network. Points are sorted after every step.

Sites
    weight. The loss is that of `distill`, which by default distills from the float parent.

State
    points (4 2^b floats): scaled points of a layer, ascending, filled up with the last one; count (integer scalar): how
    many are used.

Bits
    w 2-8 or 32 for 2^b points a layer on average, a and g 32; by default w4a32g32.

Protocol
    CIFAR-10, authors' code: from the distilled float student; SGD with Nesterov momentum 0.9 on the points alone at
    1e-6, 10 epochs at 4 bits and 20 at 2, batch 25. CIFAR-100: 1e-4, 20 epochs. No run with 8 bits.

Choices
    initial: `quantiles` of the scaled weights, percentiles linspace(0, 100, m), or `uniform`, the paper's ablation.
    allocation: `gradient`: of all points, 2^b a layer, each layer has half its own; the other halves are shared in
    proportion to the 2-norm of dL/dw of the float network; or `even`, 2^b for all. What rounding leaves over or short
    goes to the layer with fewest, or comes from the one with most, a point at a time (the authors': all from or to one
    layer). A layer has 4 2^b points at most (theirs: no bound). Layers of unlike bits.w share among themselves.
    The gradient is that of cross entropy over the probe in evaluation mode; the authors average five minibatches.
    Sorting leaves the optimizer's momentum where it was, as in the authors' code: it belongs to ranks, not to points.
    Points take the recipe's learning rate: the authors' small ones are for plain gradients, which are sums over
    thousands of weights and which Adam rescales. They are not confined to [0, 1].
    bucket: k, 256 as in the paper; 0 takes a tensor as one bucket. KL's mean: as in qd.

Deviations
    Convolutions and linear layers by the layer policy; the authors quantize every parameter, biases and batch
    normalization among them. All parameters but quantizers' are frozen from the start, as theirs; batch
    normalization's running statistics go on moving, as theirs.
    Bytes charge the points, 4 each, beside ceil(log2 m) bits a code and two floats a bucket; theirs leave them out.

Results
    README (digits).
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
MOST = 4
"""Points that a layer may have, over 2^bits."""


@in_float32
def quantize_to_points(w: Tensor, points: Tensor, bucket_size: int | None = 256) -> Tensor:
    """Quantize weights (any shape) to the nearest of `points` (m,) within their buckets; the points get the gradient.

    Args:
        points: ascending, in the scale where a bucket's values reach from 0 to 1; infinite ones are never taken.
        bucket_size: elements of the flattened tensor that share a scale; 0 or None is all of them.
    """
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    points = points.to(v_BK.dtype)
    edges = (points[1:] + points[:-1]).detach() / 2
    nearest = torch.bucketize((v_BK - beta) / alpha, edges, right=True)
    return from_buckets(points[nearest] * alpha + beta, w)


@in_float32
def initial_points(w: Tensor, count: int, bucket_size: int | None = 256, initial: str = "quantiles") -> Tensor:
    """Return `count` points, ascending in [0, 1]: quantiles of the scaled weights, or evenly spaced ones (uniform)."""
    evenly = torch.linspace(0, 1, count, dtype=w.dtype, device=w.device)
    if initial == "uniform":
        return evenly
    v_BK = in_buckets(w.detach(), bucket_size)
    alpha, beta = bucket_scale(v_BK)
    ordered = from_buckets((v_BK - beta) / alpha, w).flatten().sort().values
    place = evenly * (len(ordered) - 1)  # torch.quantile refuses large tensors
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def allocate_points(norms: Sequence[float], points: int, most: int | None = None) -> list[int]:
    """Return how many points each layer gets, `points` on average, given the norms of their gradients.

    Args:
        points: 2 or more; half of them every layer keeps, the others are shared in proportion to the norms.
        most: of a single layer, at least `points`; None for no bound.
    """
    total, base, whole = points * len(norms), points // 2, sum(norms)
    if not whole > 0:
        return [points] * len(norms)
    shared = total - base * len(norms)
    counts = [min(base + round(norm / whole * shared), most or total) for norm in norms]
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < total:
        counts[counts.index(min(counts))] += 1
    return counts


class DQWeight(Quantizer):
    """A layer's weights, frozen, on trained points."""

    count: Tensor

    def __init__(self, weight: Tensor, bits: int, bucket: int, initial: str) -> None:
        super().__init__()
        self.bucket, self.initial = bucket, initial
        self.points = nn.Parameter(weight.new_zeros(MOST * 2**bits))
        self.register_buffer("count", torch.tensor(0))
        self.place(weight, 2**bits)

    @torch.no_grad()
    def place(self, w: Tensor, count: int) -> None:
        """Start anew with so many points."""
        points = initial_points(w, count, self.bucket, self.initial)
        self.points.copy_(torch.cat([points, points[-1:].expand(len(self.points) - count)]))
        self.count.fill_(count)

    @torch.no_grad()
    def sort(self) -> None:
        """Bring the points into order; the fill is the largest."""
        ordered = self._used().sort().values
        self.points.copy_(torch.where(ordered.isinf(), ordered.masked_fill(ordered.isinf(), -torch.inf).max(), ordered))

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_to_points(w, self._used(), self.bucket)

    def grid(self, w: Tensor) -> Grid:
        """One group per bucket, all with this layer's points."""
        return bucketed_grid(w, self.points.detach()[: int(self.count)].to(w.dtype), self.bucket)

    def bytes(self, w: Tensor) -> Storage:
        """Codes, the points, and alpha and beta of every bucket."""
        count = int(self.count)
        return Storage(w.numel(), (count - 1).bit_length(), 4 * count + scale_bytes(w, self.bucket))

    def report(self) -> dict[str, int]:
        """How many points the layer was given."""
        return {"points": int(self.count)}

    def _used(self) -> Tensor:
        """The points, with infinity in place of the fill; computed without waiting for a device."""
        rank = torch.arange(len(self.points), device=self.points.device)
        return torch.where(rank < self.count, self.points, torch.inf)


def _sites(model: nn.Module) -> dict[str, tuple[QLayer, DQWeight]]:
    layers = quantized_layers(model)
    return {name: (layer, layer.weight_q) for name, layer in layers.items() if isinstance(layer.weight_q, DQWeight)}


def share(model: nn.Module, probe: Probe, allocation: str) -> None:
    """Give every layer its points, and freeze all parameters that are no quantizer's."""
    sites = _sites(model)
    if not sites:
        return
    norms: dict[str, float] = {}
    if allocation == "gradient":
        with float_mode(model):
            gradients = probe.gradients(model)
        norms = {name: gradients[f"{name}.weight"].norm().item() for name in sites}
    for bits in {layer.bits.w for layer, _ in sites.values()}:
        alike = {name: site for name, site in sites.items() if site[0].bits.w == bits}
        counts = allocate_points([norms.get(name, 1.0) for name in alike], 2**bits, MOST * 2**bits)
        for (layer, site), count in zip(alike.values(), counts, strict=True):
            site.place(layer.weight, count)
    for name, p in model.named_parameters():
        if not is_quantizer_key(name):
            p.requires_grad_(False)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step, then bring the points into order."""
    optimizer.step()
    for _, site in _sites(model).values():
        site.sort()


def build(*, w: int = 4, bucket: int = 256, initial: str = "quantiles", allocation: str = "gradient") -> Method:
    """Return differentiable quantization; for the options see the card."""
    check_bucket(bucket)
    if initial not in INITIALS:
        raise ValueError(f"initial={initial}: allowed are {', '.join(INITIALS)}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation={allocation}: allowed are {', '.join(ALLOCATIONS)}")
    return Method(
        name="dq",
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        requires=Requires(teacher=True),
        weight=lambda name, layer, bits: DQWeight(layer.weight.detach(), bits, bucket, initial),
        prepare=lambda model, probe: share(model, probe, allocation),
        step=stepped,
    )
