"""Damaged and exchanged checkpoints, weights and results: never used without a message (R6)."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import damaged_runs
import pytest
import torch
from conftest import counted
from damaged_runs import (
    all_damages,
    baseline_of,
    compose_config,
    damages,
    digest,
    directory,
    flips_and_cuts,
    full,
    is_refused,
    one_damage,
    run_config,
    samples,
)

from qbench.config.identity import run_identity
from qbench.config.schema import baseline_config
from qbench.errors import CheckpointError, Interrupted, QbenchError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.setup import assemble
from qbench.report.comparison.predictions import load_run_accuracy
from qbench.runs.result import load_result
from qbench.training.checkpoint import unpack
from qbench.training.digests import weights_sha256
from qbench.training.initial_weights import is_intact, load_initial_weights

whole = damaged_runs.whole
interrupted = damaged_runs.interrupted
copy_of = damaged_runs.copy_of


@flips_and_cuts
def test_every_damage_to_a_checkpoint_is_detected(interrupted: Path, flips: int, cuts: int) -> None:
    newest = planned_run(compose_config(interrupted)).directory.checkpoints()[0]
    for case, data in all_damages("checkpoint", newest.read_bytes(), 1, flips, cuts):
        assert is_refused(unpack, data, case), f"{case}: read without an error"


@samples
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    whole: Path, interrupted: Path, copy_of: Callable[[Path], Path], count: int
) -> None:
    expected = digest(whole)
    for seed in range(count):
        out = copy_of(interrupted)
        newest, before = planned_run(compose_config(out)).directory.checkpoints()
        what, data = one_damage(newest.read_bytes(), seed)
        newest.write_bytes(data)
        result, messages = run_config(compose_config(out))
        assert result.state_sha256 == expected, f"seed {seed}: {what}"
        assert any(newest.name in line and line.startswith("warning:") for line in messages), (
            f"seed {seed}: {what}: {messages}"
        )
        assert f"continuing from {before.name}" in messages, f"seed {seed}: {what}: {messages}"
        shutil.rmtree(out)
    if count > 3:
        counted(f"R6 checkpoint: {count} whole runs from the checkpoint before, final state equal")


@pytest.mark.full
def test_without_a_good_checkpoint_a_run_restarts_and_keeps_its_new_checkpoints(
    whole: Path, interrupted: Path, copy_of: Callable[[Path], Path]
) -> None:
    out = copy_of(interrupted)
    for path in planned_run(compose_config(out)).directory.checkpoints():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Interrupted):
        run_config(compose_config(out), stop_at=8)
    assert [path.name for path in planned_run(compose_config(out)).directory.checkpoints()] == [
        "state-4.pt",
        "state-3.pt",
    ]
    result, messages = run_config(compose_config(out))
    assert "continuing from state-4.pt" in messages, "damaged files with higher numbers do not hide new checkpoints"
    assert result.state_sha256 == digest(whole)


@pytest.mark.parametrize("swap", ["another run's", *full("older as newer", "newer as older", "a directory", "a pipe")])
def test_exchanged_checkpoints(whole: Path, interrupted: Path, copy_of: Callable[[Path], Path], swap: str) -> None:
    out = copy_of(interrupted)
    newest, before = planned_run(compose_config(out)).directory.checkpoints()
    if swap == "another run's":
        newest.write_bytes(planned_run(compose_config(out, "seed=1")).directory.checkpoints()[0].read_bytes())
    elif swap == "older as newer":
        newest.write_bytes(before.read_bytes())
    elif swap == "newer as older":
        before.write_bytes(newest.read_bytes())
        newest.unlink()
    elif swap == "a directory":
        before.with_name("state-9999.pt").mkdir()
    else:
        os.mkfifo(before.with_name("state-9999.pt"))
    result, messages = run_config(compose_config(out))
    assert result.state_sha256 == digest(whole), messages
    wrong = {"another run's": newest, "older as newer": newest, "newer as older": before}.get(swap)
    assert wrong is None or any(line.startswith(f"warning: {wrong}") for line in messages), messages
    assert wrong is None or not wrong.exists()


@flips_and_cuts
def test_every_damage_to_published_weights_is_detected(
    whole: Path, copy_of: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    """best.pt of the float baseline; the same file with `init=PATH`, as a file and as its run's
    directory.
    """
    config = compose_config(whole)
    run_path, identity = baseline_of(copy_of(whole)), run_identity(baseline_config(config)).digest
    file, model = run_path / "best.pt", assemble(config).float_model()
    good = file.read_bytes()
    assert is_intact(file, identity)
    load_initial_weights(model, file)
    load_initial_weights(model, run_path)
    for case, data in all_damages("baseline, init=FILE, init=RUN", good, 2, flips, cuts):
        if data == good[: good.rfind(b"\nqbench sha256 ")]:
            continue  # cut exactly before the digest: an ordinary checkpoint
        file.write_bytes(data)
        assert not is_intact(file, identity), case
        for start in (file, run_path):
            assert is_refused(load_initial_weights, model, start), f"{case}: loaded without an error from {start}"


@flips_and_cuts
def test_damage_to_a_foreign_checkpoint_is_detected_or_harmless(
    whole: Path, tmp_path: Path, flips: int, cuts: int
) -> None:
    """A `torch.save` file without our digest has checksums in its archive, which torch.load does
    not verify.
    """
    model = assemble(compose_config(whole)).float_model()
    good = model.state_dict()
    torch.save(good, tmp_path / "net.pt")
    expected = weights_sha256(good)
    refused = harmless = 0
    for what, data in damages((tmp_path / "net.pt").read_bytes(), 3, flips, cuts):
        (tmp_path / "damaged.pt").write_bytes(data)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        try:
            load_initial_weights(model, tmp_path / "damaged.pt")
        except CheckpointError:
            refused += 1
            continue
        assert weights_sha256(model.state_dict()) == expected, f"seed 3: {what}: other weights without an error"
        harmless += 1
    assert refused > 5 * harmless
    if flips == 1000:
        counted(f"R6 foreign checkpoint: {refused} refused, {harmless} harmless (unused fields), 0 used wrongly")


def test_a_format_without_checksums_gives_a_note(whole: Path, tmp_path: Path) -> None:
    model = assemble(compose_config(whole)).float_model()
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "has no checksums" in load_initial_weights(model, tmp_path / "old.pt").message
    torch.save(model.state_dict(), tmp_path / "new.pt")
    assert "checksums" not in load_initial_weights(model, tmp_path / "new.pt").message


@flips_and_cuts
def test_every_damage_to_a_result_is_detected(
    whole: Path, copy_of: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    path = directory(copy_of(whole))
    file, stored, tried, equal = path / "result.json", load_result(path), 0, 0
    assert stored is not None
    for what, data in damages(file.read_bytes(), 4, flips, cuts):
        file.write_bytes(data)
        found = load_result(path)
        assert found is None or found == stored, f"seed 4: {what}: read without an error"
        tried, equal = tried + 1, equal + (found is not None)
    assert equal < tried / 20
    if flips == 1000:
        counted(f"R6 result: {tried} damages ({flips} flips, {cuts} cuts), {equal} left the content equal, none used")


@samples
def test_runs_with_a_damaged_result_or_baseline_end_the_same(
    whole: Path, copy_of: Callable[[Path], Path], count: int
) -> None:
    expected, base = digest(whole), load_result(baseline_of(whole))
    assert base is not None
    for seed in range(count):
        out = copy_of(whole)
        own, first = directory(out), baseline_of(out)
        kind = ("result", "baseline's best", "baseline's result")[seed % 3]
        file = {"result": own / "result.json", "baseline's best": first / "best.pt"}.get(kind, first / "result.json")
        if kind != "result":
            shutil.rmtree(own)
        what, data = one_damage(file.read_bytes(), seed)
        file.write_bytes(data)
        harmless = file.name == "result.json" and load_result(file.parent) is not None
        result, messages = run_config(compose_config(out))
        case = f"seed {seed}: {kind}: {what}: {messages}"
        assert result.state_sha256 == expected, case
        assert harmless or any(line.startswith(f"warning: {file}") for line in messages), case
        again = load_result(first)
        assert again is not None
        assert again.state_sha256 == base.state_sha256, case
        assert is_intact(first / "best.pt", run_identity(baseline_config(compose_config(out))).digest), case
        shutil.rmtree(out)
    if count > 3:
        counted(f"R6 result, baseline: {count} whole runs with a damaged file, final state equal, each with a warning")


@pytest.mark.parametrize(
    "what", ["baseline's best", "best of init", *full("result", "baseline's result", "result of init")]
)
def test_files_of_another_run_are_not_used(whole: Path, copy_of: Callable[[Path], Path], what: str) -> None:
    out = copy_of(whole)
    own, first = directory(out), baseline_of(out)
    if what == "result":
        shutil.copy(directory(out, "seed=1") / "result.json", own / "result.json")
        result, messages = run_config(compose_config(out))
        assert any("belongs to another run" in line for line in messages), messages
    elif what.startswith("baseline"):
        shutil.rmtree(own)
        name = "best.pt" if what == "baseline's best" else "result.json"
        shutil.copy(baseline_of(out, "seed=1") / name, first / name)
        result, messages = run_config(compose_config(out))
        assert any(line.startswith(f"warning: {first / name}") for line in messages), messages
    else:
        name = "best.pt" if what == "best of init" else "result.json"
        shutil.copy(baseline_of(out, "seed=1") / name, first / name)
        with pytest.raises(CheckpointError, match="belong to different runs"):
            run_config(compose_config(out, f"init={first}"))
        return
    assert (result.state_sha256, result.seed) == (digest(whole), 0)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("last.pt", "damaged"),
        *full(
            ("best.pt", "gone"),
            ("best.pt", "a directory"),
            ("result.json", "a pipe"),
            ("best.pt", "a pipe"), ("last.pt", "gone"), ("predictions.npy", "gone"), ("result.json", "gone"),
            ("result.json", "a directory"), ("metrics.jsonl", "a directory"), ("config.yaml", "gone"),
        ),
    ],
)  # fmt: skip
def test_missing_and_damaged_files_of_a_baseline(
    whole: Path, copy_of: Callable[[Path], Path], name: str, what: str
) -> None:
    """The baseline is trained again if the file is needed; a directory in its place is an error."""
    out = copy_of(whole)
    shutil.rmtree(directory(out))
    file = baseline_of(out) / name
    trained = load_result(baseline_of(out))
    assert trained is not None
    file.unlink()
    if what == "a directory":
        file.mkdir()
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "damaged":
        file.write_bytes(b"damaged")
    blocked = what == "a directory" and name != "metrics.jsonl"
    if blocked:
        with pytest.raises(QbenchError, match=rf"{re.escape(str(file))}.*[Dd]irectory|not permitted") as caught:
            run_config(compose_config(out))
        assert caught.value.status == 5
        return
    result, messages = run_config(compose_config(out))
    assert result.state_sha256 == digest(whole)
    trained_again = name in ("best.pt", "result.json")
    now = load_result(baseline_of(out))
    assert now is not None
    assert (now.wall_seconds != trained.wall_seconds) == trained_again, messages
    warned = any(f"warning: {file}" in line for line in messages)
    assert warned == (trained_again and (name, what) != ("result.json", "gone")), messages


@flips_and_cuts
def test_damaged_predictions_are_not_used_in_statistics(
    whole: Path, copy_of: Callable[[Path], Path], flips: int, cuts: int
) -> None:
    path = directory(copy_of(whole))
    file, stored = path / "predictions.npy", load_result(path)
    assert stored is not None
    assert stored.final is not None
    top1 = stored.final.test.top1
    good = load_run_accuracy(str(path), top1)
    assert good.hits is not None
    for what, data in damages(file.read_bytes(), 5, flips, cuts):
        file.write_bytes(data)
        found = load_run_accuracy(str(path), top1)
        assert found.top1 == top1, f"seed 5: {what}"
        assert found.hits is None or 100 * found.hits.mean() == pytest.approx(top1, abs=0.01), f"seed 5: {what}"
