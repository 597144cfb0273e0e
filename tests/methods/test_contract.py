"""Test what every method must fulfil: each test runs over all files of conf/method."""

import functools
import inspect
from typing import Any

import pytest
import torch
from conftest import Configure, long_tier, tiered
from helpers import quantizing_bits

from qbench.bits import FLOAT
from qbench.config import compose, groups, registry
from qbench.config.schema import Config
from qbench.data.loader import Loader
from qbench.deviations.registry import deviations
from qbench.errors import Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.quant.layers import effective_weight, is_quantizer_key, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.probe import Probe
from qbench.quant.verify import verify
from qbench.runs.result import Result
from qbench.training import optimizer as optim
from qbench.training.checkpoint import pack, unpack
from qbench.training.digests import weights_sha256
from qbench.training.evaluation import evaluate
from qbench.training.loop import Callbacks, train
from qbench.training.random_state import seed_everything
from qbench.training.state import State
from qbench.training.task import Task

METHODS = groups.option_names("method")
SECTIONS = (
    "Paper", "Idea", "Forward", "Backward", "Schedule", "Sites", "State", "Bits", "Protocol", "Choices", "Deviations",
    "Results",
)  # fmt: skip
TRAITS = {
    *("odd", "monotone", "idempotent", "no_master", "fixed_point_gradients"),
    *("monotone_input", "idempotent_input", "clipped_input", "cells_input"),
}
every_method = pytest.mark.parametrize("name", METHODS)
REPRESENTATIVES = ("dorefa", "gupta", "inq", "lsq", "ptq", "qd", "slq")
"""Methods that are trained for an epoch in the fast tier: plain, with random draws, with steps that freeze weights,
with learned steps, without training, with a teacher, with codebooks. The others are in the long tier.
"""
representatives = pytest.mark.parametrize("name", tiered(METHODS, REPRESENTATIVES))
TRAINED = ("dorefa", "dq", "inq", "lsq", "slq")
"""Methods that are trained for several epochs in the fast tier. Their levels differ most."""
STOPPED = ("inq", "ptq")
"""Methods whose whole runs are stopped and resumed in the fast tier. One of them does not train."""


SIX_STEPS = ["optim.batch_size=192", "pretrain.optim.batch_size=192"]
"""Words for six steps an epoch. With a batch of validation and the end of an epoch, the loop asks eight times whether
to stop.
"""


def trained(
    config: Config, parts: ExperimentSetup | None = None, epochs: int | None = None
) -> tuple[Task, State, list[float]]:
    """Train a configuration in memory from scratch; return the task, the state and the loss of each step."""
    parts = parts or assemble(config)
    loader = Loader(parts.data, config.optim.batch_size, config.seed, parts.device)
    model = parts.install(parts.float_model())
    probe = Probe(list(loader.unaugmented("train", 64)), torch.nn.functional.cross_entropy)
    if parts.method.prepare:
        parts.method.prepare(model, probe)
    task = Task(
        model=model, method=parts.method, optim=config.optim, epochs=epochs or config.epochs, steps=loader.steps,
        train=loader.train, validate=lambda: loader.unaugmented("val"), probe=probe,
    )  # fmt: skip
    seed_everything(config.seed)
    state, losses = State(optim.build_optimizer(model, config.optim)), []
    train(task, state, Callbacks(on_step=lambda state, loss: losses.append(loss.item())))
    return task, state, losses


@functools.cache
def trained_once(name: str) -> tuple[Config, Task, State, list[float]]:
    """Train a method with the default recipe and seed; the tests that share the result do not change it."""
    words = ["experiment=smoke", f"method={name}", f"bits={quantizing_bits(name)}", "init=scratch"]
    (config,) = compose.configurations(words)
    return config, *trained(config)


@functools.cache
def losses_of_float(norm: str | None) -> list[float]:
    """Return the losses of two float epochs by SGD in a network with a normalization, or with the default one."""
    words = ["experiment=smoke", "optim=sgd", "init=scratch", "epochs=2", "pretrain.epochs=2"]
    (config,) = compose.configurations([*words, *([f"model.norm={norm}"] if norm else [])])
    return trained(config)[2]


