"""Measures how a method quantizes single values in a small layer.

This module contains no formulas of methods. It evaluates quantizers to obtain their values and derivatives. The weights
are quantiles of N(0, 1) in a seeded random order. The inputs come from a small network. If the scale of a quantizer
depends on a whole tensor, the scale is computed from these weights or inputs.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import QConv2d
from qbench.quant.masks import FrozenWeight
from qbench.quant.method import Method
from qbench.quant.quantizer import IdentityQuantizer, Quantizer
from qbench.report.quantizer_plots.probe_network import VALUES, ProbeLayer, install_in_probe, normal_values, prepare
from qbench.report.quantizer_plots.transfer_curves import DRAWS, FEW_LEVELS, Codewords, QuantizerCurves, TransferCurve

PICKS = 512
"""Number of values at which derivatives are computed."""
BISECTIONS, MAX_SHARPENED = 24, 64
"""Number of bisection steps per jump, and maximum number of jumps that are located by bisection."""
GRADIENT_STD = 0.01
"""Standard deviation of the gradients on which output quantizers are measured."""

Evaluate = Callable[[nn.Module], Tensor]


def measure_quantizers(method: Method) -> list[QuantizerCurves | Codewords]:
    """Return the curves of the weights, inputs and outputs that a method quantizes, measured before training.

    If the method quantizes nothing, return the curve of its float weights. The global random state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        curves: list[QuantizerCurves | Codewords] = []
        if method.bits.w < FLOAT or method.bits == Bits():
            curves += _weight_curves(method)
        if method.bits.a < FLOAT:
            curves.append(_input_curves(method))
        if method.bits.g < FLOAT:
            curves.append(_output_curves(method))
        return curves


def forward_curves(method: Method) -> dict[str, TransferCurve]:
    """Return only the forward curves of weights and inputs.

    Tensors that a method does not quantize have no curve.

    The function takes a tenth of the time of `measure_quantizers`. Product quantization has no curve, because a code
    represents several weights. The global random state is restored.
    """
    curves: dict[str, TransferCurve] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = install_in_probe(method, 1, VALUES)
        if _codeword_size(probe.layer) > 1:
            return {}
        if method.bits.w < FLOAT:
            _, quantizer = prepare(method, probe)[-1]
            w = probe.layer.weight.detach()
            _, curves["weights"] = _forward(quantizer, w, w, w)
        if method.bits.a < FLOAT:
            quantizer, x, tensor, _ = _inputs(method)
            _, curves["inputs"] = _forward(quantizer, x, tensor, tensor)
    return curves


