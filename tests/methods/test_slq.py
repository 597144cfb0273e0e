"""Test SLQ and ESLQ by hand and against an independent transcription: clusters, their order, masks that only grow."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle_slq import Array, Layer, clustered, slq_stage
from torch import Tensor, nn

from qbench.methods import eslq, mlq, slq
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, fully_quantized, quantized_layers
from qbench.quant.masks import FrozenWeight
from qbench.quant.method import Method, Unsupported
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe

ALL_LAYERS = Policy(first="same", last="same")
COUNTS = [(2, 3), (3, 5), (4, 9), (5, 17)]
INCREMENTAL = [
    slq.build(w=2),
    slq.build(w=3),
    slq.build(w=5, clustering="lloyd"),
    eslq.build(w=5),
    mlq.build(),
    mlq.build(w=3),
    mlq.build(depth=False),
]
incremental = pytest.mark.parametrize("method", INCREMENTAL, ids=lambda m: f"{m.name}-{m.bits}")


class Parallel(nn.Module):
    """Each part of the input has its own layer with one output; the outputs are added."""

    def __init__(self, weights: list[list[float]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(len(w), 1, bias=False, dtype=dtype) for w in weights)
        for layer, w in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1)."""
        parts = x.split([layer.in_features for layer in self.layers], 1)  # type: ignore[misc]
        return torch.stack([layer(part) for layer, part in zip(self.layers, parts, strict=True)]).sum(0)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of outputs (N, 1)."""
    return ((outputs[:, 0] - targets) ** 2).mean()


def probe_of(model: nn.Module, *rows: list[float]) -> Probe:
    """Return a probe whose targets are the model's current outputs, so that its loss is that of quantization."""
    x = torch.tensor(rows, dtype=next(model.parameters()).dtype)
    return Probe([(x, model(x)[:, 0].detach())], squared)


def sites_of(model: nn.Module) -> list[slq.SLQWeight]:
    sites = [layer.weight_q for layer in quantized_layers(model).values()]
    assert all(isinstance(site, slq.SLQWeight) for site in sites)
    return sites  # type: ignore[return-value]


def levels(w: Tensor) -> list[float]:
    return w.unique().tolist()


# Clusters


def test_the_clusters_are_those_computed_by_hand() -> None:
    w = torch.tensor([[1.0, 1.2, -0.3], [0.1, 5.0, -0.1]])
    centroids, labels = slq.cluster(w, 3)
    assert centroids.tolist() == pytest.approx([-0.1, 1.1, 5.0])
    assert labels.tolist() == [[1, 1, 0], [0, 2, 0]]
    assert labels.dtype == torch.int64
    centroids, labels = slq.cluster(w, 3, 0.0)
    assert centroids.tolist() == pytest.approx([0.0, 1.1, 5.0])
    centroids, _ = slq.cluster(w, 4, [1.0, 0.0])
    assert centroids.tolist() == pytest.approx([-0.3, 0.0, 1.0, 5.0]), "1.2 - 1 = 0.2 costs less than -0.3"
    assert torch.equal(w, torch.tensor([[1.0, 1.2, -0.3], [0.1, 5.0, -0.1]]))


@pytest.mark.parametrize("pins", [[], [0.0], [-0.5, 0.0]])
@pytest.mark.parametrize("k", [3, 4])
def test_the_clusters_have_the_least_squared_error(pins: list[float], k: int) -> None:
    generator = np.random.default_rng(len(pins) + k)
    for _ in range(5):
        w = generator.normal(size=(3, 3))
        centroids, labels = slq.cluster(torch.tensor(w), k, pins)
        expected, places = clustered(w, k, pins)
        np.testing.assert_allclose(centroids.numpy(), expected, rtol=1e-12, atol=1e-12)
        assert np.array_equal(labels.numpy(), places)


