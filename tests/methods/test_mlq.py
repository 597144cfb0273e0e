"""Test MLQ: boundary clusters before the zero cluster, layers in the order of measured loss."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle_slq import Layer, mlq_steps
from test_slq import (
    ALL_LAYERS,
    Parallel,
    as_torch,
    assert_same_state,
    levels,
    loss_of,
    probe_of,
    run_epochs,
    sites_of,
    train,
)
from torch import Tensor, nn

from qbench.methods import mlq
from qbench.methods.slq import Clusters
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, fully_quantized, quantized_layers
from qbench.quant.probe import Probe


def effective_weights(model: nn.Module) -> list[list[float]]:
    return [effective_weight(layer)[0].tolist() for layer in quantized_layers(model).values()]


def turns(model: nn.Module) -> list[list[int]]:
    """Return each layer's turns, by group of clusters."""
    return [site.turn.tolist() for site in sites_of(model)]  # type: ignore[operator]


def reject_measurement(outputs: Tensor, targets: Tensor) -> Tensor:
    raise AssertionError("the loss was measured")


# One layer by hand: boundary clusters -2.9 and 2.1, zero cluster -0.2 0.1 0.4 with mean 0.1.
WEIGHTS = [-3.0, -2.8, -0.2, 0.1, 0.4, 2.0, 2.2]


def check_one_layer() -> None:
    """A layer is float; then its boundaries are shared; then it is clustered with these fixed, and all is shared."""
    model = install(mlq.build(), Parallel([WEIGHTS]), ALL_LAYERS)
    probe, (layer,) = probe_of(model, [1.0] * 7), quantized_layers(model).values()
    mlq.freeze_next(model, 1, True, probe)
    assert effective_weights(model)[0] == pytest.approx([-2.9, -2.9, -0.2, 0.1, 0.4, 2.1, 2.1])
    assert not fully_quantized(model)
    layer.weight.data += torch.tensor([9.0, 0.0, 0.1, 1.9, 0.2, -9.0, 0.0])  # trained: -0.1, 2.0 and 0.6 are free
    assert effective_weights(model)[0] == pytest.approx([-2.9, -2.9, -0.1, 2.0, 0.6, 2.1, 2.1])
    mlq.freeze_next(model, 2, True, probe)
    assert effective_weights(model)[0] == pytest.approx([-2.9, -2.9, 0.25, 2.1, 0.25, 2.1, 2.1]), "2.0 is absorbed"
    assert fully_quantized(model)


def test_the_boundaries_are_frozen_before_the_zero_cluster_at_its_mean() -> None:
    check_one_layer()


