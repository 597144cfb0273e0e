"""Damaged logs: only corrupt lines are lost, and messages report them (R20)."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damaged_runs
import pytest
from conftest import counted, tiered
from damaged_runs import compose_config, digest, directory, run_config

from qbench.cli.main import main as cli
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting_table import settings_of
from qbench.runs.event_files import RECORD_OVERHEAD
from qbench.runs.reader import FROM_LOGS, read, read_run
from qbench.runs.result import load_result

whole = damaged_runs.whole
interrupted = damaged_runs.interrupted
copy_of = damaged_runs.copy_of


def copy_logs(whole: Path, out: Path, *, events: bool = False) -> Path:
    """Copy only the logs of dorefa's run: metrics.jsonl and config.yaml, or the event files."""
    source = directory(whole)
    path = out / source.parent.name / source.name
    path.mkdir(parents=True)
    for file in source.iterdir():
        if file.name.startswith("events.") if events else file.name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(file, path / file.name)
    return path


def damaged_metrics(data: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield metrics.jsonl cut at each of its last 200 bytes and elsewhere, with garbage inside, and
    doubled.
    """
    chance = random.Random(seed)
    for size in [*range(len(data) - 200, len(data)), *(chance.randrange(len(data)) for _ in range(count)), 0]:
        yield f"cut to {size}", data[:size]
    garbage = (
        b"garbage\n",
        b"\0" * 512,
        b"\xff\xfe\xc3\x28\n",
        b"\n\n\n",
        b"[" * 10**5 + b"\n",
        b"{}\n",
        b"3\n",
        b'"\n',
    )
    garbage += (
        b'{"kind": "epoch"}\n',
        b'{"kind": "final"}\n',
        b'{"kind": NaN}\n',
        b'{"kind": "final", "test_top1": "x"}\n',
    )
    for _ in range(max(1, count // 10)):
        for piece in garbage:
            lines = data.splitlines(keepends=True)
            at = chance.randrange(len(lines) + 1)
            yield f"{piece[:20]!r} before line {at}", b"".join([*lines[:at], piece, *lines[at:]])
            at = chance.randrange(len(data))
            yield f"{piece[:20]!r} at {at}", data[:at] + piece + data[at:]
    for _ in range(count):
        changed = bytearray(data)
        start = chance.randrange(len(data))
        stop = min(len(data), start + chance.randrange(1, 100))
        changed[start:stop] = chance.randbytes(stop - start)
        yield f"random bytes from {start} to {stop}", bytes(changed)
    yield "twice", data + data


def readable(data: bytes) -> tuple[list[Any], int]:
    """Return the JSON objects, and the number of lines that are not objects."""
    objects, other = [], 0
    for line in data.split(b"\n"):
        try:
            value = json.loads(line, parse_constant=lambda word: [][0])
        except (ValueError, RecursionError, IndexError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            other += bool(line)
    return objects, other


@pytest.mark.parametrize("count", tiered([5, 20, 300], [5]))
def test_compare_skips_only_corrupt_lines_and_reports_their_number(whole: Path, tmp_path: Path, count: int) -> None:
    path = copy_logs(whole, tmp_path / "out")
    file, tried = path / "metrics.jsonl", 0
    good = file.read_bytes()
    stored = load_result(directory(whole))
    assert stored is not None
    assert stored.final is not None
    for what, data in damaged_metrics(good, 6, count):
        case = f"seed 6: {what}"
        file.write_bytes(data)
        objects, other = readable(data)
        (found,) = read([str(tmp_path / "out")])
        finals = [r for r in objects if r.get("kind") == "final"]
        if finals and isinstance(finals[-1].get("test_top1"), float):
            assert (found.status, found.notes) == ("done", [FROM_LOGS]), case
            assert found.result is not None, case
            assert found.result.final is not None, case
            if what.startswith("cut"):
                assert found.result.final.test == stored.final.test, case
        elif not finals:
            assert found.status == "unfinished", case
            epochs = sum(r.get("kind") == "epoch" for r in objects)
            assert found.reason == (f"{epochs} epochs done" if epochs else "no epoch done"), case
        expected = [f"metrics.jsonl: {other} line{'s' * (other > 1)} cannot be read"] if other else []
        assert found.unread == expected, case
        tables = compare([found])
        assert all(any(line in note for table in tables for note in table.notes) for line in expected), case
        tried += 1
    if count == 300:
        counted(f"R20 metrics.jsonl: {tried} corrupt copies compared, 0 tracebacks, lost lines counted")


def test_compare_with_damaged_files_of_every_kind(
    whole: Path, copy_of: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The result has priority; if it is corrupt, compare reads the logs and reports it."""
    stored = compare(read([str(whole)]))
    out = copy_of(whole)
    path = directory(out)
    (path / "metrics.jsonl").write_bytes(b"\xff\0garbage")
    for events in path.glob("events.*"):
        events.write_bytes(b"garbage")
    accuracies = [[s.top1.mean for s in settings_of(table)] for table in stored]
    assert [[s.top1.mean for s in settings_of(table)] for table in compare(read([str(out)]))] == accuracies
    shutil.rmtree(out)
    out = copy_of(whole)
    path = directory(out)
    text = (path / "result.json").read_bytes()
    for data in (text[:-30], b"[" * 10**5, b"", b"\xff", text.replace(b"dorefa", b"dorefb", 1)):
        (path / "result.json").write_bytes(data)
        found = read_run(path)
        assert (found.status, found.notes) == ("done", [FROM_LOGS])
        assert found.unread == ["result.json is corrupt or has another version of the format"]
        assert cli(["compare", str(out)]) == 0
        assert f"{path.name}: result.json is corrupt" in capsys.readouterr().out
    for name in ("metrics.jsonl", "config.yaml", "result.json"):
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
        assert cli(["compare", str(out)]) == 0
        (path / name).rmdir()
        os.mkfifo(path / name)
        assert cli(["compare", str(out)]) == 0
        capsys.readouterr()
    for events in path.glob("events.*"):
        events.unlink()
        events.mkdir()
    assert read_run(path).status == "corrupt"


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.full)], ids=["fast", "full"])
def test_compare_from_damaged_event_files(whole: Path, tmp_path: Path, count: int) -> None:
    path = copy_logs(whole, tmp_path / "out", events=True)
    (file,) = path.glob("events.*")
    good, chance = file.read_bytes(), random.Random(7)
    (intact,) = read([str(tmp_path / "out")])
    assert intact.result is not None
    assert (intact.status, intact.unread) == ("done", [])
    final = intact.result.final
    assert final is not None
    kinds = {"done": 0, "unfinished": 0, "corrupt": 0}
    cases = [("emptied", b""), ("garbage", b"garbage"), ("longer", good + b"junk"), ("one less", good[:-1])]
    for _ in range(count):
        size = chance.randrange(len(good))
        cases.append((f"cut to {size}", good[:size]))
        bit = chance.randrange(8 * len(good))
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        cases.append((f"bit {bit} flipped", bytes(changed)))
    for what, data in cases:
        case = f"seed 7: {what}"
        file.write_bytes(data)
        (found,) = read([str(tmp_path / "out")])
        kinds[found.status] += 1
        compare([found])
        if data:
            assert found.unread, case
            assert found.unread[0].endswith("bytes cannot be read"), case
        if found.status == "done":
            assert found.result is not None, case
            assert found.result.final is not None, case
            assert found.result.final.test == final.test, case
            assert found.result.final.val in (final.val, None), case
        else:
            assert found.reason, case
    assert kinds["unfinished"] > count / 3, "many are cut before the results, which come before the figure"
    assert kinds["done"] > count / 2, "most flips are in records that are not needed"
    if count == 300:
        counted(f"R20 event files: {len(cases)} truncations and flips compared, 0 tracebacks: {kinds}")


