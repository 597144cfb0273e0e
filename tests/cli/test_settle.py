"""Sequential test of two settings: looks, false decisions on A against A, refused words, the whole command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import evaluation

from qbench.cli.errors import SWEEP_WITH_FAILURES
from qbench.cli.main import main
from qbench.cli.settle import parse
from qbench.config.identity import run_identity
from qbench.config.schema import Config
from qbench.errors import ConfigError
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.report.comparison.predictions import RunAccuracy
from qbench.report.comparison.sequential_test import (
    MissingRunError,
    decide,
    look_level,
    look_schedule,
    names,
    run_sequential_test,
)
from qbench.report.comparison.verdicts import Verdict
from qbench.report.statistics.differences import paired, with_seed_dof
from qbench.report.statistics.power import seeds_to_decide
from qbench.runs.reader import RunRecord
from qbench.runs.result import Protocol, Result

LINE, OTHER = "method=dorefa bits=w2a2", "method=dorefa bits=w4a4"
SIMULATED = 2000


def drawn(
    rng: np.random.Generator, means: tuple[float, float], spread: float
) -> Callable[[int], tuple[list[RunAccuracy], list[RunAccuracy]]]:
    """Return accuracies of two settings whose seeds share half of their variance."""
    shared = rng.normal(0, spread, 60)
    arms = [mean + shared + rng.normal(0, spread, 60) for mean in means]
    return lambda n: ([RunAccuracy(x) for x in arms[0][:n]], [RunAccuracy(x) for x in arms[1][:n]])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
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
def test_names_of_settings_with_different_protocols_show_the_keys(
    first: str, second: str, expected: tuple[str, str]
) -> None:
    shown = [name.replace(" w2a32g32", " auto") for name in names(parse([first, second]))]
    assert tuple(shown) == expected


def test_a_run_that_was_moved_out_of_its_folder_is_an_error(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure("method=dorefa")
    directory = planned_run(config).directory
    with directory.lock():
        directory.write_config()
    assert run_identity(parse([str(directory.path), OTHER]).first).keys == run_identity(config).keys
    moved = directory.path.rename(tmp_path / directory.path.name)
    with pytest.raises(ConfigError, match="moved out of its folder digits-resnet8"):
        parse([str(moved), OTHER])


def test_looks_grow_by_half_and_are_the_same_for_any_largest_number() -> None:
    assert look_schedule(18) == look_schedule(20) == [3, 5, 8, 12, 18]
    assert look_schedule(3) == look_schedule(4) == [3]
    assert look_schedule(5) == [3, 5]
    assert look_schedule(1000)[:5] == look_schedule(18)


def test_the_levels_of_all_looks_together_are_the_level() -> None:
    """1 / (k (k + 1)) = 1 / k - 1 / (k + 1): the sum of the first n is 1 - 1 / (n + 1)."""
    assert [look_level(k) for k in (1, 2, 3, 4)] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12, 0.0025])
    assert sum(map(look_level, range(1, 1000))) == pytest.approx(0.05 * (1 - 1 / 1000))


@pytest.mark.full
def test_going_on_with_more_seeds_spends_no_level_twice() -> None:
    """Somebody who goes on after every undecided end, from 8 to 18 to 60 seeds, decides falsely in at most 5 %."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(SIMULATED):
        accuracies = drawn(rng, (95.0, 95.0), 1.0)
        verdicts = [decide(accuracies, 0.1, most).verdict for most in (8, 18, 60)]
        wrong += any(verdict in (Verdict.ABOVE, Verdict.BELOW) for verdict in verdicts)
    assert wrong / SIMULATED <= 0.05


def test_false_decisions_with_a_sample_of_test_images() -> None:
    """Each setting is better on images of its own, by chance: more seeds do not remove that error."""
    rng = np.random.default_rng(5)
    wrong = careless = 0
    for _ in range(300):
        chances = np.clip(0.8 + rng.normal(0, 0.25, (2, 1, 120)), 0, 1)
        hits = rng.random((2, 18, 120)) < chances
        arms = [[RunAccuracy(100 * row.mean(), "images", row) for row in arm] for arm in hits]
        outcome = decide(lambda n, arms=arms: (arms[0][:n], arms[1][:n]), 0.1, 18)  # type: ignore[misc]
        wrong += outcome.verdict in (Verdict.ABOVE, Verdict.BELOW)
        bare = [[RunAccuracy(run.top1) for run in arm] for arm in arms]
        outcome = decide(lambda n, bare=bare: (bare[0][:n], bare[1][:n]), 0.1, 18)  # type: ignore[misc]
        careless += outcome.verdict in (Verdict.ABOVE, Verdict.BELOW)
    assert wrong / 300 <= 0.05
    assert careless / 300 > 0.2, "without predictions, the verdict holds for these images alone"


