"""Is a network that calls itself quantized really quantized? Counted where it computes, not where it is declared."""

from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.method import FLOAT, Grid, quietly, recorded_calls

TOLERANCE = 1e-5
"""Largest distance from a level, relative to the group's largest level: float32 rounding, and no more."""


class NotQuantized(Exception):
    """Values that a quantizer produced lie off its declared grid."""


def verify(model: nn.Module, images: Tensor) -> dict[str, dict[str, dict[str, int]]]:
    """Count levels in every quantized layer during one forward pass, and of its gradients.

    Returns:
        layer -> w, a, g (those quantized) -> levels `found` in the fullest scale group, and levels `allowed` there.

    Raises:
        NotQuantized: some value is off its grid, or a quantizer declares none; the message names layer and tensor.
    """
    layers = quantized_layers(model)
    sites = [f"{name}.{slot}" for name in layers for slot in ("input_q", "weight_q")]
    with quietly(model), torch.no_grad(), recorded_calls(model, sites) as calls:
        model(images)
    passed = {site: (x, y) for site, x, y in calls}
    return {name: _verify_layer(name, layer, passed) for name, layer in layers.items()}


def _verify_layer(name: str, layer: QLayer, passed: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, int]]:
    found = {}
    if layer.bits.w < FLOAT:
        found["w"] = _count(f"{name}: weights", layer.weight_q, *passed[f"{name}.weight_q"])
    if layer.bits.a < FLOAT:
        found["a"] = _count(f"{name}: activations", layer.input_q, *passed[f"{name}.input_q"])
    if layer.bits.g < FLOAT:
        found["g"] = _count(f"{name}: gradients", layer.output_q, *_gradient_through(layer.output_q))
    return found


def _gradient_through(site: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a gradient of four samples and what the output quantizer makes of it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(4, 64, requires_grad=True)
    arriving = torch.randn(4, 64, generator=generator)
    with quietly(site), torch.enable_grad():
        leaving = torch.autograd.grad(site(y, y.detach()), y, arriving)[0]
    return arriving, leaving


def _count(what: str, site: Any, before: Tensor, after: Tensor) -> dict[str, int]:
    if not hasattr(site, "grid"):
        raise NotQuantized(f"{what}: {type(site).__name__} declares no grid")
    with torch.no_grad():
        grid: Grid = site.grid(before)
        index, distance = nearest_points(grid.arrange(after), grid.points)
    scale = grid.points.abs().nan_to_num(0).amax().clamp(min=torch.finfo(after.dtype).tiny)
    off = ~(distance <= TOLERANCE * scale)  # true for NaN too
    if off.any():
        raise NotQuantized(
            f"{what}: {int(off.sum())} of {off.numel()} values lie off the {grid.points.shape[1]} levels"
        )
    used = torch.zeros(grid.points.shape[:2], dtype=torch.bool, device=index.device).scatter_(1, index, True)
    allowed = ~grid.points[..., 0].isnan()
    return {"found": int(used.sum(1).max()), "allowed": int(allowed.sum(1).max())}


def nearest_points(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return for values (G, n, D) the index (G, n) of the nearest of points (G, L, D), and its distance (G, n)."""
    if values.shape[-1] > 1:
        distance, index = torch.cdist(values, points.nan_to_num(nan=float("inf"))).min(-1)
        return index, distance
    line, sought = points[..., 0].nan_to_num(nan=float("inf")).contiguous(), values[..., 0].contiguous()
    right = torch.searchsorted(line, sought).clamp(max=line.shape[1] - 1)
    left = (right - 1).clamp(min=0)
    to_left, to_right = (sought - line.gather(1, left)).abs(), (line.gather(1, right) - sought).abs()
    return torch.where(to_left < to_right, left, right), torch.minimum(to_left, to_right)
