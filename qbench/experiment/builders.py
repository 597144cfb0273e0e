"""Builds the data set, the method and the network, each from one node (group of keys) of the configuration."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qbench.bits import FLOAT, Bits
from qbench.config import registry
from qbench.config.groups import option_file, option_names
from qbench.config.identity import digest
from qbench.config.schema import Node
from qbench.config.signature import CLASS_COUNTS
from qbench.data import sources
from qbench.data.dataset import Dataset
from qbench.data.dataset_check import check_dataset
from qbench.data.own_data import as_dataset, has_validation
from qbench.data.spec import placeholder_dataset
from qbench.deviations.registry import deviate
from qbench.errors import ConfigError, DataError
from qbench.experiment.checks import check_norm
from qbench.models.memory_format import use_channels_last
from qbench.models.normalization import remove_scale_and_shift
from qbench.quant.combine import combine, supported_widths
from qbench.quant.method import Method, Unsupported
from qbench.system.caches import cached_for_command
from qbench.system.files import Json, read_yaml
from qbench.training.initial_weights import fits
from qbench.training.random_state import seed_everything


def build_dataset(node: Node) -> Dataset:
    """Return the data set that a node names. All runs in this process share the returned object.

    Raises:
        ConfigError: a key or value of the node is not valid.
        DataError: the data set's files are missing or damaged, or its values are not valid.
    """
    return _dataset(json.dumps(node, sort_keys=True))


@cached_for_command(2)
def _dataset(node_json: str) -> Dataset:
    node = json.loads(node_json)
    before = sources.stamp(node)
    data = _created_dataset(node)
    check_dataset(data, str(node["name"]))
    sources.remember_sha256(node, before, images_sha256(data))
    return data


def _created_dataset(node: Node) -> Dataset:
    """Call the function that a node names, and return its result as a data set.

    A user's function may return any form that `as_dataset` accepts.
    """
    name, val = str(node["name"]), float(node.get("val", registry.VAL))
    returned = registry.create("dataset", _arguments(node))
    if has_validation(returned) and val != registry.VAL and not registry.takes("dataset", node, "val"):
        raise ConfigError(
            f"dataset.val={val} has no effect, because {name} returns a validation split of its own\n"
            "leave out dataset.val"
        )
    try:
        return as_dataset(name, returned, val)
    except DataError as error:
        raise DataError(f"dataset={name}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"dataset.{error}") from None


def _arguments(node: Node) -> Node:
    """Return the node of a data set, without the key `val` if the data set's function has no such argument."""
    takes_val = registry.takes("dataset", node, "val")
    return {key: value for key, value in node.items() if key != "val" or takes_val}


def images_sha256(data: Dataset) -> str:
    """Return the sha256 of all images and labels of a data set, in their order."""
    return fingerprint_sha256(data.fingerprint())


def fingerprint_sha256(fingerprint: Mapping[str, Json]) -> str:
    """Return the digest of a data set's fingerprint, which a run's manifest also contains."""
    return digest({key: value for key, value in fingerprint.items() if key != "files_ignored"})


def build_imageless_dataset(node: Node) -> Dataset | None:
    """Return a data set without images, or None if the shape or the number of images is unknown.

    Raises:
        ConfigError: a key or value of the node is not valid.
    """
    registry.checked("dataset", _arguments(node))
    try:
        return placeholder_dataset(node)
    except ValueError as error:
        raise ConfigError(f"dataset.{error}") from None


def build_method(method: Node, activation: Node, bits: Bits) -> Method:
    """Return the method at the given widths, combined with an activation method if one is named.

    Args:
        activation: node of a separate method for the activations. Its name is `none` if there is no separate method.

    Raises:
        ConfigError: a key or value of the method is not valid.
        Unsupported: the method does not support the widths or options, or the methods cannot be combined.
    """
    if activation["name"] == "none":
        return create_method(method, bits, "method")
    weight = create_method(method, bits._replace(a=FLOAT), "method")
    gradients = FLOAT if supported_widths(weight, "g") else bits.g  # `combine` gives them to the first method that can
    return combine(weight, create_method(activation, bits._replace(w=FLOAT, g=gradients), "activation"))


