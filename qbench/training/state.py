"""The state of a training: optimizer, weight average, counters, best weights. It is saved and resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.training.checkpoint import content_sha256, copied
from qbench.training.random_state import random_state, set_random_state


@dataclass
class State:
    """Where training stands: with the random state, all that a resumed run needs to go on bit for bit."""

    optimizer: torch.optim.Optimizer
    average: "Average | None" = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    images: int = 0
    hits: int | Tensor = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    stale: int = 0
    stopped: bool = False

    def save(self, model: nn.Module) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "model": copied(model.state_dict()),
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else None,
            "counters": [
                self.epoch,
                self.batch,
                self.step,
                self.images,
                int(self.hits),
                self.stale,
                self.stopped,
            ],
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
            "best": self.best,
            "random": random_state(),
            "seconds": self.seconds,
        }

    def digest(self, model: nn.Module) -> str:
        """Return the sha256 of everything saved but the time it took: model, optimizer, counters, random states."""
        return content_sha256({name: part for name, part in self.save(model).items() if name != "seconds"})

    def load(self, model: nn.Module, saved: dict[str, Any]) -> None:
        """Take over what `save` returned, into the model too."""
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.values = {k: v.to(self.average.values[k].device) for k, v in saved["average"].items()}
        self.epoch, self.batch, self.step, self.images, self.hits, self.stale, self.stopped = saved["counters"]
        self.losses = list(saved["losses"].unbind())
        self.best, self.seconds = saved["best"], saved["seconds"]
        set_random_state(saved["random"])


class Average:
    """Exponential moving average of the parameters; buffers are the network's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters."""
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Give the network its averaged parameters for a while."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


@contextmanager
def evaluated_weights(model: nn.Module, state: State) -> Iterator[None]:
    """Give the network the weights that evaluation uses: the averaged ones where averaging is on."""
    if state.average is None:
        yield
    else:
        with state.average.used(model):
            yield
