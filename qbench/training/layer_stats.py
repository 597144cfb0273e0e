"""Looks at a network in training: what its quantized layers make of a few training images, at the end of an epoch.

Looking changes nothing: evaluation mode, no gradient, the random state as it was. What is told of a layer, `w` being
its weights, `a` its input:

    w.top, a.top          the largest magnitude among the levels
    w.dead, a.dead        levels that nothing lies on
    w.entropy, a.entropy  of how often the levels are taken, in bits
    w.flips               part of the weights whose level is another one than at the look before
    w.frozen              part of the weights that an incremental method has frozen
    a.clipped             part of the input above the highest level or, where levels are negative, below the lowest
    sqnr, cosine          of the output against the one that the float network with the same latent weights has: signal
                          over error in dB, cosine of the angle
    w.grad                norm of the latent weights' gradient in the last step, clipped where it is clipped
    w.NAME, a.NAME        a parameter or buffer of the quantizer that is one number: step, alpha, n1, ...
    w.NAME.grad           norm of the gradient of a quantizer's parameter

Scale groups are counted together: level 3 of one channel and level 3 of another are one level. Weights that are free
yet count at the nearest level. What is not finite, or not known, is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import isfinite, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import QLayer, float_mode, quantized_layers
from qbench.quant.masks import FrozenWeight
from qbench.quant.quantizer import Grid
from qbench.quant.sqnr import sqnr_db
from qbench.quant.verify import nearest_points

LEAST, MOST, SHARE, PIXELS = 8, 64, 64, 2**17
"""Images that are looked at: a 64th of an epoch's, 8 to 64, fewer of large ones: two passes over so many cost about a
hundredth of an epoch's three passes over all."""
DIGITS = 6
"""That are kept."""
SLOTS = {"w": "weight_q", "a": "input_q", "g": "output_q"}

LayerMetrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor before and after its quantizer, and the values allowed."""

    before: Tensor
    after: Tensor
    grid: Grid

    @cached_property
    def codes(self) -> Tensor:
        """The index of each value's level, (groups, values of a group)."""
        return nearest_points(self.grid.arrange(self.after), self.grid.points)[0]

    @property
    def counts(self) -> Tensor:
        """How many values lie on each level that is allowed, ascending."""
        allowed = self.grid.points[..., 0].isfinite().any(0)
        return self.codes.flatten().bincount(minlength=len(allowed))[allowed]


class LayerTrace(NamedTuple):
    """What a layer made of some images: its quantized weights and input, None where they are float, and its output."""

    weights: QuantizedTensor | None
    inputs: QuantizedTensor | None
    input: Tensor
    output: Tensor


