"""scripts/published_rows.py: which stored runs count as a measurement of a published row."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import evaluation, plant

sys.path.insert(0, str(ROOT / "scripts"))

import published_rows as script

from qbench.config import compose
from qbench.papers.published_figures import MEASURED
from qbench.papers.published_figures import published_rows as all_rows
from qbench.papers.row_types import PublishedRow
from qbench.runs.result import BaselineResult, Result, load_result

FLOAT = BaselineResult(run="float", final=evaluation(92.0))


def row_named(name: str) -> PublishedRow:
    return next(row for row in all_rows() if f"{row.paper}/{row.id}" == name)


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Result]:
    """Return a function that stores the result of a run and returns it."""

    def store(top1: float, *words: str) -> Result:
        (config,) = compose.configurations([f"out={tmp_path}", *words])
        result = load_result(plant(config, top1, FLOAT))
        assert result
        return result

    return store


def test_measured_yaml_is_what_the_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, "run scripts/published_rows.py --from-records"
    assert "unchanged" in capsys.readouterr().out


@pytest.mark.full
def test_the_script_notices_an_edited_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = tmp_path / "measured.yaml"
    edited.write_text(MEASURED.read_text("utf-8").replace("value: 9", "value: 8"), encoding="utf-8")
    monkeypatch.setattr(script, "MEASURED", edited)
    assert script.main(["--check"]) == 1


def test_runs_of_the_own_recipe_have_no_departures(stored: Callable[..., Result]) -> None:
    """Accuracies of 98 and 99 are a mean error of 1.5, and the float network's error is 8."""
    row = row_named("gupta/mnist_cnn_stochastic_fl12")
    runs = [stored(98.0 + seed, "experiment=gupta/mnist_cnn_stochastic_fl12", f"seed={seed}") for seed in (0, 1)]
    found = script.measurement(row, runs)
    assert found == {"value": 1.5, "n": 2, "spread": 0.707, "baseline": 8.0, "departs": []}


def test_a_run_with_other_options_of_the_method_is_no_measurement(stored: Callable[..., Result]) -> None:
    run = stored(98.0, "experiment=gupta/mnist_cnn_stochastic_fl14")
    assert script.measurement(row_named("gupta/mnist_cnn_stochastic_fl12"), [run]) is None
    assert script.measurement(row_named("gupta/mnist_cnn_nearest_fl12"), [run]) is None
    rescaled = stored(90.0, "experiment=dorefa/resnet20_zzz_w2")
    assert script.measurement(row_named("dorefa/resnet20_pact_w2a2"), [rescaled]) is None


def test_a_run_with_another_recipe_names_the_differences(stored: Callable[..., Result]) -> None:
    run = stored(80.0, "experiment=dorefa/resnet20_pact_w2a2", "epochs=4", "optim.batch_size=64")
    found = script.measurement(row_named("dorefa/resnet20_pact_w2a2"), [run])
    assert found
    assert found["departs"] == ["epochs=4 (published: 200)", "optim.batch_size=64 (published: 128)"]


def test_the_run_with_the_fewest_differences_counts(stored: Callable[..., Result]) -> None:
    short = stored(80.0, "experiment=dorefa/resnet20_pact_w2a2", "epochs=4")
    own = stored(88.0, "experiment=dorefa/resnet20_pact_w2a2")
    found = script.measurement(row_named("dorefa/resnet20_pact_w2a2"), [short, own])
    assert found
    assert (found["value"], found["n"], found["departs"]) == (88.0, 1, [])


def test_an_increase_in_error_is_relative_to_our_float_network(stored: Callable[..., Result]) -> None:
    row = replace(row_named("dorefa/resnet20_pact_w2a2"), metric="top1_error_increase")
    found = script.measurement(row, [stored(88.5, "experiment=dorefa/resnet20_pact_w2a2")])
    assert found
    assert (found["value"], found["baseline"]) == (3.5, 0.0)