@every_method
def test_the_method_card_has_every_section(name: str) -> None:
    card = registry.card(name)
    headings = [line for line in card.splitlines() if line and not line.startswith(" ")]
    assert headings[1:] == list(SECTIONS)
    for heading in SECTIONS:
        body = card.split(f"\n{heading}\n")[1].split("\n\n")[0]
        assert body.strip(), f"{heading} is empty"


@every_method
def test_the_conf_file_agrees_with_the_build_function(name: str, configure: Configure) -> None:
    config = configure(f"method={name}")
    signature = inspect.signature(registry.find("method", name)).parameters
    options = {key: p.default for key, p in signature.items() if key not in "wag"}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    assert {k: v for k, v in config.method.items() if k not in ("name", "deviation", "added")} == options
    assert ("deviation" in config.method) == bool(deviations(name))
    requires = registry.create("method", {"name": name}).requires
    assert (config.init == "method") == (requires.start == "scratch")
    assert (config.distill.name == "method") == requires.teacher
    defaults = {key: signature[key].default for key in "wag" if key in signature}
    assert {key: getattr(config.bits, key) for key in defaults} == defaults


@pytest.mark.parametrize("name", tiered(METHODS, TRAINED))
def test_the_trained_layers_are_quantized_to_their_levels(name: str, smoke: Configure) -> None:
    recipe = ["optim=adam_cosine", "optim.lr=0.01", "epochs=4", "pretrain.epochs=4"]
    task, _, losses = trained(smoke(f"method={name}", f"bits={quantizing_bits(name)}", "init=scratch", *recipe))
    if any(
        p.requires_grad and not is_quantizer_key(n, task.model) for n, p in task.model.named_parameters()
    ):  # not for dq, which trains only points
        assert sum(losses[-9:]) < 0.95 * sum(losses[:9])
    images = next(iter(task.probe.batches))[0]
    counts = verify(task.model, images)
    if name == "float":
        assert not counts
        return
    assert counts
    for layer in counts.values():
        for key, count in layer.items():
            assert 2 <= count.found <= count.allowed, (key, count)


@every_method
def test_the_declared_properties_hold(name: str) -> None:
    method = registry.create("method", {"name": name})
    assert method.traits <= TRAITS
    if "odd" in method.traits:
        layer = torch.nn.Linear(6, 5)
        site = method.weight(name, layer, method.bits.w)
        assert torch.equal(site(-layer.weight), -site(layer.weight))


@pytest.mark.parametrize("name", tiered(METHODS, ["dorefa", "gupta", "qd"]))
def test_the_same_seed_gives_the_same_training(name: str) -> None:
    config, task, _, losses = trained_once(name)
    again, _, losses_again = trained(config)
    assert losses_again == losses
    assert weights_sha256(again.model.state_dict()) == weights_sha256(task.model.state_dict())


def test_another_seed_gives_another_training(smoke: Configure) -> None:
    _, _, losses = trained(smoke("method=dorefa", f"bits={quantizing_bits('dorefa')}", "init=scratch", "seed=1"))
    assert losses != trained_once("dorefa")[3]


@representatives
def test_the_evaluation_is_deterministic_and_draws_no_random_numbers(name: str) -> None:
    _, task, _, _ = trained_once(name)
    before = torch.get_rng_state()
    assert evaluate(task.model, task.validate()) == evaluate(task.model, task.validate())
    assert torch.equal(torch.get_rng_state(), before)


@representatives
def test_a_checkpoint_restores_the_exact_state(name: str) -> None:
    config, task, state, _ = trained_once(name)
    saved = unpack(pack(state.save(task.model)), "memory")
    parts = assemble(config)
    model = parts.install(parts.float_model())
    for key, p in model.named_parameters():
        p.requires_grad_(key in saved["trainable"])
    again = State(optim.build_optimizer(model, config.optim))
    again.load(model, saved)
    assert weights_sha256(model.state_dict()) == weights_sha256(task.model.state_dict())
    images = next(iter(task.probe.batches))[0]
    assert torch.equal(model.eval()(images), task.model.eval()(images))
    for one, two in zip(quantized_layers(model).values(), quantized_layers(task.model).values(), strict=True):
        assert torch.equal(effective_weight(one), effective_weight(two))


