"""Describes a stored run as text, from the files in its directory. This module does not import torch."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbench.bits import FLOAT
from qbench.config import registry
from qbench.config.command_line import command_line
from qbench.config.foreign_code import foreign_code
from qbench.config.schema import Node, Optim, to_dict
from qbench.errors import ConfigError, QbenchError
from qbench.report.tables.escape import printable
from qbench.runs.reader import RunRecord, read_run
from qbench.runs.result import Evaluation, Result, short_commit
from qbench.runs.stored_config import recorded_files, stored_config
from qbench.system import files

WIDTH = 12
"""Width in characters of the left column, which contains names such as `recipe`."""


def description(path: Path) -> str:
    """Return the description of a run: command, method, widths, data, recipe, accuracy, versions and notes.

    Raises:
        ConfigError: the directory contains no run.
    """
    record = read_run(path)
    if record.result is None and not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path}: not a run directory\ntype a run directory; to list the runs below DIR: qbench list runs DIR"
        )
    try:
        config = stored_config(path)
        values: Node | str = to_dict(config)
        trained = config.pretrain if config.is_baseline else config
        recipe = _recipe(trained.optim, trained.epochs, record.result)
    except (OSError, QbenchError) as error:
        values, recipe = str(error).partition("\n")[0], ""
    manifest = files.read_json(path / "manifest.json") or {}
    lines = [*_outcome(path, record), *_setup(values, recipe, record.result, manifest), *_records(record, manifest)]
    return "\n".join(f"{name:<{WIDTH}}{printable(text)}" for name, text in lines)


def _outcome(path: Path, record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield the lines about the run, its status, its accuracy, and the accuracy of its float baseline."""
    result = record.result
    yield "run", str(path)
    yield "status", f"{record.status}{f': {record.reason}' if record.reason else ''}".replace("\n", "; ")
    if result is None:
        return
    yield "what", f"{result.method} {result.widths} of {result.model} on {result.dataset}, seed {result.seed}"
    if result.final:
        yield "last epoch", _accuracy(result.final)
    if result.best:
        yield "best epoch", f"{_accuracy(result.best)} (selected on validation)"
    if base := result.baseline:
        yield "float", f"{_accuracy(base.final)}; {base.run}"


def _accuracy(evaluation: Evaluation) -> str:
    epoch = "" if evaluation.epoch is None else f"epoch {evaluation.epoch + 1}: "
    val = f", validation top-1 {evaluation.val.top1:.2f} %" if evaluation.val else ""
    test = evaluation.test
    top5 = f", top-5 {test.top5:.2f} %" if test.top5 < 100 else ""  # with five classes or fewer, top-5 is always 100 %
    return f"{epoch}test top-1 {test.top1:.2f} %{top5}, loss {test.loss:.4g}{val}"


