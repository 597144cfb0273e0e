"""Combined methods: activations of another paper, a teacher for any method, and refused
combinations.
"""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Configure, tiered
from torch import nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.config.identity import run_identity
from qbench.deviations.registry import deviate
from qbench.errors import CheckpointError, ConfigError, Diverged
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.experiment.unused_keys import unused_keys
from qbench.methods import bwn, dorefa, gupta, hwgq, inq, lsq, pact, ptq, qcnn, ttq, uniform, xnor
from qbench.methods import float as float_method
from qbench.models import mlp
from qbench.quant.combine import combine, distilled
from qbench.quant.install import install
from qbench.quant.layers import NotFinite, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.probe import Probe
from qbench.quant.quantizer import IdentityQuantizer
from qbench.runs.directory import directory_name
from qbench.runs.result import Result

SHAPE = (1, 4, 4)


def test_weights_and_activations_come_from_their_own_method() -> None:
    method = combine(ttq.build(), hwgq.build(w=32, a=3))
    assert str(method.bits) == "w2a3g32"
    assert method.name == "ttq+hwgq"
    assert method.requires.norm == "no_affine"
    model = install(method, mlp.build(SHAPE, 3, hidden=3, width=8, norm="no_affine"))
    for layer in quantized_layers(model).values():
        assert isinstance(layer.weight_q, ttq.TTQWeight)
        assert isinstance(layer.input_q, hwgq.HWGQActivation)


def test_both_methods_finish_the_step_and_the_optimizer_steps_once() -> None:
    method = combine(ttq.build(), lsq.build(w=32, a=2))
    model = install(method, mlp.build(SHAPE, 3, hidden=2, width=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (layer,) = quantized_layers(model).values()
    with torch.no_grad():
        layer.weight_q.positive.fill_(-1.0)
        layer.input_q.step.fill_(-1.0)
        layer.weight.grad = torch.ones_like(layer.weight)
    before = layer.weight.detach().clone()
    assert method.step is not None
    method.step(model, optimizer)
    torch.testing.assert_close(layer.weight.detach(), before - 0.1)
    assert layer.weight_q.positive > 0, "the first method clamps its scale"
    assert layer.input_q.step > 0, "the second method clamps its step"


@pytest.mark.parametrize("weights", [qcnn.build(w=2), ptq.build(w=3, a=32)], ids=["qcnn", "ptq"])
@pytest.mark.parametrize("activations", [uniform.build(w=32, a=8), ptq.build(w=32, a=8), lsq.build(w=32, a=8)])
def test_weights_are_prepared_before_activations_have_ranges(weights: Method, activations: Method) -> None:
    """The range of activations is a placeholder at first. Statistics and codes must not depend on it."""
    if weights.name == activations.name:
        return
    torch.manual_seed(0)
    net = mlp.build(SHAPE, 3, hidden=3, width=8)
    images = torch.randn(64, *SHAPE)
    net.train()(images)
    probe = Probe([(images, torch.randint(3, (64,)))], F.cross_entropy)
    alone, combined = (install(method, deepcopy(net)) for method in (weights, combine(weights, activations)))
    for method, model in ((weights, alone), (combine(weights, activations), combined)):
        assert method.prepare
        method.prepare(model, probe)
    assert not any(isinstance(layer.input_q, IdentityQuantizer) for layer in quantized_layers(combined).values())
    values, expected = combined.state_dict(), alone.state_dict()
    if activations.name == "ptq":  # then estimates the statistics of batch normalization again
        expected = {key: value for key, value in expected.items() if "weight_q" in key}
    assert all(torch.equal(values[key], value) for key, value in expected.items())


def test_gradients_change_before_the_step_whichever_method_changes_them() -> None:
    sizes = []
    for deviation in ("none", "times_1e9"):
        method = combine(ttq.build(), deviate("xnor", deviation, xnor.build(w=32)))
        model = install(method, mlp.build(SHAPE, 3, hidden=2, width=8))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        (layer,) = quantized_layers(model).values()
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.ones_like(layer.weight)
        assert method.step is not None
        method.step(model, optimizer)
        sizes.append((before - layer.weight).abs().max().item())
    assert sizes == [pytest.approx(0, abs=1e-6), pytest.approx(1)]


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        (["method=ptq", "activation=pact", "bits=w4a4"], True),
        (["method=qd", "method.trained=false", "distill=none", "activation=uniform", "bits=w4a4"], True),
        (["method=qd", "method.trained=false", "distill=none", "activation=ptq", "bits=w4a4"], False),
        (["method=lsq", "activation=ptq", "bits=w4a4"], False),
    ],
)
def test_weights_that_are_trained_only_because_of_the_activations_are_named(
    configure: Configure, words: list[str], trained: bool
) -> None:
    setup = assemble(configure("experiment=smoke", "init=scratch", *words))
    warnings = unused_keys(setup, setup.install(setup.float_model()))
    assert any("are trained, because activation=" in text for text in warnings) == trained


