"""Checks that saving, loading and resuming do not change the results of training."""

import torch
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.check.subject import EPOCHS, SHAPE, MethodUnderTest, NotApplicable, PropertyViolation, batches, probe
from qbench.config.schema import Optim
from qbench.quant.install import install
from qbench.quant.method import Unsupported
from qbench.training import optimizer as optim
from qbench.training.checkpoint import pack, unpack
from qbench.training.digests import weights_sha256
from qbench.training.loop import Callbacks, train
from qbench.training.state import State
from qbench.training.task import Task

RECIPE = Optim(name="sgd", lr=0.02, schedule="cosine", batch_size=16)


class _Stop(Exception):
    """Raised to end training in the middle of an epoch."""


def round_trip(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that a network has exactly the same outputs after its state_dict is saved and loaded."""
    task, state = _task(subject, bits)
    train(task, state)
    saved = unpack(pack({"model": task.model.state_dict()}), "memory")["model"]
    model = subject.float_network()
    install(subject.make(bits), model, example=torch.zeros(1, *SHAPE))
    model.load_state_dict(saved)
    images = batches()[0][0]
    if not torch.equal(model.eval()(images), task.model.eval()(images)):
        raise PropertyViolation("outputs differ after saving and loading the state_dict")


def resume(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that stopping and resuming training within an epoch does not change the final weights at all."""
    if not subject.make(bits).needs_training:
        raise NotApplicable("the method does not train")
    whole, state = _task(subject, bits)
    train(whole, state)
    first, state = _task(subject, bits)
    stop = len(batches()) * 2 + 1

    def stop_in_epoch(state: State, loss: Tensor) -> None:
        if state.step == stop:
            raise _Stop

    try:
        train(first, state, Callbacks(on_step=stop_in_epoch))
    except _Stop:
        saved = unpack(pack(state.save(first.model)), "memory")
    else:
        raise PropertyViolation(f"training ends before step {stop}")
    resumed, state = _task(subject, bits, prepare=False)
    for name, p in resumed.model.named_parameters():
        p.requires_grad_(name in saved["trainable"])
    state = State(_optimizer(resumed.model))
    state.load(resumed.model, saved)
    train(resumed, state)
    if weights_sha256(resumed.model.state_dict()) != weights_sha256(whole.model.state_dict()):
        raise PropertyViolation("the weights after resumed training differ from those after uninterrupted training")


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if not any(p.requires_grad for p in model.parameters()):
        raise Unsupported("the network has no trainable parameters")
    return optim.build_optimizer(model, RECIPE)


def _task(subject: MethodUnderTest, bits: Bits, *, prepare: bool = True) -> tuple[Task, State]:
    """Return a training task, and the state of training before the first step."""
    method, model = subject.make(bits), subject.float_network()
    install(method, model, example=torch.zeros(1, *SHAPE))
    torch.manual_seed(2)
    if prepare and method.prepare:
        method.prepare(model, probe())
    data = batches()
    task = Task(
        model=model, method=method, optim=RECIPE, epochs=EPOCHS if method.needs_training else 0, steps=len(data),
        train=lambda epoch, start: data[start:], validate=lambda: data, probe=probe(),
    )  # fmt: skip
    torch.manual_seed(4)
    return task, State(_optimizer(model))
