"""docs/papers.md: up to date and complete, its links work, and values from memory are marked."""

import dataclasses
import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import ROOT, composed

from qbench.bits import FLOAT
from qbench.config import registry
from qbench.config.schema import BitWidths
from qbench.experiment.builders import build_method
from qbench.papers.published_figures import papers
from qbench.papers.published_table import missing_requirements
from qbench.papers.row_types import PROVENANCES, Paper, PublishedRow

PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
RELATED: list[dict[str, Any]] = yaml.safe_load((ROOT / "docs" / "papers.yaml").read_text(encoding="utf-8"))["papers"]
EXPECTED = ("LQ-Nets", "DSQ", "QIL", "Mostly 4-bit", "ShrinkBench")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("papers_script", str(ROOT / "scripts" / "papers.py"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def table_rows(paper: Paper) -> list[dict[str, str]]:
    """Return the rows of a paper's table on the page, by column head."""
    lines = [line for line in SECTIONS[paper.name].splitlines() if line.startswith("| ")]
    head, *cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines] or [[]]
    return [dict(zip(head, row, strict=True)) for row in cells[1:]]


def row_of(paper: Paper, cell: str) -> PublishedRow:
    (row,) = (row for row in paper.rows if row.id == re.sub(r"\[(\w+)\].*", r"\1", cell))
    return row


# --- up to date


def test_the_page_is_up_to_date(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = script.page()
    assert page == PAGE, "run scripts/papers.py"
    monkeypatch.setattr(script, "page", lambda: page)  # it takes long
    assert script.main(["--check"]) == 0


@pytest.mark.full
def test_check_prints_what_would_change_and_writes_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "papers.md"
    page.write_text(PAGE.replace("# The papers", "# Papers"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    before = page.read_text(encoding="utf-8")
    assert script.main(["--check"]) == 1
    assert "-# Papers\n" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == before
    assert script.main([]) == 0
    assert page.read_text(encoding="utf-8") == PAGE
    page.unlink()
    assert script.main(["--check"]) == 1
    assert not page.exists()


# --- complete


def test_every_paper_has_its_section() -> None:
    for paper in papers():
        section = " ".join(SECTIONS[paper.name].replace("\n> ", " ").split())
        assert f"**{paper.title}.** {', '.join(paper.authors)}; {paper.year};" in section
        assert f"]({paper.link})" in section
        assert " ".join(paper.idea.split()) in section
        assert f"`qbench published --paper {paper.key}`" in section
        for part in ("Claimed", "Measured here", "Deviations"):
            assert f"**{part}**" in section, (paper.name, part)
        assert paper.affiliation in section or "Affiliation not known" in section
        assert (paper.affiliation_provenance == "verified") is (f"{paper.affiliation} (verified)" in section)


def test_every_method_appears_once_with_its_idea() -> None:
    for name in registry.names("method"):
        heads = re.findall(rf"^- \[`{name}`\]\(\.\./qbench/methods/{name}\.py\): ", PAGE, re.MULTILINE)
        assert len(heads) == 1, name
        assert " ".join(registry.sections(registry.card(name))["Idea"].split()) in " ".join(PAGE.split())
    for name in ("float", "ptq", "uniform"):
        assert f"[`{name}`]" in SECTIONS["Controls"]


def test_methods_are_listed_with_their_papers(script: ModuleType) -> None:
    found = {paper.key: script.methods_of(paper) for paper in papers()}
    assert found["xnor"] == ["xnor", "bwn"]
    assert found["slq"] == ["slq", "mlq", "eslq"]
    assert found["polino"] == ["qd", "dq"]
    listed = [name for methods in found.values() for name in methods]
    assert sorted([*listed, "float", "ptq", "uniform"]) == registry.names("method")


def test_what_is_quantized_follows_from_the_card(script: ModuleType) -> None:
    for name in registry.names("method"):
        config = composed(f"method={name}")
        supported = build_method(config.method, config.activation, config.bits.resolved()).supported_bits
        known = "".join(key for key in "wag" if any(k in supported.get(key, ()) for k in range(1, FLOAT)))
        assert script.quantized_letters(name) == known, f"{name}: the card's Bits, as `w 1 or 32, a 32, g 32`"


def test_every_claim_and_every_known_deviation_appears() -> None:
    for path in (ROOT / "conf" / "experiment" / "claims").glob("*.yaml"):
        assert f"- [{path.stem}](claims.md#{path.stem}): " in PAGE, path
    for name in registry.names("method"):
        for deviation in registry.known_deviations(name):
            assert f"- `{deviation}` (" in PAGE, (name, deviation)


def test_the_number_of_runs_is_stated() -> None:
    for paper in papers():
        ran = sum(bool(row.measured) for row in paper.rows)
        ready = [row for row in paper.rows if not missing_requirements(row)]
        own = sum(any(not measured.departs for measured in row.measured) for row in ready)
        evaluated = ran - sum(bool(row.measured) for row in ready)
        counts = f"{ran} rows have been measured here, {own} of them with their own recipe"
        counts += f" and {evaluated} by evaluating the authors' checkpoints" if evaluated else ""
        counts += f". {len(ready)} rows have an exp"
        assert counts in " ".join(SECTIONS[paper.name].split())


# --- links


def test_links_work(script: ModuleType) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGE)
    assert len(links) > 100
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            assert not anchor
            continue
        target = (ROOT / "docs" / path).resolve() if path else ROOT / "docs" / "papers.md"
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(script.slug, headings), link


def test_lines_are_short_and_lists_are_well_formed() -> None:
    for line in PAGE.splitlines():
        assert len(line) <= 120 or line.startswith("|"), line
        marker = re.match(r"\s*([-+*>]|\d+\.) ", line)
        assert marker is None or line.startswith(("- ", "> ", "  - Widths: ", "  - Formulas: ")), line


# --- provenance


def test_values_from_memory_are_marked() -> None:
    seen = 0
    for paper in papers():
        for cells in table_rows(paper):
            row = row_of(paper, cells["row"])
            assert cells["provenance"] == row.provenance
            assert cells["ran by"] == row.ran_by
            remembered = row.provenance.startswith("memory")
            assert cells["claimed"].startswith("~") is remembered, row.id
            base = (row.baseline_provenance or row.provenance).startswith("memory")
            assert cells["float"] == "-" or cells["float"].startswith("~") is base, row.id
            assert cells["to float"] == "-" or cells["to float"].startswith("~") is (remembered or base), row.id
            assert f"{row.value:g}" in cells["claimed"]
            seen += remembered
    assert seen > 10


def test_recipes_from_memory_are_marked() -> None:
    page = " ".join(PAGE.split())
    texts = [t for p in papers() for r in p.recipes.values() if "memory" in r.provenance for t in (*r.open, *r.departs)]
    assert texts
    for text in texts:
        rest = page.partition(text[1:])[2]
        assert rest.startswith(" (from memory).") or re.search("memory|remember", text), text


def test_affiliations_from_memory_are_marked() -> None:
    text = " ".join(PAGE.split())
    for paper in papers():
        if paper.affiliation_provenance.startswith("memory"):
            assert f"{paper.affiliation} (from memory)." in text


def changed_row(**change: Any) -> PublishedRow:
    bits = BitWidths(2, 32, 32)
    base = PublishedRow(
        paper="ttq", id="a", method="ttq", dataset="cifar10", net="resnet20", bits=bits, metric="top1_error", value=9.0,
        baseline=8.0, ran_by="authors' paper", source="s", provenance="verified", recipe="cifar",
    )  # fmt: skip
    return dataclasses.replace(base, **change)


def chosen(script: ModuleType, *rows: PublishedRow) -> list[str]:
    (ttq,) = (paper for paper in papers() if paper.key == "ttq")
    return [row.id for row in script.shown_rows(dataclasses.replace(ttq, rows=rows))]


@pytest.mark.parametrize(
    "worse",
    [
        {"provenance": "memory-high", "value": 1.0},
        {"ran_by": "authors' repository", "value": 1.0},
        {"ran_by": "third party: X", "value": 1.0},
        {"recipe": "", "value": 1.0},
        {"metric": "top5_error", "value": 1.0},
        {"bits": BitWidths(1, 1, 1), "value": 1.0},
        {"value": 9.5},
    ],
)
def test_one_row_per_network_by_the_stated_rule(script: ModuleType, worse: dict[str, Any]) -> None:
    assert chosen(script, changed_row(id="worse", **worse), changed_row()) == ["a"]


def test_rows_without_value_and_top5_rows_are_not_shown(script: ModuleType) -> None:
    assert chosen(script, changed_row(value=None)) == []
    assert chosen(script, changed_row(top5_of="b")) == []
    assert chosen(script, changed_row(method="bnn")) == []


def test_at_most_six_rows(script: ModuleType) -> None:
    nets = ("resnet20", "resnet32", "resnet44", "resnet56", "vgg_small", "nin", "wrn_28_10", "wrn_22_8")
    assert len(chosen(script, *(changed_row(net=net) for net in nets))) == 6
    assert all(len(table_rows(paper)) <= 6 for paper in papers())


def test_tables_of_documents_are_read_by_column_head(script: ModuleType, tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "| other | n |\n| --- | --- |\n| a | 1 |\n\n| claim | what |\n| --- | ---: |\n| a: b | 2 |\n"
        "| c | \\|x\\| and \\|y\\| |\n\n| d | 3 |\n",
        encoding="utf-8",
    )
    found = script.table_rows(document, "claim")
    assert [row["claim"] for row in found] == ["a: b", "c"]
    assert found[0]["what"] == "2"


def test_border_of_a_comparison(script: ModuleType) -> None:
    assert script.border({"arms": "method=inq - float baseline > 0"}) == ""
    assert script.border({"arms": "method=inq - float baseline > -0.5"}) == " (claimed above -0.5)"
    assert script.border({"arms": "method=inq - method=float within 0.5"}) == " (claimed within 0.5)"


# --- papers that are not implemented


def test_expected_papers_are_listed() -> None:
    names = [paper["name"] for paper in RELATED]
    assert set(EXPECTED) <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("paper", RELATED, ids=lambda paper: paper["name"])
def test_a_related_paper_is_complete_and_marked(paper: dict[str, Any]) -> None:
    assert paper["status"] == "not implemented"
    (entry,) = re.findall(rf"^- \*\*{re.escape(paper['name'])}\*\*, .*?(?=^- |^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    entry = " ".join(entry.split())
    assert entry.startswith(f"- **{paper['name']}**, *not implemented*. ")
    assert f"]({paper['link']})" in entry
    assert "*Nearest here:* " in entry
    assert str(paper["year"]) in paper["venue"]
    assert paper["authors"]
    assert paper["link"] not in {other.link for other in papers()}
    assert re.search(r"\[`\w+`\]\(|qbench", entry.partition("*Nearest here:* ")[2])
    assert set(paper["provenance"]) == {"paper", "link"}
    known = [*paper["provenance"].values(), *(fact["provenance"] for fact in paper["facts"])]
    assert set(known) <= set(PROVENANCES)
    for fact in paper["facts"]:
        remembered = fact["provenance"].startswith("memory")
        assert not (remembered and re.search(r"\d", fact["says"])), "a figure from memory"
        assert (f"{fact['says'].removesuffix('.')} (from memory)." in entry) is remembered


def test_every_group_has_papers(script: ModuleType) -> None:
    assert {paper["group"] for paper in RELATED} == set(script.texts()["groups"])
