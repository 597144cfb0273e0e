"""Builds the parts of an experiment from a configuration.

Only this file reads a whole configuration. Each builder receives one node (group of keys) of the configuration. Later
stages use the parts that the builders return.
"""

import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config import registry
from qbench.config.foreign_code import foreign_code, refuse_foreign_code
from qbench.config.schema import Config, Optim, Runtime, baseline_config, to_dict
from qbench.cost.count import count_macs
from qbench.data.dataset import Dataset, few_images
from qbench.data.loader import Loader
from qbench.data.spec import InputFormat, input_format
from qbench.distributed.group import Group
from qbench.distributed.shards import Shards
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.builders import (
    build_dataset,
    build_imageless_dataset,
    build_method,
    build_model,
    images_sha256,
    method_card,
    networks_that_fit,
)
from qbench.experiment.checks import (
    check_average,
    check_distill,
    check_model_keys,
    check_outputs,
    check_quantizer_decay,
    check_runtime,
    check_shards,
    check_splits,
    check_starts,
    check_updates,
)
from qbench.experiment.data_check import check_same_data
from qbench.experiment.device import HALF_TYPES, check_float32, choose_device, configure_torch, with_autocast
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.trained_network import LAYERS, StoredLayers, load_weights, other_outputs, stored_run
from qbench.quant.combine import distilled
from qbench.quant.graph import call_inner_layers
from qbench.quant.install import install
from qbench.quant.layers import fully_quantized, quantized_parts
from qbench.quant.method import Method
from qbench.quant.policy import Policy, PolicyError, execution_order
from qbench.runs import tensorboard
from qbench.runs.result import Result, load_result
from qbench.training.checkpoint import DoesNotFit, Saved
from qbench.training.initial_weights import InitialWeights, load_initial_weights, load_quantizers

DEBUG_IMAGES = 64
"""Number of validation images, and number of test images, in a debug run."""

OTHER_IMAGES = "was trained on other images"


def image_warnings(result: Result) -> list[str]:
    """Return a run's warnings that its initial weights or its teacher may have seen its test images."""
    return [text for text in result.warnings if OTHER_IMAGES in text]


"""Part of the warnings about initial weights or a teacher that may have seen test images of the run."""


