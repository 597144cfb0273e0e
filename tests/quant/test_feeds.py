"""The activations that quantizers replace, found by running a network that does not declare them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods import dorefa, hwgq, pact, xnor
from qbench.models import lenet, mobilenet_v2, resnet, vgg_small, wide_resnet
from qbench.quant.feeds import feeds, trace_feeds
from qbench.quant.install import install
from qbench.quant.layers import BypassedActivation, float_mode, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.policy import Policy, execution_order

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DECLARED: Mapping[str, Callable[[], nn.Module]] = {
    "pre-activation": lambda: resnet.build((3, 32, 32), 10, depth=8, width=4),
    "pre-activation, 1x1 shortcut": lambda: resnet.build((3, 32, 32), 10, depth=14, width=4, shortcut="B"),
    "post-activation": lambda: resnet.build((3, 32, 32), 10, depth=14, width=4, form="post"),
    "wide": lambda: wide_resnet.build((3, 32, 32), 10, depth=10, widen=1),
    "max pooling": lambda: vgg_small.build((3, 32, 32), 10, width=4),
    "flattened": lambda: lenet.build((3, 32, 32), 10),
}

NOT_DECLARED = {"max pooling": {"act6": {"fc"}}}
"""The authors of HWGQ keep the input of the last layer float."""


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tracing_finds_what_the_networks_of_qbench_declare(name: str, device: str) -> None:
    with torch.device(device):
        model = DECLARED[name]()
    declared = {act: set(layers) for act, layers in feeds(model).items()} | NOT_DECLARED.get(name, {})
    traced = trace_feeds(model, X.to(device), execution_order(model, X.to(device)))
    assert declared
    assert {act: set(layers) for act, layers in traced.feeds.items()} == declared


class Shared(nn.Module):
    """A plain network that calls one ReLU in several places, under two names; `last` is in front of the last layer."""

    def __init__(self, forward: str = "shared") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.last, self.how = nn.ReLU(), nn.ReLU(), forward
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.tail = nn.Sequential(self.act, nn.MaxPool2d(2), nn.Dropout(0.1))
        self.fc = nn.Linear(4 * 16 * 16, 5)
        self.constant = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        if self.how == "functional":
            x = self.conv3(F.relu(self.bn2(self.conv2(x))))
        elif self.how == "sum":
            x = x + self.conv3(self.tail[0](self.bn2(self.conv2(x))))
            return self.fc(F.max_pool2d(self.last(self.bn3(x)), 2).flatten(1))  # type: ignore[no-any-return]
        elif self.how == "unknown":
            x = self.conv2(x) + self.constant
        else:
            x = self.conv3(self.tail(self.bn2(self.conv2(x))))
            return self.fc(self.last(self.bn3(x)).flatten(1))  # type: ignore[no-any-return]
        return self.fc(F.max_pool2d(self.last(self.bn3(x)), 2).flatten(1))  # type: ignore[no-any-return]


class Limited(nn.Module):
    """A network that declares an activation function with an upper limit."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.second, self.last = nn.Linear(4, 4), act, nn.Linear(4, 4), nn.Linear(4, 2)
        self.feeds = {"act": ("second",)}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.act(self.first(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [pact.build(w=4, a=4), dorefa.build(w=4, a=4)])
def test_only_a_relu_is_replaced_without_being_asked(method: Method) -> None:
    """PACT's clipping level begins above 6, so ReLU6 before the quantizer changes values."""
    for act, how, bypassed in ((nn.ReLU(), "auto", True), (nn.ReLU6(), "auto", False), (nn.ReLU6(), "fused", True)):
        model = install(method, Limited(act), act=how)
        assert isinstance(model.act, BypassedActivation) == bypassed, (act, how)


def test_a_shared_activation_is_replaced_under_each_of_its_names() -> None:
    original = Shared().eval()
    model = install(xnor.build(), copy.deepcopy(original), example=X)
    assert isinstance(model.act, BypassedActivation)
    assert model.act.readers == ("conv2", "conv3")
    assert model.tail[0] is model.act
    assert not isinstance(model.last, BypassedActivation), "the last layer is float"
    assert list(quantized_layers(model)) == ["conv2", "conv3"]
    seen: list[Tensor] = []
    model.conv3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(X)
    assert (seen[0] < 0).any(), "sign(x) needs the negative values"
    with float_mode(model):
        torch.testing.assert_close(model(X), original(X))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("functional", "conv3: the layer reads the result of the function relu, not of a module nn.ReLU"),
        ("sum", "conv2 and 1 more: act is called 2 times, and also feeds add"),
        ("unknown", "conv2: the network reads values of unknown origin"),
    ],
)
def test_what_cannot_be_replaced_is_named(how: str, reason: str) -> None:
    with pytest.raises(Unsupported) as raised:
        install(xnor.build(), Shared(how), example=X)
    first, second = str(raised.value).split("\n")
    assert first.startswith(f"xnor replaces the activation function, which is not possible for {reason}")
    assert second.startswith("give each of these layers its own nn.ReLU, or keep its input float: ")
    rule = second.partition("layers.rules={")[2].rstrip("'}").split(": ")
    assert rule[1] == "w1"
    allowed = Policy(rules={"conv[23]": "w1"})
    layers = quantized_layers(install(xnor.build(), Shared(how), allowed, example=X))
    assert all(layer.bits.a == 32 for layer in layers.values())


