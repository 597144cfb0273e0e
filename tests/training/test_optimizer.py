"""Optimizers and their parameter groups: learning-rate factors and weight decay of every kind of parameter."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from qbench.config.schema import Optim
from qbench.methods import dorefa, lsq, pact
from qbench.models import mlp
from qbench.quant.install import install
from qbench.training import optimizer as optim
from qbench.training.optimizer import parameter_groups


def test_weight_decay_excludes_biases_and_norms_and_quantizers_set_their_own() -> None:
    class WithScale(dorefa.DoReFaWeight):
        lr_scale, weight_decay = 0.1, 0.5

        def __init__(self) -> None:
            super().__init__(2)
            self.scale = nn.Parameter(torch.ones(()))

    method = replace(dorefa.build(w=2), weight=lambda name, layer, bits: WithScale())
    model = install(method, mlp.build((1, 4, 4), 3, hidden=2, width=16))
    groups = {
        (g["lr_scale"], g["weight_decay"]): len(g["params"]) for g in parameter_groups(model, Optim(weight_decay=1e-3))
    }  # type: ignore[arg-type]
    assert groups == {(1.0, 1e-3): 3, (1.0, 0.0): 5, (0.1, 0.5): 1}
    optimizer = optim.build_optimizer(model, Optim(name="sgd", lr=1.0))
    optim.set_learning_rate(optimizer, 0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.05, 0.5]


def test_biases_of_layers_can_have_their_own_learning_rate() -> None:
    """Caffe's lr_mult of 2 for biases of layers, which have no decay; norms and quantizers keep their rate."""
    model = install(lsq.build(w=2, a=2), mlp.build((1, 4, 4), 3, hidden=2, width=16))
    optimizer = optim.build_optimizer(model, Optim(name="sgd", lr=1.0, weight_decay=0.5, bias_lr=2.0))
    optim.set_learning_rate(optimizer, 0.25)
    rules = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        weights = isinstance(module, nn.Linear)
        want = (0.5 if weights and p.dim() == 1 else 0.25, 0.5 if weights and p.dim() == 2 else 0.0)
        assert rules[id(p)] == want, name
    assert (0.5, 0.0) in rules.values()
    assert {g["lr_scale"] for g in parameter_groups(model, Optim(weight_decay=0.5))} == {1.0}


def rules(model: nn.Module, **recipe: Any) -> dict[str, tuple[float, float]]:
    """Return parameter -> (learning-rate factor, weight decay)."""
    groups = parameter_groups(model, Optim(lr=0.1, **recipe))
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    return {name: found[id(p)] for name, p in model.named_parameters()}  # type: ignore[misc]


def test_biases_of_all_kinds_of_layers_have_the_learning_rate_of_biases() -> None:
    norm = nn.utils.parametrizations
    model = nn.ModuleDict({
        "linear": nn.Linear(4, 4), "normed": norm.weight_norm(nn.Conv2d(2, 3, 3)),
        "spectral": norm.spectral_norm(nn.Linear(4, 4)),
        "orthogonal": norm.orthogonal(nn.Linear(4, 4)), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "lstm": nn.LSTM(4, 4, 2), "cell": nn.GRUCell(4, 4), "bilinear": nn.Bilinear(2, 2, 2),
        "batch": nn.BatchNorm2d(3), "layer": nn.LayerNorm(4), "group": nn.GroupNorm(2, 4),
    })  # fmt: skip
    doubled = {name for name, (factor, _) in rules(model, bias_lr=2.0).items() if factor == 2}
    assert doubled == {
        "linear.bias", "normed.bias", "spectral.bias", "orthogonal.bias", "attention.in_proj_bias",
        "attention.out_proj.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "lstm.bias_ih_l1", "lstm.bias_hh_l1",
        "cell.bias_ih", "cell.bias_hh", "bilinear.bias",
    }  # fmt: skip


