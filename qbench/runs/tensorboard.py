"""Defines what TensorBoard shows about a run in addition to single curves.

TensorBoard shows a figure with the levels of each layer, charts of several curves, and a row in the table of
hyper-parameters.
"""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qbench.bits import Bits
from qbench.runs.tensorboard_tags import FINAL, QUANT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Columns = dict[str, bool | int | float | str]
"""A row of the table of hyper-parameters: values by name."""
Chart = list[str | list[str]]
"""A chart of the custom-scalars tab: the word "Multiline", and regular expressions that select tags."""

METRICS = tuple(FINAL.values())
"""Tags of the final metrics. Without a validation split, the columns of validation metrics are empty."""
FIRST = ("method", "w", "a", "g", "seed")
"""Columns that TensorBoard shows by default."""


def _chart(tag: str) -> Chart:
    return ["Multiline", [tag]]


def _layer_chart(tag: str) -> Chart:
    return _chart(f"{QUANT}{tag}")


STATISTICS = ("top", "dead", "entropy", "flips", "frozen", "clipped", "grad")
"""Names of a layer's statistics that are not parameters of the layer's quantizers."""
CHARTS: dict[str, dict[str, Chart]] = {
    "float and quantized": {
        "top-1 on training images, %": _chart("accuracy/train$"),
        "top-1 on validation images, %": _chart("accuracy/val$"),
        "training loss": _chart("loss/train$"),
        "validation loss": _chart("loss/val$"),
        "learning rate": _chart("optim/lr$"),
    },
    "layers: quantized against float": {
        "SQNR of outputs, dB": _layer_chart("sqnr/"),
        "cosine of outputs": _layer_chart("cosine/"),
    },
    "layers: levels": {
        "entropy of weights, bits": _layer_chart("w.entropy/"),
        "entropy of inputs, bits": _layer_chart("a.entropy/"),
        "unused levels of weights": _layer_chart("w.dead/"),
        "unused levels of inputs": _layer_chart("a.dead/"),
        "clipped inputs": _layer_chart("a.clipped/"),
        "largest level of weights": _layer_chart("w.top/"),
        "largest level of inputs": _layer_chart("a.top/"),
    },
    "layers: motion": {
        "weights whose level changed": _layer_chart("w.flips/"),
        "frozen weights": _layer_chart("w.frozen/"),
        "gradient of latent weights": _layer_chart("w.grad/"),
        "parameters of quantizers: steps, scales, clips": _layer_chart(rf"[wag][.](?!({'|'.join(STATISTICS)})/)\w+/"),
        "gradients of quantizers": _layer_chart("[wag][.].+[.]grad/"),
    },
}
"""Charts with the curves of all runs, including float baselines. Every run has the same charts."""


def columns(
    method: str, bits: Bits, model: str, dataset: str, seed: int, epochs: int, optimizer: str, lr: float
) -> Columns:
    """Return the row of a run in the table of hyper-parameters. Every run has the same columns."""
    return {
        "method": method, "w": bits.w, "a": bits.a, "g": bits.g, "model": model, "dataset": dataset, "seed": seed,
        "epochs": epochs, "optimizer": optimizer, "lr": lr,
    }  # fmt: skip


def levels_figure(weights: Mapping[str, tuple[Tensor, Tensor]]) -> "Figure | None":
    """Return a matplotlib figure with a panel per layer, or None without layers.

    Latent weights are drawn as a histogram. Quantized weights are drawn as lines at their levels.

    Args:
        weights: latent and quantized weights by layer.
    """
    if not weights:
        return None
    os.environ["MPLBACKEND"] = "agg"  # the import fails if MPLBACKEND names a backend that is not installed
    from matplotlib.figure import Figure

    columns = min(4, len(weights))
    rows = math.ceil(len(weights) / columns)
    height = 1.9 * rows + 0.4
    figure = Figure(
        figsize=(3 * columns, height)
    )  # no layout engine and no twin axes, because they take longer than a short run
    figure.subplots_adjust(0.5 / (3 * columns), 0.6 / height, 0.99, 1 - 0.3 / height, 0.14, 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, (name, (latent, quantized)) in zip(panels, weights.items(), strict=False):
        levels, counts = torch.unique(quantized.cpu(), return_counts=True)
        heights, edges = np.histogram(latent.detach().cpu().flatten().numpy(), bins=60)
        panel.stairs(heights / heights.max(), edges, fill=True, color="0.75")
        panel.vlines(levels.numpy(), 0, (counts / counts.sum()).numpy(), color="C0")
        panel.set_title(f"{name}: {len(levels)} levels", fontsize=8)
        panel.set(ylim=(0, 1), yticks=(0, 0.5, 1))
        panel.locator_params(axis="x", nbins=5)
        panel.tick_params(labelsize=6)
    for panel in panels[len(weights) :]:
        panel.set_axis_off()
    figure.supxlabel(
        "lines: share of weights at each level; grey: histogram of latent weights, scaled to a maximum of 1", fontsize=8
    )
    return figure
