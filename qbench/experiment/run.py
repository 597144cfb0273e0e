"""A run, from its configuration to its result: the main path."""

import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, LevelCount
from qbench.config.identity import digest
from qbench.config.schema import Config
from qbench.cost.count import count_cost
from qbench.data.dataset import Loader
from qbench.errors import CheckpointError, Diverged, Interrupted
from qbench.experiment.session import RunContext, TrainingSession, record_failure
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.quant.layers import NotFinite, fully_quantized, quantized_layers, reports
from qbench.quant.method import Unsupported
from qbench.quant.ops import compress_activations
from qbench.quant.probe import Probe
from qbench.quant.verify import NotQuantized, verify
from qbench.runs import manifest
from qbench.runs.directory import RunDirectory
from qbench.runs.result import BaselineResult, Evaluation, Result, load_result
from qbench.runs.tensorboard import levels_figure
from qbench.training import optimizer as optim
from qbench.training.checkpoint import cpu_copy, first_nonfinite, weights_sha256
from qbench.training.divergence import must_be_finite
from qbench.training.evaluation import evaluate
from qbench.training.initial_weights import is_intact, load_initial_weights
from qbench.training.loop import train
from qbench.training.random_state import seed_everything
from qbench.training.state import State, WeightAverage, evaluated_weights
from qbench.training.task import Task

PROBE_IMAGES = 256


def run(config: Config, desk: RunContext | None = None, *, intact: bool = False) -> Result:
    """Return the result of a configuration: the stored one, else by doing the work, or what is left of it.

    Args:
        intact: a stored result counts only if its best.pt verifies too, since somebody wants to start from it.

    Raises:
        QbenchError: of the kind that `qbench.errors` names. A run that had begun keeps its directory.
    """
    desk = desk or RunContext()
    directory = RunDirectory(config)
    if not config.rerun and (stored := _stored(directory, intact, desk)):
        directory.remove_checkpoints()
        return stored
    manifest.changed()  # asks git now: started while a lock is held, it could hold that longer than we live
    try:
        parts = assemble(config)
    except Unsupported as reason:
        with directory.lock(desk.waiting(directory.path)):
            directory.write_config()
            return directory.finish(directory.new_result("unsupported", reason=str(reason)))
    with directory.lock(desk.waiting(directory.path)):
        if not config.rerun and (stored := _stored(directory, intact, desk)):  # another process finished it meanwhile
            return stored
        if directory.has_result():  # done, and wanted anew; or failed, and tried again from its last checkpoint
            directory.reset(whole=config.rerun or directory.stored() is not None)
        try:
            parent, start = _start(parts, desk)
            desk.screen.log = directory.path / "log.txt"
            return directory.finish(_work(parts, directory, parent, start, desk))
        except Interrupted:
            raise
        except BaseException as error:
            status = "diverged" if isinstance(error, Diverged) else "failed"
            record_failure(directory, error, status, traceback.format_exc())
            raise
        finally:
            desk.screen.stop()
            desk.screen.log = None


def _stored(directory: RunDirectory, intact: bool, desk: RunContext) -> Result | None:
    """Return the stored result; with `intact` only if the weights beside it verify. Say what is damaged."""
    stored = directory.stored()
    found = load_result(directory.path)
    if directory.has_result() and (not found or found.identity != digest(directory.identity)):
        what = "belongs to another run" if found else "is damaged"
        desk.screen.say(f"warning: {directory.path / 'result.json'} {what}; the run is done anew")
    if stored and intact and stored.status == "done" and not is_intact(directory.path / "best.pt", directory.identity):
        desk.screen.say(f"warning: {directory.path / 'best.pt'} is damaged or gone; the run is done anew")
        return None
    return stored