def lloyd_by_hand(w: Array, starts: list[float], fixed: list[bool]) -> tuple[Array, Array]:
    """Ten textbook steps: every weight goes to the nearest centroid, every free centroid to its weights' mean."""
    centroids = np.array(starts)
    for _ in range(10):
        nearest = np.abs(w.ravel()[:, None] - centroids).argmin(1)
        for i in range(len(centroids)):
            if not fixed[i] and (nearest == i).any():
                centroids[i] = w.ravel()[nearest == i].mean()
    return centroids, np.abs(w.ravel()[:, None] - centroids).argmin(1).reshape(w.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_lloyd_steps_of_the_authors_of_slq(bits: int) -> None:
    """kmeans.hpp: starts at 0 and +-2^floor(log2 max|w|) / 2^j; zero is pinned; frozen centroids stay."""
    w = np.random.default_rng(bits).normal(size=(30, 20)) * 0.3
    k, top = 2 ** (bits - 1) + 1, 2.0 ** math.floor(math.log2(np.abs(w).max()))
    powers = [top / 2**j for j in range(k // 2)]
    starts = [*(-p for p in powers), 0.0, *reversed(powers)]
    assert slq.power_of_two_starts(torch.tensor(w), k).tolist() == starts
    site = slq.SLQWeight(torch.tensor(w), bits, clustering="lloyd")
    clusters = site.clusters(torch.tensor(w))
    centroids, labels = lloyd_by_hand(w, starts, [s == 0 for s in starts])
    np.testing.assert_allclose(clusters.centroids.numpy(), centroids, rtol=1e-12)
    assert np.array_equal(clusters.labels.numpy(), labels)
    settled = clusters.settled.clone()
    settled[[0, k // 2]] = True
    site.freeze_clusters(clusters, settled)
    again = site.clusters(torch.tensor(w * 0.9))
    starts = [c if f else s for c, f, s in zip(centroids, settled.tolist(), starts, strict=True)]
    moved = np.where(site.frozen.numpy(), site.value.numpy(), w * 0.9)
    assert starts == sorted(starts)
    want, _ = lloyd_by_hand(moved, starts, settled.tolist())
    np.testing.assert_allclose(again.centroids.numpy(), want, rtol=1e-12)
    assert torch.equal(again.centroids[settled], clusters.centroids[settled])


def test_ten_lloyd_steps_leave_more_error_than_exact_clusters() -> None:
    w = torch.from_numpy(np.random.default_rng(0).normal(size=20000) * 0.05)
    errors = {}
    for clustering in slq.CLUSTERINGS:
        clusters = slq.SLQWeight(w, 5, clustering=clustering).clusters(w)
        errors[clustering] = ((w - clusters.centroids[clusters.labels]) ** 2).mean().item() / w.var().item()
    assert errors["exact"] == pytest.approx(0.0084, abs=0.0003)
    assert errors["lloyd"] > 1.5 * errors["exact"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_centroids_are_ascending_distinct_and_of_the_type_of_the_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = (torch.randn(400) * 0.01 + 1).to(dtype)
    centroids, labels = slq.cluster(w, 129)
    assert centroids.dtype == dtype
    assert (centroids[1:] > centroids[:-1]).all()
    assert labels.unique().tolist() == list(range(len(centroids)))


@pytest.mark.parametrize(("bits", "k"), COUNTS)
@pytest.mark.parametrize("method", ["slq", "mlq"])
def test_the_number_of_levels(method: str, bits: int, k: int) -> None:
    """2^(b-1) + 1: 2 bits are ternary, 5 bits have 17 clusters."""
    if method == "mlq" and bits > 4:
        with pytest.raises(Unsupported, match=r"bits\.w=[45]"):
            install(mlq.build(w=bits), Parallel([[1.0, 2.0]]), ALL_LAYERS)
        return
    torch.manual_seed(0)
    weights = torch.randn(2, 60).tolist()
    model = install({"slq": slq, "mlq": mlq}[method].build(w=bits), Parallel(weights), ALL_LAYERS)  # type: ignore[attr-defined]
    run_epochs({"slq": slq, "mlq": mlq}[method].build(w=bits), model, 4, probe_of(model, [0.0] * 120))  # type: ignore[attr-defined]
    for layer in quantized_layers(model).values():
        w = effective_weight(layer)
        assert len(levels(w)) == k
        assert layer.weight_q.grid(layer.weight).points.flatten().tolist() == levels(w)  # type: ignore[operator]
        assert layer.weight_q.bytes(layer.weight).code_bits == math.ceil(math.log2(k)) == bits  # type: ignore[operator]
        assert method == "mlq" or 0.0 in levels(w)


# The order of clusters. One layer, three clusters, by hand:
#   weights -1.0 -0.6 | 0.1 0.05 | 0.7 0.5   centroids -0.8, 0 (pinned), 0.6
#   squared distance  0.08, 0.0125, 0.02
#   x       1    0    | 1   1    | 4   0     x (c - w) summed: 0.2, -0.15, -0.4
#   the loss is the square of this sum over the shared clusters:
#   alone 0.04, 0.0225, 0.16; together with 0.6, which is first: (0.2 - 0.4)^2 = 0.04, (-0.15 - 0.4)^2 = 0.3025
WEIGHTS, X = [-1.0, -0.6, 0.1, 0.05, 0.7, 0.5], [1.0, 0.0, 1.0, 1.0, 4.0, 0.0]
ORDERS = {"probe": [0.6, 0.0, -0.8], "weight_error": [-0.8, 0.6, 0.0], "magnitude": [0.0, 0.6, -0.8]}


def order_of(partition: str) -> list[float]:
    """Return the centroids in the order that they were frozen in."""
    model = install(slq.build(w=2, partition=partition), Parallel([WEIGHTS]), ALL_LAYERS)
    probe, (site,) = probe_of(model, X), sites_of(model)
    order: list[float] = []
    for portion in (1 / 3, 2 / 3, 1.0):
        slq.freeze_next(model, portion, partition, probe)
        order += [c for c in site.centroids[site.settled].tolist() if c not in order]
    return order


def check_order(partition: str) -> None:
    assert order_of(partition) == pytest.approx(ORDERS[partition])


@pytest.mark.parametrize("partition", ORDERS)
def test_the_clusters_are_frozen_in_the_order_computed_by_hand(partition: str) -> None:
    check_order(partition)


@pytest.mark.parametrize("partition", ORDERS)
def test_the_check_rejects_the_reversed_order(partition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = slq.scores
    monkeypatch.setattr(slq, "scores", lambda *arguments: -true(*arguments))
    with pytest.raises(AssertionError):
        check_order(partition)


def test_the_check_rejects_a_loss_with_all_clusters_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = slq.loss_when_frozen
    monkeypatch.setattr(slq, "loss_when_frozen", lambda *a: true(*a[:-1], torch.ones_like(a[-1])))
    with pytest.raises(AssertionError):
        check_order("probe")


def test_the_losses_and_distances_are_those_computed_by_hand() -> None:
    model = install(slq.build(w=2), Parallel([WEIGHTS]), ALL_LAYERS)
    probe, (site,) = probe_of(model, X), sites_of(model)
    (layer,) = quantized_layers(model).values()
    found = site.clusters(layer.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = slq.scores(model, probe, site, layer.weight, found, "probe")
    assert losses.tolist() == pytest.approx([0.04, 0.0225, 0.16], rel=1e-5)
    errors = slq.weight_errors(layer.weight, found.centroids, found.labels)
    assert errors.tolist() == pytest.approx([0.08, 0.0125, 0.02], rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)), f"measuring changed {name}"


def test_the_authors_order_is_zero_then_pairs_from_outside_in() -> None:
    centroids = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.4, 2.0])
    order = slq.magnitude_order(centroids).argsort(descending=True)
    assert centroids[order].tolist() == pytest.approx([0.0, 2.0, -3.0, 0.4, -1.0, -0.5])


def test_the_random_partition_draws_from_the_global_generator() -> None:
    orders = []
    for seed in range(8):
        torch.manual_seed(seed)
        first = order_of("random")
        torch.manual_seed(seed)
        assert order_of("random") == first
        orders.append(tuple(first))
    assert len(set(orders)) > 2


# Stages


@pytest.mark.parametrize(
    ("bits", "counts"), [(5, [5, 9, 13, 15, 17]), (4, [2, 4, 7, 8, 9]), (3, [1, 2, 4, 5]), (2, [1, 2, 3])]
)
def test_the_portions_give_the_authors_counts(bits: int, counts: list[int]) -> None:
    """5 bits: 5, 9, 13, 15, 17 of 17 as in their README; fewer bits: the same fractions, no stage twice."""
    torch.manual_seed(0)
    method = slq.build(w=bits, partition="magnitude")
    model = install(method, Parallel([torch.randn(200).tolist()]), ALL_LAYERS)
    (site,), probe = sites_of(model), probe_of(model, [0.0] * 200)
    seen = []
    for epoch in range(30):
        assert method.on_epoch is not None
        method.on_epoch(model, epoch, 30, probe)
        seen.append(int(site.settled.sum()))
    assert list(dict.fromkeys(seen)) == counts
    assert [0, *method.phases(30)] == [seen.index(count) for count in counts], "a phase begins where clusters freeze"


def run_epochs(method: Method, model: nn.Module, epochs: int, probe: Probe, noise: float = 0.0) -> list[list[Tensor]]:
    """Run the epochs with noise instead of training; return each layer's mask by epoch."""
    masks: list[list[Tensor]] = []
    for epoch in range(epochs):
        assert method.on_epoch is not None
        method.on_epoch(model, epoch, epochs, probe)
        masks.append([site.frozen.clone() for site in sites_of(model)])
        with torch.no_grad():
            for layer in quantized_layers(model).values():
                layer.weight.add_(noise * torch.randn_like(layer.weight))
    return masks


@incremental
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 30])
def test_all_stages_fit_into_the_epochs_and_masks_only_grow(method: Method, epochs: int) -> None:
    torch.manual_seed(0)
    model = install(method, Parallel(torch.randn(3, 40).tolist()), ALL_LAYERS)
    masks = run_epochs(method, model, epochs, probe_of(model, *torch.randn(4, 120).tolist()), noise=0.1)
    assert fully_quantized(model), "the last epoch is complete"
    for before, after in pairwise(masks):
        assert all((old <= new).all() for old, new in zip(before, after, strict=True))
    borders = method.phases(epochs)
    for border in borders:
        grown = [int((n & ~o).sum()) for o, n in zip(masks[border - 1], masks[border], strict=True)]
        assert sum(grown) > 0, f"nothing is frozen in epoch {border}, where a phase begins"
    assert len(borders) == min(epochs, len(borders) + 1) - 1
    assert epochs == 1 or not all(mask.all() for mask in masks[0])


@incremental
def test_frozen_weights_stay_bit_identical_under_momentum_and_decay(method: Method) -> None:
    torch.manual_seed(0)
    model = install(method, mlp.build((1, 2, 2), 3, hidden=4, width=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = torch.randn(16, 1, 2, 2), torch.randint(3, (16,))
    probe = Probe([(x, y)], nn.functional.cross_entropy)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    layers, epochs, free_moved = list(quantized_layers(model).values()), 6, 0
    train()
    for epoch in range(epochs):
        assert method.on_epoch is not None
        before = [(layer.weight_q.frozen.clone(), effective_weight(layer)) for layer in layers]  # type: ignore[operator]
        method.on_epoch(model, epoch, epochs, probe)
        now = [(layer.weight_q.frozen.clone(), effective_weight(layer)) for layer in layers]  # type: ignore[operator]
        latent = [layer.weight.detach().clone() for layer in layers]
        train()
        for layer, (old, was), (frozen, value), w in zip(layers, before, now, latent, strict=True):
            after = effective_weight(layer)
            assert torch.equal(value[old], was[old]), "a stage moved a weight that an earlier one froze"
            assert torch.equal(value[~frozen], was[~frozen]), "a stage moved a free weight"
            assert torch.equal(after[frozen], value[frozen])
            assert not frozen.any() or not torch.equal(layer.weight[frozen], w[frozen]), "momentum moves the latent"
            free_moved += int((after[~frozen] != value[~frozen]).sum())
    assert free_moved > 0
    assert fully_quantized(model)


def as_torch(weights: list[Array], rows: Array) -> tuple[nn.Module, Probe]:
    model = Parallel([w.tolist() for w in weights], torch.float64)
    return model, probe_of(model, *rows.tolist())


def assert_same_state(model: nn.Module, layers: list[Layer]) -> None:
    """Assert that model and transcription have the same masks, values and frozen centroids."""
    for layer, site, expected in zip(quantized_layers(model).values(), sites_of(model), layers, strict=True):
        assert np.array_equal(site.frozen[0].numpy(), expected.frozen)
        np.testing.assert_allclose(effective_weight(layer)[0].numpy(), expected.effective, rtol=1e-12, atol=1e-14)
        assert site.centroids[site.settled].tolist() == pytest.approx(expected.fixed, rel=1e-12)


def loss_of(weights: list[Array], rows: Array) -> Callable[[list[Array]], float]:
    """Return the network's loss against its current outputs, in NumPy."""
    target = rows @ np.concatenate(weights)
    return lambda effective: float(np.square(rows @ np.concatenate(effective) - target).mean())


def train(model: nn.Module, layers: list[Layer], generator: np.random.Generator) -> None:
    """Move the latent weights of both in the same way."""
    for layer, quantized in zip(layers, quantized_layers(model).values(), strict=True):
        layer.latent = layer.latent + generator.normal(size=layer.latent.shape) * 0.3
        quantized.weight.data.copy_(torch.tensor(layer.latent))


def check_stages(seed: int) -> int:
    """Compare three stages with the transcription; return how many free weights were absorbed."""
    generator = np.random.default_rng(seed)
    weights, rows = [generator.normal(size=9) for _ in range(2)], generator.normal(size=(5, 18))
    model, probe = as_torch(weights, rows)
    loss, layers = loss_of(weights, rows), [Layer.of(w) for w in weights]
    install(slq.build(w=3), model, ALL_LAYERS)
    absorbed = 0
    for portion in (0.3, 0.6, 0.8, 1.0):
        fixed = [np.array(layer.fixed) for layer in layers]
        before = [layer.frozen for layer in layers]
        slq.freeze_next(model, portion, "probe", probe)
        slq_stage(layers, 5, portion, loss)
        assert_same_state(model, layers)
        for layer, old, values in zip(layers, before, fixed, strict=True):
            absorbed += int(np.isin(layer.value[layer.frozen & ~old], values).sum())
        train(model, layers, generator)
    assert fully_quantized(model)
    return absorbed


def check_all_stages() -> None:
    assert sum(check_stages(seed) for seed in range(4)) > 0, "no free weight came near a frozen centroid"


def test_the_stages_are_those_of_the_transcription() -> None:
    check_all_stages()


@pytest.mark.parametrize("mutant", ["free clusters not measured in the network", "frozen centroids move", "no zero"])
def test_the_check_rejects_wrong_stages(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "frozen centroids move":
        kmeans = slq.kmeans
        monkeypatch.setattr(slq, "kmeans", lambda w, k, pinned: kmeans(w, k, [0.0]))
    elif mutant == "no zero":
        kmeans = slq.kmeans
        monkeypatch.setattr(slq, "kmeans", lambda w, k, pinned: kmeans(w, k, [p for p in pinned.tolist() if p]))
    else:
        scores = slq.scores
        monkeypatch.setattr(slq, "scores", lambda *a: scores(*a[:-1], "weight_error"))
    with pytest.raises(AssertionError):
        check_all_stages()


@pytest.mark.parametrize("weights", [[0.0] * 4, [1.0] * 4, [1.0, -1.0, 1.0, -1.0], [0.5, 0.0, 2.0, 2.0]])
@incremental
def test_a_layer_with_few_distinct_weights_keeps_them(method: Method, weights: list[float]) -> None:
    model = install(method, Parallel([weights]), ALL_LAYERS)
    run_epochs(method, model, 4, probe_of(model, [1.0, 2.0, 3.0, 4.0]))
    assert fully_quantized(model)
    (layer,) = quantized_layers(model).values()
    assert levels(effective_weight(layer)) == sorted(set(weights)), (
        "no cluster is empty: each distinct weight has its own"
    )
    points = layer.weight_q.grid(layer.weight).points.flatten().tolist()  # type: ignore[operator]
    assert set(weights) <= set(points)


def test_a_completely_frozen_layer_is_skipped() -> None:
    model = install(slq.build(w=2), Parallel([[0.0, 1.0], [0.0, 1.0, -1.0, 2.0]]), ALL_LAYERS)
    probe, (small, large) = probe_of(model, [1.0] * 6), sites_of(model)
    slq.freeze_next(model, 0.34, "probe", probe)
    slq.freeze_next(model, 0.67, "probe", probe)
    assert (small.complete, large.complete) == (True, False)
    slq.freeze_next(model, 1.0, "probe", probe)
    assert large.complete


# ESLQ


def test_the_centroids_of_eslq_move_to_powers_of_two() -> None:
    """Centroids -0.8, 0, 0.6: n1 = floor(log2(3.2 / 3)) = 0. At 2 bits n2 = 0; at 3 bits n2 = -1, 0.6 goes to 0.5."""
    for bits, expected in ((2, [-1.0, 0.0, 1.0]), (3, [-1.0, -0.5, 0.0, 0.5])):
        model = install(eslq.build(w=bits), Parallel([WEIGHTS]), ALL_LAYERS)
        eslq_run = eslq.build(w=bits)
        run_epochs(eslq_run, model, 3, probe_of(model, X))
        (layer,) = quantized_layers(model).values()
        assert levels(effective_weight(layer)) == expected


def test_the_borders_between_levels_of_eslq_are_midpoints() -> None:
    site = eslq.ESLQWeight(torch.zeros(4), 4)
    site.n1.fill_(0)
    site.settled[0] = True  # the exponent is set
    centroids = torch.tensor([-5.0, -0.75, -0.74, 0.06, 0.0624, 0.19, 0.37])
    assert site.shared_values(centroids).tolist() == [-1.0, -1.0, -0.5, 0.0, 0.0, 0.25, 0.25], "levels 1/8 to 1"


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_levels_of_eslq_are_in_the_range_of_inq(bits: int) -> None:
    torch.manual_seed(bits)
    method = eslq.build(w=bits, partition="magnitude")
    model = install(method, Parallel(torch.randn(2, 300).tolist()), ALL_LAYERS)
    run_epochs(method, model, 10, probe_of(model, [0.0] * 600), noise=0.1)
    for layer in quantized_layers(model).values():
        n1 = int(layer.weight_q.n1)  # type: ignore[arg-type]
        found = levels(effective_weight(layer))
        assert 3 <= len(found) <= 2 ** (bits - 1) + 1
        powers = [math.log2(abs(v)) for v in found if v]
        assert all(p == round(p) and n1 + 1 - 2 ** (bits - 1) // 2 <= p <= n1 for p in powers)
        assert max(powers) == n1
        assert layer.weight_q.grid(layer.weight).points.flatten().tolist() == found  # type: ignore[operator]


def test_the_losses_of_eslq_are_measured_at_the_power_of_two() -> None:
    """The cluster 0.6 0.6 costs nothing at its centroid, and (2 (0.5 - 0.6))^2 at the power of two."""
    weights, x = [-1.1, -0.9, 0.0, 0.6, 0.6], [0.01, 0.0, 0.0, 1.0, 1.0]
    firsts = []
    for module in (slq, eslq):
        method = module.build(w=3)  # type: ignore[attr-defined]
        model = install(method, Parallel([weights]), ALL_LAYERS)
        (site,), (layer,) = sites_of(model), quantized_layers(model).values()
        found = site.clusters(layer.weight)
        losses = slq.scores(model, probe_of(model, x), site, layer.weight, found, "probe")
        firsts.append((found.centroids[losses.argmax()].item(), losses.max().item()))
    assert firsts[1] == pytest.approx((0.5, 0.04), rel=1e-5)
    assert firsts[0][1] < 1e-6


# Options, storage, state


def test_invalid_options_raise() -> None:
    for module in (slq, eslq):
        with pytest.raises(ValueError, match="partition=best: must be one of probe"):
            module.build(partition="best")  # type: ignore[attr-defined]
        for portions in ([], [0.5], [1.0, 0.5], [0.0, 1.0], [0.5, 0.5, 1.0]):
            with pytest.raises(ValueError, match="ascending"):
                module.build(portions=portions)  # type: ignore[attr-defined]


def test_portions_of_the_same_count_are_one_stage() -> None:
    method = slq.build(w=2, portions=[0.1, 0.2, 0.34, 0.5, 1.0])
    assert len(method.phases(30)) == 1, "0.1 to 0.5 are one cluster of three"
    assert slq.build(w=32).phases(30) == ()


def test_the_stored_bytes() -> None:
    w = torch.zeros(10)
    assert slq.SLQWeight(w, 5).bytes(w) == (10, 5, 4 * 17)
    assert eslq.ESLQWeight(w, 5).bytes(w) == (10, 5, 1)


def test_weights_frozen_temporarily_are_free_again_even_after_an_error() -> None:
    site = FrozenWeight(torch.zeros(3))
    site.freeze(torch.tensor([True, False, False]), torch.tensor([5.0, 0, 0]))
    w = torch.tensor([1.0, 2.0, 3.0])
    with site.frozen_for_now(torch.tensor([True, True, False]), torch.tensor([7.0, 8.0, 9.0])):
        assert site(w).tolist() == [5, 8, 3]
    assert site(w).tolist() == [5, 2, 3]
    with pytest.raises(KeyError), site.frozen_for_now(torch.ones(3, dtype=torch.bool), w):
        raise KeyError
    assert site(w).tolist() == [5, 2, 3]
    assert site.value.tolist() == [5, 0, 0]


def test_the_report_counts_clusters_and_frozen_weights() -> None:
    model = install(slq.build(w=2), Parallel([WEIGHTS]), ALL_LAYERS)
    (site,) = sites_of(model)
    assert site.report() == {"clusters": 0, "settled": 0, "frozen": 0.0}
    slq.freeze_next(model, 0.34, "probe", probe_of(model, X))
    assert site.report() == pytest.approx({"clusters": 3, "settled": 1, "frozen": 2 / 6})


@pytest.mark.parametrize("bits", [5, 8])
def test_portions_are_of_the_clusters_with_weights(bits: int) -> None:
    """With Lloyd's steps from powers of two, most clusters of 8 bits have no weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    model = install(slq.build(w=bits, clustering="lloyd", partition="magnitude"), net)
    (site,) = sites_of(model)
    assert isinstance(site, slq.SLQWeight)
    for portion in (0.3, 0.55, 0.8, 1.0):
        slq.freeze_next(model, portion, "magnitude", probe_of(model, X))
        report = site.report()
        assert report["settled"] == len(site.value[site.frozen].unique()), "clusters without weights do not count"
        assert report["clusters"] >= report["settled"] >= int(portion * report["clusters"])
    assert site.complete


def test_a_pinned_zero_without_weights_takes_no_stage() -> None:
    model = install(slq.build(w=2, partition="magnitude"), Parallel([[1.0, 1.0, 2.0, 2.0]]), ALL_LAYERS)
    (site,) = sites_of(model)
    slq.freeze_next(model, 1 / 3, "magnitude", probe_of(model, [1.0] * 4))
    assert site.frozen[0].tolist() == [False, False, True, True], "the authors' order, but the zero cluster is empty"
