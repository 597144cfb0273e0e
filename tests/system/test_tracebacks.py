"""Errors name the line of the user's own code that raised them, and only that."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from qbench.cli.main import report
from qbench.system.tracebacks import error_text, place_in_own_code

CODE = """
import numpy
import torch
from qbench.quant.ops import round_ste

def in_torch():
    return torch.quantile(torch.ones(3), 1.5)

def in_numpy():
    return numpy.concatenate([])

def in_qbench():
    return round_ste(3)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a module of a user, whose file is in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error_of(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize(("name", "line"), [("in_torch", 7), ("in_numpy", 10)])
def test_the_line_of_own_code_is_named(mine: object, name: str, line: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(getattr(mine, name))
    assert place_in_own_code(error) == f"mine.py, line {line}, in {name}"
    assert report(error) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"qbench: mine.py, line {line}, in {name}: {type(error).__name__}: {error}"


def test_an_error_inside_qbench_may_be_a_bug_of_qbench(mine: object, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(mine.in_qbench)  # type: ignore[attr-defined]
    assert place_in_own_code(error) == ""
    assert error_text(error) == f"{type(error).__name__}: {error}"
    report(error)
    assert "bug in qbench or in your own code" in capsys.readouterr().err
    assert place_in_own_code(ValueError("never raised")) == ""
