"""What each layer of a finished run holds, loses, and costs the network: one table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.analysis.disabled_quantizers import measured, quantizers_disabled
from qbench.analysis.finished_run import load_finished_run, probe_batches, said_of_norms, validation
from qbench.bits import FLOAT, Bits, LevelCount
from qbench.quant.graph import recorded_calls
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.probe import Batch
from qbench.quant.quantizer import Grid
from qbench.quant.verify import verify
from qbench.report.tables.table import Table
from qbench.runs.result import Accuracy

# Shapes: n values of a channel, C channels.

HEAD = (
    "layer", "bits", "levels w", "levels a", "SQNR", "fitted", "clipped %", "dead in", "dead out",
    "off: loss", "off: top-1", "only: loss", "only: top-1",
)  # fmt: skip
CEILING = 120.0
"""dB; what is above is float32's rounding."""
EXACT = 1e-6
"""How far beyond the outermost level, relative to the largest, a value counts as on it."""
VERIFIED = 64
"""Images on which levels are counted, as at the end of a run."""


@dataclass
class Signal:
    """What passes a layer: sums over images for its float output y and its quantized one y_hat, per channel (C,)."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)
    clipped: int | None = None
    inputs: int = 0

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        """Add outputs (n, C) of a batch."""
        y, y_hat = y.double(), y_hat.double()
        parts = {"y": y, "z": y_hat, "yy": y * y, "zz": y_hat * y_hat, "yz": y * y_hat, "noise": (y - y_hat) ** 2}
        self.sums = {key: self.sums.get(key, 0) + part.sum(0) for key, part in parts.items()}
        self.count += len(y)

    def extend(self, slot: str, values: Tensor) -> None:
        """Widen the range that each channel of values (n, C) has shown."""
        low, high = values.amin(0), values.amax(0)
        self.low[slot] = torch.minimum(self.low.get(slot, low), low)
        self.high[slot] = torch.maximum(self.high.get(slot, high), high)

    def dead(self, slot: str) -> tuple[int, int]:
        """Return how many channels were constant over all images and places, and how many there are."""
        return int((self.low[slot] == self.high[slot]).sum()), self.low[slot].numel()

    @property
    def sqnr(self) -> float | None:
        """Power of y over that of y - y_hat, in dB; None for an output of zeros."""
        return _decibel(self.sums["yy"].sum().item(), self.sums["noise"].sum().item())

    @property
    def fitted(self) -> float | None:
        """The same with the best gain and offset of y_hat for every channel, that normalization behind would undo."""
        y, z, yy, zz, yz = (self.sums[key] / self.count for key in ("y", "z", "yy", "zz", "yz"))
        variance, shared, own = yy - y * y, yz - y * z, zz - z * z
        explained = torch.where(own > EXACT**2 * zz, shared * shared / own, 0.0)
        return _decibel(variance.sum().item(), (variance - explained).clamp(min=0).sum().item())


def _decibel(signal: float, noise: float) -> float | None:
    if signal <= 0:
        return None
    return min(CEILING, 10 * math.log10(signal / noise)) if noise > 0 else CEILING


@torch.inference_mode()
def signals(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Signal]:
    """Return what passes the quantized layers of a network in eval mode; float is as `quantizers_disabled` makes it,
    on equal input.
    """
    layers = quantized_layers(model)
    found = {name: Signal() for name in layers}
    for images, _ in batches:
        with recorded_calls(model, list(layers)) as calls:
            model(images)
        for name, x, _ in calls:  # not the output, which an activation behind it may have changed in place
            _pass(layers[name], x, found[name], model)
    return found


def _pass(layer: QLayer, x: Tensor, signal: Signal, model: nn.Module) -> None:
    y_hat = layer(x)
    with quantizers_disabled(model, [layer.label]):
        y = layer(x)
    signal.add(_channels_last(layer, y), _channels_last(layer, y_hat))
    signal.extend("out", _channels_last(layer, y_hat))
    signal.extend("in", _channels_last(layer, layer.input_q(x)))
    if layer.bits.a < FLOAT and (grid := layer.input_q.grid(x)) is not None:
        signal.clipped = (signal.clipped or 0) + _beyond(grid, x)
        signal.inputs += x.numel()


def _channels_last(layer: QLayer, x: Tensor) -> Tensor:
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)


def _beyond(grid: Grid, x: Tensor) -> int:
    """Count the values beyond the outermost levels; below a lowest level of 0 they are rectified, not clipped."""
    points = grid.points[..., 0]
    slack = EXACT * points.abs().nan_to_num(0).amax(1, keepdim=True)
    low = points.nan_to_num(torch.inf).amin(1, keepdim=True)
    high = points.nan_to_num(-torch.inf).amax(1, keepdim=True)
    values = grid.arrange(x)[..., 0]
    return int((values > high + slack).sum() + ((values < low - slack) & (low < 0)).sum())


def switched(
    model: nn.Module, batches: Sequence[Batch], norms: Sequence[Batch] = ()
) -> tuple[dict[str, Accuracy], dict[str, tuple[Accuracy, Accuracy]]]:
    """Return metrics with all layers `on` and all `quantizers_disabled`, and of every layer with it alone off and it
    alone on.

    Args:
        norms: see `measured`.
    """
    names = list(quantized_layers(model))

    def without(*layers: str) -> Accuracy:
        with quantizers_disabled(model, layers):
            return measured(model, batches, norms)

    single = {name: (without(name), without(*(other for other in names if other != name))) for name in names}
    return {"on": without(), "off": without(*names)}, single


def inspect(
    run: Path, *, weights: str = "last", images: int = 500, bn_stats: str = "recompute", sort: str = "leave-one-out",
    device: str = "auto",
) -> Table:  # fmt: skip
    """Return the table of a finished run's quantized layers.

    Args:
        images: the first so many of the validation split are measured on.
        bn_stats: `recompute` the statistics of batch normalization for every change, or `keep` them.
        sort: leave-one-out (loss gained by switching the layer off), leave-one-in (loss lost to it alone), sqnr,
        each worst first;
            or order.
    """
    found = load_finished_run(run, weights, device)
    batches, said = validation(found.parts, images)
    layers = quantized_layers(found.model)
    table = Table(HEAD, title=f"{run}, weights of {weights}.pt")
    if not layers:
        table.notes.append("nothing is quantized")
        return table
    levels = verify(found.model, batches[0][0][:VERIFIED])
    passed = signals(found.model, batches)
    whole, single = switched(found.model, batches, probe_batches(found.parts) if bn_stats == "recompute" else ())
    rows = [
        _values(name, layer.bits, levels[name], passed[name], whole, single[name]) for name, layer in layers.items()
    ]
    for values in sorted(rows, key=SORTS[sort]):
        table.rows.append(_row(values))
        table.values.append(values)
    if "no_master" in found.parts.method.traits:
        table.notes.append(f"{found.parts.method.name} keeps no float weights: off computes on those that are stored")
    told = [f"{word}: loss {m.loss:.4f}, top-1 {m.top1:.2f} %" for word, m in whole.items()]
    table.notes += [
        f"{said}; all layers {'; '.join(told)}",
        "off: the change where this layer alone computes as float on its latent weights, against all on; "
        "only: where it alone is quantized, against all off",
        f"normalization, where layers are switched: {said_of_norms(bn_stats == 'recompute')}",
        f"SQNR in dB, of the layer's output on equal input, {CEILING:.0f} at most; fitted: up to a gain and an offset "
        "per channel",
        "clipped: inputs beyond the outermost levels; dead: channels that are constant over these images",
    ]
    return table


SORTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "leave-one-out": lambda values: values["off_loss"],
    "leave-one-in": lambda values: -values["only_loss"],
    "sqnr": lambda values: math.inf if values["sqnr"] is None else values["sqnr"],
    "order": lambda values: 0.0,
}


def _values(
    name: str,
    bits: Bits,
    levels: dict[str, LevelCount],
    signal: Signal,
    whole: dict[str, Accuracy],
    single: tuple[Accuracy, Accuracy],
) -> dict[str, Any]:
    (without, alone), share = single, None
    if signal.clipped is not None:
        share = 100 * signal.clipped / signal.inputs
    return {
        "layer": name, "bits": bits._asdict(), "levels": {k: asdict(count) for k, count in levels.items()}, "sqnr":
        signal.sqnr, "fitted": signal.fitted,
        "clipped": share, "dead_in": signal.dead("in"), "dead_out": signal.dead("out"),
        "off_loss": without.loss - whole["on"].loss, "off_top1": without.top1 - whole["on"].top1,
        "only_loss": alone.loss - whole["off"].loss, "only_top1": alone.top1 - whole["off"].top1,
    }  # fmt: skip


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    levels: dict[str, dict[str, int]] = values["levels"]
    counts = [f"{levels[k]['found']}/{levels[k]['allowed']}" if k in levels else "-" for k in "wa"]
    figures = ["-" if x is None else f"{x:.1f}" for x in (values["sqnr"], values["fitted"], values["clipped"])]
    dead = ["{}/{}".format(*values[key]) for key in ("dead_in", "dead_out")]
    changes = []
    for what in ("off", "only"):
        changes += [f"{values[f'{what}_loss']:+.4f}", f"{values[f'{what}_top1']:+.2f}"]
    return (values["layer"], str(Bits(**values["bits"])), *counts, *figures, *dead, *changes)
