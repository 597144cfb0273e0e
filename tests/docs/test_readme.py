"""The README is true: its commands compose, its table's commands are the ones that made them, its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Configure

from qbench.cli import compare as asked
from qbench.cli.commands import VERBS
from qbench.cli.main import main as cli
from qbench.config import compose, groups
from qbench.models import mlp

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `qbench ...` line and inline command of the README, but those about the method that it has one write."""
    blocks = re.findall(r"^    (?:scripts/)?(qbench .*)$", README, re.MULTILINE)
    inline = re.findall(r"`(qbench [^`]*=[^`]*)`", README)
    return [shlex.split(text, comments=True)[1:] for text in blocks + inline if not re.search("<|my_method", text)]


def test_every_command_of_the_readme_is_one(configure: Configure) -> None:
    assert len(commands()) >= 6
    for words in commands():
        if words[0] in VERBS:
            continue
        asks = "--cfg" in words
        assert bool(compose.configurations(words)) is not asks, words


def test_tables_of_results_are_those_of_their_records() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/readme_tables.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_verbs_of_the_readme_exist() -> None:
    verbs = "compare|describe|list|plan|check|draw|ledger|settle|inspect|sensitivity|evaluate"
    for verb in set(re.findall(rf"qbench ({verbs})\b", README)):
        assert verb in VERBS, verb


def test_conclusions_quoted_are_those_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = asked.run_compare(["docs/records/methods-glyphs.json"]).splitlines()
    quoted = re.findall(r"^    (w\d+a\d+g\d+: .*)$", README, re.MULTILINE)
    assert len(quoted) == 2
    assert set(quoted) <= set(said)


def test_tables_are_filled() -> None:
    tables = re.findall(r"<!-- table: (.*?) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert tables
    for command, body in tables:
        assert f"`{command}`" in body, "run scripts/readme_tables.py"
        assert "failed" not in body


def test_speed_in_words_is_that_of_the_table() -> None:
    one_thread = README.partition("**Training step, one thread**")[2].partition("\n**")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \(.*?\) \| ([\d.]+) ", one_thread, re.MULTILINE)
    of_float = {name: figures for name, *figures in rows}
    said = re.findall(r"takes (\S+) of the float network's.*?and (\S+) of that.*?it takes (\S+)\.\n", README, re.DOTALL)
    assert said == [(*of_float["dorefa w2a2"], of_float["peer: DoReFa W2A2 as everybody writes it"][0])]


def test_three_lines_of_python() -> None:
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = mlp.build((1, 4, 4), 3, hidden=2, width=8)
    exec(code, {"model": model})
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    assert model.get_submodule("fc2").weight_q(model.get_submodule("fc2").weight).unique().numel() <= 4


def test_a_method_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert cli(["check", "my_method:build"]) == 0
    assert "properties hold" in capsys.readouterr().out
    (config,) = compose.configurations(["method=my_method:build", "method.factor=3"])
    assert config.method["factor"] == 3


def test_groups_of_the_readme_are_whole() -> None:
    for group in ("model", "dataset", "optim"):
        (row,) = re.findall(rf"^\| `{group}=`(.*)$", README, re.MULTILINE)
        assert all(f"`{name}`" in row for name in groups.option_names(group)), group
    assert all(f"`{name}`" in README for name in groups.option_names("method"))


def test_linked_files_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_scripts_are_sound() -> None:
    for name in ("qbench", "test", "install"):
        assert subprocess.run(["bash", "-n", ROOT / "scripts" / name]).returncode == 0
    names = (
        "readme_tables",
        "every_method",
        "deviations",
        "claims",
        "experiments",
        "reliability",
        "papers",
        "pictures",
        "unified",
    )
    for name in names:
        compile((ROOT / "scripts" / name).read_text(), name, "exec")
    assert sys.version_info >= (3, 11)
