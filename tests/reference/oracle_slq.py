"""SLQ and MLQ (arXiv 1803.03289) in plain NumPy, one stage per call. K-means tries every choice of intervals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Loss = Callable[[list[Array]], float]


def _intervals(n: int, count: int, start: int = 0) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield every choice of at most `count` intervals of range(n), in order, without overlap."""
    yield ()
    if count:
        for a in range(start, n):
            for b in range(a + 1, n + 1):
                for rest in _intervals(n, count - 1, b):
                    yield ((a, b), *rest)


def clustered(w: Array, k: int, pins: Sequence[float] = ()) -> tuple[Array, NDArray[np.int64]]:
    """Return the centroids of least squared distance, at most k including `pins`, and labels."""
    pins = sorted(set(pins))
    line = np.sort(w.ravel())
    best, centroids = np.inf, np.empty(0)
    for choice in _intervals(len(line), k - len(pins)):
        tried = np.array([*pins, *(line[a:b].mean() for a, b in choice)])
        if len(tried):
            cost = np.square(line[:, None] - tried).min(1).sum()
            if cost < best - 1e-12:
                best, centroids = cost, np.unique(tried)
    return centroids, np.abs(w[..., None] - centroids).argmin(-1)


@dataclass
class Layer:
    """A layer's latent weights, which of them are frozen, their frozen values, and the centroids that are frozen."""

    latent: Array
    frozen: NDArray[np.bool_]
    value: Array
    fixed: list[float] = field(default_factory=list)
    step: int = 0

    @classmethod
    def of(cls, latent: Array) -> "Layer":
        return cls(latent, np.zeros(latent.shape, bool), np.zeros(latent.shape))

    @property
    def effective(self) -> Array:
        return np.where(self.frozen, self.value, self.latent)

    def shared(self, labels: NDArray[np.int64], centroids: Array, which: Sequence[int]) -> Array:
        """The effective weights if the free weights of these clusters are set to their centroid."""
        return np.where(np.isin(labels, which) & ~self.frozen, centroids[labels], self.effective)

    def freeze(self, labels: NDArray[np.int64], centroids: Array, which: Sequence[int]) -> None:
        self.value = self.shared(labels, centroids, which)
        self.frozen = self.frozen | np.isin(labels, which)
        self.fixed = sorted({*self.fixed, *(float(centroids[c]) for c in which)})


def slq_stage(layers: list[Layer], k: int, portion: float, loss: Loss) -> None:
    """Compute one stage of SLQ.

    1. Cluster the weights of each layer, with frozen centroids fixed.
    2. Freeze weights that were assigned to frozen centroids.
    3. Measure the loss for each free cluster, with only the weights of this cluster quantized.
    4. Freeze the clusters with the largest losses, until the portion is reached.

    Clusters without weights do not count, except frozen ones. A layer that is completely frozen is skipped.
    """
    everything, layers = layers, [layer for layer in layers if not layer.frozen.all()]
    found = [clustered(layer.effective, k, [0.0, *layer.fixed]) for layer in layers]
    for layer, (centroids, labels) in zip(layers, found, strict=True):
        done = [c for c in range(len(centroids)) if centroids[c] in layer.fixed]
        layer.freeze(labels, centroids, done)
    picks = []
    for layer, (centroids, labels) in zip(layers, found, strict=True):
        done = [c for c in range(len(centroids)) if centroids[c] in layer.fixed]
        free = [c for c in range(len(centroids)) if c in labels and c not in done]
        measured = {
            c: loss([x.shared(labels, centroids, [c]) if x is layer else x.effective for x in everything]) for c in free
        }
        ranked = sorted(free, key=lambda c: -measured[c])
        wanted = max(1, int(portion * (len(done) + len(free)) + 1e-9)) - len(done)
        picks.append(ranked[: max(1, wanted)])
    for layer, (centroids, labels), which in zip(layers, found, picks, strict=True):
        layer.freeze(labels, centroids, which)


def mlq_steps(layers: list[Layer], k: int, steps: int, count: int, loss: Loss) -> list[tuple[int, float]]:
    """Advance `count` of the layers with the fewest steps, largest loss first. Return a pair (layer, loss) for each.

    In a step of a layer, its lowest and its highest free cluster are frozen. The last of `steps` steps freezes all
    clusters.
    """
    behind = min(layer.step for layer in layers)
    moves = {}
    for i, layer in enumerate(layers):
        if layer.step == behind:
            centroids, labels = clustered(layer.effective, k, layer.fixed)
            free = [c for c in range(len(centroids)) if centroids[c] not in layer.fixed]
            old = [c for c in range(len(centroids)) if centroids[c] in layer.fixed]
            which = old + (free if behind == steps - 1 else [free[0], free[-1]])
            trial = [layer.shared(labels, centroids, which) if i == j else x.effective for j, x in enumerate(layers)]
            moves[i] = (loss(trial), labels, centroids, which)
    order = sorted(moves, key=lambda i: -moves[i][0])[:count]
    for i in order:
        layers[i].freeze(*moves[i][1:])
        layers[i].step += 1
    return [(i, moves[i][0]) for i in order]
