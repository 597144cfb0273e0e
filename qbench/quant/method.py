"""Defines a quantization method: an object whose functions make and train quantizers.

This file does not train, read files or depend on a configuration. `qbench.quant.install.install`
puts a method into a network; the trainer calls the other functions.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import FloatLayer, QLayer
from qbench.quant.probe import Batch, Probe
from qbench.quant.quantizer import Quantizer

QuantizerFactory = Callable[[str, FloatLayer, int], Quantizer]
"""(layer name, layer, bits below 32) -> quantizer of the layer's weights or input."""

OutputFactory = Callable[[str, QLayer, int], Quantizer | None]
"""(layer name, layer, bits of the gradient) -> quantizer of the layer's output, or None.

It is called for every quantized layer after `layer.bits`, `layer.weight_q` and `layer.input_q` have
been set.
"""


class Unsupported(Exception):
    """Raised if a method does not support a width, option or network. The message states the reason."""


def check_kind(method_name: str, layer_name: str, layer: nn.Module) -> None:
    """Raise `Unsupported` unless the layer is a `Conv2d` or a `Linear`. Some methods have formulas for these only."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = type(layer).__name__.removeprefix("Q")
        raise Unsupported(
            f"{layer_name} is a {kind}; {method_name} quantizes Conv2d and Linear only\n{float_rule(layer_name)}"
        )


def float_rule(layer_name: str) -> str:
    """Return what to type to leave a layer float."""
    return f"leave it float: 'layers.rules={{{layer_name}: float}}'"


@dataclass(frozen=True)
class Requires:
    """The requirements of a method on the network around its quantizers.

    Args:
        norm: the batch normalization in front of the input quantizer. "no_affine" has no scale and
            shift. None accepts any normalization.
        act: what to do with the activation function in front of the input quantizer. "keep" keeps
            it. "fused" removes it, because the quantizer is the activation function. "either" means
            that the quantizer contains the activation function, so that keeping or removing it
            gives the same values. The activation function is then removed if the network declares
            which layers it feeds.
        start: the initial weights. "scratch" means random weights. The float baseline is then
            trained only for comparison.
        teacher: whether, by default, the loss is a distillation from the float baseline. The key
            `distill` can change this.
    """

    norm: Literal["affine", "no_affine", "none"] | None = None
    act: Literal["keep", "either", "fused"] = "keep"
    start: Literal["float", "scratch"] = "float"
    teacher: bool = False


Prepare = Callable[[nn.Module, Probe], None]
OnEpoch = Callable[[nn.Module, int, int, Probe], None]
Loss = Callable[[nn.Module, Tensor, Batch], Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One paper's method. Functions that are None are skipped.

    A method has no state. Masks, scales, phases and orders are buffers or parameters of the
    quantizer modules, so that training can be resumed from the network's state_dict.

    Args:
        name: the usual name of the method, shown at the start of a table row.
        bits: the widths that this method object quantizes to.
        supported_bits: widths that the method supports for w, a and g, always including 32.
        requires: what the method requires of the network.
        traits: declared properties that `qbench check` tests. "odd", "monotone" and "idempotent"
            describe the weight quantizer within a scale group; "monotone_input" and
            "idempotent_input" describe the activation quantizer. "clipped_input": the gradient of
            the activation quantizer is 0 beyond the levels and nonzero everywhere between them.
            "cells_input": up to 8 bits, the backward pass of the activation quantizer needs only
            the level (see `ops.compress_activations`). "no_master": the parameters themselves lie
            on the levels, so they must not be averaged.
        weight, input, output: factories of quantizers; see `QuantizerFactory` and `OutputFactory`.
        prepare: (model, probe), called once, after the quantizers are installed and before the
            optimizer is made. It is not called when a run is resumed.
        phases: number of epochs -> first epoch of each phase except the first. At these epochs the
            learning-rate schedule restarts and momentum is cleared.
        on_epoch: (model, epoch, epochs, probe), called before an epoch's first batch. It is not
            called when a run is resumed within that epoch.
        loss: (model, logits, batch) -> scalar. None means the task's own loss.
        step: (model, optimizer), called instead of optimizer.step(). It may round updates,
            momentum and parameters.
        needs_training: False for post-training quantization, where `prepare` does all the work and
            no epoch is trained.
        foreign_names: maps the end of a tensor's name in the authors' checkpoints to the end of its
            name in qbench. A run that starts from such a checkpoint also loads its quantizers.
        teachers: networks that the trainer moves to the device and keeps in eval mode.
    """

    name: str
    bits: Bits
    supported_bits: Mapping[str, Container[int]]
    requires: Requires = Requires()
    traits: frozenset[str] = frozenset()
    weight: QuantizerFactory | None = None
    input: QuantizerFactory | None = None
    output: OutputFactory | None = None
    prepare: Prepare | None = None
    phases: Callable[[int], Sequence[int]] = field(default=lambda epochs: ())
    on_epoch: OnEpoch | None = None
    loss: Loss | None = None
    step: Step | None = None
    needs_training: bool = True
    foreign_names: Mapping[str, str] = field(default_factory=dict)
    teachers: tuple[nn.Module, ...] = ()

    def check(self, bits: Bits) -> None:
        """Raise `Unsupported` for a width that the method does not support."""
        for key, width in bits._asdict().items():
            if width != FLOAT and width not in self.supported_bits.get(key, ()):
                widths = [k for k in range(1, FLOAT) if k in self.supported_bits.get(key, ())]
                what = {"w": "weights", "a": "activations", "g": "gradients"}[key]
                allowed = f"{_ranges(widths)} or {FLOAT}" if widths else f"{FLOAT} ({what} are not quantized)"
                raise Unsupported(f"{self.name} does not support bits.{key}={width} for {what}; allowed: {allowed}")


def _ranges(widths: list[int]) -> str:
    """Return ascending widths as text with ranges, such as 1-8, 16."""
    parts: list[list[int]] = []
    for width in widths:
        if parts and width == parts[-1][-1] + 1:
            parts[-1].append(width)
        else:
            parts.append([width])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
