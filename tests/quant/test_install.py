"""Networks of users in which a layer's weights are used, made, shared or left out in unusual ways."""

import copy
import pickle
import re
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import qbench
from qbench.config import registry
from qbench.methods import bwn, dorefa, gupta, inq, lsq, mlq, slq, ttq, xnor
from qbench.quant.fold import fold_quantized_weights
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, float_mode, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.policy import Policy
from qbench.quant.verify import NotQuantized, verify

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RULE = "leave it float: 'layers.rules={%s: float}'"


class Net(nn.Module):
    """Three linear layers, the middle one of which is quantized; `middle` computes with it."""

    def __init__(self, middle: "Callable[[Net, Tensor], Tensor] | None" = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mid, self.last = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.ones(()))
        self.middle = middle or (lambda net, h: net.mid(h))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self, self.first(x.flatten(1)).relu()))
        return y


def transformer(layers: int) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, layers) if layers > 1 else layer
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), encoder, nn.Flatten(), nn.Linear(24, 10))


@pytest.mark.parametrize("layers", [1, 2])
def test_evaluation_of_a_transformer_uses_the_quantized_weights(layers: int) -> None:
    """Without gradients torch computes an encoder layer by one function that reads the weights itself."""
    original = transformer(layers).eval()
    model = install(dorefa.build(w=2, a=2), copy.deepcopy(original), example=X).eval()
    assert len(quantized_layers(model)) == 2 * layers
    with_gradients = model(X)  # here torch calls the layers
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(expected, with_gradients.detach())
        assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)
        assert torch.equal(fold_quantized_weights(model)(X), expected)
        with float_mode(model):
            torch.testing.assert_close(model(X), original(X))
        assert not torch.allclose(original(X), expected, atol=0.05)


USES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "transposed": lambda net, h: F.linear(net.mid(h), net.mid.weight.t()),
    "same": lambda net, h: F.linear(net.mid(h), net.mid.weight, net.mid.bias),
    "matmul": lambda net, h: net.mid(h) @ net.mid.weight,
    "detached": lambda net, h: net.mid(h) * net.mid.weight.detach().norm(),
    "data": lambda net, h: net.mid(h) + net.mid.weight.data.mean(),
    "signs": lambda net, h: net.mid(h) + F.linear(h, net.mid.weight.sign()),
    "counted": lambda net, h: net.mid(h) * (net.mid.weight > 0).float().mean(),
    "chosen": lambda net, h: net.mid(h) + h[:, net.mid.weight[0].argsort()],
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_that_is_used_without_a_call_of_its_layer_is_refused(use: str) -> None:
    with pytest.raises(Unsupported) as caught:
        install(dorefa.build(w=2), Net(USES[use]), example=X)
    assert str(caught.value) == (
        "mid: the network also uses the weight without calling the layer; this use would not be quantized\n"
        "call the layer, or leave it float: 'layers.rules={mid: float}'"
    )
    assert not quantized_layers(install(dorefa.build(w=2), Net(USES[use]), Policy(rules={"mid": "float"}), example=X))


