"""Fixtures and functions that all tests share: configurations as the command line makes them, and small runs."""

import copy
import gc
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qbench.cli.main import STARTUP_OBJECTS
from qbench.config import compose
from qbench.config.schema import Config

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).parents[1]

Configure = Callable[..., Config]


def counted(line: str) -> None:
    """Append what a long test has covered to a file, for docs/reliability.md."""
    if path := os.environ.get("QBENCH_RELIABILITY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def tiered(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return the parameters of a test. Those in `fast` belong to the fast tier, and all others to the full tier."""
    values = list(values)
    assert all(value in values for value in fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.full) for value in values]


def long_tier(*values: Any) -> Any:
    """Return one set of parameters of a test, which only the full tier runs. `values` has a value for each name."""
    return pytest.param(*values, marks=pytest.mark.full)


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection, and make collections rarer.

    Without this, garbage collection takes a third of the time in which configurations are composed.
    """
    gc.freeze()
    gc.set_threshold(STARTUP_OBJECTS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Return a function from command-line words to a configuration in the test's own folder.

    If a key is given twice, the last word counts, so that a test can replace words that it shares with others.
    """

    def made(*words: str) -> Config:
        by_key = {word.partition("=")[0]: word for word in (f"out={tmp_path}", *words)}
        out = by_key.pop("out").partition("=")[2]
        return replace(copy.deepcopy(composed(*by_key.values())), out=out)

    return made


def composed(*words: str) -> Config:
    """Return the configuration that the words of a command line define.

    Composing takes long, so the result is cached, unless a word names a file. A seed is set afterwards, because no
    other value depends on it.
    """
    seeds = [word for word in words if re.fullmatch(r"seed=\d{1,6}", word)]
    others = [word for word in words if word not in seeds]
    config = (_composed if any("/" in word for word in others) else _composed_once)(*others)
    return replace(config, seed=int(seeds[-1].partition("=")[2])) if seeds else config


def _composed(*words: str) -> Config:
    (config,) = compose.configurations(list(words))
    return config


_composed_once = cache(_composed)


@pytest.fixture
def smoke(configure: Configure) -> Configure:
    """Return `configure` for runs of a few seconds, with a thin network and one epoch of the float baseline."""
    return lambda *words: configure("experiment=smoke", "runtime.tensorboard=false", *words)
