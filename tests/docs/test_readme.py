"""The README is correct: its commands and flags exist, its tables are those of their records, its files exist."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from qbench.cli import compare as asked
from qbench.cli.commands import SUBCOMMANDS
from qbench.cli.main import main as cli
from qbench.config import compose, groups
from qbench.config.identity import run_identity
from qbench.models import mlp
from qbench.runs.directory import directory_name
from qbench.runs.result import SCHEMA, Result

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return every `qbench ...` line and inline command of the README but those about its example method."""
    blocks = re.findall(r"^    (?:scripts/)?(qbench .*)$", README, re.MULTILINE)
    inline = re.findall(r"`(qbench [^`]*=[^`]*)`", README)
    return [shlex.split(text, comments=True)[1:] for text in blocks + inline if not re.search("<|my_method", text)]


def test_every_command_of_the_readme_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each command; of a sweep, compose as many combinations as make every value appear once."""

    def each_value_once(*axes: list[str]) -> list[tuple[str, ...]]:
        return [tuple(axis[min(i, len(axis) - 1)] for axis in axes) for i in range(max(map(len, axes)))]

    monkeypatch.setattr(compose, "product", each_value_once)
    assert len(commands()) >= 6
    for words in commands():
        if words[0] in SUBCOMMANDS:
            continue
        prints = "--cfg" in words
        assert bool(compose.configurations(words)) is not prints, words


def test_flags_of_the_readme_stand_in_the_help_of_their_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {(words[0], word.partition("=")[0]) for words in commands() for word in words if word.startswith("--")}
    flags = {(name, flag) for name, flag in flags if name in SUBCOMMANDS}
    assert len(flags) >= 8
    for name, flag in sorted(flags):
        assert cli([name, "--help"]) == 0
        assert flag in capsys.readouterr().out, (name, flag)


def test_directories_of_the_readme_are_those_that_its_commands_write() -> None:
    for line in ("method=dorefa bits.w=2", "method=dorefa bits=w2a2 epochs=8 pretrain.epochs=10"):
        (config,) = compose.configurations(line.split())
        assert f"qbench {line}" in README
        assert f"outputs/{directory_name(run_identity(config))}\n" in README, directory_name(run_identity(config))


def test_keys_of_a_result_are_those_of_the_readme() -> None:
    (table,) = re.findall(r"^\| field of `result.json` \| what \|\n(.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    named = [key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted([*(field.name for field in fields(Result) if field.name != "run"), "sha256"])
    assert f"version of this format ({SCHEMA})" in table


def test_tables_of_results_are_those_of_their_records() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/readme_tables.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_subcommand_is_in_the_readme() -> None:
    for name in SUBCOMMANDS:
        assert re.search(rf"qbench {name}\b", README), name


def test_subcommands_of_the_readme_exist() -> None:
    lines = re.findall(r"^    qbench ([a-z]+)\b(?![=/@.])", README, re.MULTILINE)
    assert len(lines) >= 15
    assert set(lines) <= set(SUBCOMMANDS)


def test_conclusions_quoted_are_those_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = asked.run_compare(["docs/records/methods-glyphs.json"]).splitlines()
    quoted = re.findall(r"^    (w\d+a\d+g\d+: .*)$", README, re.MULTILINE)
    assert len(quoted) == 2
    assert set(quoted) <= set(lines)


def test_tables_are_filled() -> None:
    tables = re.findall(r"<!-- table: (.*?) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert tables
    for command, body in tables:
        assert f"`{command}`" in body, "run scripts/readme_tables.py"
        assert not re.search(r"^\| failed ", body, re.MULTILINE)


def test_speed_in_words_is_that_of_the_table() -> None:
    one_thread = README.partition("**Training step, one thread**")[2].partition("\n**")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \(.*?\) \| ([\d.]+) ", one_thread, re.MULTILINE)
    ratios = {name: figures for name, *figures in rows}
    text = " ".join(README.split())
    in_words = re.findall(r"takes (\S+)x the float step time.*? and (\S+)x that.*? it takes (\S+)x\. ", text)
    assert in_words == [(*ratios["dorefa w2a2"], ratios["peer: DoReFa W2A2 as everybody writes it"][0])]


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


def test_named_files_exist() -> None:
    paths = set(re.findall(r"\b((?:scripts|tests|docs|conf|qbench)/[\w./-]*\w)", README)) - {"scripts/NAME.py"}
    assert len(paths) > 20
    for path in sorted(paths):
        assert (ROOT / path).exists(), path


def test_scripts_are_sound() -> None:
    for name in ("qbench", "test", "install"):
        assert subprocess.run(["bash", "-n", ROOT / "scripts" / name]).returncode == 0
    paths = [*(ROOT / "scripts").glob("*.py"), ROOT / "scripts" / "reliability", ROOT / "scripts" / "bench" / "run"]
    assert len(paths) >= 10
    for path in paths:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
    assert sys.version_info >= (3, 11)
