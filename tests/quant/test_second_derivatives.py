"""Derivatives of gradients: those of the definitions, or an error that says what does not work."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck

from qbench.methods import dorefa, gupta, hwgq, lsq, pact, ttq, uniform, xnor
from qbench.models import resnet
from qbench.quant.install import install
from qbench.quant.ops import activation_memory, reference_kernels, without_rounding

X = torch.linspace(-1.83, 2.71, 41)
ONE, THREE = torch.tensor(1.0), torch.tensor(0.3)
Function = Callable[..., Tensor]

QUANTIZERS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "dorefa clip": (lambda x: dorefa.quantize_activation(x, 2), ()),
    "dorefa abs": (lambda x: dorefa.quantize_activation_abs(x, 2), ()),
    "dorefa tanh": (lambda x: dorefa.quantize_activation_tanh(x, 2), ()),
    "dorefa weights": (lambda x: dorefa.quantize_weight(x, 2), ()),
    "dorefa weights, 1 bit": (lambda x: dorefa.quantize_weight(x, 1), ()),
    "pact": (lambda x, alpha: pact.quantize_activation(x, alpha, 2), (ONE,)),
    "lsq unsigned": (lambda x, step: lsq.quantize(x, step, 2, False), (THREE,)),
    "lsq signed": (lambda x, step: lsq.quantize(x, step, 3, True), (THREE,)),
    "uniform": (lambda x: uniform.quantize_activation(x, -ONE, 2 * ONE, 3), ()),
    "hwgq clipped": (lambda x: hwgq.quantize_activation(x, hwgq.half_wave_levels(2), "clipped"), ()),
    "hwgq log_tailed": (lambda x: hwgq.quantize_activation(x, hwgq.half_wave_levels(2), "log_tailed"), ()),
    "hwgq half_step": (lambda x: hwgq.quantize_activation_half_step(x, hwgq.half_step_levels(2), "vanilla"), ()),
    "xnor": (xnor.binarize_activation, ()),
    "gupta": (lambda x: gupta.to_fixed(x, 2, 3, "nearest"), ()),
    "ttq": (lambda x, p, n: ttq.ternarize_weight(x, p, n, torch.tensor(0.5)), (ONE, THREE)),
}


def hessian_vector(function: Function, learned: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the product of the Hessian of a nonlinear loss with a vector."""
    inputs = [t.clone().requires_grad_() for t in (X, *learned)]
    loss = (function(*inputs) ** 3 * torch.arange(1.0, 42)).sum() + (inputs[0] ** 2).sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    product = sum((g * torch.cos(torch.arange(1.0, 1 + g.numel())).reshape(g.shape)).sum() for g in gradients)
    return list(torch.autograd.grad(product, inputs))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_second_derivatives_of_the_fused_form_are_those_of_the_definition(name: str) -> None:
    fused = hessian_vector(*QUANTIZERS[name])
    with reference_kernels():
        expected = hessian_vector(*QUANTIZERS[name])
    for found, right in zip(fused, expected, strict=True):
        torch.testing.assert_close(found, right)
        assert found.abs().sum() > 0


@pytest.mark.parametrize("name", ["dorefa weights", "dorefa clip", "pact", "lsq unsigned", "lsq signed", "uniform"])
def test_without_rounding_second_derivatives_agree_with_differences(name: str) -> None:
    function, learned = QUANTIZERS[name]
    inputs = tuple(t.double().requires_grad_() for t in (X[::4] + 0.011, *learned))
    with without_rounding():
        assert gradgradcheck(lambda *args: function(*args) ** 3, inputs)


def test_second_derivatives_by_hand() -> None:
    """For L = sum q^3 the second derivative of a clipped step function, straight-through, is 6 q inside the range."""
    x = torch.tensor([-0.5, 0.2, 0.8, 1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad((dorefa.quantize_activation(x, 2) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.tensor([0, 6 / 3, 6 * 2 / 3, 0]))
    alpha = torch.tensor(1.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((pact.quantize_activation(x, alpha, 2) ** 3).sum(), alpha, create_graph=True)
    (second,) = torch.autograd.grad(gradient, alpha)
    assert second.item() == 6  # one value is clipped, and there q = alpha
    levels = hwgq.half_wave_levels(2)
    tail = torch.tensor([3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(hwgq.quantize_activation(tail, levels, "log_tailed"), tail, create_graph=True)
    (second,) = torch.autograd.grad(gradient, tail)
    assert second.item() == pytest.approx(-((3 - levels[-1].item() + 1) ** -2))


@pytest.mark.parametrize("method", [dorefa.build(w=2, a=2), lsq.build(), pact.build(), uniform.build(w=3, a=3)])
def test_a_penalty_on_gradients_of_a_network(method: object) -> None:
    """The inputs of convolutions are computed again in the backward pass."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def penalized() -> list[Tensor]:
        torch.manual_seed(0)
        model = install(method, resnet.build((3, 8, 8), 10, depth=8, width=4), example=x)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        return list(torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True))

    fused = penalized()
    with reference_kernels():
        expected = penalized()
    for found, right in zip(fused, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * right.abs().max().item() + 1e-6)


def test_second_derivatives_that_do_not_exist_are_refused() -> None:
    x = X.clone().requires_grad_()
    with activation_memory("codes"):
        y = dorefa.quantize_activation(x, 2)
        with pytest.raises(NotImplementedError, match="activation_memory=recompute"):
            torch.autograd.grad((y**3).sum(), x, create_graph=True)
    y = dorefa.DoReFaGradient(4)(x * 2, x)
    with pytest.raises(NotImplementedError, match=r"use bits\.g=32"):
        torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (once,) = torch.autograd.grad((y**3).sum(), x)
    assert once.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms_of_functions_are_refused_by_name() -> None:
    model = install(dorefa.build(w=2, a=2), nn.Sequential(*(nn.Linear(41, 41) for _ in range(3))), example=X[None])
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, w, (x[None],)).sum()
        return result

    attempts: list[Callable[[], object]] = [
        lambda: torch.func.grad(loss)(weights, X),
        lambda: torch.func.vmap(loss, (None, 0))(weights, X.expand(2, -1)),
        lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X.expand(2, -1)),
        lambda: torch.func.jvp(lambda x: loss(weights, x), (X,), (X,)),
        lambda: torch.func.grad(lambda x: dorefa.quantize_activation(x, 2).sum())(X),
        lambda: torch.func.hessian(lambda x: dorefa.quantize_activation(x, 2).sum())(X),
    ]
    for attempt in attempts:
        with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad, with create_graph=True"):
            attempt()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="do not work inside"):
        dorefa.quantize_activation(forward_ad.make_dual(X, X), 2)
