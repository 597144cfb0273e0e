"""MACs, BitOps and bytes of layers that are not quantized, and what is said about them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qbench.cost.count import count_cost, count_macs, coverage, values_outside, wide_codes
from qbench.cost.layers import layer_costs
from qbench.methods import dorefa, lsq, qcnn, qd, uniform
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Method
from qbench.quant.policy import Policy
from qbench.quant.quantizer import Storage

SHAPE, X = (3, 8, 8), torch.zeros(1, 3, 8, 8)


class Mixed(nn.Module):
    """Layers of many kinds. For one image: 8 time steps of 24 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(24, 8, 3), nn.Conv1d(8, 8, 1, groups=2)
        self.rnn, self.embedding = nn.LSTM(8, 4, batch_first=True, bidirectional=True), nn.Embedding(5, 8)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm((6, 8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.conv1(x.flatten(1, 2))).transpose(1, 2)  # (N, 6, 8)
        h, _ = self.rnn(h, (torch.zeros(2, len(x), 4), torch.zeros(2, len(x), 4)))
        h = self.norm(h + self.embedding(torch.arange(5))[:1])
        h, _ = self.attention(h, h, h, need_weights=False)
        y: Tensor = self.fc(h.mean(1)) @ self.fc.weight @ self.fc.weight.t()
        return y


MACS = {
    "": 2 * 2 * 8,
    "conv1": 6 * 8 * 24 * 3,
    "conv2": 6 * 8 * 4,
    "rnn": 2 * 6 * 16 * (8 + 4),
    "embedding": 0,
    "attention": 6 * 8 * 8 * 4 + 2 * 2 * 6 * 6 * 4,  # projections, then scores and sums of two heads
    "attention.out_proj": 0,  # its weights are used by `attention`
    "fc": 16,
}


def test_every_product_is_counted_once() -> None:
    assert count_macs(Mixed(), SHAPE) == MACS


class ReadsValues(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        assert x.sum().item() == 0, "cannot run on the meta device"
        return super().forward(x)


def flash_attention(net: Any, x: Tensor) -> Tensor:
    """Return the attention of four tokens with eight numbers, computed by the operation that the network chooses."""
    tokens = (x[:, :4, None] + torch.zeros(8)).unsqueeze(1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "bilinear": (lambda net, x: net.bilinear(x, x[:, :5]), 7 * 6 * 5),
    "bilinear of rows": (
        lambda net, x: net.bilinear(x.view(1, 1, 6).expand(1, 4, 6), x[:, :5].expand(1, 4, 5)),
        4 * 210,
    ),
    "function": (lambda net, x: F.bilinear(x, x[:, :5], net.bilinear.weight), 7 * 6 * 5),
    "matrix and vector": (lambda net, x: x @ net.vector, 6),
    "added": (lambda net, x: torch.addmv(x[:, 0], x, net.vector), 6),
    "vectors": (lambda net, x: x[0] @ net.vector, 6),
    "vector and matrix": (lambda net, x: net.vector @ x.t(), 6),
    "vdot": (lambda net, x: torch.vdot(x[0], net.vector), 6),
    "batches": (lambda net, x: torch.addbmm(x[:, :1], x.view(2, 1, 3), net.vector.view(2, 3, 1)), 6),
    "time first": (lambda net, x: torch.conv_tbc(x.view(6, 1, 1), net.vector.view(3, 1, 2), x[0, :2]), 4 * 3 * 2),
    "attention": (flash_attention, 2 * 4 * 4 * 8),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_that_the_counter_of_torch_does_not_know(case: str) -> None:
    product, macs = PRODUCTS[case]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear, self.vector = nn.Bilinear(6, 5, 7), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return product(self, x.flatten(1))

    counts = count_macs(Net(), (6, 1, 1))
    assert sum(counts.values()) == macs
    assert counts["bilinear"] == (macs if case.startswith("bilinear") else 0)


def test_the_counts_are_the_same_for_a_network_that_reads_values() -> None:
    assert count_macs(ReadsValues(), SHAPE) == MACS


def test_what_cannot_be_quantized_counts_as_float_and_is_named() -> None:
    model, macs = Mixed(), count_macs(Mixed(), SHAPE)
    install(dorefa.build(w=2, a=4), model, Policy(last="same", rules={"fc": "float"}), example=X)
    assert coverage(model, macs) == (
        "1 of 8 layers with weights are quantized; left in float: the network itself (Mixed), conv1, rnn (LSTM), "
        "embedding (Embedding), attention (MultiheadAttention), "
        "attention.out_proj (NonDynamicallyQuantizableLinear), fc"
    )
    cost = count_cost(model, macs)
    assert cost.macs == sum(MACS.values())
    assert cost.bitops == MACS["conv2"] * 2 * 4 + (sum(MACS.values()) - MACS["conv2"]) * 1024
    assert cost.params == sum(p.numel() for p in model.parameters())
    rows = {row.name: row for row in layer_costs(model, dorefa.build(w=2, a=4), macs)}
    assert (rows["rnn"].shape, rows["rnn"].params, rows["rnn"].bits.w) == ((16, 8), 2 * 16 * (8 + 4 + 2), 32)
    assert rows["Mixed"].bitops == MACS[""] * 1024
    assert sum(row.bitops for row in rows.values()) == cost.bitops


@pytest.mark.parametrize("policy", [Policy(), Policy(rules={"fc2": "float"})])
def test_nothing_is_said_where_the_policy_alone_decides(policy: Policy) -> None:
    model = mlp.build(SHAPE, 10, hidden=3, width=6)
    assert coverage(install(dorefa.build(w=2), model, policy, example=X), count_macs(model, SHAPE)) is None


def transposed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.ReLU(), nn.Unflatten(1, (6, 1)),
        nn.Conv3d(6, 2, (1, 3, 3)), nn.Flatten(), nn.Unflatten(1, (10, -1)), nn.ConvTranspose1d(10, 2, 3),
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def test_convolutions_of_all_kinds_are_counted_and_quantized() -> None:
    model = transposed()
    model(X)
    macs = count_macs(model, SHAPE)
    assert macs == {
        "0": 64 * 12,
        "1": 64 * 9 * 4 * 3,
        "4": 15 * 15 * 2 * 6 * 9,
        "7": 45 * 10 * 2 * 3,
        "9": 2 * 47 * 4,
    }
    install(dorefa.build(w=2, a=4), model, example=X)
    cost = count_cost(model, macs)
    inner = [macs[name] for name in "147"]
    assert cost.bitops == 8 * sum(inner) + 1024 * (sum(macs.values()) - sum(inner))
    codes = 4 * 3 * 9 + 6 * 2 * 9 + 10 * 2 * 3
    assert cost.bytes_ideal == 4 * (cost.params - codes) + codes * 2 / 8
    weights = {row.name: row.weights for row in layer_costs(model, dorefa.build(w=2, a=4), macs)}
    assert {name: levels and (levels.number, levels.per) for name, levels in weights.items()} == {
        "0": None, "1": (4, "layer"), "4": (4, "layer"), "7": (4, "layer"), "9": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (qcnn.build(w=2), (128, 4, "512 values")), (qd.build(w=4), (16, 1, "256 values")),
        (qd.build(w=4, bucket=128), (16, 1, "channel")), (lsq.build(w=2), (4, 1, "layer")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scale_groups_are_those_of_the_whole_layer(method: Method, expected: tuple[int, int, str], device: str) -> None:
    """The number of groups and of codewords depends on the layer's size."""
    net = install(method, nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 128), nn.Linear(128, 8))).to(device)
    levels = layer_costs(net, method, {"1": 1})[0].weights
    assert levels is not None
    assert (levels.number, levels.dimension, levels.per) == expected


def test_functions_of_torch_that_hold_weights_are_not_forgotten() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.fc = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(4, 2)
            self.mid = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.mid(F.conv2d(x, self.kernel).mean((2, 3))))
            return y

    model = Functional()
    macs = count_macs(model, SHAPE)
    assert macs == {"": 36 * 4 * 27, "fc": 8, "mid": 16}
    install(uniform.build(), model, Policy(first="same", image_range=((0.0,), (1.0,)), input="float"), example=X)
    assert coverage(model, macs) == (
        "1 of 3 layers with weights are quantized; left in float: the network itself (Functional), fc"
    )


class Holding(nn.Module):
    """A network of 16 + 160 parameters that also computes with what `hold` gives it."""

    def __init__(self, hold: Callable[[nn.Module], object], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 40)
        self.use = use
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.use(self, self.norm(self.first(x))))
        return y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


LIST = "not registered (2 with 20 values)"
VALUES = "computes with 16 values that are not parameters"
HOLDING: dict[str, tuple[Callable[[Any], object], Callable[[Any, Tensor], Tensor], str | None]] = {
    "layers in a list": (lambda m: setattr(m, "a", [nn.Linear(4, 4)]), lambda m, h: m.a[0](h), LIST),
    "layers in a dictionary": (lambda m: setattr(m, "a", {"x": nn.Linear(4, 4)}), lambda m, h: m.a["x"](h), LIST),
    "a tensor with gradient": (
        lambda m: setattr(m, "a", torch.ones(4, 4, requires_grad=True)), lambda m, h: h @ m.a, "(1 with 16 values)"
    ),
    "a tensor": (lambda m: setattr(m, "a", torch.ones(4, 4)), lambda m, h: h @ m.a.t(), VALUES),
    "a buffer": (lambda m: m.register_buffer("a", torch.ones(4, 4)), lambda m, h: h @ m.a, VALUES),
    "a buffer of no use": (lambda m: m.register_buffer("a", torch.ones(4, 4)), lambda m, h: h, None),
    "one number": (lambda m: setattr(m, "a", torch.ones(())), lambda m, h: h * m.a, None),
    "a new tensor in every call": (lambda m: None, lambda m, h: Doubled.apply(h) @ torch.ones(4, 4), None),
    "a parameter under another name": (lambda m: setattr(m, "a", m.first.weight.data), lambda m, h: h @ m.a, None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLDING)
def test_values_that_are_not_counted_in_the_size_are_named(case: str) -> None:
    hold, use, expected = HOLDING[case]
    found = values_outside(Holding(hold, use), torch.ones(2, 4))
    assert expected in found if expected and found else found == expected


def test_codes_that_are_wider_than_the_nominal_width_are_named() -> None:
    """dq divides its levels between layers, so a layer can need more bits than W."""

    class Wide(dorefa.DoReFaWeight):
        def bytes(self, w: Tensor) -> Storage:
            return Storage(w.numel(), 5, 0)

    model = install(dorefa.build(w=4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    assert wide_codes(model) == ""
    for name in ("1", "2"):
        model.get_submodule(name).weight_q.__class__ = Wide
    assert wide_codes(model) == (
        "weight codes of 2 layers have up to 5 bits; the size counts these bits, but BitOps count the nominal width"
    )


def test_values_of_quantizers_are_not_outside() -> None:
    model = install(lsq.build(w=2, a=2), nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    assert values_outside(model, torch.ones(2, 4)) is None


def test_a_module_with_two_names_is_counted_once_for_each_call_and_stays_unchanged() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    net.insert(1, net[0])
    weights = dict(net.named_parameters())
    assert count_macs(net, (1, 1, 4)) == {"0": 32, "4": 12}
    assert all(parameter is weights[name] for name, parameter in net.named_parameters())
    install(dorefa.build(w=2), net, Policy(first=2, last=2), example=torch.zeros(1, 1, 1, 4))
    assert [*quantized_layers(net)] == ["0", "4"]