def few(images: Tensor, trained: int) -> Tensor:
    """Return the first of some images (N, C, H, W), as many as an epoch of `trained` images may be slowed down by."""
    count = min(max(trained // SHARE, LEAST), MOST, PIXELS // prod(images.shape[2:]))
    return images[: max(count, 2)]


@torch.no_grad()
def trace_layers(model: nn.Module, images: Tensor) -> dict[str, LayerTrace]:
    """Return what each quantized layer makes of images; in the order in which they run; of one that runs
    several times the last time counts."""
    if not (layers := quantized_layers(model)):
        return {}
    slots = [f"{name}.{slot}" for name in layers for slot in ("weight_q", "input_q")]
    with eval_mode_keeping_rng(model), recorded_calls(model, [*layers, *slots]) as calls:
        model(images)
        passed = {name: (x, y) for name, x, y in calls}
        return {
            name: LayerTrace(_passed(layer.weight_q, *passed[f"{name}.weight_q"]),
                       _passed(layer.input_q, *passed[f"{name}.input_q"]), *passed[name])
            for name in passed if (layer := layers.get(name)) is not None
        }  # fmt: skip


def _passed(site: Any, before: Tensor, after: Tensor) -> QuantizedTensor | None:
    """Look at one quantizer; None where it declares no levels: float, or without any yet."""
    grid = site.grid(before) if hasattr(site, "grid") else None
    return QuantizedTensor(before, after, grid) if grid is not None and grid.points.shape[1] else None


def layer_metrics(
    model: nn.Module, images: Tensor, seen: Mapping[str, LayerTrace], before: Mapping[str, Tensor], grads: LayerMetrics
) -> LayerMetrics:
    """Return what there is to tell of every layer; see above.

    Args:
        seen: what `trace_layers` has seen on these images.
        before: what `codes` returned of the look before; empty for none.
        grads: what `gradients` returned of the last step.
    """
    floats, layers, told = _float_outputs(model, images, list(seen)), quantized_layers(model), {}
    for name, sight in seen.items():
        values = dict(_numbers(layers[name]))
        for slot, passed in (("w", sight.weights), ("a", sight.inputs)):
            if passed is not None:
                values |= {f"{slot}.{what}": value for what, value in _use(passed).items()}
        if sight.inputs is not None:
            values["a.clipped"] = _clipped(sight.inputs)
        if sight.weights is not None and name in before and before[name].shape == sight.weights.codes.shape:
            values["w.flips"] = (before[name] != sight.weights.codes).float().mean().item()
        if isinstance(site := layers[name].weight_q, FrozenWeight):
            values["w.frozen"] = site.frozen.float().mean().item()
        values |= _likeness(floats[name], sight.output) | grads.get(name, {})
        told[name] = {what: float(f"{value:.{DIGITS}g}") for what, value in values.items() if isfinite(value)}
    return told


def codes(seen: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the codes of every layer's weights, to tell by the next look which have flipped."""
    found = {}
    for name, sight in seen.items():
        if sight.weights is not None:
            small = sight.weights.grid.points.shape[1] <= 2**8
            found[name] = sight.weights.codes.to(torch.uint8 if small else torch.int32)
    return found


def gradients(model: nn.Module) -> LayerMetrics:
    """Return the norms of the gradients that a step has left, by layer; nothing where it has left none."""
    found: LayerMetrics = {}
    for name, layer in quantized_layers(model).items():
        named = [("w.grad", layer.weight)]
        for key, slot in SLOTS.items():
            named += [(f"{key}.{n}.grad", p) for n, p in getattr(layer, slot).named_parameters()]
        norms = {key: p.grad.norm().item() for key, p in named if p.grad is not None}
        found |= {name: norms} if norms else {}
    return found


def weight_tensors(seen: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return latent and quantized weights, named for TensorBoard."""
    sights = {name: sight.weights for name, sight in seen.items() if sight.weights is not None}
    latent = {f"latent/{name}": passed.before for name, passed in sights.items()}
    return latent | {f"quantized/{name}": passed.after for name, passed in sights.items()}


def input_tensors(seen: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return inputs before and after quantization, named for TensorBoard."""
    sights = {name: sight.inputs for name, sight in seen.items() if sight.inputs is not None}
    before = {f"input/{name}": passed.before for name, passed in sights.items()}
    return before | {f"quantized_input/{name}": passed.after for name, passed in sights.items()}


def occupancy(seen: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return how many values lie on each level, ascending, named for TensorBoard."""
    pairs = [(n, key, p) for n, s in seen.items() for key, p in (("w", s.weights), ("a", s.inputs)) if p is not None]
    return {f"{key}.levels/{name}": passed.counts for name, key, passed in pairs}


def _float_outputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    with float_mode(model), eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, names) as calls:
        model(images)
        return {name: y for name, _, y in calls}


def _use(passed: QuantizedTensor) -> dict[str, float]:
    counts = passed.counts.double()
    parts = counts[counts > 0] / counts.sum()
    return {
        "top": passed.grid.points.abs().nan_to_num(0, posinf=0).max().item(),
        "dead": float(len(counts) - len(parts)),
        "entropy": abs((parts * parts.log2()).sum().item()),
    }


def _clipped(passed: QuantizedTensor) -> float:
    x, points = passed.grid.arrange(passed.before), passed.grid.points
    low, high = (points.nan_to_num(torch.inf).amin(1, True), points.nan_to_num(-torch.inf).amax(1, True))
    return ((x > high) | ((x < low) & (low < 0))).float().mean().item()


def _likeness(wanted: Tensor, got: Tensor) -> dict[str, float]:
    signal, own, error = wanted.norm().item(), got.norm().item(), (got - wanted).norm().item()
    if not signal:
        return {}
    return {"sqnr": sqnr_db(signal * signal, error * error)} | (
        {"cosine": (wanted * got).sum().item() / (signal * own)} if own else {}
    )


def _numbers(layer: QLayer) -> Iterator[tuple[str, float]]:
    for key, slot in SLOTS.items():
        for name, t in chain(getattr(layer, slot).named_parameters(), getattr(layer, slot).named_buffers()):
            if t.numel() == 1 and t.dtype != torch.bool:
                yield f"{key}.{name}", t.item()
