"""Layer ablation: accuracy with the quantizers of single layers disabled, and with all others disabled.

A layer whose quantizers are disabled computes in float on its latent weights.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from qbench.methods.ptq import reestimate_norms
from qbench.quant.install import feeds
from qbench.quant.layers import BypassedActivation, quantized_layers
from qbench.quant.probe import Batch
from qbench.quant.quantizer import IdentityQuantizer, Quantizer
from qbench.runs.result import Accuracy
from qbench.training.evaluation import evaluate


@dataclass(frozen=True)
class LayerAblation:
    """The accuracy of a network under changes of its quantized layers.

    Args:
        quantized, float_: all layers quantized, and all disabled.
        leave_one_out: layer -> only this layer disabled.
        leave_one_in: layer -> only this layer quantized.
    """

    quantized: Accuracy
    float_: Accuracy
    leave_one_out: dict[str, Accuracy]
    leave_one_in: dict[str, Accuracy]


def ablate_layers(model: nn.Module, batches: Sequence[Batch], bn_batches: Sequence[Batch] = ()) -> LayerAblation:
    """Measure a network with each layer left out and left in alone.

    Args:
        bn_batches: see `measure_accuracy`.
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
    """The activation function that a layer's input quantizer replaced, in front of that layer only."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, without changing x, because other layers read it too."""
        y: Tensor = self.act(x.clone())
        return y


@contextmanager
def quantizers_disabled(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the named layers compute in float on their latent weights; everything else is unchanged.

    With all layers disabled the network computes the same as in `float_mode`. Parameters and buffers do not change.
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
    """Return layer -> the activation function in front of it that input quantizers replaced."""
    readers, modules = feeds(model), dict(model.named_modules())
    replaced = {name: module for name in readers if isinstance(module := modules.get(name), BypassedActivation)}
    return {reader: module.act for name, module in replaced.items() for reader in readers[name]}


def measure_accuracy(model: nn.Module, batches: Sequence[Batch], bn_batches: Sequence[Batch] = ()) -> Accuracy:
    """Return top-1, top-5 and loss of a network; the network is not changed.

    Args:
        bn_batches: batches on which mean and variance of batch normalization are recomputed, in a copy; without them
            the statistics are kept. Some methods put weights on another scale than the latent ones and rely on
            the normalization that follows.
    """
    if bn_batches:
        model = copy.deepcopy(model)
        reestimate_norms(model, bn_batches)
    accuracy = evaluate(model, batches)
    assert accuracy is not None  # there are images
    return accuracy
