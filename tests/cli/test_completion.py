"""Completion: bash is driven as its line editor would drive it, and the candidates of single lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from qbench.cli.completion import BASH_FUNCTION, candidates
from qbench.cli.main import main
from qbench.cli.parsers import PARSERS
from qbench.config.groups import option_names

DRIVER = """
try() {
    COMP_LINE="$1" COMP_POINT=${#1}
    shift
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _qbench_complete qbench
    echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def bash(tmp_path: Path) -> str:
    """A script that switches completion on by the documented line, with this checkout's command as `qbench`."""
    command = tmp_path / "qbench"
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m qbench "$@"\n')
    command.chmod(0o755)
    return f'PATH={tmp_path}:$PATH\neval "$(qbench completion bash)"\n{DRIVER}'


def test_bash_completes(bash: str) -> None:
    """The second part of each call is what bash makes of the line: it ends words at `=`."""
    calls = {
        "try 'qbench comp' qbench comp": "compare completion",
        "try 'qbench compare --format ' qbench compare --format ''": "csv json latex md record text",
        "try 'qbench compare --format=la' qbench compare --format = la": "latex",
        "try 'qbench method=dor' qbench method = dor": "dorefa",
        "try 'qbench -m method=dorefa,tt' qbench -m method = dorefa,tt": "dorefa,ttq",
        "try 'qbench bits=w2 optim.lr' qbench bits = w2 optim.lr": "optim.lr= optim.lr_end=",
        "try 'qbench compare no' qbench compare no": "",
        "complete -p qbench": "complete -o default -F _qbench_complete qbench",
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", bash + "\n".join(calls)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert dict(zip(calls, done.stdout.splitlines(), strict=True)) == calls


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qbench comp", ["compare", "completion"]),
        ("qbench help set", ["settle"]),
        ("qbench inspect", ["inspect"]),
        (
            "qbench inspect RUN --",
            ["--bn-stats", "--device", "--format", "--help", "--images", "--sort", "--trust", "--weights"],
        ),
        ("qbench inspect RUN --sort ", ["leave-one-in", "leave-one-out", "order", "sqnr"]),
        ("qbench inspect RUN --sort leave-one-i", ["leave-one-in"]),
        ("qbench inspect RUN --images ", []),
        ("qbench inspect RUN --bn-stats=k", ["--bn-stats=keep"]),
        ("qbench compare out --columns accuracy,s", ["accuracy,speed"]),
        ("qbench compare out --sort eq", ["equal-bytes"]),
        ("qbench compare out --sort to", ["top-1"]),
        ("qbench inspect RUN --device=c", ["--device=cpu", "--device=cuda"]),
        ("qbench compare ", []),
        ("qbench compare out method=ls", ["method=lsq"]),
        ("qbench published --paper t", ["ttq", "twn"]),
        ("qbench published --prov", ["--provenance"]),
        ("qbench describe xn", ["xnor"]),
        ("qbench plot --out ", []),
        ("qbench list me", ["methods"]),
        ("qbench list runs ", []),
        ("qbench completion ", ["bash", "query"]),
        ("qbench --cfg ", ["all", "hydra", "job"]),
        ("qbench --multi", ["--multirun"]),
        ("qbench method=", [f"method={name}" for name in sorted(option_names("method"))]),
        ("qbench activation=hw", ["activation=hwgq"]),
        ("qbench optim@pretrain.optim=adam_", ["optim@pretrain.optim=adam_cosine", "optim@pretrain.optim=adam_step"]),
        ("qbench experiment=lsq/resnet18_w2", ["experiment=lsq/resnet18_w2a2"]),
        ("qbench runtime.num", ["runtime.num_workers="]),
        ("qbench method=dorefa runtime.num_workers=", ["runtime.num_workers=2"]),
        ("qbench plan method=inq method.part", ["method.partition="]),
        ("qbench nosuch=1 runtime.num", []),
    ],
)  # fmt: skip
def test_candidates(line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.chdir(tmp_path)
    assert candidates(line) == words


def test_a_place_is_completed_by_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a directory matches, no key is offered, so that bash completes the directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_LINE", "")
    (tmp_path / "outputs").mkdir()
    assert candidates("qbench compare ou") == []
    assert "out=" in candidates("qbench ou")


def test_the_cursor_may_stand_inside_the_line() -> None:
    assert candidates("qbench compa out --format md", str(len("qbench compa"))) == ["compare"]


def test_the_first_word_is_a_subcommand_or_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "")
    words = candidates("qbench ")
    assert {*PARSERS, "help", "method=", "experiment=", "seed=", "optim."} <= set(words)
    assert not [word for word in words if word.startswith("hydra")]


def test_the_subcommand_prints_the_function_and_the_candidates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == BASH_FUNCTION + "\n"
    monkeypatch.setenv("COMP_LINE", "qbench sens")
    monkeypatch.delenv("COMP_POINT", raising=False)
    assert main(["completion", "query"]) == 0
    assert capsys.readouterr().out == "sensitivity\n"
    monkeypatch.setenv("COMP_LINE", "qbench nosuchword")
    assert main(["completion", "query"]) == 0
    assert capsys.readouterr().out == ""
