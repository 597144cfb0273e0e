"""Test INQ: its levels against the paper's equations, its masks, and that frozen weights never move."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn

from qbench.config import registry
from qbench.deviations.registry import deviate
from qbench.methods import inq
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, fully_quantized, quantized_layers
from qbench.quant.masks import FrozenWeight, extend_mask, stage, stage_borders
from qbench.quant.probe import Probe


def level_of(w: Fraction, n1: int, bits: int) -> Fraction:
    """Return the level of w by eq. 4; beyond the largest level, the largest level."""
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    magnitudes = [Fraction(0)] + [Fraction(2) ** n for n in range(n2, n1 + 1)]
    sign = 1 if w >= 0 else -1
    for low, high in pairwise(magnitudes):
        if (low + high) / 2 <= abs(w) < Fraction(3, 2) * high:
            return sign * high
    return sign * magnitudes[-1] if abs(w) >= Fraction(3, 2) * magnitudes[-1] else Fraction(0)


@pytest.mark.parametrize(("bits", "count"), [(5, 17), (4, 9), (3, 5), (2, 3)])
def test_the_levels_are_those_of_the_paper(bits: int, count: int) -> None:
    """Section 2: n1 = floor(log2(4 s / 3)); 5 bits have exponents n1 - 7 to n1, 2 bits are ternary."""
    w = torch.tensor([0.9, -0.2, 0.01])
    levels = inq.power_of_two_levels(w, bits)
    assert len(levels) == count
    assert levels[-1] == 1.0, "4 * 0.9 / 3 = 1.2, so n1 = 0"
    assert levels[len(levels) // 2 + 1] == 2.0 ** (1 - 2 ** (bits - 1) // 2)
    assert torch.equal(levels, -levels.flip(0))


def test_the_largest_weight_gets_the_largest_level() -> None:
    for i in range(1, 400):
        s = i / 100
        n1 = inq.largest_exponent(torch.tensor([s, -s / 3]))
        assert 0.75 * 2.0**n1 <= s * (1 + 1e-6)
        assert s < 1.5 * 2.0**n1 * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_rounding_at_every_border_between_levels(bits: int) -> None:
    values = [Fraction(i, 64) for i in range(-90, 91)]
    w = torch.tensor([float(v) for v in values])
    n1 = inq.largest_exponent(w)
    expected = [float(level_of(v, n1, bits)) for v in values]
    assert inq.quantize_weight(w, bits).tolist() == expected


def test_an_outlier_gets_the_largest_level_and_never_zero() -> None:
    levels = inq.levels_from_exponent(0, 5)
    assert inq.round_to_levels(torch.tensor([1.49, 1.5, 7.0, -100.0]), levels).tolist() == [1, 1, 1, -1]


def test_the_largest_weights_are_frozen_first_and_masks_only_grow() -> None:
    w = torch.tensor([0.1, -0.9, 0.5, 0.3, -0.7, 0.2, 0.8, -0.4])
    frozen = torch.zeros(8, dtype=torch.bool)
    first = inq.select_largest(w, 0.5, frozen)
    assert first.tolist() == [False, True, True, False, True, False, True, False]
    moved = torch.tensor([9.0, 0.0, 0.0, 0.3, 0.0, 0.2, 0.0, -0.4])
    second = inq.select_largest(moved, 0.75, first)
    assert second.tolist() == [True, True, True, False, True, False, True, True], (
        "frozen weights stay frozen, though small now"
    )
    assert not frozen.any()
    assert torch.equal(extend_mask(second, w.abs(), 0.5), second), "a smaller portion frees nothing"
    assert inq.select_largest(w, 1.0, second).all()
    ties = extend_mask(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3), 0.5)
    assert ties.tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_frozen_weights_stay_bit_identical_under_momentum_and_decay(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = install(inq.build(w=3), mlp.build((1, 2, 2), 3, hidden=2, width=8))
    (layer,) = quantized_layers(model).values()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)  # type: ignore[call-arg]
    x, y = torch.randn(16, 1, 2, 2), torch.randint(3, (16,))

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    train(3)
    site = layer.weight_q
    assert isinstance(site, inq.INQWeight)
    site.freeze_next(layer.weight, 0.5, "largest")
    frozen, before = site.frozen.clone(), effective_weight(layer).clone()
    latent = layer.weight.detach().clone()
    train(5)
    after = effective_weight(layer)
    assert torch.equal(after[frozen], before[frozen])
    assert not torch.equal(after[~frozen], before[~frozen]), "free weights train on"
    assert not torch.equal(layer.weight[frozen], latent[frozen]), "momentum moved the latent weights"
    layer.weight.data.mul_(100)  # free weights outgrow the levels
    site.freeze_next(layer.weight, 1.0, "largest")
    assert torch.equal(effective_weight(layer)[frozen], before[frozen])
    assert site.complete
    assert fully_quantized(model)
    assert set(effective_weight(layer).unique().tolist()) <= set(inq.levels_from_exponent(int(site.n1), 3).tolist())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", ["inq", "slq", "eslq", "mlq"])
def test_latent_values_of_frozen_weights_stay(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """`inspect` and the layer statistics measure errors with them, and other runs start from them."""
    torch.manual_seed(0)
    method = registry.create("method", {"name": name, "w": 3 if name == "inq" else 2})
    model = install(method, mlp.build((1, 2, 2), 3, hidden=3, width=8))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)  # type: ignore[call-arg]
    x, y = torch.randn(16, 1, 2, 2), torch.randint(3, (16,))
    assert method.on_epoch is not None
    assert method.step is not None
    for epoch in range(2):
        method.on_epoch(model, epoch, 4, Probe([(x, y)], nn.functional.cross_entropy))
        masks = [layer.weight_q.frozen.clone() for layer in quantized_layers(model).values()]  # type: ignore[operator]
        latent = [layer.weight.detach().clone() for layer in quantized_layers(model).values()]
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            method.step(model, optimizer)
        for layer, frozen, before in zip(quantized_layers(model).values(), masks, latent, strict=True):
            assert torch.equal(layer.weight[frozen], before[frozen])
            assert not (layer.weight == before)[~frozen].any(), "free weights train on"


@pytest.mark.parametrize("deviation", ["none", "remade_masks", "smallest_first"])
def test_portions_of_the_authors_are_rounded_up_with_every_order(deviation: str) -> None:
    method = deviate("inq", deviation, inq.build(w=3, variant="authors", portions=(0.3, 0.5, 0.8, 1.0)))
    model = install(method, nn.Sequential(nn.Linear(2, 2), nn.Linear(5, 7), nn.Linear(2, 2)))
    (layer,) = quantized_layers(model).values()
    counts = []
    for epoch in range(4):
        method.on_epoch(model, epoch, 4, None)  # type: ignore[arg-type, misc]
        counts.append(int(layer.weight_q.frozen.sum()))  # type: ignore[arg-type, operator]
    assert counts == [11, 18, 28, 35]


def test_the_random_partition_draws_from_the_global_generator() -> None:
    w = torch.randn(100)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        site = inq.INQWeight(w, 5)
        site.freeze_next(w, 0.3, "random")
        masks.append(site.frozen.clone())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert masks[0].sum() == 30


def test_the_stages_share_the_epochs_and_the_last_epoch_is_complete() -> None:
    assert [stage(e, 8, 4) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [stage(e, 3, 4) for e in range(3)] == [0, 1, 3]
    assert stage(0, 1, 4) == 3
    assert stage_borders(8, 4) == [2, 4, 6]
    assert stage_borders(1, 4) == []


def test_the_authors_of_inq_round_ties_down() -> None:
    """AojunZhou's power2.cpp: a strict comparison keeps the lower magnitude, also next to zero."""
    levels = inq.levels_from_exponent(0, 3)  # 0, 1/2, 1
    ties = torch.tensor([0.25, -0.25, 0.75, -0.75, 0.2500001, 0.7500001])
    assert inq.round_to_levels(ties, levels).tolist() == [0.5, -0.5, 1, -1, 0.5, 1]
    assert inq.round_to_levels(ties, levels, ties_up=False).tolist() == [0, 0, 0.5, -0.5, 0.5, 1]
    site = inq.INQWeight(torch.tensor([1.0, 0.75, 0.25, 0.1]), 3, "authors")
    site.freeze_next(torch.tensor([1.0, 0.75, 0.25, 0.1]), 1.0, "largest")
    assert site.value.tolist() == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("count", "want"), [(10, [3, 6, 8, 10]), (7, [3, 5, 6, 7]), (864, [260, 519, 692, 864])])
