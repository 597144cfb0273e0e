"""Verification, storage and cost of quantized networks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qbench.bits import Bits, LevelCount
from qbench.config import registry
from qbench.cost.count import count_cost, count_macs
from qbench.methods import dorefa, hwgq, lsq, qcnn
from qbench.models import mlp, resnet
from qbench.quant.install import install
from qbench.quant.layers import BypassedActivation, NotFinite, float_mode, is_quantizer_key, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import levels_k, on_backward, round_ste, sign, straight_through
from qbench.quant.policy import Policy
from qbench.quant.quantizer import Grid, IdentityQuantizer, Quantizer, Storage
from qbench.quant.verify import NotQuantized, nearest_points, verify
from qbench.system.torchvision import torchvision

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(method: Method, policy: Policy | None = None) -> nn.Module:
    torch.manual_seed(0)
    return install(method, resnet.build((3, 8, 8), 10, depth=8, width=4), policy, example=X)


def test_levels_are_counted_in_a_forward_pass() -> None:
    counts = verify(net(dorefa.build(w=3, a=2, g=4), Policy(last=8, first=8, image_range=((-5.0,), (5.0,)))), X)
    assert list(counts) == ["conv1", *[f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)], "fc"]
    assert counts["layer1.0.conv1"]["w"] == LevelCount(8, 8)
    assert counts["layer1.0.conv1"]["a"] == LevelCount(4, 4)
    assert counts["layer1.0.conv1"]["g"].allowed == 16
    assert 8 < counts["layer1.0.conv1"]["g"].found <= 16
    assert counts["conv1"]["w"].allowed == 256


def test_gradients_are_counted_only_where_there_are_gradients() -> None:
    model = net(dorefa.build(w=2, a=2, g=4))
    later = ("layer1.0.bn2", "layer1.0.conv2", "layer2", "layer3", "fc")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(later))
    counts = verify(model, X)
    assert set(counts["layer1.0.conv1"]) == {"w", "a"}, "neither its input nor its weights need a gradient"
    assert all(set(counts[name]) == {"w", "a", "g"} for name in counts if name != "layer1.0.conv1")
    model.requires_grad_(False)
    assert all(set(count) == {"w", "a"} for count in verify(model, X).values())


@pytest.mark.parametrize("part", ["w", "a", "g"])
def test_a_network_that_is_not_quantized_is_detected(part: str) -> None:
    model = net(dorefa.build(w=2, a=2, g=4))
    layer = quantized_layers(model)["layer2.0.conv1"]

    class Through(Quantizer):
        def __init__(self, inner: Quantizer) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return x

        def grid(self, x: torch.Tensor) -> Grid | None:
            return self.inner.grid(x)

    slot = {"w": "weight_q", "a": "input_q", "g": "output_q"}[part]
    setattr(layer, slot, Through(getattr(layer, slot)))
    with pytest.raises(NotQuantized, match=r"layer2.0.conv1: .* are not on"):
        verify(model, X)
    setattr(layer, slot, IdentityQuantizer())
    with pytest.raises(NotQuantized, match="declares no grid"):
        verify(model, X)


def test_the_tolerance_is_per_scale_group_and_limited_by_the_step() -> None:
    class Grouped(Quantizer):
        def __init__(self, points: torch.Tensor, add: float) -> None:
            super().__init__()
            self.points, self.add = points, add

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            scale = self.points[:, -1].reshape(-1, 1, 1, 1)
            return torch.where(w >= 0, scale, -scale) + self.add * (torch.arange(len(w)) == 1).reshape(-1, 1, 1, 1)

        def grid(self, w: torch.Tensor) -> Grid:
            return Grid(self.points.unsqueeze(-1), lambda t: t.reshape(len(t), -1, 1))

    model = net(dorefa.build(w=2))
    layer = quantized_layers(model)["layer2.0.conv1"]
    scales = torch.ones(len(layer.weight))
    scales[0] = 1e4
    points = torch.stack([-scales, scales], 1)
    layer.weight_q = Grouped(points, 0.0)
    assert verify(model, X)["layer2.0.conv1"]["w"] == LevelCount(2, 2)
    layer.weight_q = Grouped(points, 0.01)
    with pytest.raises(NotQuantized):
        verify(model, X)
    fine = torch.linspace(-1, 1, 2**16).expand(len(layer.weight), -1)
    layer.weight_q = Grouped(fine, -0.3 * 2 / 65535)
    with pytest.raises(NotQuantized):
        verify(model, X)


def test_groups_of_points_that_do_not_fit_the_groups_of_weights_are_named() -> None:
    class Filters(Quantizer):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(w)

        def grid(self, w: torch.Tensor) -> Grid:
            return Grid(torch.ones(len(w), 1, 1))  # without `arrange`, all weights are one group

    model = net(dorefa.build(w=2))
    quantized_layers(model)["layer1.0.conv1"].weight_q = Filters()
    with pytest.raises(
        NotQuantized, match=r"layer1.0.conv1: weights: the grid has 4 scale groups, but .* makes 1 groups"
    ):
        verify(model, X)


def test_nan_weights_are_refused() -> None:
    model = net(dorefa.build(w=2))
    with torch.no_grad():
        quantized_layers(model)["layer2.0.conv1"].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite):
        verify(model, X)


def test_nearest_point_in_one_and_two_dimensions() -> None:
    points = torch.tensor([[-1.0, 0, 2, float("nan")], [0, 1, 2, 3]]).unsqueeze(-1)
    values = torch.tensor([[-3.0, 0.9, 1.1, 9], [0.4, 0.6, 2, 7]]).unsqueeze(-1)
    index, distance = nearest_points(values, points)
    assert index.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3]]
    assert distance[0].tolist() == pytest.approx([2, 0.9, 0.9, 7])
    index, distance = nearest_points(torch.tensor([[[3.0, 4]]]), torch.tensor([[[0.0, 0], [3, 0]]]))
    assert (index.item(), distance.item()) == (1, 4)


def test_storage_by_hand() -> None:
    assert Storage(10, 3, 4).ideal == pytest.approx(10 * 3 / 8 + 4)
    assert Storage(10, 3, 4).packed == 5 + 4  # three bits in lanes of four
    assert [Storage(8, bits, 0).packed for bits in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_cost_by_hand() -> None:
    """An MLP 4 -> 6 -> 6 -> 3 at w2a4, first and last float: MACs 24, 36, 18."""
    model = mlp.build((1, 2, 2), 3, hidden=2, width=6)
    macs = count_macs(model, (1, 2, 2))
    assert macs == {"fc1": 24, "fc2": 36, "fc3": 18}
    cost = count_cost(install(dorefa.build(w=2, a=4), model), macs)
    params = 24 + 12 + 36 + 12 + 18 + 3
    assert cost.params == params
    assert cost.bitops == 24 * 1024 + 36 * 8 + 18 * 1024
    assert cost.bytes_float == 4 * params
    assert cost.bytes_ideal == cost.bytes_packed == 4 * (params - 36) + 9
    assert cost.bits_per_weight == 2


def test_one_bit_weights_include_the_bytes_of_their_scale() -> None:
    model = mlp.build((1, 2, 2), 3, hidden=2, width=6)
    cost = count_cost(install(dorefa.build(w=1), model), count_macs(model, (1, 2, 2)))
    assert cost.bits_per_weight == pytest.approx((36 + 32) / 36)


def test_bits_are_per_weight_if_a_code_stands_for_several_weights() -> None:
    """A layer of 6 x 6 weights: 6 codes of 4 bits and 5 bytes, or Q-CNN's codes for 3 weights each."""

    class Rows(IdentityQuantizer):
        def bytes(self, w: torch.Tensor) -> Storage:
            return Storage(len(w), 4, 5)

    model = mlp.build((1, 2, 2), 3, hidden=2, width=6)
    macs = count_macs(model, (1, 2, 2))
    quantized = install(dorefa.build(w=2), copy.deepcopy(model))
    quantized_layers(quantized)["fc2"].weight_q = Rows()
    assert count_cost(quantized, macs).bits_per_weight == pytest.approx(8 * (3 + 5) / 36)
    groups = install(qcnn.build(w=1, fc_subspace=3, fc_codewords=2), model)
    storage = quantized_layers(groups)["fc2"].weight_q.bytes(model.get_parameter("fc2.weight"))
    assert (storage.codes, storage.code_bits) == (12, 1)
    assert count_cost(groups, macs).bits_per_weight == pytest.approx((12 + 8 * storage.extra_bytes) / 36)


