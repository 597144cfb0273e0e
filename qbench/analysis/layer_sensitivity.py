"""Measures layer sensitivity, the increase of a float network's loss when only one layer is quantized.

Every layer is measured at every width. The network is not trained.
"""

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.analysis.bit_allocation import sum_over_layers
from qbench.analysis.finished_run import (
    FinishedRun,
    half_precision_note,
    load_finished_run,
    probe_batches,
    validation_batches,
)
from qbench.analysis.layer_ablation import measure_accuracy
from qbench.analysis.overrides import override_method
from qbench.bits import FLOAT
from qbench.config.identity import file_sha256
from qbench.config.schema import STARTS
from qbench.cost.count import count_cost, storage
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.experiment.trained_network import other_outputs
from qbench.quant.layers import effective_weight, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.probe import Batch, Probe
from qbench.runs.directory import directory_name
from qbench.runs.result import Accuracy, load_result
from qbench.runs.stored_config import recorded_files, stored_config
from qbench.training.initial_weights import load_initial_weights


class FloatBaseline(NamedTuple):
    """A trained float network, and the data on which its layers are measured.

    Args:
        batches: the validation images on which accuracy is measured.
        images_note: a note that states the number of images in `batches`, and the split of these images.
        notes: a note if the run was evaluated in half precision, and warnings if a network has other outputs than
            the network that was trained.
        probe: the training images on which methods measure statistics.
        bn_batches: the images on which batch normalization statistics are recomputed (see `measure_accuracy`).
    """

    setup: ExperimentSetup
    model: nn.Module
    batches: Sequence[Batch]
    probe: Probe
    bn_batches: Sequence[Batch] = ()
    images_note: str = ""
    notes: Sequence[str] = ()

    def quantized(self, widths: Mapping[str, int]) -> nn.Module:
        """Return the network with some layers quantized and all other layers in float.

        The network is not trained. Incremental methods quantize all weights of the layers at once.

        Args:
            widths: layer name -> width, for each layer that is quantized.

        Raises:
            Unsupported: the method does not support a width, or cannot quantize only these layers.
        """
        rules = {glob.escape(name): width for name, width in widths.items()} | {"*": "float"}
        policy = replace(self.setup.policy, rules=rules)
        model = replace(self.setup, policy=policy).install(copy.deepcopy(self.model))
        method = self.setup.method
        if method.prepare:
            method.prepare(model, self.probe)
        if method.on_epoch:
            method.on_epoch(model, 0, 1, self.probe)  # the only epoch is also the last one
        return model

    def measure(self, model: nn.Module) -> Accuracy:
        """Return the accuracy of a network on `batches`."""
        return measure_accuracy(model, self.batches, self.bn_batches)


@dataclass
class LayerSensitivity:
    """The measured sensitivity and the costs of each layer at each width.

    `loss`, `mse`, `bytes` and `bitops` map a layer's name to a map from widths to values.

    Args:
        weights: maps a layer's name to its number of weights.
        float_accuracy: accuracy of the network without any quantizer.
        loss: increase of the validation loss when only this layer is quantized.
        mse: squared error of the layer's weights, divided by the number of weights of all layers.
        bytes: bytes of the layer's weights.
        bitops: BitOps of the layer for one image.
        rest: maps a kind of budget to the cost of all layers that are not measured.
    """

    weights: dict[str, int]
    float_accuracy: Accuracy
    loss: dict[str, dict[int, float]] = field(default_factory=dict)
    mse: dict[str, dict[int, float]] = field(default_factory=dict)
    bytes: dict[str, dict[int, float]] = field(default_factory=dict)
    bitops: dict[str, dict[int, float]] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)

    def costs(self, kind: str) -> dict[str, dict[int, float]]:
        """Return the cost of each layer at each width, for a kind of budget.

        For the kind `w`, the cost is the number of bits of all weights of the layer. This number is an exact integer.
        """
        if kind != "w":
            return self.bytes if kind == "bytes" else self.bitops
        return {name: {width: width * self.weights[name] for width in layer} for name, layer in self.loss.items()}


def load_float_baseline(
    run: Path, words: Sequence[str], *, images: int, recompute_bn: bool, device: str
) -> FloatBaseline:
    """Load the float network that a run started from, and the method that quantizes its layers.

    Args:
        run: the directory of the run.
        words: command-line overrides (`KEY=VALUE`) that name the method. If empty, the run's method is used.
        images: number of validation images on which accuracy is measured.
        recompute_bn: whether to recompute batch normalization statistics for every measurement.
        device: the device on which the network is placed, a value of `runtime.device`.

    Raises:
        CheckpointError: the run or its float baseline is missing or damaged.
        ConfigError: the overrides `words` do not configure a method that fits this network.
    """
    result = load_result(run)
    finished = load_finished_run(run, "last" if result and result.best is None else "best", device)
    trained = finished.setup
    weights, identity = _float_weights(run, finished)
    config = replace(override_method(trained.config, words), init="scratch")
    try:
        setup = assemble(config)
        if setup.network.get("norm") != trained.network.get("norm"):
            raise ConfigError(
                f"{setup.method_name} requires model.norm={setup.method.requires.norm}; {run} has another "
                f"norm\nchoose a run of method {setup.method_name}"
            )
        model = setup.float_model()
        loaded = load_initial_weights(model, weights, identity)
        changed = [finished.changed, other_outputs(model, loaded.layers, str(weights)) if identity else ""]
        setup.find_layers(model)
        batches, images_note = validation_batches(setup, images)
        training = probe_batches(setup)
        return FloatBaseline(
            setup=setup,
            model=model.to(setup.device).eval(),
            batches=batches,
            probe=Probe(training, F.cross_entropy),
            bn_batches=training if recompute_bn else (),
            images_note=images_note,
            notes=[*half_precision_note(finished), *(f"warning: {text}" for text in changed if text)],
        )
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None


