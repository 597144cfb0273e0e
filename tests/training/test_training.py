"""The training loop, learning-rate schedules, options of a step, and checkpoints."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import Configure, tiered
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.description import description
from qbench.config.identity import run_identity
from qbench.config.schema import Optim
from qbench.distributed.group import Group
from qbench.errors import CheckpointError, ConfigError, Diverged, ProcessesDiffer
from qbench.experiment.device import COMPILERS
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.methods import dorefa
from qbench.methods import float as float_method
from qbench.models import mlp
from qbench.quant import elementwise
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.probe import Probe
from qbench.runs.tensorboard import levels_figure
from qbench.training import optimizer as optim
from qbench.training.checkpoint import load_float_weights, load_torch_file, pack, unpack
from qbench.training.digests import weights_sha256
from qbench.training.evaluation import evaluate
from qbench.training.loop import train
from qbench.training.random_state import random_state, set_random_state
from qbench.training.state import BestWeights, State, WeightAverage
from qbench.training.task import Task

STEPS = 5
T = TypeVar("T")
generator = torch.Generator().manual_seed(0)
X = torch.randn(STEPS * 20, 1, 4, 4, generator=generator)
Y = (X.flatten(1)[:, :3].argmax(1)).long()


def make_task(method: Method | None = None, epochs: int = 3, model: nn.Module | None = None, **options: Any) -> Task:
    torch.manual_seed(0)
    method = method or float_method.build()
    model = install(method, model or mlp.build((1, 4, 4), 3, hidden=1, width=16))
    batches = [(x, y) for x, y in zip(X.split(20), Y.split(20), strict=True)]
    settings = Optim(**{"name": "sgd", "lr": 0.1, "batch_size": 20} | options)
    return Task(
        model=model, method=method, optim=settings, epochs=epochs, steps=STEPS,
        train=lambda epoch, start: batches[start:],
        validate=lambda: batches[:2], probe=Probe(batches[:1], F.cross_entropy),
    )  # fmt: skip


def make_state(task: Task) -> State:
    average = WeightAverage(task.model, task.optim.ema) if task.optim.ema is not None else None
    return State(optim.build_optimizer(task.model, task.optim), average)


def test_a_phase_restarts_the_schedule_and_clears_momentum() -> None:
    steps: list[tuple[float, bool]] = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        steps.append((optimizer.param_groups[0]["lr"], bool(optimizer.state)))
        optimizer.step()

    method = replace(float_method.build(), phases=lambda epochs: (1, 3), step=step)
    task = make_task(method, epochs=4, schedule="linear")
    train(task, make_state(task))
    rates = [rate for rate, _ in steps]
    ten = [0.1 * (1 - i / (2 * STEPS)) for i in range(2 * STEPS)]
    five = [0.1 * (1 - i / STEPS) for i in range(STEPS)]
    assert rates == pytest.approx(five + ten + five)
    assert [i for i, (_, momentum) in enumerate(steps) if not momentum] == [0, STEPS, 3 * STEPS]


def test_callables_of_the_method_are_called_at_the_right_time() -> None:
    calls: list[tuple[str, int]] = []

    def loss(model: nn.Module, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(("loss", len(batch[1])))
        return F.cross_entropy(logits, batch[1])

    teacher = nn.Dropout()
    method = replace(
        float_method.build(),
        loss=loss,
        on_epoch=lambda m, epoch, epochs, probe: calls.append(("epoch", epoch)),
        teachers=(teacher,),
    )
    task = make_task(method, epochs=2)
    train(task, make_state(task))
    assert calls == [("epoch", 0), *[("loss", 20)] * STEPS, ("epoch", 1), *[("loss", 20)] * STEPS]
    assert not teacher.training


def test_a_restored_state_has_the_best_weights() -> None:
    task = make_task(float_method.build(), epochs=2)
    state = make_state(task)
    state.best = BestWeights((50.0, -1.0), 3, {"x": torch.ones(2)})
    other = make_state(make_task(float_method.build(), epochs=2))
    other.load(task.model, state.save(task.model))
    assert other.best is not None
    assert (other.best.rank, other.best.epoch) == ((50.0, -1.0), 3)
    assert torch.equal(other.best.model["x"], torch.ones(2))
    state.best = None
    other.load(task.model, state.save(task.model))
    assert other.best is None


def test_gradient_clipping_label_smoothing_and_weight_averaging() -> None:
    norms = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())
        optimizer.step()

    task = make_task(replace(float_method.build(), step=step), clip_norm=0.01)
    train(task, make_state(task))
    assert max(norms) <= 0.01 * (1 + 1e-5)
    smooth = make_task(label_smoothing=0.3)
    logits = smooth.model(X[:20])
    assert smooth.loss(logits, (X[:20], Y[:20])).item() == pytest.approx(
        F.cross_entropy(logits, Y[:20], label_smoothing=0.3).item()
    )
    averaged = make_task(ema=0.5)
    state = make_state(averaged)
    assert state.average is not None
    name, p = next(iter(averaged.model.named_parameters()))
    expected = p.detach().clone()
    for batch in averaged.train(0, 0):
        averaged.loss(averaged.model(batch[0]), batch).backward()
        state.optimizer.step()
        state.average.update(averaged.model)
        expected = 0.5 * expected + 0.5 * p.detach()
    torch.testing.assert_close(state.average.parameters()[name], expected)
    with state.average.applied_to(averaged.model):
        torch.testing.assert_close(p.detach(), expected)
    assert not torch.allclose(p.detach(), expected)


def test_best_is_the_first_epoch_of_the_best_accuracy_and_patience_stops() -> None:
    task = make_task(epochs=30, lr=1e-12, patience=3)
    state = make_state(task)
    train(task, state)
    assert state.stopped
    assert state.epoch < 30
    assert state.best is not None
    assert state.epoch == state.best.epoch + 1 + 3


def test_seconds_per_epoch_is_the_mean_of_the_trained_epochs(smoke: Configure) -> None:
    words = ["method=dorefa", "optim=sgd", "optim.lr=1e-12", "epochs=40", "optim.patience=2"]
    result = run(planned_run(smoke(*words)))
    assert result.final is not None
    assert result.final.epoch is not None
    assert result.speed is not None
    epochs = result.final.epoch + 1
    assert epochs < 40
    records = [json.loads(line) for line in (Path(result.run) / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in records if record["kind"] == "epoch")
    assert result.speed.seconds_per_epoch == pytest.approx(seconds / epochs)
    assert f"optim.patience=2 stopped training after {epochs} of 40 epochs" in result.notes
    assert f"optim.patience stopped training after epoch {epochs}" in description(Path(result.run))


def test_an_incremental_method_has_no_best_before_it_is_complete() -> None:
    class Half(dorefa.DoReFaWeight):
        complete = False

    method = replace(dorefa.build(w=2), weight=lambda name, layer, bits: Half(bits))
    task = make_task(method, model=mlp.build((1, 4, 4), 3, hidden=2, width=16))
    state = make_state(task)
    train(task, state)
    assert state.best is None


def test_a_nan_loss_stops_training_in_its_step() -> None:
    method = replace(float_method.build(), loss=lambda model, logits, batch: logits.sum() * float("nan"))
    task = make_task(method)
    with pytest.raises(Diverged, match="epoch 0, step 0"):
        train(task, make_state(task))


def test_evaluation_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, 0, 0, 0], [0, 3, 2, 1, 0.5, 0.4, 0], [9, 8, 7, 6, 5, 4, 0]])
    labels = torch.tensor([0, 4, 6])
    accuracy = evaluate(nn.Identity(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert accuracy is not None
    assert accuracy.top1 == pytest.approx(100 / 3)
    assert accuracy.top5 == pytest.approx(200 / 3)
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert evaluate(nn.Identity(), []) is None


def test_of_equal_logits_the_first_class_is_predicted() -> None:
    """As in `logits.argmax(1)`, which users of a loaded network type. In half precision, many logits are equal."""
    logits = torch.randint(0, 3, (500, 12)).to(torch.bfloat16)
    predictions: list[Tensor] = []
    accuracy = evaluate(nn.Identity(), [(logits, torch.full((500,), 3))], predictions=predictions)
    assert torch.equal(predictions[0][:, 1], logits.argmax(1))
    assert accuracy is not None
    assert accuracy.top1 == 100 * (logits.argmax(1) == 3).double().mean().item()
    equal = evaluate(nn.Identity(), [(torch.zeros(1, 12), torch.tensor([0]))])
    assert equal is not None
    assert equal.top1 == equal.top5 == 100


def test_the_digest_of_a_checkpoint_is_verified_before_parsing() -> None:
    data = pack({"a": torch.arange(5), "b": [1, 2.5, "x"]})
    assert unpack(data, "it")["b"] == [1, 2.5, "x"]
    assert load_torch_file(data, "it")["b"] == [1, 2.5, "x"], "other programs can read it"
    for place in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        with pytest.raises(CheckpointError, match="damaged"):
            unpack(bytes(flipped), "it")
    for bad in (b"", data[:-1], data[:100], data + b"x"):
        with pytest.raises(CheckpointError):
            unpack(bad, "it")


def test_code_in_a_checkpoint_never_runs(tmp_path: Any) -> None:
    import io
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("ran").write_text, ("x",))

    buffer = io.BytesIO()
    torch.save({"model": Hostile()}, buffer)
    for data in (buffer.getvalue(), pickle.dumps(Hostile())):
        with pytest.raises(CheckpointError):
            load_torch_file(data, "it")
    assert not (tmp_path / "ran").exists()


def test_random_states_are_restored() -> None:
    import random

    import numpy as np

    torch.randn(3)
    saved = unpack(pack(random_state()), "it")
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(saved)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], again[0])
    assert (first[1] == again[1]).all()
    assert first[2] == again[2]


def test_errors_of_loading_weights_name_the_tensors() -> None:
    model, narrow = (mlp.build((1, 4, 4), 3, hidden=1, width=w) for w in (16, 8))
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"fc1.weight \(16, 16\) for \(8, 16\)"):
        load_float_weights(narrow, state, "it")
    with pytest.raises(CheckpointError, match=r"missing: fc1.weight"):
        load_float_weights(model, {k: v for k, v in state.items() if k != "fc1.weight"}, "it")
    with pytest.raises(CheckpointError, match="unknown: extra"):
        load_float_weights(model, state | {"extra": torch.ones(1)}, "it")
    skipped, new = load_float_weights(model, state | {"fc1.weight_q.scale": torch.ones(1)}, "it")
    assert (skipped, new) == (["fc1.weight_q.scale"], [])


def test_the_digest_of_weights_covers_name_type_shape_and_bytes() -> None:
    base = {"a": torch.arange(6.0)}
    same = {"a": torch.arange(12.0)[::2] / 2}
    assert weights_sha256(base) == weights_sha256(same)
    for other in (
        {"b": base["a"]},
        {"a": base["a"].double()},
        {"a": base["a"].reshape(2, 3)},
        {"a": base["a"] + 1},
    ):
        assert weights_sha256(other) != weights_sha256(base)


def test_the_probe_changes_nothing() -> None:
    model = mlp.build((1, 4, 4), 3, hidden=1, width=16)
    model.add_module("drop", nn.Dropout())
    probe = Probe([(X[:20], Y[:20]), (X[20:30], Y[20:30])], F.cross_entropy)
    before, random_before = weights_sha256(model.state_dict()), torch.get_rng_state()
    expected = F.cross_entropy(model.eval()(X[:30]), Y[:30])
    model.train()
    assert probe.loss(model) == pytest.approx(expected.item(), rel=1e-5)
    inputs, outputs = probe.responses(model, "fc1")
    assert inputs.shape == (30, 16)
    torch.testing.assert_close(outputs, F.linear(inputs, model.get_submodule("fc1").weight))
    grads = probe.gradients(model)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert weights_sha256(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random_before)


def test_the_responses_of_a_layer_that_is_called_with_two_sizes_are_vectors() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x).mean((1, 2, 3)) + self.conv(F.avg_pool2d(x, 2)).mean((1, 2, 3))
            return y

    images = torch.randn(6, 1, 8, 8)
    inputs, outputs = Probe([(images, torch.zeros(6))], F.cross_entropy).responses(Pyramid(), "conv")
    assert torch.equal(inputs, torch.cat([images.flatten(), F.avg_pool2d(images, 2).flatten()]))
    assert outputs.shape == (2 * inputs.numel(),)


def test_precision_and_compilation_are_part_of_the_identity_and_memory_saving_is_not(smoke: Configure) -> None:
    usual = smoke("method=dorefa", "bits=w2a2")
    assert run_identity(usual).keys["runtime"] == {"threads": 1, "deterministic": True}
    for word, same in (("activation_memory=codes", True), ("precision=bf16", False), ("compile=true", False)):
        other = smoke("method=dorefa", "bits=w2a2", f"runtime.{word}")
        assert (run_identity(other).digest == run_identity(usual).digest) is same
        assert (run_identity(other).protocol == run_identity(usual).protocol) is (word != "precision=bf16"), (
            "bf16 is compared with bf16"
        )


@pytest.mark.parametrize("mode", tiered(["keep", "codes"], ["codes"]))
def test_activations_in_memory_give_identical_weights(smoke: Configure, tmp_path: Path, mode: str) -> None:
    first = run(planned_run(smoke("method=dorefa", "bits=w2a2", f"out={tmp_path / 'a'}")))
    second = run(
        planned_run(smoke("method=dorefa", "bits=w2a2", f"out={tmp_path / 'b'}", f"runtime.activation_memory={mode}"))
    )
    assert first.weights_sha256 == second.weights_sha256
    assert first.final == second.final


COMPILED = [
    "method=lsq bits=w2a2",
    "method=dorefa bits=w2a2g6 runtime.activation_memory=keep",
    "method=dorefa bits=w2a2 runtime.activation_memory=codes runtime.precision=bf16",
    "method=pact bits=w2a2 runtime.threads=2",
    "method=hwgq",
    "method=gupta",
    "method=apot bits=w4a4",
    "method=uniform bits=w4a4 batch_shards=2",
]


@pytest.mark.parametrize("words", tiered(COMPILED, COMPILED[:1]))
def test_the_extra_fast_gives_identical_weights(
    smoke: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    pytest.importorskip("llvmlite", reason="needs the extra fast")
    monkeypatch.setattr(elementwise, "COMPILE_AFTER", 2000)  # each function runs in torch first, and then compiled
    monkeypatch.setattr(elementwise, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(elementwise, "_entries", {})
    monkeypatch.setattr(elementwise, "_variants", Counter())
    with elementwise.torch_operations():
        first = run(planned_run(smoke(*words.split(), f"out={tmp_path / 'a'}")))
    assert not elementwise._entries
    second = run(planned_run(smoke(*words.split(), f"out={tmp_path / 'b'}")))
    assert sum(entry.program is not None for entry in elementwise._entries.values()) >= 2
    assert first.weights_sha256 == second.weights_sha256
    assert first.state_sha256 == second.state_sha256
    assert first.final == second.final


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("method=dorefa", "bits=w2"), "no activations are quantized"),
        (("method=lsq", "bits=w2a2"), "needs the float activations"),
        (("method=dorefa", "bits=w2a16"), "needs the float activations"),
    ],
)
def test_codes_without_effect_are_an_error(smoke: Configure, words: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run(planned_run(smoke(*words, "runtime.activation_memory=codes")))


def test_bfloat16_trains_with_exact_levels(smoke: Configure) -> None:
    result = run(planned_run(smoke("method=dorefa", "bits=w2a2", "runtime.precision=bf16")))
    assert result.status == "done"
    assert all(found[slot].allowed == 4 for found in result.verified.values() for slot in ("w", "a") if slot in found)
    usual = run(planned_run(smoke("method=dorefa", "bits=w2a2")))
    assert usual.weights_sha256 != result.weights_sha256


@pytest.mark.parametrize(("instructions", "slow"), [("AVX2", True), ("AVX512", False), ("SVE256", False)])
def test_a_processor_that_is_slow_in_bfloat16(
    smoke: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], instructions: str, slow: bool
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: instructions)
    words = ("method=float", "runtime.precision=bf16")
    run(planned_run(smoke(*words)))
    assert ("runtime.precision=bf16 is slower than fp32 here" in capfd.readouterr().err) is slow


def test_compile_needs_a_compiler(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"runtime.compile=true needs a C\+\+ compiler"):
        run(planned_run(smoke("method=dorefa", "bits=w2a2", "runtime.compile=true")))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_a_compiled_run_learns_as_well_as_an_eager_one(smoke: Configure) -> None:
    usual = run(planned_run(smoke("method=dorefa", "bits=w2a2", "init=scratch")))
    compiled = run(planned_run(smoke("method=dorefa", "bits=w2a2", "init=scratch", "runtime.compile=true")))
    assert compiled.status == "done"
    assert abs(compiled.final.test.loss - usual.final.test.loss) < 0.1


class Pair(Group):
    """Process 0 of two, of which the second has other values for some names."""

    size = 2

    def __init__(self, **others: str) -> None:
        self.others = others

    def gather(self, value: T) -> list[T]:
        assert isinstance(value, dict)
        return [value, {**value, **self.others}]  # type: ignore[list-item]


def test_processes_with_another_state_are_named() -> None:
    task = make_task()
    state = make_state(task)
    state.check_equal(task.model, Pair())
    with pytest.raises(ProcessesDiffer, match=r"processes 0 and 1 differ after step 0: model\.fc\.bias\nthe method"):
        state.check_equal(task.model, Pair(**{"model.fc.bias": "other"}))
    with pytest.raises(ProcessesDiffer, match=r": model\.fc\.bias and 1 more"):
        state.check_equal(task.model, Pair(**{"model.fc.bias": "other", "only.there": "new"}))


def test_the_picture_of_levels_says_what_its_lines_are() -> None:
    latent = torch.tensor([-1.0, -0.2, 0.3, 0.9])
    figure = levels_figure({"conv1": (latent, latent.sign())})
    assert figure is not None
    assert figure.get_supxlabel().startswith("lines: share of weights at each level")
    assert figure.axes[0].get_title() == "conv1: 2 levels"
    assert levels_figure({}) is None