def test_an_option_about_gradients_needs_the_gradients_of_its_method(configure: Configure) -> None:
    words = ["method=gupta", "activation=dorefa", "bits=w16a4g16", "activation.deviation=no_noise"]
    with pytest.raises(Unsupported, match="no_noise"):
        assemble(configure(*words))


def test_gradients_belong_to_the_method_that_supports_them() -> None:
    assert combine(dorefa.build(w=2, g=4), pact.build(w=32, a=2)).bits.g == 4
    assert combine(ttq.build(), dorefa.build(w=32, a=2, g=4)).bits.g == 4
    method = combine(ttq.build(), dorefa.build(w=32, a=2, g=4))
    (layer,) = quantized_layers(install(method, mlp.build(SHAPE, 3, hidden=2, width=8))).values()
    assert isinstance(layer.output_q, dorefa.DoReFaGradient)


def test_a_method_for_gradients_of_one_bit_alone_gives_its_gradients() -> None:
    weight = replace(ttq.build(), bits=Bits(2, FLOAT, 1), supported_bits={"w": (2,), "g": (1, FLOAT)})
    combined = combine(weight, pact.build(w=32, a=2))
    assert (combined.bits.g, combined.supported_bits["g"]) == (1, (1, FLOAT))


def test_phases_and_training_from_scratch_come_from_either_method() -> None:
    assert list(combine(inq.build(), dorefa.build(w=32, a=2)).phases(8)) == list(inq.build().phases(8))
    assert combine(gupta.build(a=32, g=32), lsq.build(w=32, a=4)).requires.start == "scratch"


def test_rounded_gradients_of_the_second_method_are_declared() -> None:
    """float16 would multiply the loss, and so the gradients, by a scale that a fixed step does not follow."""
    traits = combine(ttq.build(), gupta.build(w=32, a=16, g=16)).traits
    assert "fixed_point_gradients" in traits
    assert "fixed_point_gradients" not in combine(ttq.build(), lsq.build(w=32, a=4)).traits


def test_methods_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(Unsupported, match="already quantizes activations"):
        combine(dorefa.build(), dorefa.build(w=32, a=2))
    with pytest.raises(Unsupported, match="norm"):
        combine(gupta.build(), hwgq.build(w=32))
    both = combine(dorefa.build(w=2, g=4), xnor.build(w=32, scale="K"))
    with pytest.raises(Unsupported, match="both change the output of fc2"):
        install(both, mlp.build(SHAPE, 3, hidden=2, width=8))


def test_float_weights_under_another_papers_activations() -> None:
    method = combine(float_method.build(), dorefa.build(w=32, a=2))
    (layer,) = quantized_layers(install(method, mlp.build(SHAPE, 3, hidden=2, width=8))).values()
    assert torch.equal(layer.weight_q(layer.weight), layer.weight)
    assert layer.input_q(torch.rand(50)).unique().numel() <= 4


def test_the_distillation_loss_follows_its_formula() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 3), nn.Linear(5, 3)
    x, y = torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    method = distilled(bwn.build(), teacher, temperature=3.0, weight=0.6)
    assert method.teachers == (teacher,)
    assert method.loss is not None
    loss = method.loss(student, student(x), (x, y))

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    s, t = student(x).detach().double().numpy(), teacher(x).detach().double().numpy()
    p, q = softmax(t / 3), softmax(s / 3)
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    hard = -np.log(softmax(s)[np.arange(7), y.numpy()]).mean()
    assert loss.item() == pytest.approx(0.6 * 9 * kl + 0.4 * hard, rel=1e-5)
    over_classes = distilled(bwn.build(), teacher, temperature=3.0, weight=0.6, average="classes").loss
    assert over_classes is not None
    averaged = over_classes(student, student(x), (x, y))
    assert averaged.item() == pytest.approx(0.6 * 9 * kl / 3 + 0.4 * hard, rel=1e-5)
    loss.backward()
    assert student.weight.grad is not None
    assert teacher.weight.grad is None


