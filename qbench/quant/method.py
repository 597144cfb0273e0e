"""What a quantization method is: a value that names its parts. The parts are functions and quantizer modules.

Nothing here trains, reads files or knows a configuration; `qbench.quant.layers.install` puts a method into a network,
the trainer calls the rest of it.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

FLOAT = 32
"""The width that means: not quantized."""

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) as the network takes them, and labels (N,)."""

Site = Callable[[str, nn.Module, int], nn.Module]
"""(layer name, layer, bits) -> quantizer module of that layer's weights or input; called for widths below 32 only."""

OutputSite = Callable[[str, nn.Module, int], nn.Module | None]
"""(layer name, layer, bits of the gradient) -> module behind the layer, or None.

It is called last, for every quantized layer: `layer.bits`, `layer.weight_q` and `layer.input_q` are in place.
"""


class Unsupported(Exception):
    """The method cannot use this width, option or network; the message says why and what would do."""


class Bits(NamedTuple):
    """Widths of weights, activations and gradients; 32 leaves them float."""

    w: int = FLOAT
    a: int = FLOAT
    g: int = FLOAT

    def __str__(self) -> str:
        return f"w{self.w}a{self.a}g{self.g}"


@dataclass(frozen=True)
class Requires:
    """What a method needs of the network around its quantizers.

    `norm`: the batch normalization in front of the input quantizer: "plain" has no scale and shift, None is whatever
    the network has. `act`: "kept" wants the network's activation function before the input quantizer; "replaced"
    wants none, the quantizer being the activation; "either" holds the activation within itself (so both give the same
    values) and takes its place where the network says which layers an activation feeds.

    `start`: "scratch" trains from random weights; the float parent is trained too, to compare with.
    `teacher`: the loss is a distillation from the float parent unless `distill` says otherwise.
    """

    norm: Literal["affine", "plain", "none"] | None = None
    act: Literal["kept", "either", "replaced"] = "kept"
    start: Literal["float", "scratch"] = "float"
    teacher: bool = False


class Storage(NamedTuple):
    """What a quantized weight tensor occupies: `codes` of `code_bits` each, and bytes for scales and codebooks."""

    codes: int
    code_bits: int
    extra_bytes: int

    @property
    def ideal(self) -> float:
        """Bytes with every code at its nominal width."""
        return self.codes * self.code_bits / 8 + self.extra_bytes

    @property
    def packed(self) -> int:
        """Bytes with every code in a lane of 1, 2, 4, 8, 16 or 32 bits, none across a byte's border."""
        lane = 1 << (self.code_bits - 1).bit_length()
        return -(-self.codes * lane // 8) + self.extra_bytes


def one_group(values: Tensor) -> Tensor:
    """Arrange a whole tensor as one scale group of scalars: (1, n, 1)."""
    return values.reshape(1, -1, 1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor may take.

    `points` has shape (groups, levels, dimension): for every scale group its allowed values, ascending where scalar,
    padded with NaN where groups differ in count; dimension is 1 but for product codes. `arrange` brings a tensor into
    (groups, elements, dimension), so that element and points of a group can be compared.
    """

    points: Tensor
    arrange: Callable[[Tensor], Tensor] = one_group


class WeightQuantizer(Protocol):
    """A module for a layer's weights: `forward(w) -> w_hat`, plus what it promises about w_hat.

    Optional, for any quantizer: `complete` (bool), false while part of the weights is float; `report() -> dict` of
    numbers and words about its state that a reader of the result wants (sparsity, order, counts);
    `positive_parameters`, names of its parameters or buffers that must stay above 0: a run stops where one is not.
    """

    def grid(self, w: Tensor) -> Grid:
        """Return the values allowed for the latent weights w."""

    def bytes(self, w: Tensor) -> Storage:
        """Return what w_hat occupies when stored as codes."""


class InputQuantizer(Protocol):
    """A module for a layer's input: `forward(x) -> x_hat`, plus the values allowed."""

    def grid(self, x: Tensor) -> Grid:
        """Return the values allowed for x_hat."""


class OutputQuantizer(Protocol):
    """A module behind a layer: `forward(y, x) -> y`; its backward may quantize the gradient of y."""

    def grid(self, grad: Tensor) -> Grid:
        """Return the values allowed for the gradient of y, given the gradient that arrives."""


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


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Collect (layer name, input, output) of the named layers in the order they run. The one place with hooks."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: calls.append((name, args[0], output))

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Probe:
    """A fixed part of the training split, for methods that measure: losses, gradients, responses of layers.

    Everything runs in eval mode, moves no batch-norm statistics and leaves the random state as it found it. No method
    ever sees validation or test data.

    Args:
        batches: batches as the network takes them, on its device.
        loss: (logits, labels) -> mean loss of the batch, a scalar.
    """

    def __init__(self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.batches = tuple(batches)
        self._loss = loss

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss over the probe."""
        with eval_mode_keeping_rng(model), torch.no_grad():
            return self._mean(model).item()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the gradient of the mean loss by parameter name; `.grad` of the parameters is not touched."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with eval_mode_keeping_rng(model), torch.enable_grad():
            grads = torch.autograd.grad(self._mean(model), list(named.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}

    def responses(self, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's inputs and outputs over the probe, along the first axis, without gradient."""
        with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, [layer]) as calls:
            for images, _ in self.batches:
                model(images)
        return torch.cat([x for _, x, _ in calls]), torch.cat([y for _, _, y in calls])

    def _mean(self, model: nn.Module) -> Tensor:
        count = sum(len(labels) for _, labels in self.batches)
        parts = [self._loss(model(images), labels) * len(labels) for images, labels in self.batches]
        return torch.stack(parts).sum() / count


@contextmanager
def eval_mode_keeping_rng(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while and give the random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
