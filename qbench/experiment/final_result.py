"""Ends a run: evaluates the network, verifies the levels, writes the weights, and returns the result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, LevelCount
from qbench.cost.count import count_cost, coverage, idle_layers, storage, values_outside, wide_codes
from qbench.data.dataset_check import dataset_notes
from qbench.data.loader import Loader
from qbench.errors import CheckpointError, Diverged
from qbench.experiment.builders import images_sha256
from qbench.experiment.evidence import evidence_warnings
from qbench.experiment.session import TrainingSession
from qbench.experiment.setup import ExperimentSetup
from qbench.experiment.trained_network import LAYERS, example_outputs, load_weights
from qbench.experiment.unused_keys import replaced_widths, unused_keys
from qbench.quant.layers import effective_weight, fully_quantized, quantized_layers, reports
from qbench.quant.verify import NotQuantized, negatives_warning, verify
from qbench.runs import manifest
from qbench.runs.result import BaselineResult, Evaluation, Result, short_commit
from qbench.runs.tensorboard import levels_figure
from qbench.runs.tensorboard_tags import QUANT
from qbench.training.checkpoint import cpu_copy
from qbench.training.digests import weights_sha256
from qbench.training.evaluation import evaluate, outputs_of_activation, state_outside, unsteady_evaluation
from qbench.training.health import remedy
from qbench.training.state import State, evaluated_weights
from qbench.training.task import Task

TENSORS = {"w": "weights", "a": "activations", "g": "gradients"}

VERIFIED_IMAGES = 64
"""Number of training images on which the levels of activations and gradients are verified."""


def final_result(
    setup: ExperimentSetup,
    task: Task,
    state: State,
    loader: Loader,
    session: TrainingSession,
    baseline: BaselineResult | None,
) -> Result:
    """Evaluate and verify a trained network, write the weights, and return the result.

    Raises:
        NotQuantized: some weights of quantized layers are still float, or some values are not on the declared levels.
    """
    model = task.model
    with evaluated_weights(model, state):
        last = cpu_copy(model.state_dict())
    best_weights = state.best.model if state.best else last
    state_sha256 = state.digest(model)
    images_format = setup.layers(model)["input"]
    best = _evaluate(task, best_weights, state.best.epoch, loader, session) if state.best else None
    best_outputs = example_outputs(model, images_format) if best else None
    answers: list[Tensor] = []
    final = _evaluate(task, last, state.epoch - 1 if state.epoch else None, loader, session, answers)
    last_outputs = example_outputs(model, images_format)
    if not fully_quantized(model):
        raise NotQuantized("some weights are still float after the last epoch")
    images = next(iter(loader.sample("train", VERIFIED_IMAGES)))[0]
    verified = verify(model, images)
    session.write_predictions(torch.cat(answers))
    session.write_weights("last.pt", last, model, last_outputs)
    session.write_weights("best.pt", best_weights, model, best_outputs if best else last_outputs)
    commits = manifest.code_versions(session.directory.path / "manifest.json")
    notes = [
        *_baseline_note(baseline),
        *_stop_note(setup, state),
        *filter(None, [wide_codes(model)]),
        *setup.notes,
        *_notes(setup, verified),
        *_commit_notes(commits),
    ]
    float_evaluation = final if setup.is_baseline else baseline.final if baseline else None
    evidence = evidence_warnings(setup, float_evaluation, state.step)
    warnings = [*_debug_warning(setup, state.step), *_start_warning(setup, baseline, state.step), *evidence]
    warnings += [*setup.warnings, *_batch_warning(setup, loader)]
    warnings += [*_warnings(setup, model, images), *_level_warnings(model, verified)]
    warnings += [*session.monitor.warned.values(), *unused_keys(setup, model)]
    result = replace(
        session.directory.new_result("done"),
        network=setup.network, synthetic=setup.data.synthetic, final=final, best=best, verified=verified,
        levels=_levels(model, verified, setup.method.bits.w), baseline=baseline,
        data_sha256=images_sha256(setup.data), cost=count_cost(model, setup.macs),
        speed=session.speed(setup.device, state.epoch), quantizers=reports(model), card=setup.card,
        protocol_changes=setup.protocol_changes, weights_sha256=weights_sha256(last), state_sha256=state_sha256,
        wall_seconds=session.wall_seconds, commits=commits, notes=notes, warnings=warnings,
    )  # fmt: skip
    _log_final(model, state, session, final)
    session.logger.close()
    return result


def _levels(model: nn.Module, verified: Mapping[str, Mapping[str, LevelCount]], width: int) -> int | None:
    """Return the largest number of weight levels that a layer allows, or None if no weights are quantized.

    If some layers have the method's width, only these layers are considered.
    """
    layers = quantized_layers(model)
    allowed = {name: counts["w"].allowed for name, counts in verified.items() if "w" in counts}
    at_width = [count for name, count in allowed.items() if layers[name].bits.w == width]
    return max(at_width or allowed.values(), default=None)


def _level_warnings(model: nn.Module, verified: Mapping[str, Mapping[str, LevelCount]]) -> list[str]:
    """Return a warning for each tensor with more levels than its declared storage or its width allows.

    The size of the network and the number of operations are computed from the storage and from the widths.
    """
    found: dict[str, list[str]] = {}
    for name, layer in quantized_layers(model).items():
        for key, count in verified.get(name, {}).items():
            width = storage(layer).code_bits if key == "w" else getattr(layer.bits, key)
            spare = 0 if key == "w" else 1  # a symmetric grid with zero has one level more or less
            if count.allowed > 2**width + spare:
                what = f"bytes(w) declares codes of {width} bits" if key == "w" else f"bits.{key} is {width}"
                text = f"{TENSORS[key]} have {count.allowed} levels, but {what}, which is enough for {2**width}"
                found.setdefault(text, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more layers' if names[1:] else ''}: {text}; sizes and BitOps are too small"
        for text, names in found.items()
    ]


def _start_warning(setup: ExperimentSetup, baseline: BaselineResult | None, steps: int) -> list[str]:
    """Return a warning if nothing was trained and `diff` is not the effect of quantization, or an empty list.

    A run starts from the float baseline's weights with the best validation accuracy, but the tables show the accuracy
    of the baseline after its last epoch.
    """
    if steps or not setup.starts_from_baseline or baseline is None or baseline.best is None:
        return []
    if baseline.best.test.top1 == baseline.final.test.top1:
        return []
    return [
        "nothing was trained, and the run started from the weights of the float baseline with the best validation "
        f"accuracy, whose test top-1 is {baseline.best.test.top1:.2f} %; float and diff refer to the weights after its "
        "last epoch"
    ]


def _batch_warning(setup: ExperimentSetup, loader: Loader) -> list[str]:
    """Return a warning if the batch size is larger than the training split, or an empty list."""
    size = setup.optim.batch_size
    if not setup.epochs or loader.batch_size >= size:
        return []
    return [f"the batch size was {loader.batch_size}, the number of training images, instead of {size}"]


def _debug_warning(setup: ExperimentSetup, steps: int) -> list[str]:
    """Return a warning that the accuracy of a debug run means nothing. Other runs have no such warning."""
    if not setup.config.debug:
        return []
    done = f"trained on {len(setup.data.train)} images in one step" if steps else "nothing was trained"
    return [f"debug=true: {done}; the accuracy means nothing"]


def _stop_note(setup: ExperimentSetup, state: State) -> list[str]:
    """Return a note if `optim.patience` stopped the training early, or an empty list."""
    if not state.stopped or state.epoch >= setup.epochs:
        return []
    prefix = "pretrain." if setup.is_baseline else ""
    return [
        f"{prefix}optim.patience={setup.optim.patience} stopped training after {state.epoch} of {setup.epochs} epochs"
    ]


def _baseline_note(baseline: BaselineResult | None) -> list[str]:
    """Return a note that names the checkpoint file, if the float baseline comes from a file."""
    if baseline is None or baseline.sha256 is None:
        return []
    return [f"float: the network of {baseline.run}, sha256 {baseline.sha256[:12]}"]


def _notes(setup: ExperimentSetup, verified: Mapping[str, object]) -> list[str]:
    """Return the notes to show with the run's row."""
    bits, supported = setup.method.bits, setup.method.supported_bits
    if setup.is_baseline:
        return [
            "trained with pretrain.epochs and pretrain.optim; epochs, optim, layers and distill apply to runs that "
            "start from this baseline"
        ]
    if not verified:
        return ["nothing quantized"]
    notes = [f"{setup.method.name}: {change}" for change in setup.protocol_changes]
    if bits.w < FLOAT and bits.a == FLOAT and bits.w in supported.get("a", ()):
        both = f"bits=w{bits.w}a{bits.w}"
        notes.append(
            f"activations are float; 2-bit networks in papers usually have {both}"
            if bits.w == 2
            else f"activations are float; to quantize them too: {both}"
        )
    return notes