def test_macs_agree_with_hand_counts_of_a_residual_network() -> None:
    model = resnet.build((3, 8, 8), 10, depth=8, width=4, shortcut="B")
    macs = count_macs(model, (3, 8, 8))
    assert macs["conv1"] == 64 * 9 * 3 * 4
    assert macs["layer2.0.conv1"] == 16 * 9 * 4 * 8
    assert macs["layer2.0.downsample.0"] == 16 * 4 * 8
    assert macs["fc"] == 160
    assert (
        sum(macs.values()) == 64 * 9 * (3 * 4 + 2 * 16) + 16 * (9 * (32 + 64) + 32) + 4 * (9 * (128 + 256) + 128) + 160
    )


def test_resnet20_has_its_published_size() -> None:
    """He et al. 2016: 0.27 M parameters; 6 n + 2 weighted layers."""
    model = resnet.build((3, 32, 32), 10, depth=20)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.27e6, rel=0.01)
    assert len(count_macs(model, (3, 32, 32))) == 20
    assert sum(count_macs(model, (3, 32, 32)).values()) == pytest.approx(40.6e6, rel=0.01)


@pytest.mark.parametrize(
    ("bits", "ends", "expected"), [(32, "same", 1857.6), (8, "same", 116.1), (4, 8, 34.71), (2, 8, 14.37)]
)
def test_bitops_of_resnet18_at_224(bits: int, ends: str | int, expected: float) -> None:
    """In G, as in the literature: convolutions and the linear layer; the image has the bits of the
    first layer.
    """
    with torch.device("meta"):
        model = torchvision().models.resnet18(weights=None)
    macs = count_macs(model, (3, 224, 224))
    example = torch.empty(1, 3, 224, 224, device="meta")
    install(
        dorefa.build(w=bits, a=bits),
        model,
        Policy(first=ends, last=ends, image_range=((0.0,), (1.0,))),
        example=example,
    )
    assert count_cost(model, macs).bitops / 1e9 == pytest.approx(expected, rel=5e-4)


