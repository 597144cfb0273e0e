"""Methods made of methods: one for the weights with another for the activations, and any of them with a teacher."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.method import Loss, Method, Requires, Unsupported
from qbench.quant.probe import Batch, Probe


class _Stepped:
    """An optimizer whose step has been taken: what the second of two methods gets to finish the same step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        """Do nothing."""


def combine(weight: Method, activation: Method) -> Method:
    """Return the method that quantizes weights as `weight` does and activations as `activation` does.

    Each was made for its own widths and 32 bits elsewhere; gradients belong to `weight` where it knows them. Both
    prepare, begin epochs and finish steps, each on its own quantizers.

    Raises:
        Unsupported: what they require of the network, or do behind a layer or to the loss, excludes the other.
    """
    if weight.name == activation.name:
        raise Unsupported(f"activation={weight.name} is what method={weight.name} does itself; set bits.a alone")
    owner = weight if len(list(_known(weight, "g"))) else activation
    bits = Bits(weight.bits.w, activation.bits.a, owner.bits.g)
    if weight.loss and activation.loss:
        raise Unsupported(f"{weight.name} and {activation.name} both replace the loss")
    return Method(
        name=f"{weight.name}+{activation.name}",
        bits=bits,
        supported_bits={
            "w": weight.supported_bits.get("w", ()),
            "a": activation.supported_bits.get("a", ()),
            "g": owner.supported_bits.get("g", ()),
        },
        requires=_required(weight, activation),
        traits=_of_inputs(activation.traits) | (weight.traits - _of_inputs(weight.traits)),
        weight=weight.weight,
        input=activation.input,
        output=_behind(weight, activation, owner),
        prepare=_both(weight.prepare, activation.prepare),
        phases=lambda epochs: sorted({*weight.phases(epochs), *activation.phases(epochs)}),
        on_epoch=_both(weight.on_epoch, activation.on_epoch),
        loss=weight.loss or activation.loss,
        step=_steps(weight, activation),
        needs_training=weight.needs_training or activation.needs_training,
        teachers=weight.teachers + activation.teachers,
    )


def distilled(
    method: Method,
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
    hard: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Method:
    """Return the method with the loss  weight T^2 KL(teacher || student) + (1 - weight) hard.

    Softmax at temperature T on both sides of KL, which is the mean over the batch of the sum over classes (Hinton et
    al. 2015, arXiv 1503.02531; weights of Polino et al. 2018, arXiv 1802.05668). Public code of the latter averages
    over classes too, which makes the same weight ten times smaller on ten classes.

    Args:
        teacher: a network that takes the same images; it is evaluated, never trained.
        hard: (logits, labels) -> the loss against labels; a loss of the method's own takes its place.
    """
    own: Loss = method.loss or (lambda model, logits, batch: hard(logits, batch[1]))

    def loss(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(batch[0]) / temperature, 1)
        soft = F.kl_div(F.log_softmax(logits / temperature, 1), wanted, reduction="batchmean", log_target=True)
        return weight * temperature**2 * soft + (1 - weight) * own(model, logits, batch)

    return replace(method, loss=loss, teachers=(*method.teachers, teacher))


def _of_inputs(traits: frozenset[str]) -> frozenset[str]:
    return frozenset(trait for trait in traits if trait.endswith("_input"))


def _known(method: Method, key: str) -> list[int]:
    return [width for width in range(1, FLOAT) if width in method.supported_bits.get(key, ())]


def _required(weight: Method, activation: Method) -> Requires:
    """Return what both require of the network; the activations' place is the second one's business."""
    one, two = weight.requires, activation.requires
    if one.norm and two.norm and one.norm != two.norm:
        raise Unsupported(f"{weight.name} requires model.norm={one.norm}, {activation.name} model.norm={two.norm}")
    return Requires(
        norm=one.norm or two.norm,
        act=two.act,
        start="scratch" if "scratch" in (one.start, two.start) else "float",
        teacher=one.teacher or two.teacher,
    )


def _behind(weight: Method, activation: Method, owner: Method) -> Callable[[str, nn.Module, int], nn.Module | None]:
    """Return the site behind a layer: of the two methods, at most one may put something there."""

    def site(name: str, layer: nn.Module, bits: int) -> nn.Module | None:
        made = [
            module
            for method in (weight, activation)
            if method.output and (module := method.output(name, layer, bits if method is owner else FLOAT)) is not None
        ]
        if len(made) > 1:
            raise Unsupported(f"{weight.name} and {activation.name} both want the place behind {name}")
        return made[0] if made else None

    return site


def _both(first: Callable[..., None] | None, second: Callable[..., None] | None) -> Callable[..., None] | None:
    """Return the two as one call after the other; None where there is none."""
    if first is None or second is None:
        return first or second

    def call(*args: nn.Module | int | Probe) -> None:
        first(*args)
        second(*args)

    return call


def _steps(weight: Method, activation: Method) -> Callable[[nn.Module, torch.optim.Optimizer], None] | None:
    """Return both steps as one, in which the optimizer itself steps once."""
    first, second = weight.step, activation.step
    if first is None or second is None:
        return first or second

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        first(model, optimizer)
        second(model, _Stepped(optimizer))  # type: ignore[arg-type]

    return step