def test_norms_and_biases_decay_only_if_asked_and_quantizers_never() -> None:
    model = install(pact.build(w=2, a=2), mlp.build((1, 4, 4), 3, hidden=2, width=16))
    without, whole = rules(model, weight_decay=0.5), rules(model, weight_decay=0.5, decay_norm_and_bias=True)
    small = {name for name, p in model.named_parameters() if p.dim() == 1}
    alphas = {name for name in without if name.endswith("alpha")}
    assert small, "a bias or a norm"
    assert alphas
    assert {without[name] for name in small} == {(1.0, 0.0)}
    assert {whole[name] for name in small} == {(1.0, 0.5)}
    assert {without[name] for name in alphas} == {whole[name] for name in alphas} == {(1.0, 2e-4)}


def test_normalization_never_decays_and_other_parameters_decay_from_two_axes_on() -> None:
    model = nn.ModuleDict({
        "layer": nn.LayerNorm((2, 4)), "rms": nn.RMSNorm((2, 4)), "group": nn.GroupNorm(2, 4),
        "embedding": nn.Embedding(3, 4), "prelu": nn.PReLU(), "lstm": nn.LSTM(4, 4),
        "own": nn.ParameterDict({"row": torch.ones(1, 8), "vector": torch.ones(8)}),
    })  # fmt: skip
    decayed = {name for name, (_, decay) in rules(model, weight_decay=0.5).items() if decay}
    assert decayed == {"embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "own.row"}
    assert set(rules(model, weight_decay=0.5, decay_norm_and_bias=True).values()) == {(1.0, 0.5)}


def test_quantizers_have_a_learning_rate_and_a_decay_of_their_own() -> None:
    for method, name in ((pact.build(w=2, a=2), "alpha"), (lsq.build(w=2, a=2), "step")):
        model = install(method, mlp.build((1, 4, 4), 3, hidden=2, width=16))
        before, after = rules(model), rules(model, quantizer_lr=0.1, quantizer_decay=0.25)
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {key for key in before if key.endswith(name)}, name
        assert {after[key] for key in changed} == {(0.1, 0.25)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam), ("sgd", torch.optim.SGD)],
)
def test_a_step_is_that_of_torch(name: str, kind: Any) -> None:
    """One decayed weight after three steps, beside torch's optimizer with its defaults."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    optimizers = (
        optim.build_optimizer(ours, Optim(name=name, lr=0.1, weight_decay=0.5)),
        kind(theirs.parameters(), lr=0.1, weight_decay=0.5, **options),
    )
    for _ in range(3):
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "sgd"])
def test_layers_that_are_skipped_in_some_steps_are_trained_as_by_torch(name: str, nesterov: bool) -> None:
    """As with stochastic depth. torch's fused SGD fails if a parameter has its first gradient in a later step."""
    recipe = Optim(name=name, lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=nesterov, decay_norm_and_bias=True)
    ours, theirs = (nn.ModuleList(nn.Linear(3, 3) for _ in range(4)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
    plain = kinds.get(name, partial(torch.optim.SGD, momentum=0.9, nesterov=nesterov, fused=False))
    optimizers = optim.build_optimizer(ours, recipe), plain(theirs.parameters(), lr=0.1, weight_decay=0.5)
    for used in ((0,), (0, 1), (2,), (0, 1, 2), (1, 2)):  # the last layer is never used
        for layers, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            x = torch.ones(2, 3)
            for i in used:
                x = layers[i](x)
            x.square().sum().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_weight_decay_ends_and_begins_again_with_a_phase() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = optim.build_optimizer(layer, Optim(name="sgd", lr=0.1, weight_decay=0.5, decay_until=0.5))
    found = []
    for decay in (True, False, True):
        optim.set_learning_rate(optimizer, 0.1, decay=decay)
        found.append(optimizer.param_groups[0]["weight_decay"])
    assert found == [0.5, 0.0, 0.5]
    plain = optim.build_optimizer(layer, Optim(name="sgd", lr=0.1, weight_decay=0.5))
    assert optim.FULL_DECAY not in plain.param_groups[0], "the state of other runs stays as it was"
