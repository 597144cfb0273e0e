"""Text from other people's files, in every format: no control sequence, markup, formula or command."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Configure
from helpers import plant

from qbench.report.comparison.compare import compare
from qbench.report.html.page import html
from qbench.report.plots.plots import plot
from qbench.report.tables import escape
from qbench.report.tables.run_row import row
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.reader import RunRecord, read
from qbench.runs.result import load_result, with_checksum

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",  # clears the terminal
    "\x9b31m",  # the same in one byte
    "a\r\nb\x0bc\x0cd\u2028e\u2029f\x85g",  # line ends
    "\u202egnp.exe\u200b",  # order of writing, zero width
    "\x00\ud800\ufffe",  # no XML
    "note\n\\input{/etc/passwd}",
    "\\input{/etc/passwd} $x$ ^^5cinput ~ # % & _ { }",
    "[1cm] *",
    "<img src=x onerror=alert(1)>",
    "</td><script>alert(1)</script><!-- --><?php ?>",
    "&lt;script&gt; &#60;b>",
    "[click](javascript:alert(1)) ![](http://example.com/a.png) [x]: http://example.com [a][b]",
    "a|b\\|c\\",
    '=HYPERLINK("http://example.com","x")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "\t=1+1",
    " =1+1",
    "＝1+1",  # noqa: RUF001
    "\"quoted\", 'text'",
    "$\\frac{$ _ ^",
]
TABLE = Table(("head <b>", "x\x1b"), [(text, text[::-1]) for text in HOSTILE], [], "title", list(HOSTILE))
TITLED = [TABLE, *(Table(("a", "b"), [("1", "2")], [], text) for text in HOSTILE)]


def has_control(text: str) -> bool:
    return any(not c.isprintable() for c in text if c != "\n")


@pytest.mark.parametrize("form", FORMATS)
def test_no_control_characters_in_any_format(form: str) -> None:
    assert not has_control(FORMATS[form](TITLED))
    assert not has_control(json.dumps(FORMATS[form](TITLED), ensure_ascii=False))


def test_text_has_one_line_per_row_and_note() -> None:
    lines = FORMATS["text"]([TABLE]).splitlines()
    assert len(lines) == 2 + 2 * len(HOSTILE)
    assert lines[2].startswith(r"\x1b[2J\x1b]0;title\x07"), "shown, not sent"


def test_markdown_has_no_html_no_links_and_all_its_columns() -> None:
    written = FORMATS["md"](TITLED)
    assert not re.search(r"(?<!\\)<[A-Za-z/!?]", written)
    assert not re.search(r"(?<!\\)\][(:\[]", written)
    assert not re.search(r"&(?!lt;|amp;)#?\w+;", written)
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(HOSTILE) + 3 * len(HOSTILE)
    for line in rows:
        assert re.sub(r"\\.", "", line).count("|") == 3, line
    assert "&lt;img src=x onerror=alert(1)>" in written


def test_csv_has_no_formulas_and_the_same_text() -> None:
    rows = list(csv.reader(io.StringIO(FORMATS["csv"](TITLED))))
    assert len(rows) == 1 + 3 * len(HOSTILE)
    for line in rows:
        for cell in line:
            assert not cell.lstrip().startswith(("=", "@", "＝", "＠")), cell  # noqa: RUF001
            assert not (cell.startswith(("+", "-")) and "cmd" in cell), cell
    assert '\'=HYPERLINK("http://example.com","x")' in [line[1] for line in rows]
    assert "\"quoted\", 'text'" in [line[1] for line in rows]


@pytest.mark.parametrize(
    "number", ["-1.25", "+0.50", "-", "97.25", "+1.20 ± 0.30", "-3.5 k", "-12 %", "1e-3", "+0.00", ""]
)
def test_csv_leaves_numbers_as_they_are(number: str) -> None:
    assert escape.csv(number) == number


def test_latex_has_no_commands() -> None:
    written = FORMATS["latex"](TITLED)
    assert not any(r"\input" in line for line in written.splitlines() if not line.startswith("%"))
    for line in written.splitlines():
        assert line.startswith(("%", "\\begin{tabular}", "\\end{tabular}")) or not line or (
            line in (r"\toprule", r"\midrule", r"\bottomrule") or line.endswith(r" \\")
        ), line  # fmt: skip
        if line.endswith(r" \\"):
            body = re.sub(
                r"\\textbackslash\{\}|\\textascii\w+\{\}|\$\\pm\$|\{[\[*]\}|\\[&%$#_{}]", "", line.removesuffix(r" \\")
            )
            assert body.count("&") == 1, line
            assert not set("\\%$#_{}~^") & set(body), body
            assert not line.startswith(("[", "*"))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_page_has_no_foreign_tags_or_control_characters() -> None:
    found, plain = Tags(), Tags()
    written = html(TITLED, [])
    found.feed(written)
    plain.feed(html([Table(("a", "b"), [("x", "y")] * len(HOSTILE), [], "t", ["n"] * len(HOSTILE)), *TITLED[1:]], []))
    assert sorted(found.found) == sorted(plain.found)
    assert not has_control(written.replace("\t", ""))


@pytest.fixture
def hostile_runs(configure: Configure) -> list[RunRecord]:
    """Return runs whose results hold hostile names of methods, networks, options, and reasons."""
    for i, text in enumerate(HOSTILE):
        path = plant(configure("method=dorefa", "bits=w2", f"seed={i}"), 95.0 + i / 100, 98.0)
        values = json.loads((path / "result.json").read_text()) | {
            "method": text,
            "options": {text: text},
            "notes": [text],
            "warnings": [text],
        }
        if "\ud800" not in text:
            values["model"] = text
        (path / "result.json").write_text(json.dumps(with_checksum(values)))
    return read([configure().out])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_plots_of_hostile_names_are_well_formed(hostile_runs: list[RunRecord], tmp_path: Path) -> None:
    assert sum(run.result is not None for run in hostile_runs) >= len(HOSTILE) - 1  # half a surrogate pair is refused
    tables = compare(hostile_runs)
    plot(tables, hostile_runs, tmp_path / "bits.svg")
    content = (tmp_path / "bits.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(content)
    assert not has_control(content)
    written = html(tables, hostile_runs)
    assert not has_control(written.replace("\t", ""))
    assert "<img src=x" not in written


def test_the_row_of_a_run_sends_nothing_to_the_terminal(hostile_runs: list[RunRecord]) -> None:
    results = [result for run in hostile_runs if (result := load_result(run.path))]
    for width in (None, 40):
        assert not has_control(row(results, width))