@pytest.mark.parametrize("mutant", ["zero cluster first", "zero pinned", "all at once"])
def test_the_check_rejects_wrong_steps(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero_first(site: mlq.MLQWeight, w: Tensor) -> tuple[Clusters, Tensor]:
        return true(site, w)[0], torch.tensor([site.frozen_groups > 0, True, site.frozen_groups > 0])

    def at_once(site: mlq.MLQWeight, w: Tensor) -> tuple[Clusters, Tensor]:
        return true(site, w)[0], torch.ones(3, dtype=torch.bool)

    true = mlq.MLQWeight.next_clusters
    if mutant == "zero pinned":
        monkeypatch.setitem(mlq.PINNED, "mean", (0.0,))
    else:
        monkeypatch.setattr(
            mlq.MLQWeight, "next_clusters", {"zero cluster first": zero_first, "all at once": at_once}[mutant]
        )
    with pytest.raises(AssertionError):
        check_one_layer()


def test_a_pinned_zero_cluster_is_shared_at_zero() -> None:
    method = mlq.build(zero="pinned")
    model = install(method, Parallel([WEIGHTS]), ALL_LAYERS)
    run_epochs(method, model, 4, probe_of(model, [1.0] * 7))
    assert effective_weights(model)[0] == pytest.approx([-2.9, -2.9, 0.0, 0.0, 0.0, 2.1, 2.1])


def test_five_clusters_are_frozen_from_outside_in() -> None:
    values = [-9.0, -4.0, 0.5, 5.0, 8.0]
    weights = [v + e for v in values for e in (-0.1, 0.1)]
    model = install(mlq.build(w=3), Parallel([weights]), ALL_LAYERS)
    probe, (site,) = probe_of(model, [1.0] * 10), sites_of(model)
    for step, settled in enumerate(([-9.0, 8.0], [-9.0, -4.0, 5.0, 8.0], values), 1):
        mlq.freeze_next(model, step, True, probe)
        assert site.centroids[site.settled].tolist() == pytest.approx(settled)
    assert fully_quantized(model)


# Three layers -1 -1.2 | 0 | 1 1.2: clusters -1.1, 0, 1.1. Boundaries shared, the sum of x (c - w) is -0.1 x1 + 0.1 x2
# + 0.1 x4 - 0.1 x5; with x = (0, s, 0, 0, 0) alone the loss is (0.1 s)^2.
LAYER = [-1.0, -1.2, 0.0, 1.0, 1.2]


def probe_rows(*scales: float) -> list[float]:
    return [x for s in scales for x in (0.0, s, 0.0, 0.0, 0.0)]


def check_order() -> None:
    """The turns of the layers are in the order of decreasing loss; another probe gives other turns."""
    for scales, expected in (((2.0, 1.0, 3.0), [2, 3, 1]), ((1.0, 3.0, 2.0), [3, 1, 2])):
        model = install(mlq.build(), Parallel([LAYER] * 3), ALL_LAYERS)
        probe = probe_of(model, probe_rows(*scales))
        mlq.freeze_next(model, 3, True, probe)
        assert [turn[0] for turn in turns(model)] == expected
        losses = [site.loss[0].item() for site in sites_of(model)]  # type: ignore[operator]
        assert losses == pytest.approx([(0.1 * s) ** 2 for s in scales], rel=1e-4), "measured with the others float"


def test_the_order_of_layers_is_that_of_their_losses_on_the_probe() -> None:
    check_order()


@pytest.mark.parametrize("mutant", ["reversed", "as registered"])
def test_the_check_rejects_wrong_orders(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = mlq.loss_when_frozen
    factor = {"reversed": -1.0, "as registered": 0.0}[mutant]
    monkeypatch.setattr(mlq, "loss_when_frozen", lambda *arguments: factor * true(*arguments))
    with pytest.raises(AssertionError):
        check_order()


def test_the_remaining_layers_are_measured_again() -> None:
    """Losses alone: 0.04, 0.01, 0.0225. The first adds 0.2; together with -0.1 (0.2 - 0.1)^2, with 0.15 0.35^2."""
    model = install(mlq.build(), Parallel([LAYER] * 3), ALL_LAYERS)
    probe = probe_of(model, probe_rows(2.0, -1.0, 1.5))
    for count in (1, 2, 3):
        mlq.freeze_next(model, count, True, probe)
    assert [turn[0] for turn in turns(model)] == [1, 3, 2]
    losses = [site.loss[0].item() for site in sites_of(model)]  # type: ignore[operator]
    assert losses == pytest.approx([0.04, (0.2 + 0.15 - 0.1) ** 2, 0.35**2], rel=1e-4)


@pytest.mark.parametrize(("k", "bits", "groups"), [(3, 2, 2), (5, 3, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_steps_are_those_of_the_transcription(k: int, bits: int, groups: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights, rows = [generator.normal(size=8) for _ in range(3)], generator.normal(size=(5, 24))
    model, probe = as_torch(weights, rows)
    loss, layers = loss_of(weights, rows), [Layer.of(w) for w in weights]
    install(mlq.build(w=bits), model, ALL_LAYERS)
    done = 0
    for _ in range(groups):
        for count in (1, 2):
            mlq.freeze_next(model, done + count, True, probe)
            for i, measured in mlq_steps(layers, k, groups, count, loss):
                done += 1
                site, step = sites_of(model)[i], layers[i].step - 1
                assert site.turn[step] == done  # type: ignore[index]
                assert site.loss[step].item() == pytest.approx(measured, rel=1e-9)  # type: ignore[index,operator]
            assert_same_state(model, layers)
            train(model, layers, generator)
    assert done == 3 * groups
    assert fully_quantized(model)


# Epochs


def test_the_steps_share_the_epochs() -> None:
    """Four layers, two groups: one step per epoch in the first half of a phase; all are done in the last epoch."""
    assert [mlq.steps_due(e, 16, 4, 2) for e in range(16)] == [1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    assert [mlq.steps_due(e, 8, 4, 2) for e in range(8)] == [2, 4, 4, 4, 6, 8, 8, 8]
    assert [mlq.steps_due(e, 4, 4, 2, depth=False) for e in range(4)] == [4, 4, 8, 8]
    assert mlq.steps_due(0, 1, 4, 2) == mlq.steps_due(0, 1, 4, 2, depth=False) == 8
    for epochs in range(1, 40):
        for layers in range(8):
            for groups in (2, 3):
                for depth in (True, False):
                    counts = [mlq.steps_due(e, epochs, layers, groups, depth) for e in range(epochs)]
                    assert counts == sorted(counts)
                    assert counts[-1] == layers * groups


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 16, 30])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_boundaries_of_all_layers_come_before_any_zero_cluster(bits: int, epochs: int) -> None:
    torch.manual_seed(0)
    method = mlq.build(w=bits)
    model = install(method, Parallel(torch.randn(4, 20).tolist()), ALL_LAYERS)
    run_epochs(method, model, epochs, probe_of(model, *torch.randn(4, 80).tolist()), noise=0.05)
    by_group = np.array(turns(model)).T
    assert sorted(by_group.ravel()) == list(range(1, 4 * len(by_group) + 1)), "every step has a turn of its own"
    assert all(before.max() < after.min() for before, after in pairwise(by_group))
    assert all(
        len(levels(effective_weight(layer))) == 2 ** (bits - 1) + 1 for layer in quantized_layers(model).values()
    )


def test_without_depth_all_layers_advance_at_once_and_nothing_is_measured() -> None:
    method = mlq.build(depth=False)
    model = install(method, Parallel([LAYER, WEIGHTS]), ALL_LAYERS)
    probe = Probe([(torch.zeros(1, 12), torch.zeros(1))], reject_measurement)
    assert method.on_epoch is not None
    states = []
    for epoch in range(4):
        method.on_epoch(model, epoch, 4, probe)
        states.append([site.frozen_groups for site in sites_of(model)])  # type: ignore[attr-defined]
    assert states == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert method.phases(4) == mlq.build().phases(4) == [2], "the phases are those with depth"
    measured = install(mlq.build(), Parallel([LAYER, WEIGHTS]), ALL_LAYERS)
    with pytest.raises(AssertionError, match="the loss was measured"):
        mlq.freeze_next(measured, 1, True, probe)


def test_a_checkpoint_keeps_order_and_losses_and_they_are_reported() -> None:
    model = install(mlq.build(), Parallel([LAYER] * 3), ALL_LAYERS)
    probe = probe_of(model, probe_rows(2.0, 1.0, 3.0))
    mlq.freeze_next(model, 4, True, probe)
    again = install(mlq.build(), Parallel([LAYER] * 3), ALL_LAYERS)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        mlq.freeze_next(one, 5, True, probe)
    assert turns(again) == turns(model)
    assert effective_weights(again) == effective_weights(model)
    reports = [site.report() for site in sites_of(again)]
    assert [r["turn_boundary"] for r in reports] == [2, 3, 1]
    assert sorted(r["turn_zero"] for r in reports) == [0, 4, 5]
    assert reports[0]["loss_boundary"] == pytest.approx(0.04, rel=1e-4)
    assert ["loss_zero" in r for r in reports] == [r["turn_zero"] > 0 for r in reports]


def test_the_options_phases_and_storage() -> None:
    with pytest.raises(ValueError, match="zero=half: must be one of mean, pinned"):
        mlq.build(zero="half")
    assert mlq.build(w=32).phases(30) == ()
    assert mlq.build(w=3).phases(30) == [10, 20]
    assert mlq.MLQWeight(torch.zeros(10), 2).bytes(torch.zeros(10)) == (10, 2, 12)