def test_straight_through_functions() -> None:
    x = torch.tensor([-0.6, 0.5, 1.5, 2.5], requires_grad=True)
    y = round_ste(x * 1.0)
    assert y.tolist() == [-1, 0, 2, 2]
    (grad,) = torch.autograd.grad((y * torch.arange(4.0)).sum(), x)
    assert grad.tolist() == [0, 1, 2, 3]
    value = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    through = straight_through(x, value)
    assert torch.equal(through, value)
    grads = torch.autograd.grad(through.sum(), (x, value), allow_unused=True)
    assert grads[0].tolist() == [1, 1, 1, 1]
    assert grads[1] is None
    assert sign(torch.tensor([-2.0, -0.0, 0.0, 3])).tolist() == [-1, 1, 1, 1]
    (doubled,) = torch.autograd.grad(on_backward(x, lambda g: 2 * g).sum(), x)
    assert doubled.tolist() == [2, 2, 2, 2]
    assert levels_k(2, x).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_quantizer_without_the_base_class_is_refused_by_name() -> None:
    plain_module = Method(
        name="mine", bits=Bits(2), supported_bits={"w": (2,)}, weight=lambda name, layer, bits: nn.Identity()
    )
    with pytest.raises(TypeError) as caught:
        net(plain_module)
    assert "mine makes a Identity for layer1.0.conv1" in str(caught.value)
    assert "qbench.quant.quantizer.Quantizer" in str(caught.value)


def test_a_quantizer_has_defaults_and_says_when_it_declares_no_storage() -> None:
    quantizer, x = Quantizer(), torch.ones(2)
    assert quantizer.grid(x) is None
    assert not quantizer.declares_grid
    assert (quantizer.complete, quantizer.report(), quantizer.gradient_factor(x)) == (True, {}, 1.0)
    assert (quantizer.positive_parameters, quantizer.lr_scale, quantizer.weight_decay) == ((), 1.0, 0.0)
    with pytest.raises(
        NotImplementedError, match=r"Quantizer does not declare its storage; define the method bytes\(w\)"
    ):
        quantizer.bytes(x)
    assert IdentityQuantizer()(x) is x
    assert IdentityQuantizer()(x, x + 1) is x
    assert dorefa.DoReFaWeight(2).declares_grid


