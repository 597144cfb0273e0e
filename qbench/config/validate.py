"""Checks a composed configuration and fills in derived values.

Error messages show keys as a user types them.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from types import NoneType

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from qbench.bits import FLOAT
from qbench.config.fields import ACTS, HEADS, WIDTHS, is_width, parse_bits
from qbench.config.identity import ADDED
from qbench.config.recipe_checks import check_recipes, check_schedule
from qbench.config.registry import source_digest, users_file
from qbench.config.schema import (
    STARTS,
    BitWidths,
    Config,
    Distill,
    Layers,
    Node,
    Optim,
    baseline_config,
    sweep_hint,
)
from qbench.config.unknown_key import unknown_key_message
from qbench.errors import ConfigError

NODES = ("model", "dataset", "method", "activation")
"""The keys of `Config` whose values are YAML nodes."""


def from_dict(values: Mapping[str, object]) -> Config:
    """Return the configuration from the values of a stored `config.yaml` (see `from_node`).

    Interpolations `${...}` are refused. A stored configuration contains no interpolations, and an interpolation could
    read the environment.
    """
    _check_no_interpolation(values)
    try:
        return from_node(OmegaConf.create(_with_current_keys(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"not a valid configuration: {str(error).partition(chr(10))[0]}") from None


def _with_current_keys(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with `activation_memory` in place of `compress_activations`, which earlier versions stored."""
    runtime = values.get("runtime")
    if not isinstance(runtime, Mapping) or "compress_activations" not in runtime:
        return dict(values)
    others = {key: value for key, value in runtime.items() if key != "compress_activations"}
    memory = "codes" if runtime["compress_activations"] else "recompute"
    return {**values, "runtime": {"activation_memory": memory, **others}}


def _check_no_interpolation(value: object, path: str = "") -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_no_interpolation(item, f"{path}{key}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_no_interpolation(item, path)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path[:-1]}={value}: a configuration must contain values, not ${{...}}")


def from_node(node: DictConfig) -> Config:
    """Check a composed configuration, fill in derived values, and return it as dataclasses.

    Raises:
        ConfigError: a key does not exist, or a value has the wrong type or is out of range.
    """
    try:
        node = _with_text_patterns(node)
        _check_nodes(Config, node)
        merged = OmegaConf.merge(OmegaConf.structured(Config), node)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key), node)) from None
    except ValidationError as error:
        raise ConfigError(_wrong_type(error, node)) from None
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; type {error.full_key}=VALUE") from None
    except OverflowError as error:
        raise ConfigError(f"a number is out of range: {str(error).partition(chr(10))[0]}") from None
    except RecursionError:
        raise ConfigError("a value is nested too deeply or contains itself") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    _check(config)
    _check_plain(config)
    return _filled(config)


def _with_text_patterns(node: DictConfig) -> DictConfig:
    """Return a configuration in which layer rules have text as keys. `nn.Sequential` names its layers 0, 1, ..."""
    rules = OmegaConf.select(node, "layers.rules")
    if not isinstance(rules, DictConfig) or not any(type(pattern) is int for pattern in rules):
        return node
    changed = node.copy()
    changed.layers.rules = {str(key) if type(key) is int else key: value for key, value in rules.items()}
    return changed


def with_digests(config: Config) -> Config:
    """Add `source`, the digest of a file, to each node that names a function in a file outside qbench.

    The code in the file can change the result of a run.
    """
    nodes = {"model": config.model, "dataset": config.dataset}
    for group, node in (("method", config.method), ("method", config.activation), *nodes.items()):
        if file := users_file(group, node):
            node["source"] = source_digest(file)
    return config


