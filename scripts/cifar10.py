#!/usr/bin/env python3
"""Compare the methods on CIFAR-10 by fine-tuning a pretrained ResNet-20 for a few epochs.

    .venv/bin/python scripts/cifar10.py --root DATA --init CHECKPOINT [--seeds 0,1,2] [--epochs 4] [KEY=VALUE ...]

DATA contains cifar-10-batches-py/. CHECKPOINT is resnet20-12fca82f.th of akamaster/pytorch_resnet_cifar10 (8.27 % test
error). All runs have this protocol:

- One recipe for every setting: Adam with a learning rate from 1e-3 to 1e-5 (exponential), batch size 64, crops and
  flips. Papers that fine-tune a float network with Adam start at 1e-3 (EWGS, ResNet-20 on CIFAR-10) or 1.25e-3 (N2UQ).
  Other papers start at 1e-4, but train for many more epochs.
- All 50,000 training images are used. There is no validation split, because pretraining used all images. Nothing is
  selected: every accuracy is the accuracy after the last epoch.
- The first and the last layer are float. The float control, which is the network of the checkpoint without a quantizer,
  is trained for the same number of epochs as the quantized networks.
- The seed determines the order of the images and the augmentation. All settings of one seed run before the next seed
  begins.

The runs are done one after another in this process. Runs that are stored in --out or in --record are not repeated. If
the script was stopped, the same command therefore continues it, even without the folder --out. KEY=VALUE overrides the
protocol. After every run, the results are stored in --record FILE, by default docs/records/cifar10.json.
`scripts/tables.py --from-records cifar10` then writes docs/results.md. `--from FILE` prints the tables of stored
results and runs nothing.

Three methods are left out, because they need a network that differs from the network in the checkpoint. HWGQ and
Gupta's fixed point need another normalization. XNOR-Net's activations need a network in which batch normalization and
activation precede each convolution.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qbench.bits import FLOAT, Bits
from qbench.config import compose
from qbench.config.fields import parse_bits
from qbench.errors import ConfigError, Interrupted, QbenchError
from qbench.experiment.jobs import outcome, run_catching
from qbench.experiment.planned_run import PlannedRun, planned_runs
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import settings_of
from qbench.report.statistics.differences import paired
from qbench.report.tables.table import FORMATS, Table
from qbench.report.tables.units import si_format
from qbench.runs.reader import DONE, RunRecord, dump_records, load_records
from qbench.system import files
from qbench.system.signals import stop_on_signals

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "records" / "cifar10.json"
CHECKPOINT = "resnet20-12fca82f.th"
KEYS = {
    "model": "resnet20", "model.form": "post", "model.shortcut": "A_stride",
    "dataset": "cifar10", "dataset.normalize": "imagenet", "dataset.val": "0",
    "runtime.tensorboard": "false",
}  # fmt: skip
EVERY_WIDTH = ("dorefa", "lsq", "uniform", "apot", "inq", "slq", "eslq", "qd", "dq")
"""Methods that are run at 2, 3 and 4 bits per weight, with float activations."""
BOTH = ("dorefa", "pact", "lsq", "uniform", "apot")
"""Methods that are run with the same width of weights and activations."""
SUMMARIZED = ((1, 32), (2, 32), (3, 32), (4, 32), (5, 32), (1, 2), (2, 2), (3, 3), (4, 4))
"""Widths of weights and activations that `summary` shows. Other widths have few settings."""
FLOAT_CONTROL = ("float", "w32a32")
CLAIMS = (
    ("inq_lossless", ("inq", "w5a32"), FLOAT_CONTROL, -0.5), ("slq_lossless", ("slq", "w5a32"), FLOAT_CONTROL, -0.5),
    ("review_slq_inq", ("slq", "w5a32"), ("inq", "w5a32"), 0.0), ("ttq_twn", ("ttq", "w2a32"), ("twn", "w2a32"), 0.0),
    ("slq_mlq_crossover", ("mlq", "w2a32"), ("slq", "w2a32"), 0.0),
    ("qd_afterwards", ("qd", "w2a32"), ("ptq", "w2a32"), 0.0),
    ("qd_afterwards", ("qd", "w3a32"), ("ptq", "w3a32"), 0.0),
    ("qd_afterwards", ("qd", "w4a32"), ("ptq", "w4a32"), 0.0),
)  # fmt: skip
"""Claims of conf/experiment/claims that these runs can test: name, first arm, second arm, and the threshold in points.

