"""The configuration as dataclasses: the schema, the identity of a run, the float parent that it starts from.

YAML under `conf/` holds the values. Nothing here imports torch, so that `--help` and the repeat of a finished run
answer at once.
"""

import copy
import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from omegaconf import MISSING

from qbench.config.fields import FLOAT, layer_width, one_of, printable, within
from qbench.config.identity import digest, file_sha256, path_component

SCHEMA = 1
"""Counts changes after which the same configuration gives another result; part of every run's identity."""

RATE = "optim.lr"
"""The option, beside a method's own, of a run that is one of a grid of learning rates."""

STARTS = ("float", "scratch", "method")
"""Values of `init` that are no path; `method` is what `auto` becomes where the method trains from scratch."""


@dataclass
class Bits:
    """Widths of weights, activations, gradients; unset ones are the method's own."""

    w: int | None = within(None, 1, FLOAT)
    a: int | None = within(None, 1, FLOAT)
    g: int | None = within(None, 1, FLOAT)

    def __str__(self) -> str:
        return "".join(f"{key}{width}" for key, width in dataclasses.asdict(self).items() if width is not None)


@dataclass
class Optim:
    """Optimizer and learning-rate schedule, and what else belongs to a step."""

    name: str = one_of("adam", "adam", "sgd")
    lr: float = within(MISSING, 0, above=True)
    schedule: str = one_of("constant", "constant", "linear", "cosine", "exponential", "step")
    lr_end: float = within(0.0, 0)
    milestones: list[float] = field(default_factory=list)
    gamma: float = within(0.1, 0, 1, above=True)
    batch_size: int = within(64, 1)
    weight_decay: float = within(0.0, 0)
    momentum: float = within(0.9, 0, 1, below=True)
    nesterov: bool = False
    eps: float = within(1e-8, 0, above=True)
    label_smoothing: float = within(0.0, 0, 1, below=True)
    clip_norm: float | None = within(None, 0, above=True)
    ema: float | None = within(None, 0, 1, below=True)
    patience: int | None = within(None, 1)


@dataclass
class Pretrain:
    """The float parent's recipe."""

    epochs: int = within(MISSING, 1)
    optim: Optim = field(default_factory=Optim)


@dataclass
class LearningRateGrid:
    """The learning rates of `lr_search=grid`: factors of the recipe's own ones.

    In a run made of one of them, `lr` and `lr_end` are the recipe's own; the run's are under `optim`.
    """

    factors: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0],
        metadata={
            "holds": lambda x: len(x) > 1 and all(a < b for a, b in pairwise([0, *x, math.inf])),
            "allowed": "two or more ascending numbers above 0, [0.1,0.3,1,3,10]",
        },
    )
    lr: float | None = within(None, 0, above=True)
    lr_end: float | None = within(None, 0)


def scaled(rate: float, factor: float) -> float:
    """Return a rate times a factor as one would type it: 0.0003, not 0.00030000000000000003."""
    return float(f"{rate * factor:.12g}")


@dataclass
class Layers:
    """Which layers stay float or get a width of their own; see `qbench.quant.policy.Policy`."""

    first: int | str = layer_width("float")
    last: int | str = layer_width("float")
    downsample: int | str = layer_width("same")
    input: int | str = layer_width("same")
    rules: dict[str, Any] | None = None


@dataclass
class Distill:
    """Distillation from a teacher, the float parent or a finished run.

    `method` is what `auto` becomes where the method asks for a teacher; it does what `kd` does.
    """

    name: str = one_of("auto", "auto", "none", "kd", "method")
    teacher: str = "baseline"
    temperature: float = within(2.0, 0, above=True)
    weight: float = within(0.7, 0, 1)

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return self.name in ("kd", "method")


@dataclass
class Runtime:
    """How a run is carried out. Threads, determinism, precision and compiling can change its numbers, no other key."""

    device: str = "auto"
    threads: int = within(1, 1, 1024)
    deterministic: bool = True
    precision: str = one_of("fp32", "fp32", "bf16")
    compile: bool = False
    compress_activations: bool = False
    tensorboard: bool = True
    observe: str = one_of("light", "off", "light", "full")
    progress: bool = True
    log_every: int = within(10, 1)
    checkpoint_seconds: float = within(30.0, 0)
    num_workers: int = within(2, 0, 64)

    def numerics(self) -> dict[str, Any]:
        """Return what of it can change a run's numbers; the later keys only where they are not at their defaults."""
        found: dict[str, Any] = {"threads": self.threads, "deterministic": self.deterministic}
        found |= {"precision": self.precision} if self.precision != "fp32" else {}
        return found | ({"compile": True} if self.compile else {})


