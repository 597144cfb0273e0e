"""Names configuration keys that a run has ignored, because its method, network or optimizer does not use them.

Such keys are not errors, because all runs of a sweep over methods or networks have the same keys.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from qbench.bits import FLOAT
from qbench.config import registry
from qbench.config.schema import Layers, Optim
from qbench.experiment.builders import create_method
from qbench.experiment.setup import ExperimentSetup
from qbench.models.normalization import batch_norms
from qbench.quant.layers import is_quantizer_key, quantized_layers
from qbench.training.optimizer import layer_biases, parameter_groups

SLOT_NAMES = {"w": "weights", "a": "activations", "g": "gradients"}

BN_MOMENTUM = 0.1
"""Default value of `model.bn_momentum`."""


def unused_keys(setup: ExperimentSetup, model: nn.Module) -> list[str]:
    """Return a warning for each key that differs from its default value and had no effect on the run.

    If nothing was trained, the keys of `optim` are not named.

    Args:
        setup: the setup of the run.
        model: the trained network, with its quantizers.
    """
    found = [*_model_keys(setup, model), *_layer_keys(setup), *_method_keys(setup, model)]
    trained, typed = setup.config.pretrain.epochs, not setup.config.debug  # debug=true sets this key itself
    pretrains = setup.needs_baseline or setup.is_baseline
    if typed and not pretrains and trained != _recipe(setup).get("pretrain", trained):
        found.append((f"pretrain.epochs={trained}", "no float baseline is trained"))
    if setup.runtime.tf32 and setup.device.type != "cuda":
        found.append(("runtime.tf32=true", "the run is not on a GPU"))
    if setup.epochs and setup.config.distill.on and not setup.config.distill.weight:
        found.append((f"distill={setup.config.distill.name}", "distill.weight is 0"))
    if setup.epochs:
        prefix = "pretrain.optim" if setup.is_baseline else "optim"
        found += [(f"{prefix}.{key}", why) for key, why in _optim_keys(setup, model)]
    return [*(f"{key} has no effect, because {why}" for key, why in found), *_trained_weights(setup)]


def _trained_weights(setup: ExperimentSetup) -> Iterator[str]:
    """Yield a warning if the weight method alone would train nothing, but the activation method needs training."""
    config = setup.config
    if config.activation["name"] == "none" or not setup.epochs:
        return
    if not create_method(config.method, setup.method.bits._replace(a=FLOAT), "method").needs_training:
        name, other = config.method["name"], config.activation["name"]
        yield f"the weights of method={name} are trained, because activation={other} must be trained"


def _recipe(setup: ExperimentSetup) -> Mapping[str, object]:
    """Return the data set's own numbers of epochs and learning rates, which are the defaults of a configuration."""
    recipe = setup.config.dataset.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def replaced_widths(setup: ExperimentSetup, model: nn.Module) -> list[str]:
    """Return a warning for each width of `bits` that no layer has, because the layer policy sets other widths.

    Tables show the widths of `bits`, so a reader would take them for the widths of the layers.
    """
    warnings = []
    for slot, name in SLOT_NAMES.items():
        width = getattr(setup.method.bits, slot)
        found = sorted({getattr(layer.bits, slot) for layer in quantized_layers(model).values()} - {FLOAT})
        widths = ", ".join(map(str, found))
        if found and width == FLOAT and slot != "g":
            warnings.append(f"tables show bits.{slot}={FLOAT}, but layers.* sets the {name} of layers to {widths} bits")
        elif found and width not in found:
            warnings.append(f"no layer has bits.{slot}={width}, because layers.* sets the {name} to {widths} bits")
        elif not found and width < FLOAT:
            warnings.append(f"tables show bits.{slot}={width}, but no layer has quantized {name}")
    return warnings


def _model_keys(setup: ExperimentSetup, model: nn.Module) -> Iterator[tuple[str, str]]:
    momentum = setup.config.model.get("bn_momentum", BN_MOMENTUM)
    if momentum != BN_MOMENTUM and not batch_norms(model):
        yield f"model.bn_momentum={momentum}", "the network has no batch normalization"