class Concatenated(nn.Module):
    """A layer reads the output of a ReLU together with another tensor, which has a ReLU of its own or none."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)
        self.one, self.other = nn.ReLU(), nn.ReLU() if both else nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.second(torch.cat([self.one(x), self.other(x)], 1)).mean((2, 3)))
        return y


@pytest.mark.parametrize("both", [False, True])
def test_a_relu_that_is_joined_with_signed_values_is_not_replaced(both: bool) -> None:
    model = Concatenated(both)
    found = trace_feeds(model, X, execution_order(model, X))
    assert found.feeds == ({"one": ("second",), "other": ("second",)} if both else {})
    if not both:
        with pytest.raises(Unsupported, match="second: the layer reads the result of BatchNorm2d other"):
            install(xnor.build(), model, example=X)


METHODS: Mapping[str, Any] = {
    "pact": lambda: pact.build(w=2, a=2),
    "dorefa": lambda: dorefa.build(w=2, a=2),
    "hwgq": lambda: hwgq.build(w=1, a=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_replacing_and_keeping_give_the_same_values(name: str) -> None:
    """For these methods the quantizer contains the activation function."""
    kept = install(METHODS[name](), Shared(), example=X).eval()
    fused = install(METHODS[name](), Shared(), example=X, act="fused").eval()
    assert isinstance(fused.act, BypassedActivation)
    assert not isinstance(kept.act, BypassedActivation)
    assert torch.equal(kept(X), fused(X))


def test_a_network_without_any_relu_module_is_refused_if_one_must_be_replaced() -> None:
    with torch.device("meta"):
        model = mobilenet_v2.build((3, 32, 32), 10)
    del model.feeds
    with pytest.raises(Unsupported, match="which is not possible for"):
        install(pact.build(), model, example=X.to("meta"), act="fused")


class Supervised(nn.Module):
    """A network whose training also reads the output of a ReLU, as an auxiliary head does. `labels` may be required."""

    def __init__(self, labels: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv0, self.conv1 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.act0, self.act1, self.fc, self.aux = nn.ReLU(), nn.ReLU(), nn.Linear(4, 5), nn.Linear(4, 5)
        self.labels = labels

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.act0(self.conv0(x))
        y: Tensor = self.fc(self.act1(self.conv1(h)).mean((2, 3)))
        if self.training:
            y = y + self.aux(h.mean((2, 3)))
            if self.labels:
                return F.cross_entropy(y, labels)  # type: ignore[arg-type]
        return y


@pytest.mark.parametrize(("method", "act"), [(xnor.build(), "auto"), (hwgq.build(), "fused"), (pact.build(), "fused")])
def test_an_activation_that_training_reads_elsewhere_is_not_replaced(method: Any, act: str) -> None:
    model = Supervised()
    with pytest.raises(Unsupported, match="conv1: in training, act0 also feeds mean"):
        install(method, model, example=X, act=act)
    assert type(model.act0) is nn.ReLU
    install(hwgq.build(), model, example=X)
    assert type(model.act0) is nn.ReLU


def test_networks_that_need_labels_for_training_are_replaced_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = install(xnor.build(), Supervised(labels=True), example=X)
    assert type(model.act0) is BypassedActivation
    assert [record.name for record in caplog.records] == ["qbench"] * 2
    assert "does not run on images alone in training mode (TypeError: cross_entropy" in caplog.text
    unchecked = "qbench therefore did not check whether"
    replaced = "activation functions that quantizers replace"
    assert f"{unchecked} other code in training uses the outputs of {replaced}" in caplog.text
    assert f"{unchecked} training uses the weights of a quantized layer" in caplog.text


class ReLU(nn.Module):
    """A user's class with the name of torch's class."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.3)


def own_class(act: nn.ReLU) -> nn.Module:
    return ReLU()


def own_function(act: nn.ReLU) -> nn.Module:
    act.forward = lambda x: F.leaky_relu(x, 0.3)  # type: ignore[method-assign, assignment]
    return act


def changed_input(act: nn.ReLU) -> nn.Module:
    act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return act


def changed_output(act: nn.ReLU) -> nn.Module:
    act.register_forward_hook(lambda module, args, output: output + 1)
    return act


@pytest.mark.parametrize("change", [own_class, own_function, changed_input, changed_output])
def test_only_an_unchanged_relu_of_torch_is_replaced(change: Callable[[nn.ReLU], nn.Module]) -> None:
    model = Shared()
    model.act = change(nn.ReLU())  # type: ignore[assignment]
    model.tail[0] = model.act
    with pytest.raises(
        Unsupported,
        match=r"the layer reads the result of (own ReLU|modified ReLU|add)",
    ):
        install(xnor.build(), model, example=X)


@pytest.mark.parametrize("value", [["conv1"], {"conv1": 3}, 5])
def test_a_users_attribute_named_feeds_is_left_alone(value: object) -> None:
    model = Shared()
    model.feeds = value  # type: ignore[assignment]
    install(xnor.build(), model, example=X)
    assert model.feeds == value
    assert isinstance(model.act, BypassedActivation)


def test_float_mode_inside_float_mode_ends_with_the_outer_block() -> None:
    model = install(xnor.build(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
                    example=X)  # fmt: skip
    (bypassed,) = (module for module in model.modules() if isinstance(module, BypassedActivation))
    bypassed.active = True
    with float_mode(model):
        assert bypassed.active
    assert bypassed.active, "another block keeps the activation function"
