"""Is a network that calls itself quantized really quantized? Counted where it computes, not where it is declared."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, LevelCount
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.quantizer import Grid

ROUNDING = 4e-7
"""Largest distance from a level, relative to the scale group's largest level, that is float32's doing."""

LOOSE, OF_A_STEP = 1e-5, 0.05
"""A method's own arithmetic may add up to 1e-5 of that level, as long as it is less than 0.05 of the nearest step."""


class NotQuantized(Exception):
    """Values that a quantizer produced lie off its declared grid."""


def verify(model: nn.Module, images: Tensor) -> dict[str, dict[str, LevelCount]]:
    """Count levels in every quantized layer during one forward pass, and of its gradients in the backward pass.

    Returns:
        layer -> w, a, g (those quantized) -> the levels found in the fullest scale group and those allowed there.

    Raises:
        NotQuantized: some value is off its grid, or a quantizer declares none; the message names layer and tensor.
    """
    layers = quantized_layers(model)
    sites = [f"{name}.{slot}" for name in layers for slot in ("input_q", "weight_q", "output_q")]
    with eval_mode_keeping_rng(model), torch.enable_grad(), recorded_calls(model, sites) as calls:
        logits = model(images)
        passed = {site: (x, y) for site, x, y in calls}
        gradients = [f"{name}.output_q" for name, layer in layers.items() if layer.bits.g < FLOAT]
        if gradients:
            loss = F.cross_entropy(logits, (logits.detach().argmax(1) + 1) % logits.shape[1])
            wanted = [t for site in gradients for t in (passed[site][1], passed[site][0])]  # arriving, leaving
            found = iter(torch.autograd.grad(loss, wanted))
            passed |= {site: (next(found), next(found)) for site in gradients}
    return {name: _verify_layer(name, layer, passed) for name, layer in layers.items()}


def _verify_layer(name: str, layer: QLayer, passed: dict[str, tuple[Tensor, Tensor]]) -> dict[str, LevelCount]:
    found = {}
    kinds = (("w", "weights", "weight_q"), ("a", "activations", "input_q"), ("g", "gradients", "output_q"))
    for key, what, slot in kinds:
        if getattr(layer.bits, key) < FLOAT:
            found[key] = _count(f"{name}: {what}", getattr(layer, slot), *passed[f"{name}.{slot}"])
    return found


def _count(what: str, site: Any, before: Tensor, after: Tensor) -> LevelCount:
    if not hasattr(site, "grid"):
        raise NotQuantized(f"{what}: {type(site).__name__} declares no grid")
    with torch.no_grad():
        before, after = before.detach(), after.detach()
        grid: Grid = site.grid(before)
        if not grid.points.shape[1]:
            raise NotQuantized(f"{what}: its grid has no levels")
        index, distance = nearest_points(grid.arrange(after), grid.points)
    off = ~(distance <= _tolerance(grid.points))  # true for NaN too
    if off.any():
        raise NotQuantized(
            f"{what}: {int(off.sum())} of {off.numel()} values lie off the {grid.points.shape[1]} levels"
        )
    used = torch.zeros(grid.points.shape[:2], dtype=torch.bool, device=index.device).scatter_(1, index, True)
    allowed = ~grid.points[..., 0].isnan()
    return LevelCount(found=int(used.sum(1).max()), allowed=int(allowed.sum(1).max()))


def _tolerance(points: Tensor) -> Tensor:
    """Return for points (G, L, D) how far from a level a value of each group may lie, (G, 1)."""
    scale = points.abs().nan_to_num(0).amax((1, 2)).clamp(min=torch.finfo(points.dtype).tiny)
    steps = (points[:, 1:] - points[:, :-1]).norm(dim=-1).nan_to_num(torch.inf)
    step = torch.where(steps > 0, steps, torch.inf).amin(1) if steps.shape[1] else torch.full_like(scale, torch.inf)
    return torch.maximum(ROUNDING * scale, torch.minimum(LOOSE * scale, OF_A_STEP * step)).unsqueeze(1)


def nearest_points(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return for values (G, n, D) the index (G, n) of the nearest of points (G, L, D), and its distance (G, n)."""
    if values.shape[-1] > 1:
        exactly = "donot_use_mm_for_euclid_dist"  # a matrix product loses half of the digits
        pairs = zip(values, points.nan_to_num(nan=float("inf")), strict=True)  # one by one: all together take gigabytes
        found = [torch.cdist(value, point, compute_mode=exactly).min(-1) for value, point in pairs]
        distance, index = (torch.stack(each) for each in zip(*found, strict=True))
        return index, distance
    line, sought = points[..., 0].nan_to_num(nan=float("inf")).contiguous(), values[..., 0].contiguous()
    right = torch.searchsorted(line, sought).clamp(max=line.shape[1] - 1)
    left = (right - 1).clamp(min=0)
    to_left, to_right = (sought - line.gather(1, left)).abs(), (line.gather(1, right) - sought).abs()
    return torch.where(to_left < to_right, left, right), torch.minimum(to_left, to_right)
