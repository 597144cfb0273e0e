"""MLQ: ternary weights, the outer clusters before the middle one, layer after layer by measured loss.

Paper
    Xu, Wang, Zhou, Lin, Xiong, "Deep Neural Network Compression with Single and Multiple Level Quantization", AAAI
    2018, arXiv 1803.03289. Authors' code: yuhuixu1993/SLQ, where MLQ is an editor's backup file, its order of layers
    written by hand.

Idea
    With three clusters a layer there is little left to retrain within it. So partition over depth too: layers that cost
    most are quantized first, and layers that are still free make up for it.

Forward
    Per layer k = 2^(b-1) + 1 clusters by one-dimensional k-means. A layer is float; then its boundary clusters are
    shared at their centroids while the zero cluster is trained; then all weights are clustered anew with the frozen
    centroids held fast, and the zero cluster is shared too.

Backward
    dL/dw of free weights; none of frozen ones.

Schedule
    One phase for each group of clusters, boundary and zero, of equal length: in its first half the layers are advanced,
    as evenly as epochs allow; in its second half all that is free trains on. The learning rate starts anew and
    momentum is cleared where a phase starts, not at each layer. Whenever layers are due, the network's loss on the
    probe is measured for each layer left, with this layer's next clusters alone shared; the largest are advanced.

Sites
    weight.

State
    frozen, value, centroids, settled: as in SLQ; turn (int, one a group of clusters): when this layer's came, counted
    over all layers, 0 for not yet; loss (float64, one a group): what was measured for it then, NaN for nothing.

Bits
    w 2 (three values), 3 (five), 4 (nine) or 32; a and g 32; by default w2a32g32.

Protocol
    CIFAR-10, ResNet-20 and ImageNet networks; at least 18 iterations by the authors' file names, their rates unknown.

Choices
    zero: `mean` (the authors' code) shares the zero cluster at its mean, and neither is it 0 nor are the boundaries
    symmetric; `pinned` keeps a centroid at 0.
    All layers have boundaries before any has its zero cluster: our reading of "boundary before zero", the sources have
    states of single layers only. Layers that are left are measured anew each time.
    3 and 4 bits, five and nine clusters, our reading throughout: the outermost two, then the next two inwards, and so
    on to the middle one.
    depth: `false` is the ablation, all layers at once where a phase starts; nothing is measured.

Deviations
    k-means is exact, where the authors take ten Lloyd iterations from powers of two.
    First and last layer stay float by the layer policy; the authors' code quantizes the first, and the last but in
    ResNet-18 (layers.first=same layers.last=same).

Results
    README (digits).
"""

from math import ceil

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods import slq
from qbench.methods.slq import Clusters, loss_when_frozen
from qbench.quant.layers import FloatLayer, quantized_layers
from qbench.quant.masks import stage, stage_borders
from qbench.quant.method import Method, Unsupported
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Quantizer

GROUPS = {
    2: ("boundary", "zero"),
    3: ("outer", "inner", "zero"),
    4: ("outer", "second", "third", "inner", "zero"),
}
PINNED: dict[str, tuple[float, ...]] = {"mean": (), "pinned": (0.0,)}
ADVANCING = 0.5


class MLQWeight(slq.SLQWeight):
    """A layer's weights: float, then with boundary clusters shared, then all shared."""

    turn: Tensor
    loss: Tensor

    def __init__(self, weight: Tensor, bits: int, pinned: tuple[float, ...] = ()) -> None:
        super().__init__(weight, bits, pinned)
        self.register_buffer("turn", torch.zeros(len(GROUPS[bits]), dtype=torch.long))
        self.register_buffer("loss", torch.full((len(GROUPS[bits]),), torch.nan, dtype=torch.float64))

    @property
    def state(self) -> int:
        """How many groups of clusters are frozen."""
        return int((self.turn > 0).sum())

    def next(self, w: Tensor) -> tuple[Clusters, Tensor]:
        """Return the clustering as it is now and the clusters (m,) frozen after the next step: those, and the lowest
        and highest of the free; in the last step all.
        """
        found = self.clusters(w)
        chosen, free = found.settled.clone(), (~found.settled).nonzero().flatten()
        last = self.state == self.turn.numel() - 1
        chosen[free if last else free[[0, -1]] if free.numel() > 1 else free[:0]] = True
        return found, chosen

    def report(self) -> dict[str, float]:
        """As SLQ's, and for each group of clusters when it came and what its loss was."""
        told = super().report()
        for name, turn, loss in zip(GROUPS[self.bits], self.turn.tolist(), self.loss.tolist(), strict=True):
            told |= {f"turn_{name}": turn} | ({f"loss_{name}": loss} if loss == loss else {})
        return told


def due(epoch: int, epochs: int, layers: int, groups: int, depth: bool = True) -> int:
    """Return how many steps of single layers, of `layers * groups` in all, are done when an epoch's training begins."""
    current = stage(epoch, epochs, groups)
    if not depth:
        return (current + 1) * layers
    borders = [0, *stage_borders(epochs, groups), epochs]
    start, stop = max(b for b in borders if b <= epoch), min(b for b in borders if b > epoch)
    part = min(1, (epoch - start + 1) / ceil(ADVANCING * (stop - start)))
    return current * layers + ceil(layers * part)


@torch.no_grad()
def freeze_next(model: nn.Module, count: int, depth: bool, probe: Probe) -> None:
    """Advance layers, those of largest loss first, until `count` steps are done; all of a group before the next."""
    sites = _sites(model)
    while (done := sum(site.state for site, _ in sites)) < count:
        group = done // len(sites)
        waiting = [(site, *site.next(w)) for site, w in sites if site.state == group]
        losses = [loss_when_frozen(model, probe, *move) if depth else torch.nan for move in waiting]
        order = torch.tensor(losses, dtype=torch.float64).argsort(descending=True, stable=True).tolist()
        for turn, i in enumerate(order[: count - done], done + 1):
            site, found, chosen = waiting[i]
            site.settle(found, chosen)
            site.turn[group], site.loss[group] = turn, losses[i]


def _sites(model: nn.Module) -> list[tuple[MLQWeight, Tensor]]:
    layers = quantized_layers(model).values()
    return [(layer.weight_q, layer.weight) for layer in layers if isinstance(layer.weight_q, MLQWeight)]


def build(*, w: int = 2, depth: bool = True, zero: str = "mean") -> Method:
    """Return MLQ; see Choices for `depth` and `zero`."""
    if zero not in PINNED:
        raise ValueError(f"zero={zero}: allowed are {', '.join(PINNED)}")
    groups = len(GROUPS.get(w, GROUPS[2]))

    def site(name: str, layer: FloatLayer, bits: int) -> Quantizer:
        if bits != w:  # layers take turns, group by group: all have the same groups
            raise Unsupported(f"mlq gives all layers one width: {name} has {bits} bits, bits.w is {w}")
        return MLQWeight(layer.weight.detach(), bits, PINNED[zero])

    def on_epoch(model: nn.Module, epoch: int, epochs: int, probe: Probe) -> None:
        freeze_next(model, due(epoch, epochs, len(_sites(model)), groups, depth), depth, probe)

    return Method(
        name="mlq",
        bits=Bits(w),
        supported_bits={"w": (*GROUPS, FLOAT)},
        weight=site,
        phases=(lambda epochs: stage_borders(epochs, groups)) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
    )
