"""docs/architecture.md: every folder stands in it, its paths exist, its picture is what the source says."""

import functools
import importlib.util
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from types import ModuleType

import pytest
from conftest import ROOT
from test_imports import IMPORTS, LAYERS, SUBLAYERS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = ROOT / "docs" / "architecture.svg"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_script", ROOT / "scripts" / "architecture.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.imports = functools.cache(module.imports)
    return module


def test_every_folder_stands_in_the_tree_in_order() -> None:
    tree = re.findall(r"^\| `([\w/.]+)` \|", PAGE.partition("## The tree")[2].partition("\n## ")[0], re.MULTILINE)
    expected = []
    for name in LAYERS:
        if (ROOT / "qbench" / name).is_dir():
            expected += [f"{name}/", *(f"{name}/{part}/" for part in SUBLAYERS.get(name, ()))]
        elif name != "__main__":
            expected.append(f"{name}.py")
    assert tree == expected


def test_paths_of_the_page_exist() -> None:
    paths = {
        path for path in re.findall(r"`([\w/]+(?:/|\.(?:py|svg)))`", PAGE) if not re.search("NAME|METHOD|PAPER", path)
    }
    assert len(paths) > 40
    missing = [path for path in sorted(paths) if not ((ROOT / path).exists() or (ROOT / "qbench" / path).exists())]
    assert not missing, missing


def test_picture_is_what_the_script_draws(script: ModuleType) -> None:
    assert PICTURE.read_text(encoding="utf-8") == script.svg(), "run scripts/architecture.py"


def test_picture_has_every_folder_once() -> None:
    texts = [node.text for node in ET.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")]
    assert all(texts.count(folder) == 1 for folder in LAYERS)


def test_script_reads_the_imports_that_the_test_reads(script: ModuleType) -> None:
    expected: dict[str, set[str]] = {folder: set() for folder in LAYERS}
    for module, names in IMPORTS.items():
        folder = module.partition("/")[0]
        expected[folder] |= {name.partition("/")[0] for name in names} - {folder}
    assert script.imports() == expected


def test_arrows_imply_every_import(script: ModuleType) -> None:
    drawn = script.arrows()

    def reached(folder: str) -> set[str]:
        return set().union(*({name} | reached(name) for name in drawn.get(folder, ())))

    for folder, names in script.imports().items():
        if folder not in script.FOUNDATION:
            assert names - set(script.FOUNDATION) <= reached(folder)
            assert drawn[folder] <= names


def test_rows_run_downwards(script: ModuleType) -> None:
    rows = script.rows(script.arrows())
    place = {item.folder: i for i, row in enumerate(rows) for item in row if item.folder}
    for folder, names in script.arrows().items():
        assert all(place[name] > place[folder] for name in names), folder


def test_boxes_of_a_row_do_not_overlap(script: ModuleType) -> None:
    rows = script.rows(script.arrows())
    script.place(rows)
    for row in rows:
        edges = [(item.x - item.width / 2, item.x + item.width / 2) for item in sorted(row, key=lambda item: item.x)]
        assert edges[0][0] >= 0
        assert edges[-1][1] <= script.WIDTH
        assert all(left[1] <= right[0] for left, right in pairwise(edges))
