"""Compiled elementwise functions return what torch returns, bit for bit."""

import math
import random
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from qbench.methods import apot, dorefa, gupta, hwgq, lsq, pact, uniform, xnor
from qbench.quant import elementwise, ops
from qbench.quant.install import install
from qbench.quant.layers import NotFinite
from qbench.quant.ops import fused_quantizer

pytest.importorskip("llvmlite", reason="needs the extra fast")

LEVELS = hwgq.half_wave_levels(2)
UNEVEN = hwgq.half_wave_levels(3, uniform=False)

QUANTIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # functions of x and of a learned scale
    "dorefa 1 bit": lambda x, s: dorefa.quantize_activation(x, 1),
    "dorefa 2 bits": lambda x, s: dorefa.quantize_activation(x, 2),
    "dorefa 5 bits": lambda x, s: dorefa.quantize_activation(x, 5),
    "dorefa abs": lambda x, s: dorefa.quantize_activation_abs(x, 2),
    "dorefa weights": lambda x, s: dorefa.quantize_weight(x, 3),
    "pact": lambda x, s: pact.quantize_activation(x, s, 2),
    "lsq": lambda x, s: lsq.quantize(x, s, 2, False),
    "lsq signed": lambda x, s: lsq.quantize(x, s, 3, True),
    "hwgq clipped": lambda x, s: hwgq.quantize_activation(x, LEVELS, "clipped"),
    "hwgq vanilla": lambda x, s: hwgq.quantize_activation(x, UNEVEN, "vanilla"),
    "hwgq log_tailed": lambda x, s: hwgq.quantize_activation(x, LEVELS, "log_tailed"),
    "hwgq half step": lambda x, s: hwgq.quantize_activation_half_step(x, hwgq.half_step_levels(2)),
    "hwgq binary": lambda x, s: hwgq.binarize_activation(x),
    "xnor": lambda x, s: xnor.binarize_activation(x),
    "uniform": lambda x, s: uniform.quantize_activation(x, torch.tensor(-0.7), torch.tensor(2.1), 4),
    "apot": lambda x, s: apot.quantize_activation(x, s, 2),
    "apot 4 bits": lambda x, s: apot.quantize_activation(x, s, 4),
    "gupta": lambda x, s: gupta.to_fixed(x, 4, 8, "nearest"),
}


