"""What a float network loses where one layer alone is quantized: each layer at every width, without training."""

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.bit_allocation import total
from qbench.analysis.disabled_quantizers import measured
from qbench.analysis.finished_run import load_finished_run, probe_batches, validation
from qbench.analysis.overrides import method_of
from qbench.bits import FLOAT
from qbench.config.schema import STARTS
from qbench.cost.count import count_cost, storage
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.quant.layers import effective_weight, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.probe import Batch, Probe
from qbench.runs.result import Accuracy
from qbench.system import files
from qbench.training.initial_weights import load_initial_weights


class FloatBaseline(NamedTuple):
    """A float network with its weights, and what is measured on: validation batches, the training images of a Probe.

    `norms`: see `measured`.
    """

    parts: ExperimentSetup
    model: nn.Module
    batches: Sequence[Batch]
    probe: Probe
    norms: Sequence[Batch] = ()

    def quantized(self, widths: Mapping[str, int]) -> nn.Module:
        """Return the network with these layers at these widths and all others float, by the method, not trained.

        An incremental method quantizes all its weights at once.

        Raises:
            Unsupported: the method does not know a width, or cannot quantize these layers alone.
        """
        rules = {glob.escape(name): width for name, width in widths.items()} | {"*": "float"}
        policy = replace(self.parts.policy, rules=rules)
        model = replace(self.parts, policy=policy).install(copy.deepcopy(self.model))
        method = self.parts.method
        if method.prepare:
            method.prepare(model, self.probe)
        if method.on_epoch:
            method.on_epoch(model, 0, 1, self.probe)  # the last epoch of one
        return model

    def measure(self, model: nn.Module) -> Accuracy:
        """Return validation metrics."""
        return measured(model, self.batches, self.norms)


@dataclass
class LayerSensitivity:
    """Layer -> width -> loss gained by that layer alone, squared error of its weights, and costs.

    `weights` counts each layer's weights; `rest` holds what everything else costs.
    """

    weights: dict[str, int]
    base: Accuracy
    loss: dict[str, dict[int, float]] = field(default_factory=dict)
    mse: dict[str, dict[int, float]] = field(default_factory=dict)
    bytes: dict[str, dict[int, float]] = field(default_factory=dict)
    bitops: dict[str, dict[int, float]] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)

    def costs(self, kind: str) -> dict[str, dict[int, float]]:
        """Return the costs of a kind of budget; those of w are bits of all weights, not of one, to stay exact."""
        if kind != "w":
            return self.bytes if kind == "bytes" else self.bitops
        return {name: {k: k * self.weights[name] for k in of} for name, of in self.loss.items()}


def started(run: Path, words: Sequence[str], *, images: int, anew: bool, device: str) -> tuple[FloatBaseline, str]:
    """Return the float weights that a run started from, with the run's method or the one that words name.

    Also what is to be said of the images measured on. `anew`: whether normalization is measured anew each time.

    Raises:
        CheckpointError: the run or its float parent is not whole.
        ConfigError: words that make no method for this network.
    """
    found = load_finished_run(run, "best", device)
    own = found.parts
    where, identity = _weights(run, own)
    config = replace(method_of(own.config, words), init="scratch")
    try:
        parts = assemble(config)
        if parts.network != own.network:
            why = f"{parts.method_name} requires model.norm={parts.method.requires.norm}"
            raise ConfigError(f"{why}, and {run} has another; name a run of that method, whose float parent has it")
        model = parts.float_model()
        load_initial_weights(model, where, identity)
        batches, said = validation(parts, images)
        seen = probe_batches(parts)
        probe = Probe(seen, F.cross_entropy)
        return FloatBaseline(parts, model.to(parts.device).eval(), batches, probe, seen if anew else ()), said
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None


def _weights(run: Path, parts: ExperimentSetup) -> tuple[Path, str | None]:
    """Return where the float weights lie, and the identity they must have where it is known."""
    init = str(files.read_yaml(run / "config.yaml")["init"])
    if parts.method.name == "float":
        return run, None
    if init not in STARTS:
        return Path(init), None
    place = run.resolve().parents[1] / parts.baseline.identity.directory
    if not place.is_dir():
        raise CheckpointError(f"{run}: its float parent is not beside it: {place.name}\nthe run's command trains it")
    return place, parts.baseline.identity.digest


def figures(start: FloatBaseline, widths: Sequence[int]) -> LayerSensitivity:
    """Measure every layer that the run quantizes, at every width that the method knows for it, alone."""
    layers = _quantized(start)
    weights = {name: _weight(start, name).numel() for name in layers}
    found = LayerSensitivity(weights, base=start.measure(start.quantized({})))
    for name in layers:
        slots = [figure.setdefault(name, {}) for figure in (found.loss, found.mse, found.bytes, found.bitops)]
        refused = ""
        for width in widths:
            try:
                values = _alone(start, name, width, found)
            except Unsupported as reason:
                refused = str(reason)
                continue
            for slot, value in zip(slots, values, strict=True):
                slot[width] = value
        if not found.loss[name]:
            raise ConfigError(f"{name} can have none of the widths {', '.join(map(str, widths))}: {refused}")
    found.rest = _rest(start, found)
    return found


def _quantized(start: FloatBaseline) -> list[str]:
    """Return the layers whose weights the run quantizes."""
    layers = quantized_layers(start.parts.install(copy.deepcopy(start.model)))
    names = [name for name, layer in layers.items() if layer.bits.w < FLOAT]
    if not names:
        raise ConfigError(f"{start.parts.method.name} {start.parts.method.bits} quantizes no weights: set bits.w")
    return names


def _alone(start: FloatBaseline, name: str, width: int, found: LayerSensitivity) -> tuple[float, float, float, float]:
    """Return loss gained, squared error, bytes and BitOps of a layer at a width."""
    model = start.quantized({name: width})
    layer = quantized_layers(model)[name]
    error = squared_error(_weight(start, name), effective_weight(layer)) / sum(found.weights.values())
    bitops = start.parts.macs[name] * layer.bits.w * layer.bits.a
    return start.measure(model).loss - found.base.loss, error, storage(layer).ideal, bitops


def _weight(start: FloatBaseline, name: str) -> Tensor:
    return start.model.get_parameter(f"{name}.weight").detach()


def squared_error(w: Tensor, w_hat: Tensor) -> float:
    """Return the squared error of quantized weights times the best factor, which normalization behind would undo."""
    w, w_hat = w.double().flatten(), w_hat.double().flatten()
    power = w_hat @ w_hat
    factor = (w @ w_hat) / power if power > 0 else 0.0
    return float(((w - factor * w_hat) ** 2).sum())


def _rest(start: FloatBaseline, found: LayerSensitivity) -> dict[str, float]:
    """Return what all else costs, from the whole network with every layer at its first width."""
    first = {name: next(iter(of)) for name, of in found.loss.items()}
    whole = count_cost(start.quantized(first), start.parts.macs)
    return {
        "bytes": whole.bytes_ideal - total(found.bytes, first),
        "bitops": whole.bitops - total(found.bitops, first),
        "w": 0.0,
    }
