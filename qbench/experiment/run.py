"""Executes a run, from the configuration to the result."""

import copy
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from qbench.config.identity import file_sha256
from qbench.config.users_modules import keep_modules
from qbench.data.loader import Loader
from qbench.errors import CheckpointError, Diverged, Interrupted
from qbench.experiment.builders import fingerprint_sha256, images_sha256
from qbench.experiment.context import RunContext
from qbench.experiment.data_check import has_other_data, other_data_error
from qbench.experiment.device import loss_scaler, reset_peak_memory, slow_half
from qbench.experiment.earlier_run import earlier_run_warnings, refuse_replaced_files
from qbench.experiment.final_result import final_result
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.session import TrainingSession, record_failure
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.experiment.trained_network import check_quantized, other_outputs
from qbench.quant import elementwise
from qbench.quant.layers import NotFinite
from qbench.quant.method import Unsupported
from qbench.quant.ops import activation_memory
from qbench.quant.probe import Probe
from qbench.runs import manifest
from qbench.runs.directory import RunDirectory
from qbench.runs.result import BaselineResult, Evaluation, Result, load_result
from qbench.system import files
from qbench.training import optimizer
from qbench.training.checkpoint import Saved, first_nonfinite
from qbench.training.divergence import must_be_finite
from qbench.training.evaluation import evaluate, unsteady_training
from qbench.training.health import remedy
from qbench.training.initial_weights import is_intact, load_initial_weights, load_quantizers
from qbench.training.loop import train
from qbench.training.random_state import seed_everything
from qbench.training.state import State, WeightAverage
from qbench.training.task import Task

START_OVER = "to start over, delete the run's directory"
PROBE_IMAGES = 256
"""Number of training images on which methods measure statistics."""
UNSTEADY_IMAGES = 16
"""Number of images on which two training passes are compared (`unsteady_training`)."""


@keep_modules()
def run(
    planned: PlannedRun, context: RunContext | None = None, *, intact: bool = False, replace_other_data: bool = False
) -> Result:
    """Return a run's result. If no result is stored, execute the run, or continue it from its newest checkpoint.

    Args:
        intact: whether to accept a stored result only if best.pt is intact too. Pass True if another run will load
            best.pt.
        replace_other_data: whether to train again, instead of raising an error, if the images of the data set have
            changed since the result was stored.

    Raises:
        QbenchError: any class in `qbench.errors`. A run that has started keeps its directory.
    """
    context = context or RunContext()
    directory, rerun = planned.directory, planned.config.rerun
    if not context.writes:
        directory = directory.read_only()

    def stored_result() -> Result | None:
        return context.group.from_first(
            lambda: None if rerun else _stored(planned, intact, replace_other_data, context)
        )

    if stored := stored_result():
        directory.remove_checkpoints()
        return stored
    manifest.changed()  # call git before locking, because git would inherit the lock and might outlive this process
    try:
        setup = assemble(planned.config, context.group)
    except Unsupported as reason:
        with context.lock(directory):
            directory.write_config()
            return directory.finish(directory.new_result("unsupported", str(reason)))
    with context.lock(directory):
        if stored := stored_result():  # another process has finished the run
            return stored
        attempt = files.read_json(directory.path / "manifest.json") or {}
        starts_over = rerun and not (
            attempt.get("rerun") and fingerprint_sha256(attempt.get("data") or {}) == images_sha256(setup.data)
        )
        repeated = directory.has_result() or planned.config.debug or starts_over  # an earlier attempt left files
        if context.writes and repeated:
            directory.reset(whole=rerun or replace_other_data or directory.stored() is not None)
        try:
            baseline = _baseline_result(setup, context) if setup.needs_baseline else None
            if context.writes:
                context.reporter.log = directory.path / "log.txt"
            result = _train(setup, directory, baseline, context)
            return context.group.from_first(lambda: directory.finish(result))
        except (Interrupted, KeyboardInterrupt):  # the run is not finished, and the same call continues it
            raise
        except BaseException as error:
            status = "diverged" if isinstance(error, Diverged) else "failed"
            if context.writes:
                record_failure(directory, error, status, traceback.format_exc(), setup.network)
            raise
        finally:
            context.reporter.stop()
            context.reporter.log = None


def _baseline_result(setup: ExperimentSetup, context: RunContext) -> Result:
    """Return the result of the float baseline.

    With `rerun=true`, the baseline is trained again only if the images have changed.
    """
    return run(setup.baseline, context, intact=True, replace_other_data=setup.config.rerun)