@pytest.fixture(autouse=True)
def at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile functions at their first call."""
    monkeypatch.setattr(elementwise, "COMPILE_AFTER", 0)
    monkeypatch.setattr(elementwise, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(elementwise, "FEW_ELEMENTS_OF_STAGES", 0)
    monkeypatch.setattr(elementwise, "_entries", {})
    monkeypatch.setattr(elementwise, "_variants", type(elementwise._variants)())


def compiled() -> list[bool]:
    """Return for every function that was called whether it has a program."""
    return [entry.program is not None for entry in elementwise._entries.values()]


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values (4, 6, 5, 7) in channels_last: random ones, thresholds, their neighbours, zeros, tiny numbers."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, 5, 7, generator=draw)
    points = torch.tensor([i / 12 for i in range(-24, 37)] + [1 / 3, 0.31, 1.3, 1e-40, 1e-30, 3e38, 127.99, 300.0])
    around = [points, points.nextafter(points + 1), points.nextafter(points - 1), -points, torch.tensor([0.0, -0.0])]
    special = torch.cat(around)
    x.view(-1)[: len(special)] = special
    return x.to(dtype).to(memory_format=torch.channels_last)


def forward_and_backward(function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Return the result, the recomputed result, the gradient of x and the gradient of the scale."""
    x = x.clone().requires_grad_()
    scale = torch.tensor(0.31, requires_grad=True)
    result = function(x, scale)
    again = result.recompute() if hasattr(result, "recompute") else result  # type: ignore[attr-defined]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x).to(memory_format=torch.channels_last)
    result.backward(grad)
    assert x.grad is not None
    return result.detach(), again.detach(), x.grad, torch.zeros(()) if scale.grad is None else scale.grad


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same elements, also in the sign of zeros. nan equals nan."""
    numbers = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return numbers and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()) and a.stride() == b.stride()


@pytest.mark.parametrize("mode", ["recompute", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_return_the_bits_of_torch(name: str, dtype: torch.dtype, mode: str) -> None:
    x = values(dtype)
    with ops.activation_memory(mode):
        with elementwise.torch_operations():
            expected = forward_and_backward(QUANTIZERS[name], x)
        assert compiled() == []
        forward_and_backward(QUANTIZERS[name], x)
        assert compiled(), "nothing was compiled"
        assert all(compiled())
        found = forward_and_backward(QUANTIZERS[name], x)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quantized_gradients_have_the_bits_of_torch(layout: Any, dtype: torch.dtype, threads: int) -> None:
    """Each sample has its own scale, and every element its own random number."""
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(5, 40, 9, 11, generator=draw) * torch.tensor([1.0, 1e-30, 0.0, 3e38, 1e-42]).view(5, 1, 1, 1)
    x = x.to(dtype).to(memory_format=layout)

    def quantized() -> Tensor:
        return dorefa.quantize_gradient(x, 6, generator=torch.Generator().manual_seed(7))

    with elementwise.torch_operations():
        expected = quantized()
    quantized()
    assert compiled() == [True]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(quantized(), expected)
    finally:
        torch.set_num_threads(before)


def test_one_number_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, s: Tensor) -> Tensor:
        return x.mul(s).round_().div_(s)

    def found(x: Tensor, s: Tensor) -> list[bool]:
        elementwise._entries.clear()
        with elementwise.torch_operations():
            expected = elementwise.call(function, x, s)
        for _ in range(2):
            assert same_bits(elementwise.call(function, x, s), expected)
        return compiled()

    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(8))
    each = torch.tensor([3.0, 5.0, 7.0])
    assert found(x, each.view(3, 1, 1, 1)) == found(x.view(3, -1), each.view(3, 1)) == [True]
    # torch executes: numbers along another axis, samples that are not one part of memory each, and small samples
    assert found(x.transpose(0, 1), each.view(1, 3, 1, 1)) == found(x[:, :, :4], each.view(3, 1, 1, 1)) == []
    apart = x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert found(apart, each.view(3, 1, 1, 1)) == []
    monkeypatch.setattr(elementwise, "FEW_PER_SAMPLE", 1025)
    assert found(x, each.view(3, 1, 1, 1)) == []


def test_sums_with_one_number_for_each_sample_are_left_to_torch() -> None:
    def function(x: Tensor, s: Tensor) -> Tensor:
        return x.mul(s) - x.sum()

    x, s = torch.randn(2, 2048, generator=torch.Generator().manual_seed(9)), torch.tensor([[3.0], [5.0]])
    for _ in range(2):
        assert same_bits(elementwise.call(function, x, s), function(x, s))
    assert compiled() == [False]


@pytest.mark.parametrize("name", ["dorefa 2 bits", "lsq", "apot"])
def test_non_finite_gradients_pass_as_in_torch(name: str) -> None:
    x = values().requires_grad_()
    grad = torch.full_like(x, math.nan)
    grad[1], grad[2] = math.inf, -math.inf
    gradients = []
    for context in (elementwise.torch_operations, elementwise.finite_input, elementwise.finite_input):
        with context():
            x.grad = None
            QUANTIZERS[name](x, torch.tensor(0.31)).backward(grad)
            gradients.append(x.grad)
    assert all(compiled())
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_number() -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    for function in (lambda x: (x.float() * 1.7).to(x.dtype), lambda x: x * 1.7, lambda x: x.float() - 0.25):
        with elementwise.torch_operations():
            expected = elementwise.call(function, x)
        elementwise.call(function, x)
        assert same_bits(elementwise.call(function, x), expected)
    assert all(compiled())


def test_random_functions() -> None:
    """Programs of random operations return what torch returns."""
    draw = random.Random(5)
    unary: list[Callable[[Any], Any]] = [
        Tensor.neg, Tensor.abs, Tensor.round, Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.sign, Tensor.relu,
        Tensor.clone, lambda t: t.clamp(-0.5, 1.25), lambda t: t.clamp(min=0.1), lambda t: t.clamp(max=0.7),
        lambda t: 1.5 - t, lambda t: t / 3, lambda t: t * 0.7, lambda t: t.add(2), lambda t: (t > 0.3).to(t.dtype),
        lambda t: torch.where(t < 0, 0.5, t), lambda t: torch.where(~(t >= 0.1), t, -1.0),
        lambda t: t.clone().mul_(0.3).add_(1).round_(), lambda t: torch.ge(t, 0.2, out=torch.empty_like(t)),
    ]  # fmt: skip
    binary: list[Callable[[Any, Any], Any]] = [
        Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.maximum, Tensor.minimum,
        lambda a, b: torch.where((a > b) & (a != 0) | (b == 1), a, b),
        lambda a, b: torch.ops.aten.hardtanh_backward(a, b, -0.5, 0.5),
        lambda a, b: torch.ops.aten.threshold_backward(a, b, 0.25),
    ]  # fmt: skip
    x, y = values(), values().flip(0).contiguous(memory_format=torch.channels_last)
    for _ in range(60):
        steps = [(draw.choice(unary), draw.choice(binary), draw.random() < 0.4) for _ in range(draw.randrange(1, 5))]

        CHOSEN[:] = steps
        elementwise._entries.clear()
        elementwise._variants.clear()
        results = [elementwise.call(all_chosen, x, y, torch.tensor(0.8)) for _ in range(2)]
        assert compiled() == [True], steps
        for found, expected in zip(results[1], results[0], strict=True):
            assert same_bits(found, expected), steps


CHOSEN: list[tuple[Callable[[Any], Any], Callable[[Any, Any], Any], bool]] = []


def all_chosen(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x, y
    for one, two, swap in CHOSEN:
        a, b = one(two(a, b)), b * s
        a, b = (b, a) if swap else (a, b)
    return a, b


def test_sums_are_those_of_torch_and_may_be_used_in_turn() -> None:
    def function(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        share = (x * s).sum() / x.abs().sum().clamp(min=1)
        rest = x - share * s
        return rest.mul(2), rest.sum() + share

    x = values().clamp(-5, 5)
    with elementwise.torch_operations():
        expected = elementwise.call(function, x, torch.tensor(0.7))
    elementwise.call(function, x, torch.tensor(0.7))
    found = elementwise.call(function, x, torch.tensor(0.7))
    assert compiled() == [True]
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


class Scale:
    """An object that a function refers to."""

    value = 2.0


def changes_its_input(x: Tensor) -> Tensor:
    return x.mul_(1)


SCALE = Scale()
WEIGHTS = torch.ones(4, 6, 5, 7).to(memory_format=torch.channels_last)
NOT_COMPILED: dict[str, Callable[[Tensor], Tensor]] = {
    "a part": lambda x: x - x.flatten()[1],
    "shifted": lambda x: x + x.roll(1),
    "random": lambda x: x + torch.rand_like(x),
    "a random number": lambda x: x + torch.randint(2, ()),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "a number of the input": lambda x: x * float(x.sum()),
    "its size": lambda x: x * x.numel(),
    "a mean over some axes": lambda x: x - x.mean((2, 3), keepdim=True),
    "other dimensions": lambda x: x.sum(1).unsqueeze(1) + x,
    "a float64 copy": lambda x: (x.double() / 3).float(),
    "a sum with a factor": lambda x: x.add(x, alpha=0.3),
    "another function": lambda x: x.exp(),
    "its input": changes_its_input,
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_all_other_functions_are_executed_by_torch(name: str) -> None:
    function, x = NOT_COMPILED[name], values().clamp(-5, 5)
    for seed in range(6):
        torch.manual_seed(seed)
        found = [elementwise.call(function, x), torch.rand(3)]
        torch.manual_seed(seed)
        expected = [function(x), torch.rand(3)]
        assert all(map(same_bits, found, expected))
    assert compiled() == [False]


def closing_over(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (value.value if isinstance(value, Scale) else value)


@pytest.mark.parametrize("value", [SCALE, WEIGHTS, [2.0]], ids=["an object", "a large tensor", "a list"])
def test_functions_of_changeable_objects_have_no_program(value: Any) -> None:
    assert closing_over(SCALE)(values()).shape == (4, 6, 5, 7)
    function = closing_over(value) if not isinstance(value, list) else lambda x: x * value[0]
    elementwise.call(function, values())
    assert compiled() == []


def test_tensors_of_one_element_are_read_at_every_call() -> None:
    x, step = values(), torch.tensor(0.5)
    for number in (0.5, 0.25, 3.0):
        step.fill_(number)
        assert torch.equal(elementwise.call(closing_over(step), x), x * number)
    assert compiled() == [True]


def test_levels_and_numbers_are_part_of_the_program() -> None:
    x = values()
    for levels in (LEVELS, LEVELS * 2):
        for _ in range(2):
            found = hwgq.quantize_activation(x, levels)
            assert set(found.unique().tolist()) == {0.0, *levels.tolist()}
    for number in (2.0, 3.0, 0.0, -0.0):
        for _ in range(2):
            assert same_bits(elementwise.call(closing_over(number), x.clamp(-5, 5)), x.clamp(-5, 5) * number)


def test_partial_functions() -> None:
    x = values().clamp(-5, 5)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)):
        assert torch.equal(elementwise.call(partial(torch_clamp, low=low, high=high), x), x.clamp(low, high))
    assert compiled() == [True, True]


def torch_clamp(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def test_equal_code_of_two_modules_is_not_confused() -> None:
    x = values().clamp(-5, 5)
    for factor in (2.0, 3.0):
        module = ModuleType("users_own")
        exec("def scaled(x):\n    return helper(x)\n", module.__dict__)
        module.__dict__["helper"] = closing_over(factor)
        for _ in range(2):
            assert torch.equal(elementwise.call(module.scaled, x), x * factor)


def test_functions_with_ever_new_numbers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "MAX_VARIANTS", 8)
    x = values().clamp(-5, 5)
    for i in range(3 * elementwise.MAX_VARIANTS):
        assert torch.equal(elementwise.call(closing_over(i / 7), x), x * (i / 7))
    assert compiled() == [True] * elementwise.MAX_VARIANTS


def test_torch_computes_few_elements_faster_if_there_are_several_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values()
    for _ in range(2):
        dorefa.quantize_weight(x, 3)
    (entry,) = elementwise._entries.values()
    assert entry.program.stages > 1
    used = []
    monkeypatch.setattr(type(entry.program), "__call__", lambda self, *args: used.append(args) or (x, True))
    for name in ("FEW_ELEMENTS_OF_STAGES", "FEW_ELEMENTS"):
        monkeypatch.setattr(elementwise, name, x.numel() + 1)
        dorefa.quantize_weight(x, 3)
        assert not used
        monkeypatch.setattr(elementwise, name, x.numel())
        dorefa.quantize_weight(x, 3)
        assert used.pop()


def test_a_function_is_compiled_once_it_has_computed_many_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values()
    monkeypatch.setattr(elementwise, "COMPILE_AFTER", 3 * x.numel())
    for expected in ([False], [False], [True], [True]):
        dorefa.quantize_activation(x, 2)
        assert compiled() == expected


def test_gaps_other_shapes_and_other_types_are_left_to_torch() -> None:
    def added(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    x = values()
    pairs = [
        (x[:, ::2], x[:, ::2]),
        (x, x.contiguous()),
        (x, x[:1]),
        (x.expand(2, 4, 6, 5, 7), x.expand(2, 4, 6, 5, 7)),
        (x.double(), x.double()),
        (x[0, 0, 0, 0], x[0, 0, 0, 1]),
        (x[:0], x[:0]),
        (torch._neg_view(x), torch._neg_view(x)),
    ]
    for a, b in pairs:
        for _ in range(2):
            assert torch.equal(elementwise.call(added, a, b), a + b)


def test_tensors_without_memory_are_left_to_torch() -> None:
    x = values()
    for _ in range(2):
        expected = dorefa.quantize_activation(x, 2)
    assert compiled() == [True]
    assert torch.equal(torch.func.vmap(lambda t: dorefa.quantize_activation(t, 2))(x), expected)
    with FakeTensorMode() as mode:
        assert dorefa.quantize_activation(mode.from_tensor(x), 2).shape == x.shape
    assert dorefa.quantize_activation(x.to("meta"), 2).shape == x.shape


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_tracers_and_counters_see_the_operations_of_torch() -> None:
    def quantize(x: Tensor) -> Tensor:
        return dorefa.quantize_activation(x, 2)

    x = values()
    for _ in range(2):
        quantize(x)
    assert compiled() == [True]
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(make_fx(quantize, tracing_mode=mode)(x)(x / 2), quantize(x / 2)), mode
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(quantize, x, check_trace=False)(x / 2), quantize(x / 2))

    seen: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Names():
        quantize(x)
    assert "clamp" in seen


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    x = torch.randn(3 * elementwise_chunk() + 17, generator=torch.Generator().manual_seed(0))
    quantize = QUANTIZERS["lsq signed"]
    before = torch.get_num_threads()
    found = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        scale = torch.tensor(0.31, requires_grad=True)
        result = quantize(x, scale)
        found.append(result.detach())
    torch.set_num_threads(before)
    assert compiled() == [True]
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def elementwise_chunk() -> int:
    from qbench.quant.native_code import CHUNK

    return CHUNK


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    return install(dorefa.build(w=2, a=2), net, example=torch.zeros(1, 3, 12, 12))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_inf_and_nan_stop_a_network(network: nn.Module, bad: float, place: int) -> None:
    layer = network[2]
    x = torch.rand(2, 4, 10, 10)
    for _ in range(2):
        layer(x)
    assert any(compiled())
    x.view(-1)[place] = bad
    with pytest.raises(NotFinite, match=r"1 of 800 values of its input"):
        layer(x)
    layer(x.nan_to_num(0.5, 0.5, 0.5))


def test_large_finite_inputs_are_accepted(network: nn.Module) -> None:
    x = torch.full((2, 4, 10, 10), 3e38)  # the sum overflows
    assert all(network[2](x).isfinite().all() for _ in range(3))
    assert any(compiled())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inputs_of_every_type_are_checked(network: nn.Module, dtype: torch.dtype) -> None:
    layer = network[2].to(dtype)
    x = torch.full((2, 4, 10, 10), 0.9 * torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
    with elementwise.torch_operations():
        assert layer(x).isfinite().all()
        for bad in (math.inf, -math.inf, math.nan):
            x[1, 2, 3, 4] = bad
            with pytest.raises(NotFinite, match=r"1 of 800 values of its input"):
                layer(x)


def test_the_check_is_of_the_layers_own_input(network: nn.Module) -> None:
    """If a quantizer computes something else first, the layer's input is checked separately."""

    class Shifted(nn.Module):
        complete = True

        def forward(self, x: Tensor) -> Tensor:
            return dorefa.quantize_activation(x.nan_to_num(0.5), 2)

    network[2].input_q = Shifted()
    x = torch.rand(2, 4, 10, 10)
    for _ in range(2):
        network[2](x)
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(NotFinite):
        network[2](x)


