"""The functions and classes of users: which arguments are filled in, and which become keys."""

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Configure

from qbench.config import registry
from qbench.config.compose import configurations
from qbench.config.identity import run_identity
from qbench.config.signature import CLASS_COUNTS
from qbench.errors import ConfigError

NETWORKS = """
from functools import partial
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 5)

class Counted(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

class Wide(nn.Module):
    def __init__(self, n_classes, width=8, act=nn.ReLU, sizes=(1, 2), bias: bool = True):
        super().__init__()
        self.fc, self.act, self.sizes = nn.Linear(width, n_classes, bias), act(), sizes

class Bare(nn.Module):
    pass

def build(shape, classes, *, width=8):
    assert shape == (1, 8, 8)
    return Wide(classes, width)

def by_class_count(classes):
    return Counted(classes)

def like_torchvision(*, weights=None, progress=True, **kwargs):
    return Counted(**kwargs)

prefilled = partial(build, width=3)

def two_unknown(depth, growth):
    return Plain()

def only_by_place(classes, /):
    return Counted(classes)

exists = Plain()
"""


@pytest.fixture(autouse=True)
def _networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signatures.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def model(node: dict[str, Any]) -> Any:
    return registry.create("model", node, shape=(1, 8, 8), **dict.fromkeys(CLASS_COUNTS, 5))


@pytest.mark.parametrize(
    ("name", "keys", "inputs"),
    [
        ("Plain", {}, 64),
        ("Counted", {}, 64),
        ("Wide", {"width": 8, "sizes": [1, 2], "bias": True}, 8),
        ("build", {"width": 8}, 8),
        ("by_class_count", {}, 64),
        ("like_torchvision", {"weights": None, "progress": True}, 64),
        ("prefilled", {"width": 3}, 3),
    ],
)
def test_usual_forms_of_a_network_are_called_with_what_they_need(name: str, keys: Any, inputs: int) -> None:
    node = registry.defaults("model", f"signatures:{name}")
    assert node == {"name": f"signatures:{name}", **keys, "act": "auto", "norm": "auto", "added": {"norm": "auto"}}
    network = model({key: value for key, value in node.items() if key not in ("act", "norm")})
    assert network.fc.weight.shape == (5, inputs)


def test_arguments_with_default_values_are_keys_whatever_their_kind(configure: Configure) -> None:
    config = configure("model=signatures:Wide", "model.width=12", "model.bias=false")
    assert model({"name": "signatures:Wide", "width": 12, "bias": False}).fc.weight.shape == (5, 12)
    assert (config.model["width"], config.model["bias"]) == (12, False)
    for word, message in {
        "model.width=wide": r"model\.width=wide: must be a whole number, such as 8",
        "model.bias=3": r"model\.bias=3: must be true or false, such as True",
    }.items():
        key, _, value = word.removeprefix("model.").partition("=")
        with pytest.raises(ConfigError, match=message):
            registry.checked("model", {"name": "signatures:Wide", key: int(value) if value.isdigit() else value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_unknown", "argument depth has no value; qbench tried Net(), Net(num_classes) or build(shape, classes)\n"),
        ("only_by_place", "only_by_place() missing 1 required positional argument"),
        ("exists", "exists is an object of class Plain; every run needs a new object, made with the run's seed\n"),
        ("Plian", "Plian is not in module signatures; did you mean Plain?"),
    ],
)
def test_other_forms_are_refused_with_what_was_tried(name: str, message: str) -> None:
    with pytest.raises((ConfigError, TypeError)) as raised:
        model({"name": f"signatures:{name}"})
    assert message in str(raised.value)


def test_a_class_without_an_initializer_of_its_own_gets_no_arguments() -> None:
    assert not list(model({"name": "signatures:Bare"}).parameters())


def test_the_normalization_of_a_users_network_is_no_part_of_the_identity_at_its_default(configure: Configure) -> None:
    default = run_identity(configure("model=signatures:Plain"))
    assert "norm" not in default.keys["model"]
    other = run_identity(configure("model=signatures:Plain", "model.norm=no_affine"))
    assert other.keys["model"]["norm"] == "no_affine"


@pytest.mark.parametrize("name", ["my_net.py:Net", "./my_net.py:Net", "my_net:", "my-net:Net"])
def test_a_name_that_python_cannot_import_is_refused_with_the_right_form(name: str) -> None:
    with pytest.raises(ConfigError, match="not a valid name; for your own function, type model=") as raised:
        registry.find("model", name)
    assert str(raised.value).endswith("my_net:Net" if ".py:" in name else "package.module:function")


@pytest.mark.parametrize("reserved", ["source", "deviation", "recipe", "family"])
def test_an_argument_with_the_name_of_a_key_of_qbench_is_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved: str
) -> None:
    (tmp_path / "reserved.py").write_text(f"def build(shape, classes, {reserved}='a'):\n    raise AssertionError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = f"the argument `{reserved}` has the name of a key that qbench uses itself\nrename the argument"
    with pytest.raises(ConfigError, match=message):
        configure("model=reserved:build")
    with pytest.raises(ConfigError, match=message):
        registry.create("model", {"name": "reserved:build"}, shape=(1, 8, 8), classes=3)


@pytest.mark.parametrize("word", ["model.source=abc", "+model.source=abc", "method.source=abc", "+dataset.source=a"])
def test_the_digest_of_a_users_file_cannot_be_typed(configure: Configure, word: str) -> None:
    with pytest.raises(ConfigError, match=r"source from the content of your file; leave it out"):
        configure("model=signatures:Plain", word)


def test_the_content_of_a_file_that_a_users_yaml_names_is_part_of_the_identity(
    configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: signatures:Wide\nwidth: 12\n")
    words = ("--config-dir", str(tmp_path), "model=mine")
    before = configurations(["model=signatures:Wide", "model.width=12"])[0].model
    (config,) = configurations([*words])
    assert config.model["source"] == before["source"]
    hashes = [run_identity(config).digest]
    (tmp_path / "signatures.py").write_text(NETWORKS + "\n")
    hashes += [run_identity(configurations([*words])[0]).digest]
    assert hashes[0] != hashes[1]


def test_a_users_file_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script `qbench` has another first entry of sys.path than `python -m qbench`."""
    monkeypatch.setattr("sys.path", [place for place in sys.path if place not in ("", ".", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found_here.py").write_text("")
    assert registry.users_file("model", {"name": "found_here:Net"}) == tmp_path / "found_here.py"
    assert registry.users_file("model", {"name": "resnet20", "family": "resnet"}) is None
