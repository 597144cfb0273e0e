"""The identity of a run: its keys and digest are pinned; added keys leave them unchanged."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Configure

from qbench.config import compose
from qbench.config.fields import marked, one_of, within
from qbench.config.identity import decisive_keys, digest, run_identity
from qbench.config.schema import SCHEMA, Config, Layers, LearningRateGrid, Optim, Runtime, to_dict
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.experiment.builders import build_method
from qbench.runs.directory import directory_name

OPTIM_KEYS = {
    "name", "lr", "schedule", "lr_end", "milestones", "gamma", "batch_size", "weight_decay", "momentum", "nesterov",
    "eps", "label_smoothing", "clip_norm", "ema", "patience",
}  # fmt: skip
KEYS: dict[str, Any] = {
    "schema": None,
    "model": {"name", "family", "depth", "width", "stem_stride", "form", "shortcut", "norm", "act"},
    "dataset": {"name", "val", "pad"},
    "method": {"name", "activation", "deviation"},
    "activation": {"name"},
    "bits": {"w", "a", "g"},
    "optim": OPTIM_KEYS,
    "layers": {"first", "last", "downsample", "input", "rules"},
    "distill": {"name", "teacher", "temperature", "weight"},
    "runtime": {"threads", "deterministic"},
    "pretrain": {"epochs", "optim"},
    "seed": None,
    "epochs": None,
    "init": None,
}
DIGEST = "fc8673da6d59802060a8652f6c6fcaf2b69bbf47bdf9fff15634236521c112d6"
PROTOCOL_HASH = "54a0eaa76d65a7f19131261d3fdec9863bf87771656dfec9eda45ceb82b631b3"
"""Of `method=dorefa bits=w2a2` under the defaults. They may only change together with
`schema.SCHEMA`: results that are stored under other digests are no longer found.
"""


def test_the_keys_of_the_identity_are_pinned(configure: Configure) -> None:
    """A new key that fails here must be marked as added, or `schema.SCHEMA` must change."""
    keys = run_identity(configure("method=dorefa")).keys
    assert {key: set(value) if isinstance(value, dict) else None for key, value in keys.items()} == KEYS
    assert set(keys["pretrain"]["optim"]) == OPTIM_KEYS
    assert keys["schema"] == SCHEMA == 2


def test_one_digest_is_pinned(configure: Configure) -> None:
    identity = run_identity(configure("method=dorefa", "bits=w2a2"))
    assert (identity.digest, identity.protocol_hash) == (DIGEST, PROTOCOL_HASH)
    assert str(directory_name(identity)) == f"digits-resnet8/dorefa-w2a2g32-s0-{DIGEST[:8]}"


@dataclass
class LaterOptim(Optim):
    """An optimizer node with keys that were added later."""

    polish: float = within(1.0, 0, added=True)
    order: str = one_of("forward", "forward", "backward", added=True)
    sharpness: bool = marked(False, added=True)


@dataclass
class LaterRuntime(Runtime):
    """A runtime with a key that cannot change a result."""

    colour: str = marked("blue", free=True)


@dataclass
class UnmarkedOptim(Optim):
    """An optimizer node with a new key without a mark."""

    polish: float = within(1.0, 0)


def later(optim: Optim, kind: type[Optim] = LaterOptim, **values: Any) -> Optim:
    return kind(**(vars(optim) | values))


def both(config: Config) -> tuple[str, str]:
    """Return the two digests of a configuration."""
    identity = run_identity(config)
    return identity.digest, identity.protocol_hash


def test_an_added_field_counts_only_where_it_differs_from_its_default(configure: Configure) -> None:
    config = configure("method=dorefa", "bits=w2a2")
    before = both(config)
    with_defaults = replace(
        config,
        optim=later(config.optim),
        pretrain=replace(config.pretrain, optim=later(config.pretrain.optim)),
        runtime=LaterRuntime(**vars(config.runtime) | {"colour": "red"}),
    )
    assert both(with_defaults) == before
    for change in ({"polish": 2.0}, {"order": "backward"}, {"sharpness": True}):
        changed = replace(config, optim=later(config.optim, **change))
        assert set(both(changed)) & set(before) == set(), change
        nested = replace(config, pretrain=replace(config.pretrain, optim=later(config.pretrain.optim, **change)))
        assert set(both(nested)) & set(before) == set(), change
    unmarked = replace(config, optim=later(config.optim, UnmarkedOptim))
    assert set(both(unmarked)) & set(before) == set(), "without the mark, a new key changes both digests"


@pytest.mark.parametrize("group", ["method", "model", "dataset"])
def test_an_added_key_of_yaml_counts_only_where_it_differs_from_its_value(configure: Configure, group: str) -> None:
    config = configure("method=dorefa", "bits=w2a2")
    before, options = both(config), run_identity(config).options
    node = getattr(config, group)
    node = node | {"added": node.get("added", {}) | {"polish": 1, "order": [1, 2]}}
    at_default = replace(config, **{group: node | {"polish": 1.0, "order": [1, 2]}})
    assert both(at_default) == before
    assert run_identity(at_default).options == options
    for change in ({"polish": 2, "order": [1, 2]}, {"polish": 1, "order": [2, 1]}):
        other = replace(config, **{group: node | change})
        assert run_identity(other).digest != before[0], change
        assert (run_identity(other).protocol_hash == before[1]) is (group == "method"), change
        assert "added" not in run_identity(other).keys[group]
        assert "added" not in run_identity(other).options


ADDED_YAML = """
name: dorefa
bits: w2
activation: clip
deviation: none
added: {activation: clip}
"""


def test_an_added_key_of_a_file(configure: Configure, tmp_path: Path) -> None:
    """From the YAML file to the factory, and back from a stored configuration."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "later.yaml").write_text(ADDED_YAML)

    def composed(*words: str) -> Config:
        return configure("--config-dir", str(tmp_path / "conf"), "method=later", "bits=w2a2", *words)

    at_default, changed = composed(), composed("method.activation=abs")
    assert run_identity(at_default).keys["method"] == {"name": "dorefa", "deviation": "none"}
    assert run_identity(changed).keys["method"] == {"name": "dorefa", "activation": "abs", "deviation": "none"}
    assert (run_identity(at_default).options, run_identity(changed).options) == ({}, {"activation": "abs"})
    for config in (at_default, changed):
        method = build_method(config.method, config.activation, config.bits.resolved())
        assert method.name == "dorefa", "the factory does not get the key `added`"
        stored = from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))))
        assert run_identity(stored).digest == run_identity(config).digest