class Alias(Net):
    """A network that holds the memory of a weight under another name."""

    def __init__(self, hold: "Callable[[Alias, Tensor], object]", middle: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__(middle)
        hold(self, self.mid.weight)


ALIASES: dict[str, tuple[Callable[[Alias, Tensor], object], Callable[[Any, Tensor], Tensor]]] = {
    "attribute": (lambda net, w: setattr(net, "a", w.detach()), lambda net, h: net.mid(h) + F.linear(h, net.a)),
    "data": (lambda net, w: setattr(net, "a", w.data), lambda net, h: net.mid(h) + h @ net.a),
    "buffer": (lambda net, w: net.register_buffer("a", w.detach()), lambda net, h: F.linear(net.mid(h), net.a)),
    "list": (lambda net, w: setattr(net, "a", [w.detach().t()]), lambda net, h: net.mid(h @ net.a[0])),
    "row": (lambda net, w: setattr(net, "a", w.detach()[3]), lambda net, h: net.mid(h) * net.a),
    "numpy": (
        lambda net, w: setattr(net, "a", w.detach().numpy()),
        lambda net, h: net.mid(h) @ torch.from_numpy(net.a),
    ),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_tensor_that_shares_the_memory_of_a_weight_is_refused(alias: str) -> None:
    net = Alias(*ALIASES[alias])
    weight = net.mid.weight.detach().clone()
    with pytest.raises(Unsupported, match="mid: the network also uses the weight without calling the layer"):
        install(dorefa.build(w=2), net, example=X)
    assert torch.equal(net.mid.weight, weight), "the weights are as before"
    model = install(dorefa.build(w=2), Alias(*ALIASES[alias]))
    with pytest.raises(NotQuantized, match="mid: evaluation"):
        verify(model, X)
    unread = Alias(ALIASES[alias][0], lambda net, h: net.mid(h))
    assert list(quantized_layers(install(dorefa.build(w=2), unread, example=X))) == ["mid"]


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, h: net.mid(h) if torch.is_grad_enabled() else F.linear(h, net.mid.weight),
        lambda net, h: net.mid(h) if net.training else h @ net.mid.weight,
    ],
)
def test_verification_sees_what_evaluation_alone_computes(middle: Callable[[Net, Tensor], Tensor]) -> None:
    model = install(dorefa.build(w=2), Net(middle))  # without an example, the network does not run
    with pytest.raises(NotQuantized, match=r"mid: evaluation uses its float weight without calling the layer"):
        verify(model, X)
    unused = install(dorefa.build(w=2), Net(lambda net, h: h))
    with pytest.raises(NotQuantized, match="mid: evaluation does not call the layer"):
        verify(unused, X)


TRAINING: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "linear": lambda net, h: F.linear(h, net.mid.weight, net.mid.bias) if net.training else net.mid(h),
    "signs": lambda net, h: net.mid(h) + (h @ net.mid.weight.sign() if net.training else 0),
    "norm": lambda net, h: net.mid(h) / (net.mid.weight.norm() if net.training else 1),
}


@pytest.mark.parametrize("use", TRAINING)
def test_a_weight_that_training_uses_without_a_call_of_its_layer_is_refused(use: str) -> None:
    with pytest.raises(
        Unsupported, match="mid: the network also uses the weight without calling the layer in training;"
    ):
        install(dorefa.build(w=2), Net(TRAINING[use]), example=X)


