"""The choice of the shared recipe: by validation accuracy, over what all recipes have."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from helpers import evaluation

from qbench.runs.reader import RunRecord
from qbench.runs.result import Protocol, Result


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choose_recipe_script", ROOT / "scripts" / "choose_recipe.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(optim: str, method: str, seed: int, val: float, test: float) -> RunRecord:
    keys = {"optim": {"name": optim, "lr": 0.1, "schedule": "cosine"}}
    result = Result(
        status="done", final=evaluation(test, val), method=method, bits={"w": 2, "a": 32, "g": 32}, seed=seed,
        dataset="d", model="m", protocol=Protocol(hash=optim, keys=keys),
    )  # fmt: skip
    return RunRecord(path=Path(f"{optim}{method}{seed}"), status="done", result=result)


def test_validation_chooses_and_test_accuracy_has_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    module = load_script()
    runs = [
        record("adam", "dorefa", 0, 90, 10), record("sgd", "dorefa", 0, 80, 99),
        record("adam", "lsq", 0, 80, 10), record("sgd", "lsq", 0, 88, 99),
        record("sgd", "lsq", 1, 100, 99), record("sgd", "ttq", 0, 100, 99), record("sgd", "float", 0, 100, 99),
    ]  # fmt: skip
    table, chosen = module.recipe_table(runs)
    assert table.head == ("recipe", "dorefa w2a32g32", "lsq w2a32g32", "mean", "95 % CI over settings")
    assert [row[1:4] for row in table.rows] == [("90.00", "80.00", "85.00"), ("80.00", "88.00", "84.00")]
    assert '"name"="adam"' in chosen
    with pytest.raises(SystemExit, match="no setting"):
        module.recipe_table([runs[0], runs[3]])
