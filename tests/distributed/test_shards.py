"""A batch divided into shards: equal to passes over copies of the network, in the order of a binary tree."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Configure
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.schema import Optim
from qbench.data import digits
from qbench.data.loader import Loader
from qbench.distributed.shards import ShardedStep, Shards, sum_in_pairs
from qbench.errors import ConfigError
from qbench.experiment.setup import assemble
from qbench.methods import float as float_method
from qbench.methods import uniform
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.probe import Batch, Probe
from qbench.training import optimizer
from qbench.training.loop import train
from qbench.training.state import State
from qbench.training.task import Task

CPU = torch.device("cpu")
SHARDS = 4


def images(count: int = 32, seed: int = 0) -> list[Batch]:
    """Return the shards of one batch of random images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(5, (count,), generator=generator)
    return list(zip(x.chunk(SHARDS), y.chunk(SHARDS), strict=True))


def network(*more: nn.Module) -> nn.Module:
    """Return a network with convolutions in channels_last, batch normalization and, after it, `more`."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more, nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def task_of(model: nn.Module, batches: list[list[Batch]], shards: Shards, method: Method | None = None) -> Task:
    return Task(
        model=model, method=method or float_method.build(), optim=Optim(name="sgd", lr=0.1), epochs=1,
        steps=len(batches), train=lambda epoch, start: (shard for batch in batches[start:] for shard in batch),
        validate=lambda: (), probe=Probe([], F.cross_entropy), shards=shards,
    )  # fmt: skip


def trained(model: nn.Module, batches: list[list[Batch]], shards: Shards, method: Method | None = None) -> State:
    task = task_of(model, batches, shards, method)
    state = State(optimizer.build_optimizer(model, task.optim))
    train(task, state)
    return state


def passes(model: nn.Module, shards: list[Batch]) -> Iterator[Any]:
    for x, y in shards:

        def run(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            logits = model(x)
            loss = F.cross_entropy(logits, y) / len(shards)
            loss.backward()
            return loss.detach(), (logits.argmax(1) == y).sum()

        yield run


def test_parts_are_added_as_the_leaves_of_a_binary_tree() -> None:
    assert sum_in_pairs("abcdefgh", lambda a, b: f"({a}+{b})") == "(((a+b)+(c+d))+((e+f)+(g+h)))"
    assert sum_in_pairs("a", lambda a, b: "") == "a"


def test_a_step_equals_passes_over_copies() -> None:
    model = network()
    copies = [copy.deepcopy(model) for _ in range(SHARDS)]
    losses = []
    for twin, (x, y) in zip(copies, images(), strict=True):
        losses.append(F.cross_entropy(twin(x), y) / SHARDS)
        losses[-1].backward()
    loss, hits = ShardedStep(model, Shards(SHARDS)).compute(passes(model, images()))
    a, b, c, d = (loss.detach() for loss in losses)
    assert torch.equal(loss, (a + b) + (c + d))
    assert int(hits) == sum(int((twin(x).argmax(1) == y).sum()) for twin, (x, y) in zip(copies, images(), strict=True))
    for parameter, *grads in zip(model.parameters(), *(twin.parameters() for twin in copies), strict=True):
        a, b, c, d = (twin.grad for twin in grads)
        assert torch.equal(parameter.grad, (a + b) + (c + d))  # type: ignore[arg-type]


def test_running_statistics_are_the_mean_over_the_shards() -> None:
    model = network()
    mean = model[1].running_mean.clone()  # type: ignore[union-attr, operator, index]
    ShardedStep(model, Shards(SHARDS)).compute(passes(model, images()))
    outputs = [network()[0](x) for x, _ in images()]  # type: ignore[index]
    expected = torch.stack([0.9 * mean + 0.1 * y.mean((0, 2, 3)) for y in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, expected, atol=1e-7)  # type: ignore[index, arg-type]
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index, arg-type]


def test_ranges_of_a_quantizer_are_averaged_and_flags_are_set() -> None:
    def first_range(shards: list[Batch]) -> Tensor:
        method = uniform.build(w=8, a=8)
        layers = [nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
        model = install(method, nn.Sequential(*layers), example=torch.zeros(1, 3, 6, 6))
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        quantizer = next(m for m in model.modules() if isinstance(m, uniform.UniformActivation))
        trained(model, [shards], Shards(len(shards)), method)
        assert bool(quantizer.seen)
        return quantizer.high

    single = [first_range([shard]) for shard in images()]
    assert len({high.item() for high in single}) == SHARDS
    a, b, c, d = single
    assert torch.equal(first_range(images()), ((a + b) + (c + d)) / SHARDS)


class Noise(nn.Module):
    """Adds noise from torch's global generator, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.rand_like(x))
        return x + self.drawn[-1]


def draws(seed: int = 0, steps: int = 2) -> list[Tensor]:
    model = network(noise := Noise())
    trained(model, [images()] * steps, Shards(SHARDS, seed))
    return noise.drawn


def test_the_draws_of_a_pass_depend_on_seed_step_and_shard_alone() -> None:
    first = draws()
    assert len(first) == 2 * SHARDS
    for i, a in enumerate(first):
        assert not any(torch.equal(a, b) for b in first[:i])
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(draws(), first, strict=True))
    assert not torch.equal(draws(seed=1)[0], first[0])


