"""Times several functions (contenders) by turns in one process, and makes Markdown tables of the time ratios."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The ratio of a contender's time to the baseline's time in the same round.

    `median`, `low` and `high` are the median and the quartiles of the ratio over all rounds. `seconds` is the
    contender's median time, and `least` is its smallest time.
    """

    median: float
    low: float
    high: float
    rounds: int
    seconds: float
    least: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleaved(
    contenders: Mapping[str, Work],
    rounds: int = 21,
    warm: int = 3,
    repeat: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """Return the ratio of each contender's time to the time of the baseline, which is the first contender.

    Other programs may use the machine, so only times of the same round are compared. Every contender runs once before
    it is timed, so that the caches contain its data. In training, too, each step follows a similar step.

    Args:
        contenders: maps a name to a function.
        rounds: number of rounds. The order of the contenders rotates from round to round.
        warm: number of rounds before the timed ones.
        repeat: number of timed calls of each contender in a round.
        clock: function that returns the time in seconds. The default is wall time; `time.process_time` is the processor
            time of all threads.
    """
    names = list(contenders)
    for _ in range(warm):
        for work in contenders.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contenders[name]()
            times[name].append(seconds(contenders[name], repeat, clock))
    result = {}
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[names[0]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        result[name] = Ratio(median, low, high, rounds, statistics.median(times[name]), min(times[name]))
    return result


def seconds(work: Work, repeat: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the mean time of one call in seconds."""
    began = clock()
    for _ in range(repeat):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - began) / repeat


def machine() -> str:
    """Return a line that describes this machine."""
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} cores, {system}, {versions('torch')}"


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    """Return a text `package version, ...`. Packages that are not installed are left out."""
    installed = []
    for package in packages:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(installed)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
