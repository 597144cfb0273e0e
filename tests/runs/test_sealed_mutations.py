"""Any value of a sealed result.json can be wrong: compare reads on, and the other runs are listed."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Configure
from helpers import evaluation, plant

from qbench.bits import LevelCount
from qbench.cli.main import main as cli
from qbench.report.comparison.compare import compare
from qbench.report.tables.run_row import row
from qbench.report.tables.table import FORMATS
from qbench.runs.reader import read
from qbench.runs.result import TrainingSpeed, load_result, with_checksum

WRONG: tuple[Any, ...] = (
    None, True, -1, 0.5, 10**30, 1e308, "", "4", "x\u0000", "\ud800", [], [1, "a"], {},
    {"a": {"b": None}}, [[]],
)  # fmt: skip
DEPTH = 6

Address = tuple[str | int, ...]


@pytest.fixture
def runs(configure: Configure, tmp_path: Path) -> list[Path]:
    """Return three seeds of one setting and a run of another; the first has every field."""
    full = {
        "network": {"norm": "no_affine"}, "best": evaluation(91.0, 92.0), "final": evaluation(90.0, 91.0),
        "verified": {"conv1": {"w": LevelCount(3, 4), "a": LevelCount(4, 4)}, "conv2": {"w": LevelCount(4, 4)}},
        "quantizers": {"conv1": {"scale": 0.5, "points": [0.0, 0.25]}}, "card": {"dorefa": {"choices": "none"}},
        "speed": TrainingSpeed(images_per_second=10.0, seconds_per_epoch=2.0, peak_bytes=3),
        "weights_sha256": "a" * 64, "state_sha256": "b" * 64, "data_sha256": "c" * 64, "wall_seconds": 3.0,
        "protocol_changes": ["not trained"], "notes": ["a note"], "warnings": ["one"], "reason": "none",
    }  # fmt: skip
    first = plant(configure("method=dorefa", "bits=w2a2"), 90.0, 92.0, **full)
    others = [plant(configure("method=dorefa", "bits=w2a2", f"seed={s}"), 90.0 + s, 92.0) for s in (1, 2)]
    return [first, *others, plant(configure("method=lsq", "bits=w2a2", "seed=1"), 88.0, 92.0)]


def addresses(value: Any, address: Address = ()) -> Iterator[Address]:
    """Yield the place of every value inside nested values, and of every container."""
    if address:
        yield address
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if len(address) < DEPTH:
            yield from addresses(item, (*address, key))


def mutants(values: dict[str, Any], wrong: tuple[Any, ...] = WRONG) -> list[tuple[Address, Any]]:
    return [(address, value) for address in addresses(values) for value in wrong]


def mutated(values: dict[str, Any], address: Address, wrong: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    inner: Any = changed
    for key in address[:-1]:
        inner = inner[key]
    inner[address[-1]] = wrong
    return changed


def outputs(out: Path) -> str:
    """Return all that compare and list print of the runs."""
    found = read([str(out)])
    tables = compare(found)
    texts = [write(tables) for write in FORMATS.values()]
    texts += [row([run.result]) for run in found if run.result]
    return "\n".join(texts)


@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.full)])
def test_a_wrong_value_hides_no_other_run(runs: list[Path], tmp_path: Path, count: int | None) -> None:
    file = runs[0] / "result.json"
    good = json.loads(file.read_text())
    every = mutants(good)
    for address, wrong in random.Random(0).sample(every, count) if count else every:
        file.write_text(json.dumps(with_checksum(mutated(good, address, wrong))))
        case = ".".join(map(str, address)), wrong
        try:
            text = outputs(tmp_path)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        assert "lsq" in text, case
        result = load_result(runs[0])
        if result is None:
            assert "corrupt" in text, case


@pytest.mark.full
def test_a_wrong_value_in_the_page_and_the_plots(runs: list[Path], tmp_path: Path) -> None:
    file = runs[0] / "result.json"
    good = json.loads(file.read_text())
    shown = ("quantizers", "verified", "speed", "cost", "best", "notes", "warnings", "card", "baseline", "network")
    chosen = [case for case in mutants(good) if case[0][0] in shown]
    for address, wrong in random.Random(1).sample(chosen, 12):
        file.write_text(json.dumps(with_checksum(mutated(good, address, wrong))))
        command = ["compare", str(tmp_path), "--html", str(tmp_path / "page.html"), "--plot", str(tmp_path / "p.svg")]
        assert cli(command) == 0, (address, wrong)


def test_a_count_of_levels_that_is_text_is_listed_as_corrupt(runs: list[Path], tmp_path: Path) -> None:
    file = runs[0] / "result.json"
    good = json.loads(file.read_text())
    for address, wrong in {
        ("verified", "conv1", "w", "found"): "4", ("protocol", "keys", "model"): True, ("bits", "w"): -1,
        ("seed",): 2**40, ("status",): "finished", ("method",): "", ("protocol", "keys", "epochs"): 7,
    }.items():  # fmt: skip
        file.write_text(json.dumps(with_checksum(mutated(good, address, wrong))))
        assert [run.status for run in read([str(tmp_path)])].count("corrupt") == 1, address
        assert "lsq" in outputs(tmp_path)


def test_a_learning_rate_that_is_no_number(configure: Configure, tmp_path: Path) -> None:
    plant(configure("method=lsq", "bits=w2a2"), 88.0, 92.0)
    path = plant(configure("method=dorefa", "bits=w2a2"), 90.0, 92.0, options={"optim.lr": 0.001})
    good = json.loads((path / "result.json").read_text())
    for wrong in WRONG:
        changed = mutated(good, ("options", "optim.lr"), wrong)
        (path / "result.json").write_text(json.dumps(with_checksum(changed)))
        assert "lsq" in outputs(tmp_path), wrong