def test_without_llvmlite_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values()
    expected = [forward_and_backward(QUANTIZERS["pact"], x) for _ in range(2)][1]
    assert all(compiled())
    elementwise._entries.clear()
    monkeypatch.setattr(elementwise, "available", lambda: False)
    found = forward_and_backward(QUANTIZERS["pact"], x)
    assert compiled() == []
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_a_quantizer_in_a_users_file_is_compiled_too() -> None:
    def quantize(x: Tensor) -> Tensor:
        return fused_quantizer(
            x,
            plain=lambda x: ops.round_ste(x.clamp(0, 2) * 3) / 3,
            value=lambda x: x.clamp(0, 2).mul_(3).round_().div_(3),
            backward=lambda grad, x: grad * ((x >= 0) & (x <= 2)),
        )

    x = values()
    with ops.reference_kernels():
        expected = forward_and_backward(lambda x, s: quantize(x), x)
    for _ in range(2):
        found = forward_and_backward(lambda x, s: quantize(x), x)
    assert compiled() == [True, True]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])  # autograd multiplies by 3 and divides by 3


def test_nan_and_numbers_that_bfloat16_rounds() -> None:
    """A learned bound that is nan must not become an ordinary level."""
    x, bounds = values(), (torch.tensor(torch.nan), torch.tensor(0.5))

    def between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x / high, low), high).round()

    def above(x: Tensor) -> Tensor:
        return (x > 0.3).to(x.dtype)

    def either(x: Tensor) -> Tensor:
        return ((x > 0) + (x > 1)).to(x.dtype)

    for function, arguments in ((between, (x, *bounds)), (above, (values(torch.bfloat16),)), (either, (x,))):
        expected = function(*arguments)
        for _ in range(3):
            assert elementwise._identical(elementwise.call(function, *arguments), expected), function
    ordinary = (x, torch.tensor(-0.5), torch.tensor(0.5))
    elementwise.call(between, *ordinary)
    assert elementwise._identical(elementwise.call(between, x, *bounds), between(x, *bounds))
