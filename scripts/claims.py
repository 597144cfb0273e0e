#!/usr/bin/env python3
"""Holds the papers' claims under conf/experiment/claims/ against runs, and writes docs/claims.md.

    .venv/bin/python scripts/claims.py [NAME ...] [--seeds 0-9] [--out outputs/claims] [--docs docs/claims.md]
                                    [--plan | --report]

Trains the arms of the claims named (all without a name) that are not stored; --plan says what would be trained and how
long it would take; --report trains nothing. The report always shows every claim, since Holm's adjustment is over all of
them; what it shows is in OUT/claims.json too. Claims share runs where their arms are the same configuration.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qbench.papers.claims import BACKWARD, Claim, ClaimResult

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.errors import ConfigError, QbenchError
from qbench.papers import claims as kept
from qbench.report.tables.table import Table, markdown
from qbench.runs.directory import RunDirectory
from qbench.runs.reader import DONE, RunRecord
from qbench.system import files

ROOT = Path(__file__).resolve().parents[1]
TRIED = (DONE, "unsupported", "diverged")
"""What a repeat would not change; a run that failed is tried again."""

PREFACE = """\
# Claims

Each line is one comparison of a file under `conf/experiment/claims/`, made by `{command}`. The effect is first arm
minus second, in points of test top-1 after the last epoch (for gradient mismatch: in cosine), paired by seed. The
interval counts both seeds and test images as samples (two-way, `qbench/report/statistics`) and is of its own
comparison alone; verdicts are two-sided at 5 % over all {family} comparisons together (Holm), so that an interval may
leave out the border while the verdict is open: `holds`; `does not hold`, the data say the opposite; `not separable at
n`, with the seeds that it would take at 80 % power if the effect is as observed. A comparison with runs that failed,
diverged or are unsupported has no verdict and says why: those that survive are not a fair sample. Arms read
`first - second > border`; `as it stands` is the experiment's file without a change.

What these data decide: digits (1,797 real images of 8x8, 450 for test) and glyphs (characters rendered from fonts,
test fonts held out, 10,000 for test) with thin residual networks of 8 or 20 layers and short schedules show whether
an effect exists under one protocol, and its size there. They do not reproduce the papers' figures on SVHN, CIFAR-10
or ImageNet, and a claim that does not hold here is not refuted there: depth, width, number of classes and length of
training differ, and 8-bit or 5-bit differences may be too small to be seen. Digits show a point or more; on glyphs
about half a point. Claims "from memory" are the paper's as remembered, not quoted.
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/claims.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", default="0-9", type=seeds_of)
    parser.add_argument("--out", default="outputs/claims")
    parser.add_argument("--docs", default="docs/claims.md", type=Path)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        family = kept.read_claims(groups.conf_directory() / "experiment" / "claims")
        known = [claim.name for claim in family]
        if wrong := [name for name in asked.names if name not in known]:
            raise ConfigError(f"{wrong[0]}: no such claim\nallowed: {', '.join(known)}")
        chosen = [claim for claim in family if not asked.names or claim.name in asked.names]
        if asked.plan:
            print_plan(chosen, asked.seeds, asked.out)
            return 0
        if not asked.report:
            for claim in chosen:
                train(claim, asked.seeds, asked.out)
        report(family, asked.seeds, asked.out, asked.docs)
    except QbenchError as error:
        print(f"scripts/claims.py: {error}", file=sys.stderr)
        return error.status
    return 0


def seeds_of(text: str) -> list[int]:
    """Read 0-9 or 0,1,5."""
    found = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return sorted(set(found))


def words_of(claim: Claim, arm: Iterable[str], out: str) -> list[str]:
    return [f"experiment=claims/{claim.name}", *arm, f"out={out}"]


