"""What a quantization method is: a value that names its parts. The parts are functions and quantizer modules.

Nothing here trains, reads files or knows a configuration; `qbench.quant.install.install` puts a method into a network,
the trainer calls the rest of it.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.probe import Batch, Probe

Site = Callable[[str, nn.Module, int], nn.Module]
"""(layer name, layer, bits) -> quantizer module of that layer's weights or input; called for widths below 32 only."""

OutputSite = Callable[[str, nn.Module, int], nn.Module | None]
"""(layer name, layer, bits of the gradient) -> module behind the layer, or None.

It is called last, for every quantized layer: `layer.bits`, `layer.weight_q` and `layer.input_q` are in place.
"""


class Unsupported(Exception):
    """The method cannot use this width, option or network; the message says why and what would do."""


@dataclass(frozen=True)
class Requires:
    """What a method needs of the network around its quantizers.

    `norm`: the batch normalization in front of the input quantizer: "no_affine" has no scale and shift, None is
    whatever
    the network has. `act`: "keep" wants the network's activation function before the input quantizer; "fused"
    wants none, the quantizer being the activation; "either" holds the activation within itself (so both give the same
    values) and takes its place where the network says which layers an activation feeds.

    `start`: "scratch" trains from random weights; the float parent is trained too, to compare with.
    `teacher`: the loss is a distillation from the float parent unless `distill` says otherwise.
    """

    norm: Literal["affine", "no_affine", "none"] | None = None
    act: Literal["keep", "either", "fused"] = "keep"
    start: Literal["float", "scratch"] = "float"
    teacher: bool = False


Prepare = Callable[[nn.Module, "Probe"], None]
OnEpoch = Callable[[nn.Module, int, int, "Probe"], None]
Loss = Callable[[nn.Module, Tensor, Batch], Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One paper's method, as a value. Absent parts cost nothing.

    A method holds no state: masks, scales, phases, orders are buffers or parameters of its quantizer modules, so that
    one state_dict resumes it.

    Args:
        name: as people say it; the row of a table begins with it.
        bits: the widths of this value.
        legal: widths that the method knows for w, a and g, 32 always among them.
        requires: what the network around it must be like.
        traits: declared properties that `qbench check` holds it to: "odd", "monotone", "idempotent" of the weights'
            function within a scale group; "monotone_input", "idempotent_input" of the activations', "clipped_input"
            where its gradient is 0 beyond the levels and nowhere between them, "cells_input" where up to 8 bits its
            backward pass needs no more than the level (see `ops.compressed`). "no_master": the parameters themselves
            lie on the levels, so that nothing may average them.
        weight, input, output: sites; see `Site`.
        prepare: once, after the quantizers are in place and before the optimizer exists; never again on a resume.
        phases: epochs -> first epochs of the phases after the first, where the learning-rate schedule starts anew and
            momentum is cleared.
        on_epoch: (model, epoch, epochs, probe), before an epoch's first batch; never again on a resume within it.
        loss: (model, logits, batch) -> scalar; None is the task's own loss.
        step: (model, optimizer), in place of optimizer.step(); may round updates, momentum, parameters.
        needs_training: false for post-training quantization: `prepare` does it all, and no epoch is trained.
        teachers: networks of its own (teachers) that the trainer moves to the device and keeps in eval mode.
    """

    name: str
    bits: Bits
    supported_bits: Mapping[str, Container[int]]
    requires: Requires = Requires()
    traits: frozenset[str] = frozenset()
    weight: Site | None = None
    input: Site | None = None
    output: OutputSite | None = None
    prepare: Prepare | None = None
    phases: Callable[[int], Sequence[int]] = field(default=lambda epochs: ())
    on_epoch: OnEpoch | None = None
    loss: Loss | None = None
    step: Step | None = None
    needs_training: bool = True
    teachers: tuple[nn.Module, ...] = ()

    def check(self, bits: Bits) -> None:
        """Raise `Unsupported` for a width that the method does not know."""
        for key, width in bits._asdict().items():
            if width != FLOAT and width not in self.supported_bits.get(key, ()):
                allowed = [k for k in range(1, FLOAT) if k in self.supported_bits.get(key, ())]
                what = {"w": "weights", "a": "activations", "g": "gradients"}[key]
                known = f"{_ranges(allowed)} or {FLOAT}" if allowed else f"{FLOAT} only: it leaves {what} float"
                raise Unsupported(f"{self.name} does not know bits.{key}={width} for {what}; it knows {known}")


def _ranges(widths: list[int]) -> str:
    """Write ascending widths shortly: 1-8, 16."""
    parts: list[list[int]] = []
    for width in widths:
        if parts and width == parts[-1][-1] + 1:
            parts[-1].append(width)
        else:
            parts.append([width])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
