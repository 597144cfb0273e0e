"""What a method does to single values, read from its own quantizers: put into a small layer, run, differentiated.

Nothing here knows a formula. Weights are the quantiles of N(0, 1) in a seeded order, inputs are what such a layer
reads, and each quantizer is asked for its value and derivative; what depends on a whole tensor depends on this one.
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
from qbench.report.quantizer_plots.probe_network import VALUES, ProbeLayer, installed, normal_values, prepared
from qbench.report.quantizer_plots.readings import DRAWS, FEW, Codewords, QuantizerCurves, TransferCurve

PICKS = 512
"""Values at which derivatives are taken."""
HALVINGS, SHARP = 24, 64
"""Of the distance of neighbours around a jump, and how many jumps at most are found so sharply."""
GRADIENT = 0.01
"""Standard deviation of the gradient that arrives behind a layer."""

Run = Callable[[nn.Module], Tensor]


def read(method: Method) -> list[QuantizerCurves | Codewords]:
    """Return what a method does to all that it quantizes, before training; of one that quantizes nothing, to weights.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: list[QuantizerCurves | Codewords] = []
        if method.bits.w < FLOAT or method.bits == Bits():
            found += _weights(method)
        if method.bits.a < FLOAT:
            found.append(_inputs(method))
        if method.bits.g < FLOAT:
            found.append(_outputs(method))
        return found