The claim holds if the first arm minus the second arm is above the threshold.
"""
CLAIMS_HEAD = ("claim", "first arm", "second arm", "threshold", "effect", "95 % interval", "n")
HEAD = ("method", "W", "A", "levels", "bits/weight", "bytes", "top-1 %", "std", "n", "diff", "over float control")


@dataclass(frozen=True)
class Wanted:
    """A setting of the protocol.

    Args:
        method: the name of the method. If a second method quantizes the activations, its name follows after a plus
            sign.
        group: the title of the setting's table.
    """

    method: str
    bits: str
    group: str

    @property
    def words(self) -> list[str]:
        """The command-line overrides that select the setting."""
        weight, _, activation = self.method.partition("+")
        return [f"method={weight}", f"bits={self.bits}", *([f"activation={activation}"] if activation else [])]

    @property
    def key(self) -> tuple[str, Bits]:
        """The method's name and widths, which identify the setting in results."""
        return self.method, Bits(**{key: width or 32 for key, width in parse_bits(self.bits).items()})


def wanted_settings() -> list[Wanted]:
    """Return the settings in the order of their runs."""
    names = {4: "4 bits per weight", 3: "3 bits per weight", 2: "2 bits per weight, and ternary weights"}
    both = "Weights and activations quantized"
    ptq = "Post-training quantization, nothing is trained"
    found = [Wanted("float", "w32a32", "Float")]
    found += [Wanted("ptq", bits, ptq) for bits in ("w8a8", "w4a8", "w4a4", "w4a32", "w3a32", "w2a32")]
    for width in (2, 3, 4):
        found += [Wanted(method, f"w{width}a{width}", both) for method in BOTH]
        found += [Wanted(method, f"w{width}a32", names[width]) for method in EVERY_WIDTH]
    found += [Wanted(method, "w2a32", names[2]) for method in ("ttq", "twn", "mlq")]
    found += [Wanted(method, "w1a32", "1 bit per weight") for method in ("bwn", "dorefa", "qcnn")]
    found += [Wanted(method, "w5a32", "5 bits per weight") for method in ("inq", "slq", "eslq")]
    found += [Wanted("dorefa", "w1a1", both)]
    found += [Wanted(method, "w1a2", both) for method in ("dorefa", "bwn+pact")]
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/cifar10.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="overrides of the protocol")
    parser.add_argument("--root", default="data", help="the folder that contains cifar-10-batches-py/")
    parser.add_argument("--init", default=CHECKPOINT, help="the checkpoint to start from")
    parser.add_argument("--out", default="outputs/cifar10", help="folder of all runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--only", default="", metavar="NAMES", help="only these settings, such as lsq,dorefa:w2a2")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="print the tables of stored results")
    parser.add_argument("--list", action="store_true", help="print the settings, and run nothing")
    parser.add_argument("--summary", action="store_true", help="print one table with a row per method")
    parser.add_argument("--claims", action="store_true", help="print the table of claims")
    parser.add_argument("--format", choices=FORMATS, default="md")
    options = parser.parse_args(arguments)
    only = set(filter(None, options.only.split(",")))
    chosen = [w for w in wanted_settings() if not only or {w.method, f"{w.method}:{w.bits}"} & only]
    if options.list:
        print("\n".join(" ".join(wanted.words) for wanted in chosen))
        return 0
    try:
        if options.stored:
            records, note = stored_results(options.stored)
        else:
            folders = [Path(options.out).parent, Path(options.init).parent]
            records = train(planned(options, chosen), options.record, folders, note_on)
            note = note_on(records)
    except QbenchError as error:
        print(f"scripts/cifar10.py: {error}", file=sys.stderr)
        return error.status
    one = summary(records) if options.summary else claims(records) if options.claims else None
    print(FORMATS[options.format]([one] if one else tables(records)))
    if options.format == "md" and not one:
        print(f"\n{note}")
    return 0


def planned(options: argparse.Namespace, chosen: Sequence[Wanted]) -> list[PlannedRun]:
    """Return the runs in their order: all settings of the first seed, then of the second, and so on."""
    typed = dict(word.partition("=")[::2] for word in options.keys)
    usual = {key: value for key, value in KEYS.items() if "dataset" not in typed or not key.startswith("dataset.")}
    own = {} if "dataset" in typed else {"dataset.root": options.root}
    shared = usual | own | {"init": options.init, "out": options.out, "epochs": options.epochs} | typed
    configs = []
    for seed in options.seeds.split(","):
        for wanted in chosen:
            words = [f"{key}={value}" for key, value in shared.items()]
            configs += compose.configurations([*words, *wanted.words, f"seed={seed}"])
    return planned_runs(configs)


