"""Seeds until two cells are decided: a group-sequential test of difference and of equivalence within a margin.

Looking again after every few seeds finds differences where there are none unless each look asks for more. Here each of
K looks asks for p below 0.05 / K (Bonferroni over looks), which keeps the rate of false decisions below 5 % whatever
the looks have in common; a difference of none and one of the margin or more exclude each other, so both questions may
ask for the same.
"""

import copy
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qbench.cli.compare import margin_of
from qbench.config.identity import run_identity
from qbench.config.schema import Config, did_you_mean
from qbench.errors import ConfigError
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.report.comparison.pairs import MARGIN
from qbench.report.comparison.predictions import RunAccuracy, of_run, paired_difference
from qbench.report.statistics.differences import ALPHA, Difference, half_width, with_seed_dof
from qbench.report.statistics.hypothesis_tests import equivalent
from qbench.report.statistics.power import SEEDS_LIMIT, seeds_to_decide
from qbench.runs.reader import DONE, RunRecord
from qbench.system import files

FIRST, GROWTH, MOST = 3, 1.5, 20
TOLD = 3
"""Keys that a cell's name tells; the others are counted."""
ABOVE, BELOW, EQUAL, UNDECIDED = "above", "below", "as good", "undecided"
FLAGS = ("--margin", "--max-seeds")
LAUNCHERS = ("hydra/launcher=basic", "hydra/launcher=joblib")


@dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """What a command line asks for: two cells as their runs with seed 0, and how many seeds at most."""

    first: Config
    second: Config
    margin: float = MARGIN
    most: int = MOST
    launcher: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `looks` gave: the outcome, the difference first minus second, both means, the level of each look."""

    outcome: str
    difference: Difference
    means: tuple[float, float]
    level: float


def looks(most: int) -> list[int]:
    """Return the numbers of seeds at which is looked: 3, then half as many again each time, `most` the last."""
    found = [FIRST]
    while found[-1] < most:
        found.append(min(math.ceil(GROWTH * found[-1]), most))
    return found


def decide(
    figures: Callable[[int], tuple[Sequence[RunAccuracy], Sequence[RunAccuracy]]],
    margin: float,
    most: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Look at more and more seeds of two cells until they are told apart, or are as good as each other, or at `most`.

    Args:
        figures: from a number of seeds n to the n figures of both, by seed.
        margin: points of top-1 within which they are as good.
        tell: gets a line after every look that does not decide.
    """
    numbers = looks(most)
    level = ALPHA / len(numbers)
    for n in numbers:
        first, second = figures(n)
        d = with_seed_dof(paired_difference(first, second))
        means = tuple(sum(run.top1 for run in arm) / n for arm in (first, second))
        if d.p < level:
            outcome = ABOVE if d.mean > 0 else BELOW
        else:
            outcome = EQUAL if equivalent(d, margin) < level else UNDECIDED
        if outcome != UNDECIDED or n == most:
            return Verdict(outcome=outcome, difference=d, means=(means[0], means[1]), level=level)
        tell(f"{n} seeds: {d.mean:+.2f} points, p {d.p:.2g} where {level:.2g} is asked for; going on")
    raise AssertionError


def parse(arguments: Iterable[str]) -> SequentialTest:
    """Read `A B [--margin X] [--max-seeds N] [hydra/launcher=NAME]`; A and B are run directories or quoted command
    lines.

    Raises:
        ConfigError: something else, or two cells that cannot be compared.
    """
    cells: list[str] = []
    margin, most, launcher, words = MARGIN, MOST, "", iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            value = value if equals else next(words, "")
            if flag == "--margin":
                margin = margin_of("settle", value)
            elif not value.isdecimal() or not FIRST <= int(value) <= SEEDS_LIMIT:
                raise ConfigError(
                    f"settle --max-seeds {value}: allowed is a number of seeds from {FIRST} to {SEEDS_LIMIT}"
                )
            else:
                most = int(value)
        elif word in LAUNCHERS:
            launcher = value
        elif word.startswith(("-", "hydra")) and " " not in word:
            known = (*FLAGS, *LAUNCHERS)
            raise ConfigError(f"settle: no such flag: {word}{did_you_mean(word, known)}\nallowed: {', '.join(known)}")
        else:
            cells.append(word)
    if len(cells) != 2:
        raise ConfigError(
            f"settle wants two cells, got {len(cells)}: run directories or quoted command lines, such as\n"
            'qbench settle "method=dorefa bits=w2a2" "method=lsq bits=w2a2"'
        )
    first, second = map(_cell, cells)
    if run_identity(first).digest == run_identity(second).digest:
        raise ConfigError(f"settle: both are {name(first)}, the same cell")
    if first.dataset["name"] != second.dataset["name"]:
        names = first.dataset["name"], second.dataset["name"]
        raise ConfigError(f"settle: {names[0]} and {names[1]} are different data sets; choose cells on the same one")
    return SequentialTest(first=first, second=second, margin=margin, most=most, launcher=launcher)


