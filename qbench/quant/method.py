"""Defines the interface of a quantization method. A method is an object with functions that make and train quantizers.

`qbench.quant.install.install` adds the quantizers of a method to a network. The training loop calls the other functions
of the method. This module does not depend on a configuration.
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
"""Function (layer name, layer, bits below 32) that returns the quantizer of the layer's weights or input."""

OutputFactory = Callable[[str, QLayer, int], Quantizer | None]
"""Function (layer name, layer, bits of the gradient) that returns the quantizer of the layer's output, or None.

The function is called for every quantized layer, after `layer.bits`, `layer.weight_q` and `layer.input_q` were set.
"""


class Unsupported(Exception):
    """Raised if a method does not support a width, option or network. The message states the reason."""


def check_kind(method_name: str, layer_name: str, layer: nn.Module) -> None:
    """Raise `Unsupported` if the layer is neither a `Conv2d` nor a `Linear`.

    Some methods have formulas only for these two classes.
    """
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = type(layer).__name__.removeprefix("Q")
        raise Unsupported(
            f"{layer_name} is a {kind}; {method_name} quantizes Conv2d and Linear only\n{float_rule(layer_name)}"
        )


def factory_for(bits: int, factory: QuantizerFactory) -> QuantizerFactory:
    """Return `factory`, or a factory that refuses every layer if the method was built with float weights.

    Methods with phases or with steps of their own use this function, because `bits.w=32` switches these off.
    """

    def refuse(name: str, layer: FloatLayer, width: int) -> Quantizer:
        raise Unsupported(
            f"{name}: layers.* sets its weights to {width} bits, but bits.w={FLOAT} switches off the method's own "
            f"training of weights\nset bits.w={width}, and keep other layers float with layers.rules"
        )

    return refuse if bits == FLOAT else factory


def float_rule(*layer_names: str) -> str:
    """Return a line for an error message that says what to type to leave layers in float."""
    rules = ", ".join(f"{name}: float" for name in layer_names)
    return f"leave {'them' if layer_names[1:] else 'it'} float: 'layers.rules={{{rules}}}'"


@dataclass(frozen=True)
class Requires:
    """The requirements of a method on the network around its quantizers.

    Args:
        norm: the batch normalization that the network must have before the input quantizer: with scale and shift
            ("affine"), without them ("no_affine"), or no batch normalization ("none"). None means that the method has
            no requirement.
        act: what happens to the activation function before the input quantizer. "keep" keeps the activation
            function. "fused" removes it, because the quantizer takes its place. "either" means that the quantizer
            itself maps negative values to 0, so a ReLU before it changes no value. With "either", the ReLU is removed
            if the network declares which layers read its output. Other activation functions are kept.
        start: the initial weights. "float" means the weights of the float baseline. "scratch" means random weights. The
            float baseline is then trained only for comparison.
        teacher: whether the default loss is a distillation loss with the float baseline as the teacher. The
            configuration key `distill` overrides this default.
    """

    norm: Literal["affine", "no_affine", "none"] | None = None
    act: Literal["keep", "either", "fused"] = "keep"
    start: Literal["float", "scratch"] = "float"
    teacher: bool = False


Prepare = Callable[[nn.Module, Probe], None]
OnEpoch = Callable[[nn.Module, int, int, Probe], None]
Loss = Callable[[nn.Module, Tensor, Batch], Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer], None]
UnusedOptions = Callable[[nn.Module], Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A quantization method of one paper. Functions that are None are not called.

    A method itself has no state. All state, such as masks, scales and phases, is stored in buffers or parameters of the
    quantizers, so that training can be resumed from the network's state_dict.

    Args:
        name: the usual name of the method, shown at the start of a table row.
        bits: the bit widths to which this object quantizes.
        supported_bits: all widths that the method supports for w, a and g. They always include 32.
        requires: what the method requires of the network.
        traits: properties that the method declares and `qbench check` tests. "odd", "monotone" and "idempotent"
            describe the weight quantizer within a scale group. "monotone_input" and "idempotent_input" describe the
            activation quantizer. "clipped_input" means that the gradient of the activation quantizer is 0 beyond the
            outermost levels and nonzero everywhere between them. "cells_input" means that, up to 8 bits, the backward
            pass of the activation quantizer needs only the level of each element (`ops.activation_memory`).
            "fixed_point_gradients" means that the backward pass rounds gradients to numbers with a fixed step. The
            loss must then not be scaled, so the method cannot train in float16.
            "no_master" means that the parameters themselves are on the levels. They must not be averaged, because the
            averages would be between the levels.
        weight, input, output: factories of quantizers, of the types `QuantizerFactory` and `OutputFactory`.
        prepare: function of (model, probe) that is called once, after the quantizers are installed and before the
            optimizer is made. A resumed run does not call it again.
        phases: function that takes the number of epochs, and returns the first epoch of each phase except the first
            phase. At the start of a phase, the learning-rate schedule restarts and momentum is cleared.
        on_epoch: function of (model, epoch, epochs, probe) that is called before the first batch of an epoch. A run
            that resumes within an epoch does not call it again.
        loss: function of (model, logits, batch) that returns a scalar. None means the usual loss of the task.
        step: function of (model, optimizer) that is called instead of optimizer.step(). It may round updates, momentum
            and parameters.
        needs_training: False for post-training quantization, in which `prepare` does all the work and no epoch is
            trained.
        foreign_names: maps endings of tensor names in the authors' checkpoints to the endings of the same names in
            qbench. With this map, a run that starts from such a checkpoint also loads the parameters of quantizers.
        option_slots: maps an option of the method's function to the slot that it concerns: w, a or g. Options that
            concern several slots are not included.
        unused_options: function of the quantized network that returns the options that have no effect on it, each with
            the reason, such as `no layer has 8-bit weights`.
        teachers: teacher networks, which the training loop moves to the device and keeps in eval mode.
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
    option_slots: Mapping[str, str] = field(default_factory=dict)
    unused_options: UnusedOptions = field(default=lambda model: {})
    teachers: tuple[nn.Module, ...] = ()

    def allowed_widths(self, key: str) -> str:
        """Return the widths that the method supports for w, a or g, as text such as `2-8 or 32`."""
        widths = [k for k in range(1, FLOAT) if k in self.supported_bits.get(key, ())]
        return f"{_ranges(widths)} or {FLOAT}" if widths else str(FLOAT)

    def check(self, bits: Bits) -> None:
        """Raise `Unsupported` for a width that the method does not support."""
        for key, width in bits._asdict().items():
            if width != FLOAT and width not in self.supported_bits.get(key, ()):
                what = {"w": "weights", "a": "activations", "g": "gradients"}[key]
                allowed = self.allowed_widths(key)
                allowed += f" ({what} are not quantized)" if allowed == str(FLOAT) else ""
                raise Unsupported(f"{self.name} does not support bits.{key}={width} for {what}; allowed: {allowed}")


def _ranges(widths: list[int]) -> str:
    """Return ascending widths as text with ranges, such as `1-8, 16`."""
    parts: list[list[int]] = []
    for width in widths:
        if parts and width == parts[-1][-1] + 1:
            parts[-1].append(width)
        else:
            parts.append([width])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
