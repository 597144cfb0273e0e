"""Combines a weight method with an activation method, or a method with distillation from a teacher network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.image import ImageQuantizer
from qbench.quant.layers import BypassedActivation, QLayer, quantized_layers
from qbench.quant.method import Loss, Method, OutputFactory, Prepare, Requires, Step, Unsupported
from qbench.quant.probe import Batch, Probe
from qbench.quant.quantizer import IdentityQuantizer, Quantizer


class _FirstStep(torch.optim.Optimizer):
    """Wraps an optimizer for the `step` function of the second of two combined methods.

    A step calls the `step` function of the first method, which steps the optimizer itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        self._optimizer, self._step = optimizer, step

    def __getattr__(self, name: str) -> object:
        return getattr(self._optimizer, name)

    def step(self, closure: object = None) -> Any:
        """Make the first method's step."""
        self._step()


def combine(weight: Method, activation: Method) -> Method:
    """Return a method that quantizes weights with one method and activations with another.

    `weight` must have been built with 32-bit activations, and `activation` with 32-bit weights. Gradients are quantized
    by `weight` if this method supports quantized gradients, else by `activation`. The functions `prepare`, `on_epoch`
    and `step` of both methods are called. Each of these functions acts only on the quantizers of its own method.

    Raises:
        Unsupported: both arguments are the same method, both methods replace the loss, or they require different
            normalizations. If both methods change the output of a layer, `install` raises this error.
    """
    if weight.name == activation.name:
        raise Unsupported(
            f"activation={weight.name} has no effect, because method={weight.name} already "
            f"quantizes activations; remove the key activation and set bits.a"
        )
    owner = weight if supported_widths(weight, "g") else activation
    bits = Bits(weight.bits.w, activation.bits.a, owner.bits.g)
    if weight.loss and activation.loss:
        raise Unsupported(
            f"method={weight.name} and activation={activation.name} cannot be combined: both replace the loss"
        )
    return Method(
        name=f"{weight.name}+{activation.name}",
        bits=bits,
        supported_bits={
            "w": weight.supported_bits.get("w", ()),
            "a": activation.supported_bits.get("a", ()),
            "g": owner.supported_bits.get("g", ()),
        },
        requires=_combined_requirements(weight, activation),
        traits=_input_traits(activation.traits)
        | (weight.traits - _input_traits(weight.traits))
        | (owner.traits & {"fixed_point_gradients"}),
        weight=weight.weight,
        input=activation.input,
        output=_combined_output(weight, activation, owner),
        prepare=_combined_prepare(weight.prepare, activation.prepare),
        phases=lambda epochs: sorted({*weight.phases(epochs), *activation.phases(epochs)}),
        on_epoch=_in_turn(weight.on_epoch, activation.on_epoch),
        loss=weight.loss or activation.loss,
        step=_combined_step(weight, activation),
        needs_training=weight.needs_training or activation.needs_training,
        teachers=weight.teachers + activation.teachers,
    )


