"""Test post-training quantization against NumPy: scales and ranges by exhaustive search, batch statistics by hand."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.data import digits
from qbench.data.loader import Loader
from qbench.methods import ptq
from qbench.models import resnet
from qbench.quant.install import install
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe
from qbench.quant.verify import verify
from qbench.training.evaluation import evaluate

Scale = Callable[[Tensor, int, bool, str], Tensor]
Quantize = Callable[[Tensor, Tensor, int], Tensor]
ALL = Policy(first="same", last="same", input="float")


def best_scale(w: np.ndarray, bits: int, criterion: str) -> float:
    """Return the step of one group: that of the whole range, or of the percentage with the least squared error."""
    n = 2 ** (bits - 1) - 1
    whole = np.abs(w).max() / n
    if criterion == "minmax":
        return float(whole)
    errors = {}
    for i in range(1, 101):
        s = whole * i / 100
        errors[s] = sum((s * min(max(round(v / s), -n), n) - v) ** 2 for v in w.ravel().tolist())
    return float(min(errors, key=lambda s: (errors[s], -s)))


def levels(low: float, high: float, bits: int) -> np.ndarray:
    """Return 2^b uniform levels, shifted so that zero is a level."""
    step = (high - low) / (2**bits - 1)
    return (np.arange(2**bits) - np.round(-low / step)) * step


def best_range(x: np.ndarray, bits: int) -> tuple[float, float]:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    errors = {}
    for i in range(1, 101):
        near = np.abs(x[:, None] - levels(low * i / 100, high * i / 100, bits)).min(1)
        errors[i] = float((near**2).sum())
    i = min(errors, key=lambda i: (errors[i], -i))
    return low * i / 100, high * i / 100


def weights(seed: int) -> Tensor:
    """Return channels of different size, with outliers: channels matter, and the best range is not the whole."""
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return w**3 * torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64).reshape(4, 1, 1, 1)


def check_weights(scale: Scale, quantize: Quantize) -> None:
    for bits in (2, 3, 4, 8):
        w = weights(bits)
        for criterion in ("minmax", "mse"):
            for channel in (True, False):
                groups = w.numpy() if channel else w.numpy()[None]
                expected = np.array([best_scale(group, bits, criterion) for group in groups])
                step = scale(w, bits, channel, criterion)
                np.testing.assert_allclose(step.reshape(-1), expected, rtol=1e-12)
                s = expected.reshape(4, 1, 1, 1) if channel else expected
                n = 2 ** (bits - 1) - 1
                codes = np.clip(np.round(w.numpy() / s), -n, n)
                np.testing.assert_allclose(quantize(w, step, bits), codes * s, atol=1e-12)


def test_the_weights_are_those_of_exhaustive_search() -> None:
    check_weights(ptq.weight_scale, ptq.quantize_weight)


def per_layer(w: Tensor, bits: int, channel: bool, criterion: str) -> Tensor:
    return ptq.weight_scale(w, bits, False, criterion).expand(len(w) if channel else 1)


def with_2_to_the_bits_steps(w: Tensor, bits: int, channel: bool, criterion: str) -> Tensor:
    return ptq.weight_scale(w, bits, channel, criterion) * (2 ** (bits - 1) - 1) / 2 ** (bits - 1)


def always_minmax(w: Tensor, bits: int, channel: bool, criterion: str) -> Tensor:
    return ptq.weight_scale(w, bits, channel, "minmax")


def unclipped(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (w / scale).round() * scale


@pytest.mark.parametrize(
    ("scale", "quantize"),
    [
        (per_layer, ptq.quantize_weight),
        (with_2_to_the_bits_steps, ptq.quantize_weight),
        (always_minmax, ptq.quantize_weight),
        (ptq.weight_scale, unclipped),
    ],
)
def test_the_check_rejects_wrong_weights(scale: Scale, quantize: Quantize) -> None:
    with pytest.raises(AssertionError):
        check_weights(scale, quantize)


def test_the_weights_are_those_computed_by_hand() -> None:
    w = torch.tensor([[3.0, -1.4, 0.4], [0.0, 0.0, 0.0]], requires_grad=True)
    scale = ptq.weight_scale(w, 3)
    assert scale.tolist() == [[1.0], [1.0]], "3 bits: codes -3 ... 3; the step of all zeros is 1"
    out = ptq.quantize_weight(w, scale, 3)
    assert out.tolist() == [[3.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    assert ptq.quantize_weight(torch.tensor([[9.0, -9.0]]), torch.tensor(1.0), 3).tolist() == [[3.0, -3.0]]
    up = torch.rand_like(w)
    assert torch.equal(torch.autograd.grad(out, w, up)[0], up)
    half = ptq.quantize_weight(w.half(), scale, 3)
    assert half.dtype == torch.float16
    assert half.tolist() == out.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("relu", [True, False])
def test_the_ranges_are_those_of_exhaustive_search(bits: int, relu: bool) -> None:
    x = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) ** 3
    x = x.relu() if relu else x
    assert [v.item() for v in ptq.minmax_range(x)] == [min(x.min().item(), 0), x.max().item()]
    mse_range = [v.item() for v in ptq.mse_range(x, bits)]
    assert mse_range == pytest.approx(best_range(x.numpy(), bits), abs=1e-12)
    assert mse_range[1] < x.max(), "with outliers the best range is not the whole"
    for percent in (100.0, 99.0, 90.0):
        low, high = ptq.percentile_range(x, percent)
        assert high == np.percentile(x.numpy(), percent, method="inverted_cdf")
        assert low == min(0, -np.percentile(-x.numpy(), percent, method="inverted_cdf"))
    if relu:
        assert mse_range[0] == 0
        assert low == 0


def test_the_percentiles_are_those_computed_by_hand() -> None:
    x = torch.arange(-3.0, 7.0)  # -3 ... 6
    assert [v.item() for v in ptq.percentile_range(x, 90.0)] == [-2, 5]
    assert [v.item() for v in ptq.percentile_range(x, 91.0)] == [-3, 6]
    assert [v.item() for v in ptq.percentile_range(x + 10, 90.0)] == [0, 15], "a range always contains zero"
    assert [v.item() for v in ptq.percentile_range(-x - 10, 90.0)] == [-15, 0]


class Net(nn.Module):
    """Two normalized layers, and dropout that must stay off."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1, self.act, self.drop = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)
        self.fc2, self.bn2, self.fc3 = nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 4)."""
        x = self.drop(self.act(self.bn1(self.fc1(x))))
        return self.fc3(self.act(self.bn2(self.fc2(x))))  # type: ignore[no-any-return]


def prepared(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **options: object) -> nn.Module:
    method = ptq.build(**options)  # type: ignore[arg-type]
    model = install(method, model, ALL)
    assert method.prepare is not None
    method.prepare(model, Probe(batches, F.cross_entropy))
    return model


def some_batches(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.zeros(n, dtype=torch.long)) for n in (20, 12)]


Reestimate = Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]


def check_normalization(reestimate: Reestimate) -> None:
    """Mean and unbiased variance of each batch, averaged over batches; later layers get each batch's own."""
    torch.manual_seed(1)
    model, batches = Net().train(), some_batches()
    model.bn1.running_mean.fill_(0.2)  # type: ignore[union-attr]
    prepared(model, batches, w=3, a=4, reestimate="none")
    before = torch.get_rng_state()
    reestimate(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.3)
    means: list[list[np.ndarray]] = [[], []]
    variances: list[list[np.ndarray]] = [[], []]
    with torch.no_grad():
        for x, _ in batches:
            for i, (fc, bn) in enumerate([(model.fc1, model.bn1), (model.fc2, model.bn2)]):
                y = fc(x).double().numpy()
                means[i].append(y.mean(0))
                variances[i].append(y.var(0, ddof=1))
                normal = (y - y.mean(0)) / np.sqrt(y.var(0) + bn.eps)
                scaled = normal * bn.weight.numpy() + bn.bias.numpy()
                x = torch.from_numpy(np.maximum(scaled, 0)).float()
    for i, bn in enumerate([model.bn1, model.bn2]):
        np.testing.assert_allclose(bn.running_mean, np.mean(means[i], 0), atol=2e-5)
        np.testing.assert_allclose(bn.running_var, np.mean(variances[i], 0), rtol=2e-4)


