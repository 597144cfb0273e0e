"""Test qd and dq against oracle_polino.py, hand-computed rows, and flawed implementations."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import numpy as np
import oracle_polino as oracle
import pytest
import torch
from conftest import tiered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import LevelCount
from qbench.methods import dq, qd
from qbench.models import resnet
from qbench.quant import fused_kernels as passes
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, quantized_layers
from qbench.quant.policy import Policy
from qbench.quant.probe import Batch, Probe
from qbench.quant.verify import NotQuantized, verify

Quantize = Callable[..., Tensor]
SIZES = [(7, 3), (1, 1), (40, 0), (256, 256), (257, 256), (255, 256), (600, 256), (24, 8), (25, 8), (31, 8)]


def random(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# qd by hand

W = torch.tensor([[0.0, 0.9, 2.2, 3.0, 10.0], [16.0, 14.0, 13.1, 5.0, 7.0]])
"""Buckets of 4: alpha 3, beta 0; alpha 6, beta 10; then 5 and 7, filled up with 7: alpha 2, beta 5."""


def check_qd(quantize: Quantize) -> None:
    """By hand: the levels of 2 bits are 0, 1/3, 2/3, 1 of alpha."""
    w = W.clone().requires_grad_()
    out = quantize(w, 2, 4)
    expected = [0, 1, 2, 3, 10, 16, 14, 14, 5, 7]  # 13.1: x = 0.52, y = 1.55, so 10 + 2/3 6
    np.testing.assert_allclose(out.detach().flatten().numpy(), expected, rtol=1e-6, err_msg="forward")
    up = torch.arange(1.0, 11).reshape(2, 5)
    assert torch.equal(torch.autograd.grad(out, w, up)[0], up), "the gradient passes unchanged"
    assert torch.equal(w.detach(), W), "written to"
    one = quantize(torch.tensor([0.0, 1.0, 2.0, 0.9, 1.1]), 1, 8)
    assert one.tolist() == [0, 0, 2, 0, 2], "1 bit: minimum and maximum; the tie goes to the even code, 0"
    assert quantize(torch.tensor([0.0, 1.0, 2.0]), 2, 8)[1].item() == pytest.approx(4 / 3), "y = 1.5 goes to 2"
    assert quantize(torch.tensor([-3.0, 1.0, 5.0]), 1, 8).tolist() == [-3, 1 - 4, 5]
    assert quantize(torch.full((5,), 0.3), 2, 4).tolist() == torch.full((5,), 0.3).tolist(), "constant: alpha is 1"


def test_qd_gives_the_values_computed_by_hand() -> None:
    check_qd(qd.quantize_bucketed)


def flawed_qd(w: Tensor, bits: int, size: int, *, flaw: str = "") -> Tensor:
    """Bucketed quantization implemented again, with a flaw."""
    steps = 2**bits - (2 if flaw == "one level less" and bits > 1 else 1)
    flat = w.detach().flatten()
    rows = list(w.detach()) if flaw == "per channel" and w.dim() > 1 else list(flat.split(size))
    if flaw == "zero fill":
        rows = [torch.cat([row, torch.zeros(max(0, min(size, len(flat)) - len(row)))]) for row in rows]
    out = []
    for row in rows if flaw != "no buckets" else [flat]:
        beta = -row.abs().max() if flaw == "symmetric" else row.min()
        alpha = 2 * row.abs().max() if flaw == "symmetric" else row.max() - row.min()
        if flaw != "divides by zero":
            alpha = alpha if alpha >= 1e-10 else torch.ones(())
        y = (row - beta) / alpha * steps
        code = {"floor": y.floor(), "half up": (y + 0.5).floor()}.get(flaw, y.round())
        out.append(code / steps * (1 if flaw == "not scaled back" else alpha) + beta)
    value = torch.cat(out)[: w.numel()] if flaw == "zero fill" else torch.cat(out)
    slope = (w.detach().abs() <= 1).to(w.dtype) if flaw == "truncated" else torch.ones_like(w)
    return value.view_as(w) + (w - w.detach()) * slope


def test_the_second_implementation_of_qd_without_a_flaw_agrees() -> None:
    check_qd(flawed_qd)


@pytest.mark.parametrize(
    "flaw",
    [
        "one level less", "per channel", "zero fill", "no buckets", "symmetric", "divides by zero", "floor", "half up",
        "not scaled back", "truncated",
    ],
)  # fmt: skip
def test_the_check_rejects_every_flaw_of_qd(flaw: str) -> None:
    with pytest.raises(AssertionError):
        check_qd(partial(flawed_qd, flaw=flaw))


# qd against the oracle, and its properties


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_qd_agrees_with_exact_arithmetic(count: int, size: int, bits: int) -> None:
    w = random(count, bits)
    got = qd.quantize_bucketed(w, bits, size)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), oracle.quantize(w.numpy(), bits, size), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_stochastic_qd_is_floor_plus_a_bernoulli_draw(count: int, size: int, bits: int) -> None:
    w = random(count, bits)
    rows = oracle.buckets(w.numpy(), size)
    generator = torch.Generator().manual_seed(5)
    shift = passes._shared_bits(w, generator)
    numbers = passes.uniform_16(len(rows) * len(rows[0]), w, generator).reshape(len(rows), -1)
    draws = (32768 - numbers.double() - shift) / 65536
    got = qd.quantize_bucketed(w, bits, size, True, torch.Generator().manual_seed(5))
    want = oracle.quantize(w.numpy(), bits, size, draws.numpy())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)


def test_stochastic_rounding_of_qd_is_unbiased() -> None:
    """The mean of N draws is within 5 steps / (2 sqrt N) of w; nearest rounding and floor are not."""
    w, draws, bits, size = random(96), 4000, 2, 32
    torch.manual_seed(0)
    total = torch.stack([qd.quantize_bucketed(w, bits, size, True) for _ in range(draws)])
    step = (qd.bucket_scale(qd.in_buckets(w, size))[0] / 3).expand(-1, size).flatten()
    bound = 5 * step / (2 * draws**0.5)
    assert ((total.mean(0) - w).abs() <= bound).all()
    assert ((total - w).abs() < step).all(), "one of the two levels next to w"
    for biased in (qd.quantize_bucketed(w, bits, size), w - step / 2):
        assert ((biased - w).abs() > bound).any()


def test_the_draws_come_from_the_global_generator_in_training_only() -> None:
    w, site = random(600), qd.QDWeight(2, 256, stochastic=True)
    torch.manual_seed(1)
    first = site(w)
    assert not torch.equal(first, site(w))
    torch.manual_seed(1)
    assert torch.equal(first, site(w))
    before = torch.get_rng_state()
    assert torch.equal(site.eval()(w), qd.quantize_bucketed(w, 2))
    assert torch.equal(qd.QDWeight(2, 256, stochastic=False)(w), site(w)), "training without draws"
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(0, 40), st.integers(1, 5), st.integers(0, 9))
def test_the_properties_of_qd(count: int, size: int, bits: int, seed: int) -> None:
    w = random(count, seed)
    out = qd.quantize_bucketed(w, bits, size)
    rows, original = qd.in_buckets(out, size), qd.in_buckets(w, size)
    alpha, beta = qd.bucket_scale(original)
    assert max(len(row.unique()) for row in rows) <= 2**bits
    assert ((rows - original).abs() <= alpha / (2**bits - 1) / 2 * (1 + 1e-9)).all(), "nearest level"
    torch.testing.assert_close(rows.amin(1, keepdim=True), beta)
    torch.testing.assert_close(rows.amax(1), original.amax(1))
    torch.testing.assert_close(qd.quantize_bucketed(out, bits, size), out)  # idempotent
    torch.testing.assert_close(qd.quantize_bucketed(3 * w + 2, bits, size), 3 * out + 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    w, points = random(600).to(dtype), torch.tensor([0.0, 0.3, 0.6, 1.0])
    for quantize in (lambda w: qd.quantize_bucketed(w, 8), lambda w: dq.quantize_to_points(w, points)):
        assert torch.equal(quantize(w), quantize(w.float()).to(dtype))


def test_the_buckets_follow_the_flattened_tensor_in_any_memory_format() -> None:
    w = random(3 * 5 * 4 * 4).reshape(3, 5, 4, 4)
    rows = qd.in_buckets(w, 100)
    assert rows.shape == (3, 100)
    assert torch.equal(rows.flatten()[:240], w.flatten())
    assert (rows.flatten()[240:] == w.flatten()[-1]).all()
    assert torch.equal(qd.in_buckets(w.to(memory_format=torch.channels_last), 100), rows)
    assert torch.equal(qd.from_buckets(rows, w), w)
    assert qd.in_buckets(w, 241).shape == (1, 240), "a short tensor is not filled up"
    assert qd.in_buckets(w, 0).shape == qd.in_buckets(w, None).shape == (1, 240)
    with pytest.raises(ValueError, match="bucket_size=-1"):
        qd.in_buckets(w, -1)
    with pytest.raises(ValueError, match="bits=0"):
        qd.quantize_bucketed(w, 0)


def test_the_buckets_have_a_smaller_error_than_one_scale_per_tensor() -> None:
    w = random(4096)
    errors = [(qd.quantize_bucketed(w, 4, size) - w).square().mean().item() for size in (64, 256, 0)]
    assert errors == sorted(errors)
    assert errors[2] > 1.2 * errors[1]


# Sizes


def test_the_compression_ratios_of_the_paper() -> None:
    """k f / (k b + 2 f) for k = 256, f = 32; and what the quantizer itself reports, for whole buckets."""
    assert [round(qd.compression_ratio(b), 2) for b in (2, 4, 8)] == [14.22, 7.53, 3.88]
    for bits in (2, 4, 8):
        stored = qd.QDWeight(bits, 256, False).bytes(torch.empty(10 * 256))
        assert 10 * 256 * 4 / stored.ideal == pytest.approx(qd.compression_ratio(bits), rel=1e-12)
    assert qd.QDWeight(2, 256, False).bytes(torch.empty(3, 100)) == (300, 2, 16), "two buckets"
    assert qd.QDWeight(2, 0, False).bytes(torch.empty(3, 100)) == (300, 2, 8)


def test_the_huffman_lengths_are_those_computed_by_hand() -> None:
    """5, 2, 1, 1: lengths 1, 2, 3, 3; four alike: 2 each; a single symbol needs none."""
    assert qd.huffman_bits([1, 5, 0, 1, 2]) == (5 * 1 + 2 * 2 + 1 * 3 + 1 * 3) / 9
    assert qd.huffman_bits([5, 1, 1]) == (5 * 1 + 1 * 2 + 1 * 2) / 7, "the counts need not be sorted"
    assert qd.huffman_bits([7, 7, 7, 7]) == 2
    assert qd.huffman_bits([4, 0]) == 0


# dq by hand

POINTS = [0.0, 0.25, 1.0]
V = torch.tensor([[0.0, 0.5], [4.0, 4.0], [8.0, 6.5]], dtype=torch.float64)
"""Buckets of 4: x = 0, 1/8 (half way: the upper point), 1, 1 at alpha 4; then 8 and 6.5: x = 1, 0 at alpha 1.5."""


def check_dq(quantize: Quantize) -> None:
    """By hand for V and POINTS."""
    w, points = V.clone().requires_grad_(), torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    out = quantize(w, points, 4)
    assert out.flatten().tolist() == [0, 1, 4, 4, 8, 6.5], "forward"
    up = torch.arange(1.0, 7, dtype=torch.float64).reshape(3, 2)
    dw, dp = torch.autograd.grad(out, (w, points), up, allow_unused=True)
    assert dw is None, "no gradient to the weights"
    assert dp.tolist() == [4 * 1 + 1.5 * 6, 4 * 2, 4 * 3 + 4 * 4 + 1.5 * 5]


def test_dq_gives_the_values_and_gradients_computed_by_hand() -> None:
    check_dq(dq.quantize_to_points)


def flawed_dq(w: Tensor, points: Tensor, size: int, *, flaw: str = "") -> Tensor:
    """Quantization to points implemented again, with a flaw."""
    flat, out = w.detach().flatten(), []
    rows = list(w.detach()) if flaw == "per channel" else list(flat.split(size))
    for row in rows if flaw != "no buckets" else [flat]:
        alpha, beta = row.max() - row.min(), row.min()
        alpha = alpha if alpha >= 1e-10 else torch.ones_like(alpha)
        distance = ((row - beta) / alpha)[:, None].sub(points.detach()).abs()
        lowest = distance.argmin(1)
        index = lowest if flaw == "lower tie" else len(points) - 1 - distance.flip(1).argmin(1)
        value = points[index] * alpha + beta
        if flaw == "no alpha":
            value = value.detach() + points[index] - points[index].detach()
        if flaw == "mean":
            share = points[index] * alpha / len(row)
            value = value.detach() + share - share.detach()
        out.append(value)
    result = torch.cat(out).view_as(w)
    return result + (w - w.detach()) if flaw == "gradient to weights" else result


def test_the_second_implementation_of_dq_without_a_flaw_agrees() -> None:
    check_dq(flawed_dq)


@pytest.mark.parametrize("flaw", ["per channel", "no buckets", "lower tie", "no alpha", "mean", "gradient to weights"])
def test_the_check_rejects_every_flaw_of_dq(flaw: str) -> None:
    with pytest.raises(AssertionError):
        check_dq(partial(flawed_dq, flaw=flaw))


# dq against the oracle


@pytest.mark.parametrize("m", tiered([2, 3, 4, 7, 16], [2, 7]))
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_dq_agrees_with_exact_arithmetic_forward_and_backward(count: int, size: int, m: int) -> None:
    w, up = random(count, m), random(count, 100 + m)
    points = (random(m, 200 + m) / 2 + 0.5).sort().values.requires_grad_()
    out = dq.quantize_to_points(w, points, size)
    listed = points.tolist()
    np.testing.assert_allclose(out.detach().numpy(), oracle.to_points(w.numpy(), listed, size), rtol=1e-12, atol=1e-13)
    (dp,) = torch.autograd.grad(out, points, up)
    want = oracle.points_gradient(w.numpy(), listed, size, up.numpy())
    np.testing.assert_allclose(dp.numpy(), want, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_points_is_that_of_finite_differences() -> None:
    w = random(50)
    points = torch.tensor([0.02, 0.31, 0.62, 0.97], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: dq.quantize_to_points(w, p, 16).pow(3).sum(), (points,), eps=1e-7)


def test_infinite_points_are_never_chosen() -> None:
    w, infinite = random(60), torch.full((3,), torch.inf, dtype=torch.float64)
    points = torch.tensor(POINTS, dtype=torch.float64)
    filled = torch.cat([points, infinite])
    assert torch.equal(dq.quantize_to_points(w, filled, 16), dq.quantize_to_points(w, points, 16))


def test_the_initial_points_are_quantiles() -> None:
    """0, 1, 2, 3, 16 as one bucket: x = 0, 1/16, 1/8, 3/16, 1; the filling of the last bucket does not count."""
    w = torch.tensor([0.0, 1, 2, 3, 16], dtype=torch.float64)
    assert dq.initial_points(w, 3, 0).tolist() == [0, 2 / 16, 1]
    assert dq.initial_points(w, 2, 0).tolist() == [0, 1]
    assert dq.initial_points(w, 4, 0)[1].item() == pytest.approx((1 + 1 / 3) / 16), "position 4/3 of 0..4"
    assert dq.initial_points(w, 5, 0, "uniform").tolist() == [0, 0.25, 0.5, 0.75, 1]
    for count, size in SIZES:
        w = random(count, 3)
        for m in (2, 5, 64):
            got = dq.initial_points(w, m, size)
            np.testing.assert_allclose(got.numpy(), oracle.quantiles(w.numpy(), m, size), rtol=1e-12, atol=1e-14)


# Allocation

BY_HAND: list[tuple[list[float], int, int | None, list[int]]] = [
    ([3, 1], 4, None, [5, 3]),  # 2 each; 4 shared as 3 and 1
    ([1, 1, 1], 4, None, [4, 4, 4]),
    (
        [1, 1, 4],
        5,
        None,
        [4, 4, 7],
    ),  # 2 each; 9 shared as 1.5, 1.5, 6, rounded 2, 2, 6: one too many, taken from the layer with most
    (
        [2, 2, 1],
        4,
        None,
        [4, 4, 4],
    ),  # 2 each; 6 shared as 2.4, 2.4, 1.2, rounded 2, 2, 1: one short, given to the layer with fewest
    ([1, 0, 0, 0], 4, None, [10, 2, 2, 2]),
    ([1, 0, 0, 0], 4, 6, [6, 4, 3, 3]),  # 4 above the bound go to the layers with fewest, one by one
    ([0, 0], 4, 16, [4, 4]),
    ([float("nan"), 1], 4, 16, [4, 4]),
]


@pytest.mark.parametrize(("norms", "points", "maximum", "counts"), BY_HAND)
def test_the_allocation_is_that_computed_by_hand(
    norms: list[float], points: int, maximum: int | None, counts: list[int]
) -> None:
    assert dq.allocate_points(norms, points, maximum) == counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.integers(2, 8))
def test_the_allocation_keeps_the_total_and_the_bounds(norms: list[float], bits: int) -> None:
    counts = dq.allocate_points(norms, 2**bits, 4 * 2**bits)
    assert sum(counts) == 2**bits * len(norms)
    assert min(counts) >= 2 ** (bits - 1)
    assert max(counts) <= 4 * 2**bits


# In a network


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet.build((1, 8, 8), 4, depth=8, width=4)


def batch(count: int = 64, seed: int = 1) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=draws)
    x = torch.randn(count, 1, 8, 8, generator=draws)
    x[torch.arange(count), 0, y] += 2  # a bright line in the row of the class
    return x, y


def dq_weights(model: nn.Module) -> dict[str, dq.DQWeight]:
    sites = {name: layer.weight_q for name, layer in quantized_layers(model).items()}
    assert all(isinstance(site, dq.DQWeight) for site in sites.values())
    return sites  # type: ignore[return-value]


def prepared(model: nn.Module, policy: Policy | None = None, **options: object) -> nn.Module:
    method = dq.build(w=2, **options)  # type: ignore[arg-type]
    model = install(method, model, policy)
    assert method.prepare
    method.prepare(model, Probe([batch()], F.cross_entropy))
    return model


def trained_float() -> nn.Module:
    model, (x, y) = network(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        dq.optimizer_step(model, optimizer)
        losses.append(loss.item())
    return losses


def optimizers(points: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(points, 1e-3, momentum=0.9, nesterov=True), torch.optim.Adam(points, lr=0.01)]


@pytest.mark.parametrize("kind", [0, 1])
def test_training_moves_points_and_no_weights(kind: int) -> None:
    model = prepared(trained_float())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {f"{name}.weight_q.points" for name in dq_weights(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = descend(model, optimizers(list(trainable.values()))[kind], 30)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        running = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert moved == (running or name in trainable), name
    for site in dq_weights(model).values():
        assert torch.equal(site.points, site.points.sort().values)
    verify(model, batch()[0])


def test_the_points_are_allocated_by_the_gradients_of_the_float_network() -> None:
    plain = trained_float().eval()
    plain.zero_grad()
    x, y = batch()
    F.cross_entropy(plain(x), y).backward()
    model = prepared(deepcopy(plain))
    sites = dq_weights(model)
    norms = [float(plain.get_parameter(f"{name}.weight").grad.norm()) for name in sites]  # type: ignore[union-attr]
    counts = [site.report()["points"] for site in sites.values()]
    assert counts == dq.allocate_points(norms, 4, 16)
    assert sum(counts) == 4 * len(counts)
    assert len(set(counts)) > 1, "layers differ"
    assert counts.index(max(counts)) == norms.index(max(norms))
    frozen = deepcopy(plain)
    frozen.get_parameter(f"{next(iter(sites))}.weight").requires_grad_(False)
    assert [site.report()["points"] for site in dq_weights(prepared(frozen)).values()] == counts, "a frozen layer"
    even = dq_weights(prepared(deepcopy(plain), allocation="even"))
    assert {site.report()["points"] for site in even.values()} == {4}


def test_the_layers_of_each_width_share_their_own_total() -> None:
    model = prepared(trained_float(), Policy(rules={"layer2.*": 3}))
    counts = {name: site.report()["points"] for name, site in dq_weights(model).items()}
    for bits in (2, 3):
        same_width = [counts[name] for name, layer in quantized_layers(model).items() if layer.bits.w == bits]
        assert sum(same_width) == 2**bits * len(same_width)
        assert len(same_width) > 1


def test_prepare_uses_the_current_weights_and_leaves_no_gradient() -> None:
    model = install(dq.build(w=2, initial="uniform"), network())
    weights = network(seed=5).state_dict()
    model.load_state_dict(weights, strict=False)
    before = torch.get_rng_state()
    dq.allocate_and_freeze(model, Probe([batch()], F.cross_entropy), "gradient")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    for initial in dq.INITIALS:
        model = install(dq.build(w=2, initial=initial), network())
        model.load_state_dict(weights, strict=False)
        dq.allocate_and_freeze(model, Probe([batch()], F.cross_entropy), "even")
        for name, site in dq_weights(model).items():
            assert torch.equal(site.points[:4], dq.initial_points(weights[f"{name}.weight"], 4, 256, initial))


def test_a_layer_has_its_quantiles_before_prepare() -> None:
    layer = nn.Linear(50, 20)
    site = dq.DQWeight(layer.weight.detach(), 3, 256, "quantiles")
    assert site.report() == {"points": 8}
    assert torch.equal(site.points[:8], dq.initial_points(layer.weight, 8))
    assert (site.points[8:] == site.points[7]).all(), "unused places hold the last point"
    assert torch.equal(site(layer.weight), dq.quantize_to_points(layer.weight, site.points[:8]))


def test_the_parameters_of_other_quantizers_stay_trainable() -> None:
    model = install(dq.build(w=2), network())
    layer = quantized_layers(model)["layer2.0.conv1"]
    layer.input_q.register_parameter("range", nn.Parameter(torch.ones(())))
    dq.allocate_and_freeze(model, Probe([batch()], F.cross_entropy), "gradient")
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {f"{n}.weight_q.points" for n in dq_weights(model)} | {"layer2.0.conv1.input_q.range"}


def test_nothing_is_frozen_at_32_bits() -> None:
    model = install(dq.build(w=32), network())
    dq.allocate_and_freeze(model, Probe([batch()], F.cross_entropy), "gradient")
    assert all(p.requires_grad for p in model.parameters())


def test_points_that_cross_are_sorted_and_unused_places_stay_unused() -> None:
    w = random(300)
    site = dq.DQWeight(w, 2, 64, "uniform")
    site.reset_points(w, 3)
    with torch.no_grad():
        site.points.copy_(torch.tensor([0.7, 0.2, 0.9, *[0.1] * 13]))
    site.sort_points()
    assert site.points.tolist() == torch.tensor([0.2, 0.7, *[0.9] * 14]).double().tolist()
    want = oracle.to_points(w.numpy(), site.points[:3].tolist(), 64)
    np.testing.assert_allclose(site(w).detach().numpy(), want, rtol=1e-12)
    site(w).sum().backward()
    assert site.points.grad is not None
    assert not site.points.grad[3:].any()


def test_the_state_dict_holds_the_whole_state() -> None:
    model = prepared(trained_float())
    descend(model, optimizers([p for p in model.parameters() if p.requires_grad])[1], 3)
    again = install(dq.build(w=2), network(seed=9))
    again.load_state_dict(model.state_dict())
    for one, two in zip(quantized_layers(model).values(), quantized_layers(again).values(), strict=True):
        assert torch.equal(effective_weight(one), effective_weight(two))
        assert one.weight_q.report() == two.weight_q.report()  # type: ignore[operator]


@pytest.mark.parametrize("bucket", [256, 10, 0])
@pytest.mark.parametrize("build", [qd.build, dq.build])
def test_the_weights_are_on_the_levels_of_their_buckets(build: Callable[..., object], bucket: int) -> None:
    model = install(build(w=2, bucket=bucket), network())  # type: ignore[arg-type]
    for counts in verify(model, batch()[0]).values():
        assert counts["w"] == LevelCount(4, 4)


def test_the_verification_finds_weights_off_the_levels_of_their_bucket() -> None:
    model = install(qd.build(w=2), network())
    layer = quantized_layers(model)["layer3.0.conv1"]
    layer.weight_q.forward = lambda w: qd.quantize_bucketed(w, 2, 128)  # type: ignore[method-assign]
    with pytest.raises(NotQuantized, match=r"layer3\.0\.conv1"):
        verify(model, batch()[0])


def test_the_stored_bytes_include_the_points() -> None:
    """300 weights in two buckets: 16 bytes of scales; five points: 20 bytes and 3 bits per weight."""
    w = random(300)
    site = dq.DQWeight(w, 2, 256, "quantiles")
    assert site.bytes(w) == (300, 2, 16 + 16)
    for count, bits in ((2, 1), (3, 2), (5, 3), (8, 3), (9, 4)):
        site.reset_points(w, count)
        assert site.bytes(w) == (300, bits, 4 * count + 16)
        assert site.grid(w).points.shape == (2, count, 1)


def test_qd_and_dq_distill_by_default() -> None:
    assert qd.build().requires.teacher
    assert dq.build().requires.teacher


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (qd.build, {"bucket": -1}, "bucket=-1"),
        (qd.build, {"bucket": 2}, "bucket=2: must be"),
        (dq.build, {"bucket": 1}, "bucket=1: must be"),
        (dq.build, {"initial": "kmeans"}, "initial=kmeans: must be one of quantiles, uniform"),
        (dq.build, {"allocation": "loss"}, "allocation=loss: must be one of gradient, even"),
    ],
)
def test_invalid_options_raise(build: Callable[..., object], options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**options)