def test_added_must_name_keys_of_the_node(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "later.yaml").write_text(ADDED_YAML.replace("{activation:", "{activaton:"))
    with pytest.raises(ConfigError, match=r"method\.added=.*activaton.*: must be keys of dorefa"):
        configure("--config-dir", str(tmp_path / "conf"), "method=later")


def test_the_rule_of_a_field_of_a_dataclass() -> None:
    assert decisive_keys(Runtime(device="cuda", log_every=1)) == {"threads": 1, "deterministic": True}
    assert decisive_keys(Runtime(precision="bf16", compile=True)) == {
        "threads": 1, "deterministic": True, "precision": "bf16", "compile": True,
    }  # fmt: skip
    assert set(decisive_keys(Layers())) == {"first", "last", "downsample", "input", "rules"}
    assert decisive_keys(LearningRateGrid([0.5, 1.0]))["factors"] == [0.5, 1.0]


def test_a_digest_ignores_order_and_notation() -> None:
    assert digest({"a": 1, "b": [2.0, {"c": 3}]}) == digest({"b": [2, {"c": 3.0}], "a": 1.0})
    assert digest({"a": 1}) != digest({"a": True + 1})


@pytest.mark.parametrize(
    ("rules", "decisive"),
    [
        ("{layer1.*: 8, layer1.0.*: 4}", True),
        ("{*.conv1: 8, layer1.*: 4}", True),
        ("{layer1.*: 8, layer2.*: 4}", False),
        ("{layer1.*: 8, layer1.0.*: 8}", False),
        ("{conv1: 8, layer1.*: 4}", False),
    ],
)
def test_the_order_of_layer_rules_counts_if_they_may_match_the_same_layer(
    configure: Configure, rules: str, decisive: bool
) -> None:
    other = "{" + ", ".join(reversed(rules.strip("{}").split(", "))) + "}"
    one, two = (run_identity(configure("method=dorefa", f"layers.rules={text}")) for text in (rules, other))
    assert (one.digest != two.digest) is decisive
    assert (one.protocol_hash != two.protocol_hash) is decisive


def test_the_code_of_an_installed_package_is_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that another package registers changes with the package, as a user's file does."""
    package, about = tmp_path / "registered.py", tmp_path / "registered-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: registered\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[qbench.methods]\nmine = registered:build\n")
    package.write_text("from qbench.methods.uniform import build\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digest_of(method: str) -> str:
        (config,) = compose.configurations([f"method={method}", "bits=w4a4"])
        assert ("source" in config.method) == (method == "mine")
        return run_identity(config).digest

    first, own = digest_of("mine"), digest_of("uniform")
    assert first == digest_of("mine")
    package.write_text("from qbench.methods.uniform import build  # edited\n")
    assert digest_of("mine") != first
    assert digest_of("uniform") == own