@dataclass
class Config:
    """One run."""

    model: dict[str, Any] = MISSING
    dataset: dict[str, Any] = MISSING
    method: dict[str, Any] = MISSING
    activation: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    bits: Bits = field(default_factory=Bits)
    optim: Optim = field(default_factory=Optim)
    layers: Layers = field(default_factory=Layers)
    distill: Distill = field(default_factory=Distill)
    runtime: Runtime = field(default_factory=Runtime)
    pretrain: Pretrain = field(default_factory=Pretrain)
    seed: int = within(0, 0, 2**31 - 1)
    epochs: int = within(MISSING, 1)
    lr_search: str = one_of("none", "none", "grid")
    lr_grid: LearningRateGrid = field(default_factory=LearningRateGrid)
    init: str = "auto"
    out: str = printable("outputs")
    rerun: bool = False
    claim: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the result, as plain values."""
        everything = to_dict(self)
        for free in ("out", "rerun", "claim"):
            del everything[free]
        if self.lr_search == "none":
            del everything["lr_search"], everything["lr_grid"]
        everything["runtime"] = self.runtime.numerics()
        everything["dataset"].pop("recipe", None)
        own = ":" in everything["dataset"]["name"]
        if not own and {"root", "download"} <= set(everything["dataset"]):  # where published files lie decides nothing
            del everything["dataset"]["root"], everything["dataset"]["download"]
        if self.init not in STARTS:
            everything["init"] = file_sha256("init", self.init)
        if self.distill.teacher != "baseline":
            everything["distill"]["teacher"] = file_sha256("distill.teacher", self.distill.teacher)
        return {"schema": SCHEMA} | everything

    def protocol(self) -> dict[str, Any]:
        """Return the part of the identity that two runs must share to be compared fairly.

        A start or a teacher that the method itself asks for is part of the method, as the network's norm is; a learning
        rate that was one of a grid is no more than a candidate, and the grid is what they share.
        """
        shared = self.identity()
        for own in ("method", "activation", "bits", "seed", "runtime", "schema"):
            del shared[own]
        if self.init == "method":
            shared["init"] = "float"
        if self.distill.name == "method":
            shared["distill"] |= {"name": "none"}
        shared["model"] = {k: v for k, v in shared["model"].items() if k not in ("norm", "act")}
        if self.lr_grid.lr is not None:
            shared["optim"] |= {"lr": self.lr_grid.lr, "lr_end": self.lr_grid.lr_end}
        if self.lr_search == "grid":
            shared["lr_grid"] = {"factors": self.lr_grid.factors}
        if self.runtime.precision != "fp32":
            shared["precision"] = self.runtime.precision
        return shared

    def directory(self) -> str:
        """Return the run's place below `out`: <dataset>-<model>/<method>-w2a2g32-s0-<hash8>."""
        dataset, model, method = (
            path_component(name) for name in (self.dataset["name"], self.model["name"], self.method_name)
        )
        return f"{dataset}-{model}/{method}-{self.bits}-s{self.seed}-{digest(self.identity())[:8]}"

    @property
    def method_name(self) -> str:
        """Return the method's name, `ttq+hwgq` where another one quantizes the activations."""
        composed = self.activation["name"] != "none"
        return str(self.method["name"]) + (f"+{self.activation['name']}" if composed else "")

    def options(self) -> dict[str, Any]:
        """Return the method's own keys, those of the one composed with it as `activation.KEY`; no deviation is none.

        A start or teacher that the method asked for, and got, is an option too: without it the run is another one. So
        is the learning rate of a run that is one of a grid.
        """
        own = {key: value for key, value in self.method.items() if key != "name"}
        own |= {f"activation.{key}": value for key, value in self.activation.items() if key != "name"}
        own |= {"init": "scratch"} if self.init == "method" else {}
        own |= {"distill": "kd"} if self.distill.name == "method" else {}
        own |= {RATE: self.optim.lr} if self.lr_grid.lr is not None else {}
        return {key: value for key, value in own.items() if not key.endswith("deviation") or value != "none"}

    @property
    def is_parent(self) -> bool:
        """Whether this is a float network trained from scratch by the recipe under `pretrain`."""
        return self.method_name == "float" and self.init == "scratch"


def to_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain dictionaries."""
    return dataclasses.asdict(config)


def parent(config: Config, norm: str | None = None) -> Config:
    """Return the run of the float network that `config` starts from; `norm` is what its method requires of it."""
    own = copy.deepcopy(config)
    own.method, own.activation, own.bits = {"name": "float"}, {"name": "none"}, Bits(FLOAT, FLOAT, FLOAT)
    own.epochs, own.optim = own.pretrain.epochs, own.pretrain.optim
    own.layers, own.distill, own.init, own.rerun = Layers(), Distill("none"), "scratch", False
    own.lr_search, own.lr_grid = "none", LearningRateGrid()
    if "act" in own.model:
        own.model["act"] = "auto"
    if norm is not None and own.model.get("norm") == "auto":
        own.model["norm"] = norm
    return own


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a word close to a known one, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
