"""Measures a network's accuracy with only one layer in float, and with only one layer quantized.

A layer in float has its quantizers disabled, and computes with its latent weights.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from qbench.methods.ptq import reestimate_norms
from qbench.quant.layers import BypassedActivation, quantized_layers
from qbench.quant.probe import Batch
from qbench.quant.quantizer import IdentityQuantizer, Quantizer
from qbench.runs.result import Accuracy
from qbench.training.evaluation import evaluate


@dataclass(frozen=True)
class LayerAblation:
    """The accuracies of a network with different layers quantized.

    Args:
        quantized: accuracy with all layers quantized.
        float_: accuracy with the quantizers of all layers disabled.
        leave_one_out: maps a layer to the accuracy with only this layer in float.
        leave_one_in: maps a layer to the accuracy with only this layer quantized.
    """

    quantized: Accuracy
    float_: Accuracy
    leave_one_out: dict[str, Accuracy]
    leave_one_in: dict[str, Accuracy]


def ablate_layers(model: nn.Module, batches: Sequence[Batch], bn_batches: Sequence[Batch] = ()) -> LayerAblation:
    """Measure a network twice for each layer: with this layer in float, and with only this layer quantized.

    Args:
        model: the quantized network. It is not changed.
        batches: the images on which accuracy is measured.
        bn_batches: the images on which batch normalization statistics are recomputed (see `measure_accuracy`).
    """
    names = list(quantized_layers(model))

    def without(*disabled: str) -> Accuracy:
        with quantizers_disabled(model, disabled):
            return measure_accuracy(model, batches, bn_batches)

    return LayerAblation(
        quantized=without(),
        float_=without(*names),
        leave_one_out={name: without(name) for name in names},
        leave_one_in={name: without(*(other for other in names if other != name)) for name in names},
    )


class PrecedingActivation(Quantizer):
    """An activation function that an input quantizer has replaced. It is applied to the input of only one layer."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation function of x. The tensor x is not changed, because other layers may read x too."""
        y: Tensor = self.act(x.clone())
        return y


@contextmanager
def quantizers_disabled(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the named layers compute in float with their latent weights, within a `with` block.

    Other layers compute as before. If all layers are named, the network computes the same values as in `float_mode`.
    Parameters and buffers do not change.
    """
    layers, activations = quantized_layers(model), _preceding_activations(model)
    disabled = [layers[name] for name in names]
    quantizers = [(layer.input_q, layer.weight_q, layer.output_q) for layer in disabled]
    try:
        for layer in disabled:
            act = activations.get(layer.label)
            layer.input_q = IdentityQuantizer() if act is None else PrecedingActivation(act).train(layer.training)
            layer.weight_q, layer.output_q = IdentityQuantizer(), IdentityQuantizer()
        yield
    finally:
        for layer, (input_q, weight_q, output_q) in zip(disabled, quantizers, strict=True):
            layer.input_q, layer.weight_q, layer.output_q = input_q, weight_q, output_q


def _preceding_activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return a map from a layer to the activation function that the layer's input quantizer has replaced."""
    replaced = [module for module in model.modules() if isinstance(module, BypassedActivation)]
    return {reader: module.act for module in replaced for reader in module.readers}


def measure_accuracy(model: nn.Module, batches: Sequence[Batch], bn_batches: Sequence[Batch] = ()) -> Accuracy:
    """Return top-1, top-5 and loss of a network. The network is not changed.

    Args:
        model: the network.
        batches: the images on which accuracy is measured.
        bn_batches: the images on which the mean and variance of batch normalization are recomputed, in a copy of the
            network. If there are no such images, the stored statistics are used. Methods whose quantized and latent
            weights differ in scale need the recomputation, because the next normalization layer must remove this
            difference.
    """
    if bn_batches:
        model = copy.deepcopy(model)
        reestimate_norms(model, bn_batches)
    accuracy = evaluate(model, batches)
    assert accuracy is not None  # there are images
    return accuracy