class InitializedByData(nn.Module):
    """Takes its scale from the first batch of training, and counts the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.batches = nn.Parameter(torch.ones(())), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.batches:
            self.scale.data = 1 / x.detach().std()
        self.batches += self.training
        return self.scale * x


def test_looking_at_training_changes_no_state_and_no_random_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), InitializedByData(), nn.Dropout())
    model.extend([nn.Linear(16, 16), nn.Linear(16, 10)])
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    install(dorefa.build(w=2), model, example=X)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model[3].batches == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def twice(net: Net, h: Tensor) -> Tensor:
    return net.mid(net.mid(h))


HARMLESS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "called twice": twice,
    "attributes": lambda net, h: net.mid(h.to(net.mid.weight.dtype).reshape(-1, net.mid.weight.shape[1])),
    "forward": lambda net, h: net.mid.forward(h),
    "measured": lambda net, h: (net.mid.weight.abs().max(), net.mid(h))[1],
    "random in training": lambda net, h: net.mid(F.dropout(h, training=net.training)),
}


@pytest.mark.parametrize("use", HARMLESS)
def test_harmless_uses_of_a_layer_go_on_working(use: str) -> None:
    net = Net(HARMLESS[use])
    net.mid.register_forward_pre_hook(lambda module, args: None)
    model = install(dorefa.build(w=2), net, example=X).eval()
    assert list(quantized_layers(model)) == ["mid"]
    assert verify(model, X)["mid"]["w"].allowed == 4
    w = effective_weight(model.mid)
    h = model.first(X.flatten(1)).relu()
    for _ in range(2 if use == "called twice" else 1):
        h = F.linear(h, w, model.mid.bias)
    assert torch.equal(model(X), model.last(h))
    assert torch.equal(fold_quantized_weights(model)(X), model(X))


def parametrized(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def made_by_a_hook(layer: nn.Linear) -> None:
    layer.own = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.own * 1))
    layer.weight = layer.own * 1


COMPUTED: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove(layer, 'weight')"),
    "weight_norm": (torch.nn.utils.weight_norm, "remove_weight_norm(layer)"),
    "spectral_norm": (torch.nn.utils.spectral_norm, "remove_spectral_norm(layer)"),
    "parametrization": (parametrized, "remove_parametrizations(layer, 'weight')"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations(layer, 'weight')"),
    "hook": (made_by_a_hook, "make `weight` a torch.nn.Parameter"),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_in_every_forward_pass_is_refused(kind: str) -> None:
    change, remedy = COMPUTED[kind]
    net = Net()
    change(net.mid)
    with pytest.raises(Unsupported, match=r"^mid: the weight is computed in every forward pass\n") as caught:
        install(dorefa.build(w=2), net, example=X)
    assert remedy in str(caught.value)
    assert RULE % "mid" in str(caught.value)
    after = install(dorefa.build(w=2), Net(), example=X).eval()
    change(after.mid)
    assert verify(after, X)["mid"]["w"].found <= 4, "the quantizer is still applied"
    with pytest.raises(ValueError, match="mid: the weight is computed") as caught_value:
        fold_quantized_weights(after)
    assert remedy in str(caught_value.value)


def test_after_pruning_is_made_permanent_the_weights_fold() -> None:
    model = install(dorefa.build(w=2), Net(), example=X).eval()
    prune.l1_unstructured(model.mid, "weight", 0.5)
    prune.remove(model.mid, "weight")
    folded = fold_quantized_weights(model)
    assert torch.equal(folded(X), model(X))
    assert folded.mid.weight.unique().numel() == 4


def shared(how: str) -> nn.Module:
    net = Net()
    net.other = nn.Linear(16, 16)
    if how in ("quantized", "float"):
        net.other.weight = net.mid.weight
    elif how == "view":
        net.other.weight = nn.Parameter(net.mid.weight.detach().t())
    elif how == "data":
        net.other.weight.data = net.mid.weight.data
    else:
        net.other = nn.Embedding(16, 16)
        net.other.weight = net.mid.weight
    net.middle = lambda net, h: net.other(net.mid(h) if how != "embedding" else net.mid(h).argmax(1))
    return net


@pytest.mark.parametrize("how", ["quantized", "float", "view", "data", "embedding"])
def test_a_shared_weight_is_refused(how: str) -> None:
    policy = Policy(rules={"other": "float"}) if how != "quantized" and how != "embedding" else None
    with pytest.raises(Unsupported, match=r"^mid and other share a weight") as caught:
        install(dorefa.build(w=2), shared(how), policy, example=X)
    both = "leave them float: 'layers.rules={mid: float, other: float}'"
    assert (both if how == "quantized" else RULE % "mid") in str(caught.value)
    float_both = Policy(rules={"mid": "float"} | ({"other": "float"} if how != "embedding" else {}))
    assert not quantized_layers(install(dorefa.build(w=2), shared(how), float_both, example=X))


@pytest.mark.parametrize("method", [dorefa.build(w=2), lsq.build(w=2, a=32), ttq.build(w=2)])
@pytest.mark.parametrize("other", ["quantized", "float"])
def test_weights_tied_after_installation_fold_to_the_same_outputs(method: object, other: str) -> None:
    net = shared("none")
    net.other = nn.Linear(16, 16)
    net.middle = lambda net, h: net.other(net.mid(h))
    rules = {} if other == "quantized" else {"other": "float"}
    model = install(method, net, Policy(rules=rules), example=X).eval()
    model.other.weight = model.mid.weight
    assert torch.equal(fold_quantized_weights(model)(X), model(X))


def test_a_module_under_two_names_is_not_a_shared_weight() -> None:
    net = Net(lambda net, h: net.again(net.mid(h)))
    net.again = net.mid
    assert list(quantized_layers(install(dorefa.build(w=2), net, example=X))) == ["mid"]


@pytest.mark.parametrize("method", [inq, slq, mlq, gupta])
def test_weights_that_a_loop_left_in_float_are_not_folded(method: ModuleType) -> None:
    """These methods quantize weights between steps, in functions that an ordinary loop does not call."""
    model = install(method.build(), Net(), example=X)
    with pytest.raises(ValueError, match=r"mid: weights(.|\n)*train with qbench\.run"):
        fold_quantized_weights(model)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_replaced_method_of_a_layer_is_refused(method: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    setattr(net[1], method, getattr(net[1], method))
    with pytest.raises(Unsupported, match=f"1: its method {method} was replaced.*\n.*{re.escape(RULE % '1')}"):
        install(dorefa.build(w=2), net, example=X)
    install(dorefa.build(w=2), net, Policy(rules={"1": "float"}), example=X)


class Monitored(Net):
    """Updates a buffer and an attribute in every forward pass. With `lock`, the network cannot be copied."""

    def __init__(self, lock: bool = False) -> None:
        super().__init__(lambda net, h: net.mid(h))
        self.register_buffer("mean", torch.zeros(()))
        self.calls = 0
        self.lock = threading.Lock() if lock else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.mean.mul_(0.9).add_(y.detach().mean())
        self.calls += 1
        return y


@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize("install", [install, qbench.install])
def test_looking_at_a_network_changes_no_buffers(install: Callable[..., nn.Module], lock: bool) -> None:
    model = Monitored(lock)
    model.mean.fill_(0.25)
    install(dorefa.build(w=2, a=2), model, example=X)
    assert model.mean.item() == 0.25
    assert model.calls == 0
    model(X)
    assert model.mean.item() != 0.25


def test_a_network_that_cannot_be_copied_is_checked_in_training_too() -> None:
    model = Net(lambda net, h: net.mid(h) + (h @ net.mid.weight if net.training else 0))
    model.lock = threading.Lock()
    with pytest.raises(
        Unsupported, match="mid: the network also uses the weight without calling the layer in training;"
    ):
        install(dorefa.build(w=2, a=2), model, example=X)


class Routed(nn.Module):
    """Chooses a layer by the sign of the images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        used = {int(row.sum() > 0) for row in x}
        h = self.first(x)
        for i in sorted(used):
            h = self.experts[i](h)
        y: Tensor = self.last(h)
        return y