def train(
    runs: Sequence[PlannedRun], record: Path, folders: Sequence[Path], note: Callable[[Sequence[RunRecord]], str]
) -> list[RunRecord]:
    """Do the runs one after another, and store all results after each run. Return a record of every run that began.

    Args:
        folders: absolute paths of folders. Paths in the stored file are relative to these folders.
        note: makes the note of the stored file.

    Raises:
        ConfigError: the file has results of another protocol.
        Interrupted: a signal was received.
    """
    recorded = {run.path.name: run for run in stored_results(record)[0] if run.status == DONE}
    protocols = {run.directory.identity.protocol_hash for run in runs}
    others = [name for name, run in recorded.items() if run.result and run.result.protocol.hash not in protocols]
    if runs and others:
        raise ConfigError(
            f"{record} has results of another protocol, such as {others[0]}, whose tables cannot be mixed\n"
            "type --record FILE with another file"
        )
    records = list(recorded.values())
    with stop_on_signals() as stop:
        for number, run in enumerate(runs, 1):
            if run.path.name in recorded:
                continue
            if stop():
                raise Interrupted(f"stopped by signal {stop()}; to continue, repeat the command")
            result = run_catching(run, stop)
            shown = f"{result.top1:.2f} %" if result.top1 is not None else f"{result.status}: {result.reason}"
            print(f"{number} of {len(runs)}  {run.path.name}  {shown}", file=sys.stderr, flush=True)
            begun = (outcome(each) for each in runs if each.path.name not in recorded)
            records = [*recorded.values(), *(each for each in begun if each.status != "not begun")]
            store(record, records, folders, note)
    return records


def stored_results(record: Path) -> tuple[list[RunRecord], str]:
    """Return the runs in a file of stored results, and the note about these runs.

    If the file is missing, the list of runs is empty.
    """
    if not record.is_file():
        return [], "No run is recorded yet."
    return load_records(record), json.loads(record.read_text())["note"]


def store(
    record: Path, records: Sequence[RunRecord], folders: Sequence[Path], note: Callable[[Sequence[RunRecord]], str]
) -> None:
    """Store the results in a file. The paths in this file are relative, because it is published."""
    text = dump_records(records)
    for folder in folders:
        text = text.replace(f"{folder}/", "") if folder.is_absolute() else text
    content = json.loads(text) | {"note": note(records)}
    record.parent.mkdir(parents=True, exist_ok=True)
    files.write(record, (json.dumps(content, separators=(",", ":")) + "\n").encode())


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """Return one table per group of settings, followed by a table of missing settings."""
    settings = [setting for table in compare(records) for setting in settings_of(table)]
    control = next((s for s in settings if s.is_float and not s.is_baseline), None)
    wanted = wanted_settings()
    result = []
    for group in dict.fromkeys(w.group for w in wanted):
        keys = [w.key for w in wanted if w.group == group]
        members = [s for s in settings if not s.is_baseline and (s.method, s.bits) in keys]
        members.sort(key=lambda s: (s.bits.w, s.bits.a, -s.top1.mean))
        if group == "Float":
            members = [s for s in settings if s.is_baseline] + members
        rows = [cells(setting, control) for setting in members]
        if rows:
            result.append(Table(HEAD, rows, [setting.to_json() for setting in members], group))
    measured = {(s.method, s.bits): s.top1.n for s in settings if not s.is_baseline}
    most = max(measured.values(), default=0)
    seeds = f"{most} seed{'s' * (most != 1)}"
    missing = [f"{w.method} {w.bits}" for w in wanted if w.key not in measured]
    fewer = [f"{w.method} {w.bits}" for w in wanted if 0 < measured.get(w.key, 0) < most]
    notes = [f"{len(measured)} of {len(wanted)} settings are measured, each with at most {seeds}"]
    notes += [f"not measured: {', '.join(missing)}"] if missing else []
    notes += [f"measured with fewer than {seeds}: {', '.join(fewer)}"] if fewer else []
    failed = [run for run in records if run.status != DONE]
    notes += [f"{run.path.name}: {run.status}: {run.reason.partition(chr(10))[0]}" for run in failed]
    return [*result, Table((), title="What is missing", notes=notes)]


def summary(records: Sequence[RunRecord]) -> Table:
    """Return one table with a row per method and a column per pair of widths. The cells are means of the top-1.

    Methods that are run at only one pair of widths are in a note.
    """
    settings = [setting for table in compare(records) for setting in settings_of(table)]
    shown = {(s.method, s.bits.w, s.bits.a): s for s in settings if not s.is_baseline and not s.is_float}
    widths = [pair for pair in SUMMARIZED if any((w, a) == pair for _, w, a in shown)]
    pairs = Counter(w.method for w in wanted_settings() if (w.key[1].w, w.key[1].a) in SUMMARIZED)
    methods = [m for m in pairs if any((m, *p) in shown for p in widths)]
    names = {(w, a): f"W{w}" + ("" if a == FLOAT else f"A{a}") for w, a in widths}
    table = Table(("method", *names.values()))
    single: list[str] = []
    for method in methods:
        row = [shown.get((method, *pair)) for pair in widths]
        if pairs[method] == 1:
            single += [f"{method} {names[p]} {s.top1.mean:.2f}" for p, s in zip(widths, row, strict=True) if s]
            continue
        table.rows.append((method, *("-" if each is None else f"{each.top1.mean:.2f}" for each in row)))
        table.values += [setting.to_json() for setting in row if setting]
    floats = [f"{s.label} {s.top1.mean:.2f}" for s in settings if s.is_baseline]
    floats += [f"float control {s.top1.mean:.2f}" for s in settings if s.is_float and not s.is_baseline]
    seeds = sorted({setting.top1.n for setting in shown.values()})
    n = "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    table.notes = [f"{', '.join([*floats, *single])}; n = {n}"]
    return table


