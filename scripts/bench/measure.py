"""Times contenders interleaved in one process, computes ratios by round, and prints Markdown tables."""

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
    """Ratio of a contender's time to the baseline's time in the same round: median, quartiles, number of rounds. Also
    the contender's median in seconds.
    """

    median: float
    low: float
    high: float
    rounds: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleaved(contenders: Mapping[str, Work], rounds: int = 21, warm: int = 3, repeat: int = 1) -> dict[str, Ratio]:
    """Time every contender `repeat` times in every round, in a rotating order; the first one is the
    baseline.

    Machines are shared, so only times of the same round are compared. Each contender runs once untimed before it is
    timed. In practice a step follows a step of the same kind, and the caches contain its data.
    """
    names = list(contenders)
    for _ in range(warm):
        for work in contenders.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contenders[name]()
            times[name].append(seconds(contenders[name], repeat))
    result = {}
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[names[0]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        result[name] = Ratio(median, low, high, rounds, statistics.median(times[name]))
    return result


def seconds(work: Work, repeat: int = 1) -> float:
    """Return the mean wall time of one call."""
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeat


def machine() -> str:
    """Return a line that describes the machine of the measurement."""
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
    """Return `package version, ...` of those that are installed."""
    installed = []
    for package in packages:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(installed)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
