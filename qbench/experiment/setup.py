"""From a configuration to the things a run is made of: data, method, network, float weights to start from."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.config import registry
from qbench.config.identity import digest
from qbench.config.schema import STARTS, Config, parent
from qbench.cost.count import count_macs
from qbench.data.dataset import Dataset
from qbench.data.spec import placeholder_dataset
from qbench.deviations.registry import deviate
from qbench.errors import ConfigError
from qbench.experiment.checks import check_norm, check_requirements, check_runtime
from qbench.experiment.device import bf16_autocast, choose_device, configure_torch
from qbench.experiment.trained_network import load_weights, stored_run
from qbench.quant.combine import combine, distilled
from qbench.quant.install import install
from qbench.quant.method import Method, Unsupported
from qbench.quant.policy import Policy, PolicyError
from qbench.training.initial_weights import load_initial_weights
from qbench.training.random_state import seed_everything


@dataclass(frozen=True)
class ExperimentSetup:
    """What a run is made of, checked against each other before anything is written."""

    config: Config
    data: Dataset
    method: Method
    macs: dict[str, int]
    device: torch.device

    @property
    def parent(self) -> Config:
        """The run of the float network to start from."""
        return parent(self.config, self.method.requires.norm)

    @property
    def network(self) -> dict[str, str]:
        """What is unusual about the network around the quantizers, because the method requires it or a key says so."""
        norm = self.method.requires.norm or self.config.model.get("norm", "auto")
        return {} if norm in ("auto", "affine") else {"norm": str(norm)}

    @property
    def protocol_changes(self) -> list[str]:
        """What the method does otherwise than the shared protocol, because it asks for it."""
        teacher = "its float parent" if self.config.distill.teacher == "baseline" else "another run"
        return [
            *(["trained from scratch, as it asks"] if self.config.init == "method" else []),
            *([f"distilled from {teacher}, as it asks"] if self.config.distill.name == "method" else []),
            *([] if self.method.needs_training else ["not trained: post-training quantization"]),
        ]

    @property
    def card(self) -> dict[str, dict[str, str]]:
        """What a reader of the result must know: method -> choices, deviations, and the deviation asked for, if any."""
        nodes = [node for node in (self.config.method, self.config.activation) if node["name"] != "none"]
        return {str(node["name"]): _card(node) for node in nodes}

    @property
    def epochs(self) -> int:
        """Epochs that are trained."""
        return self.config.epochs if self.method.needs_training else 0

    def with_teacher(self, parent: Path | None) -> Method:
        """Return the method, with its teacher where there is one; `parent` is the float parent's run."""
        distill, config = self.config.distill, self.config
        if not distill.on:
            return self.method
        if distill.teacher == "baseline":
            teacher = self.float_model()
            assert parent is not None
            load_initial_weights(teacher, parent, digest(self.parent.identity()))
        else:
            teacher = _load_teacher(config, self.data)
            configure_torch(config)
        hard = partial(F.cross_entropy, label_smoothing=config.optim.label_smoothing)
        teacher = teacher.to(self.device).eval().requires_grad_(False)
        return distilled(self.method, teacher, temperature=distill.temperature, weight=distill.weight, hard=hard)

    def float_model(self, device: str = "cpu") -> nn.Module:
        """Return the float network with the initial weights of the run's seed; `meta` gives one without memory."""
        with torch.device(device):
            return _build_model(self.config, self.data, self.method)

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what computes the network's output in training and evaluation, as `runtime` wants it.

        Measurements and verification call the network itself, in float32.
        """
        runtime = self.config.runtime
        run: Callable[[Tensor], Tensor] = torch.compile(model) if runtime.compile else model
        return bf16_autocast(run, self.device) if runtime.precision == "bf16" else run

    def install(self, model: nn.Module) -> nn.Module:
        """Put the method into a float network, under the run's layer policy."""
        layers = self.config.layers
        policy = Policy(
            first=layers.first, last=layers.last, downsample=layers.downsample, input=layers.input,
            rules=layers.rules or {}, image_range=self.data.image_range,
        )  # fmt: skip
        example = torch.zeros(1, *self.data.shape, device=next(model.parameters()).device)
        try:
            return install(self.method, model, policy, example=example, act=str(self.config.model.get("act", "auto")))
        except PolicyError as error:
            raise ConfigError(f"layers.{error.key}: {error}") from None


