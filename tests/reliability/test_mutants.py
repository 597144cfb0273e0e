"""The mutants of scripts/mutants.py: which changes they make, and how they are judged."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("coverage")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("mutants_script", ROOT / "scripts" / "mutants.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants_script", module)
    spec.loader.exec_module(module)
    return module


CODE = '''"""é: a docstring, 1 < 2."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


def f(x: int = 3, *, on: bool = True) -> int:
    """Return 1 + 1."""
    if x < 2 and not on:
        raise ValueError(f"x={x - 1}: must be above {1 + 1}")
    print("a" + str(x))
    y = min(x, 5) if x > 0 else -x
    return y * 2
'''


def test_the_changes_of_a_file(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    file = tmp_path / "f.py"
    file.write_text(CODE, encoding="utf-8")
    found = list(script.mutants_of(file))
    shown = {f"{m.was} -> {m.text}" for m in found}
    assert shown == {
        "3 -> 4", "True -> False", "x < 2 and not on -> ((x < 2) or (not on))", "x < 2 -> (x <= 2)", "2 -> 3",
        "not on -> (on)", 'print("a" + str(x)) -> pass', "min -> max", "5 -> 6", "x > 0 -> (x >= 0)", "0 -> 1",
        "min(x, 5) if x > 0 else -x -> (-x if x > 0 else min(x, 5))", "-x -> (x)", "return y * 2 -> return None",
        "y * 2 -> (y / 2)",
    }  # fmt: skip
    data = CODE.encode()
    for mutant in found:
        changed = data[: mutant.start] + mutant.text.encode() + data[mutant.end :]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(data)), mutant.name


def test_a_sample_is_the_same_each_time_and_has_every_folder(script: ModuleType) -> None:
    sample = script.sampled(10, 0, script.FOLDERS)
    assert sample == script.sampled(10, 0, script.FOLDERS)
    assert sample != script.sampled(10, 1, script.FOLDERS)
    folders = [next(f for f in script.FOLDERS if m.file.startswith(f"qbench/{f}/")) for m in sample]
    assert sorted(folders) == sorted([*script.FOLDERS] * 2)
    assert len({m.key for m in sample}) == 10


@pytest.mark.full
def test_killed_survived_and_uncovered(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "qbench").mkdir()
    (tmp_path / "qbench" / "__init__.py").touch()
    source = "def f(x):\n    return x + 1\n"
    (tmp_path / "qbench" / "f.py").write_text(source)
    (tmp_path / "test_f.py").write_text(
        "from qbench.f import f\n\ndef test_f():\n    assert f(1) == 2\n\ndef test_weak():\n    assert f(0)\n"
    )
    mutant = script.Mutant("qbench/f.py", 2, 21, 26, "(x - 1)", "x + 1")
    assert source[21:26] == "x + 1"
    for tests, outcome in (
        (["test_f.py::test_f"], "killed"),
        (["test_f.py::test_weak"], "survived"),
        ([], "uncovered"),
    ):
        assert script.run_mutant(mutant, tests, tmp_path, 60) == outcome
        assert (tmp_path / "qbench" / "f.py").read_text() == source
    broken = script.Mutant("qbench/f.py", 1, 0, 3, "wrong", "def")
    assert script.run_mutant(broken, ["test_f.py::test_f"], tmp_path, 60) == "killed", "it cannot be imported"
    with pytest.raises(SystemExit, match="not found"):
        script.run_mutant(mutant, ["test_f.py::test_gone"], tmp_path, 60)
    made = [
        script.Outcome(str(i), f"m{i}", "quant", outcome, 1, 1.0)
        for i, outcome in enumerate(("killed", "timeout", "survived", "uncovered"))
    ]
    text = script.score(made, "the command")
    assert "`the command`: 2 of 4 mutants killed (50 %)." in text
    assert "- survived: `m2`" in text
    assert "- uncovered: `m3`" in text


def test_the_score_is_written_between_its_marks(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- end -->\n<!-- mutants -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(script, "PAGE", page)
    script.write_page("new")
    assert page.read_text() == "a\n<!-- end -->\n<!-- mutants -->\nnew\n<!-- end -->\nb\n"
    assert "<!-- mutants -->\n" in (ROOT / "docs" / "reliability.md").read_text("utf-8")