def test_a_collapsed_seed_is_named_and_the_sign_flip_test_stands_beside() -> None:
    test = parse([LINE, OTHER, "--max-seeds=8"])
    first = [95.1, 95.0, 94.9, 95.1, 65.0, 95.0, 95.2, 94.9]
    text = run_sequential_test(test, stub({"w2a2g32": first, "w4a4g32": [92.0] * 8}))
    assert "is above" in text, "the first three seeds do not show that others collapse"
    assert "Sign-flip test over seeds: p = 0.25." in text
    text = run_sequential_test(test, stub({"w2a2g32": [95.0, 65.0, 95.1, 94.9, *first[4:]], "w4a4g32": [94.9] * 8}))
    assert "is not significantly different" in text
    assert "Warning: in seed 1, 4, the difference is far from all other differences; if training can collapse" in text


def test_false_decisions_on_a_against_a() -> None:
    """Looking five times at 5 % each finds a difference in far more than 5 %; at 5 % together in at most 5 %."""
    rng = np.random.default_rng(0)
    wrong = careless = 0
    for _ in range(SIMULATED):
        figures = drawn(rng, (95.0, 95.0), 1.0)
        verdict = decide(figures, 0.1, 20)
        wrong += verdict.verdict in (Verdict.ABOVE, Verdict.BELOW)
        arms = [[run.top1 for run in arm] for arm in figures(20)]
        careless += any(paired(arms[0][:n], arms[1][:n]).p < 0.05 for n in look_schedule(20))
    assert wrong / SIMULATED <= 0.05
    assert careless / SIMULATED > 0.1


def test_false_equivalence_at_the_margin() -> None:
    rng = np.random.default_rng(1)
    outcomes = [decide(drawn(rng, (95.5, 95.0), 0.3), 0.5, 20).verdict for _ in range(SIMULATED)]
    assert outcomes.count(Verdict.EQUIVALENT) / SIMULATED <= 0.05
    assert outcomes.count(Verdict.BELOW) / SIMULATED <= 0.05
    assert outcomes.count(Verdict.ABOVE) / SIMULATED > 0.5, "half a point at a spread of 0.4 is soon found"


def test_it_stops_at_the_first_look_that_decides() -> None:
    far, messages = drawn(np.random.default_rng(0), (97.0, 60.0), 0.3), list[str]()
    verdict = decide(far, 0.5, 20, messages.append)
    assert (verdict.verdict, verdict.difference.n, messages) == (Verdict.ABOVE, 3, [])
    mirrored = decide(lambda n: far(n)[::-1], 0.5, 20)
    assert (mirrored.verdict, mirrored.level) == (Verdict.BELOW, 0.025)
    near = drawn(np.random.default_rng(0), (97.0, 97.0), 2.0)
    assert decide(near, 0.01, 12, messages.append).verdict == Verdict.UNDECIDED
    assert [line.partition(" ")[0] for line in messages] == ["3", "5", "8"]


def exact(differences: list[float]) -> Callable[[int], tuple[list[RunAccuracy], list[RunAccuracy]]]:
    """Return accuracies of two settings with these differences."""
    return lambda n: ([RunAccuracy(90 + d) for d in differences[:n]], [RunAccuracy(90.0)] * n)


@pytest.mark.parametrize(("t", "verdict"), [(4.29, Verdict.UNDECIDED), (4.32, Verdict.EQUIVALENT)])
def test_equivalence_is_tested_at_the_level_of_the_look(t: float, verdict: Verdict) -> None:
    """One look of three seeds at 2.5 %: t(2) is 4.303 at 97.5 % one-sided, and 2.920 at 95 %."""
    spread = 0.5 * 3**0.5 / t  # of the differences, so that the margin is t standard errors away from their mean, 0
    assert decide(exact([-spread, 0.0, spread]), 0.5, 3).verdict is verdict