def assemble(config: Config, *, planned: bool = False) -> ExperimentSetup:
    """Build everything once, on the CPU, to find what does not fit before any work.

    Args:
        planned: without the images of published data sets, of which shapes and counts are known; nothing can train.

    Raises:
        ConfigError: keys or values that no part takes, or that contradict each other.
        Unsupported: the method cannot do this on this network.
    """
    configure_torch(config)
    device = choose_device(config.runtime.device)
    data = (_outline(config.dataset) if planned else None) or _dataset(json.dumps(config.dataset, sort_keys=True))
    method = make_method(config, widths(config))
    method.check(widths(config))
    check_requirements(config, method)
    check_runtime(config, method, device)
    if config.optim.ema is not None and "no_master" in method.traits:
        raise Unsupported(f"{method.name} keeps no float copy of its weights to average; leave optim.ema=null")
    if config.distill.on and config.distill.teacher != "baseline":
        _load_teacher(config, data)
        configure_torch(config)
    if config.distill.name == "method" and not method.requires.teacher:
        raise Unsupported(f"{method.name} with these options has no use for the teacher it asks for; add distill=none")
    if config.distill.on and not method.needs_training:
        raise Unsupported(f"{method.name} is not trained: a teacher has no effect; add distill=none")
    if config.optim.patience is not None and not len(data.val):
        raise ConfigError("optim.patience waits for a better validation top-1, and dataset.val holds nothing out")
    if not len(data.test):
        raise ConfigError(f"dataset={config.dataset['name']}: its test split is empty")
    parts = ExperimentSetup(config, data, method, {}, device)
    if planned and config.init in STARTS:
        with suppress(NotImplementedError, RuntimeError):  # a network or method of the user's own may look at values
            return _checked(parts, parts.float_model("meta"))
    model = parts.float_model()
    if config.init not in STARTS:
        load_initial_weights(model, Path(config.init))
    return _checked(parts, model)


def _checked(parts: ExperimentSetup, model: nn.Module) -> ExperimentSetup:
    """Count a float network's operations and put the method into it, to see whether it fits."""
    parts.macs.clear()
    parts.macs.update(count_macs(model, parts.data.shape))
    parts.install(model)
    return parts


def _outline(node: dict[str, Any]) -> Dataset | None:
    registry.checked("dataset", node)
    try:
        return placeholder_dataset(node)
    except ValueError as error:
        raise ConfigError(f"dataset.{error}") from None


def make_method(config: Config, bits: Bits) -> Method:
    """Return the method of a configuration at some widths: one, or two composed, deviating where asked."""
    if config.activation["name"] == "none":
        return _create(config.method, bits)
    weight = _create(config.method, bits._replace(a=FLOAT))
    return combine(weight, _create(config.activation, bits._replace(w=FLOAT), "activation"))


def widths(config: Config) -> Bits:
    """Return a configuration's widths."""
    return Bits(config.bits.w or FLOAT, config.bits.a or FLOAT, config.bits.g or FLOAT)


def _create(node: dict[str, Any], bits: Bits, key: str = "method") -> Method:
    """Build the method that a node names, under its deviation if it has one; `key` is the node's place, for errors."""
    try:
        method = registry.create("method", node, **bits._asdict())
        if not isinstance(method, Method):
            raise ConfigError(f"method={node['name']}: returned a {type(method).__name__}, not a Method")
        return deviate(node["name"], str(node.get("deviation", "none")), method)
    except ConfigError as error:
        raise ConfigError(str(error).replace("method.", f"{key}.").replace("method=", f"{key}=")) from None
    except Unsupported as error:
        raise Unsupported(str(error).replace("method.", f"{key}.")) from None
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None


def _card(node: dict[str, Any]) -> dict[str, str]:
    found = registry.sections(registry.card(node["name"]))
    kept = {key.lower(): found[key] for key in ("Choices", "Deviations") if key in found}
    asked = registry.known_deviations(node["name"]).get(str(node.get("deviation", "none")))
    return kept | ({"deviation": f"{node['deviation']}: {asked[0]} Source: {asked[1]}"} if asked else {})


@lru_cache(maxsize=2)
def _dataset(node: str) -> Dataset:
    """Return the data set of a node given as JSON; the cells of a sweep share it."""
    data = registry.create("dataset", json.loads(node))
    if not isinstance(data, Dataset):
        raise ConfigError(f"dataset={json.loads(node)['name']}: returned a {type(data).__name__}, not a Dataset")
    return data


def _build_model(config: Config, data: Dataset, method: Method) -> nn.Module:
    node = {key: value for key, value in config.model.items() if key != "act"}
    if node.get("norm") == "auto":
        del node["norm"]
        if method.requires.norm is not None:
            node["norm"] = method.requires.norm
    seed_everything(config.seed)
    model: nn.Module = registry.create("model", node, data.shape, data.classes)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={config.model['name']}: returned a {type(model).__name__}, not a torch.nn.Module")
    check_norm(model, method)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _load_teacher(config: Config, data: Dataset) -> nn.Module:
    """Return the network of the finished run that is to teach, with its best weights.

    Raises:
        ConfigError: it was trained on other data.
    """
    run, dataset = Path(config.distill.teacher), config.dataset["name"]
    named = f"distill.teacher={run}"
    own, state = stored_run(run, named)
    if own.dataset["name"] != dataset:
        raise ConfigError(f"{named} was trained on {own.dataset['name']}; here is dataset={dataset}")
    parts = assemble(own)
    if (parts.data.shape, parts.data.classes) != (data.shape, data.classes):
        raise ConfigError(
            f"{named} knows {parts.data.classes} classes of {parts.data.shape} images; here are "
            f"{data.classes} classes of {data.shape}"
        )
    return load_weights(parts.install(parts.float_model()), state, f"{named}: best.pt")
