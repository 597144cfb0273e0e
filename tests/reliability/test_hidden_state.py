"""No state of a run is outside of what checkpoints save (R3)."""

import functools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import resumed_runs
import torch
from conftest import tiered
from resumed_runs import METHODS, At, recipe, resumed
from torch import nn

import qbench.experiment.run as experiment
from qbench.config import registry
from qbench.errors import Interrupted
from qbench.training.loop import Callbacks
from qbench.training.loop import train as train_task
from qbench.training.state import State
from qbench.training.task import Task

counted_clock = resumed_runs.counted_clock
report_counts = resumed_runs.report_counts
at = resumed_runs.at


MODEL = "task.model"
RECOMPUTED = {
    "task.probe": "images of the data set",
    "task.train.__self__": "the loader: the data set, its mean and deviation",
    "task.validate": "the loader",
    "task.method.teachers": "the teacher: loaded again from the float baseline, never trained",
    "task.method.loss(teacher)": "the teacher",
    "task.model: ImageQuantizer.channel": "from the shape of images",
    "task.model: ImageQuantizer.low": "from the range of images",
    "task.model: ImageQuantizer.span": "from the range of images",
    "task.model: hwgq.HWGQActivation.levels": "from width and options",
    "task.model: lsq.LSQActivation.is_signed": "`signed` of the state_dict, read once; a load clears it",
}
"""What may exist outside the state_dict: it is the same in every process."""


REPRESENTATIVES = ("dorefa", "inq", "qd")
"""Stateless, incremental, and distilled. The other methods are in the long tier."""


@pytest.mark.parametrize("name", tiered(METHODS, REPRESENTATIVES))
def test_no_part_of_a_run_is_outside_the_saved_state(name: str, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk through everything that the loop can reach; compare plain values before and after
    training.
    """
    tasks: list[Task] = []
    before: dict[str, str] = {}

    def recorded(task: Task, state: State, callbacks: Callbacks) -> None:
        if task.method.name == name:
            before.update(plain_values(task.model))
            tasks.append(task)
        train_task(task, state, callbacks)
        if task.method.name == name:
            raise Interrupted("end of the test")

    monkeypatch.setattr(experiment, "train", recorded)
    more = [] if name == "float" else ["layers.first=same", "init=scratch"]
    with pytest.raises(Interrupted):
        resumed(at("alone", *recipe(name, "sgd", None, epochs=1), *more))
    (task,) = tasks
    saved = {id(tensor) for tensor in task.model.state_dict(keep_vars=True).values()}
    assert unexplained(hidden(task, "task", saved)) == []
    changed = [path for path, value in plain_values(task.model).items() if before.get(path) != value]
    assert unexplained(changed) == []
    names = [registry.find("method", name).__module__, "qbench.quant.layers", "qbench.quant.masks", "qbench.quant.ops"]
    for module in (sys.modules[n] for n in names):
        values = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        assert [p for key, value in values.items() for p in hidden(value, f"{module.__name__}.{key}", set())] == []


def unexplained(paths: Iterable[str]) -> list[str]:
    """Return the paths that RECOMPUTED does not explain."""
    return [path for path in paths if not any(path.startswith(known) for known in RECOMPUTED)]


def hidden(thing: Any, path: str, kept: set[int], met: dict[int, Any] | None = None) -> list[str]:
    """Return paths to tensors, arrays and random generators that can be reached from an object and
    are not `kept`.

    An attribute of a module is named by the module's type: `task.model: lsq.LSQActivation.step`.
    """
    met = {} if met is None else met
    if id(thing) in met or id(thing) in kept or isinstance(thing, PLAIN):
        return []
    met[id(thing)] = thing
    if isinstance(thing, STATEFUL):
        return [path]
    if isinstance(thing, nn.Module) and path.startswith(MODEL):
        path = f"{MODEL}: {kind(thing)}"
    return [found for name, inner in members(thing) for found in hidden(inner, f"{path}{name}", kept, met)]


PLAIN = (int, float, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
STATEFUL = (torch.Tensor, np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def kind(module: nn.Module) -> str:
    """`lsq.LSQActivation`, `BatchNorm2d`."""
    own = type(module).__module__
    return (f"{own.rpartition('.')[2]}." if own.startswith("qbench.methods") else "") + type(module).__name__


def members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object, with the path to them."""
    if isinstance(thing, dict):
        yield from ((f".{key}", value) for key, value in thing.items())
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from ((f"[{i}]", value) for i, value in enumerate(thing))
    elif isinstance(thing, functools.partial):
        yield from ((f".{name}", getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif isinstance(thing, types.MethodType):
        yield from ((f".{name}", getattr(thing, name)) for name in ("__self__", "__func__"))
    elif isinstance(thing, types.FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((f"({name})", cell.cell_contents) for name, cell in cells)
        yield from (("()", value) for value in (thing.__defaults__, thing.__kwdefaults__) if value)
    if isinstance(thing, nn.Module):  # parameters, buffers and modules under their own names
        parts = {**thing._parameters, **thing._buffers, **thing._modules}
        own = {key: value for key, value in vars(thing).items() if key not in ("_parameters", "_buffers", "_modules")}
        yield from ((f".{key}", value) for key, value in (parts | own).items())
    elif hasattr(thing, "__dict__"):
        yield from ((f".{key}", value) for key, value in vars(thing).items())


def plain_values(model: nn.Module) -> dict[str, str]:
    """Return the attributes of modules that are neither tensors nor modules, as text; hooks
    included.
    """
    return {
        f"{MODEL}: {kind(module)}.{key} of {name}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules", "training")
    }


@pytest.mark.parametrize(
    "hide",
    [
        lambda module, tensor: setattr(module, "extra", tensor),
        lambda module, tensor: setattr(module, "extra", {"a": [(tensor,)]}),
        lambda module, tensor: setattr(module, "extra", lambda: tensor),
        lambda module, tensor: setattr(module, "extra", functools.partial(print, tensor)),
        lambda module, tensor: module.register_buffer("extra", tensor, persistent=False),
        lambda module, tensor: setattr(module, "extra", tensor.numpy()),
        lambda module, tensor: setattr(module, "extra", torch.Generator()),
        lambda module, tensor: module.register_forward_hook(lambda *_: tensor),
    ],
)
def test_the_walk_finds_hidden_state(hide: Callable[[nn.Module, torch.Tensor], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert hidden(model, "", kept) == []
    hide(model[0], torch.ones(2))
    assert len(hidden(model, "", kept)) == 1