def test_the_interval_of_equivalence_has_twice_the_level() -> None:
    """A look at 2.5 %: TOST at 2.5 % goes with a 95 % interval, t(2) at 97.5 % one-sided 4.30265."""
    test = parse([LINE, OTHER, "--max-seeds=3"])
    alike = stub({"w2a2g32": [94.1, 95.0, 95.9], "w4a4g32": [94.0, 95.0, 96.0]})
    half = 4.30265 * 0.1 / 3**0.5
    assert f"95 % confidence interval {-half:+.2f} to {half:+.2f}" in run_sequential_test(test, alike)


def test_the_advice_uses_the_level_of_the_look_that_it_names() -> None:
    """12 seeds have 80 % power at the level of the second look, but the look at 12 seeds is the fourth."""
    first, second = [90.2, 91.0, 91.8], [90.0] * 3
    text = run_sequential_test(parse([LINE, OTHER, "--max-seeds=3"]), stub({"w2a2g32": first, "w4a4g32": second}))
    d = with_seed_dof(paired(first, second))
    assert [seeds_to_decide(d, 0.5, look_level(number)) for number in (2, 4)] == [12, 14]
    assert "About 15 more seeds would lead to a verdict: --max-seeds 18." in text


def stub(
    figures: dict[str, list[float]], statuses: dict[int, str] | None = None
) -> Callable[[list[PlannedRun]], list[RunRecord]]:
    """Return a function that makes runs with known accuracies, by widths and seed."""

    def run(runs: list[PlannedRun]) -> list[RunRecord]:
        found = []
        for c in (planned.config for planned in runs):
            status = (statuses or {}).get(c.seed, "done")
            result = Result(
                status=status, final=evaluation(figures[str(c.bits)][c.seed]), method="x", bits={}, seed=c.seed,
                dataset="d", model="m", protocol=Protocol(hash="", keys={}),
            )  # fmt: skip
            found.append(RunRecord(path=Path("nowhere"), status=status, reason="why\nmore", result=result))
        return found

    return run


def test_the_verdict_in_words() -> None:
    """Differences 4, 4.1, 4.2: mean 4.1, error 0.1 / 3^0.5, t(2) at 97.5 % two-sided 6.2053."""
    test = parse([LINE, OTHER, "--max-seeds=5"])
    run = stub({"w2a2g32": [94.0, 95.1, 96.2, 0, 0], "w4a4g32": [90.0, 91.0, 92.0, 0, 0]})
    assert run_sequential_test(test, run) == (
        "dorefa w2a2g32 is above dorefa w4a4g32: +4.10 points, 97.5 % confidence interval +3.74 to +4.46; test top-1 "
        "95.10 and 91.00, 3 seeds. This test has the significance level 0.025; the levels of the tests at all numbers "
        "of seeds add up to 5 %, which limits false verdicts if the differences of the seeds are about normally "
        "distributed. Sign-flip test over seeds: p = 0.25."
    )
    alike = stub({"w2a2g32": [94.0, 95.1, 96.2, 94.0, 95.0], "w4a4g32": [94.1, 95.0, 96.2, 94.1, 94.9]})
    assert "dorefa w2a2g32 is equivalent to dorefa w4a4g32 within ±0.5 points: " in run_sequential_test(test, alike)
    apart = stub({"w2a2g32": [94.0, 95.1, 92.2, 94.0, 95.0], "w4a4g32": [90.1, 97.0, 93.2, 94.1, 90.9]})
    printed = run_sequential_test(test, apart)
    assert (
        "dorefa w2a2g32 is not significantly different from dorefa w4a4g32, and not shown to be equivalent" in printed
    )
    assert "more seeds would lead to a verdict: --max-seeds " in printed