def _start(parts: ExperimentSetup, desk: RunContext) -> tuple[Result | None, Path | None]:
    """Return the float parent's result and the path of the weights to start from; train the parent if need be.

    A method that starts from scratch is compared with the parent, and a teacher may be the parent.
    """
    config = parts.config
    taught = config.distill.on and config.distill.teacher == "baseline"
    wanted = config.init in ("float", "method") or taught
    parent = run(parts.parent, desk, intact=True) if wanted else None
    if config.init in ("scratch", "method"):
        return parent, None
    return parent, Path(parent.run) if parent and config.init == "float" else Path(config.init)


def _work(
    parts: ExperimentSetup, directory: RunDirectory, parent: Result | None, start: Path | None, desk: RunContext
) -> Result:
    """Train, evaluate and verify one run in its directory; return the result."""
    config = parts.config
    directory.write_config()
    loader = Loader(parts.data, config.optim.batch_size, config.seed, parts.device, config.runtime.num_workers)
    if loader.batch_size < config.optim.batch_size:
        desk.screen.say(f"optim.batch_size={config.optim.batch_size}: there are {loader.batch_size} training images")
    manifest.write(
        directory.path / "manifest.json",
        numerics=config.runtime.numerics(),
        device=parts.device,
        data=parts.data.fingerprint(),
    )
    session = TrainingSession(directory, desk, config.runtime.tensorboard)
    try:
        method = parts.with_teacher(Path(parent.run) if parent else None)
        model = parts.float_model()
        if start and not session.saved:
            own = parent is not None and config.init == "float"
            desk.screen.say(load_initial_weights(model, start, digest(parts.parent.identity()) if own else None))
        model = parts.install(model).to(parts.device)
        probe = Probe(list(loader.unaugmented("train", PROBE_IMAGES)), F.cross_entropy)
        if method.prepare and not session.saved:
            method.prepare(model, probe)
        task = Task(
            model=model, method=method, optim=config.optim, epochs=parts.epochs, steps=loader.steps,
            train=loader.train, validate=lambda: desk.checked(loader.unaugmented("val")), probe=probe,
            forward=parts.forward(model), classes=parts.data.classes,
        )  # fmt: skip
        state = _state(task, session.saved, config.seed)
        with compress_activations(config.runtime.compress_activations):
            train(task, state, session.watch(task, state, loader.batch_size))
        desk.screen.stop()
        return _conclude(parts, task, state, loader, session, parent)
    except NotFinite as error:
        raise Diverged(f"{error}; try a lower optim.lr") from None
    finally:
        session.book.abandon()


def _state(task: Task, saved: dict[str, Any] | None, seed: int) -> State:
    """Return the state to train from: a new one, or a saved one with model, optimizer and random numbers in place."""
    average = WeightAverage(task.model, task.optim.ema) if task.optim.ema is not None else None
    if not saved:
        state = State(optim.build_optimizer(task.model, task.optim), average)
        seed_everything(seed)
        return state
    try:
        names = set(saved["state"]["trainable"])
        for name, p in task.model.named_parameters():
            p.requires_grad_(name in names)
        state = State(optim.build_optimizer(task.model, task.optim), average)
        state.load(task.model, saved["state"])
    except Exception as error:  # its digest is right, so somebody wrote it so
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"the checkpoint to go on from does not fit: {why}\nbegin anew: rerun=true") from error
    if bad := first_nonfinite(must_be_finite(task.model)):
        raise CheckpointError(f"the checkpoint to go on from holds inf or nan: {bad}\nbegin anew: rerun=true")
    return state


