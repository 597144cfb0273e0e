"""docs/tutorial.ipynb runs from top to bottom, and is stored without outputs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "tutorial.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SHOW = """
import ast, contextlib, io, json, sys
names = {"__name__": "__main__"}
for cell in json.load(sys.stdin):
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print(shown._repr_html_() if hasattr(shown, "_repr_html_") else repr(shown))
"""
"""Runs code cells as a notebook does: in one namespace, with the last expression of each shown."""


def test_it_is_stored_without_outputs() -> None:
    assert len(CODE) >= 8
    assert all(
        (cell["outputs"], cell["execution_count"]) == ([], None) for cell in CELLS if cell["cell_type"] == "code"
    )
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for source in CODE:
        ast.parse(source)


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^()#:\s]+)", "".join("".join(cell["source"]) for cell in CELLS))
    assert len(links) >= 4
    assert not [link for link in links if not (PAGE.parent / link).exists()]


@pytest.mark.full
def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qbench", "-c", SHOW],
        input=json.dumps(CODE), capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout
    assert re.search(r"dorefa w2a2g32: [\d.]+ %, float baseline: 9[\d.]+ %", shown)
    assert "method=dorfa: no such method; did you mean dorefa?" in shown
    assert shown.count("\ndone  ") == 6
    assert re.search(r">lsq</td>.*>w?2</td>", shown)
    assert "('2', Bits(w=2, a=2, g=32))" in shown
    values = ast.literal_eval(next(line for line in shown.splitlines() if re.fullmatch(r"\[[-\d., e]+\]", line)))
    assert len(values) <= 4