def result_of(configure: Configure, *words: str) -> Result:
    few_steps = ("optim.batch_size=256", "pretrain.optim.batch_size=256")
    return run(planned_run(configure("experiment=smoke", "runtime.tensorboard=false", *few_steps, *words)))


def test_a_teacher_for_every_method(configure: Configure) -> None:
    words = ([], ["distill=kd"], ["distill=kd", "distill.average=classes"])
    without, distilled_run, over_classes = (result_of(configure, "method=dorefa", *w) for w in words)
    assert without.weights_sha256 != distilled_run.weights_sha256
    assert over_classes.weights_sha256 != distilled_run.weights_sha256
    assert without.protocol.hash != distilled_run.protocol.hash, "part of the protocol"
    assert without.baseline == distilled_run.baseline


def test_a_method_that_requires_a_teacher_keeps_the_protocol(configure: Configure) -> None:
    required, explicit, without = (configure("method=qd", *words) for words in ([], ["distill=kd"], ["distill=none"]))
    other = configure("method=dorefa")
    assert len({directory_name(run_identity(config)) for config in (required, explicit, without)}) == 3
    assert required.distill.on
    assert explicit.distill.on
    assert run_identity(explicit).protocol == run_identity(configure("method=dorefa", "distill=kd")).protocol, (
        "if typed, it is part of the protocol"
    )
    assert not without.distill.on
    assert run_identity(required).protocol == run_identity(other).protocol
    assert "distilled from the float baseline, as the method requires" in assemble(required).protocol_changes


def test_a_finished_run_can_be_the_teacher(configure: Configure, tmp_path: Path) -> None:
    teacher = result_of(configure, "method=ttq", "epochs=2", "pretrain.epochs=2")
    distilled_run = result_of(configure, "method=bwn", "distill=kd", f"distill.teacher={teacher.run}")
    again = result_of(configure, "method=bwn", "distill=kd")
    assert distilled_run.weights_sha256 != again.weights_sha256, "the baseline is another teacher"
    assert distilled_run.protocol.keys["distill"]["teacher"] != "baseline"
    with pytest.raises(ConfigError, match="was trained on digits"):
        result_of(configure, "method=bwn", "dataset=synthetic", "distill=kd", f"distill.teacher={teacher.run}")
    with pytest.raises(ConfigError, match="no such directory"):
        configure("method=bwn", "distill=kd", f"distill.teacher={tmp_path / 'nothing'}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=bwn", "distill.weight=0.5"], "distill=kd"),
        (["method=bwn", "activation=dorefa"], "bits.a=2"),
        (["method=bwn", "activation=nosuch", "bits.a=2"], "no such activation"),
        (["method=bwn", "distill=kd", "distill.temperature=0"], "above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_the_fix(configure: Configure, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(*words)


def test_a_wrong_key_of_the_second_method_is_named_as_typed(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"activation\.levels=odd"):
        assemble(configure("method=bwn", "activation=hwgq", "activation.levels=odd"))


@pytest.mark.parametrize("methods", tiered(["qd", "qd,gupta"], ["qd"]))
def test_runs_with_and_without_a_requirement_are_two_rows(configure: Configure, tmp_path: Path, methods: str) -> None:
    from qbench.report.comparison.compare import compare
    from qbench.report.comparison.setting_table import settings_of
    from qbench.runs.reader import read

    without = {"qd": "distill=none", "gupta": "init=float"}
    for method in methods.split(","):
        result_of(configure, f"method={method}")
        result_of(configure, f"method={method}", without[method])
    result_of(configure, "method=ttq", "method.deviation=missing_minus")
    tables = compare(read([str(tmp_path)]))
    rows = {setting.label: setting.top1.n for table in tables for setting in settings_of(table)}
    assert rows.pop("ttq deviation=missing_minus") == 1, "never under the paper's name"
    counts = {name: n for name, n in rows.items() if not name.startswith("float")}
    labels = {"qd": {"qd": 1, "qd distill=kd": 1}, "qd,gupta": {"gupta": 1, "gupta init=scratch": 1}}
    assert counts == labels["qd"] | labels[methods]


@pytest.mark.parametrize("word", ["init=method", "distill.name=method", "+method.init=banana"])
def test_values_that_only_a_method_may_set_are_refused(configure: Configure, word: str) -> None:
    with pytest.raises(ConfigError, match=r"must be (one of|auto, float, scratch)|cannot be set here"):
        configure("method=dorefa", word)


def test_wrong_keys_get_suggestions_from_the_methods_own_keys(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"did you mean method\.threshold"):
        configure("method=ttq", "method.thresold=max")
    with pytest.raises(ConfigError, match=r"did you mean activation\.levels"):
        configure("method=bwn", "activation=hwgq", "activation.level=sign")


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_trained(
    configure: Configure, tmp_path: Path
) -> None:
    teacher = result_of(configure, "method=bwn")
    before = set(tmp_path.rglob("config.yaml"))
    with pytest.raises(ConfigError, match="was trained on digits"):
        result_of(configure, "method=bwn", "dataset=synthetic", "distill=kd", f"distill.teacher={teacher.run}")
    config = Path(teacher.run) / "config.yaml"
    whole = config.read_text()
    for broken in ("", "{", whole.replace("width: 4", "width: 5")):
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=r"config\.yaml (is not valid|was edited)|distill\.teacher="):
            result_of(configure, "method=lsq", "distill=kd", f"distill.teacher={teacher.run}")
    assert set(tmp_path.rglob("config.yaml")) == before


