"""Quantizing all weights at the start of a forward pass changes no bit of a result."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.config import registry
from qbench.methods import dorefa
from qbench.quant.install import install
from qbench.quant.layers import NotFinite, quantized_layers
from qbench.quant.method import Method
from qbench.quant.quantizer import Quantizer
from qbench.quant.weights_first import WeightsFirst


class Net(nn.Module):
    """Three convolutions. The second is called `repeats` times, and not at all if this is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.third = nn.Conv2d(6, 6, 3, bias=False)
        self.last = nn.Linear(6, 5)
        self.norm = nn.BatchNorm2d(6)
        self.repeats = 1
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        for _ in range(self.repeats):
            x = self.second(x).relu()
        self.between()
        x = self.third(x).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def network(method: Method) -> Net:
    """Return a quantized network. The middle layers are quantized."""
    torch.manual_seed(3)
    model = install(method, Net(), example=torch.rand(2, 3, 9, 9))
    assert isinstance(model, Net)
    return model


def train(
    model: Net, forward: Callable[[], AbstractContextManager[None]], steps: int = 4, **changes: Any
) -> list[Tensor]:
    """Train for some steps. Return the losses, and all gradients and parameters after each step."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for step in range(steps):
        for name, values in changes.items():
            setattr(model, name, values[step])
        images, labels = torch.rand(4, 3, 9, 9), torch.randint(5, (4,))
        optimizer.zero_grad()
        with forward():
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        seen += [loss.detach(), *(g.clone() for g in grads), *(p.detach().clone() for p in model.parameters())]
    return [*seen, torch.rand(3)]  # random numbers that follow


def identical(build: Callable[[], Net], **changes: Any) -> None:
    """Assert that training gives equal bits with and without `WeightsFirst`."""
    usual, first = train(build(), nullcontext, **changes), train(build(), WeightsFirst().forward, **changes)
    assert len(usual) == len(first)
    assert all(map(torch.equal, usual, first))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dorefa", {"w": 2, "a": 2}), ("dorefa", {"w": 2, "a": 2, "g": 6}), ("lsq", {"w": 2, "a": 2}), ("ttq", {}),
        ("apot", {"w": 3, "a": 3}), ("uniform", {"w": 4, "a": 4}), ("qd", {"stochastic": True}), ("bwn", {}),
    ],
)  # fmt: skip
def test_training_is_identical(name: str, options: dict[str, Any]) -> None:
    identical(lambda: network(registry.find("method", name)(**options)))


def test_layers_that_are_called_more_than_once_or_not_at_all() -> None:
    identical(lambda: network(dorefa.build(w=2, a=2)), repeats=[1, 0, 2, 1])
    identical(lambda: network(registry.find("method", "qd")(stochastic=True)), repeats=[2, 1, 0, 2])


class Recording(Quantizer):
    """A quantizer that records the order of the forward and backward passes."""

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self.name, self.events = name, events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append(f"{self.name} forward")
        result = x * 1
        result.register_hook(lambda grad: self.events.append(f"{self.name} backward"))
        return result


def recording(events: list[str]) -> Method:
    """Return a method whose quantizers record their calls."""
    return Method(
        name="recording", bits=Bits(2, 2), supported_bits={"w": (2, 32), "a": (2, 32), "g": (32,)},
        weight=lambda name, layer, bits: Recording(f"{name} weight", events),
        input=lambda name, layer, bits: Recording(f"{name} input", events),
    )  # fmt: skip


def test_weights_are_quantized_first_and_differentiated_last() -> None:
    events: list[str] = []
    model = network(recording(events))
    first = WeightsFirst()
    train(model, first.forward, steps=1)
    events.clear()
    with first.forward():
        loss = model(torch.rand(4, 3, 9, 9)).sum()
    loss.backward()
    weights = [f"{name} weight" for name in quantized_layers(model)]
    assert len(weights) == 2
    forward = [event for event in events if "forward" in event]
    assert forward[1:3] == [f"{name} forward" for name in weights]  # after the input of the first layer
    assert events[-3:-1] == [f"{name} backward" for name in reversed(weights)]


def test_weights_that_change_during_the_forward_pass() -> None:
    def build() -> Net:
        model = network(dorefa.build(w=2, a=2))

        def change() -> None:
            with torch.no_grad():
                model.third.weight.mul_(1.5)

        model.between = change
        return model

    identical(build)


def test_weights_that_change_without_a_new_version() -> None:
    def build() -> Net:
        model = network(dorefa.build(w=3, a=2))
        model.between = lambda: model.third.weight.data.mul_(0.9)
        return model

    identical(build)


class Counting(Quantizer):
    """A quantizer that adds to a buffer in every call, and scales the weights by it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, w: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return w * (1 + self.calls)


