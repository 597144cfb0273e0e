"""The hand-written documents, and the commands in them."""

import re
import shlex
from pathlib import Path

from conftest import ROOT

WRITTEN_BY_SCRIPTS = ("claims.md", "deviations.md", "papers.md", "configuration.md", "commands.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "methods"),
]
"""All documents but those that are made when the site is built."""
GUIDES = [path for path in PAGES if path.name not in WRITTEN_BY_SCRIPTS]


def text(path: Path) -> str:
    """Return a document without the tables that scripts print into it."""
    return re.sub(r"<!-- table: .*?<!-- end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Return the words of every `qbench ...` line in code blocks, and of inline commands with a key."""
    content = re.sub(r" \\\n\s*", " ", text(path))  # join lines that end with a backslash
    blocks = re.findall(r"^    (qbench .*)$", content, re.MULTILINE)
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", content, re.MULTILINE | re.DOTALL):
        blocks += re.findall(r"^(?:\$ |scripts/)?(qbench .*)$", block, re.MULTILINE)
    inline = re.findall(r"`(qbench [^`]*=[^`]*)`", content)
    found = [shlex.split(" ".join(line.split()), comments=True)[1:] for line in blocks + inline]
    return [
        words for words in found if not re.search(r"<|\bmy_|my\.|\.\.\.|NAME|METHOD|KEY|DIR|PATH|/RUN", " ".join(words))
    ]