def distilled(
    method: Method,
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
    average: str = "batch",
    hard: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Method:
    """Return the method with a distillation loss: `weight` T^2 KL(teacher || student) + (1 - `weight`) `hard`.

    KL compares the softmax outputs of both networks at the temperature T (Hinton et al. 2015, arXiv 1503.02531). The
    default values of `temperature` and `weight` are from Polino et al. 2018, arXiv 1802.05668.

    Args:
        teacher: a network that takes the same images and is not trained.
        average: `batch` sums KL over classes and averages over the batch. `classes` averages over classes and over the
            batch, as the public code of Polino et al. does. With ten classes, `classes` makes the distillation term ten
            times smaller than `batch`.
        hard: function (logits, labels) that returns the loss with respect to the labels. If the method has its own
            loss, the method's loss is used instead.
    """
    hard_loss: Loss = method.loss or (lambda model, logits, batch: hard(logits, batch[1]))

    def loss(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher(batch[0]) / temperature, 1)
        soft = F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean", log_target=True)
        if average == "classes":
            soft = soft / logits.shape[1]
        return weight * temperature**2 * soft + (1 - weight) * hard_loss(model, logits, batch)

    return replace(method, loss=loss, teachers=(*method.teachers, teacher))


def _input_traits(traits: frozenset[str]) -> frozenset[str]:
    return frozenset(trait for trait in traits if trait.endswith("_input"))


def supported_widths(method: Method, key: str) -> list[int]:
    """Return the widths below 32 bits that a method supports for weights (w), activations (a) or gradients (g)."""
    return [width for width in range(1, FLOAT) if width in method.supported_bits.get(key, ())]


def _combined_requirements(weight: Method, activation: Method) -> Requires:
    """Return the requirements of both methods on the network.

    The requirement on activation functions comes from the activation method alone.
    """
    first, second = weight.requires, activation.requires
    if first.norm and second.norm and first.norm != second.norm:
        raise Unsupported(
            f"method={weight.name} and activation={activation.name} cannot be combined: they "
            f"require model.norm={first.norm} and model.norm={second.norm}"
        )
    return Requires(
        norm=first.norm or second.norm,
        act=second.act,
        start="scratch" if "scratch" in (first.start, second.start) else "float",
        teacher=first.teacher or second.teacher,
    )


def _combined_output(weight: Method, activation: Method, owner: Method) -> OutputFactory:
    """Return the factory of output quantizers for two combined methods.

    The factory raises `Unsupported` for a layer for which both methods have an output quantizer.
    """

    def output(name: str, layer: QLayer, bits: int) -> Quantizer | None:
        quantizers = [
            quantizer
            for method in (weight, activation)
            if method.output
            and (quantizer := method.output(name, layer, bits if method is owner else FLOAT)) is not None
        ]
        if len(quantizers) > 1:
            raise Unsupported(
                f"{weight.name} and {activation.name} both change the output of {name}\nuse one of them alone"
            )
        return quantizers[0] if quantizers else None

    return output


def _in_turn(first: Callable[..., None] | None, second: Callable[..., None] | None) -> Callable[..., None] | None:
    """Return a function that calls the first function, then the second. Return None if both are None."""
    if first is None or second is None:
        return first or second

    def call(*args: nn.Module | int | Probe) -> None:
        first(*args)
        second(*args)

    return call


def _combined_prepare(weight: Prepare | None, activation: Prepare | None) -> Prepare | None:
    """Return a `prepare` function that prepares the weights with float activations, then the activations.

    The ranges of the activations are not known before the second function has run.
    """
    if weight is None or activation is None:
        return weight or activation

    def prepare(model: nn.Module, probe: Probe) -> None:
        with _float_inputs(model):
            weight(model, probe)
        activation(model, probe)

    return prepare


@contextmanager
def _float_inputs(model: nn.Module) -> Iterator[None]:
    """Make quantized layers read float inputs within a `with` block, except images."""
    layers = [
        (layer, layer.input_q)
        for layer in quantized_layers(model).values()
        if layer.bits.a < FLOAT and not isinstance(layer.input_q, ImageQuantizer)
    ]
    activations = [module for module in model.modules() if isinstance(module, BypassedActivation)]
    try:
        for layer, _ in layers:
            layer.input_q = IdentityQuantizer()
        for activation in activations:
            activation.active = True
        yield
    finally:
        for layer, quantizer in layers:
            layer.input_q = quantizer
        for activation in activations:
            activation.active = False


def _combined_step(weight: Method, activation: Method) -> Step | None:
    """Return a `step` function that calls the `step` functions of both methods but steps the optimizer only once."""
    first, second = weight.step, activation.step
    if first is None or second is None:
        return first or second

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # what the second function does to the gradients must be done before the optimizer's step
        second(model, _FirstStep(optimizer, lambda: first(model, optimizer)))

    return step
