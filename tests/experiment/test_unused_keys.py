"""Keys that a run ignores, because its method, network or optimizer does not use them, are named in its warnings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Configure
from torch import nn

from qbench.config import registry
from qbench.config.groups import option_names
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.experiment.unused_keys import replaced_widths, unused_keys
from qbench.quant.method import Unsupported
from qbench.runs.result import load_result

BIASLESS = """
from torch import nn

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), *(nn.Linear(n, k, bias=False) for n, k in ((64, 16), (16, 16), (16, classes))))
"""


def unused(configure: Configure, words: Sequence[str]) -> list[str]:
    """Return the warnings about keys without effect of a network that is not trained."""
    setup = assemble(configure("init=scratch", *words))
    return unused_keys(setup, setup.install(setup.float_model()))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["optim.quantizer_lr=0.1"], "optim.quantizer_lr=0.1 has no effect, because the quantizers of dorefa have no "
         "learned parameters"),
        (["optim.quantizer_decay=0.1"], "optim.quantizer_decay=0.1 has no effect, because the quantizers of dorefa "
         "have no learned parameters"),
        (["optim.decay_norm_and_bias=true", "optim.weight_decay=0"], "optim.decay_norm_and_bias=True has no effect, "
         "because the weight decay is 0"),
        (["optim.decay_until=0.5", "optim.weight_decay=0"], "optim.decay_until=0.5 has no effect, because the weight "
         "decay is 0"),
        (["epochs=3", "optim.patience=2"], "optim.patience=2 has no effect, because the run has 3 epochs"),
        (["distill=kd", "distill.weight=0"], "distill=kd has no effect, because distill.weight is 0"),
        (["layers.rules={layer1*: 4, layer1.0*: 8}"], "layers.rules[layer1.0*]=8 has no effect, because the earlier "
         "rule layer1* matches its layers"),
        (["layers.rules={conv1: 4}", "layers.first=8"], "layers.first=8 has no effect, because the rule conv1 matches "
         "the layer conv1"),
        (["model=vgg_small", "model.width=8", "model.norm=none", "model.bn_momentum=0.05"], "model.bn_momentum=0.05 "
         "has no effect, because the network has no batch normalization"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named(configure: Configure, words: list[str], why: str) -> None:
    assert unused(configure, ["method=dorefa", "bits=w2", *words]) == [why]


@pytest.mark.parametrize(
    ("words", "whys"),
    [
        (["method=lsq", "bits=w32a4", "method.channel=true"],
         ["method.channel=true has no effect, because lsq quantizes no weights here"]),
        (["method=lsq", "bits=w4a4", "method.channel=true"], []),
        (["method=lsq", "bits=w32a4", "method.channel=true", "layers.rules={fc: 8}"], []),
        (["method=ttq", "activation=lsq", "bits.a=4", "activation.channel=true"],
         ["activation.channel=true has no effect, because lsq quantizes no weights here"]),
        (["method=pact", "bits=w2a32", "method.decay=0.1", "method.initial=3"],
         [f"method.{key} has no effect, because pact quantizes no activations here"
          for key in ("initial=3", "decay=0.1")]),
        (["method=lsq", "activation=pact", "bits=w4a4", "activation.initial=3"], []),
        (["method=dorefa", "bits=w2", "+optim.momentum=0.5", "+optim.nesterov=true", "+optim.milestones=[0.5]"],
         [f"optim.{key} has no effect, because it is a key of sgd, and optim.name is adam"
          for key in ("momentum=0.5", "nesterov=True")]
         + ["optim.milestones=[0.5] has no effect, because it is a key of the schedule step, and optim.schedule is "
            "exponential"]),
        (["method=apot", "bits=w4a4", "method.edge_scale=max"],
         ["method.edge_scale=max has no effect, because no layer has 8-bit weights"]),
        (["method=apot", "bits=w4a4", "method.edge_scale=max", "layers.first=8"], []),
        (["method=qcnn", "method.fc_subspace=2", "method.codewords=0"],
         ["method.fc_subspace=2 has no effect, because no linear layer is quantized"]),
        (["method=qcnn", "method.fc_subspace=2", "layers.last=same", "bits=w2"], []),
        (["method=qcnn", "method.subspace=2", "model=mlp"],
         ["method.subspace=2 has no effect, because no convolution is quantized"]),
        (["method=gupta", "method.integer_biases=3", "layers.last=float"],
         ["method.integer_biases=3 has no effect, because no quantized layer has a bias"]),
        (["method=gupta", "method.integer_biases=3", "layers.last=same"], []),
        (["method=ptq", "method.reestimate=none", "model=mlp", "model.norm=none"],
         ["method.reestimate=none has no effect, because the network has no batch normalization"]),
        (["method=dorefa", "bits=w2", "optim=sgd", "+optim.eps=0.1"],
         ["optim.eps=0.1 has no effect, because sgd has no such key"]),
    ],
)  # fmt: skip
def test_options_of_another_slot_optimizer_or_schedule_are_named(
    configure: Configure, words: list[str], whys: list[str]
) -> None:
    assert unused(configure, words) == whys


@pytest.mark.parametrize(
    ("method", "word", "why"),
    [
        ("ptq", "method.percentile=99", r"percentile=99\.0 has no effect with calibration=mse"),
        ("gupta", "method.integer_momentum=3", "integer_momentum=3 has no effect; add method.momentum=fixed"),
    ],
)
def test_options_that_need_another_option_are_refused(configure: Configure, method: str, word: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        assemble(configure(f"method={method}", word))


@pytest.mark.parametrize("name", option_names("method"))
def test_slots_are_declared_for_options_that_exist(name: str) -> None:
    options = registry.defaults("method", name)
    slots = registry.create("method", {"name": name}).option_slots
    assert slots.keys() <= options.keys()
    assert set(slots.values()) <= {"w", "a", "g"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["bits=w2a2", "layers.rules={*: 8}"], ["w=2, because layers.* sets the weights to 8 bits",
                                                   "a=2, because layers.* sets the activations to 8 bits"]),
        (["bits=w2a32", "layers.rules={*: 8}"], ["w=2, because layers.* sets the weights to 8 bits"]),
        (["bits=w2a2", "layers.rules={layer1*: 8}"], []),
        (["bits=w2a2", "layers.first=8", "layers.last=8"], []),
    ],
)  # fmt: skip
def test_widths_that_no_layer_has_are_named(configure: Configure, words: list[str], found: list[str]) -> None:
    setup = assemble(configure("init=scratch", "method=dorefa", *words))
    warnings = replaced_widths(setup, setup.install(setup.float_model()))
    assert warnings == [f"no layer has bits.{one}" for one in found]


def test_biases_that_are_missing_are_named(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "biasless.py").write_text(BIASLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["method=dorefa", "bits=w2", "model=biasless:build", "optim.bias_lr=2", "optim.weight_decay=0.1"]
    assert unused(configure, [*words, "optim.decay_norm_and_bias=true"]) == [
        "optim.bias_lr=2.0 has no effect, because no layer has a bias that is trained",
        "optim.decay_norm_and_bias=True has no effect, because the network has no biases and no batch normalization "
        "that are trained",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["method=dorefa", "bits=w2"],
        ["method=lsq", "bits=w2a2", "optim.quantizer_lr=0.1", "optim.quantizer_decay=0.1"],
        ["method=pact", "bits=w2a2", "optim.weight_decay=0", "optim.decay_until=0.5"],  # PACT decays its ranges
        ["method=dorefa", "bits=w2", "optim.bias_lr=2", "optim.decay_norm_and_bias=true", "optim.weight_decay=0.1"],
        ["method=dorefa", "bits=w2", "layers.first=8", "layers.rules={layer1.0.conv1: 4, layer1*: 8}"],
        ["method=ptq", "bits=w4a4", "optim.quantizer_lr=0.1"],  # not trained at all, which another note says
    ],
)
def test_a_key_with_an_effect_is_not_named(configure: Configure, words: list[str]) -> None:
    assert unused(configure, words) == []


def test_the_result_has_the_warnings(smoke: Configure) -> None:
    words = ("method=twn", "optim.quantizer_lr=0.1", "pretrain.optim.decay_until=0.5", "pretrain.optim.weight_decay=0")
    result = run(planned_run(smoke(*words)))
    line = "optim.quantizer_lr=0.1 has no effect, because the quantizers of twn have no learned parameters"
    assert line in result.warnings
    assert result.baseline is not None
    baseline = load_result(Path(result.baseline.run))
    assert baseline is not None
    assert "pretrain.optim.decay_until=0.5 has no effect, because the weight decay is 0" in baseline.warnings


def test_epochs_of_a_baseline_that_is_not_trained_have_a_note(smoke: Configure) -> None:
    line = "pretrain.epochs=5 has no effect, because no float baseline is trained"
    assert line in run(planned_run(smoke("method=dorefa", "init=scratch", "pretrain.epochs=5"))).warnings
    result = run(planned_run(smoke("method=dorefa", "pretrain.epochs=5")))
    assert not [note for note in result.warnings if "pretrain.epochs" in note]


def test_a_loss_of_the_method_ignores_label_smoothing(configure: Configure) -> None:
    words = ("experiment=smoke", "init=scratch", "method=dorefa", "optim.label_smoothing=0.1", "pretrain.epochs=60")
    setup = assemble(configure(*words))
    model = setup.install(setup.float_model())
    assert unused_keys(setup, model) == []
    method = replace(setup.method, loss=lambda model, logits, batch: nn.functional.cross_entropy(logits, batch[1]))
    assert unused_keys(replace(setup, method=method), model) == [
        "optim.label_smoothing=0.1 has no effect, because dorefa has its own loss"
    ]