def _check_plain(value: object, path: str = "") -> None:
    """Refuse YAML values that are never valid, such as bytes, dates and integers over 64 bits."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path}{key}={item}: a key must be text; quote it: '{key}'")
            _check_plain(item, f"{path}{key}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, path)
    elif isinstance(value, str) and "${" in value:  # typed as \${: `from_dict` would refuse the stored configuration
        raise ConfigError(f"{path[:-1]}={value}: a configuration must contain values, not ${{...}}")
    elif not isinstance(value, str | float | NoneType) and not (isinstance(value, int) and abs(value) < 2**63):
        raise ConfigError(f"{path[:-1]}={value}: must be text, a number up to 64 bits, true, false, null or a list")


def _check_nodes(schema: type, node: DictConfig, path: str = "") -> None:
    """Refuse a plain value in place of a group of keys. The error message states what is allowed."""
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    for item in dataclasses.fields(schema):
        nested, optional = dataclasses.is_dataclass(item.type), item.name in ("rules", "claim")
        holds_keys = nested or "dict" in str(item.type)
        if item.name not in values or not holds_keys or (optional and values[item.name] is None):
            continue
        if not isinstance(values[item.name], dict):
            choice = f"{item.name}@{path}{item.name}=NAME" if path else f"{item.name}=NAME"
            allowed = {
                "rules": "layer-name patterns and widths, such as {layer1.*: 8}",
                "claim": "keys and values in an experiment file",
                "lr_grid": "lr_grid.factors=[0.1,0.3,1,3,10]",
            }
            raise ConfigError(f"{path}{item.name}={values[item.name]}: must be a group of keys, not a single "
                              f"value\nallowed: {allowed.get(item.name, choice)}")  # fmt: skip
        if isinstance(item.type, type) and nested:
            _check_nodes(item.type, node[item.name], f"{path}{item.name}.")


def _filled(config: Config) -> Config:
    """Fill in the method's bit widths. Convert a float run from scratch to a float baseline.

    If the method requires random initial weights or a teacher, the value `auto` of `init` or `distill.name` becomes
    `method`. The protocol (the keys that must be equal in compared runs) replaces `method` by the default of methods
    without such a requirement, so the run can be compared with runs of these methods. A value that the user typed
    enters the protocol unchanged.
    """
    if config.init == "imagenet":
        config.init = _imagenet_weights(config)
    if config.init not in ("auto", *STARTS) and not os.path.exists(config.init):
        raise ConfigError(
            f"init={config.init}: no such file or directory\n"
            "allowed: auto, float, scratch, imagenet, or the path of a run's directory or a checkpoint"
        )
    _refuse_stored_values(config)
    if config.debug:
        _one_step(config)
    nodes = (config.method, config.activation)
    widths, composed_widths = (parse_bits(str(node.pop("bits", f"w{FLOAT}"))) for node in nodes)
    from_scratch = "scratch" in [node.pop("init", "") for node in nodes]
    requires_teacher = "kd" in [node.pop("distill", "") for node in nodes]
    _fill_bits(config, widths, composed_widths)
    _check(config)
    _fill_distill(config.distill, requires_teacher)
    if config.method_name == "float" and config.bits == BitWidths(FLOAT, FLOAT, FLOAT):
        if config.init not in ("auto", "scratch"):
            return config
        return dataclasses.replace(baseline_config(config), rerun=config.rerun, claim=config.claim)
    if config.init == "auto":
        config.init = "method" if from_scratch else "float"
    return config


def _one_step(config: Config) -> None:
    """Change a configuration for a debug run: at most one epoch, no warm-up, and no use of stored results.

    `qbench.experiment.setup` later reduces the training set to the images of one weight update.
    """
    config.epochs, config.pretrain.epochs, config.rerun = min(config.epochs, 1), 1, True
    for optim in (config.optim, config.pretrain.optim):
        optim.warmup = 0.0


def _imagenet_weights(config: Config) -> str:
    """Return the path of torchvision's ImageNet weights for the run's network.

    Raises:
        CheckpointError: the file of weights is missing or damaged.
        ConfigError: torchvision has no weights for this network.
    """
    from qbench.system.torchvision import imagenet_weights  # imports torch

    net = str(config.model.get("net", config.model["name"]))
    try:
        return str(imagenet_weights(net, download=bool(config.dataset.get("download"))))
    except ValueError as error:
        raise ConfigError(f"init=imagenet: {error}") from None


def _refuse_stored_values(config: Config) -> None:
    """Refuse values that only stored configurations may have.

    The key `method.bits` is removed before a configuration is stored. A configuration that lacks this key is therefore
    a stored one.
    """
    if "bits" not in config.method:
        return
    if config.init == "method":
        raise ConfigError("init=method: must be auto, float, scratch, imagenet, or the path of a run or a checkpoint")
    if config.distill.name == "method":
        raise ConfigError("distill.name=method: must be one of auto, none, kd")
    if config.model.get("head") == "new" and config.init in ("auto", *STARTS):
        raise ConfigError(f"model.head=new has no effect with init={config.init}; name a checkpoint: init=FILE")
    for group, node in (("method", config.method), ("activation", config.activation)):
        for key, known in (("init", "scratch"), ("distill", "kd")):
            if node.get(key, known) != known:
                raise ConfigError(f"{group}.{key}={node[key]}: cannot be set here; type {key}={node[key]}")


def _fill_bits(config: Config, widths: dict[str, int | None], composed: dict[str, int | None]) -> None:
    """Set each bit width that the user did not type to the default of the method.

    If a separate method quantizes the activations, the default width of the activations comes from that method.
    """
    name = config.activation["name"]
    if name != "none":
        widths = widths | {"a": composed["a"]}
    for key in "wag":
        if getattr(config.bits, key) is None:
            setattr(config.bits, key, widths[key] or FLOAT)
    if name != "none" and config.bits.a == FLOAT:
        raise ConfigError(
            f"activation={name} has no effect at bits.a={FLOAT}; set the width of activations, such as bits.a=2\n"
            f"to see the supported widths, type: qbench describe {name}"
        )


def _fill_distill(distill: Distill, requires_teacher: bool) -> None:
    """Replace the value `auto` of `distill.name`. Refuse keys that describe a teacher if there is no teacher."""
    if distill.name == "auto":
        distill.name = "method" if requires_teacher else "none"
    if distill.teacher != "baseline" and not os.path.isdir(distill.teacher):
        raise ConfigError(
            f"distill.teacher={distill.teacher}: no such directory\n"
            "allowed: baseline, or the directory of a finished run"
        )
    for item in dataclasses.fields(Distill):
        if not distill.on and item.name != "name" and getattr(distill, item.name) != item.default:
            raise ConfigError(f"distill.{item.name} has no effect without a teacher; add distill=kd")


def _check(config: Config) -> None:
    """Check the declared ranges of all keys, and the YAML nodes."""
    _check_ranges(config)
    check_recipes(config.optim, config.epochs, config.pretrain)
    for group in NODES:
        _check_named(group, getattr(config, group))
    if config.model.get("act", "auto") not in ACTS:
        raise ConfigError(f"model.act={config.model['act']}: must be one of {', '.join(ACTS)}")
    if config.model.get("head", "keep") not in HEADS:
        raise ConfigError(f"model.head={config.model['head']}: must be one of {', '.join(HEADS)}")
    _check_shards(config)


def _check_shards(config: Config) -> None:
    """Check that `batch_shards` divides the batch sizes, and that it is 1 if the network is compiled."""
    shards = config.batch_shards
    for key, optim in (("optim", config.optim), ("pretrain.optim", config.pretrain.optim)):
        if optim.batch_size % shards:
            raise ConfigError(
                f"batch_shards={shards} does not divide {key}.batch_size={optim.batch_size}\n"
                f"type {key}.batch_size={-(-optim.batch_size // shards) * shards}, or a smaller batch_shards"
            )
    if shards > 1 and config.runtime.compile:
        raise ConfigError(f"batch_shards={shards}: must be 1 with runtime.compile=true\nremove one of the two")


def _check_named(group: str, node: Node) -> None:
    """Check that a YAML node has a key `name`, and that every key listed under `added` exists in the node."""
    if not isinstance(node.get("name"), str):
        raise ConfigError(f"{group}.name is missing; type {group}=NAME")
    added = node.get(ADDED) or {}
    if not isinstance(added, dict) or not set(added) <= set(node):
        raise ConfigError(f"{group}.{ADDED}={added}: must be keys of {node['name']}, each with its default value")


def _check_ranges(node: object, path: str = "") -> None:
    """Check the declared ranges of a dataclass and of the dataclasses inside it."""
    assert dataclasses.is_dataclass(node)
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{key}.")
        elif value is not None and "holds" in item.metadata and not item.metadata["holds"](value):
            raise ConfigError(f"{key}={value}: must be {item.metadata['allowed']}")
    if isinstance(node, Optim):
        check_schedule(node, path)
    if isinstance(node, Layers):
        for pattern, width in (node.rules or {}).items():
            if not is_width(width):
                raise ConfigError(f"{path}rules[{pattern}]={width}: must be {WIDTHS}")


def _unknown_key(key: str, node: DictConfig) -> str:
    """Return the message about an unknown key, with the most similar key and all keys of the node."""
    if key == "experiment":
        return "experiment: no such key\nthe first line of an experiment file must be `# @package _global_`"
    tree = OmegaConf.to_container(node)
    assert isinstance(tree, dict)
    return unknown_key_message(key, tree)


def _wrong_type(error: ValidationError, node: DictConfig) -> str:
    """Return the message about a value of the wrong type, derived from OmegaConf's message."""
    key = str(error.full_key)
    value = OmegaConf.select(node, key)
    expected = re.search(
        r"(?:to |valid |not a |hint ')(Integer|Float|bool|string|ListConfig|Union\[[^]]*\])", str(error)
    )
    words = {
        "Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "text",
        "ListConfig": "a list",
    }  # fmt: skip
    kind = words.get(expected.group(1), WIDTHS) if expected else "a value" if value is None else "of another type"
    sweep = f"\n{sweep_hint(key, value)}" if isinstance(value, ListConfig) else ""
    return f"{key}={value}: must be {kind}{sweep}"
