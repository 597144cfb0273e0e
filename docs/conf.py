"""Sphinx configuration of the documentation site; `scripts/docs` builds it.

Pages in docs/ are written for GitHub. Links that leave docs/ are rewritten here. Three pages come from files in the
root folder, one from a notebook, and the pages of methods are generated.
"""

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import method_pages  # noqa: E402

method_pages.write(DOCS / "methods")

project = "qbench"
author = "The qbench authors"
release = importlib.metadata.version("qbench-papers")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["records"]
html_theme = "furo"
html_title = "qbench"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
highlight_language = "none"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "literal"  # docstrings mark code with single backquotes

INSERTED = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "notebook": "docs/tutorial.ipynb",
}
"""Page of the site -> file that the page shows."""
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()#:\s]+)(#[^()\s]*)?\)")


def site_path(target: Path) -> Path:
    """Return the file of the site that shows a file of the repository; the file itself if there is none."""
    if target.parent == ROOT / "qbench" / "methods":
        return DOCS / "methods" / f"{target.stem}.md"
    return next((DOCS / f"{name}.md" for name, source in INSERTED.items() if target == ROOT / source), target)


def markdown(file: Path) -> str:
    """Return the text of a Markdown file, or the cells of a notebook as Markdown."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)


def adapt(app: Sphinx, docname: str, source: list[str]) -> None:
    """Insert a file into its page, and rewrite links to files. A link to a folder becomes its text."""
    page = DOCS / f"{docname}.md"
    origin = ROOT / INSERTED[docname] if docname in INSERTED else page

    def rewritten(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = (origin.parent / link).resolve()
        if target.is_dir():
            return text
        if target.exists():
            link = os.path.relpath(site_path(target), page.parent)
        return f"[{text}]({link}{anchor})"

    if origin != page:
        toctrees = source[0] if docname == "index" else ""
        source[0] = f"{markdown(origin)}\n{toctrees}"
    source[0] = LINK.sub(rewritten, source[0])


def setup(app: Sphinx) -> None:
    """Connect the adaptation of pages."""
    app.connect("source-read", adapt)