def test_seeds_with_the_same_networks_are_no_seeds() -> None:
    def same_from(first: int) -> Callable[[list[PlannedRun]], list[RunRecord]]:
        """Return a function that makes runs in which all seeds from `first` on have the same weights."""
        run = stub({"w2a2g32": [95.1, 65.0, *[95.0] * 20], "w4a4g32": [94.9] * 22})

        def with_weights(runs: list[PlannedRun]) -> list[RunRecord]:
            asked.append(len(runs))
            records = run(runs)
            for record in records:
                assert record.result is not None
                weights = str(min(record.result.seed, first)) * 64
                record.result = replace(record.result, weights_sha256=weights)
            return records

        return with_weights

    test, asked = parse([LINE, OTHER, "--max-seeds=8"]), list[int]()
    with pytest.raises(ConfigError, match=r"no verdict: seeds 0 to 2 have the same weights in both settings"):
        run_sequential_test(test, same_from(0))
    assert asked == [6], "it trains no further copies"
    assert "3 seeds" in run_sequential_test(test, same_from(2)), "8 seeds, of which 6 are copies of seed 2"


def test_a_run_without_an_accuracy_leaves_no_verdict() -> None:
    test = parse([LINE, OTHER])
    figures = {"w2a2g32": [94.0] * 20, "w4a4g32": [90.0] * 20}
    with pytest.raises(MissingRunError, match=r"diverged: why$"):
        run_sequential_test(test, stub(figures, {2: "diverged"}))


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ([], "needs two settings, found 0"),
        ([LINE], "needs two settings, found 1"),
        ([LINE, LINE], "choose two different settings"),
        ([LINE, f"{OTHER} seed=3"], "remove seed=3"),
        ([LINE, f"{OTHER} rerun=true"], "remove rerun=true"),
        ([LINE, "-m method=dorefa bits=w1,w3"], "2 settings"),
        ([LINE, f"{OTHER} dataset=glyphs"], "the data sets differ"),
        ([LINE, "nowhere"], "not a directory and not a command line"),
        ([LINE, "method=dorfea"], "did you mean dorefa"),
        ([LINE, OTHER, "--margin", "-1"], "--margin -1: must be"),
        ([LINE, OTHER, "--max-seeds", "2"], "from 3 to 1000"),
        ([LINE, OTHER, "--max-seed", "9"], "no such flag: --max-seed; did you mean --max-seeds"),
        ([LINE, OTHER, "hydra/launcher=submitit_slurm"], "allowed: hydra/launcher=basic, hydra/launcher=joblib"),
    ],
)
def test_mistakes_are_named_with_the_fix(words: list[str], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        parse(words)


def test_settings_of_the_same_name_show_the_keys_that_differ() -> None:
    test = parse([LINE, f"{LINE} epochs=3"])
    assert names(test) == ("dorefa w2a2g32 epochs=30", "dorefa w2a2g32 epochs=3")


def test_from_command_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = f"experiment=smoke runtime.tensorboard=false out={tmp_path / 'o'}"
    small += " optim.batch_size=256 pretrain.optim.batch_size=256"
    words = ["settle", f"{small} method=dorefa bits=w2", f"{small} method=ttq bits=w2", "--max-seeds", "3"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "3 seeds, 450 test images" in printed
    runs = sorted(path.parent for path in (tmp_path / "o").rglob("result.json"))
    assert len(runs) == 9, "three seeds of two methods and of their float baselines"
    dorefa, ttq = (
        next(run for run in runs if run.name.startswith(f"{name}-w2a32g32-s2")) for name in ("dorefa", "ttq")
    )
    before = [(run / "result.json").stat().st_mtime_ns for run in runs]
    assert main(["settle", str(dorefa), str(ttq), "--max-seeds", "3"]) == 0
    assert capsys.readouterr().out == printed, "run directories name the settings that they belong to"
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == before
    manifest = json.loads((dorefa / "manifest.json").read_text())
    (dorefa / "manifest.json").write_text(json.dumps(manifest | {"versions": {"torch": "0.1"}}))
    assert main(["settle", str(dorefa), str(ttq), "--max-seeds", "3"]) == 0
    assert "warning: of 6 stored results, some were computed differently: 1 with torch 0.1" in capsys.readouterr().err
    assert main(["settle", str(dorefa), f"{small} method=ttq bits=w9", "--max-seeds", "3"]) == SWEEP_WITH_FAILURES
    assert "no verdict" in capsys.readouterr().err
    assert main(["settle", str(dorefa), str(tmp_path)]) == ConfigError.status