def _weights(method: Method) -> list[QuantizerCurves | Codewords]:
    subject = installed(method, 1, VALUES)
    if (size := _dimension(subject.layer)) > 1:
        return [_codewords(method, installed(method, VALUES // size, size))]
    before = subject.layer.weight.detach().clone()
    states = prepared(method, subject)
    if "no_master" in method.traits:
        return [_stored(method, subject, before)]
    w, bits = subject.layer.weight.detach(), method.bits.w
    return [replace(_reading("weights", bits, site, w, w, w), when=when) for when, site in states]


def _reading(what: str, bits: int, site: Quantizer, x: Tensor, like: Tensor, tensor: Tensor) -> QuantizerCurves:
    """Read a quantizer of weights or inputs at x, whose first scale group, as in `like`, is kept."""
    places, levels = _group(site, like)
    places = places if x is like else torch.arange(x.numel())
    places = places[x.flatten()[places].argsort(stable=True)]
    forward = _map(x.flatten()[places], _drawn(site, lambda own: own(x)).flatten(1)[:, places], levels, tensor)
    picks = _evenly(forward.x)
    slope = _slopes(site, x, places[picks])
    frozen = site.frozen.flatten()[places] if isinstance(site, FrozenWeight) and not site.complete else None
    notes = [f"one group of {len(places)}"] if len(places) < x.numel() else []
    scalars = [f"{name} {p.item():.3g}" for name, p in site.named_parameters() if p.dim() == 0]
    notes += [f"starts at {', '.join(scalars)}"] if scalars else []
    notes += [f"learned: {name}" for name, p in site.named_parameters() if p.dim() > 0]
    return QuantizerCurves(what, bits, forward, picks, slope, frozen=frozen, notes=tuple(notes))


def _stored(method: Method, subject: ProbeLayer, x: Tensor) -> QuantizerCurves:
    """Read weights behind which no float ones stand: x is an update, made from zero by the method's own step."""

    def updated(model: nn.Module) -> Tensor:
        weight = model.get_parameter("middle.weight")
        weight.data.zero_()
        weight.grad = -x
        step = method.step or (lambda model, optimizer: optimizer.step())
        step(model, torch.optim.SGD([weight], lr=1.0))
        return weight.detach()

    now = _reading("weights", method.bits.w, subject.layer.weight_q, x, x, x)
    forward = _map(*_sorted(x, _drawn(subject.model, updated)), now.forward.levels, x)
    return replace(now, forward=forward, notes=("drawn: an update by w, from 0",))


def _inputs(method: Method) -> QuantizerCurves:
    subject = installed(method, 1, VALUES)
    columns = VALUES
    if (size := _dimension(subject.layer)) > 1:
        subject, columns = installed(method, VALUES // size, size), size
    prepared(method, subject)
    site, behind = subject.layer.input_q, subject.layer.output_q
    tensor = subject.model.read_by_middle(subject.images)
    _, levels = _group(site, tensor)
    ends = tensor.flatten().sort().values[[tensor.numel() // 1000, -1 - tensor.numel() // 1000]]
    low, high = (end.item() for end in torch.cat([ends, levels] if len(levels) <= FEW else [ends]).aminmax())
    margin = (high - low) / 5
    x = torch.linspace(low - margin, high + margin, VALUES).reshape(-1, columns, 1, 1)
    found = _reading("inputs", method.bits.a, site, x, tensor, tensor)
    found = replace(found, forward=_sharpened(found.forward, site, x.shape))
    shown = method.bits.g < FLOAT or isinstance(behind, IdentityQuantizer)
    return found if shown else replace(found, notes=(*found.notes, f"behind the layer: {type(behind).__name__}"))


def _sharpened(drawn: TransferCurve, site: nn.Module, shape: torch.Size) -> TransferCurve:
    """Move the two points beside every jump of a staircase together, to where it is; element by element alike."""
    jumps = drawn.jumps
    if not 0 < len(jumps) <= SHARP:
        return drawn
    low, high, own = drawn.x[jumps], drawn.x[jumps + 1], copy.deepcopy(site).eval()
    for _ in range(HALVINGS):
        middle = drawn.x.clone()
        middle[jumps] = (low + high) / 2
        below = own(middle.reshape(shape)).detach().flatten()[jumps] == drawn.y[jumps]
        low, high = torch.where(below, middle[jumps], low), torch.where(below, high, middle[jumps])
    x = drawn.x.clone()
    x[jumps], x[jumps + 1] = low, high
    return drawn._replace(x=x)


def _outputs(method: Method) -> QuantizerCurves:
    """Read what stands behind a layer at one sample's outputs and their gradients."""
    subject = installed(method, VALUES, 2)
    prepared(method, subject)
    site, x = subject.layer.output_q, torch.ones(1, 2, 1, 1)
    y = normal_values(VALUES).reshape(1, -1, 1, 1)
    d = GRADIENT * normal_values(VALUES).reshape(y.shape)

    def back(own: nn.Module) -> Tensor:
        at = y.clone().requires_grad_()
        return torch.autograd.grad(own(at, x), at, d)[0]

    forward = _map(*_sorted(y, _drawn(site, lambda own: own(y, x))), y.new_zeros(0), y)
    backward = _map(*_sorted(d, _drawn(site, back)), _group(site, d)[1], d)
    return QuantizerCurves("outputs", method.bits.g, forward, _evenly(forward.x), backward=backward)


def _codewords(method: Method, subject: ProbeLayer) -> Codewords:
    prepared(method, subject)
    layer = subject.layer
    w = layer.weight.detach()
    grid = layer.weight_q.grid(w)
    assert grid is not None  # its levels are vectors
    points = grid.points[0]
    decoded = layer.weight_q(w).detach()
    fixed = not layer.weight_q(layer.weight).requires_grad
    return Codewords(method.bits.w, w.flatten(1), decoded.flatten(1), points[points.isfinite().all(1)], fixed)


def _dimension(layer: QConv2d) -> int:
    """Return how many weights a level of the layer stands for."""
    grid = layer.weight_q.grid(layer.weight.detach())
    return 1 if grid is None else int(grid.points.shape[-1])


def _group(site: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places, in the flattened tensor, of the first scale group's elements, and its levels, ascending."""
    places = torch.arange(like.numel())
    if (grid := site.grid(like)) is None:
        return places, like.new_zeros(0)
    own = grid.arrange(places.reshape(like.shape).double())[0, :, 0].long()
    levels = grid.points.detach()[0, :, 0]
    return torch.unique(own), torch.unique(levels[levels.isfinite()])


def _drawn(module: nn.Module, run: Run) -> Tensor:
    """Return what `run` makes of a module, (draws, ...): in training many where it draws, else one in evaluation."""

    def once() -> Tensor:
        return run(copy.deepcopy(module).train()).detach()

    first, second = once(), once()
    if torch.equal(first, second):
        return run(copy.deepcopy(module).eval()).detach()[None]
    return torch.stack([first, second, *(once() for _ in range(DRAWS - 2))])


def _slopes(site: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Return the derivatives of single elements of a quantizer's value by themselves: the Jacobian's diagonal."""
    x = x.detach().clone().requires_grad_()
    y = copy.deepcopy(site).eval()(x)
    if not y.requires_grad:
        return torch.zeros(len(places))
    found = []
    for place in places.tolist():
        (grad,) = torch.autograd.grad(y.flatten()[place], x, retain_graph=True, allow_unused=True)
        found.append(0.0 if grad is None else grad.flatten()[place].item())
    return torch.tensor(found)


def _map(x: Tensor, made: Tensor, levels: Tensor, tensor: Tensor) -> TransferCurve:
    """Return the map from x (n,), ascending, to the draws (draws, n)."""
    band = (made.amin(0), made.amax(0)) if len(made) > 1 else None
    return TransferCurve(x, made.mean(0) if band else made[0], band, levels, tensor.flatten())


def _sorted(x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    order = x.flatten().argsort(stable=True)
    return x.flatten()[order], made.flatten(1)[:, order]


def _evenly(x: Tensor) -> Tensor:
    """Return the places of some values, spread evenly over the range of x (n,), ascending."""
    wanted = torch.linspace(x[0].item(), x[-1].item(), PICKS)
    places: Tensor = torch.unique_consecutive(torch.searchsorted(x, wanted).clamp(max=len(x) - 1))
    return places