def test_layers_that_the_example_does_not_reach_are_named(caplog: pytest.LogCaptureFixture) -> None:
    qbench.install(dorefa.build(w=2, a=2), Routed(), example=torch.ones(2, 6))
    assert [record.getMessage() for record in caplog.records] == [
        "1 layer sets negative inputs to 0 (experts.1 67 % of the inputs), because no level is negative",
        "layers that do not run on the example stay in float: experts.0, experts.2; "
        "if other images use them, pass more images",
    ]
    caplog.clear()
    model = qbench.install(dorefa.build(w=2, a=2), Routed(), example=torch.tensor([[1.0] * 6, [-1.0] * 6]))
    assert list(quantized_layers(model)) == ["experts.0", "experts.1"]
    assert "experts.2; if" in caplog.text


@pytest.mark.parametrize(
    ("name", "functions"),
    [("dorefa", []), ("inq", ["on_epoch", "step"]), ("lsq", []), ("gupta", ["prepare", "step"]),
     ("qcnn", ["prepare"]), ("ptq", ["prepare"]), ("ttq", [])],
)  # fmt: skip
def test_functions_that_a_training_loop_must_call_are_named(
    name: str, functions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    method = registry.create("method", {"name": name})
    qbench.install(method, nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), example=torch.zeros(2, 4))
    text = " ".join(record.getMessage() for record in caplog.records)
    assert [function for function in ("prepare", "on_epoch", "step") if f"{function}(model" in text] == functions
    assert (f"{name} needs more than its quantizers" in text) is bool(functions)


