"""Tensors that were changed in place between the forward and the backward pass give an error, as in torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods import dorefa, gupta, hwgq, lsq, pact
from qbench.quant import ops
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.ops import activation_memory

MODES = ["keep", "recompute", "codes"]


@pytest.fixture(autouse=True)
def recompute_small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "FEW_ELEMENTS", 0)


class Net(nn.Module):
    """A network that changes the input of its quantized layer after the layer has read it, if `change` is set."""

    def __init__(self, change: float = 1.0) -> None:
        super().__init__()
        self.c0, self.c1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.change = nn.Linear(8, 10), change

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c0(x))
        y: Tensor = self.c1(h)
        if self.change != 1.0 and self.training:
            h.mul_(self.change)
        return self.fc((y + h).mean((2, 3)))  # type: ignore[no-any-return]


def quantized(method: Method, change: float = 1.0) -> Net:
    torch.manual_seed(0)
    net = Net(change)
    install(method, net, example=torch.rand(2, 3, 8, 8))
    return net.train()


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


UNQUANTIZED = [
    *(build(w=32, a=2) for build in (dorefa.build, lsq.build, pact.build, hwgq.build)),
    gupta.build(rounding="nearest"),
]
"""Methods that leave weights in float, or whose quantizers return the weights as they are."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", UNQUANTIZED, ids=lambda method: method.name)
def test_float_weights(method: Method, mode: str) -> None:
    """Two losses with an optimizer step between them, as in adversarial training."""
    net = quantized(method)
    with activation_memory(mode):
        loss = net(IMAGES).square().sum()
        with torch.no_grad():
            net.c1.weight.mul_(3)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            loss.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [lsq.build, pact.build], ids=lambda b: b.__module__)
def test_learned_parameters(build: Callable[..., Method], mode: str) -> None:
    net = quantized(build(w=2, a=2))
    with activation_memory(mode):
        net(IMAGES)
        loss = net(IMAGES).square().sum()
        with torch.no_grad():
            for parameter in net.c1.input_q.parameters():
                parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            loss.backward()


def weight_gradient(method: Method, change: float, mode: str, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the logits, and the weights' gradient of a loss whose gradient is that of the logits `reference`."""
    net = quantized(method, change)
    with activation_memory(mode):
        logits = net(IMAGES)
        upstream = 2 * (logits if reference is None else reference).detach()
        return logits.detach(), torch.autograd.grad(logits, [net.c1.weight], upstream)[0]


BUILDS = [dorefa.build, lsq.build, pact.build, hwgq.build]


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.__module__)
def test_a_changed_input_that_was_kept(build: Callable[..., Method]) -> None:
    """The gradient of the weights is that of the values of the forward pass."""
    logits, expected = weight_gradient(build(w=32, a=2), 1.0, "keep")
    assert torch.equal(weight_gradient(build(w=32, a=2), 3.0, "keep", logits)[1], expected)


@pytest.mark.parametrize("mode", ["recompute", "codes"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.__module__)
def test_a_changed_input_that_was_not_kept(build: Callable[..., Method], mode: str) -> None:
    """Codes do not change with the input. All other quantizers would recompute their result from the changed input."""
    logits, expected = weight_gradient(build(w=32, a=2), 1.0, mode)
    if mode == "codes" and build is not lsq.build:
        assert torch.equal(weight_gradient(build(w=32, a=2), 3.0, mode, logits)[1], expected)
        return
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        weight_gradient(build(w=32, a=2), 3.0, mode, logits)


@pytest.mark.parametrize("mode", MODES)
def test_changes_after_the_backward_pass_are_allowed(mode: str) -> None:
    net = quantized(lsq.build(w=2, a=2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with activation_memory(mode):
        for _ in range(3):
            optimizer.zero_grad()
            net(IMAGES).square().sum().backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
