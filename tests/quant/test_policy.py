"""Which layers are quantized; installing a method, float mode, and folding the quantized weights."""

import copy

import pytest
import torch
from torch import nn

from qbench.bits import Bits
from qbench.methods import dorefa
from qbench.models import mlp, resnet
from qbench.quant.fold import fold_quantized_weights
from qbench.quant.image import ImageQuantizer
from qbench.quant.install import install
from qbench.quant.layers import (
    BypassedActivation,
    QConv2d,
    effective_weight,
    float_mode,
    quantized_layers,
)
from qbench.quant.method import Unsupported
from qbench.quant.policy import Policy, PolicyError, assign, execution_order

X = torch.randn(2, 3, 8, 8)


def net(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return resnet.build((3, 8, 8), 10, **({"depth": 8, "width": 4} | options))  # type: ignore[arg-type]


class Backwards(nn.Module):
    """Registers its layers in reverse execution order."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_first_and_last_by_execution_order() -> None:
    model, x = Backwards(), torch.randn(1, 4)
    assert execution_order(model, x) == ["first", "last"]
    assert execution_order(model, None) == ["last", "unused", "first"]
    assert assign(model, Bits(2), Policy(first=8, last="same"), x) == {"first": Bits(8), "last": Bits(2)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), {"conv1": Bits(), "fc": Bits()}),
        (Policy(first="same", last=8), {"conv1": Bits(2, 2, 6), "fc": Bits(8, 8, 6)}),
        (Policy(downsample=4), {"layer2.0.downsample.0": Bits(4, 4, 6), "layer2.0.conv1": Bits(2, 2, 6)}),
        (Policy(rules={"layer1.*": 4, "layer1.0.conv1": 8, "conv1": "same"}),
         {"layer1.0.conv1": Bits(4, 4, 6), "layer1.0.conv2": Bits(4, 4, 6), "conv1": Bits(2, 2, 6)}),
    ],
)  # fmt: skip
def test_rules(policy: Policy, expected: dict[str, Bits]) -> None:
    assigned = assign(net(shortcut="B"), Bits(2, 2, 6), policy, X)
    assert {name: assigned[name] for name in expected} == expected


def test_a_number_leaves_float_activations_float() -> None:
    assert assign(net(), Bits(2), Policy(first=8), X)["conv1"] == Bits(8)


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        (Policy(downsample=8), "downsample"),
        (Policy(rules={"nosuch": 8}), "rules"),
        (Policy(first=0), "first"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_layers(policy: Policy, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        assign(net(), Bits(2), policy, X)
    assert caught.value.key.startswith(key)
    assert "layer1.0.conv1" in str(caught.value) or "number of bits" in str(caught.value)


def test_install_keeps_parameters_and_names() -> None:
    model = net()
    before = {name: id(p) for name, p in model.named_parameters()}
    install(dorefa.build(w=2, a=2), model, example=X)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert model.load_state_dict(net().state_dict()).missing_keys == []
    assert set(quantized_layers(model)) == {f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)}


def test_activations_are_bypassed_if_all_their_readers_are_quantized() -> None:
    model = install(dorefa.build(w=2, a=2), net(), example=X)
    assert isinstance(model.get_submodule("layer1.0.act1"), BypassedActivation)
    assert isinstance(model.get_submodule("act"), nn.ReLU)
    mixed = install(dorefa.build(w=2, a=2), net(), Policy(rules={"layer1.0.conv1": "float"}), example=X)
    assert isinstance(mixed.get_submodule("layer1.0.act1"), nn.ReLU)
    assert isinstance(install(dorefa.build(w=2), net(), example=X).get_submodule("layer1.0.act1"), nn.ReLU)


def test_bypassing_the_relu_keeps_the_values_of_a_clip() -> None:
    kept, replaced = (install(dorefa.build(w=2, a=2), net(), example=X, act=a).eval() for a in ("keep", "fused"))
    assert torch.equal(kept(X), replaced(X))


def test_methods_that_replace_activations_are_refused_if_they_cannot() -> None:
    method = dorefa.build(w=2, a=2, activation="abs")
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(Unsupported, match="feeds"):  # without an example, nothing can be traced
        install(method, plain)
    with pytest.raises(Unsupported, match="same bits"):
        install(method, net(shortcut="B"), Policy(downsample="float"), example=X)
    with pytest.raises(Unsupported, match="got act=keep"):
        install(method, net(), example=X, act="keep")


def test_only_exact_layers_with_zero_padding() -> None:
    class Own(nn.Conv2d):
        pass

    for layer, phrase in (
        (Own(3, 3, 3), "Own"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "reflect"),
    ):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Conv2d(3, 3, 1))
        with pytest.raises(Unsupported, match=phrase):
            install(dorefa.build(w=2), model, example=X)
    with pytest.raises(Unsupported, match="already"):
        install(dorefa.build(w=2), install(dorefa.build(w=2), net()))


def test_unknown_widths_are_unsupported_with_a_reason() -> None:
    with pytest.raises(Unsupported, match=r"bits\.w=17.*1-16 or 32"):
        install(dorefa.build(w=17), net())
    from qbench.methods import float as float_method

    with pytest.raises(Unsupported, match="weights are not quantized"):
        install(float_method.build(w=2), net())


def test_reading_a_weight_runs_no_quantizer() -> None:
    model = install(dorefa.build(w=2), net(), example=X)
    layer = model.get_submodule("layer1.0.conv1")
    assert isinstance(layer, QConv2d)
    assert torch.equal(layer.weight, net().get_submodule("layer1.0.conv1").weight)
    assert effective_weight(layer).unique().numel() == 4


def test_the_image_is_rounded_over_its_range_and_8_bit_images_stay() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8))
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).reshape(1, -1, 1, 1),
        torch.tensor([0.2, 0.3, 0.4]).reshape(1, -1, 1, 1),
    )
    x = (images / 255 - mean) / std
    low, high = tuple((-mean / std).flatten().tolist()), tuple(((1 - mean) / std).flatten().tolist())
    policy = Policy(first=8, image_range=(low, high))
    model = install(dorefa.build(w=2, a=2), net(), policy, example=X)
    quantizer = model.get_submodule("conv1.input_q")
    assert isinstance(quantizer, ImageQuantizer)
    torch.testing.assert_close(quantizer(x), x, atol=1e-6, rtol=0)
    assert ImageQuantizer(2, low, high)(x)[:, 0].unique().numel() == 4


def test_the_grid_of_an_image_covers_channels_with_different_numbers_of_values() -> None:
    quantizer = ImageQuantizer(2, (0.0, 0.0), (1.0, 3.0), torch.tensor([[0, 0, 1]]))
    x = quantizer(torch.tensor([[0.1, 0.6, 2.0], [0.9, 0.3, 0.5]]))
    first, second = quantizer.grid(x).arrange(x).squeeze(-1).tolist()
    assert set(first) == set(x[:, :2].flatten().tolist())
    assert set(second) == set(x[:, 2].tolist())


def test_float_mode_and_folded_weights() -> None:
    original = net().eval()
    expected = original(X)
    model = install(dorefa.build(w=2, a=2), copy.deepcopy(original), example=X).eval()
    quantized = model(X)
    assert not torch.equal(quantized, expected)
    with float_mode(model):
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), quantized)
    folded = fold_quantized_weights(model)
    assert torch.equal(folded(X), quantized)
    assert folded.get_submodule("layer1.0.conv1").weight.unique().numel() == 4
    assert model.get_submodule("layer1.0.conv1").weight.unique().numel() > 4


def test_a_users_own_training_loop() -> None:
    model = install(dorefa.build(w=2, a=2), mlp.build((3, 8, 8), 10, hidden=2, width=16))
    model(X).sum().backward()
    assert model.get_submodule("fc2").weight.grad.abs().sum() > 0