@dataclass(frozen=True)
class ExperimentSetup:
    """The parts of an experiment. The parts are checked for contradictions before anything is written.

    Args:
        config: the configuration from which the parts were made.
        data: the data set.
        method: the quantization method.
        policy: the rules that determine the width of each layer.
        macs: maps a layer's name to its multiply-accumulates for one image.
        order: the layers in the order of their first execution. Which layers a network executes can depend on its
            weights; see `find_layers`.
        device: the device on which the network is trained.
        group: the processes of the run.
        notes, warnings: remarks on weights and teachers that were loaded. The result of the run contains them.
    """

    config: Config
    data: Dataset
    method: Method
    policy: Policy
    macs: dict[str, int]
    order: list[str]
    device: torch.device
    group: Group = field(default_factory=Group)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def optim(self) -> Optim:
        """The optimizer, its schedule, and the batch size."""
        return self.config.optim

    @property
    def runtime(self) -> Runtime:
        """Settings of the execution."""
        return self.config.runtime

    @property
    def seed(self) -> int:
        """The seed of the initial weights, the image order and the augmentation."""
        return self.config.seed

    @property
    def epochs(self) -> int:
        """The number of epochs of training; 0 if the method trains nothing."""
        return self.config.epochs if self.method.needs_training else 0

    @property
    def is_baseline(self) -> bool:
        """Whether this is a float baseline."""
        return self.config.is_baseline

    @property
    def method_name(self) -> str:
        """The method's name in tables."""
        return self.config.method_name

    @property
    def title(self) -> str:
        """The name of the run in the progress display."""
        config = self.config
        stage = "float" if self.is_baseline else f"{self.method_name} {config.bits}"
        return f"{stage}  {config.model['name']} on {config.dataset['name']}, seed {self.seed}"

    @property
    def hyperparameters(self) -> tensorboard.Columns:
        """The run's row in TensorBoard's table of hyper-parameters."""
        config, bits = self.config, self.config.bits.resolved()
        model, dataset = str(config.model["name"]), str(config.dataset["name"])
        return tensorboard.columns(
            self.method_name, bits, model, dataset, self.seed, self.epochs,
            self.optim.name if self.epochs else "none", self.optim.lr if self.epochs else 0.0,
        )  # fmt: skip

    @property
    def texts(self) -> dict[str, str]:
        """The command line and the method cards, for TensorBoard."""
        names = [str(node["name"]) for node in (self.config.method, self.config.activation) if node["name"] != "none"]
        cards = {f"method card/{name}": registry.card(name) for name in names}
        return {"command": shlex.join(["qbench", *sys.argv[1:]])} | cards

    @cached_property
    def baseline(self) -> PlannedRun:
        """The run of the float baseline."""
        return planned_run(baseline_config(self.config, self.method.requires.norm))

    @property
    def needs_baseline(self) -> bool:
        """Whether the run needs a trained float baseline."""
        return self.config.needs_baseline

    @property
    def starts_from_baseline(self) -> bool:
        """Whether training starts from the weights of the float baseline."""
        return self.config.init == "float" and not self.config.debug

    @property
    def network(self) -> dict[str, str]:
        """Keys of the network that differ from their defaults and are not part of the protocol.

        These are the normalization, such as {"norm": "no_affine"}, and `act`, if the method allows several values.
        """
        norm = self.method.requires.norm or self.config.model.get("norm", "auto")
        act = self.config.model.get("act", "auto")
        keys = {} if norm in ("auto", "affine") else {"norm": str(norm)}
        return keys if act == "auto" or self.method.requires.act != "either" else keys | {"act": str(act)}

    @property
    def protocol_changes(self) -> list[str]:
        """Descriptions of how the method's requirements change the protocol that all methods share."""
        teacher = "the float baseline" if self.config.distill.teacher == "baseline" else "another run"
        return [
            *(["trained from scratch, as the method requires"] if self.config.init == "method" else []),
            *(
                [f"distilled from {teacher}, as the method requires"]
                if self.config.distill.name == "method" and self.config.distill.weight and self.epochs
                else []
            ),
            *([] if self.method.needs_training else ["not trained: post-training quantization"]),
        ]

    @property
    def card(self) -> dict[str, dict[str, str]]:
        """The choices and deviations in the method cards. The result contains them."""
        nodes = [node for node in (self.config.method, self.config.activation) if node["name"] != "none"]
        return {str(node["name"]): method_card(node) for node in nodes}

    @property
    def shards(self) -> Shards:
        """The shards of each training batch."""
        return Shards(self.config.batch_shards, self.seed, self.group)

    def loader(self, data: Dataset | None = None) -> Loader:
        """Return a loader of batches of `data`, by default the run's data. The batches are on the run's device."""
        workers, shards = self.runtime.num_workers, self.shards
        return Loader(
            data or self.data, self.optim.batch_size, self.seed, self.device, workers, shards.count, shards.own
        )

    def float_model(self, device: str = "cpu", seed: int | None = None) -> nn.Module:
        """Return the float network with initial weights. On the device `meta`, the network needs no memory.

        Args:
            device: the device on which the network is created.
            seed: the seed of the initial weights; by default, the run's seed.
        """
        seed = self.seed if seed is None else seed
        model = build_model(self.config.model, self.data, self.method, seed, device)
        configure_torch(self.runtime)  # a user's network can change the number of threads
        return model

    def find_layers(self, model: nn.Module) -> None:
        """Set `order` and `macs` to the values for a float network with its current weights.

        Which layers are executed, and therefore quantized, can depend on the weights from which a run starts.
        """
        call_inner_layers(model)
        order = execution_order(model, self._example(model))
        if order != self.order:
            self.order[:] = order
            self._set_macs(count_macs(model, self.data.shape))

    def restore_layers(self, state: Saved) -> None:
        """Set `order` and `macs` to the values in a checkpoint. If the checkpoint has none, change nothing."""
        if LAYERS in state:
            self.order[:] = state[LAYERS]["order"]
            self._set_macs(state[LAYERS]["macs"])

    @cached_property
    def _input_format(self) -> InputFormat:
        """The input format, computed once, because the range of float images is that of the whole training split."""
        return input_format(self.data)

    def layers(self, model: nn.Module) -> StoredLayers:
        """Return the layers of a quantized network, as checkpoints store them."""
        return {
            "order": self.order, "macs": self.macs, "quantized": quantized_parts(model),
            "input": self._input_format,
        }  # fmt: skip

    def _set_macs(self, macs: Mapping[str, int]) -> None:
        self.macs.clear()
        self.macs.update(macs)

    def install(self, model: nn.Module) -> nn.Module:
        """Install the method's quantizers in a float network, following the run's layer policy.

        Raises:
            ConfigError: a rule of the policy matches no layer.
        """
        example = self._example(model)
        act = str(self.config.model.get("act", "auto"))
        try:
            return install(self.method, model, replace(self.policy, order=tuple(self.order)), example=example, act=act)
        except PolicyError as error:
            raise ConfigError(f"layers.{error.key}: {error}") from None

    def _example(self, model: nn.Module) -> Tensor:
        return torch.zeros(1, *self.data.shape, device=next(model.parameters()).device)

    def load_file(self, model: nn.Module) -> InitialWeights:
        """Load the checkpoint file that `init` names.

        Raises:
            CheckpointError: the file is damaged or does not fit the network. The message names networks that the file
                fits.
        """
        path, new_head = Path(self.config.init), self.config.model.get("head") == "new"
        try:
            last = next(reversed(execution_order(model, self._example(model))), None)
            return load_initial_weights(
                model, path, new_head=new_head, last=last, foreign_names=self.method.foreign_names
            )
        except DoesNotFit as error:
            fitting = networks_that_fit(path, self.data)
            found = (
                f"the file fits {', '.join(fitting)}"
                if fitting
                else "the file fits no network of qbench; to list them: qbench list"
            )
            raise CheckpointError(f"{error}\n{found}") from None

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function that computes the network's output in training and evaluation.

        `runtime` determines whether this function is compiled, and whether it runs in float32, bfloat16 or float16.
        Measurements and verification instead call the network itself, in float32.
        """
        run: Callable[[Tensor], Tensor] = torch.compile(model) if self.runtime.compile else model
        dtype = HALF_TYPES.get(self.runtime.precision)
        return run if dtype is None else with_autocast(run, self.device, dtype)

    def warn(self, warning: str) -> None:
        """Add a warning to `warnings`, unless it is empty or is there already."""
        self.warnings.extend([warning] if warning and warning not in self.warnings else [])

    def with_teacher(self, baseline: Path | None) -> Method:
        """Return the method, with a teacher if the configuration has one.

        `baseline` is the path of the float baseline.
        """
        distill = self.config.distill
        if not distill.on:
            return self.method
        if distill.by_baseline:
            teacher = self.float_model()
            if baseline is not None:
                load_initial_weights(teacher, baseline, self.baseline.identity.digest)
            elif self.config.starts_from_file and not self.load_file(teacher).is_float:
                raise ConfigError(
                    f"init={self.config.init}: this is not a float network, so it cannot be the teacher\n"
                    "name a teacher with distill.teacher=RUN, or add distill=none"
                )
        else:
            teacher = self._load_teacher()
        hard = partial(F.cross_entropy, label_smoothing=self.optim.label_smoothing)
        teacher = teacher.to(self.device).eval().requires_grad_(False)
        return distilled(
            self.method,
            teacher,
            temperature=distill.temperature,
            weight=distill.weight,
            average=distill.average,
            hard=hard,
        )

    def _load_teacher(self, *, images: bool = True) -> nn.Module:
        """Load the teacher, which is the network of a finished run with the run's best weights.

        Args:
            images: whether this setup has the images of its data set, which must be those of the teacher.

        Raises:
            ConfigError: the teacher was trained on another data set, or its config.yaml names code that is not trusted.
            CheckpointError: the images of the teacher's data set have changed.
        """
        run, dataset, data = Path(self.config.distill.teacher), self.config.dataset["name"], self.data
        named = f"distill.teacher={run}"
        if not self.config.distill.trust:
            known = foreign_code(to_dict(self.config))
            refuse_foreign_code(run, named, "to run that code: distill.trust=true", known)
        config, state = stored_run(run, named)
        if config.dataset["name"] != dataset:
            raise ConfigError(f"{named} was trained on {config.dataset['name']}, but this run has dataset={dataset}")
        teacher = assemble(config)
        check_same_data(run, images_sha256(teacher.data), dataset)
        configure_torch(self.runtime)  # `assemble` has applied the settings of the teacher's run
        if (teacher.data.shape, teacher.data.classes) != (data.shape, data.classes):
            raise ConfigError(
                f"{named} has {teacher.data.classes} classes of {teacher.data.shape} images, but this run has "
                f"{data.classes} classes of {data.shape} images"
            )
        result = load_result(run)
        for text in image_warnings(result) if result else ():
            self.warn(f"{named}: {text}")
        if images and (teacher.data.mean, teacher.data.std) != (data.mean, data.std):
            theirs, ours = (f"mean {d.mean}, deviation {d.std}" for d in (teacher.data, data))
            raise ConfigError(
                f"{named} was trained on images that are normalized with {theirs}\n"
                f"this run normalizes with {ours}; use the same dataset.normalize for both"
            )
        if teacher.data.class_names != data.class_names:
            raise ConfigError(
                f"{named} was trained on the classes {', '.join(teacher.data.class_names[:4])}, ..., but this run has "
                f"the classes {', '.join(data.class_names[:4])}, ...\nthe teacher's classes must have the same order"
            )
        if images and images_sha256(teacher.data) != images_sha256(data):
            warning = (
                f"{named} {OTHER_IMAGES} of dataset={dataset}, on another split, or on images of another size than "
                "this run"
            )
            self.warn(warning)
        teacher.restore_layers(state)
        model = load_weights(teacher.install(teacher.float_model()), state, f"{named}: best.pt")
        self.warn(other_outputs(model, state.get(LAYERS, {}), f"{named}: best.pt"))
        return model


def assemble(
    config: Config, group: Group | None = None, *, planned: bool = False, stand_in: Dataset | None = None
) -> ExperimentSetup:
    """Build every part once on the CPU, to find errors before training starts.

    Args:
        group: the processes that share the run. None means that there is only one process.
        planned: whether to build published data sets without images, from their known shapes and counts. Such a setup
            cannot be used for training.
        stand_in: a data set to use instead of the configuration's, to rebuild the network of a finished run. Its images
            have the same format. Their number is not checked.

    Raises:
        ConfigError: keys or values are not valid, or contradict each other.
        Unsupported: the method does not support these options or this network.
    """
    runtime, optim, distill, layers = config.runtime, config.optim, config.distill, config.layers
    if not config.debug:
        check_starts(config.init if config.starts_from_file else None, config.distill)
    configure_torch(runtime)
    device = choose_device(runtime.device)
    data = stand_in or (build_imageless_dataset(config.dataset) if planned else None) or build_dataset(config.dataset)
    if config.debug and not stand_in:
        data = few_images(data, optim.batch_size * optim.accumulate, DEBUG_IMAGES)
    bits = config.bits.resolved()
    method = build_method(config.method, config.activation, bits)
    method.check(bits)
    check_model_keys(config.model, method)
    check_runtime(runtime, method, device, is_baseline=config.is_baseline)
    check_average(optim, method)
    policy = Policy(
        first=layers.first, last=layers.last, downsample=layers.downsample, input=layers.input,
        rules=layers.rules or {}, image_range=data.image_range,
    )  # fmt: skip
    setup = ExperimentSetup(config, data, method, policy, {}, [], device, group or Group())
    if distill.on and not distill.by_baseline:
        setup._load_teacher(images=not planned)
    check_distill(distill, method)
    check_quantizer_decay(optim, (config.method, config.activation))
    if not stand_in:
        _check_counts(setup)
    if planned and not config.starts_from_file:
        with suppress(NotImplementedError, RuntimeError):  # a user's network or method may read values
            return _checked(setup, setup.float_model("meta"))
    model = setup.float_model()
    if not stand_in:  # a network that is only loaded runs under the settings of the user's program
        check_float32(runtime)
    return _checked(setup, model, setup.load_file(model) if config.starts_from_file else None)


def _check_counts(setup: ExperimentSetup) -> None:
    """Check that the data set has enough images for the recipe."""
    config, data, optim = setup.config, setup.data, setup.optim
    check_splits(data, optim, config.dataset["name"], config.lr_search)
    if setup.epochs:
        key = "pretrain.optim" if setup.is_baseline else "optim"
        check_updates(data, optim, key, [0, *setup.method.phases(setup.epochs), setup.epochs])
    if setup.needs_baseline:
        check_updates(data, config.pretrain.optim, "pretrain.optim", [0, config.pretrain.epochs])
    check_shards(data, optim, config.batch_shards)


def _checked(setup: ExperimentSetup, model: nn.Module, weights: InitialWeights | None = None) -> ExperimentSetup:
    """Count the operations of a float network, check that the method can be installed, and return the setup."""
    name = str(setup.config.model["name"])
    if ":" in name:
        check_outputs(model, setup.data, name)
    setup._set_macs(count_macs(model, setup.data.shape))
    call_inner_layers(model)
    setup.order[:] = execution_order(model, setup._example(model))
    installed = setup.install(model)
    if weights:
        load_quantizers(installed, weights.quantizers, setup.config.init)
    if setup.method.needs_training and not setup.epochs and not fully_quantized(installed):
        raise ConfigError(f"epochs=0: {setup.method.name} quantizes its weights during training; set epochs above 0")
    return setup