def _warnings(setup: ExperimentSetup, model: nn.Module, images: Tensor) -> list[str]:
    """Return warnings about properties of data and network that make the accuracy or the size misleading."""
    warnings = [*dataset_notes(setup.data), *replaced_widths(setup, model)]
    untrained = setup.float_model()
    same = _share_of_equal_weights(untrained, setup.float_model(seed=setup.seed + 1))
    if unsteady := unsteady_evaluation(model, images):
        warnings.append(unsteady)
    else:
        warnings += _reload_warnings(setup, model, untrained, images)
    if same > MOSTLY:
        share = "the" if same == 1 else f"{100 * same:.0f} % of the"
        warnings.append(
            f"{share} initial weights are the same for every seed (the network's function loads weights or sets its "
            "own seed), so seeds differ less than with random weights"
        )
    if kind := outputs_of_activation(model, images):
        warnings.append(f"the network returns {kind}; the loss treats them as logits and applies softmax")
    warnings += idle_layers(model, setup.macs, images)
    warnings += filter(None, (coverage(model, setup.macs), values_outside(model, images[:1])))
    return [*warnings, *filter(None, [negatives_warning(model, images)])]


def _reload_warnings(setup: ExperimentSetup, model: nn.Module, untrained: nn.Module, images: Tensor) -> list[str]:
    """Return a warning if a new network with the state_dict of the trained network has different outputs.

    The new network is made by replacing the layers of the float network `untrained`.
    """
    network = setup.install(untrained).to(setup.device)
    stored = {"model": model.state_dict(), LAYERS: setup.layers(model)}
    try:
        outside = state_outside(model, load_weights(network, stored, "last.pt"), images)
    except CheckpointError as error:
        return [str(error)]
    return [outside] if outside else []