def test_a_post_training_method_takes_no_teacher(configure: Configure) -> None:
    for more, asks in (([], ["not trained: post-training quantization"]), (["activation=lsq"], [])):
        words = ["method=qd", "method.trained=false", *more]
        with pytest.raises(Unsupported, match="distill=none"):
            assemble(configure(*words))
        assert assemble(configure(*words, "distill=none")).protocol_changes == asks


def test_mlq_refuses_layers_of_unlike_width(configure: Configure) -> None:
    with pytest.raises(Unsupported, match="same width"):
        assemble(configure("method=mlq", "bits=w3", "layers.first=2"))


def test_a_method_from_scratch_is_compared_with_its_float_baseline(configure: Configure) -> None:
    result = result_of(configure, "method=gupta")
    assert result.baseline is not None
    assert result.protocol_changes == ["trained from scratch, as the method requires"]
    assert (
        run_identity(configure("method=gupta", "init=scratch")).protocol
        == run_identity(configure("method=dorefa", "init=scratch")).protocol
    )
    assert run_identity(configure("method=gupta")).protocol == run_identity(configure("method=dorefa")).protocol
    assert (
        run_identity(configure("method=gupta", "init=float")).protocol
        == run_identity(configure("method=dorefa")).protocol
    )


def test_every_result_has_the_method_card_and_the_predictions(configure: Configure) -> None:
    result = result_of(configure, "method=ttq", "activation=dorefa", "bits.a=2")
    assert set(result.card) == {"ttq", "dorefa"}
    assert "0.05 is the paper's value" in result.card["ttq"]["choices"]
    assert result.card["dorefa"]["deviations"]
    stored = json.loads((Path(result.run) / "result.json").read_text())
    assert stored["card"] == result.card
    predictions = np.load(Path(result.run) / "predictions.npy")
    assert predictions.dtype == np.int16
    assert result.final is not None
    assert 100 * (predictions[:, 0] == predictions[:, 1]).mean() == pytest.approx(result.top1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_layer(bad: float) -> None:
    model = install(hwgq.build(), mlp.build(SHAPE, 3, hidden=3, width=8, norm="no_affine"))
    x = torch.randn(4, *SHAPE)
    x[0, 0, 0, 0] = bad
    with pytest.raises(NotFinite, match=r"fc1: 1 of 64 values of its input are inf or nan"):
        model(x)
    with torch.no_grad():
        model.get_submodule("fc2").weight[0, 0] = bad
    with pytest.raises(NotFinite, match="fc2: 1 of 64 values of its weights"):
        model(torch.randn(4, *SHAPE))


def test_an_exploding_run_is_diverged(configure: Configure) -> None:
    with pytest.raises(Diverged, match=r"inf or nan|not finite|loss is"):
        result_of(configure, "method=dorefa", "bits=w2a2", "optim=sgd", "optim.lr=1e30", "init=scratch")


def test_xnors_scale_is_installed_where_the_input_is_binary() -> None:
    model = install(xnor.build(scale="K"), mlp.build(SHAPE, 3, hidden=3, width=8))
    layers = quantized_layers(model)
    assert all(isinstance(layer.output_q, xnor.InputScale) for layer in layers.values())
    x = torch.randn(5, 8)
    layer = layers["fc2"]
    expected = F.linear(torch.where(x >= 0, 1.0, -1.0), layer.weight_q(layer.weight)) * x.abs().mean(1, keepdim=True)
    torch.testing.assert_close(layer(x), expected)
