"""What TensorBoard shows of a run beside its curves: each layer's levels in one figure, charts of several curves, and
the columns of its hyper-parameters' table.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qbench.bits import FLOAT
from qbench.config.schema import Config
from qbench.quant.layers import effective_weight, quantized_layers

METRICS = tuple(f"{split}_{key}" for split in ("val", "test") for key in ("top1", "top5", "loss"))
"""Final figures; a run that validates on nothing has no `val_` ones, and the same columns."""
FIRST = ("method", "w", "a", "g", "seed")
"""The columns that TensorBoard shows before one asks for more."""


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


TOLD = ("top", "dead", "entropy", "flips", "frozen", "clipped", "grad")
CHARTS = {
    "float and quantized": {
        "top-1 on training images, %": _chart("epoch/train_top1$"),
        "top-1 on validation images, %": _chart("epoch/val_top1$"),
        "training loss": _chart("epoch/train_loss$"),
        "validation loss": _chart("epoch/val_loss$"),
        "learning rate": _chart("epoch/lr$"),
    },
    "layers: quantized against float": {
        "signal over error of outputs, dB": _chart("sqnr/"),
        "cosine of outputs": _chart("cosine/"),
    },
    "layers: levels": {
        "entropy of weights, bits": _chart("w.entropy/"),
        "entropy of inputs, bits": _chart("a.entropy/"),
        "dead levels of weights": _chart("w.dead/"),
        "dead levels of inputs": _chart("a.dead/"),
        "clipped inputs": _chart("a.clipped/"),
        "largest level of weights": _chart("w.top/"),
        "largest level of inputs": _chart("a.top/"),
    },
    "layers: motion": {
        "weights on another level than before": _chart("w.flips/"),
        "frozen weights": _chart("w.frozen/"),
        "gradient of latent weights": _chart("w.grad/"),
        "numbers of quantizers: steps, scales, clips": _chart(rf"[wag][.](?!({'|'.join(TOLD)})/)\w+/"),
        "gradients of quantizers": _chart("[wag][.].+[.]grad/"),
    },
}
"""Charts that hold all runs, and so the float parent's curve beside the quantized one's. The same for every run."""


def columns(config: Config) -> dict[str, bool | int | float | str]:
    """Return what the table of hyper-parameters tells of a run: the same names for every run."""
    bits = config.bits
    return {
        "method": config.method_name, "w": bits.w or FLOAT, "a": bits.a or FLOAT, "g": bits.g or FLOAT,
        "model": str(config.model["name"]), "dataset": str(config.dataset["name"]), "seed": config.seed,
        "epochs": config.epochs, "optimizer": config.optim.name, "lr": config.optim.lr,
    }  # fmt: skip


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
