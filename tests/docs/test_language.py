"""Words that this project's text does not use, because the field has a common word for what they meant.

Code, comments, messages, tests, YAML and documents are searched. Blocks that scripts print into documents from
measurements are left out, since they show what was printed at that time.
"""

import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

INSTEAD = {  # pattern -> what to write
    "anew": "again",
    "as good as each other": "equivalent",
    "as it asks": "as the method requires",
    "cannot be told": "is not significantly different from",
    "dearer": "slower, or costs more",
    "desk": "run context",
    "float parents?": "float baseline; pretrained weights for what is loaded",
    "front door": "entry point",
    "(?:has|have|had) nothing to ask": "not applicable",
    "held against": "compared with",
    "kept an eye on": "monitored",
    "ledger": "published figures, published rows",
    "logbook": "metrics logger",
    "lookout": "monitor",
    "made data": "synthetic data",
    "nobody can tell": "unknown",
    "nought": "zero",
    "of the float network's": "of the float baseline, or 1.15x the float step time",
    "reckon(?:ed|ing|s)?": "computed, estimated",
    "(?:ran|runs?|running) away": "exploding",
    "(?:sees?|saw) to it": "ensures",
    "sentinels": "health checks",
    "(?:stands?|stood) beside": "is next to",
    "told apart": "distinguished; significantly different",
    "told from": "distinguished from",
    "torn": "corrupt, truncated",
    "verbs?": "subcommand",
    "whoever": "the process that, the one that",
    "without a figure": "failed or unsupported",
}
FOLDERS = ("qbench", "conf", "docs", "scripts", "tests")
FILES = ("README.md", "CONTRIBUTING.md")
SUFFIXES = ("", ".css", ".html", ".ipynb", ".js", ".md", ".py", ".svg", ".toml", ".yaml")
PRINTED = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)


@cache
def texts() -> dict[Path, str]:
    """Return the text of every file that is searched, with what scripts printed into documents as empty lines."""
    paths = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    kept = (p for p in sorted(paths) if p != Path(__file__).resolve() and ROOT / "docs" / "records" not in p.parents)
    return {path: PRINTED.sub(lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8")) for path in kept}


def found(pattern: str) -> list[str]:
    """Return `file:line` for every place of a pattern; its words may be parted by a line break or a comment mark."""
    words = pattern.replace(" ", r"[\s#]+")
    search = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts().items()
        for match in search.finditer(text)
    ]


def test_files_are_read() -> None:
    assert len(texts()) > 300


@pytest.mark.parametrize("pattern", INSTEAD)
def test_word_is_not_used(pattern: str) -> None:
    places = found(pattern)
    assert not places, f"write {INSTEAD[pattern]!r}:\n" + "\n".join(places)
