"""Builds a table of the quantized layers of a finished run.

The columns show levels, the signal-to-quantization-noise ratio (SQNR), clipping, dead channels, and how the accuracy
depends on a layer's quantizers.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from qbench.analysis.finished_run import (
    bn_notes,
    half_precision_note,
    load_finished_run,
    probe_batches,
    validation_batches,
)
from qbench.analysis.layer_ablation import LayerAblation, ablate_layers
from qbench.analysis.layer_signals import LayerSignal, layer_signals
from qbench.bits import Bits, LevelCount
from qbench.quant.layers import quantized_layers
from qbench.quant.sqnr import MAX_SQNR
from qbench.quant.verify import verify
from qbench.report.tables.table import Table

HEAD = (
    "layer", "bits", "levels w", "levels a", "SQNR", "fitted", "clipped %", "dead in", "dead out",
    "off: loss", "off: top-1", "only: loss", "only: top-1",
)  # fmt: skip
VERIFIED_IMAGES = 64
"""Levels are counted on this number of images, as at the end of a run."""


@dataclass(frozen=True)
class InspectedLayer:
    """One layer, shown as one row of the table.

    Args:
        layer: the layer's name.
        bits: the layer's widths.
        levels: for the tensors w and a, the number of levels found and the number of levels allowed.
        sqnr: the SQNR of the layer's output in dB, or None if the output is zero.
        fitted: the variance over the error after the best gain and offset of each channel, in dB.
        clipped: percentage of inputs beyond the outermost levels, or None if inputs are not quantized.
        dead_in: the number of constant input channels, and the number of all input channels.
        dead_out: the number of constant output channels, and the number of all output channels.
        off_loss, off_top1: change of loss and top-1 when only this layer is in float, relative to the network with all
            layers quantized.
        only_loss, only_top1: change of loss and top-1 when only this layer is quantized, relative to the network with
            all layers in float.
    """

    layer: str
    bits: Bits
    levels: dict[str, LevelCount]
    sqnr: float | None
    fitted: float | None
    clipped: float | None
    dead_in: tuple[int, int]
    dead_out: tuple[int, int]
    off_loss: float
    off_top1: float
    only_loss: float
    only_top1: float


SORTS: dict[str, Callable[[InspectedLayer], float]] = {
    "leave-one-out": lambda layer: layer.off_loss,
    "leave-one-in": lambda layer: -layer.only_loss,
    "sqnr": lambda layer: math.inf if layer.sqnr is None else layer.sqnr,
    "order": lambda layer: 0.0,
}


def inspect(
    run: Path, *, weights: str = "last", images: int = 500, bn_stats: str = "recompute", sort: str = "leave-one-out",
    device: str = "auto",
) -> Table:  # fmt: skip
    """Return the table of a finished run's quantized layers.

    Args:
        run: the directory of the run.
        weights: `last` or `best`, the checkpoint that is inspected.
        images: number of validation images on which the layers are measured.
        bn_stats: `recompute` recomputes batch normalization statistics whenever quantizers are disabled. `keep` keeps
            the stored statistics.
        sort: the order of the rows. `leave-one-out` sorts by the loss decrease when the layer's
            quantizers are disabled. `leave-one-in` sorts by the loss increase when only this layer
            is quantized. `sqnr` sorts by SQNR. With these three values, the worst layer comes first. `order` keeps the
            order of the layers in the network.
    """
    finished = load_finished_run(run, weights, device)
    setup, model = finished.setup, finished.model
    batches, images_note = validation_batches(setup, images)
    layers = quantized_layers(model)
    table = Table(HEAD, title=f"{run}, weights of {weights}.pt")
    if not layers:
        table.notes.append("this run quantizes nothing, so there are no layers to inspect")
        return table
    levels = verify(model, batches[0][0][:VERIFIED_IMAGES])
    signals = layer_signals(model, batches)
    training = probe_batches(setup) if bn_stats == "recompute" else []
    ablation = ablate_layers(model, batches, training)
    rows = [_inspected_layer(name, layer.bits, levels[name], signals[name], ablation) for name, layer in layers.items()]
    for row in sorted(rows, key=SORTS[sort]):
        table.rows.append(_cells(row))
        table.values.append(asdict(row) | {"bits": row.bits._asdict()})
    if "no_master" in setup.method.traits:
        table.notes.append(
            f"{setup.method.name} keeps no float weights, so the columns off: loss and off: top-1 are measured with "
            f"quantized weights"
        )
    table.notes += [
        f"{images_note}; quantizers of all layers {_accuracy_text('on', ablation)}; {_accuracy_text('off', ablation)}",
        *half_precision_note(finished, weights),
        *([f"warning: {finished.changed}"] if finished.changed else []),
        "off: loss or top-1 with only this layer in float (latent weights), minus the value with all layers quantized; "
        "only: loss or top-1 with only this layer quantized, minus the value with all layers in float",
        *bn_notes(model, training),
        f"levels: used and allowed levels on the first {min(VERIFIED_IMAGES, len(batches[0][0]))} of these images",
        f"SQNR: quantized output compared with float output for the same input, in dB, at most {MAX_SQNR:.0f}; "
        "fitted: as SQNR, but variance over the error after the best gain and offset per channel",
        "clipped: inputs beyond the outermost levels; dead: channels that are constant over these images",
    ]
    return table


def _accuracy_text(key: str, ablation: LayerAblation) -> str:
    accuracy = ablation.quantized if key == "on" else ablation.float_
    return f"{key}: loss {accuracy.loss:.4f}, top-1 {accuracy.top1:.2f} %"


def _inspected_layer(
    name: str, bits: Bits, levels: dict[str, LevelCount], signal: LayerSignal, ablation: LayerAblation
) -> InspectedLayer:
    without, alone = ablation.leave_one_out[name], ablation.leave_one_in[name]
    return InspectedLayer(
        layer=name,
        bits=bits,
        levels=levels,
        sqnr=signal.sqnr,
        fitted=signal.fitted_sqnr,
        clipped=None if signal.clipped is None else 100 * signal.clipped / signal.inputs,
        dead_in=signal.dead_channels("in"),
        dead_out=signal.dead_channels("out"),
        off_loss=without.loss - ablation.quantized.loss,
        off_top1=without.top1 - ablation.quantized.top1,
        only_loss=alone.loss - ablation.float_.loss,
        only_top1=alone.top1 - ablation.float_.top1,
    )


def _cells(row: InspectedLayer) -> tuple[str, ...]:
    counts = [f"{row.levels[k].found}/{row.levels[k].allowed}" if k in row.levels else "-" for k in "wa"]
    numbers = ["-" if x is None else f"{x:.1f}" for x in (row.sqnr, row.fitted, row.clipped)]
    dead = ["{}/{}".format(*pair) for pair in (row.dead_in, row.dead_out)]
    changes = [
        f"{row.off_loss:+.4f}", f"{row.off_top1:+.2f}", f"{row.only_loss:+.4f}", f"{row.only_top1:+.2f}"
    ]  # fmt: skip
    return (row.layer, str(row.bits), *counts, *numbers, *dead, *changes)