@pytest.mark.parametrize("reestimate", [ptq.reestimate_norms, ptq.shift_norms])
def test_synchronized_batch_normalization_is_batch_normalization(reestimate: Reestimate) -> None:
    def made(norm: type[nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), norm(5), nn.ReLU(), nn.Linear(5, 4), norm(4), nn.Linear(4, 3)).eval()

    batches = [(torch.randn(20, 6), torch.zeros(20, dtype=torch.int64))]
    models = [made(norm) for norm in (nn.BatchNorm1d, nn.SyncBatchNorm)]
    before = models[0][1].running_mean.clone()  # type: ignore[union-attr, operator]
    for model in models:
        install(ptq.build(w=2), model, example=batches[0][0])
        reestimate(model, batches)
        assert not ptq.unused_options(model)
    assert torch.equal(models[0][1].running_var, models[1][1].running_var)  # type: ignore[arg-type, union-attr]
    assert reestimate is ptq.shift_norms or not torch.equal(before, models[0][1].running_mean)  # type: ignore[arg-type]


def test_batch_normalization_is_measured_with_the_quantizers_in_place() -> None:
    check_normalization(ptq.reestimate_norms)  # type: ignore[arg-type]


def with_dropout(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    state = torch.get_rng_state()
    for norm in (model.bn1, model.bn2):
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
    for x, _ in batches:
        model(x)
    model.bn1.momentum, model.bn2.momentum = 0.1, 0.3  # type: ignore[assignment]
    torch.set_rng_state(state)


def with_usual_momentum(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model.drop.p = 0.0  # type: ignore[assignment]
    for x, _ in batches:
        model(x)


def in_the_float_network(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with float_mode(model):
        ptq.reestimate_norms(model, batches)


@pytest.mark.parametrize("mutant", [with_dropout, with_usual_momentum, in_the_float_network])
def test_the_check_rejects_wrong_reestimation(mutant: Reestimate) -> None:
    with pytest.raises(AssertionError):
        check_normalization(mutant)


def test_the_statistics_stay_the_same_without_reestimation() -> None:
    model = Net()
    kept = copy.deepcopy(model.bn1.state_dict())
    prepared(model, some_batches(), reestimate="none")
    assert all(torch.equal(value, kept[key]) for key, value in model.bn1.state_dict().items())


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
def test_the_activations_are_calibrated_on_the_float_network(calibration: str) -> None:
    torch.manual_seed(2)
    model, batches = Net(), some_batches()
    options = {"percentile": 90.0} if calibration == "percentile" else {}
    layers = prepared(model, batches, w=2, a=2, calibration=calibration, reestimate="none", **options)
    with torch.no_grad(), float_mode(model.eval()):
        x = torch.cat([images for images, _ in batches])
        x = model.act(model.bn1(model.fc1(x)))
    expected = {
        "minmax": (0.0, x.max().item()),
        "percentile": (0.0, float(np.percentile(x.numpy(), 90.0, method="inverted_cdf"))),
        "mse": best_range(x.flatten().double().numpy(), 2),
    }
    site = quantized_layers(layers)["fc2"].input_q
    assert isinstance(site, ptq.PTQActivation)
    assert (site.low.item(), site.high.item()) == pytest.approx(expected[calibration], abs=1e-5)


def test_prepare_uses_weights_loaded_after_installing() -> None:
    method, model, other = ptq.build(), install(ptq.build(), Net(), ALL), Net()
    model.load_state_dict(other.state_dict(), strict=False)
    method.prepare(model, Probe(some_batches(), F.cross_entropy))  # type: ignore[misc]
    site = quantized_layers(model)["fc1"].weight_q
    assert isinstance(site, ptq.PTQWeight)
    assert torch.equal(site.scale, ptq.weight_scale(other.fc1.weight, 8, True, "mse"))


def test_the_state_dict_holds_all_that_was_calibrated() -> None:
    batches = some_batches()
    model = prepared(Net(), batches, w=4, a=3).eval()
    fresh = install(ptq.build(w=4, a=3), Net(), ALL).eval()
    site = quantized_layers(fresh)["fc2"].input_q
    assert isinstance(site, ptq.PTQActivation)
    assert (site.low.item(), site.high.item()) == (0, 1), "the range without calibration, as in the method card"
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches[0][0]), model(batches[0][0]))


def test_nothing_changes_at_32_bits() -> None:
    model = Net()
    kept = copy.deepcopy(model.state_dict())
    prepared(model, some_batches(), w=32, a=32)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert not ptq.build().needs_training


def top1_of(model: nn.Module, loader: Loader) -> float:
    accuracy = evaluate(model, loader.unaugmented("test"))
    assert accuracy is not None
    return accuracy.top1


Statistics = list[tuple[Tensor, Tensor]]


def statistics_of(model: nn.Module) -> Statistics:
    return [(bn.running_mean.clone(), bn.running_var.clone()) for bn in (model.bn1, model.bn2)]  # type: ignore[operator, union-attr]


def check_shift(shift: Reestimate) -> None:
    """The mean changes by the difference and the variance by the ratio of two measurements on the same images."""
    torch.manual_seed(1)
    model, batches = Net().train(), some_batches()
    for i, bn in enumerate((model.bn1, model.bn2)):
        bn.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        bn.running_var.uniform_(1 + i, 2 + i)  # type: ignore[union-attr]
    prepared(model, batches, w=3, a=4, reestimate="none")
    floats, quantized = copy.deepcopy(model), copy.deepcopy(model)
    in_the_float_network(floats, batches)
    ptq.reestimate_norms(quantized, batches)
    old, before = statistics_of(model), torch.get_rng_state()
    shift(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.3)
    measured = zip(statistics_of(model), old, statistics_of(floats), statistics_of(quantized), strict=True)
    for (mean, var), (old_mean, old_var), (float_mean, float_var), (new_mean, new_var) in measured:
        torch.testing.assert_close(mean, old_mean + new_mean - float_mean)
        torch.testing.assert_close(var, old_var * new_var / float_var)
        assert not torch.allclose(mean, old_mean, atol=1e-3)


def test_batch_normalization_is_shifted_by_what_quantization_changes() -> None:
    check_shift(ptq.shift_norms)  # type: ignore[arg-type]


@pytest.mark.parametrize("mutant", [ptq.reestimate_norms, lambda model, batches: None])
def test_the_check_rejects_a_wrong_shift(mutant: Reestimate) -> None:
    with pytest.raises(AssertionError):
        check_shift(mutant)


def test_a_shift_without_quantizers_changes_nothing() -> None:
    model = Net().train()
    model.bn1.running_var.uniform_(1, 2)  # type: ignore[union-attr]
    prepared(model, some_batches(), w=3, a=4, reestimate="none")
    old = statistics_of(model)
    with float_mode(model):
        ptq.shift_norms(model, some_batches())
    for now, then in zip(statistics_of(model), old, strict=True):
        assert torch.equal(now[0], then[0])
        assert torch.equal(now[1], then[1])


def test_int8_is_within_a_point_of_float_on_digits() -> None:
    loader = Loader(digits.build(), 64, 0, torch.device("cpu"))
    torch.manual_seed(0)
    model = resnet.build((1, 8, 8), 10, depth=8, width=8, stem_stride=1, form="pre", shortcut="A", norm="affine")
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=8 * loader.steps)
    for epoch in range(8):
        for x, y in loader.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    baseline = top1_of(model, loader)
    assert baseline > 94
    probe = list(loader.unaugmented("train", 256))
    for options in ({}, {"weights": "minmax", "calibration": "percentile", "reestimate": "none"}, {"channel": False}):
        quantized = prepared(copy.deepcopy(model), probe, **options)
        assert abs(top1_of(quantized, loader) - baseline) <= 1
        counts = verify(quantized, probe[0][0])
        assert max(layer["w"].found for layer in counts.values()) > 16
        assert all(
            layer["w"].allowed == 255 and ("a" not in layer or layer["a"].allowed == 256) for layer in counts.values()
        )
    ternary = {}
    for again in ptq.REESTIMATES:
        quantized = prepared(copy.deepcopy(model), probe, w=2, a=32, reestimate=again)
        ternary[again] = top1_of(quantized, loader)
    off = "at two bits the statistics of the float network are far off"
    assert min(ternary["shift"], ternary["replace"]) > ternary["none"] + 10, off


@pytest.mark.parametrize(
    "options", [{"weights": "max"}, {"calibration": "kl"}, {"percentile": 10.0}, {"reestimate": "all"}]
)
def test_invalid_options_raise(options: dict[str, object]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"{key}=.*must be"):
        ptq.build(**options)  # type: ignore[arg-type]


def test_one_bit_weights_are_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"bits\.w=1"):
        install(ptq.build(w=1), Net(), ALL)
