"""The documents are correct: their commands and flags exist, their tables are those of the records, links work."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from pages import GUIDES, PAGES, commands, text
from torch import nn

import qbench
from qbench.cli import compare as asked
from qbench.cli.commands import SUBCOMMANDS
from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.methods import dorefa
from qbench.models import imagenet_resnet, mlp
from qbench.quant.fold import fold_quantized_weights
from qbench.quant.install import install
from qbench.runs.directory import directory_name
from qbench.runs.result import SCHEMA, Result

DOCS = ROOT / "docs"
TABLE = re.compile(r"<!-- table: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def slugs(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    lines = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    headings = [line.lstrip("#").strip() for line in lines if re.match(r"#{1,6} ", line)]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^()#:\s]*)(?:#([^()\s]+))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in slugs(target), f"{path}#{anchor}"


def test_named_files_exist() -> None:
    for page in GUIDES:
        paths = set(re.findall(r"(?<![\w/.])((?:scripts|tests|docs|conf|qbench)/[\w./-]*\w)", text(page)))
        paths -= {"scripts/NAME.py"}
        missing = [
            path for path in sorted(paths) if not (ROOT / path).exists() and not re.search("NAME|METHOD|PAPER", path)
        ]
        assert not [path for path in missing if path not in ("docs/methods",)], page


def test_every_page_is_in_a_toctree() -> None:
    listed = set(
        re.findall(r"^(?:[\w ]+ <)?([\w/-]+)>?$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES if DOCS in path.parents}
    assert listed == pages - {"index"} | {"methods/index"}


def test_every_command_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each command; of a sweep, compose as many combinations as make every value appear once."""

    def each_value_once(*axes: list[str]) -> list[tuple[str, ...]]:
        return [tuple(axis[min(i, len(axis) - 1)] for axis in axes) for i in range(max(map(len, axes)))]

    monkeypatch.chdir(tmp_path)
    for weights in ("resnet18.pth", "resnet20.th"):  # initial weights must exist
        Path(weights).touch()
    monkeypatch.setattr(compose, "product", each_value_once)
    lines = {tuple(words) for page in GUIDES for words in commands(page)}
    trained = [list(words) for words in lines if words[0] not in SUBCOMMANDS]
    planned = [list(words[1:]) for words in lines if words[0] == "plan"]
    assert len(trained) >= 15
    assert len(planned) >= 5
    for words in sorted([*trained, *planned]):
        prints = "--cfg" in words
        assert bool(compose.configurations(words)) is not prints, words


def test_flags_are_in_the_help_of_their_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [words for page in GUIDES for words in commands(page) if words[0] in SUBCOMMANDS]
    flags = {(words[0], word.partition("=")[0]) for words in lines for word in words if word.startswith("--")}
    assert len(flags) >= 8
    for name, flag in sorted(flags):
        assert cli([name, "--help"]) == 0
        assert flag in capsys.readouterr().out, (name, flag)


def test_subcommands_exist_and_are_all_explained() -> None:
    first = {words[0] for page in GUIDES for words in commands(page)}
    assert {word for word in first if "=" not in word and not word.startswith("-")} <= set(SUBCOMMANDS)
    words = " ".join(text(page) for page in GUIDES)
    for name in SUBCOMMANDS:
        assert re.search(rf"qbench\s{name}\b", words), name


def test_directories_are_those_that_the_commands_write() -> None:
    pages = {
        "method=dorefa bits.w=2": (ROOT / "README.md", DOCS / "tutorial.md"),
        "method=dorefa bits=w2a2 epochs=8 pretrain.epochs=10": (DOCS / "guides" / "understand-a-run.md",),
    }
    for line, named in pages.items():
        (config,) = compose.configurations(line.split())
        for page in named:
            assert f"qbench {line}" in text(page)
            assert f"outputs/{directory_name(run_identity(config))}\n" in text(page), page