def configs_of(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> dict[int, Config]:
    """Compose an arm once; its seeds differ in the seed alone."""
    (config,) = compose.configurations(words_of(claim, arm, out))
    found = {}
    for seed in seeds:
        found[seed] = copy.deepcopy(config)
        found[seed].seed = seed
    return found


def runs_of(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> dict[int, RunRecord]:
    """Return what stands in an arm's runs; a line that makes no configuration has failed for every seed."""
    try:
        configs = configs_of(claim, arm, seeds, out)
    except ConfigError as error:
        return {seed: RunRecord(path=Path(out), status="failed", reason=str(error)) for seed in seeds}
    return kept.read_arm({seed: RunDirectory(config).path for seed, config in configs.items()})


def command(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> list[str]:
    return ["-m", *words_of(claim, arm, out), f"seed={','.join(map(str, seeds))}", "hydra/launcher=joblib"]


def train(claim: Claim, seeds: list[int], out: str) -> None:
    for arm in claim.arms:
        lacking = [seed for seed, run in runs_of(claim, arm, seeds, out).items() if run.status not in TRIED]
        if lacking:
            words = command(claim, arm, lacking, out)
            print(f"qbench {' '.join(words)}", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-m", "qbench", *words], stdout=subprocess.DEVNULL)
            if done.returncode == 75:
                raise SystemExit(75)


def print_plan(chosen: list[Claim], seeds: list[int], out: str) -> None:
    """Print the time that the runs lacking would take, claim by claim; a run that two claims share counts once."""
    from qbench.analysis.plan import plan

    total, listed = 0.0, set()
    table = Table(("claim", "arms", "runs lacking", "estimate"))
    for claim in chosen:
        lacking, seconds = 0, 0.0
        for arm in claim.arms:
            try:
                configs = configs_of(claim, arm, seeds, out)
                rows = plan([configs[seeds[0]]])[0].values
            except ConfigError as error:
                print(f"{claim.name}: {' '.join(arm)}: {error}", file=sys.stderr)
                continue
            for row in rows:
                if row["run"] in listed:
                    continue
                listed.add(row["run"])
                count = len(seeds)
                if Path(row["run"]) == RunDirectory(configs[seeds[0]]).path:
                    found = kept.read_arm({s: RunDirectory(c).path for s, c in configs.items()})
                    count = sum(run.status not in TRIED for run in found.values())
                lacking += count
                seconds += count * (row["seconds"] or stored_seconds(Path(row["run"])))
        total += seconds
        table.rows.append((claim.name, str(len(claim.arms)), str(lacking), f"{seconds:.0f} s"))
    table.rows.append(("all", "", "", f"{total / 60:.0f} min"))
    print(markdown([table]))
    print(
        "\nFrom a few timed training steps of each kind of run on one core, float parents included (a stored parent of"
        "\nthe first seed is taken for a sign that the others lack); evaluation and what methods measure come on top,"
        "\nabout a third. Arms shared with a claim above are not counted again."
    )


def stored_seconds(path: Path) -> float:
    """Return how long the stored run of the first seed took, for those of other seeds."""
    return float((files.read_json(path / "result.json") or {}).get("wall_seconds") or 0)


def report(family: list[Claim], seeds: list[int], out: str, docs: Path) -> None:
    """Judge every claim and write OUT/claims.json and the document."""
    judged: list[ClaimResult] = []
    runs: dict[str, dict[tuple[str, ...], dict[int, RunRecord]]] = {}
    measured: dict[str, Any] = {}
    for claim in family:
        arms = runs[claim.name] = {arm: runs_of(claim, arm, seeds, out) for arm in claim.arms}
        if claim.measure == "gradient_mismatch":
            measured[claim.name] = measure(claim, arms[claim.net], out)
            judged += mismatches(claim, arms[claim.net], measured[claim.name])
            continue
        for c in claim.comparisons:
            second = {} if c.second is None else arms[c.second]
            judged.append(kept.evaluate_claim(c, claim.measure, arms[c.first], second))
    kept.conclude(judged)
    table = kept.summary(judged, {claim.name: claim for claim in family})
    machine = machine_of(runs)
    files.make_directory(Path(out))
    values = {"seeds": seeds, "machine": machine, "comparisons": table.values, "gradient_mismatch": measured}
    files.write_json(Path(out) / "claims.json", values)
    files.make_directory(docs.parent)
    typed = [
        "scripts/claims.py",
        "--seeds",
        f"{seeds[0]}-{seeds[-1]}",
        *([] if out == "outputs/claims" else ["--out", out]),
    ]
    head = PREFACE.format(command=" ".join(typed), family=len(judged))
    parts = [head, markdown([table]) + "\n"]
    for claim in family:
        own = [one for one in judged if one.comparison.claim == claim.name]
        parts.append(section(claim, own, runs[claim.name], seeds, out, machine))
        if claim.name in measured:
            parts.append(layers_table(measured[claim.name]))
    files.write(docs, "\n".join(part for part in parts if part).encode())
    counts: dict[str, int] = {}
    for one in judged:
        short = one.outcome.partition(":")[0].partition(" at ")[0]
        counts[short] = counts.get(short, 0) + 1
    print(f"{docs}: {len(judged)} comparisons: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


def section(
    claim: Claim,
    own: list[ClaimResult],
    arms: dict[tuple[str, ...], dict[int, RunRecord]],
    seeds: list[int],
    out: str,
    machine: str,
) -> str:
    lines = [f"## {claim.name}", "", f"{claim.says} Source: {claim.source}.", ""]
    lines += [claim.note, ""] if claim.note else []
    for one in own:
        if one.means is not None:
            places = 4 if claim.measure == "gradient_mismatch" else 2
            first, second = (f"{x:.{places}f}" for x in one.means)
            lines.append(f"- {one.comparison.name}: {first} against {second}; {one.outcome}")
        lines += [f"- {one.comparison.name}: {text}" for text in one.troubles + one.notes]
    lines += ["", *(f"    qbench {' '.join(command(claim, arm, seeds, out))}" for arm in arms), ""]
    found = [run for arm in arms.values() for run in arm.values()]
    done = sum(run.status == DONE for run in found)
    seconds = kept.wall_seconds(found)
    lines.append(f"{done} of {len(found)} runs done, {seconds:.0f} s of work without float parents; {machine}.")
    return "\n".join(lines) + "\n"


def machine_of(runs: dict[str, dict[tuple[str, ...], dict[int, RunRecord]]]) -> str:
    """Return the machine of the first run that says it, and the commits of all; every manifest.json has its own."""
    paths = {run.path for arms in runs.values() for arm in arms.values() for run in arm.values()}
    manifests = [known for path in sorted(paths) if (known := files.read_json(path / "manifest.json"))]
    if not manifests:
        return "no run yet"
    first, commits = manifests[0], sorted({str(manifest["commit"])[:7] for manifest in manifests})
    system, torch = str(first["platform"]).partition("-")[0], first["versions"]["torch"]
    return (
        f"{os.cpu_count()} cores, {first['processor']}, {system}, torch {torch}, {first['threads']} thread a run, "
        f"{first['device']}, commit {' and '.join(commits)}"
    )


def measure(claim: Claim, net: dict[int, RunRecord], out: str) -> dict[str, Any]:
    """Return {seed: {sigma: {backward: {layer: (cosine, bias)}}}} of a claim's networks; measured once."""
    store = Path(out) / "gradient_mismatch.json"
    known = files.read_json(store) or {}
    names = backwards(claim)
    found = {}
    for seed, run in net.items():
        if run.status != DONE or run.result is None:
            continue
        key = f"{run.result.weights_sha256} {','.join(names)}"
        if key not in known:
            known[key] = mismatch_of(configs_of(claim, claim.net, [seed], out)[seed], names)
            files.write_json(store, known)
        found[str(seed)] = known[key]
    return found


def backwards(claim: Claim) -> list[str]:
    """Return the names of the backward passes that a claim compares."""
    arms = [arm for c in claim.comparisons for arm in (c.first, c.second or ())]
    if any(len(arm) != 1 or not arm[0].startswith(BACKWARD) for arm in arms):
        raise ConfigError(f"{claim.name}: arms of measure=gradient_mismatch are [{BACKWARD}NAME]")
    return sorted({arm[0].removeprefix(BACKWARD) for arm in arms})


def mismatch_of(config: Config, names: list[str]) -> dict[str, Any]:
    """Measure one trained network on 256 training images."""
    from torch.nn import functional as F

    from qbench.analysis.gradient_mismatch import mismatch
    from qbench.data.dataset import Loader
    from qbench.experiment.run import PROBE_IMAGES
    from qbench.experiment.setup import assemble
    from qbench.training.checkpoint import unpack

    parts = assemble(config)
    path = RunDirectory(config).path / "last.pt"
    model = parts.install(parts.float_model())
    model.load_state_dict(unpack(path.read_bytes(), str(path))["model"])
    loader = Loader(parts.data, config.optim.batch_size, config.seed, parts.device)
    return mismatch(model.to(parts.device), list(loader.plain("train", PROBE_IMAGES)), F.cross_entropy, names)


def mismatches(claim: Claim, net: dict[int, RunRecord], measured: dict[str, Any]) -> list[ClaimResult]:
    """Judge the mean cosine over layers, at the noise that verdicts are made at."""
    from qbench.analysis.gradient_mismatch import STATED

    found = []
    for c in claim.comparisons:
        sides = []
        for arm in (c.first, c.second or ()):
            name = arm[0].removeprefix(BACKWARD)
            sides.append({int(s): mean(x for x, _ in m[str(STATED)][name].values()) for s, m in measured.items()})
        one = kept.judge_values(c, *sides)
        one.seeds, one.troubles = sorted(net), kept._troubles("trained", net)
        found.append(one)
    return found


def layers_table(measured: dict[str, Any]) -> str:
    """Return each layer's mean cosine and bias over seeds, for every backward, and the means at other noises."""
    from qbench.analysis.gradient_mismatch import STATED

    if not measured:
        return ""
    runs = list(measured.values())
    names = list(runs[0][str(STATED)])
    table = Table(("sigma", "layer", *(f"{name} {what}" for name in names for what in ("cosine", "bias"))))
    for layer in runs[0][str(STATED)][names[0]]:
        pairs = [[run[str(STATED)][name][layer] for run in runs] for name in names]
        cells = [f"{mean(pair[i] for pair in rows):.3f}" for rows in pairs for i in (0, 1)]
        table.rows.append((f"{STATED:g}", layer, *cells))
    for sigma in runs[0]:
        pairs = [[pair for run in runs for pair in run[sigma][name].values()] for name in names]
        cells = [f"{mean(pair[i] for pair in rows):.3f}" for rows in pairs for i in (0, 1)]
        table.rows.append((sigma, "mean", *cells))
    return "\n" + markdown([table]) + "\n"


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