def create_method(node: Node, bits: Bits, key: str) -> Method:
    """Return the method that a node names. `key` is the name of the node in error messages."""
    try:
        method = registry.create("method", node, **bits._asdict())
        if not isinstance(method, Method):
            raise ConfigError(f"method={node['name']}: the function returned a {type(method).__name__}, not a Method")
        return deviate(node["name"], str(node.get("deviation", "none")), method)
    except ConfigError as error:
        raise ConfigError(str(error).replace("method.", f"{key}.").replace("method=", f"{key}=")) from None
    except Unsupported as error:
        raise Unsupported(str(error).replace("method.", f"{key}.")) from None
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None


def method_card(node: Node) -> dict[str, str]:
    """Return the choices and deviations in a method's card, and the known deviation that the node selects."""
    sections = registry.sections(registry.card(node["name"]))
    card = {key.lower(): sections[key] for key in ("Choices", "Deviations") if key in sections}
    deviation = registry.known_deviations(node["name"]).get(str(node.get("deviation", "none")))
    if deviation:
        card["deviation"] = f"{node['deviation']}: {deviation[0]} Source: {deviation[1]}"
    return card


def build_model(node: Node, data: Dataset, method: Method, seed: int, device: str = "cpu") -> nn.Module:
    """Return the float network that a node describes, with initial weights drawn from a seed.

    `norm: auto` means the normalization that the method requires. If a user's network has no argument `norm` and the
    method requires `no_affine`, the scale and shift of all batch normalizations are removed.

    Args:
        device: the device on which the network is created. On `meta`, the network needs no memory.

    Raises:
        ConfigError: a key or value of the node is not valid.
        Unsupported: the network does not have the normalization that the method requires.
    """
    options = {key: value for key, value in node.items() if key not in ("act", "head")}
    norm = str(options.get("norm", "auto"))
    takes_norm = registry.takes("model", node, "norm")
    if norm == "auto" or not takes_norm:
        options.pop("norm", None)
    if norm == "auto" and "norm" in node and method.requires.norm is not None:
        norm = method.requires.norm
        options |= {"norm": norm} if takes_norm else {}
    counts = dict.fromkeys(CLASS_COUNTS, data.classes)
    with torch.device(device):
        seed_everything(seed)
        model = registry.create("model", options, shape=data.shape, **counts)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model={node['name']}: the function returned a {type(model).__name__}, not a torch.nn.Module"
            )
        if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
            raise ConfigError(
                f"model={node['name']}: the network has lazy layers, whose weights do not exist before the first call\n"
                "use the ordinary layers, such as nn.Conv2d in place of nn.LazyConv2d"
            )
        if norm == "no_affine" and not takes_norm:
            remove_scale_and_shift(model)
        check_norm(model, method.requires, method.name)
        use_channels_last(model)
    return model


def networks_that_fit(weights: Path, data: Dataset) -> list[str]:
    """Return the networks of `conf/model` that fit the weights in a checkpoint, as words such as `model=resnet20`."""
    method = build_method({"name": "float"}, {"name": "none"}, Bits())
    found = []
    for words, node in _networks():
        with suppress(ConfigError, Unsupported, NotImplementedError, RuntimeError):  # images may not fit the network
            if fits(build_model(node, data, method, 0, "meta"), weights):
                found.append(words)
    return found


def _networks() -> Iterator[tuple[str, Node]]:
    """Yield (words to type, node) for each network of `conf/model`.

    A network with the key `form` is yielded twice, once for each value of this key.
    """
    for name in option_names("model"):
        if not option_file("model", name).is_file():  # the option comes from another package
            continue
        node = read_yaml(option_file("model", name))
        yield f"model={name}", node
        if "form" in node:
            form = "post" if node["form"] == "pre" else "pre"
            yield f"model={name} model.form={form}", node | {"form": form}
