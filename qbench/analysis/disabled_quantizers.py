"""Quantizers of single layers switched off for a while: those layers compute as float, on their latent weights."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from qbench.methods.ptq import reestimate_norms
from qbench.quant.install import feeds
from qbench.quant.layers import BypassedActivation, quantized_layers
from qbench.quant.probe import Batch
from qbench.quant.quantizer import IdentityQuantizer, Quantizer
from qbench.runs.result import Accuracy
from qbench.training.evaluation import evaluate

SLOTS = ("input_q", "weight_q", "output_q")


class Front(Quantizer):
    """The activation function whose place a layer's input quantizer took, in front of that layer alone."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x; x itself, which others read too, stays."""
        y: Tensor = self.act(x.clone())
        return y


@contextmanager
def quantizers_disabled(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the layers of these names compute as float on their latent weights; all else stays as it is.

    All layers off is what `as_float` computes. Nothing that is trained or stored changes.
    """
    layers, fronts = quantized_layers(model), _fronts(model)
    kept = [(layers[name], {slot: getattr(layers[name], slot) for slot in SLOTS}) for name in names]
    try:
        for layer, _ in kept:
            act = fronts.get(layer.label)
            layer.input_q = IdentityQuantizer() if act is None else Front(act).train(layer.training)
            layer.weight_q, layer.output_q = IdentityQuantizer(), IdentityQuantizer()
        yield
    finally:
        for layer, slots in kept:
            for slot, module in slots.items():
                setattr(layer, slot, module)


def _fronts(model: nn.Module) -> dict[str, nn.Module]:
    """Return layer -> the activation function in front of it whose place quantizers took."""
    readers_of, modules = feeds(model), dict(model.named_modules())
    replaced = {name: m for name in readers_of if isinstance(m := modules.get(name), BypassedActivation)}
    return {reader: module.act for name, module in replaced.items() for reader in readers_of[name]}


def measured(model: nn.Module, batches: Sequence[Batch], norms: Sequence[Batch] = ()) -> Accuracy:
    """Return top-1, top-5 and loss of a network as it computes now; it stays as it is.

    Args:
        norms: batches on which mean and variance of batch normalization are measured anew, in a copy; without, they are
            kept. A method that leaves weights on another scale than the latent ones relies on normalization behind.
    """
    if norms:
        model = copy.deepcopy(model)
        reestimate_norms(model, norms)
    found = evaluate(model, batches)
    assert found is not None  # there are images
    return found
