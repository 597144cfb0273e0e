"""Defines the configuration of a run as dataclasses with types and ranges.

The values are in `conf/`.

`qbench.config.identity` defines when two configurations are the same run. This module does not import torch, so
commands that only print help texts or stored results start quickly.
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

from qbench.bits import FLOAT, Bits
from qbench.config.fields import image_width, layer_width, marked, one_of, printable, within

SCHEMA = 2
"""Version of the run identity.

If this number changes, the same configuration becomes a different run. A new key does not need a new version. New
keys are marked as `added` (see `qbench.config.identity`). A stored run keeps its identity, because its new keys have
their default values.
"""

BASELINE_MODEL = {"act": "auto", "head": "keep"}
"""Keys of `model` that have no effect on a float baseline, with their default values."""

RATE = "optim.lr"
"""Name of the option that contains the learning rate. Only runs of a learning-rate grid have this option."""

STARTS = ("float", "scratch", "method")
"""Values of `init` that are not paths. `auto` and `imagenet` are not listed, because other values replace them.

`auto` becomes `method` if the method trains from scratch, and otherwise `float`. `imagenet` becomes a path.
"""

Node = dict[str, Any]
"""A YAML node: the name of a function under `name`, its keyword arguments, and optionally `added`."""


@dataclass
class BitWidths:
    """Bit widths of weights, activations and gradients, as typed. None means the default width of the method."""

    w: int | None = within(None, 1, FLOAT)
    a: int | None = within(None, 1, FLOAT)
    g: int | None = within(None, 1, FLOAT)

    def __str__(self) -> str:
        return "".join(f"{key}{width}" for key, width in dataclasses.asdict(self).items() if width is not None)

    def resolved(self) -> Bits:
        """Return the widths as numbers. Unset widths are 32."""
        return Bits(self.w or FLOAT, self.a or FLOAT, self.g or FLOAT)


@dataclass
class Optim:
    """Optimizer, learning-rate schedule, batch size, and other values that define a training step.

    Each update of the weights uses the mean of the gradients of `accumulate` batches of `batch_size` images.
    """

    name: str = one_of("adam", "adam", "adamw", "radam", "sgd")
    lr: float = within(MISSING, 0, above=True)
    schedule: str = one_of("constant", "constant", "linear", "cosine", "exponential", "step", "one_cycle")
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
    bias_lr: float = within(1.0, 0, above=True, added=True)
    warmup: float = within(0.0, 0, added=True)
    factors: list[float] = field(default_factory=list, metadata={"added": True})
    accumulate: int = within(1, 1, added=True)
    decay_norm_and_bias: bool = marked(False, added=True)
    decay_until: float = within(1.0, 0, 1, above=True, added=True)
    quantizer_lr: float = within(1.0, 0, above=True, added=True)
    quantizer_decay: float | None = within(None, 0, added=True)


@dataclass
class Pretrain:
    """The recipe of the float baseline."""

    epochs: int = within(MISSING, 1)
    optim: Optim = field(default_factory=Optim)


def _ascending(values: object) -> bool:
    numbers = values if isinstance(values, list) else []
    return len(numbers) > 1 and all(a < b for a, b in pairwise([0, *numbers, math.inf]))


@dataclass
class LearningRateGrid:
    """The learning rates of `lr_search=grid`, given as multiples of the recipe's learning rate.

    `lr` and `lr_end` are the recipe's learning rates before they are multiplied by a factor. In a run of the grid,
    `optim` contains the multiplied learning rates.
    """

    factors: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0],
        metadata={"holds": _ascending, "allowed": "two or more ascending numbers above 0, such as [0.1,0.3,1,3,10]"},
    )
    lr: float | None = within(None, 0, above=True)
    """The recipe's learning rate. qbench sets this key in the runs of a grid; do not type this key."""

    lr_end: float | None = within(None, 0)
    """The recipe's last learning rate. qbench sets this key in the runs of a grid; do not type this key."""


def scaled(rate: float, factor: float) -> float:
    """Return rate * factor, rounded to 12 digits, to obtain for example 0.0003 instead of 0.00030000000000000003."""
    return float(f"{rate * factor:.12g}")


@dataclass
class Layers:
    """The layers that stay in float or have their own bit width; see `qbench.quant.policy.Policy`."""

    first: int | str = layer_width("float")
    last: int | str = layer_width("float")
    downsample: int | str = layer_width("same")
    input: int | str = image_width("same")
    rules: dict[str, Any] | None = None


@dataclass
class Distill:
    """Distillation from a teacher: the float baseline or a finished run.

    The name `auto` becomes `method` if the method requires a teacher, and otherwise `none`. The name `method` has the
    same effect as `kd`.
    """

    name: str = one_of("auto", "auto", "none", "kd", "method")
    teacher: str = "baseline"
    temperature: float = within(2.0, 0, above=True)
    weight: float = within(0.7, 0, 1)
    trust: bool = marked(False, free=True)
    average: str = one_of("batch", "batch", "classes", added=True)

    @property
    def on(self) -> bool:
        """Return whether there is a teacher."""
        return self.name in ("kd", "method")

    @property
    def by_baseline(self) -> bool:
        """Return whether the float baseline is the teacher."""
        return self.on and self.teacher == "baseline"