def _setup(
    values: Node | str, recipe: str, result: Result | None, manifest: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the lines about the command, the method, the layers, the data and the recipe."""
    typed = shlex.join(map(str, manifest.get("command") or ()))
    if isinstance(values, str):
        yield "config", values
    else:
        command = command_line(values, recorded_files(result))
        init = str(values.get("init"))
        missing = "/" in init and not Path(init).exists()
        why = "the run uses code of your own" if foreign_code(values) else "no command gives this configuration"
        why = f"init={init} is not found from this folder" if missing and not foreign_code(values) else why
        yield "command", command or why + (f"; the run was started with: qbench {typed}" if typed else "")
        yield from _methods(values["method"], values["activation"])
    if result and result.verified:
        widths = [f"{name} {' '.join(f'{key}:{levels.found}' for key, levels in counts.items())}"
                  for name, counts in result.verified.items()]  # fmt: skip
        yield "quantized", f"{len(widths)} layers, with the number of levels found: {', '.join(widths)}"
    if result and result.cost and result.cost.bits_per_weight < FLOAT:
        yield (
            "size",
            (
                f"{result.cost.bytes_ideal:,.0f} bytes (float {result.cost.bytes_float:,}), "
                f"{result.cost.bits_per_weight:.2f} bits per quantized weight"
            ),
        )
    if not isinstance(values, str):
        yield "layers", ", ".join(f"{key} {value}" for key, value in values["layers"].items() if value is not None)
        start = str(values["init"])
        if start == "float" and values["debug"]:
            start = "scratch"  # a debug run trains no baseline
        yield "start", {"float": "the float baseline", "scratch": "random weights",
                        "method": "random weights, as the method requires"}.get(start, start)  # fmt: skip
    data = manifest.get("data") or {}
    counts = [f"{data[f'{split}_images']:,} {split}" for split in ("train", "val", "test") if f"{split}_images" in data]
    if counts:
        sha256 = f"; sha256 {result.data_sha256[:12]}" if result and result.data_sha256 else ""
        yield "data", f"{result.dataset if result else ''} {', '.join(counts)} images{sha256}".strip()
    if recipe:
        yield "recipe", recipe


def _methods(*nodes: Node) -> Iterator[tuple[str, str]]:
    """Yield a line for each method, with the title of the method card and the method's options."""
    for node in nodes:
        name = str(node["name"])
        if name in ("none", "float") or ":" in name:
            continue
        title = registry.card(name).partition("\n")[0]
        options = ", ".join(f"{key}={value}" for key, value in node.items() if key not in ("name", "added"))
        yield "method", f"{title}{f' Options: {options}' if options else ''}"


def _recipe(optim: Optim, epochs: int, result: Result | None) -> str:
    """Return this run's recipe as text. The recipe of its float baseline is not included.

    The text is empty if the result was read from event files, which do not contain the number of trained epochs.
    """
    if result is not None and not result.protocol.hash:
        return ""
    last = result.final.epoch if result is not None and result.final is not None else epochs - 1
    if last is None:
        return "nothing was trained"
    stopped = f"; optim.patience stopped training after epoch {last + 1}" if last + 1 < epochs else ""
    return recipe_text(optim, epochs) + stopped


def recipe_text(optim: Optim, epochs: int) -> str:
    """Return a recipe as text. A key of `DEFAULTS_OMITTED` is left out if its value is the default."""
    falls = f" to {optim.lr_end:g}" if optim.schedule in ("linear", "cosine", "exponential", "one_cycle") else ""
    parts = [
        f"{epochs} epoch{'s' * (epochs != 1)} of {optim.name}",
        f"learning rate {optim.lr:g}{falls} ({optim.schedule}{_steps(optim)})",
    ]
    parts += [f"batch size {optim.batch_size}{f' x {optim.accumulate}' if optim.accumulate > 1 else ''}"]
    parts += [f"weight decay {optim.weight_decay:g}"]
    more = {
        key: value for key, value in vars(optim).items() if key in DEFAULTS_OMITTED and value != getattr(Optim, key)
    }
    return ", ".join([*parts, *(f"{key} {value}" for key, value in more.items())])


def _steps(optim: Optim) -> str:
    """Return a text with the factors of a step schedule, and the fractions of training at which the factors change."""
    if optim.schedule != "step":
        return ""
    at = " ".join(f"{milestone:g}" for milestone in optim.milestones)
    factors = " ".join(f"{factor:g}" for factor in optim.factors)
    changes = f"factors {factors}, changing at" if factors else f"times {optim.gamma:g} at"
    return f": {changes} {at} of the training"


DEFAULTS_OMITTED = ("momentum", "eps", "warmup", "label_smoothing", "clip_norm", "ema", "patience", "bias_lr",
                    "decay_norm_and_bias", "decay_until", "quantizer_lr", "quantizer_decay", "nesterov")  # fmt: skip
"""Keys of a recipe that the description shows only if their values differ from the defaults."""


def _records(record: RunRecord, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines about versions, commits, the machine, the time and the notes."""
    versions = {name: version for name, version in (manifest.get("versions") or {}).items() if version}
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    result = record.result
    if commits := (result.commits if result else []) or manifest.get("commits"):
        yield "commits", ", ".join(short_commit(str(commit)) for commit in commits)
    if device := manifest.get("device"):
        keys = ("device_name", "precision", "threads", "platform")
        yield "machine", ", ".join([str(device), *(f"{key} {manifest[key]}" for key in keys if manifest.get(key))])
    if result and result.wall_seconds is not None:
        yield "time", f"{result.wall_seconds:.1f} s"
    for warning in result.warnings if result else ():
        yield "warning", warning
    for note in [*(result.protocol_changes if result else []), *record.notes, *record.unread]:
        yield "note", note
