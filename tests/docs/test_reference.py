"""The reference pages are up to date, and every configuration key and flag has a meaning there."""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from qbench import errors
from qbench.cli.parsers import PARSERS
from qbench.config import compose
from qbench.config.registry import NOT_ARGUMENTS
from qbench.config.schema import Config

KEYS = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
GROUPS = ("model", "dataset", "method")


def schema_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the keys of the schema, `pretrain.optim` as those of `optim`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            if field.name != "optim" or not prefix:
                yield from schema_keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        elif field.name not in (*GROUPS, "activation"):
            yield f"{prefix}{field.name}"


def option_keys() -> list[tuple[str, str, str]]:
    """Return (group, option, key) of the YAML files of networks, data sets and methods."""
    return [
        (group, path.stem, key)
        for group in GROUPS
        for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
        for key in yaml.safe_load(path.read_text(encoding="utf-8"))
        if key not in NOT_ARGUMENTS or key in ("recipe", "deviation")
    ]


def rows(page: str) -> list[list[str]]:
    """Return the cells of all table rows of a page."""
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if line[:2] == "| "]


def test_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/reference.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_key_of_the_schema_has_type_default_and_meaning() -> None:
    found = {cells[0].strip("`"): cells for cells in rows(KEYS) if len(cells) == 5}
    keys = list(schema_keys())
    assert len(keys) >= 45
    for key in keys:
        _, kind, _, default, meaning = found[key]
        assert kind, key
        assert default, key
        assert len(meaning) > 5, f"{key}: add a comment next to the key in conf/"


def test_every_key_of_an_option_is_in_the_section_of_its_option() -> None:
    sections = re.split(r"^### ", KEYS, flags=re.MULTILINE)
    assert len(option_keys()) > 250
    for group, option, key in option_keys():
        (section,) = (part for part in sections if f"- `{group}={option}`:" in part)
        (cells,) = (cells for cells in rows(section) if cells[0] == f"`{group}.{key}`")
        assert len(cells[-1]) > 5, f"{group}/{option}.yaml: add a comment next to {key}"


def test_defaults_and_ranges_are_those_of_a_run() -> None:
    """Some of each kind, read by hand from conf/ and the schema."""
    assert "| `runtime.num_workers` | int | 0 to 64 | `2` |" in KEYS
    assert "| `optim.clip_norm` | float or null | above 0 | `null` |" in KEYS
    assert "| `seed` | int | 0 to 2147483647 | `0` |" in KEYS
    assert "| `optim.batch_size` | int | 1 or more | `64` |" in KEYS
    assert "| `epochs` | int | 0 or more | that of `dataset.recipe.finetune` |" in KEYS
    assert "| `lr_grid.factors` | list of float |" in KEYS
    assert "| `dataset.pad` | int | `1` | largest random shift of an image, in pixels |" in KEYS
    assert "| `model.depth` | int | resnet110 `110`, resnet20 `20`," in KEYS
    assert "| `optim.schedule` | `exponential` | `exponential` | `cosine` | `step` | `cosine` | `step` |" in KEYS


@pytest.mark.parametrize("name", PARSERS)
def test_every_argument_of_a_subcommand_has_a_meaning(name: str) -> None:
    section = COMMANDS.partition(f"## qbench {name}\n")[2].partition("\n## ")[0]
    found = {word.split()[0]: cells for cells in rows(section) for word in re.findall(r"`([^`]+)`", cells[0])}
    parser = PARSERS[name]()
    for argument in [*parser.flags(), *parser.positionals()]:
        assert len(found[argument][-1]) > 5, argument


def test_every_training_flag_has_a_meaning() -> None:
    found = {flag: cells[-1] for cells in rows(COMMANDS) for flag in re.findall(r"`([^`]+)`", cells[0])}
    assert all(len(found[flag]) > 5 for flag in compose.FLAGS)


def test_every_exit_status_has_a_meaning() -> None:
    found = {cells[0] for cells in rows(COMMANDS.partition("## Exit statuses")[2]) if cells[0].isdigit()}
    assert found == {"0", "1", "8"} | {str(error.status) for error in errors.QbenchError.__subclasses__()}


def test_comments_of_a_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import configuration_reference as script

    file = tmp_path / "a.yaml"
    file.write_text(
        "# Head, two\n# lines.\nname: a\none: 1   # of the first\n         # and more\ntwo: 'x # y'\nbelow: {k: 1}\n"
    )
    read = script.read(file)
    assert read.description == "Head, two lines."
    assert read.comments == {"one": "of the first and more"}
    assert read.values["two"] == "x # y"
