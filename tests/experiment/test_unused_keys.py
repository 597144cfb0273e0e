"""Keys that a run ignores, because its method, network or optimizer does not use them, are named in its notes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Configure
from torch import nn

from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.experiment.unused_keys import unused_keys
from qbench.runs.result import load_result

BIASLESS = """
from torch import nn

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), *(nn.Linear(n, k, bias=False) for n, k in ((64, 16), (16, 16), (16, classes))))
"""


def notes(configure: Configure, words: Sequence[str]) -> list[str]:
    """Return the notes about keys without effect of a network that is not trained."""
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
        (["layers.rules={layer1*: 4, layer1.0*: 8}"], "layers.rules[layer1.0*]=8 has no effect, because the earlier "
         "rule layer1* matches its layers"),
        (["layers.rules={conv1: 4}", "layers.first=8"], "layers.first=8 has no effect, because the rule conv1 matches "
         "the layer conv1"),
        (["model=vgg_small", "model.width=8", "model.norm=none", "model.bn_momentum=0.05"], "model.bn_momentum=0.05 "
         "has no effect, because the network has no batch normalization"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named(configure: Configure, words: list[str], why: str) -> None:
    assert notes(configure, ["method=dorefa", "bits=w2", *words]) == [why]


def test_biases_that_are_missing_are_named(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "biasless.py").write_text(BIASLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["method=dorefa", "bits=w2", "model=biasless:build", "optim.bias_lr=2", "optim.weight_decay=0.1"]
    assert notes(configure, [*words, "optim.decay_norm_and_bias=true"]) == [
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
    assert notes(configure, words) == []


def test_the_result_has_the_notes(smoke: Configure) -> None:
    words = ("method=twn", "optim.quantizer_lr=0.1", "pretrain.optim.decay_until=0.5", "pretrain.optim.weight_decay=0")
    result = run(planned_run(smoke(*words)))
    line = "optim.quantizer_lr=0.1 has no effect, because the quantizers of twn have no learned parameters"
    assert line in result.notes
    assert result.baseline is not None
    baseline = load_result(Path(result.baseline.run))
    assert baseline is not None
    assert "pretrain.optim.decay_until=0.5 has no effect, because the weight decay is 0" in baseline.notes


def test_a_loss_of_the_method_ignores_label_smoothing(configure: Configure) -> None:
    setup = assemble(configure("experiment=smoke", "init=scratch", "method=dorefa", "optim.label_smoothing=0.1"))
    model = setup.install(setup.float_model())
    assert unused_keys(setup, model) == []
    method = replace(setup.method, loss=lambda model, logits, batch: nn.functional.cross_entropy(logits, batch[1]))
    assert unused_keys(replace(setup, method=method), model) == [
        "optim.label_smoothing=0.1 has no effect, because dorefa has its own loss"
    ]
