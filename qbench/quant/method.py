"""A quantization method: a value that names its parts, functions and quantizer modules.

Nothing here trains, reads files or knows a configuration. `qbench.quant.install.install` puts a
method into a network; the trainer calls the other parts.
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
"""(layer name, layer, bits below 32) -> quantizer of that layer's weights or input."""

OutputFactory = Callable[[str, QLayer, int], Quantizer | None]
"""(layer name, layer, bits of the gradient) -> quantizer behind the layer, or None.

It is called last, for every quantized layer: `layer.bits`, `layer.weight_q` and `layer.input_q` are
in place.
"""


class Unsupported(Exception):
    """The method cannot use this width, option or network; the message says why."""


@dataclass(frozen=True)
class Requires:
    """What a method requires of the network around its quantizers.

    Args:
        norm: the batch normalization in front of the input quantizer. "no_affine" has no scale and
            shift; None accepts whatever the network has.
        act: the activation function in front of the input quantizer. "keep" leaves it there.
            "fused" removes it, because the quantizer is the activation. "either" contains the
            activation, so that both give the same values; it is removed where the network says
            which layers an activation feeds.
        start: "scratch" trains from random weights. The float baseline is trained too, for
            comparison.
        teacher: whether the loss is a distillation from the float baseline unless `distill` says
            otherwise.
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
    """One paper's method, as a value. Absent parts cost nothing.

    A method holds no state: masks, scales, phases, orders are buffers or parameters of its
    quantizer modules, so that one state_dict resumes it.

    Args:
        name: the usual name of the method; the row of a table begins with it.
        bits: the widths of this value.
        supported_bits: widths that the method supports for w, a and g, always including 32.
        requires: what the method requires of the network.
        traits: declared properties that `qbench check` tests. "odd", "monotone", "idempotent": of
            the weights' function within a scale group. "monotone_input", "idempotent_input": of the
            activations' function. "clipped_input": its gradient is 0 beyond the levels and nowhere
            between them. "cells_input": up to 8 bits its backward pass needs no more than the level
            (see `ops.compress_activations`). "no_master": the parameters themselves lie on the
            levels, so that nothing may average them.
        weight, input, output: see `QuantizerFactory` and `OutputFactory`.
        prepare: (model, probe), once, after the quantizers are in place and before the optimizer
            exists; not on a resume.
        phases: epochs -> first epochs of the phases after the first, where the learning-rate
            schedule restarts and momentum is cleared.
        on_epoch: (model, epoch, epochs, probe), before an epoch's first batch; not on a resume
            within it.
        loss: (model, logits, batch) -> scalar; None is the task's own loss.
        step: (model, optimizer), in place of optimizer.step(); may round updates, momentum,
            parameters.
        needs_training: False for post-training quantization, where `prepare` does all and no epoch
            is trained.
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
    teachers: tuple[nn.Module, ...] = ()

    def check(self, bits: Bits) -> None:
        """Raise `Unsupported` for a width that the method does not support."""
        for key, width in bits._asdict().items():
            if width != FLOAT and width not in self.supported_bits.get(key, ()):
                widths = [k for k in range(1, FLOAT) if k in self.supported_bits.get(key, ())]
                what = {"w": "weights", "a": "activations", "g": "gradients"}[key]
                allowed = f"{_ranges(widths)} or {FLOAT}" if widths else f"{FLOAT} only: it leaves {what} float"
                raise Unsupported(f"{self.name} does not know bits.{key}={width} for {what}; it knows {allowed}")


def _ranges(widths: list[int]) -> str:
    """Write ascending widths as ranges: 1-8, 16."""
    parts: list[list[int]] = []
    for width in widths:
        if parts and width == parts[-1][-1] + 1:
            parts[-1].append(width)
        else:
            parts.append([width])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