OTHER_LAYERS = [
    nn.Conv1d(4, 6, 3, 2, padding=1, groups=2),
    nn.Conv3d(4, 6, (1, 3, 3), padding="same"),
    nn.ConvTranspose1d(4, 6, 3, 2, padding=1),
    nn.ConvTranspose2d(4, 6, (2, 3), (2, 3), padding=(0, 1), groups=2, bias=False),
    nn.ConvTranspose3d(4, 6, 2, 2, dilation=1),
]


@pytest.mark.parametrize("layer", OTHER_LAYERS, ids=lambda layer: type(layer).__name__)
def test_convolutions_of_other_kinds_compute_with_the_quantized_tensors(layer: nn.Module) -> None:
    axes = layer.weight.dim() - 2
    x = torch.randn(2, 4, *[5] * axes, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Identity(), copy.deepcopy(layer))
    policy = Policy(first="same", last="same", input="float")
    install(dorefa.build(w=2, a=4), model, policy, example=x)
    model[1].input_q = dorefa.build(w=2, a=4).input("1", layer, 4)
    model[1].bits = Bits(2, 4)
    expected = copy.deepcopy(layer)
    expected.weight.data = dorefa.quantize_weight(layer.weight, 2).detach()
    assert torch.equal(model(x), expected(dorefa.quantize_activation(x, 4)))
    assert {key: count.allowed for key, count in verify(model, x)["1"].items()} == {"w": 4, "a": 16}
    if "Transpose" in type(layer).__name__:
        size = [length + 1 for length in layer(x).shape[2:]]
        assert torch.equal(model[1](x, output_size=size), expected(dorefa.quantize_activation(x, 4), output_size=size))
    with float_mode(model):
        assert torch.equal(model(x), layer(x))


PER_OUTPUT = {"uniform", "xnor", "bwn", "hwgq", "ptq", "qcnn"}
"""Methods whose scales or codebooks belong to single outputs of a layer."""


@pytest.mark.parametrize("name", registry.names("method"))
@pytest.mark.parametrize("layer", OTHER_LAYERS[:3:2], ids=lambda layer: type(layer).__name__)
def test_a_method_quantizes_other_convolutions_or_names_the_layer(name: str, layer: nn.Module) -> None:
    method = registry.create("method", {"name": name})
    if name == "float":
        return
    method = registry.create("method", {"name": name}, w=method.bits.w, a=32)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), copy.deepcopy(layer), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 4, 8)
    model(x)
    if name == "qcnn" or (name in PER_OUTPUT and isinstance(layer, nn.ConvTranspose1d)):
        with pytest.raises(
            Unsupported, match=r"^1 is a Conv(Transpose)?1d\b.*\nleave it float: 'layers.rules={1: float}'"
        ):
            install(method, model, example=x)
        return
    install(method, model, example=x)
    model(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model[1].named_parameters() if n != "bias")
    assert model[1].weight_q.bytes(model[1].weight).codes == layer.weight.numel()


def with_a_hole(x: torch.Tensor) -> torch.Tensor:
    flat = x.clone().flatten()
    flat[0] = torch.nan
    return flat.reshape(x.shape)


class OneNaN(Quantizer):
    """A quantizer one of whose values is NaN."""

    def __init__(self, inner: Quantizer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return with_a_hole(self.inner(x))

    def grid(self, x: torch.Tensor) -> Grid | None:
        return self.inner.grid(x)


@pytest.mark.parametrize("slot", ["weight_q", "input_q"])
def test_nan_is_on_no_level(slot: str) -> None:
    """A comparison with NaN is false, so that "farther than the tolerance" would let it pass."""
    whole = Policy(first="same", last="same", input="same", image_range=((-9.0,) * 3, (9.0,) * 3))
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))  # nothing behind the layer refuses NaN
    model = install(dorefa.build(w=2, a=2), network, whole, example=X)
    (layer,) = quantized_layers(model).values()
    verify(model, X)
    setattr(layer, slot, OneNaN(getattr(layer, slot)))
    with pytest.raises(NotQuantized, match=r"1 of \d+ values are not on"):
        verify(model, X)