@representatives
def test_every_tensor_of_a_quantizer_is_in_the_state_dict(name: str) -> None:
    _, task, _, _ = trained_once(name)
    kept = {id(t) for t in [*task.model.parameters(), *task.model.buffers()]}
    for layer in quantized_layers(task.model).values():
        for module in (m for site in (layer.weight_q, layer.input_q, layer.output_q) for m in site.modules()):
            loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
            assert not loose, (type(module).__name__, loose)
            assert all(id(p) in kept for p in module.parameters())


@representatives
def test_32_bits_give_the_float_computation_bit_for_bit(name: str, smoke: Configure) -> None:
    bits = "" if name == "float" else f"bits=w{FLOAT}a{FLOAT}g{FLOAT}"
    words = ["optim=sgd", "init=scratch", "epochs=2", "pretrain.epochs=2"]
    norm = registry.create("method", {"name": name}).requires.norm  # the normalization that the method requires
    _, _, losses = trained(smoke(f"method={name}", *([bits] if bits else []), *words))
    assert losses == losses_of_float(norm)


def stopped_and_resumed(smoke: Configure, words: list[str], calls: int) -> tuple[Result, Result]:
    """Run a configuration without interruption, and again with a stop; return both results.

    Args:
        calls: the loop calls `stop` after every step and epoch; this call returns a signal.
    """
    whole = run(planned_run(smoke(*words)), RunContext())
    count = 0

    def stop() -> int:
        nonlocal count
        count += 1
        return 15 if count >= calls else 0

    with pytest.raises(Interrupted):
        run(planned_run(smoke(*words, "rerun=true")), RunContext(stop=stop))
    return whole, run(planned_run(smoke(*words)), RunContext())


@pytest.mark.parametrize("name", tiered(METHODS, STOPPED))
def test_a_resumed_run_ends_like_an_uninterrupted_one(name: str, smoke: Configure) -> None:
    words = [f"method={name}", f"bits={quantizing_bits(name)}", "init=scratch", "epochs=4", "pretrain.epochs=4"]
    words += SIX_STEPS
    if not registry.create("method", {"name": name}).needs_training:
        result = run(planned_run(smoke(*words)), RunContext())
        assert result.best is None
        assert result.final is not None
        assert result.protocol_changes == ["not trained: post-training quantization"]
        return
    whole, again = stopped_and_resumed(smoke, words, calls=19)  # in the middle of the third epoch
    assert again.weights_sha256 == whole.weights_sha256
    assert (again.final, again.best) == (whole.final, whole.best)


@pytest.mark.parametrize(
    ("optimizer", "calls"),
    [("sgd", 1), long_tier("unified", 5), long_tier("sgd", 6), ("unified", 7), long_tier("sgd", 8)],
)
def test_a_resumed_run_keeps_every_option_of_the_optimizer(smoke: Configure, optimizer: str, calls: int) -> None:
    """Stop after the first, the last but one and the last batch of an epoch, after the epoch, and in the next one."""
    options = ["optim.ema=0.9", "optim.clip_norm=1", "optim.label_smoothing=0.1", "optim.patience=5"]
    words = ["method=dorefa", "bits=w2a2g4", "init=scratch", "epochs=3", f"optim={optimizer}", *options, *SIX_STEPS]
    whole, again = stopped_and_resumed(smoke, words, calls)
    assert again.weights_sha256 == whole.weights_sha256
    assert (again.final, again.best) == (whole.final, whole.best)


@representatives
def test_widths_that_a_method_does_not_support_raise(name: str, smoke: Configure) -> None:
    method = registry.create("method", {"name": name})
    for key in "wag":
        unsupported: list[Any] = [k for k in range(1, FLOAT) if k not in method.supported_bits.get(key, ())]
        if unsupported:
            with pytest.raises(Unsupported, match=rf"bits\.{key}={unsupported[0]}"):
                assemble(smoke(f"method={name}", f"bits.{key}={unsupported[0]}"))
