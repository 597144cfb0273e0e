"""The documentation site builds without warnings and has a page for each method."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT

from qbench.config import groups

pytestmark = pytest.mark.full


class Links(HTMLParser):
    """Collects the local links and pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value and not value.startswith(("http", "#", "mailto:", "data:")):
                self.found.add(value.partition("#")[0].partition("?")[0])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    words = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", str(folder / "trees")]
    done = subprocess.run(
        [*words, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True, env=environment, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


def test_every_method_has_a_page_with_card_picture_and_results(site: Path) -> None:
    for name in groups.option_names("method"):
        page = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert f"{name}.png" in page
        for section in ("Method card", "Forward", "Deviations", "Results"):
            assert section in page, (name, section)
        assert re.search(rf"docs/records/\S+\.json method={name}", page), name
    assert "alexnet_w1a2g6" in (site / "methods" / "dorefa.html").read_text(encoding="utf-8")


def test_no_link_is_dead(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        links = Links()
        links.feed(page.read_text(encoding="utf-8"))
        dead = [link for link in links.found if link and not (page.parent / link).exists()]
        assert not dead, (page.name, dead)


def test_the_first_page_is_the_readme_and_leads_to_all_parts(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "Compare methods for low-precision CNNs under one protocol" in page
    for part in ("Guides", "Methods", "Results", "Reference", "Development"):
        assert part in page