def _method_keys(setup: ExperimentSetup, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (key=value, reason) for each option without effect on this network.

    Such an option concerns only a slot (weights, ...) that stays in float, or only layers that the network lacks.
    """
    config, bits = setup.config, setup.method.bits
    layers = quantized_layers(model).values()
    quantized = {slot: any(getattr(layer.bits, slot) < FLOAT for layer in layers) for slot in SLOT_NAMES}
    methods = {"method": (config.method, bits, quantized)}
    if config.activation["name"] != "none":
        methods["method"] = (config.method, bits._replace(a=FLOAT), quantized | {"a": False})
        methods["activation"] = (config.activation, bits._replace(w=FLOAT), quantized | {"w": False})
    for group, (node, widths, used) in methods.items():
        usual = registry.defaults("method", str(node["name"]))
        method = create_method(node, widths, group)
        reasons = dict(method.unused_options(model))
        for option, slot in method.option_slots.items():
            if not used[slot]:
                reasons[option] = f"{node['name']} quantizes no {SLOT_NAMES[slot]} here"
        for option, why in reasons.items():
            value = node.get(option)
            if value != usual.get(option, value):
                typed = str(value).lower() if isinstance(value, bool) else value
                yield f"{group}.{option}={typed}", why


def _layer_keys(setup: ExperimentSetup) -> Iterator[tuple[str, str]]:
    """Yield (key=value, reason) for each rule without effect, because earlier rules match all layers of the rule."""
    order = setup.order
    ruled: dict[str, str] = {}  # layer -> the first rule that matches it
    for pattern, width in setup.policy.rules.items():
        names = [name for name in order if fnmatchcase(name, pattern)]
        if ruled and names and ruled.keys() >= set(names):
            yield f"layers.rules[{pattern}]={width}", f"the earlier rule {ruled[names[0]]} matches its layers"
        for name in names:
            ruled.setdefault(name, pattern)
    for key, name in (("first", order[0]), ("last", order[-1])) if order else ():
        width = getattr(setup.policy, key)
        if width != getattr(Layers, key) and name in ruled:
            yield f"layers.{key}={width}", f"the rule {ruled[name]} matches the layer {name}"


def _optim_keys(setup: ExperimentSetup, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (key=value, reason) for the keys of the optimizer and its schedule."""
    optim, usual = setup.optim, Optim(lr=setup.optim.lr)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    learned = any(is_quantizer_key(name, model) for name in trained)
    decays = any(group["weight_decay"] for group in parameter_groups(model, optim))
    own_loss = f"{setup.method_name} has its own loss"
    not_sgd = optim.name != "sgd" and f"it is a key of sgd, and optim.name is {optim.name}"
    not_step = optim.schedule != "step" and f"it is a key of the schedule step, and optim.schedule is {optim.schedule}"
    reasons = {
        "quantizer_lr": not learned and f"the quantizers of {setup.method_name} have no learned parameters",
        "quantizer_decay": not learned and f"the quantizers of {setup.method_name} have no learned parameters",
        "bias_lr": not _has_layer_biases(model) and "no layer has a bias that is trained",
        "decay_norm_and_bias": _why_no_decay(optim, model),
        "decay_until": not decays and "the weight decay is 0",
        "momentum": not_sgd,
        "nesterov": not_sgd,
        "eps": optim.name == "sgd" and "sgd has no such key",
        "patience": (optim.patience or 0) >= setup.epochs - 1 and f"the run has {setup.epochs} epochs",
        "milestones": not_step,
        "factors": not_step,
        "gamma": not_step or (optim.factors and "optim.factors replaces it"),
        "label_smoothing": setup.method.loss is not None and own_loss,
    }
    for key, why in reasons.items():
        if why and getattr(optim, key) != getattr(usual, key):
            yield f"{key}={getattr(optim, key)}", why


def _has_layer_biases(model: nn.Module) -> bool:
    return any(bias.requires_grad for module in model.modules() for bias in layer_biases(module))


def _why_no_decay(optim: Optim, model: nn.Module) -> str:
    """Return the reason why `decay_norm_and_bias` has no effect, or an empty text."""
    if not optim.weight_decay:
        return "the weight decay is 0"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    small = any(p.dim() < 2 and not is_quantizer_key(name, model) for name, p in trained)
    return "" if small else "the network has no biases and no batch normalization that are trained"
