"""Runs whose accuracy says little have a warning: weak float baseline, few training steps, few test images."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Configure, long_tier

import qbench
from qbench.experiment.evidence import FEW_STEPS, coarse_test_split, few_steps, skipped_phases, updates, weak_baseline
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.quant.masks import stage_borders
from qbench.report.comparison.compare import compare
from qbench.report.html.page import html
from qbench.report.tables.run_row import row
from qbench.runs.reader import read
from qbench.runs.result import load_result


def test_a_baseline_near_chance_is_named_with_its_numbers() -> None:
    """33 of 72 images, chance 1/3: limit 0.4, needed 0.4 + 1.645 sqrt(0.4 * 0.6 / 72) = 0.49497."""
    (line,) = weak_baseline(45.83, [24, 24, 24])
    assert line == (
        "the float baseline is not clearly above chance: its top-1 is 45.83 % on 72 test images, the most frequent "
        "class alone gives 33.33 %, and clearly above chance means at least 49.50 %"
    )


@pytest.mark.parametrize(
    ("top1", "counts", "weak"),
    [
        (49.0, [24, 24, 24], True),
        (50.0, [24, 24, 24], False),
        (98.6, [45] * 10, False),
        (12.0, [1000] * 10, True),
        (13.0, [1000] * 10, False),  # limit 12 %, needed 12.53 %
        (92.0, [9000, 1000], True),  # nine of ten images belong to one class: chance is 90 %
        (93.0, [9000, 1000], False),
        (4.0, [50] * 1000, False),  # 1000 classes: forty times chance
        (100.0, [3, 1], False),
    ],
)
def test_chance_is_the_share_of_the_most_frequent_class(top1: float, counts: list[int], weak: bool) -> None:
    assert len(list(weak_baseline(top1, counts))) == weak


def test_steps_are_updates_of_the_weights(configure: Configure) -> None:
    setup = assemble(configure("method=dorefa", "bits=w2", "optim.accumulate=12"))
    assert updates(setup, 54) == 3 * 2, "three epochs of 18 batches, each with a full and a smaller update"
    assert updates(setup, 18 + 13) == 2 + 2
    assert updates(setup, 0) == 0


def test_few_steps_and_few_images_have_a_threshold() -> None:
    assert list(few_steps(100, "")) == [
        "the run has 100 training steps, fewer than 500; raise epochs, or lower optim.batch_size"
    ]
    assert "raise pretrain.epochs, or lower pretrain.optim.batch_size" in next(few_steps(FEW_STEPS - 1, "pretrain."))
    assert not list(few_steps(FEW_STEPS, ""))
    assert not list(few_steps(540, "")), "the default recipe of digits"
    assert not list(few_steps(0, "")), "a method that trains nothing"
    assert list(coarse_test_split(72)) == ["the test split has 72 images, so one image changes top-1 by 1.4 points"]
    assert len(list(coarse_test_split(199))) == 1
    assert not list(coarse_test_split(200))


def test_epochs_that_leave_out_portions_are_named() -> None:
    def lines(epochs: int, short_end: bool = False) -> list[str]:
        return list(skipped_phases(lambda epochs: stage_borders(epochs, 4, short_end), epochs))

    assert lines(1) == [
        "1 epoch leaves out 3 of the 4 phases of the method, in which portions of the weights are frozen one after "
        "another; all weights are frozen before the first step; type epochs=4 or more"
    ]
    assert lines(3)[0].startswith("3 epochs leave out 1 of the 4 phases of the method")
    assert lines(3)[0].endswith("; some portions are frozen together; type epochs=4 or more")
    assert not lines(4)
    assert not lines(4, short_end=True)
    assert not lines(0), "a method that trains nothing"
    assert not list(skipped_phases(lambda epochs: (), 1)), "a method without phases"
    assert not list(skipped_phases(lambda epochs: range(1, epochs), 1)), "a phase per epoch"


@pytest.mark.parametrize(("method", "phases"), [("inq", 4), long_tier("slq", 5), long_tier("mlq", 2)])
def test_a_run_names_the_portions_that_its_epochs_leave_out(smoke: Configure, method: str, phases: int) -> None:
    result = run(planned_run(smoke(f"method={method}", "runtime.observe=off", "distill=none")))
    found = [line for line in result.warnings if line.startswith("1 epoch leaves out ")]
    assert len(found) == 1
    assert found[0].startswith(f"1 epoch leaves out {phases - 1} of the {phases} phases")
    assert found[0].endswith(f"; type epochs={phases} or more")


def test_row_table_and_page_show_the_warning(smoke: Configure, tmp_path: Path) -> None:
    text = "the run has 18 training steps, fewer than 500; raise epochs, or lower optim.batch_size"
    result = run(planned_run(smoke("method=twn", "runtime.observe=off")))
    assert result.baseline
    assert f"      warning: {text}" in row([result]).splitlines()
    baseline = load_result(Path(result.baseline.run))
    assert baseline
    assert [line for line in baseline.warnings if "training steps" in line] == [
        text.replace("epochs", "pretrain.epochs").replace("optim.", "pretrain.optim.")
    ]
    own = text.replace("epochs", "pretrain.epochs").replace("optim.", "pretrain.optim.")
    assert f"      warning: float baseline: {own}" in row([result]).splitlines()
    assert row([result]).count("not clearly above chance") == 1, "the run has this warning itself"
    untrained = run(planned_run(smoke("method=ptq", "runtime.observe=off")))
    assert not [line for line in untrained.warnings if "training steps" in line]
    records = read([str(tmp_path)])
    tables = compare(records)
    assert any(note.startswith("warning: twn") and text in note for table in tables for note in table.notes)
    assert text in html(tables, records)


def test_few_steps_are_updates_of_the_weights() -> None:
    assert list(few_steps(500, "")) == list(few_steps(0, "")) == []
    assert "the run has 28 training steps, fewer than 500" in next(few_steps(28, ""))


def test_the_row_of_a_run_without_training_says_so(smoke: Configure) -> None:
    result = run(planned_run(smoke("method=ptq", "bits=w8a8")))
    assert "test top-1 without training" in row([result])
    assert "test top-1 after the last epoch" in row([replace(result, final=replace(result.final, epoch=0))])


@pytest.mark.full
def test_an_untrained_run_names_the_accuracy_of_the_weights_from_which_it_started(smoke: Configure) -> None:
    """With 16-bit rounding, the run has the accuracy of these weights, which differs from that of the row float."""
    words = ("runtime.observe=off", "pretrain.epochs=5", "pretrain.optim.schedule=constant", "pretrain.optim.lr=0.3")
    result = run(planned_run(smoke("method=ptq", "bits=w16a16", *words)))
    assert result.baseline
    assert result.baseline.best
    best, last = (evaluation.test.top1 for evaluation in (result.baseline.best, result.baseline.final))
    assert abs(best - last) > 2, "the best epoch was not the last one"
    (line,) = (line for line in result.warnings if line.startswith("nothing was trained"))
    assert f"whose test top-1 is {best:.2f} %;" in line
    scratch = run(planned_run(smoke("method=gupta", "epochs=0", *words)))
    assert not [line for line in scratch.warnings if line.startswith("nothing was trained")], "from random weights"
    trained = run(planned_run(smoke("method=dorefa", *words)))
    assert not [line for line in trained.warnings if line.startswith("nothing was trained")]


METHOD = """
import torch
from qbench.bits import Bits
from qbench.quant.method import Method
from qbench.quant.ops import straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

