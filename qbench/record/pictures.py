"""Pictures of a quantized network for TensorBoard: histograms of weights, and each layer's levels in one figure."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
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
    """Return a matplotlib figure with a panel a layer: latent weights as a histogram, quantized ones as lines on their
    levels. None where no weights are quantized.
    """
    tensors: Mapping[str, torch.Tensor] = weight_tensors(model)
    names = [key.removeprefix("latent/") for key in tensors if key.startswith("latent/")]
    if not names:
        return None
    os.environ["MPLBACKEND"] = "agg"  # a backend that is set but not there would end the import
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    height = 1.9 * rows + 0.4
    figure = Figure(figsize=(3 * columns, height))  # a layout engine and twin axes would cost more than a short run
    figure.subplots_adjust(0.5 / (3 * columns), 0.6 / height, 0.99, 1 - 0.3 / height, 0.14, 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, name in zip(panels, names, strict=False):
        latent = tensors[f"latent/{name}"].detach().cpu().flatten().numpy()
        levels, counts = torch.unique(tensors[f"quantized/{name}"].cpu(), return_counts=True)
        heights, edges = np.histogram(latent, bins=60)
        panel.stairs(heights / heights.max(), edges, fill=True, color="0.75")
        panel.vlines(levels.numpy(), 0, (counts / counts.sum()).numpy(), color="C0")
        panel.set_title(f"{name}: {len(levels)} levels", fontsize=8)
        panel.set(ylim=(0, 1), yticks=(0, 0.5, 1))
        panel.locator_params(axis="x", nbins=5)
        panel.tick_params(labelsize=6)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel("lines: share of the quantized weights; grey: latent weights, the tallest bar 1", fontsize=8)
    return figure