def test_the_draws_of_step_and_on_epoch_do_not_depend_on_the_shards() -> None:
    def shared_draws(shards: Shards) -> list[float]:
        found = []

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            found.append(torch.rand(()).item())

        method = Method(
            name="drawing", bits=float_method.build().bits, supported_bits={}, step=step,
            on_epoch=lambda *arguments: found.append(torch.rand(()).item()),
        )  # fmt: skip
        torch.manual_seed(len(found))
        parts = [images()] * 2 if shards.count == SHARDS else [images()[:2]] * 2
        trained(network(Noise()), parts, shards, method)
        return found

    assert shared_draws(Shards(SHARDS)) == shared_draws(Shards(2))
    assert len(set(shared_draws(Shards(2)))) == 3


def test_gradients_keep_the_memory_layout_of_their_parameters() -> None:
    """Fused optimizers read the values of both in the order of memory."""
    model = network()
    ShardedStep(model, Shards(SHARDS)).compute(passes(model, images()))
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
    assert model[0].weight.stride()[1] == 1, "channels_last"  # type: ignore[index, union-attr, operator]


def test_gradients_are_added_to_those_of_an_earlier_batch() -> None:
    first, second, both = network(), network(), network()
    ShardedStep(first, Shards(SHARDS)).compute(passes(first, images(seed=1)))
    second.load_state_dict(first.state_dict())
    for shards in (images(seed=1), images(seed=2)):
        ShardedStep(both, Shards(SHARDS)).compute(passes(both, shards))
    ShardedStep(second, Shards(SHARDS)).compute(passes(second, images(seed=2)))
    for a, b, c in zip(first.parameters(), second.parameters(), both.parameters(), strict=True):
        assert torch.equal(c.grad, a.grad + b.grad)  # type: ignore[arg-type, operator]


class Sometimes(nn.Module):
    """Uses its parameter, and writes to its buffer, in every second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(())), 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            return x
        self.mean += 1  # type: ignore[misc]
        return x * self.scale


def test_what_only_some_shards_use() -> None:
    model = network(Sometimes())
    ShardedStep(model, Shards(SHARDS)).compute(passes(model, images()))
    assert model[3].scale.grad is not None  # type: ignore[index, union-attr]
    assert model[3].mean.item() == 0.5, "the other shards keep the value before the step"  # type: ignore[index, operator, union-attr]


class Settled(nn.Module):
    """Sets its parameter in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.ready = nn.Parameter(torch.ones(())), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.step.copy_(x.abs().mean())
            self.ready = True
        return x * self.step


def test_a_parameter_that_a_pass_sets_is_refused() -> None:
    model = network(Settled())
    with pytest.raises(ConfigError, match=r"the forward pass changes the parameter 3\.step"):
        ShardedStep(model, Shards(SHARDS)).compute(passes(model, images()))


def test_one_shard_draws_as_a_batch_that_is_not_divided() -> None:
    """The draws of a batch that is not divided follow those of the batch before; nothing seeds them."""
    torch.manual_seed(0)
    expected = [torch.rand(32, 4, 4, 4) for _ in range(2)]
    whole = [(torch.cat([x for x, _ in images()]), torch.cat([y for _, y in images()]))]
    model = network(noise := Noise())
    torch.manual_seed(0)
    trained(model, [whole] * 2, Shards())
    assert [drawn.sum().item() for drawn in noise.drawn] == pytest.approx([e.sum().item() for e in expected])


def test_the_shards_of_a_loader_are_the_parts_of_its_batches() -> None:
    data = digits.build()
    whole = list(Loader(data, 64, 3, CPU).train(2, 5))
    for ranges in ([range(4)], [range(2), range(2, 4)], [range(i, i + 1) for i in range(4)]):
        parts = [list(Loader(data, 64, 3, CPU, 0, 4, own).train(2, 5)) for own in ranges]
        for i, (x, y) in enumerate(whole):
            batch = [shard for part in parts for shard in part[i * len(part) // len(whole) :][: 4 // len(parts)]]
            assert torch.equal(torch.cat([x for x, _ in batch]), x)
            assert torch.equal(torch.cat([y for _, y in batch]), y)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_shards=3"], "batch_shards=3: must be a power of two"),
        (["batch_shards=0"], "batch_shards=0: must be a power of two"),
        (["batch_shards=8", "optim.batch_size=36"], "does not divide optim.batch_size=36\ntype optim.batch_size=40"),
        (["batch_shards=8", "pretrain.optim.batch_size=36"], "does not divide pretrain.optim.batch_size=36"),
        (["batch_shards=2", "runtime.compile=true"], "batch_shards=2: must be 1 with runtime.compile=true"),
    ],
)
def test_refusals(configure: Configure, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(*words)


def test_a_reduced_batch_must_be_divisible_too(configure: Configure) -> None:
    config = configure("method=float", "batch_shards=8", "pretrain.optim.batch_size=4096")
    with pytest.raises(ConfigError, match=r"does not divide 1211, the number of training images") as error:
        assemble(config)
    assert "\ntype optim.batch_size=1208" in str(error.value)
