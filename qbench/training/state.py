"""Defines the state of training: the optimizer, the weight average, counters and the best weights.

Checkpoints contain this state. A resumed run continues from it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qbench.distributed.group import Group
from qbench.errors import ProcessesDiffer
from qbench.training.checkpoint import cpu_copy
from qbench.training.digests import content_sha256, named_digests
from qbench.training.random_state import random_state, set_random_state


@dataclass(frozen=True)
class BestWeights:
    """The weights with the best validation accuracy so far.

    Args:
        rank: the pair of validation top-1 and negative validation loss. The largest pair is the best.
        epoch: the epoch after which the weights were evaluated, counted from 0.
        model: the network's state_dict with these weights.
    """

    rank: tuple[float, float]
    epoch: int
    model: dict[str, Tensor]


@dataclass
class State:
    """The progress of training.

    A run that resumes from this state and the stored random state has exactly the same results as an uninterrupted run.

    Args:
        optimizer: the optimizer.
        average: the moving average of the weights, or None if `optim.ema` is not set.
        scaler: the loss scaler of training in float16, or None in other precisions.
        epoch: number of the current epoch, counted from 0.
        batch: number of the next batch in this epoch, counted from 0.
        step: number of batches so far. Without `optim.accumulate`, every batch is one update of the weights.
        losses: the losses of the current epoch's batches.
        images: number of images in the current epoch's batches.
        hits: number of correct predictions in the current epoch's batches.
        seconds: training time of the current epoch in seconds.
        best: the weights with the best validation accuracy so far, or None.
        stale: number of epochs since the best epoch.
        stopped: whether early stopping has ended training.
        in_update: whether an update is incomplete, because the gradients of some of its batches are still missing.
    """

    optimizer: torch.optim.Optimizer
    average: "WeightAverage | None" = None
    scaler: torch.amp.GradScaler | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    images: int = 0
    hits: int | Tensor = 0
    seconds: float = 0.0
    best: BestWeights | None = None
    stale: int = 0
    stopped: bool = False
    in_update: bool = False

    def save(self, model: nn.Module) -> dict[str, object]:
        """Return the training state, the model's weights and the random state as nested plain values and tensors."""
        best = self.best
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return ({"gradients": cpu_copy(gradients)} if self.in_update else {}) | {
            "model": cpu_copy(model.state_dict()),
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.parameters() if self.average else None,
            **({"scaler": self.scaler.state_dict()} if self.scaler else {}),
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
            "best": {"rank": list(best.rank), "epoch": best.epoch, "model": best.model} if best else None,
            "random": random_state(),
            "seconds": self.seconds,
        }

    def digest(self, model: nn.Module) -> str:
        """Return the sha256 of all values that `save` returns, except the training time."""
        return content_sha256({name: part for name, part in self.save(model).items() if name != "seconds"})

    def check_equal(self, model: nn.Module, group: Group) -> None:
        """Raise `ProcessesDiffer` if the state differs between the processes of a run.

        Times are not compared. The random generators of CUDA devices are not compared either, because they are seeded
        for every pass.
        """
        if group.size == 1:
            return
        saved = {name: part for name, part in self.save(model).items() if name != "seconds"}
        saved["random"] = {name: part for name, part in random_state().items() if name != "cuda"}
        first, *others = group.gather(named_digests(saved))
        for rank, digests in enumerate(others, 1):
            names = [name for name in {**first, **digests} if first.get(name) != digests.get(name)]
            if names:
                more = f" and {len(names) - 1} more" if names[1:] else ""
                raise ProcessesDiffer(
                    f"processes 0 and {rank} differ after step {self.step}: {names[0]}{more}\n"
                    "the method or the network must compute the same in every process"
                )

    def load(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Restore a training state that `save` returned, with the model's weights and the random state."""
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load(saved["average"])
        if self.scaler:
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.batch, self.step, self.images, self.hits, self.stale, self.stopped = saved["counters"]
        self.losses = list(saved["losses"].to(next(model.parameters()).device).unbind())
        self.seconds, best = saved["seconds"], saved["best"]
        self.best = BestWeights(tuple(best["rank"]), best["epoch"], best["model"]) if best else None
        self.in_update = "gradients" in saved
        for name, p in model.named_parameters():
            if name in saved.get("gradients", {}):
                p.grad = saved["gradients"][name].to(p, memory_format=torch.preserve_format)
        set_random_state(saved["random"])


class WeightAverage:
    """Exponential moving average of a network's parameters, computed by torch's `AveragedModel`.

    Buffers are never averaged, so the object stores only the averaged parameters. This takes less memory than a copy of
    the whole network. With INQ, for example, a copy would also contain masks, which are 1.2 times as large as the
    parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._averaged = AveragedModel(_parameters(model), multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        # The average must start from the initial weights. If the count of updates were 0, the first update would
        # replace the average by the current parameters. The count has no other effect.
        self._averaged.n_averaged.fill_(1)

    def parameters(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name."""
        return {name: p.detach() for name, p in zip(self._names, self._averaged.module.parameters(), strict=True)}

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Restore averaged parameters that `parameters` returned."""
        for name, p in self.parameters().items():
            p.copy_(parameters[name])

    def update(self, model: nn.Module) -> None:
        """Update each average to decay * average + (1 - decay) * parameter, with the network's current parameters."""
        self._averaged.update_parameters(_parameters(model))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let a network use the averaged parameters within a `with` block."""
        trained = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.parameters(), strict=False)
        try:
            yield
        finally:
            model.load_state_dict(trained, strict=False)


def _parameters(model: nn.Module) -> nn.ParameterList:
    return nn.ParameterList(model.parameters())


@contextmanager
def evaluated_weights(model: nn.Module, state: State) -> Iterator[None]:
    """Let a network use its evaluation weights within a `with` block.

    The evaluation weights are the averaged parameters if `optim.ema` is set, and otherwise the network's current
    parameters.
    """
    if state.average is None:
        yield
    else:
        with state.average.applied_to(model):
            yield
