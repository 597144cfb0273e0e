"""Times an epoch of the training loop with logging and a progress bar, relative to a bare loop.

.venv/bin/python scripts/bench/loop.py [--rounds 21] [KEY=VALUE ...]
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
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
from qbench.training.loop import train_epoch
from qbench.training.state import State
from qbench.training.task import Task

CASES = {"digits, resnet8, float": [], "digits, resnet8, DoReFa W2A2": ["method=dorefa", "bits=w2a2"]}


def works(words: list[str], out: str) -> tuple[Work, Work, Work]:
    """Return functions that train an epoch in a bare loop, train one in qbench's loop, and remove the progress bar."""
    (config,) = compose.configurations([*words, "init=scratch", "dataset.pad=0", f"out={out}"])
    parts = assemble(config)
    loader = Loader(parts.data, config.optim.batch_size, 0, parts.device)

    def bare() -> None:
        model.train()
        for images, labels in loader.train(0):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    model = parts.install(parts.float_model())
    optimizer = optim.build_optimizer(model, config.optim)
    model_of_ours = parts.install(parts.float_model())
    task = Task(
        model=model_of_ours, method=parts.method, optim=config.optim, epochs=10**6, steps=loader.steps,
        train=loader.train, validate=lambda: (), probe=Probe([], F.cross_entropy),
    )  # fmt: skip
    directory = planned_run(config).directory
    directory.path.mkdir(parents=True, exist_ok=True)
    reporter = ProgressReporter(live=True)
    session = TrainingSession(
        directory, RunContext(reporter), parts.runtime, parts.title, parts.hyperparameters, {}, "", parts.layers
    )
    state = State(optim.build_optimizer(model_of_ours, config.optim))
    callbacks = session.watch(task, state, loader.batch_size)

    def ours() -> None:
        train_epoch(task, state, callbacks)
        state.losses, state.images, state.hits, state.batch = [], 0, 0, 0

    return bare, ours, reporter.stop


@contextmanager
def terminal() -> Iterator[None]:
    """Make stderr a terminal within a `with` block, and discard what is written to it.

    This is needed because the progress bar is drawn only on a terminal.
    """
    ours, theirs = os.openpty()
    saved = os.dup(2)
    os.dup2(theirs, 2)
    reader = threading.Thread(target=_drain, args=(ours,), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(theirs)


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:  # the other end of the terminal is closed
        os.close(descriptor)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    rows = []
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder, terminal():
            bare, ours, stop = works([*words, *options.words], str(Path(folder)))
            ratios = interleaved({"bare": bare, "ours": ours}, options.rounds, repeat=3)
            stop()  # otherwise, the progress bar would capture the printed text
            rows.append((name, str(ratios["ours"]), "1.03", f"{1000 * ratios['bare'].seconds:.0f} ms"))
    print(f"{machine()}, 1 thread, {options.rounds} rounds of 3 epochs\n")
    print(markdown(("an epoch of the training loop", "time / bare loop", "target", "bare loop"), rows))


if __name__ == "__main__":
    main()
