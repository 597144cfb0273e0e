"""Defines a training task: what is trained, on which data, and for how long."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.schema import Optim
from qbench.distributed.shards import Shards
from qbench.errors import ConfigError
from qbench.quant.method import Method
from qbench.quant.probe import Batch, Probe
from qbench.quant.weights_first import WeightsFirst
from qbench.training.schedule import learning_rate, updates_per_epoch, warmup_steps


def compute_logits(network: Callable[[Tensor], object], images: Tensor, classes: int = 0, shards: int = 1) -> Tensor:
    """Return a network's output for images (N, ...), and check that it consists of logits (N, classes).

    Args:
        network: function that returns the output.
        images: one batch, or one of its shards.
        classes: number of classes of the data set, or 0 if it is not known.
        shards: number of shards of the batch, for messages.

    Raises:
        ConfigError: the output is not a tensor of logits, the number of logits is not the number of classes, the
            network cannot train on a single image, or the network changes the images in place.
    """
    version = _version(images)
    try:
        output = network(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"optim.batch_size={shards * len(images)}{f' in {shards} shards' if shards > 1 else ''}: batch "
            "normalization gets only one value per channel\n"
            f"set optim.batch_size={2 * shards} or more, or use a network without batch normalization"
        ) from None
    if _version(images) != version:
        raise ConfigError(
            "the network changes its input in place, so code that reads these images later would get wrong values\n"
            "in its forward function, change a copy: x = x.clone()"
        )
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(images):
        if classes not in (0, output.shape[1]):
            raise ConfigError(
                f"the network returns {output.shape[1]} logits per image; must be {classes}, one per class\n"
                "qbench passes this number to your class or function as the argument `num_classes` or `classes`"
            )
        return output
    found = f"a {type(output).__name__}"
    if isinstance(output, Tensor):
        found = f"a tensor {tuple(output.shape)}"
    elif isinstance(output, dict):
        found += f" with {', '.join(map(str, output))}"
    raise ConfigError(
        f"the network returns {found} for {len(images)} images; allowed: a tensor of logits (images, classes)\n"
        "return only the logits, also in training mode; if you cannot change the network, wrap it in a module that "
        "returns only the logits"
    )


def _version(images: Tensor) -> int:
    """Return how often a tensor was changed in place. For an inference tensor, which has no such count, return 0."""
    return 0 if images.is_inference() else images._version


@dataclass(frozen=True)
class Task:
    """The network, the method, the optimizer recipe, the data and the duration of training.

    Args:
        model: the network.
        method: the quantization method.
        optim: the optimizer recipe.
        epochs: number of epochs.
        steps: number of training batches per epoch.
        train: function of (epoch, start) that returns the training batches of an epoch, beginning with batch number
            `start`. If batches are divided into shards, it instead returns the shards that this process computes, in
            order.
        validate: function without arguments that returns the validation batches for this process. Without a validation
            split, the function returns no batches.
        probe: training images on which the method measures statistics.
        forward: function that computes the network's output, compiled or in another precision. None means the network
            itself.
        classes: number of classes, or 0 if it is not known.
        chance: share of the most frequent class in the training split, or 0 if it is not known.
        shards: the division of each batch into shards.
        weights: quantizes the weights of all layers together.
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
    chance: float = 0.0
    shards: Shards = field(default_factory=Shards)
    weights: WeightsFirst = field(default_factory=WeightsFirst)

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's output, computed by `forward` if this function is given.

        Raises:
            ConfigError: the network does not return logits, or cannot train on a single image.
        """
        network = self.model if self.forward is None else self.forward
        return compute_logits(network, images, self.classes, self.shards.count)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a batch as a scalar: the method's own loss or, if the method has none, cross entropy."""
        if self.method.loss is not None:
            return self.method.loss(self.model, logits, batch)
        return F.cross_entropy(logits, batch[1], label_smoothing=self.optim.label_smoothing)

    def rate(self, epoch: int, batch: int) -> float:
        """Return the learning rate of the update to which a batch belongs.

        Each phase of the method restarts the schedule.
        """
        update, updates = self._update_in_phase(epoch, batch)
        warmup = warmup_steps(self.optim, updates_per_epoch(self.optim, self.steps))
        return learning_rate(self.optim, update, updates, warmup)

    def decays(self, epoch: int, batch: int) -> bool:
        """Return whether the update to which a batch belongs has weight decay.

        `decay_until` is a fraction of each phase.
        """
        update, updates = self._update_in_phase(epoch, batch)
        return update / updates < self.optim.decay_until

    def _update_in_phase(self, epoch: int, batch: int) -> tuple[int, int]:
        """Return the index of a batch's update within the method's phase, and the number of updates in the phase."""
        start, stop = self.phase(epoch)
        per_epoch = updates_per_epoch(self.optim, self.steps)
        return (epoch - start) * per_epoch + batch // self.optim.accumulate, (stop - start) * per_epoch

    def update(self, batch: int) -> range:
        """Return the indices of all batches in the update of the weights to which `batch` belongs.

        There are `optim.accumulate` batches per update. The last update of an epoch has fewer batches if the number of
        batches in an epoch is not a multiple of `optim.accumulate`.
        """
        size = self.optim.accumulate
        start = batch - batch % size
        return range(start, min(start + size, self.steps))

    def phase(self, epoch: int) -> tuple[int, int]:
        """Return the first epoch of the phase to which an epoch belongs, and the first epoch of the next phase."""
        borders = sorted({0, *self.method.phases(self.epochs), self.epochs})
        return next((start, stop) for start, stop in pairwise(borders) if start <= epoch < stop)