def _float_weights(run: Path, finished: FinishedRun) -> tuple[Path, str | None]:
    """Return the path of the float weights and, if known, the identity that the file must have.

    The float baseline is a run in the same folder. The search compares the identities of runs (hashes of their
    configurations) and not names, so it finds renamed directories too.
    """
    setup, init = finished.setup, stored_config(run).init
    if setup.method.name == "float":
        return run, None
    if init not in STARTS:
        if file_sha256("init", init) != recorded_files(finished.result)["init"]:
            raise CheckpointError(f"{run}: the file init={init} was changed after the run\nrestore the file")
        return Path(init), None
    identity = setup.baseline.identity
    for file in sorted(run.resolve().parent.glob("*/result.json")):
        if (result := load_result(file.parent)) and result.identity == identity.digest:
            return file.parent, identity.digest
    name = directory_name(identity).name
    raise CheckpointError(f"{run}: float baseline {name} is missing\nto train it, repeat the run's command")


def measure_sensitivity(baseline: FloatBaseline, widths: Sequence[int]) -> LayerSensitivity:
    """Measure the network with only one layer quantized, for each layer and each width that the method supports.

    Raises:
        ConfigError: the run quantizes no weights, or a layer supports none of the widths.
    """
    layers = _layers_with_quantized_weights(baseline)
    weights = {name: _float_weight(baseline, name).numel() for name in layers}
    sensitivity = LayerSensitivity(weights, float_accuracy=baseline.measure(baseline.quantized({})))
    tables = (sensitivity.loss, sensitivity.mse, sensitivity.bytes, sensitivity.bitops)
    for name in layers:
        for table in tables:
            table[name] = {}
        refused = ""
        for width in widths:
            try:
                values = _measure_layer(baseline, name, width, sensitivity)
            except Unsupported as reason:
                refused = str(reason)
                continue
            for table, value in zip(tables, values, strict=True):
                table[name][width] = value
        if not sensitivity.loss[name]:
            raise ConfigError(f"layer {name} supports none of the widths {', '.join(map(str, widths))}: {refused}")
    sensitivity.rest = _other_costs(baseline, sensitivity)
    return sensitivity


def _layers_with_quantized_weights(baseline: FloatBaseline) -> list[str]:
    layers = quantized_layers(baseline.setup.install(copy.deepcopy(baseline.model)))
    names = [name for name, layer in layers.items() if layer.bits.w < FLOAT]
    if not names:
        method = baseline.setup.method
        raise ConfigError(f"{method.name} {method.bits} quantizes no weights; add for example bits.w=2")
    return names


def _measure_layer(
    baseline: FloatBaseline, name: str, width: int, sensitivity: LayerSensitivity
) -> tuple[float, float, float, float]:
    """Return loss increase, squared weight error, bytes and BitOps of one layer at one width."""
    model = baseline.quantized({name: width})
    layer = quantized_layers(model)[name]
    error = squared_error(_float_weight(baseline, name), effective_weight(layer)) / sum(sensitivity.weights.values())
    bitops = baseline.setup.macs[name] * layer.bits.w * layer.bits.a
    return baseline.measure(model).loss - sensitivity.float_accuracy.loss, error, storage(layer).ideal, bitops


def _float_weight(baseline: FloatBaseline, name: str) -> Tensor:
    return baseline.model.get_parameter(f"{name}.weight").detach()


def squared_error(w: Tensor, w_hat: Tensor) -> float:
    """Return the squared error of quantized weights after multiplying them by the scale that minimizes this error.

    The scale of the weights has no effect on the network, because the next normalization layer removes the scale.
    """
    w, w_hat = w.double().flatten(), w_hat.double().flatten()
    power = w_hat @ w_hat
    scale = (w @ w_hat) / power if power > 0 else 0.0
    return float(((w - scale * w_hat) ** 2).sum())


def _other_costs(baseline: FloatBaseline, sensitivity: LayerSensitivity) -> dict[str, float]:
    """Return the cost of all layers that are not measured, for each kind of budget."""
    widths = {name: next(iter(layer)) for name, layer in sensitivity.loss.items()}
    whole = count_cost(baseline.quantized(widths), baseline.setup.macs)
    return {
        "bytes": whole.bytes_ideal - sum_over_layers(sensitivity.bytes, widths),
        "bitops": whole.bitops - sum_over_layers(sensitivity.bitops, widths),
        "w": 0.0,
    }