MOSTLY = 0.5
"""A warning is given if more than this share of the initial weights does not depend on the seed."""


def _share_of_equal_weights(first: nn.Module, second: nn.Module) -> float:
    """Return the share of weights in tensors that are equal in two networks. Constant tensors are not compared."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    random = [(one, other) for one, other in pairs if one.dim() > 1 and one.min() < one.max()]
    equal = sum(one.numel() for one, other in random if torch.equal(one, other))
    return equal / max(sum(one.numel() for one, _ in random), 1)


def _commit_notes(commits: Sequence[str]) -> list[str]:
    """Return a note if several commits of qbench trained the run."""
    return [f"trained by several commits of qbench: {', '.join(map(short_commit, commits))}"] if commits[1:] else []


def _evaluate(
    task: Task,
    weights: dict[str, Tensor],
    epoch: int | None,
    loader: Loader,
    session: TrainingSession,
    answers: list[Tensor] | None = None,
) -> Evaluation:
    """Evaluate weights on the validation and test splits. Append test labels and predictions to `answers`.

    Raises:
        Diverged: the loss is not finite.
    """
    task.model.load_state_dict(weights)
    context = session.context
    val, test = (context.evaluation_batches(loader, split) for split in ("val", "test"))
    validated = evaluate(task.model, val, task.logits, group=context.group)
    tested = evaluate(task.model, test, task.logits, answers, context.group)
    assert tested is not None  # `check_splits` refuses an empty test split
    if not all(isfinite(part.loss) for part in (tested, validated) if part):
        raise Diverged(
            f"the network's outputs on the test or validation images are not finite; {remedy(epoch is not None)}"
        )
    return Evaluation(test=tested, val=validated, epoch=epoch)


def _log_final(model: nn.Module, state: State, session: TrainingSession, final: Evaluation) -> None:
    """Write the final record. For TensorBoard, also write the figure of levels."""
    splits = {"val": final.val, "test": final.test}
    metrics = {f"{split}_{key}": x for split, part in splits.items() if part for key, x in asdict(part).items()}
    session.logger.record("final", state.step, metrics)
    if session.runtime.tensorboard and (figure := levels_figure(_quantized_weights(model))) is not None:
        session.logger.figure(state.step, f"{QUANT}levels", figure)
    session.logger.end()


def _quantized_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a map from each layer with quantized weights to its latent and its quantized weights."""
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.bits.w < FLOAT}
    return {name: (layer.weight, effective_weight(layer)) for name, layer in layers.items()}
