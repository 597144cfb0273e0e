"""What each layer of a quantized network holds and costs, on a network without memory too."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.cost.count import storage
from qbench.quant.install import ImageQuantizer
from qbench.quant.layers import IdentityOutput, QLayer
from qbench.quant.method import Method
from qbench.quant.policy import quantizable
from qbench.quant.quantizer import Grid

WIDEST = 16
"""Channels of the small layer on which a quantizer is asked for its levels."""


class Levels(NamedTuple):
    """The values that a quantizer allows in one scale group.

    `number` of them; `dimension` above 1 is a product code's. `per` says what a group is: layer, channel, or so many
    values. `steps`: the largest multiple of one common step that a level is; None where they are not multiples of one,
    0 where that is not known before the method has seen data.
    """

    number: int
    dimension: int
    per: str
    steps: int | None


class LayerCost(NamedTuple):
    """A layer's name, weight shape, widths, quantizers by slot, levels of weights and inputs, and costs.

    `rescaled`: whether its output is changed in the forward pass too, by what is computed from its input.
    """

    name: str
    shape: tuple[int, ...]
    bits: Bits
    quantizers: dict[str, str]
    weights: Levels | None
    inputs: Levels | None
    rescaled: bool
    params: int
    macs: int
    bitops: int
    bytes_ideal: float
    bytes_packed: int


def layer_costs(model: nn.Module, method: Method, macs: dict[str, int]) -> list[LayerCost]:
    """Return every layer with a MAC count, in the order they run; what is left over is batch normalization."""
    layers: dict[str, Any] = quantizable(model)
    ask = cache(partial(_levels, method))
    return [_cost(name, layers[name], ask, macs[name]) for name in macs]


def _cost(name: str, layer: Any, ask: Callable[..., Levels | None], macs: int) -> LayerCost:
    bits = layer.bits if isinstance(layer, QLayer) else Bits()
    rest = 0 if layer.bias is None else layer.bias.numel()
    ideal: float = 4 * (layer.weight.numel() + rest)
    packed = int(ideal)
    if bits.w < FLOAT:
        stored = storage(layer)
        ideal, packed = stored.ideal + 4 * rest, stored.packed + 4 * rest
    sites = {"w": layer.weight_q, "a": layer.input_q, "g": layer.output_q} if isinstance(layer, QLayer) else {}
    return LayerCost(
        name, tuple(layer.weight.shape), bits,
        {slot: _title(site) for slot, site in sites.items() if hasattr(site, "grid")},
        ask("weight", _kind(layer), bits.w) if bits.w < FLOAT else None,
        _image(layer) or (ask("input", _kind(layer), bits.a) if "a" in sites and bits.a < FLOAT else None),
        bits.g == FLOAT and type(sites.get("g", IdentityOutput())) is not IdentityOutput,
        layer.weight.numel() + rest, macs, macs * bits.w * bits.a, ideal, packed,
    )  # fmt: skip


def _title(site: nn.Module) -> str:
    return f"{type(site).__module__.rpartition('.')[2]}.{type(site).__qualname__}"


def _image(layer: Any) -> Levels | None:
    site = getattr(layer, "input_q", None)
    return Levels(2**site.bits, 1, "channel", None) if isinstance(site, ImageQuantizer) else None


def _kind(layer: Any) -> tuple[int, ...]:
    """Return what sets apart layers whose quantizers are asked separately: class, a few channels, kernel."""
    out, inner, *kernel = layer.weight.shape
    return (min(out, WIDEST), min(inner, WIDEST), *kernel)


def _levels(method: Method, slot: str, shape: tuple[int, ...], bits: int) -> Levels | None:
    """Ask a quantizer in a small layer of random weights, for shapes alone do not tell the levels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: Any = nn.Linear(shape[1], shape[0])
        if len(shape) > 2:
            layer = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3])).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        value: Tensor = layer.weight.detach()
        if slot == "input":
            value = torch.rand(2, shape[1], *((4, 4) if len(shape) > 2 else ()))
        try:
            site = getattr(method, slot)("layer", layer, bits)
            with torch.no_grad():
                site(value)  # steps and ranges that start from the first batch
                return _read(site.grid(value), value)
        except (AttributeError, RuntimeError, ValueError):  # says no levels, or none before it has seen the network
            return None


def _read(grid: Grid, value: Tensor) -> Levels | None:
    groups, _, dimension = grid.points.shape
    first = grid.points[0]
    first = first[~first.isnan().any(1)].double()
    if not len(first):
        return None
    size = grid.arrange(value).shape[1] * dimension
    per = "layer" if groups == 1 else "channel" if groups == len(value) else f"{size} values"
    return Levels(len(first), dimension, per, _steps(first.flatten()) if dimension == 1 else None)


def _steps(points: Tensor) -> int | None:
    """Return the largest multiple of a common step in levels (L,), zero being one too; None without such a step."""
    apart = torch.cat([points.abs(), points.diff().abs()])
    if not bool((apart > 0).any()):
        return 0
    least = apart[apart > 0].min()
    for step in (least, least / 2):
        if torch.allclose(points / step, (points / step).round(), atol=1e-3):
            return int((points / step).abs().max().round())
    return None