def _conclude(
    parts: ExperimentSetup, task: Task, state: State, loader: Loader, session: TrainingSession, parent: Result | None
) -> Result:
    """Evaluate on the test split, verify, publish the weights, and return the result."""
    model = task.model
    with evaluated_weights(model, state):
        last = cpu_copy(model.state_dict())
    best_weights = state.best.model if state.best else last
    ended = state.digest(model)
    best = _measure(task, best_weights, state.best.epoch, loader, session) if state.best else None
    answers: list[Tensor] = []
    final = _measure(task, last, state.epoch - 1 if state.epoch else None, loader, session, answers)
    if not fully_quantized(model):
        raise NotQuantized("after the last epoch some weights are still float")
    verified = verify(model, next(iter(loader.unaugmented("train", 64)))[0])
    session.predictions(torch.cat(answers))
    session.write_artifact("last.pt", last)
    session.write_artifact("best.pt", best_weights)
    result = session.directory.new_result(
        "done", network=parts.network, synthetic=parts.data.synthetic, final=final, best=best, verified=verified,
        levels=_levels(model, verified, parts.method.bits.w),
        baseline=_baseline(parent), data_sha256=digest(parts.data.fingerprint()),
        cost=count_cost(model, parts.macs), speed=session.speed(parts.device, state.epoch),
        quantizers=reports(model), card=parts.card, protocol_changes=parts.protocol_changes,
        weights_sha256=weights_sha256(last), state_sha256=ended, wall_seconds=session.wall_seconds,
        notes=[*_hints(parts, verified), *session.lookout.warned.values()],
    )  # fmt: skip
    _show(model, state, session, result)
    session.book.close()
    return result


def _baseline(parent: Result | None) -> BaselineResult | None:
    if parent is None or parent.final is None:
        return None
    return BaselineResult(run=parent.run, final=parent.final, best=parent.best)


def _levels(model: nn.Module, verified: Mapping[str, Mapping[str, LevelCount]], width: int) -> int | None:
    """Return the levels that the weights of the method's own width may take, not those of layers with another one."""
    layers = quantized_layers(model)
    counts = {name: found["w"].allowed for name, found in verified.items() if "w" in found}
    own = [count for name, count in counts.items() if layers[name].bits.w == width]
    return max(own or counts.values(), default=None)


def _hints(parts: ExperimentSetup, verified: Mapping[str, object]) -> list[str]:
    """Return what a reader of the row should bear in mind."""
    bits, legal = parts.method.bits, parts.method.supported_bits
    asks = [f"{parts.method.name}: {ask}" for ask in parts.protocol_changes]
    if parts.config.is_parent:
        return ["trained by pretrain.epochs and pretrain.optim; epochs and optim are for what starts from it"]
    if not verified:
        return ["nothing quantized"]
    if bits.w < FLOAT and bits.a == FLOAT and bits.w in legal.get("a", ()):
        both = f"bits=w{bits.w}a{bits.w}"
        asks.append(
            f"activations float; papers' 2-bit nets are usually {both}"
            if bits.w == 2
            else f"activations float; {both} quantizes them too"
        )
    return asks


def _measure(
    task: Task,
    weights: dict[str, Tensor],
    epoch: int | None,
    loader: Loader,
    session: TrainingSession,
    answers: list[Tensor] | None = None,
) -> Evaluation:
    """Evaluate weights on both splits; `answers` gets labels and predictions on the test split."""
    task.model.load_state_dict(weights)
    val, test = (session.desk.checked(loader.unaugmented(split)) for split in ("val", "test"))
    validated, tested = evaluate(task.model, val, task.logits), evaluate(task.model, test, task.logits, answers)
    assert tested is not None  # `assemble` refuses an empty test split
    return Evaluation(test=tested, val=validated, epoch=epoch)


def _show(model: nn.Module, state: State, session: TrainingSession, result: Result) -> None:
    """Write the final record, and for TensorBoard the levels and what its table of hyper-parameters ends with."""
    assert result.final is not None
    parts = {"val": result.final.val, "test": result.final.test}
    metrics = {f"{split}_{key}": x for split, part in parts.items() if part for key, x in asdict(part).items()}
    session.book.record("final", state.step, metrics)
    if session.config.runtime.tensorboard and (figure := levels_figure(model)) is not None:
        session.book.figure(state.step, "levels", figure)
    session.book.end({f"hparam/{key}": value for key, value in metrics.items()})
