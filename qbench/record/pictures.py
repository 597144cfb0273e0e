"""Pictures of a quantized network for TensorBoard: histograms of weights, and each layer's levels in one figure."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from qbench.quant.layers import effective_weight, quantized_layers
from qbench.quant.method import FLOAT


def weight_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the latent and the quantized weights of every layer whose weights are quantized, named for TensorBoard."""
    found = {}
    for name, layer in quantized_layers(model).items():
        if layer.bits.w < FLOAT:
            found[f"latent/{name}"] = layer.weight
            found[f"quantized/{name}"] = effective_weight(layer)
    return found


def levels_figure(model: torch.nn.Module) -> Any:
    """Return a matplotlib figure with a panel a layer: latent weights as a histogram, quantized ones as bars on their
    levels. None where no weights are quantized.
    """
    tensors: Mapping[str, torch.Tensor] = weight_tensors(model)
    names = [key.removeprefix("latent/") for key in tensors if key.startswith("latent/")]
    if not names:
        return None
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    for panel, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        latent = tensors[f"latent/{name}"].detach().cpu().flatten().numpy()
        levels, counts = torch.unique(tensors[f"quantized/{name}"].cpu(), return_counts=True)
        panel.hist(latent, bins=60, density=True, color="0.75", label="latent")
        twin = panel.twinx()
        twin.vlines(levels.numpy(), 0, (counts / counts.sum()).numpy(), color="C0", label="quantized")
        twin.set_ylim(0, 1)
        twin.tick_params(labelsize=6)
        panel.tick_params(labelsize=6)
        panel.set_yticks([])
        panel.set_title(f"{name}: {len(levels)} levels", fontsize=8)
    for panel in list(figure.axes)[len(names) : rows * columns]:
        panel.set_visible(False)
    figure.supylabel("share of quantized weights (lines); latent density (grey)", fontsize=8)
    return figure
