"""From a composed configuration to a checked one: types, ranges, what follows from what, mistakes named as typed."""

import dataclasses
import os
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from qbench.config.fields import ACTS, FLOAT, WIDTHS, is_width, parse_bits
from qbench.config.schema import STARTS, Bits, Config, Distill, Layers, Optim, did_you_mean, parent
from qbench.errors import ConfigError


def from_dict(values: Mapping[str, Any]) -> Config:
    """Return the configuration of a stored `config.yaml`; see `from_node`."""
    try:
        return from_node(OmegaConf.create(dict(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"no configuration: {str(error).partition(chr(10))[0]}") from None


def from_node(node: DictConfig) -> Config:
    """Check a composed configuration against the schema, fill in what follows, and return it as dataclasses.

    Raises:
        ConfigError: a key that does not exist, a value of the wrong type or out of range, named as typed.
    """
    try:
        _check_nodes(Config, node)
        merged = OmegaConf.merge(OmegaConf.structured(Config), node)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown(str(error.full_key), Config)) from None
    except ValidationError as error:
        raise ConfigError(_wrong_type(error, node)) from None
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give it one: {error.full_key}=VALUE") from None
    except OverflowError as error:
        raise ConfigError(f"a number is out of range: {str(error).partition(chr(10))[0]}") from None
    except RecursionError:
        raise ConfigError("nested too deeply, or made of itself") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    _check(config)
    _check_plain(config)
    return _filled(config)


def _check_plain(value: Any, path: str = "") -> None:
    """Refuse what YAML can say and no key means: bytes, dates, numbers beyond 64 bits, keys that are no text."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path}{key}={item}: a key is text; quote it: '{key}'")
            _check_plain(item, f"{path}{key}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, path)
    elif not isinstance(value, str | float | NoneType) and not (isinstance(value, int) and abs(value) < 2**63):
        raise ConfigError(f"{path[:-1]}={value}: allowed are text, numbers up to 64 bits, true, false, null and lists")


def _check_nodes(schema: type, node: DictConfig, path: str = "") -> None:
    """Refuse a plain value in the place of a group of keys, which OmegaConf would name in its own words."""
    values: Any = OmegaConf.to_container(node)
    for item in dataclasses.fields(schema):
        nested, optional = dataclasses.is_dataclass(item.type), item.name in ("rules", "claim")
        holds_keys = nested or "dict" in str(item.type)
        if item.name not in values or not holds_keys or (optional and values[item.name] is None):
            continue
        if not isinstance(values[item.name], dict):
            choice = f"{item.name}@{path}{item.name}=NAME" if path else f"{item.name}=NAME"
            allowed = {
                "rules": "layer-name patterns and widths, {layer1.*: 8}",
                "claim": "what an experiment file says",
                "grid": "lr_grid.factors=[0.1,0.3,1,3,10]",
            }
            raise ConfigError(f"{path}{item.name}={values[item.name]}: it holds keys of its own\n"
                              f"allowed: {allowed.get(item.name, choice)}")  # fmt: skip
        if nested:
            _check_nodes(item.type, node[item.name], f"{path}{item.name}.")  # type: ignore[arg-type]


def _filled(config: Config) -> Config:
    """Fill in the widths that the method decides; make a float run from scratch the parent it is.

    What is left at `auto` and the method asks for becomes `method`: its own, beside others under the shared protocol.
    What is typed is a protocol of its own, under which other methods can be run as well.
    """
    if config.init not in ("auto", *STARTS) and not os.path.exists(config.init):
        raise ConfigError(
            f"init={config.init}: no such file or directory\n"
            "allowed: auto, float, scratch, or the path of a run's directory or a checkpoint"
        )
    _refuse_asks(config)
    nodes = (config.method, config.activation)
    own, composed = (parse_bits(str(node.pop("bits", f"w{FLOAT}"))) for node in nodes)
    from_scratch = "scratch" in [node.pop("init", "") for node in nodes]
    taught = "kd" in [node.pop("distill", "") for node in nodes]
    _fill_bits(config, own, composed)
    _check(config)
    _fill_distill(config, taught)
    if config.method_name == "float" and config.bits == Bits(FLOAT, FLOAT, FLOAT):
        if config.init not in ("auto", "scratch"):
            return config
        return dataclasses.replace(parent(config), rerun=config.rerun, claim=config.claim)
    if config.init == "auto":
        config.init = "method" if from_scratch else "float"
    return config


def _refuse_asks(config: Config) -> None:
    """Refuse on a command line what only a stored configuration says: there, the method's node has no `bits` left."""
    if "bits" not in config.method:
        return
    if config.init == "method":
        raise ConfigError("init=method: allowed are auto, float, scratch, or the path of a run or a checkpoint")
    if config.distill.name == "method":
        raise ConfigError("distill.name=method: allowed are auto, none, kd")
    for group, node in (("method", config.method), ("activation", config.activation)):
        for key, known in (("init", "scratch"), ("distill", "kd")):
            if node.get(key, known) != known:
                raise ConfigError(f"{group}.{key}={node[key]}: that is the method's to say; write {key}={node[key]}")


def _fill_bits(config: Config, own: dict[str, int | None], composed: dict[str, int | None]) -> None:
    """Take the widths left unset from the method, those of activations from the one composed with it."""
    name = config.activation["name"]
    if name != "none":
        own = own | {"a": composed["a"]}
    for key in "wag":
        if getattr(config.bits, key) is None:
            setattr(config.bits, key, own[key] or FLOAT)
    if name != "none" and config.bits.a == FLOAT:
        raise ConfigError(
            f"activation={name} has no effect at bits.a={FLOAT}; say how wide activations are: bits.a=2 "
            f"(qbench describe {name} says which widths it knows)"
        )


def _fill_distill(config: Config, taught: bool) -> None:
    """Decide on `auto`; refuse keys of a teacher where there is none."""
    distill = config.distill
    if distill.name == "auto":
        distill.name = "method" if taught else "none"
    if distill.teacher != "baseline" and not os.path.isdir(distill.teacher):
        raise ConfigError(
            f"distill.teacher={distill.teacher}: no such directory\nallowed: parent, or the directory of a finished run"
        )
    for item in dataclasses.fields(Distill):
        if not distill.on and item.name != "name" and getattr(distill, item.name) != item.default:
            raise ConfigError(f"distill.{item.name} has no effect without a teacher; add distill=kd")


def _check(node: Any, path: str = "") -> None:
    """Check the declared ranges of a dataclass and those inside it."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(value):
            _check(value, f"{key}.")
        elif value is not None and "holds" in item.metadata and not item.metadata["holds"](value):
            raise ConfigError(f"{key}={value}: allowed is {item.metadata['allowed']}")
    if isinstance(node, Optim):
        _check_schedule(node, path)
    if isinstance(node, Layers):
        for pattern, width in (node.rules or {}).items():
            if not is_width(width):
                raise ConfigError(f"{path}rules[{pattern}]={width}: allowed is {WIDTHS}")
    if isinstance(node, Config):
        for group in ("model", "dataset", "method", "activation"):
            if not isinstance(getattr(node, group).get("name"), str):
                raise ConfigError(f"{group}.name is missing; choose one with {group}=NAME")
        if node.model.get("act", "auto") not in ACTS:
            raise ConfigError(f"model.act={node.model['act']}: allowed are {', '.join(ACTS)}")


def _check_schedule(optim: Optim, path: str) -> None:
    marks = optim.milestones
    if marks != sorted(marks) or not all(0 < mark < 1 for mark in marks):
        raise ConfigError(f"{path}milestones={marks}: allowed are ascending parts of a phase between 0 and 1")
    if optim.schedule == "step" and not marks:
        raise ConfigError(f"{path}schedule=step wants milestones, e.g. '{path}milestones=[0.5,0.75]'")
    if optim.schedule == "exponential" and not 0 < optim.lr_end <= optim.lr:
        raise ConfigError(
            f"{path}lr={optim.lr:g} with {path}lr_end={optim.lr_end:g}: an exponential schedule wants 0 < lr_end <= lr"
        )
    if optim.nesterov and not optim.momentum:
        raise ConfigError(f"{path}nesterov=true wants {path}momentum above 0")


def _unknown(key: str, schema: type) -> str:
    """Say that a key does not exist, with the nearest and all of its neighbours."""
    if key == "experiment":
        return "experiment: no such key\na file of an experiment says `# @package _global_` in its first line"
    *way, leaf = key.split(".")
    for part in way:
        kinds = {f.name: f.type for f in dataclasses.fields(schema)}
        schema = kinds.get(part, schema)  # type: ignore[assignment]
    names = [f.name for f in dataclasses.fields(schema)]
    prefix = "".join(f"{part}." for part in way)
    return f"{key}: no such key{did_you_mean(leaf, names)}\nallowed: {', '.join(prefix + name for name in names)}"


def _wrong_type(error: ValidationError, node: DictConfig) -> str:
    key = str(error.full_key)
    got = OmegaConf.select(node, key)
    wanted = re.search(r"(?:to |valid |not a |hint ')(Integer|Float|bool|string|ListConfig|Union\[[^]]*\])", str(error))
    words = {
        "Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "text",
        "ListConfig": "a list",
    }  # fmt: skip
    kind = words.get(wanted.group(1), WIDTHS) if wanted else "a value" if got is None else "another type"
    return f"{key}={got}: allowed is {kind}"