def _stored(planned: PlannedRun, intact: bool, replace_other_data: bool, context: RunContext) -> Result | None:
    """Return a usable stored result, or None. With `intact`, best.pt must be intact too. Damaged files are reported.

    Raises:
        CheckpointError: the images have changed since the result was stored, and `replace_other_data` is false.
    """
    directory = planned.directory
    stored = directory.stored()
    result = load_result(directory.path)
    if directory.has_result() and (not result or result.identity != directory.identity.digest):
        why = "belongs to another run" if result else "is damaged"
        context.reporter.say(f"warning: {directory.path / 'result.json'} {why}; the run starts over")
    weights = directory.path / "best.pt"
    if stored and intact and stored.status == "done" and not is_intact(weights, directory.identity.digest):
        context.reporter.say(f"warning: {weights} is damaged or missing; the run starts over")
        return None
    if stored and has_other_data(planned, stored, context.reporter.say):
        if not replace_other_data:
            raise other_data_error([directory.path], stored.dataset)
        context.reporter.say(
            f"warning: the images have changed since {directory.path} was trained; the run starts over"
        )
        return None
    return stored


def _train(setup: ExperimentSetup, directory: RunDirectory, baseline: Result | None, context: RunContext) -> Result:
    """Train, evaluate and verify one run in its locked directory. Return the result."""
    directory.write_config()
    loader, reporter = setup.loader(), context.reporter
    if setup.data.note:
        reporter.say(f"warning: {setup.data.note}")
    if reason := slow_half(setup.runtime, setup.device):
        reporter.say(f"warning: runtime.precision={setup.runtime.precision} is slower than fp32 here: {reason}")
    data_sha256 = images_sha256(setup.data)
    reset_peak_memory(setup.device)
    session = TrainingSession(
        directory, context, setup.runtime, setup.title, setup.hyperparameters, setup.texts, data_sha256, setup.layers
    )
    if context.writes:
        _write_manifest(setup, directory, session)
    state = None
    try:
        baseline_path = Path(baseline.run) if baseline else None
        method = setup.with_teacher(baseline_path)
        model, compared = _initial_model(setup, baseline, loader, session)
        refuse_replaced_files(setup, directory.identity)
        probe = Probe(list(loader.sample("train", PROBE_IMAGES)), F.cross_entropy)
        if method.prepare and not session.saved:
            method.prepare(model, probe)
        task = Task(
            model=model, method=method, optim=setup.optim, epochs=setup.epochs, steps=loader.steps,
            train=loader.train, validate=lambda: context.evaluation_batches(loader, "val"), probe=probe,
            forward=setup.forward(model), classes=setup.data.classes,
            chance=setup.data.train.labels.bincount().max().item() / len(setup.data.train), shards=setup.shards,
        )  # fmt: skip
        state = _state(task, loss_scaler(setup.runtime, setup.device), session.saved, setup.seed)
        if setup.epochs and (unsteady := unsteady_training(model, probe.batches[0][0][:UNSTEADY_IMAGES])):
            setup.warnings.append(unsteady)
        anomalies = torch.is_anomaly_enabled() or setup.config.debug
        with activation_memory(setup.runtime.activation_memory), torch.autograd.set_detect_anomaly(anomalies):
            train(task, state, session.watch(task, state, loader.batch_size))
        reporter.stop()
        return final_result(setup, task, state, loader, session, compared)
    except NotFinite as error:
        raise Diverged(f"{error}; {remedy(state is not None and state.step > 0)}") from None
    finally:
        session.logger.abandon()


def _write_manifest(setup: ExperimentSetup, directory: RunDirectory, session: TrainingSession) -> None:
    """Write the manifest. Warn if other code, another version of torch or another device saved the checkpoint."""
    path, resumed = directory.path / "manifest.json", session.saved is not None
    # the same command with rerun=true has continued the run
    advice = START_OVER if setup.config.rerun else "to start over, add rerun=true"
    for change in manifest.changed_since(path, setup.device.type) if resumed else ():
        session.context.reporter.say(f"warning: the run began with {change}; {advice}")
    manifest.write(
        path,
        numerics=directory.identity.keys["runtime"],
        speed={
            "activation_memory": setup.runtime.activation_memory,
            "compiled_quantizers": setup.device.type == "cpu" and elementwise.available(),
        },
        device=setup.device,
        data=setup.data.fingerprint(),
        resumed=resumed,
        rerun=setup.config.rerun,
        processes=session.context.group.size,
    )
    if len(devices := manifest.devices(path)) > 1:
        setup.warnings.append(
            f"the run was trained on {', then on '.join(devices)}: another device gives other last bits"
        )