class Quantized(Quantizer):
    def __init__(self, levels, bits):
        super().__init__()
        self.most, self.bits = levels // 2, bits

    def forward(self, x):
        return straight_through(x, (x * 50).round().clamp(-self.most, self.most) / 50)

    def grid(self, x):
        return Grid((torch.arange(-self.most, self.most + 1) / 50).reshape(1, -1, 1))

    def bytes(self, w):
        return Storage(w.numel(), self.bits, 4)

def build(*, w: int = 2, a: int = 3, weight_levels: int = 3, input_levels: int = 9):
    return Method(
        name="counted", bits=Bits(w, a), supported_bits={"w": (2, 32), "a": (3, 32), "g": (32,)},
        weight=lambda name, layer, bits: Quantized(weight_levels, bits),
        input=lambda name, layer, bits: Quantized(input_levels, bits),
    )
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), []),
        (("method.weight_levels=5",), ["weights have 5 levels, but bytes(w) declares codes of 2 bits"]),
        (("method.input_levels=11",), ["activations have 11 levels, but bits.a is 3"]),
    ],
)
def test_levels_that_do_not_fit_into_the_declared_bits_are_a_warning(
    words: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and BitOps are computed from the declared bits."""
    (tmp_path / "counted_levels.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = qbench.run("experiment=smoke", "init=scratch", "method=counted_levels:build", *words, out=tmp_path)
    found = [text for text in result.warnings if "sizes and BitOps are too small" in text]
    assert [text.partition(": ")[2].partition(", which")[0] for text in found] == expected
    assert all(text.startswith("layer1.0.conv1 and 5 more layers: ") for text in found)