def _cell(word: str) -> Config:
    """Return a cell's run with seed 0."""
    path = Path(word)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"settle {word}: no config.yaml there\nname a run's directory, or quote a command line")
        from qbench.config.validate import from_dict

        config = from_dict(files.read_yaml(path / "config.yaml"))
        folder = run_identity(config).directory.parent.name
        if path.absolute().parent.name != folder:  # its seeds would be trained anew, elsewhere
            raise ConfigError(
                f"settle {word}: it was moved out of its folder {folder}\nmove it back, or quote a command line"
            )
        return replace(config, seed=0, out=str(path.absolute().parents[1]), rerun=False)
    from qbench.config import compose

    try:
        words = shlex.split(word)
    except ValueError as error:
        raise ConfigError(f"settle {word}: {str(error).lower()}\nwrite key=value words in one pair of quotes") from None
    for typed in words:
        if typed.partition("=")[0] in ("seed", "rerun"):
            raise ConfigError(f"settle {word}: leave {typed} out: seeds 0, 1, 2, ... run until it is decided")
    if "=" not in word:
        raise ConfigError(f"settle {word}: neither a directory nor a command line\nwrite key=value words in quotes")
    found = compose.configurations(words)
    if len(found) != 1:
        raise ConfigError(f"settle {word}: {len(found)} cells; each side is one")
    return found[0]


def settle(
    asked: SequentialTest,
    run: Callable[[list[PlannedRun]], list[RunRecord]],
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Return a verdict in words; `run` does what is not stored yet and returns what became of every run.

    Raises:
        Lost: a run has no figure; those that have one are no fair sample.
    """

    def figures(n: int) -> tuple[list[RunAccuracy], list[RunAccuracy]]:
        configs = [_with_seed(cell, seed) for cell in (asked.first, asked.second) for seed in range(n)]
        found = run([planned_run(config) for config in configs])
        if lost := [one for one in found if one.status != DONE]:
            raise MissingRunError(lost)
        own = [of_run(str(one.path), _top1(one)) for one in found]
        return own[:n], own[n:]

    return sentence(asked, decide(figures, asked.margin, asked.most, tell))


class MissingRunError(Exception):
    """Runs that ended without a figure."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        reason = runs[0].reason.partition("\n")[0]
        super().__init__(f"no verdict: {runs[0].path} {runs[0].status}" + (f": {reason}" if reason else ""))
        self.runs = list(runs)


def _with_seed(config: Config, seed: int) -> Config:
    return replace(copy.deepcopy(config), seed=seed)


def _top1(found: RunRecord) -> float:
    assert found.result
    assert found.result.final
    return found.result.final.test.top1


def sentence(asked: SequentialTest, verdict: Verdict) -> str:
    """Say a verdict with its figures in two sentences."""
    d = verdict.difference
    first, second = names(asked)
    half = half_width(d, verdict.level if verdict.outcome != EQUAL else 2 * verdict.level)
    share = 100 * (1 - verdict.level * (2 if verdict.outcome == EQUAL else 1))
    figures = f"{d.mean:+.2f} points, {share:.4g} % interval {d.mean - half:+.2f} to {d.mean + half:+.2f}"
    figures += f"; test top-1 {verdict.means[0]:.2f} and {verdict.means[1]:.2f}, {d.n} seeds"
    figures += f", {d.items:,} test images" if d.items else ""
    count = len(looks(asked.most))
    how = f"Each of {count} looks asked for p below {verdict.level:.2g}, so that false decisions stay below 5 %."
    if verdict.outcome in (ABOVE, BELOW):
        return f"{first} is {verdict.outcome} {second}: {figures}. {how}"
    if verdict.outcome == EQUAL:
        return f"{first} is as good as {second} within ±{asked.margin:g}: {figures}. {how}"
    return f"{first} and {second} are not decided: {figures}. {_wanted(asked, verdict)}"


def _wanted(asked: SequentialTest, verdict: Verdict) -> str:
    d = verdict.difference
    most = seeds_to_decide(d, asked.margin, verdict.level)
    if most is None:
        few = f"The {d.items:,} test images are too few" if d.items and d.items_part else f"{SEEDS_LIMIT:,} seeds"
        return f"{few}{'' if d.items and d.items_part else ' would not decide'}."
    return f"About {max(most - d.n, 1)} more seeds would decide: --max-seeds {max(most, d.n + 1)}."


def names(asked: SequentialTest) -> tuple[str, str]:
    """Return what the two cells are called, with the keys in which their protocols and networks differ; where their
    names are the same, with all in which they do.
    """
    from qbench.report.comparison.naming import flat

    cells = asked.first, asked.second
    both = name(asked.first), name(asked.second)
    keys = [flat(run_identity(cell).keys if both[0] == both[1] else _setting(cell)) for cell in cells]
    differing = [key for key in sorted(set().union(*keys)) if keys[0].get(key) != keys[1].get(key)]
    left = f" and {len(differing) - TOLD} keys more" if len(differing) > TOLD else ""
    told = [" ".join(f"{key}={own.get(key, '?')}" for key in differing[:TOLD]) + left for own in keys]
    return f"{both[0]} {told[0]}".rstrip(), f"{both[1]} {told[1]}".rstrip()


def _setting(cell: Config) -> dict[str, object]:
    """Return what all methods of a table share: the protocol, with what else was typed of the network."""
    return run_identity(cell).protocol | {"model": cell.model}


def name(config: Config) -> str:
    """Return a cell's method and widths."""
    return f"{config.method_name} {config.bits}"