LARGE = 50_000_000


LARGE_FILES = ["zeros", "noise", "small numbers", "the first length", "a content"]


@pytest.mark.parametrize("what", tiered(LARGE_FILES, ["noise", "the first length"]))
def test_a_large_damaged_event_file_is_read_quickly(what: str, whole: Path, tmp_path: Path) -> None:
    path = copy_logs(whole, tmp_path, events=True)
    (file,) = path.glob("events.*")
    good, noise = file.read_bytes(), random.Random(9).randbytes(LARGE)
    data = {
        "zeros": good + bytes(LARGE),
        "noise": good + noise,
        "small numbers": good + b"\1\0\0\0\0\0\0\0" * (LARGE // 8),  # they look like lengths
        "the first length": b"\xff" + good[1:] + noise,
        "a content": good[:12] + b"\xff" + good[13:] + noise,
    }[what]
    read_run(path)  # imports
    file.write_bytes(data)
    began = time.process_time()
    found = read_run(path)
    assert time.process_time() - began < 5
    first = RECORD_OVERHEAD + int.from_bytes(good[:8], "little")
    lost = LARGE + (first if what in ("the first length", "a content") else 0)
    assert found.unread == [f"{file.name}: {lost:,} bytes cannot be read"]
    assert found.status == "done", "the results are before the damage"


@pytest.mark.parametrize("count", tiered([1, 4, 60], []))
def test_a_resumed_run_does_not_append_to_a_corrupt_line(
    whole: Path, interrupted: Path, copy_of: Callable[[Path], Path], count: int
) -> None:
    expected, chance = digest(whole), random.Random(8)
    undamaged = [without_seconds(line) for line in (directory(whole) / "metrics.jsonl").read_text().splitlines()]
    source = (directory(interrupted) / "metrics.jsonl").read_bytes()
    assert source.count(b"\n") >= 2
    every = list(damaged_metrics(source, 8, 20))
    for what, data in [("removed", None), *chance.sample(every, count)]:
        case = f"seed 8: {what}"
        out = copy_of(interrupted)
        file = directory(out) / "metrics.jsonl"
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        result, messages = run_config(compose_config(out))
        assert result.state_sha256 == expected, case
        text = file.read_bytes()
        assert text.endswith(b"\n"), case
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["kind"] for line in lines[-2:]] == ["epoch", "final"], case
        known = (data or b"")[: len(source)]
        kept = sum(len(line) + 1 for line in known.split(b"\n") if readable(line)[0])
        lost = len(source) - kept
        reported = [line for line in messages if "metrics.jsonl" in line]
        assert len(reported) == (lost > 0), f"{case}: {messages}"
        assert not lost or f"{lost} bytes are lost" in reported[0], f"{case}: {reported}"
        if known == source:
            assert [without_seconds(line) for line in text.decode().splitlines()] == undamaged, case
        shutil.rmtree(out)
    if count > 4:
        counted(f"R20 resume: {count + 1} runs over damaged metrics.jsonl, final state equal, every line whole")


def without_seconds(line: str) -> dict[str, Any]:
    """Return a record without its times."""
    return {key: value for key, value in json.loads(line).items() if key != "seconds"}