def test_quantizers_that_change_their_buffers_change_them_only_when_their_layer_is_called() -> None:
    method = Method(
        name="counting", bits=Bits(2, 32), supported_bits={"w": (2, 32), "a": (32,), "g": (32,)},
        weight=lambda name, layer, bits: Counting(),
    )  # fmt: skip
    identical(lambda: network(method), repeats=[1, 0, 2, 0])
    first = WeightsFirst()
    model = network(method)
    train(model, first.forward, repeats=[1, 1, 0, 0])
    assert isinstance(model.second.weight_q, Counting)
    assert model.second.weight_q.calls == 2


class CountingLater(Counting):
    """A quantizer that adds to its buffer from the third call on."""

    def forward(self, w: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(w) if self.seen > 2 else w * 1


def test_a_quantizer_that_begins_to_change_is_set_back() -> None:
    method = Method(
        name="counting", bits=Bits(2, 32), supported_bits={"w": (2, 32), "a": (32,), "g": (32,)},
        weight=lambda name, layer, bits: CountingLater(),
    )  # fmt: skip
    model = network(method)
    train(model, WeightsFirst().forward, repeats=[1, 1, 0, 1])
    assert isinstance(model.second.weight_q, Counting)
    assert model.second.weight_q.calls == 1, "only the last step calls the layer after the second call"


def test_a_part_with_gradient_after_a_part_without() -> None:
    class Part(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.second(self.first(x)).relu()
            return self.last(self.third(x).mean((2, 3)))  # type: ignore[no-any-return]

    def build() -> Net:
        torch.manual_seed(3)
        model = install(dorefa.build(w=2, a=2), Part(), example=torch.rand(2, 3, 9, 9))
        assert isinstance(model, Net)
        return model

    identical(build)


class Later(Quantizer):
    """A quantizer that adds random numbers from its third call on."""

    calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w + torch.rand_like(w) if self.calls > 2 else w * 1


def test_random_numbers_are_drawn_in_the_usual_order_as_soon_as_they_are_known() -> None:
    method = Method(
        name="later", bits=Bits(2, 32), supported_bits={"w": (2, 32), "a": (32,), "g": (32,)},
        weight=lambda name, layer, bits: Later(),
    )  # fmt: skip
    model, first = network(method), WeightsFirst()
    orders = []
    for _ in range(4):
        torch.manual_seed(1)
        with first.forward():
            model(torch.rand(4, 3, 9, 9))
        orders.append(torch.rand(1))
    model = network(method)
    for made in orders:
        torch.manual_seed(1)
        model(torch.rand(4, 3, 9, 9))
        assert torch.equal(torch.rand(1), made)


def test_nothing_remains_after_an_error_in_the_forward_pass() -> None:
    model, first = network(dorefa.build(w=2, a=2)), WeightsFirst()
    train(model, first.forward, steps=1)

    def fail() -> None:
        raise ArithmeticError

    model.between = fail
    with pytest.raises(ArithmeticError), first.forward():
        model(torch.rand(4, 3, 9, 9))
    model.between = lambda: None
    with torch.no_grad():
        model.third.weight.copy_(torch.randn_like(model.third.weight))
    images = torch.rand(4, 3, 9, 9)
    expected = model.eval()(images)
    with first.forward():
        assert torch.equal(model(images), expected)
    assert torch.equal(model(images), expected)


def test_the_message_about_weights_that_are_not_finite_names_their_layer() -> None:
    model, first = network(dorefa.build(w=2, a=2)), WeightsFirst()
    train(model, first.forward, steps=1)
    with torch.no_grad():
        model.third.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NotFinite, match="third: 1 of 324 values of its weights are inf or nan"), first.forward():
        model(torch.rand(4, 3, 9, 9))