@pytest.mark.parametrize(
    ("codes", "width", "packed"), [(5, 1, 1), (5, 2, 2), (5, 3, 3), (5, 4, 3), (5, 5, 5), (5, 9, 10), (5, 17, 20)]
)
def test_packed_bytes_by_hand(codes: int, width: int, packed: int) -> None:
    """3 bits take lanes of 4, 5 to 8 bits a byte each, 9 to 16 two, 17 four; the last byte is filled up."""
    assert Storage(codes, width, 7).packed == packed + 7
    assert Storage(codes, width, 7).ideal == codes * width / 8 + 7


def test_packed_bytes_of_a_network_by_hand() -> None:
    model = install(dorefa.build(w=3, a=2), mlp.build((1, 4, 4), 3, hidden=2, width=10))
    cost = count_cost(model, count_macs(model, (1, 4, 4)))
    weights, (layer,) = 10 * 10, quantized_layers(model).values()
    rest = 4 * (sum(p.numel() for p in model.parameters()) - layer.weight.numel())
    assert layer.weight.numel() == weights
    assert cost.bytes_packed - cost.bytes_ideal == pytest.approx(weights * (4 - 3) / 8)
    assert cost.bytes_ideal == pytest.approx(rest + weights * 3 / 8)


def test_the_float_mode_of_a_network_has_its_activation_functions() -> None:
    torch.manual_seed(0)
    network = resnet.build((3, 8, 8), 10, depth=8, width=4).eval()
    with torch.no_grad():
        before = network(X)
        model = install(hwgq.build(), network, example=X, act="fused")
        bypassed = [m for m in model.modules() if isinstance(m, BypassedActivation)]
        assert bypassed
        assert not torch.equal(model(X), before)
        with float_mode(model):
            assert torch.equal(model(X), before)
            assert all(m.active for m in bypassed)
        assert not any(m.active for m in bypassed)


def test_the_scalars_of_a_grid_are_sorted_and_its_product_codes_are_not() -> None:
    """Q-CNN's corrected codebooks of one scalar per codeword are in any order."""
    nan = torch.nan
    scalars = torch.tensor([[3.0, -1.0, 2.0], [1.0, nan, 0.0]]).unsqueeze(2)
    expected = torch.tensor([[-1.0, 2.0, 3.0], [0.0, 1.0, nan]]).unsqueeze(2)
    assert torch.equal(Grid(scalars).points.nan_to_num(9), expected.nan_to_num(9))
    vectors = torch.tensor([[[3.0, 0.0], [1.0, 5.0]]])
    assert torch.equal(Grid(vectors).points, vectors)


class Slots(nn.Module):
    """A network whose submodules have the names of quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.input_q, self.weight_q = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.weight_q(self.input_q(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_users_modules_with_the_name_of_a_slot_are_no_quantizers() -> None:
    x = torch.rand(2, 3, 8, 8)
    model = install(lsq.build(w=2, a=2), Slots(), example=x)
    keys = {name for name, _ in model.named_parameters() if is_quantizer_key(name, model)}
    slots = ("input_q.weight_q", "input_q.input_q", "weight_q.weight_q", "weight_q.input_q")
    assert keys == {f"{slot}.step" for slot in slots}
    cost = count_cost(model, count_macs(Slots(), (3, 8, 8)))
    assert cost.params == sum(p.numel() for p in Slots().parameters())
    assert cost.bytes_float == 4 * cost.params
    assert not any(is_quantizer_key(name, Slots()) for name, _ in Slots().named_parameters())
    assert is_quantizer_key("first.weight_q.step", Slots())  # of a checkpoint of a quantized network


def test_float_mode_of_a_layer_that_was_parametrized_later() -> None:
    model = install(dorefa.build(w=2, a=2), Slots(), example=torch.rand(2, 3, 8, 8)).eval()
    assert isinstance(model, Slots)
    original = Slots().eval()
    original.load_state_dict(model.state_dict())
    nn.utils.parametrize.register_parametrization(model.input_q, "weight", nn.Identity())
    x = torch.rand(2, 3, 8, 8)
    quantized = model(x)
    with float_mode(model):
        assert torch.equal(model(x), original(x))
    assert torch.equal(model(x), quantized)
    assert not torch.equal(quantized, original(x))