def test_keys_of_a_result_are_those_of_the_page() -> None:
    page = text(DOCS / "reference" / "run-directory.md")
    (table,) = re.findall(r"^\| field of `result.json` \| what \|\n(.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    named = [key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted([*(field.name for field in fields(Result) if field.name != "run"), "sha256"])
    assert f"version of this format ({SCHEMA})" in table


def test_tables_of_results_are_those_of_their_records() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/tables.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_tables_are_filled() -> None:
    found = [table for page in GUIDES for table in TABLE.findall(page.read_text(encoding="utf-8"))]
    assert len(found) >= 10
    for command, body in found:
        assert body.count("\n| ") > 2, f"run scripts/tables.py: {command}"
        assert not re.search(r"^\| failed ", body, re.MULTILINE)


def test_conclusions_quoted_are_those_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = asked.run_compare(["docs/records/methods-glyphs.json"]).splitlines()
    page = text(DOCS / "guides" / "fair-comparison.md")
    quoted = re.findall(r"^    (w\d+a\d+g\d+: .*)$", page, re.MULTILINE)
    assert len(quoted) == 2
    assert set(quoted) <= set(lines)


def test_speed_in_words_is_that_of_the_table() -> None:
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    one_thread = page.partition("**Training step, one thread**")[2].partition("\n**")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \(.*?\) \| ([\d.]+) ", one_thread, re.MULTILINE)
    ratios = {name: figures for name, *figures in rows}
    in_words = re.findall(
        r"takes (\S+)x the float step time.*? takes (\S+)x the time.*? a step takes (\S+)x the time ",
        " ".join(page.split()),
    )
    assert in_words == [(*ratios["dorefa w2a2"], ratios["peer: DoReFa W2A2 as everybody writes it"][0])]


def test_a_training_loop_of_ones_own() -> None:
    (code,) = re.findall(
        r"```python\n(import qbench\nfrom qbench.methods .*?)```", text(DOCS / "guides" / "own-code.md"), re.DOTALL
    )
    model = mlp.build((1, 4, 4), 3, hidden=2, width=8)
    exec(code, {"model": model, "images": torch.randn(2, 1, 4, 4)})
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    assert model.get_submodule("fc2").weight_q(model.get_submodule("fc2").weight).unique().numel() <= 4


def test_folded_weights_load_into_a_plain_network() -> None:
    """As docs/guides/export.md says."""
    model = mlp.build((1, 4, 4), 3, hidden=2, width=8)
    install(dorefa.build(w=2), model)
    plain = mlp.build((1, 4, 4), 3, hidden=2, width=8)
    plain.load_state_dict(fold_quantized_weights(model).state_dict())
    images = torch.randn(5, 1, 4, 4)
    assert torch.equal(plain.eval()(images), model.eval()(images))
    assert plain.get_submodule("fc2").weight.unique().numel() <= 4


def test_transfer_to_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"```python\n(# my_transfer.py.*?)```", text(DOCS / "guides" / "transfer-learning.md"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    pretrained = imagenet_resnet.build((3, 64, 64), 1000, depth=18).state_dict()
    torch.save(pretrained, "resnet18.pth")
    module: dict[str, Callable[..., nn.Module]] = {}
    exec(code, module)
    net = module["build"]((3, 64, 64), 5)
    assert torch.equal(net.state_dict()["layer4.1.conv2.weight"], pretrained["layer4.1.conv2.weight"])
    assert net.get_submodule("fc").weight.shape == (5, 512)
    with torch.device("meta"):
        assert next(module["build"]((3, 64, 64), 5).parameters()).is_meta


def test_scripts_are_sound() -> None:
    for name in ("qbench", "test", "install", "docs"):
        assert subprocess.run(["bash", "-n", ROOT / "scripts" / name]).returncode == 0
    paths = [*(ROOT / "scripts").glob("*.py"), ROOT / "scripts" / "reliability", ROOT / "scripts" / "bench" / "run"]
    assert len(paths) >= 10
    for path in paths:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
    assert sys.version_info >= (3, 11)


def test_the_signatures_in_the_table_of_the_python_page_are_those_of_the_functions() -> None:
    rows = re.findall(r"^\| `qbench\.(\w+)\((.*?)\)` \|", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in qbench.__all__ if inspect.isfunction(getattr(qbench, name))}
    for name, arguments in rows:
        parameters = inspect.signature(getattr(qbench, name)).parameters.values()
        actual = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        assert f"({arguments})" == str(actual).replace("'", '"'), name