def _weight_curves(method: Method) -> list[QuantizerCurves | Codewords]:
    """Return the curves of the weights.

    There is one curve, or one for each phase of an incremental method that `prepare` returns. For product quantization,
    return the codewords.
    """
    probe = install_in_probe(method, 1, VALUES)
    if (size := _codeword_size(probe.layer)) > 1:
        return [_codewords(method, install_in_probe(method, VALUES // size, size))]
    initial = probe.layer.weight.detach().clone()
    phases = prepare(method, probe)
    if "no_master" in method.traits:
        return [_update_curves(method, probe, initial)]
    w, bits = probe.layer.weight.detach(), method.bits.w
    return [replace(_curves("weights", bits, quantizer, w, w, w), when=when) for when, quantizer in phases]


def _curves(what: str, bits: int, quantizer: Quantizer, x: Tensor, like: Tensor, tensor: Tensor) -> QuantizerCurves:
    """Measure a quantizer of weights or inputs.

    Args:
        what: "weights" or "inputs".
        bits: the width in bits.
        quantizer: the quantizer that is measured.
        x: the values at which the quantizer is evaluated. If `x` is the same tensor as `like`, the curve shows only the
            elements of the first scale group.
        like: the tensor whose first scale group determines the levels.
        tensor: the float tensor whose histogram is drawn behind the curve.
    """
    places, forward = _forward(quantizer, x, like, tensor)
    picks = _evenly_spaced(forward.x)
    slope = _slopes(quantizer, x, places[picks])
    frozen = None
    if isinstance(quantizer, FrozenWeight) and not quantizer.complete:
        frozen = quantizer.frozen.flatten()[places]
    notes = [f"one group of {len(places)}"] if len(places) < x.numel() else []
    scalars = [f"{name} {p.item():.3g}" for name, p in quantizer.named_parameters() if p.dim() == 0]
    notes += [f"starts at {', '.join(scalars)}"] if scalars else []
    notes += [f"learned: {name}" for name, p in quantizer.named_parameters() if p.dim() > 0]
    return QuantizerCurves(what, bits, forward, picks, slope, frozen=frozen, notes=tuple(notes))


def _forward(quantizer: Quantizer, x: Tensor, like: Tensor, tensor: Tensor) -> tuple[Tensor, TransferCurve]:
    """Return the indices of the curve's points in the flattened x, and the curve. See `_curves` for the arguments."""
    places, levels = _first_scale_group(quantizer, like)
    places = places if x is like else torch.arange(x.numel())
    places = places[x.flatten()[places].argsort(stable=True)]
    values = _evaluations(quantizer, lambda module: module(x)).flatten(1)[:, places]
    return places, _transfer_curve(x.flatten()[places], values, levels, tensor)


def _update_curves(method: Method, probe: ProbeLayer, x: Tensor) -> QuantizerCurves:
    """Measure how a method without float weights quantizes the updates of weights.

    The optimizer step applies the update x to weights that are zero.
    """

    def updated(model: nn.Module) -> Tensor:
        weight = model.get_parameter("middle.weight")
        weight.data.zero_()
        weight.grad = -x
        step = method.step or (lambda model, optimizer: optimizer.step())
        step(model, torch.optim.SGD([weight], lr=1.0))
        return weight.detach()

    curves = _curves("weights", method.bits.w, probe.layer.weight_q, x, x, x)
    forward = _transfer_curve(*_sorted(x, _evaluations(probe.model, updated)), curves.forward.levels, x)
    return replace(curves, forward=forward, notes=("an update by w, from 0",))


def _input_curves(method: Method) -> QuantizerCurves:
    """Measure the input quantizer over the range of its inputs, extended by 20 % on each side."""
    quantizer, x, tensor, behind = _inputs(method)
    curves = _curves("inputs", method.bits.a, quantizer, x, tensor, tensor)
    curves = replace(curves, forward=_sharpened(curves.forward, quantizer, x.shape))
    if method.bits.g < FLOAT or isinstance(behind, IdentityQuantizer):
        return curves
    return replace(curves, notes=(*curves.notes, f"after the layer: {type(behind).__name__}"))


def _inputs(method: Method) -> tuple[Quantizer, Tensor, Tensor, nn.Module]:
    """Return the input quantizer, the values at which to evaluate it, the layer's inputs, and the output quantizer."""
    probe = install_in_probe(method, 1, VALUES)
    columns = VALUES
    if (size := _codeword_size(probe.layer)) > 1:
        probe, columns = install_in_probe(method, VALUES // size, size), size
    prepare(method, probe)
    quantizer, behind = probe.layer.input_q, probe.layer.output_q
    tensor = probe.model.middle_inputs(probe.images)
    _, levels = _first_scale_group(quantizer, tensor)
    # the range extends from the 0.1 % to the 99.9 % quantile of the inputs, and includes all levels if there are few
    ends = tensor.flatten().sort().values[[tensor.numel() // 1000, -1 - tensor.numel() // 1000]]
    low, high = (end.item() for end in torch.cat([ends, levels] if len(levels) <= FEW_LEVELS else [ends]).aminmax())
    margin = (high - low) / 5
    x = torch.linspace(low - margin, high + margin, VALUES).reshape(-1, columns, 1, 1)
    return quantizer, x, tensor, behind


def _sharpened(curve: TransferCurve, quantizer: Quantizer, shape: torch.Size) -> TransferCurve:
    """Move the two points next to each jump closer to the jump, by bisection.

    All jumps are located at the same time. The quantizer must be an elementwise function.
    """
    jumps = curve.jumps
    if not 0 < len(jumps) <= MAX_SHARPENED:
        return curve
    low, high, module = curve.x[jumps], curve.x[jumps + 1], copy.deepcopy(quantizer).eval()
    for _ in range(BISECTIONS):
        middle = curve.x.clone()
        middle[jumps] = (low + high) / 2
        below = module(middle.reshape(shape)).detach().flatten()[jumps] == curve.y[jumps]
        low, high = torch.where(below, middle[jumps], low), torch.where(below, high, middle[jumps])
    x = curve.x.clone()
    x[jumps], x[jumps + 1] = low, high
    return curve._replace(x=x)


def _output_curves(method: Method) -> QuantizerCurves:
    """Measure a layer's output quantizer, on the outputs for one image and on gradients of these outputs."""
    probe = install_in_probe(method, VALUES, 2)
    prepare(method, probe)
    quantizer, x = probe.layer.output_q, torch.ones(1, 2, 1, 1)
    y = normal_values(VALUES).reshape(1, -1, 1, 1)
    gradient = GRADIENT_STD * normal_values(VALUES).reshape(y.shape)

    def outgoing(module: nn.Module) -> Tensor:
        at = y.clone().requires_grad_()
        return torch.autograd.grad(module(at, x), at, gradient)[0]

    values = _evaluations(quantizer, lambda module: module(y, x))
    forward = _transfer_curve(*_sorted(y, values), y.new_zeros(0), y)
    _, levels = _first_scale_group(quantizer, gradient)
    backward = _transfer_curve(*_sorted(gradient, _evaluations(quantizer, outgoing)), levels, gradient)
    return QuantizerCurves("outputs", method.bits.g, forward, _evenly_spaced(forward.x), backward=backward)


def _codewords(method: Method, probe: ProbeLayer) -> Codewords:
    prepare(method, probe)
    layer = probe.layer
    w = layer.weight.detach()
    grid = layer.weight_q.grid(w)
    assert grid is not None  # the grid of a product quantizer has vectors as levels
    points = grid.points[0]
    decoded = layer.weight_q(w).detach()
    fixed = not layer.weight_q(layer.weight).requires_grad
    return Codewords(method.bits.w, w.flatten(1), decoded.flatten(1), points[points.isfinite().all(1)], fixed)


def _codeword_size(layer: QConv2d) -> int:
    """Return the number of weights that one code of the layer represents."""
    grid = layer.weight_q.grid(layer.weight.detach())
    return 1 if grid is None else int(grid.points.shape[-1])


def _first_scale_group(quantizer: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the first scale group in the flattened tensor, and the levels of this group."""
    places = torch.arange(like.numel())
    if (grid := quantizer.grid(like)) is None:
        return places, like.new_zeros(0)
    group = grid.arrange(places.reshape(like.shape).double())[0, :, 0].long()
    levels = grid.points.detach()[0, :, 0]
    return torch.unique(group), torch.unique(levels[levels.isfinite()])


def _evaluations(module: nn.Module, evaluate: Evaluate) -> Tensor:
    """Evaluate copies of a module, and stack the results along a new first dimension.

    A stochastic module is evaluated `DRAWS` times in training mode. A deterministic module is evaluated
    once in evaluation mode.
    """

    def once() -> Tensor:
        return evaluate(copy.deepcopy(module).train()).detach()

    first, second = once(), once()
    if torch.equal(first, second):
        return evaluate(copy.deepcopy(module).eval()).detach()[None]
    return torch.stack([first, second, *(once() for _ in range(DRAWS - 2))])


def _slopes(quantizer: Quantizer, x: Tensor, places: Tensor) -> Tensor:
    """Return the derivatives of quantized values with respect to their own inputs, for some elements of x.

    `places` are the indices of these elements in the flattened x.
    """
    x = x.detach().clone().requires_grad_()
    y = copy.deepcopy(quantizer).eval()(x)
    if not y.requires_grad:
        return torch.zeros(len(places))
    slopes = []
    for place in places.tolist():
        (grad,) = torch.autograd.grad(y.flatten()[place], x, retain_graph=True, allow_unused=True)
        slopes.append(0.0 if grad is None else grad.flatten()[place].item())
    return torch.tensor(slopes)


def _transfer_curve(x: Tensor, values: Tensor, levels: Tensor, tensor: Tensor) -> TransferCurve:
    """Return the curve from x to the mean over evaluations.

    Args:
        x: n float values in ascending order, of shape (n,).
        values: quantized values in each evaluation, of shape (evaluations, n).
        levels: the levels that the quantizer declares.
        tensor: the float tensor whose histogram is drawn behind the curve.
    """
    band = (values.amin(0), values.amax(0)) if len(values) > 1 else None
    return TransferCurve(x, values.mean(0) if band else values[0], band, levels, tensor.flatten())


def _sorted(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    order = x.flatten().argsort(stable=True)
    return x.flatten()[order], values.flatten(1)[:, order]


def _evenly_spaced(x: Tensor) -> Tensor:
    """Return the indices of elements that are spread evenly over the range of the ascending values x."""
    wanted = torch.linspace(x[0].item(), x[-1].item(), PICKS)
    places: Tensor = torch.unique_consecutive(torch.searchsorted(x, wanted).clamp(max=len(x) - 1))
    return places