def _share_of_gpus(value: object) -> bool:
    """Return whether a value is a whole number n from 1 to 64, or approximately 1 / n, such as 0.33."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= 64:
        return False
    return abs(value - round(value)) < 1e-9 if value >= 1 else abs(1 / round(1 / value) - value) < 0.005


@dataclass
class Runtime:
    """Settings for the execution of a run, such as device and precision. Keys marked `free` cannot change results."""

    device: str = marked("auto", free=True)
    threads: int = within(1, 1, 1024)
    deterministic: bool = True
    precision: str = one_of("fp32", "fp32", "bf16", "fp16", added=True)
    compile: bool = marked(False, added=True)
    tf32: bool = marked(False, added=True)
    activation_memory: str = one_of("recompute", "recompute", "keep", "codes", free=True)
    tensorboard: bool = marked(True, free=True)
    observe: str = one_of("light", "off", "light", "full", free=True)
    progress: bool = marked(True, free=True)
    log_every: int = within(10, 1, free=True)
    checkpoint_seconds: float = within(30.0, 0, free=True)
    num_workers: int = within(2, 0, 64, free=True)
    gpus_per_run: float = marked(1.0, _share_of_gpus, "1, 2, 3, ... or 1/2, 1/3, ... such as 0.5", free=True)


def _power_of_two(value: object) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


@dataclass
class Config:
    """The configuration of one run."""

    model: Node = MISSING
    dataset: Node = MISSING
    method: Node = MISSING
    activation: Node = field(default_factory=lambda: {"name": "none"})
    bits: BitWidths = field(default_factory=BitWidths)
    optim: Optim = field(default_factory=Optim)
    layers: Layers = field(default_factory=Layers)
    distill: Distill = field(default_factory=Distill)
    runtime: Runtime = field(default_factory=Runtime)
    pretrain: Pretrain = field(default_factory=Pretrain)
    seed: int = within(0, 0, 2**31 - 1)
    epochs: int = within(MISSING, 0)
    batch_shards: int = marked(1, _power_of_two, "a power of two, such as 1, 2, 4 or 8", added=True)
    lr_search: str = one_of("none", "none", "grid", added=True)
    lr_grid: LearningRateGrid = field(default_factory=LearningRateGrid, metadata={"added": True})
    init: str = "auto"
    out: str = printable("outputs", free=True)
    rerun: bool = marked(False, free=True)
    debug: bool = marked(False, added=True)
    claim: dict[str, Any] | None = field(default=None, metadata={"free": True})
    """The claim that an experiment file tests. `scripts/claims.py` reads this key. The key has no effect on a run."""

    @property
    def method_name(self) -> str:
        """Return the method's name.

        If another method quantizes the activations, both names are joined, as in `ttq+hwgq`.
        """
        composed = self.activation["name"] != "none"
        return str(self.method["name"]) + (f"+{self.activation['name']}" if composed else "")

    @property
    def starts_from_file(self) -> bool:
        """Return whether `init` is the path of a checkpoint file or of another run."""
        return self.init not in STARTS

    @property
    def is_baseline(self) -> bool:
        """Return whether the run trains a float network from scratch with the recipe `pretrain`."""
        return self.method_name == "float" and self.init == "scratch"

    @property
    def needs_baseline(self) -> bool:
        """Return whether the run needs a trained float baseline, for initial weights, for comparison, or as a teacher.

        A debug run needs no baseline. The network and the teacher of a debug run have random weights.
        """
        by_baseline = self.distill.by_baseline and not self.starts_from_file
        return not self.debug and (self.init in ("float", "method") or by_baseline)


def to_dict(config: Config) -> Node:
    """Return a configuration as plain dictionaries."""
    return dataclasses.asdict(config)


def baseline_config(config: Config, norm: str | None = None) -> Config:
    """Return the configuration of a run's float baseline.

    `norm` is the normalization that the run's method requires, or None.
    """
    baseline = copy.deepcopy(config)
    baseline.method, baseline.activation = {"name": "float"}, {"name": "none"}
    baseline.bits = BitWidths(FLOAT, FLOAT, FLOAT)
    baseline.epochs, baseline.optim = baseline.pretrain.epochs, baseline.pretrain.optim
    baseline.layers, baseline.distill = Layers(), Distill("none")
    baseline.init, baseline.rerun = "scratch", False
    baseline.lr_search, baseline.lr_grid = "none", LearningRateGrid()
    baseline.model |= {key: value for key, value in BASELINE_MODEL.items() if key in baseline.model}
    if norm is not None and baseline.model.get("norm") == "auto":
        baseline.model["norm"] = norm
    return baseline


def sweep_hint(key: str, values: Iterable[object]) -> str:
    """Return a line that shows how to type a sweep over several values, for error messages."""
    typed = ",".join(map(str, values))
    return f"one run for each value: -m {key}={typed}" if "," in typed else f"type {key}={typed or 'VALUE'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the most similar word of `known`, or an empty string if no word is similar."""
    words = list(known)
    same = [other for other in words if other.lower() == word.lower()]
    close = same or difflib.get_close_matches(word, words, n=1, cutoff=0.55)
    return f"; did you mean {close[0]}?" if close else ""
