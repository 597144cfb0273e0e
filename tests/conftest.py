"""What the tests share: configurations composed as by the command line, and small runs."""

import copy
import gc
import os
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
    """Return the parameters of a test of which only `fast` belong to the fast tier."""
    values = list(values)
    assert all(value in values for value in fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.full) for value in values]


def long_tier(*values: Any) -> Any:
    """Return one parameter of a test, with a value for each name, that belongs to the long tier alone."""
    return pytest.param(*values, marks=pytest.mark.full)


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collection, which is rarer too. It took a third of composing."""
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
    """Return the configuration that words define. Words that name no files are composed once, which takes long."""
    return (_composed if any("/" in word for word in words) else _composed_once)(*words)


def _composed(*words: str) -> Config:
    (config,) = compose.configurations(list(words))
    return config


_composed_once = cache(_composed)


@pytest.fixture
def smoke(configure: Configure) -> Configure:
    """Return the same for a run of a few seconds: thin network, one float epoch."""
    return lambda *words: configure("experiment=smoke", "runtime.tensorboard=false", *words)
