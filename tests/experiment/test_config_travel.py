"""The whole configuration is taken apart in few places: bounds on the files that take it."""

import importlib.util
from types import ModuleType

import pytest
from conftest import ROOT


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_travel", ROOT / "scripts" / "config_travel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_few_files_take_a_configuration(script: ModuleType) -> None:
    files = script.takers()
    assert "qbench/experiment/setup.py" in files, "the count works"
    assert len(files) <= 8, files


def test_few_places_make_a_runs_directory(script: ModuleType) -> None:
    calls = script.makers()
    assert ("qbench/experiment/planned_run.py", "RunDirectory") in {(file, name) for file, _, name in calls}
    assert len(calls) <= 7, calls


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("def f(a: Config) -> None: ...", [1]),
        ("def f(a: int, *, b: 'list[Config]') -> None: ...", [1]),
        ("def f(a: Callable[[Sequence[Config]], int]) -> None: ...", [1]),
        ("class A:\n    x: Config\n    def f(self, y: Config | None) -> None: ...", [2, 3]),
        ("def f(a: ConfigError, b: 'a Config b') -> Config: ...", []),
    ],
)
def test_what_counts(script: ModuleType, code: str, lines: list[int]) -> None:
    tree = script.ast.parse(code)
    assert sorted(line for line, annotation in script.annotations(tree) if script.names_config(annotation)) == lines