@pytest.mark.parametrize(("name", "warns"), [("uniform", True), ("lsq", False), ("dorefa", False)])
def test_ranges_that_are_not_known_yet_are_named(name: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    method = registry.create("method", {"name": name})
    qbench.install(method, nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), example=torch.zeros(2, 4))
    assert ("activations have the range 0 to 1 until prepare" in caplog.text) is warns


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardswish, lambda: nn.LeakyReLU(0.3), nn.ReLU])
@pytest.mark.parametrize("name", ["dorefa", "pact", "apot", "hwgq", "lsq"])
def test_negative_inputs_that_become_0_are_named(
    name: str, act: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3))
    method = registry.create("method", {"name": name} | ({} if name == "hwgq" else {"w": 3, "a": 3}))
    qbench.install(method, model, example=torch.randn(50, 6))
    texts = [record.getMessage() for record in caplog.records if "negative inputs to 0" in record.getMessage()]
    assert len(texts) == (name != "lsq" and act is not nn.ReLU)
    assert all(text.startswith("1 layer sets negative inputs to 0 (2 ") for text in texts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hwgq", "needs batch normalization without scale and shift"),
        ("gupta", "trains from random weights"),
        ("qd", "a distillation loss and a float network as teacher"),
        ("dq", "a distillation loss and a float network as teacher"),
        ("lsq", ""),
    ],
)
def test_what_a_run_does_besides_is_named(name: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    def net(affine: bool) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)
        )

    def named(affine: bool) -> bool:
        caplog.clear()
        qbench.install(registry.create("method", {"name": name}), net(affine))
        assert not words or not caplog.text or "as qbench.run does" in caplog.text
        return bool(words) and words in caplog.text

    assert (named(True), named(False)) == (bool(words), bool(words) and name != "hwgq")


@pytest.mark.parametrize("method", [bwn, inq, slq, xnor])
def test_a_method_for_float_weights_refuses_widths_of_single_layers(method: Any) -> None:
    """Phases and steps of the method are switched off, so such layers would not be trained as the method says."""
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())))
    rules = {"2": 1 if method in (bwn, xnor) else 4}
    with pytest.raises(Unsupported, match=r"2: layers\.\* sets its weights to . bits, but bits\.w=32 switches off"):
        install(method.build(w=32), net, Policy(rules=rules), example=torch.zeros(1, 8))


def test_xnors_scale_leaves_the_bias_of_a_layer_over_a_sequence_as_it_is() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(3, 8, 6)
    model = install(xnor.build(scale="K"), layers, example=x)
    layer = model[2]
    read = model[0](x)
    scale = read.abs().mean(-1, keepdim=True)
    expected = torch.where(read >= 0, 1.0, -1.0) @ layer.weight_q(layer.weight).T * scale + layer.bias
    torch.testing.assert_close(layer(read), expected)


def test_modules_that_work_in_place_train_with_quantized_gradients() -> None:
    """The output of such a layer passes through a function of its own, and autograd refuses to change it in place."""
    layers = [nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU6(inplace=True), nn.Linear(4, 2)]
    model = install(dorefa.build(w=2, a=2, g=6), nn.Sequential(*layers), example=torch.zeros(1, 4))
    model(torch.randn(3, 4)).sum().backward()
    assert model[2].weight.grad is not None
    kept = install(dorefa.build(w=2, a=2), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    assert kept[1].inplace