def test_the_authors_of_inq_round_portions_up(count: int, want: list[int]) -> None:
    """AojunZhou's blob.cpp: all but int(count * 0.7), int(count * 0.4), int(count * 0.2), 0 weights."""
    w = torch.linspace(0.1, 1, count)
    site = inq.INQWeight(w, 5, "authors")
    frozen = []
    for portion in (0.3, 0.6, 0.8, 1.0):
        site.freeze_next(w, portion, "largest")
        frozen.append(int(site.frozen.sum()))
    assert frozen == want
    assert want == [count - int(count * rest) for rest in (0.7, 0.4, 0.2, 0.0)]


def test_the_authors_of_inq_train_nothing_after_the_last_portion() -> None:
    assert [stage(e, 9, 4, short_end=True) for e in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert [stage(e, 2, 4, short_end=True) for e in range(2)] == [2, 3]
    assert [stage(e, 3, 1, short_end=True) for e in range(3)] == [0, 0, 0]
    assert stage_borders(9, 4, short_end=True) == [3, 6, 8]
    for variant, moves in (("paper", True), ("authors", False)):
        method = inq.build(w=3, portions=[0.5, 1.0], variant=variant)
        model = install(method, mlp.build((1, 2, 2), 3, hidden=2, width=8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(3):
            assert method.on_epoch is not None
            method.on_epoch(model, epoch, 3, None)  # type: ignore[arg-type]
            before = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            (method.step or (lambda model, optimizer: optimizer.step()))(model, optimizer)
            moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
            assert any(moved) == (moves or epoch < 2), (variant, epoch)
        assert fully_quantized(model)


def test_a_frozen_weight_keeps_its_first_value() -> None:
    site = FrozenWeight(torch.zeros(3))
    site.freeze(torch.tensor([True, False, False]), torch.tensor([1.0, 1, 1]))
    site.freeze(torch.tensor([True, True, False]), torch.tensor([2.0, 2, 2]))
    assert site(torch.tensor([9.0, 9, 9])).tolist() == [1, 2, 9]


@pytest.mark.parametrize("portions", [[], [0.5], [1.0, 0.5], [0.0, 1.0], [0.5, 0.5, 1.0]])
def test_portions_that_do_not_ascend_to_1_raise(portions: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        inq.build(portions=portions)
