"""Seeds until two cells are decided: looks, false decisions on A against A, what is refused, a run of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qbench.cli import settle
from qbench.cli.main import main as cli
from qbench.config.identity import run_identity
from qbench.config.schema import Config
from qbench.errors import ConfigError
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.report.comparison.predictions import RunAccuracy
from qbench.report.statistics.differences import paired
from qbench.runs.reader import RunRecord
from qbench.runs.result import Result

LINE, OTHER = "method=dorefa bits=w2a2", "method=dorefa bits=w4a4"
SIMULATED = 2000


def drawn(
    rng: np.random.Generator, means: tuple[float, float], spread: float
) -> Callable[[int], tuple[list[RunAccuracy], list[RunAccuracy]]]:
    """Return figures of two cells, whose seeds share half of their variance."""
    shared = rng.normal(0, spread, 20)
    arms = [mean + shared + rng.normal(0, spread, 20) for mean in means]
    return lambda n: ([RunAccuracy(x) for x in arms[0][:n]], [RunAccuracy(x) for x in arms[1][:n]])


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("method=dorefa", "method=twn", ("dorefa auto", "twn auto")),
        ("method=dorefa epochs=1", "method=twn", ("dorefa auto epochs=1", "twn auto epochs=30")),
        ("method=dorefa model.width=4", "method=twn", ("dorefa auto model.width=4", "twn auto model.width=8")),
        (
            "method=dorefa model.norm=no_affine",
            "method=twn",
            ('dorefa auto model.norm="no_affine"', 'twn auto model.norm="auto"'),
        ),
    ],
)
def test_cells_of_unlike_protocol_say_so(first: str, second: str, told: tuple[str, str]) -> None:
    own = [name.replace(" w2a32g32", " auto") for name in settle.names(settle.parse([first, second]))]
    assert tuple(own) == told


def test_a_run_that_was_moved_is_not_trained_anew_elsewhere(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure("method=dorefa")
    directory = planned_run(config).directory
    with directory.lock():
        directory.write_config()
    assert run_identity(settle.parse([str(directory.path), OTHER]).first).keys == run_identity(config).keys
    moved = directory.path.rename(tmp_path / directory.path.name)
    with pytest.raises(ConfigError, match="moved out of its folder digits-resnet8"):
        settle.parse([str(moved), OTHER])


def test_looks_grow_by_half_and_end_at_the_most() -> None:
    assert settle.looks(20) == [3, 5, 8, 12, 18, 20]
    assert settle.looks(3) == [3]
    assert settle.looks(5) == [3, 5]


def test_false_decisions_on_a_against_a() -> None:
    """Looking six times at 5 % each finds a difference in far more than 5 %; at 5 % / 6 in at most 5 %."""
    rng = np.random.default_rng(0)
    wrong = careless = 0
    for _ in range(SIMULATED):
        figures = drawn(rng, (95.0, 95.0), 1.0)
        verdict = settle.decide(figures, 0.1, 20)
        wrong += verdict.outcome in (settle.ABOVE, settle.BELOW)
        arms = [[run.top1 for run in arm] for arm in figures(20)]
        careless += any(paired(arms[0][:n], arms[1][:n]).p < 0.05 for n in settle.looks(20))
    assert wrong / SIMULATED <= 0.05
    assert careless / SIMULATED > 0.1


def test_false_equivalence_at_the_margin() -> None:
    rng = np.random.default_rng(1)
    outcomes = [settle.decide(drawn(rng, (95.5, 95.0), 0.3), 0.5, 20).outcome for _ in range(SIMULATED)]
    assert outcomes.count(settle.EQUAL) / SIMULATED <= 0.05
    assert outcomes.count(settle.BELOW) / SIMULATED <= 0.05
    assert outcomes.count(settle.ABOVE) / SIMULATED > 0.5, "half a point at a spread of 0.4 is soon found"


def test_it_stops_at_the_first_look_that_decides() -> None:
    far, told = drawn(np.random.default_rng(0), (97.0, 60.0), 0.3), list[str]()
    verdict = settle.decide(far, 0.5, 20, told.append)
    assert (verdict.outcome, verdict.difference.n, told) == (settle.ABOVE, 3, [])
    mirrored = settle.decide(lambda n: far(n)[::-1], 0.5, 20)
    assert (mirrored.outcome, mirrored.level) == (settle.BELOW, 0.05 / 6)
    near = drawn(np.random.default_rng(0), (97.0, 97.0), 2.0)
    assert settle.decide(near, 0.01, 12, told.append).outcome == settle.UNDECIDED
    assert [line.partition(" ")[0] for line in told] == ["3", "5", "8"]


def stub(
    figures: dict[str, list[float]], statuses: dict[int, str] | None = None
) -> Callable[[list[PlannedRun]], list[RunRecord]]:
    """Return what gives runs of known figures, by widths and seed."""

    def run(runs: list[PlannedRun]) -> list[RunRecord]:
        found = []
        for c in (planned.config for planned in runs):
            status = (statuses or {}).get(c.seed, "done")
            final = {"test": {"top1": figures[str(c.bits)][c.seed]}}
            values = {"method": "x", "bits": {}, "seed": c.seed, "dataset": "d", "model": "m", "protocol": {}}
            result = Result(status=status, final=final, **values)  # type: ignore[arg-type]
            found.append(RunRecord(path=Path("nowhere"), status=status, reason="why\nmore", result=result))
        return found

    return run


def test_the_verdict_in_words() -> None:
    """Differences 4, 4.1, 4.2: mean 4.1, error 0.1 / 3^0.5, t(2) at 97.5 % two-sided 6.2053."""
    asked = settle.parse([LINE, OTHER, "--max-seeds=5"])
    run = stub({"w2a2g32": [94.0, 95.1, 96.2, 0, 0], "w4a4g32": [90.0, 91.0, 92.0, 0, 0]})
    assert settle.settle(asked, run) == (
        "dorefa w2a2g32 is above dorefa w4a4g32: +4.10 points, 97.5 % interval +3.74 to +4.46; test top-1 95.10 and "
        "91.00, 3 seeds. Each of 2 looks asked for p below 0.025, so that false decisions stay below 5 %."
    )
    alike = stub({"w2a2g32": [94.0, 95.1, 96.2, 94.0, 95.0], "w4a4g32": [94.1, 95.0, 96.2, 94.1, 94.9]})
    assert "dorefa w2a2g32 is as good as dorefa w4a4g32 within ±0.5: " in settle.settle(asked, alike)
    apart = stub({"w2a2g32": [94.0, 95.1, 92.2, 94.0, 95.0], "w4a4g32": [90.1, 97.0, 93.2, 94.1, 90.9]})
    said = settle.settle(asked, apart)
    assert "are not decided: " in said
    assert "more seeds would decide: --max-seeds " in said


def test_a_run_without_a_figure_leaves_no_verdict() -> None:
    asked = settle.parse([LINE, OTHER])
    figures = {"w2a2g32": [94.0] * 20, "w4a4g32": [90.0] * 20}
    with pytest.raises(settle.MissingRunError, match=r"diverged: why$"):
        settle.settle(asked, stub(figures, {2: "diverged"}))


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ([], "wants two cells, got 0"),
        ([LINE], "wants two cells, got 1"),
        ([LINE, LINE], "the same cell"),
        ([LINE, f"{OTHER} seed=3"], "leave seed=3 out"),
        ([LINE, f"{OTHER} rerun=true"], "leave rerun=true out"),
        ([LINE, "-m method=dorefa bits=w1,w3"], "2 cells"),
        ([LINE, f"{OTHER} dataset=glyphs"], "different data sets"),
        ([LINE, "nowhere"], "neither a directory nor a command line"),
        ([LINE, "method=dorfea"], "did you mean dorefa"),
        ([LINE, OTHER, "--margin", "-1"], "--margin -1: allowed"),
        ([LINE, OTHER, "--max-seeds", "2"], "from 3 to 1000"),
        ([LINE, OTHER, "--mots", "9"], "did you mean --max-seeds"),
        ([LINE, OTHER, "hydra/launcher=submitit_slurm"], "no such flag"),
    ],
)
def test_what_is_refused(words: list[str], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        settle.parse(words)


def test_the_same_name_is_told_apart_by_keys() -> None:
    asked = settle.parse([LINE, f"{LINE} epochs=3"])
    assert settle.names(asked) == ("dorefa w2a2g32 epochs=30", "dorefa w2a2g32 epochs=3")


def test_from_command_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = f"experiment=smoke runtime.tensorboard=false out={tmp_path / 'o'} bits=w2"
    words = ["settle", f"{small} method=dorefa", f"{small} method=ttq", "--max-seeds", "3"]
    assert cli(words) == 0
    said = capsys.readouterr().out
    assert "3 seeds, 450 test images" in said
    runs = sorted(path.parent for path in (tmp_path / "o").rglob("result.json"))
    assert len(runs) == 9, "three seeds of two methods and of their float parents"
    dorefa, ttq = (
        next(run for run in runs if run.name.startswith(f"{name}-w2a32g32-s2")) for name in ("dorefa", "ttq")
    )
    before = [(run / "result.json").stat().st_mtime_ns for run in runs]
    assert cli(["settle", str(dorefa), str(ttq), "--max-seeds", "3"]) == 0
    assert capsys.readouterr().out == said, "run directories are the cells that they belong to"
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == before
    assert cli(["settle", str(dorefa), f"{small} method=ttq bits=w9", "--max-seeds", "3"]) == cli.SWEEP_WITH_FAILURES
    assert "no verdict" in capsys.readouterr().err
    assert cli(["settle", str(dorefa), str(tmp_path)]) == ConfigError.status
