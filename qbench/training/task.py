"""What is trained: network, method, optimizer recipe, data, number of epochs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.schema import Optim
from qbench.quant.method import Method
from qbench.quant.probe import Batch, Probe
from qbench.training.optimizer import learning_rate


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how long. `train(epoch, start)` yields the batches of an epoch from a place on; of
    `classes` 0 means: not known.
    """

    model: nn.Module
    method: Method
    optim: Optim
    epochs: int
    steps: int
    train: Callable[[int, int], Iterable[Batch]]
    validate: Callable[[], Iterable[Batch]]
    probe: Probe
    forward: Callable[[Tensor], Tensor] | None = None
    classes: int = 0

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's output as the run computes it: compiled perhaps, or in another precision."""
        run = self.model if self.forward is None else self.forward
        return run(images)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar: the method's own, else cross entropy."""
        if self.method.loss is not None:
            return self.method.loss(self.model, logits, batch)
        return F.cross_entropy(logits, batch[1], label_smoothing=self.optim.label_smoothing)

    def rate(self, epoch: int, batch: int) -> float:
        """Return the learning rate of a batch; every phase has the schedule from its beginning."""
        start, stop = self.phase(epoch)
        return learning_rate(self.optim, (epoch - start) * self.steps + batch, (stop - start) * self.steps)

    def phase(self, epoch: int) -> tuple[int, int]:
        """Return first and last + 1 epoch of the phase that an epoch belongs to."""
        borders = sorted({0, *self.method.phases(self.epochs), self.epochs})
        return next((start, stop) for start, stop in pairwise(borders) if start <= epoch < stop)