def claims(records: Sequence[RunRecord]) -> Table:
    """Return a table with a row per claim whose arms are both measured."""
    arms: dict[tuple[str, Bits], dict[int, RunRecord]] = {}
    for run in records:
        if run.status == DONE and run.result:
            arms.setdefault((run.result.method, Bits(**run.result.bits)), {})[run.result.seed] = run
    table = Table(CLAIMS_HEAD, notes=["effect: top-1 of the first arm minus top-1 of the second arm, in points"])
    for name, first, second, threshold in CLAIMS:
        one, two = (arms.get(Wanted(*arm, "").key, {}) for arm in (first, second))
        if seeds := sorted(one.keys() & two.keys()):
            effect, margin = _effect([(one[seed], two[seed]) for seed in seeds])
            titles = [" ".join(arm).replace("float w32a32", "float control") for arm in (first, second)]
            interval = f"{effect - margin:+.2f} to {effect + margin:+.2f}"
            table.rows.append((name, *titles, f"{threshold:g}", f"{effect:+.2f}", interval, str(len(seeds))))
    return table


def _effect(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> tuple[float, float]:
    """Return the mean difference of the accuracies in points, and the half-width of its 95 % interval.

    With one seed, the interval contains only the error of the sample of test images: 1.96 standard errors of the mean
    difference of the hits, paired by image. With more seeds, it is Student's interval over the seeds.
    """
    accuracies = [(one.result.top1, two.result.top1) for one, two in pairs if one.result and two.result]
    differences = [one - two for one, two in accuracies if one is not None and two is not None]
    if len(differences) > 1:
        found = paired(differences, [0.0] * len(differences))
        return found.mean, found.high - found.mean
    ((one, two),) = pairs
    assert one.hits
    assert two.hits
    points = 100.0 * (one.hits.correct.astype(float) - two.hits.correct)
    return differences[0], 1.96 * float(points.std(ddof=1)) / len(points) ** 0.5


def cells(setting: Setting, control: Setting | None) -> tuple[str, ...]:
    """Return the cells of a table row, in the order of HEAD."""
    return (
        "float control" if setting.is_float and not setting.is_baseline else setting.label,
        str(setting.bits.w),
        str(setting.bits.a),
        str(setting.levels or "-"),
        "-" if setting.cost is None else f"{setting.cost.bits_per_weight:.2f}",
        "-" if setting.cost is None else f"{si_format(setting.cost.bytes_ideal)}B",
        f"{setting.top1.mean:.2f}",
        "-" if setting.top1.std is None else f"{setting.top1.std:.2f}",
        str(setting.top1.n),
        "-" if setting.difference is None else f"{setting.difference.mean:+.2f}",
        "-" if control is None or setting.is_float else over_control(setting, control),
    )


def over_control(setting: Setting, control: Setting) -> str:
    """Return the difference from the float control, paired by seed, and the half-width of its 95 % interval."""
    ours, floats = ({run.seed: run.top1 for run in each.runs} for each in (setting, control))
    seeds = sorted(ours.keys() & floats.keys())
    if len(seeds) < 2:
        return f"{ours[seeds[0]] - floats[seeds[0]]:+.2f}" if seeds else "-"
    difference = paired([ours[seed] for seed in seeds], [floats[seed] for seed in seeds])
    return f"{difference.mean:+.2f} ±{difference.high - difference.mean:.2f}"


def note_on(records: Sequence[RunRecord]) -> str:
    """Return sentences that say how the runs were trained."""
    results = [run.result for run in records if run.result and run.status == DONE]
    if not results:
        return "No run is done yet."
    epochs = sorted({result.protocol.keys["epochs"] for result in results})
    pretrained = sorted({(Path(b.run).name, b.sha256 or "") for r in results if (b := r.baseline)})
    start = "; ".join(f"{name} (sha256 {sha256[:12]})" for name, sha256 in pretrained)
    return (
        f"Every run starts from {start}. Runs with ptq are not trained, and all other runs are trained for "
        f"{', '.join(map(str, epochs))} epochs on all 50,000 training images. No images are held out for validation, "
        "because pretraining used all training images. Every accuracy is the accuracy after the last epoch. "
        f"n is the number of seeds. The tables show {len(results)} runs with one thread each "
        f"({platform.machine()}, {platform.system()}, torch {version('torch')})."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