def _initial_model(
    setup: ExperimentSetup, baseline: Result | None, loader: Loader, session: TrainingSession
) -> tuple[nn.Module, BaselineResult | None]:
    """Return the quantized network on its device, and the float baseline with which the network is compared.

    Initial weights are loaded if no checkpoint exists. If the initial weights come from a file, the float network in
    this file is the baseline. The baseline is evaluated before the network is quantized.
    """
    model, compared = setup.float_model(), None
    if setup.config.starts_from_file:
        weights = setup.load_file(model)
        session.context.reporter.say(weights.message)
        setup.notes.append(weights.message)
        setup.warnings.extend(earlier_run_warnings(setup, session.directory.identity, weights.layers))
        if weights.unused:
            setup.warnings.append(f"init={setup.config.init} also contains {', '.join(weights.unused)}, not used here")
        if weights.is_float:
            compared = _file_baseline(setup, model, loader, session.context)
        setup.restore_layers(session.saved or {})
        load_quantizers(setup.install(model), weights.quantizers, setup.config.init)
        return model.to(setup.device), compared
    if baseline is not None and baseline.final is not None:
        present = BaselineResult(run=baseline.run, final=baseline.final, best=baseline.best)
        compared = session.baseline = _baseline_at_start(setup, present, session.baseline)
        if setup.starts_from_baseline:
            weights = load_initial_weights(model, Path(baseline.run), setup.baseline.identity.digest)
            setup.warn(other_outputs(model, weights.layers, f"float baseline {baseline.run}: best.pt"))
            if not session.saved:
                session.context.reporter.say(weights.message)
                setup.find_layers(model)
    setup.restore_layers(session.saved or {})
    return setup.install(model).to(setup.device), compared


def _baseline_at_start(setup: ExperimentSetup, present: BaselineResult, saved: BaselineResult | None) -> BaselineResult:
    """Return the float baseline as it was when the run started. Warn if it has been trained again since then.

    `saved` comes from the checkpoint. It is None for a new run, and in checkpoints of earlier versions.
    """
    started = replace(saved or present, run=present.run)  # the directory may have been moved
    if started != present:
        teacher = ", but the teacher has the new weights" if setup.config.distill.by_baseline else ""
        setup.warn(
            f"the float baseline {present.run} was trained again, with another outcome, after this run had started; "
            f"this run is compared with the earlier outcome{teacher}"
        )
    return started


def _file_baseline(setup: ExperimentSetup, model: nn.Module, loader: Loader, context: RunContext) -> BaselineResult:
    """Evaluate the float network of a checkpoint file on both splits."""
    network = copy.deepcopy(model).to(setup.device)
    forward = setup.forward(network)
    val, test = (
        evaluate(network, context.evaluation_batches(loader, split), forward, group=context.group)
        for split in ("val", "test")
    )
    assert test is not None  # `check_splits` refuses an empty test split
    path = setup.config.init
    return BaselineResult(run=path, final=Evaluation(test=test, val=val), sha256=file_sha256("init", path))


def _state(task: Task, scaler: torch.amp.GradScaler | None, saved: Saved | None, seed: int) -> State:
    """Return the training state, which is new or restored from a checkpoint."""
    average = WeightAverage(task.model, task.optim.ema) if task.optim.ema is not None else None
    if not saved:
        state = State(optimizer.build_optimizer(task.model, task.optim), average, scaler)
        seed_everything(seed)
        return state
    check_quantized(task.model, saved, "cannot continue")
    try:
        trainable = set(saved["state"]["trainable"])
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        state = State(optimizer.build_optimizer(task.model, task.optim), average, scaler)
        state.load(task.model, saved["state"])
    except Exception as error:  # the digest matches, so the file is intact, but its content does not fit
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"cannot continue, because the checkpoint does not fit this run: {why}\n{START_OVER}"
        ) from error
    if bad := first_nonfinite(must_be_finite(task.model)):
        raise CheckpointError(f"cannot continue, because the checkpoint contains inf or nan: {bad}\n{START_OVER}")
    return state
