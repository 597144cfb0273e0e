"""Times epochs with runtime.observe off, light and full. The times include logging and saving.

    .venv/bin/python scripts/bench/observe.py [--rounds 21] [KEY=VALUE ...]

The baseline, named blind, is a run that never observes its layers. Even a run with `off` observes
its layers, because warnings are based on observations. TensorBoard is on. The runs do not evaluate on validation
images. All ratios are therefore larger than in normal runs. Observations and histograms are as frequent as in a run
with the default number of epochs.
"""

import argparse
import tempfile
from pathlib import Path

from measure import Work, interleaved, machine, markdown
from torch.nn import functional as F

from qbench.config import compose
from qbench.data.loader import Loader
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.session import TrainingSession
from qbench.experiment.setup import assemble
from qbench.quant.probe import Probe
from qbench.runs.progress import ProgressReporter
from qbench.training import optimizer as optim
from qbench.training.epoch_record import EpochRecord
from qbench.training.loop import train_epoch
from qbench.training.state import State
from qbench.training.task import Task

CASES = {
    "digits, resnet8, DoReFa W2A2": ["method=dorefa", "bits=w2a2"],
    "digits, resnet8, LSQ W2A2": ["method=lsq", "bits=w2a2"],
    "digits, resnet8, INQ W5": ["method=inq"],
}
LEVELS, TARGET = ("blind", "off", "light", "full"), "1.03"
IMAGES, EPOCHS = 256, 6


def work(words: list[str], out: Path, level: str) -> Work:
    """Return a function that trains one epoch of a run with the given level of runtime.observe."""
    observe = "off" if level == "blind" else level
    (config,) = compose.configurations([*words, "init=scratch", f"runtime.observe={observe}", f"out={out / level}"])
    parts = assemble(config)
    loader = Loader(parts.data, config.optim.batch_size, 0, parts.device)
    model, method = parts.install(parts.float_model()), parts.method
    probe = Probe(list(loader.unaugmented("train", IMAGES)), F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    if method.on_epoch:
        method.on_epoch(model, 0, config.epochs, probe)
    task = Task(
        model=model, method=method, optim=config.optim, epochs=config.epochs, steps=loader.steps, train=loader.train,
        validate=lambda: (), probe=Probe([], F.cross_entropy) if level == "blind" else probe,
        classes=parts.data.classes,
    )  # fmt: skip
    directory = planned_run(config).directory
    directory.path.mkdir(parents=True, exist_ok=True)
    context = RunContext(ProgressReporter(quiet=True))
    session = TrainingSession(
        directory, context, parts.runtime, parts.title, parts.hyperparameters, {}, "", parts.layers
    )
    state = State(optim.build_optimizer(model, config.optim))
    callbacks = session.watch(task, state, loader.batch_size)

    def epoch() -> None:
        state.epoch %= config.epochs
        train_epoch(task, state, callbacks)
        record = EpochRecord(state.epoch, lr=0.1, train_loss=0.0, train_top1=100.0, seconds=0.0, images=state.images)
        losses, state.losses, state.images, state.hits, state.batch = state.losses, [], 0, 0, 0
        state.epoch += 1
        callbacks.on_epoch(state, record, losses)

    return epoch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    rows = []
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            works = {level: work([*words, *options.words], Path(folder), level) for level in LEVELS}
            timed = interleaved(works, options.rounds, repeat=EPOCHS)
            ratios = [str(timed[level]) for level in LEVELS[1:]]
            rows.append((name, *ratios, TARGET, f"{1000 * timed['blind'].seconds:.0f} ms"))
    print(f"{machine()}, 1 thread, {options.rounds} rounds of {EPOCHS} epochs\n")
    print(markdown(("an epoch of", *LEVELS[1:], "target of light", "blind"), rows))


if __name__ == "__main__":
    main()
