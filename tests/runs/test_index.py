"""The index file of many runs: what it saves, and that it is never believed against the runs' own files."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Configure, tiered
from helpers import plant

from qbench.report.comparison.compare import compare
from qbench.report.comparison.pairs import conclude
from qbench.report.tables.table import as_json
from qbench.runs import index
from qbench.runs.index import INDEX
from qbench.runs.reader import read, read_run
from qbench.runs.result import Result, load_result, store_result, with_checksum
from qbench.system import files


@pytest.fixture
def runs(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Six runs in `tmp_path`. An index file is written for so few runs and for files of any age."""
    monkeypatch.setattr(index, "MIN_RUNS", 1)
    monkeypatch.setattr(index, "MIN_AGE_SECONDS", -1)
    words = [(method, seed) for method in ("dorefa", "ttq") for seed in range(3)]
    return [plant(configure(f"method={m}", f"seed={s}"), 90.0 + s) for m, s in words]


def counted_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every path is added whose result.json is parsed from now on."""
    loaded: list[Path] = []

    def load(path: Path) -> Result | None:
        loaded.append(path)
        return load_result(path)

    monkeypatch.setattr(index, "load_result", load)
    return loaded


def test_results_from_the_index_equal_those_of_the_files(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read([str(tmp_path)])
    loaded = counted_loads(monkeypatch)
    second = read([str(tmp_path)])
    assert not loaded
    assert first == second == sorted((read_run(path) for path in runs), key=lambda run: run.path)
    assert as_json(conclude(compare(first))) == as_json(conclude(compare(second)))
    results = [run.result for run in second if run.result]
    assert len({id(result.protocol.keys) for result in results}) == 1, "equal values are one object"


CHANGES = ["value", "same size and modification time", "copy", "damage", "gone"]


@pytest.mark.parametrize("change", tiered(CHANGES, ["same size and modification time", "damage"]))
def test_a_changed_file_is_read_again(
    change: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read([str(tmp_path)])
    path, file = runs[0], runs[0] / "result.json"
    before, status = load_result(path), file.stat()
    assert before is not None
    if change == "damage":
        file.write_text(file.read_text()[:-10])
    elif change == "gone":
        file.unlink()
    elif change == "copy":  # another inode
        os.replace(Path(file.rename(path / "old")), path / "old2")
        file.write_bytes((path / "old2").read_bytes())
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "value":
        store_result(path, replace(before, seed=7))
    else:  # in place, so that the inode stays the same
        values = with_checksum((files.read_json(file) or {}) | {"seed": 3})
        file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    if change == "same size and modification time":
        assert (file.stat().st_size, file.stat().st_ino) == (status.st_size, status.st_ino)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    loaded = counted_loads(monkeypatch)
    found = {run.path: run for run in read([str(tmp_path)])}
    assert loaded == ([] if change == "gone" else [path])
    expected = read_run(path)
    assert found.get(path, expected) == expected
    if "value" in change or "same" in change:
        result = found[path].result
        assert result is not None
        assert result.seed == (7 if change == "value" else 3)


def test_a_damaged_or_foreign_index_is_ignored(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read([str(tmp_path)])
    file = tmp_path / INDEX
    whole = file.read_bytes()
    foreign = b"\x93\xa1x\x80\x90"  # the version "x", no values, no rows
    broken = [whole[:-1], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"\0" * 5000]
    for content in [*broken, hashlib.sha256(foreign).digest() + foreign]:
        file.write_bytes(content)
        with monkeypatch.context() as patch:
            loaded = counted_loads(patch)
            assert read([str(tmp_path)]) == expected
        assert len(loaded) == len(runs)
        assert file.read_bytes() == whole, "the index is written again"


def test_another_version_of_the_code_ignores_the_index(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read([str(tmp_path)])
    monkeypatch.setattr(index, "_version", lambda: "other")
    loaded = counted_loads(monkeypatch)
    read([str(tmp_path)])
    assert len(loaded) == len(runs)


def test_a_directory_that_cannot_be_written_to_has_no_index(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(read([str(tmp_path)])) == len(runs)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.glob(f"*{INDEX}*"))


def test_few_runs_and_new_files_are_not_indexed(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MIN_RUNS", len(runs) + 1)
    read([str(tmp_path)])
    assert not (tmp_path / INDEX).exists()
    monkeypatch.setattr(index, "MIN_RUNS", 1)
    monkeypatch.setattr(index, "MIN_AGE_SECONDS", 3600)
    read([str(tmp_path)])
    assert not (tmp_path / INDEX).exists()


def test_a_run_that_is_gone_leaves_the_index(runs: list[Path], tmp_path: Path) -> None:
    read([str(tmp_path)])
    size = (tmp_path / INDEX).stat().st_size
    (runs[0] / "result.json").unlink()
    read([str(tmp_path)])
    assert (tmp_path / INDEX).stat().st_size < size
    (runs[1] / "result.json").unlink()
    assert sum(run.status == "done" for run in read([str(tmp_path)])) == len(runs) - 2


def test_unusual_values_survive_the_index(runs: list[Path], tmp_path: Path) -> None:
    """Whole floats stay floats, big integers stay exact, and text keeps its letters."""
    before = load_result(runs[0])
    assert before is not None
    options = {"a": 1.0, "b": 1, "c": 2**63, "d": "ü\x1b€😀", "e": [None, True, 1e-300], "f": {"g": -0.0}}
    store_result(runs[0], replace(before, options=options, warnings=["w"] * 2))
    first, second = ({run.path: run for run in read([str(tmp_path)])}[runs[0]].result for _ in range(2))
    assert first is not None
    assert second is not None
    assert json.dumps(second.options) == json.dumps(first.options) == json.dumps(options)
    assert files.read_json(runs[0] / "result.json") is not None
    assert second.warnings == ["w"] * 2


def test_runs_are_sorted_folder_by_folder(runs: list[Path], tmp_path: Path) -> None:
    """A folder comes before folders whose names continue its name, also with characters that sort before a slash."""
    names = [Path("b", "x"), Path("b-1", "x"), Path("b.c", "x"), Path("b", "x-1"), Path("a", "z")]
    for name in names:
        shutil.copytree(runs[0], tmp_path / "sorted" / name)
    found = [run.path.relative_to(tmp_path / "sorted") for run in read([str(tmp_path / "sorted")])]
    assert found == sorted(names, key=lambda path: path.parts)
    assert found[:3] == [Path("a", "z"), Path("b", "x"), Path("b", "x-1")]
