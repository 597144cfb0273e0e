#!/usr/bin/env python3
"""Train runs that test the papers' claims in conf/experiment/claims/, and write docs/claims.md.

    .venv/bin/python scripts/claims.py [NAME ...] [--seeds 0-9] [--out outputs/claims] [--docs docs/claims.md]
                                    [--plan | --report | --from FILE] [--record FILE]

A claim compares arms, which are settings. Without a NAME, all claims are tested. Runs that are not stored yet are
trained. Claims share runs with equal configurations. --plan shows which runs would be trained, and estimates the time.
--report trains nothing. The document always contains all claims, because Holm's adjustment covers all claims. The
values in the document are also written to OUT/claims.json.

--record FILE stores the runs of all claims. The file also contains the sha256 of their weights, and their hits, which
say which test images are classified correctly. --from FILE writes the document from such a file and needs no runs.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.errors import ConfigError, QbenchError
from qbench.experiment.planned_run import planned_run
from qbench.papers import claim_files
from qbench.papers.claim_files import Claim
from qbench.papers.claim_results import (
    NOT_STARTED,
    ClaimResult,
    claims_table,
    decide_claims,
    evaluate_claim,
    evaluate_values,
    unfinished_seeds,
)
from qbench.report.tables.table import Table, markdown
from qbench.runs.hits import Hits, load_hits
from qbench.runs.reader import DONE, RunRecord, dump_records, load_records, read_run, with_baselines
from qbench.system import files

ROOT = Path(__file__).resolve().parents[1]
FINAL = (DONE, "unsupported", "diverged")
"""Statuses of runs that are not repeated. A failed run is repeated."""
BACKWARD = "method.backward="

Arm = tuple[str, ...]
"""The command-line overrides of an arm."""
ArmRuns = dict[Arm, dict[int, RunRecord]]
"""The runs of each arm by seed."""

PREFACE = """\
# Claims

This page tests claims of the papers by training networks. `{command}` trained the runs
and wrote this page. Each row of the table is one comparison from a file in `conf/experiment/claims/`. A comparison has
two arms, which are the two settings that it compares.

The effect is the test top-1 of the first arm minus the test top-1 of the second arm, after the last epoch, in points.
For `bn_holds_range`, it is a difference between two losses of accuracy relative to the float baselines, and for claims
on gradient mismatch, a difference between two cosines. Runs are paired by seed. The column `95 % interval` contains the
confidence interval of the effect. The interval of an accuracy treats both seeds and test images as samples (two-way,
`qbench/report/statistics`), that of a cosine only seeds.

Each comparison is tested two-sided at the 5 % level. The p-values are adjusted for all {family} comparisons together
(Holm). The intervals are not adjusted. A comparison can therefore be undecided although its interval does not contain
the threshold. The outcomes are:

- `holds`: the data support the claim.
- `does not hold`: the data support the opposite of the claim.
- `undecided with n seeds`: n seeds do not decide the comparison. The column `n needed` contains the number of seeds
  that would give 80 % power if the true effect were equal to the observed effect.

If some runs of a comparison failed, diverged or are unsupported, the comparison has no outcome, because the remaining
runs are not a fair sample. The table then states the reason.

The column `arms` has the form `first - second > threshold`. The arm `unchanged` is the run of the experiment file
without further options. The sections below the table give the mean accuracy of each arm, and the commands.

There are two data sets: digits (1,797 real 8x8 images, 450 of them for test) and glyphs (characters rendered from
fonts, with separate fonts for the test images: 10,000, or 4,000 for the claims on HWGQ). The networks are thin residual
networks with 8 or 20 layers, and training is short. Such runs can show whether an effect exists under one protocol, and
how large the effect is under this protocol. They do not reproduce the papers' values on SVHN, CIFAR-10 or ImageNet. A
claim that does not hold here may still hold in the paper's experiments, because depth, width, number of classes and
length of training differ. The wider an interval is, the larger an effect must be to be detected with these data.
Differences between networks with 8 or 5 bits may be too small to detect. "From memory" marks claims that are stated
from memory and not quoted from the paper.

Some of these claims were also tested with ResNet-20 on CIFAR-10 ([results](results.md#claims-on-cifar-10)).
"""


def seeds_as_typed(seeds: list[int]) -> str:
    """Return seeds as on the command line, such as 0-4 or 0,1,5."""
    whole = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if whole else ",".join(map(str, seeds))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/claims.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to train; default: all")
    parser.add_argument("--seeds", default="0-9", type=parse_seeds, help="such as 0-9 or 0,1,5")
    parser.add_argument("--out", default="outputs/claims", help="directory of the runs")
    parser.add_argument("--docs", default="docs/claims.md", type=Path, help="document to write")
    parser.add_argument("--plan", action="store_true", help="show what would be trained; train nothing")
    parser.add_argument("--report", action="store_true", help="write the document from stored runs; train nothing")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the runs behind the document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read the runs from such a file")
    options = parser.parse_args(arguments)
    try:
        stored = Stored.load(options.source) if options.source else Stored()
        claims = claim_files.read_claims(groups.conf_directory() / "experiment" / "claims")
        known = [claim.name for claim in claims]
        if unknown := [name for name in options.names if name not in known]:
            raise ConfigError(f"{unknown[0]}: no such claim\nallowed: {', '.join(known)}")
        chosen = [claim for claim in claims if not options.names or claim.name in options.names]
        if options.plan:
            print_plan(chosen, options.seeds, options.out)
            return 0
        if not options.report and not options.source:
            for claim in chosen:
                train(claim, options.seeds, options.out)
        write_report(claims, options.seeds, options.out, options.docs, stored, options.record)
    except QbenchError as error:
        print(f"scripts/claims.py: {error}", file=sys.stderr)
        return error.status
    return 0


@dataclass(frozen=True)
class Stored:
    """Runs and measurements from a file that `write_record` wrote. Without such a file, both are empty.

    Args:
        runs: map from the name of a run's directory to the run.
        mismatch: map from a claim to its gradient mismatch by seed.
        machine: a text that describes the machine of the runs.
    """

    runs: Mapping[str, RunRecord] = field(default_factory=dict)
    mismatch: Mapping[str, Any] = field(default_factory=dict)
    machine: str = ""

    @staticmethod
    def load(file: Path) -> "Stored":
        """Return the content of a file that `write_record` wrote."""
        runs = {place(run.path): run for run in load_records(file)}
        values = json.loads(file.read_text("utf-8"))
        return Stored(runs, values["gradient_mismatch"], values["machine"])

    def run(self, planned: RunRecord) -> RunRecord:
        """Return the run of the file with the same directory, or the planned run if the file has no such run."""
        return self.runs.get(place(planned.path), planned)

    @property
    def hits(self) -> dict[str, Hits]:
        """Which test images each run classified correctly, by the last two parts of the run's path."""
        return {name: run.hits for name, run in self.runs.items() if run.hits}


def place(path: Path) -> str:
    """Return the last two parts of a run's path, which stay the same when the folder of the runs is moved."""
    return f"{path.parent.name}/{path.name}"


def write_record(file: Path, runs: Iterable[RunRecord], mismatch: Mapping[str, Any], machine: str) -> None:
    """Write the runs and their float baselines to a file, with one entry per run."""
    found = with_baselines(list({run.path: run for run in runs}.values()))
    relative = [replace(run, path=Path(place(run.path)), hits=run.hits or hits_of(run)) for run in found]
    values = json.loads(dump_records(relative)) | {"gradient_mismatch": mismatch, "machine": machine}
    files.write(file, (json.dumps(values, separators=(",", ":"), sort_keys=True) + "\n").encode())


def hits_of(run: RunRecord) -> Hits | None:
    top1 = run.result.top1 if run.result else None
    return None if top1 is None else load_hits(run.path, top1)


def parse_seeds(text: str) -> list[int]:
    """Parse 0-9 or 0,1,5."""
    seeds: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        seeds += range(int(low), int(high or low) + 1)
    return sorted(set(seeds))


def arm_words(claim: Claim, arm: Iterable[str], out: str) -> list[str]:
    """Return the command-line overrides of an arm's run."""
    return [f"experiment=claims/{claim.name}", *arm, f"out={out}"]


def arm_configs(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> dict[int, Config]:
    """Compose an arm once and return its configuration for every seed."""
    (config,) = compose.configurations(arm_words(claim, arm, out))
    configs = {}
    for seed in seeds:
        configs[seed] = copy.deepcopy(config)
        configs[seed].seed = seed
    return configs


def stored_run(config: Config) -> RunRecord:
    path = planned_run(config).path
    return read_run(path) if path.is_dir() else RunRecord(path=path, status=NOT_STARTED)


def arm_runs(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> dict[int, RunRecord]:
    """Return the stored runs of an arm, by seed.

    If the arm's configuration is not valid, all its runs count as failed.
    """
    try:
        configs = arm_configs(claim, arm, seeds, out)
    except ConfigError as error:
        return {seed: RunRecord(path=Path(out), status="failed", reason=str(error)) for seed in seeds}
    return {seed: stored_run(config) for seed, config in configs.items()}


def sweep_words(claim: Claim, arm: Iterable[str], seeds: list[int], out: str) -> list[str]:
    """Return the command-line overrides of the sweep that trains an arm with the given seeds."""
    return ["-m", *arm_words(claim, arm, out), f"seed={','.join(map(str, seeds))}", "hydra/launcher=joblib"]


def train(claim: Claim, seeds: list[int], out: str) -> None:
    """Train the runs of a claim that are not stored."""
    for arm in claim.arms:
        missing = [seed for seed, run in arm_runs(claim, arm, seeds, out).items() if run.status not in FINAL]
        if missing:
            words = sweep_words(claim, arm, missing, out)
            print(f"qbench {' '.join(words)}", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-m", "qbench", *words], stdout=subprocess.DEVNULL)
            if done.returncode == 75:
                raise SystemExit(75)


def print_plan(chosen: list[Claim], seeds: list[int], out: str) -> None:
    """For each claim, print the estimated training time of the missing runs. Shared runs are counted once."""
    total = 0.0
    counted: set[str] = set()
    table = Table(("claim", "arms", "missing runs", "estimate"))
    for claim in chosen:
        missing, seconds = missing_work(claim, seeds, out, counted)
        total += seconds
        table.rows.append((claim.name, str(len(claim.arms)), str(missing), f"{seconds:.0f} s"))
    table.rows.append(("all", "", "", f"{total / 60:.0f} min"))
    print(markdown([table]))
    print(
        "\nEstimated from a few timed training steps per network on one core, float baselines included. If only the"
        "\nbaseline of the first seed is stored, the baselines of all other seeds are counted. Evaluation and the"
        "\nmethods' own measurements add about a third. Arms that an earlier claim shares are not counted again."
    )


def missing_work(claim: Claim, seeds: list[int], out: str, counted: set[str]) -> tuple[int, float]:
    """Return the number of missing runs of a claim and their training time in seconds.

    Args:
        counted: the paths of the runs that earlier claims have counted. The runs of this claim are added to this set.
    """
    from qbench.analysis.plan import plan

    missing, seconds = 0, 0.0
    for arm in claim.arms:
        try:
            configs = arm_configs(claim, arm, seeds, out)
            rows = plan([planned_run(configs[seeds[0]])])[0].values
        except ConfigError as error:
            print(f"{claim.name}: {' '.join(arm)}: {error}", file=sys.stderr)
            continue
        for row in rows:
            if row["run"] in counted:
                continue
            counted.add(row["run"])
            count = len(seeds)
            if Path(row["run"]) == planned_run(configs[seeds[0]]).path:
                count = sum(stored_run(config).status not in FINAL for config in configs.values())
            missing += count
            seconds += count * (row["seconds"] or stored_seconds(Path(row["run"])))
    return missing, seconds


def stored_seconds(path: Path) -> float:
    """Return the time in seconds of the stored run with the first seed. Runs with other seeds take about as long."""
    return float((files.read_json(path / "result.json") or {}).get("wall_seconds") or 0)


def write_report(
    claims: list[Claim], seeds: list[int], out: str, docs: Path, stored: Stored, record: Path | None
) -> None:
    """Evaluate every claim, and write OUT/claims.json and the document. If `record` is given, store the runs there."""
    results: list[ClaimResult] = []
    runs: dict[str, ArmRuns] = {}
    mismatch: dict[str, dict[str, Any]] = {}
    for claim in claims:
        arms = runs[claim.name] = {
            arm: {seed: stored.run(run) for seed, run in arm_runs(claim, arm, seeds, out).items()} for arm in claim.arms
        }
        if claim.measure == "gradient_mismatch":
            measured = stored.mismatch.get(claim.name)
            mismatch[claim.name] = measured or measure_mismatch(claim, arms[claim.net], out)
            results += mismatch_results(claim, arms[claim.net], mismatch[claim.name])
            continue
        for c in claim.comparisons:
            second = {} if c.second is None else arms[c.second]
            results.append(evaluate_claim(c, claim.measure, arms[c.first], second, stored.hits))
    decide_claims(results)
    table = claims_table(results, {claim.name: claim for claim in claims})
    machine = stored.machine or machine_text(runs)
    files.make_directory(Path(out))
    values = {"seeds": seeds, "machine": machine, "comparisons": table.values, "gradient_mismatch": mismatch}
    files.write_json(Path(out) / "claims.json", values)
    files.make_directory(docs.parent)
    options = [] if out == "outputs/claims" else ["--out", out]
    command = " ".join(["scripts/claims.py", "--seeds", seeds_as_typed(seeds), *options])
    parts = [PREFACE.format(command=command, family=len(results)), markdown([table]) + "\n"]
    for claim in claims:
        of_claim = [one for one in results if one.comparison.claim == claim.name]
        parts.append(claim_section(claim, of_claim, runs[claim.name], seeds, out, machine))
        if claim.name in mismatch:
            parts.append(layers_section(mismatch[claim.name]))
    files.write(docs, "\n".join(part for part in parts if part).encode())
    if record:
        every = [run for arms in runs.values() for arm in arms.values() for run in arm.values()]
        write_record(record, every, mismatch, machine)
    counts = Counter(one.outcome.partition(":")[0].partition(" at ")[0] for one in results)
    print(f"{docs}: {len(results)} comparisons: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


def claim_section(
    claim: Claim, results: list[ClaimResult], arms: ArmRuns, seeds: list[int], out: str, machine: str
) -> str:
    """Return the section of a claim, with its text, means and verdicts, commands and the time of its runs."""
    lines = [f"## {claim.name}", "", f"{claim.says} Source: {claim.source}.", ""]
    lines += [claim.note, ""] if claim.note else []
    for one in results:
        if one.means is not None:
            places = 4 if claim.measure == "gradient_mismatch" else 2
            first, second = (f"{x:.{places}f}" for x in one.means)
            means = f"mean of the first arm {first}, of the second arm {second}"
            lines.append(f"- {one.comparison.name}: {means}. Outcome: {one.outcome}")
        lines += [f"- {one.comparison.name}: {text}" for text in one.problems + one.notes]
    lines += ["", *(f"    qbench {' '.join(sweep_words(claim, arm, seeds, out))}" for arm in arms), ""]
    runs = [run for arm in arms.values() for run in arm.values()]
    done = sum(run.status == DONE for run in runs)
    seconds = sum(run.result.wall_seconds or 0.0 for run in runs if run.result is not None)
    lines.append(
        f"{done} of {len(runs)} runs are done. "
        f"They took {seconds:.0f} s, to which the time of their float baselines must be added ({machine})."
    )
    return "\n".join(lines) + "\n"


def machine_text(runs: dict[str, ArmRuns]) -> str:
    """Return the machine of the first run with a manifest, and the commits of all runs."""
    paths = {run.path for arms in runs.values() for arm in arms.values() for run in arm.values()}
    manifests = [manifest for path in sorted(paths) if (manifest := files.read_json(path / "manifest.json"))]
    if not manifests:
        return "no run yet"
    first, commits = manifests[0], sorted({str(manifest["commit"])[:7] for manifest in manifests})
    system, torch = str(first["platform"]).partition("-")[0], first["versions"]["torch"]
    return (
        f"{os.cpu_count()} cores, {first['processor']}, {system}, torch {torch}, {first['threads']} thread per run, "
        f"{first['device']}, commit {' and '.join(commits)}"
    )


def measure_mismatch(claim: Claim, net: dict[int, RunRecord], out: str) -> dict[str, Any]:
    """Return the gradient mismatch of a claim's networks, as {seed: {sigma: {backward: {layer: (cosine, bias)}}}}.

    Stored values are reused.
    """
    from qbench.analysis.gradient_mismatch import mismatch_of_run

    store = Path(out) / "gradient_mismatch.json"
    stored = files.read_json(store) or {}
    names = backward_names(claim)
    by_seed = {}
    for seed, run in net.items():
        if run.status != DONE or run.result is None:
            continue
        key = f"{run.result.weights_sha256} {','.join(names)}"
        if key not in stored:
            stored[key] = mismatch_of_run(run.path, names)
            files.write_json(store, stored)
        by_seed[str(seed)] = stored[key]
    return by_seed


def backward_names(claim: Claim) -> list[str]:
    """Return the names of the backward passes that a claim compares."""
    arms = [arm for c in claim.comparisons for arm in (c.first, c.second or ())]
    if any(len(arm) != 1 or not arm[0].startswith(BACKWARD) for arm in arms):
        raise ConfigError(f"{claim.name}: arms of measure=gradient_mismatch are [{BACKWARD}NAME]")
    return sorted({arm[0].removeprefix(BACKWARD) for arm in arms})


def mismatch_results(claim: Claim, net: dict[int, RunRecord], mismatch: dict[str, Any]) -> list[ClaimResult]:
    """Evaluate a claim about gradient mismatch by the mean cosine over layers, at the noise level `VERDICT_SIGMA`."""
    from qbench.analysis.gradient_mismatch import VERDICT_SIGMA

    results = []
    for c in claim.comparisons:
        sides = []
        for arm in (c.first, c.second or ()):
            name = arm[0].removeprefix(BACKWARD)
            layers = {int(seed): by_sigma[str(VERDICT_SIGMA)][name] for seed, by_sigma in mismatch.items()}
            sides.append({seed: mean(cosine for cosine, _ in by_layer.values()) for seed, by_layer in layers.items()})
        result = evaluate_values(c, *sides)
        result.seeds, result.problems = sorted(net), unfinished_seeds("trained", net)
        results.append(result)
    return results


def layers_section(mismatch: dict[str, Any]) -> str:
    """Return the table of each layer's cosine and bias."""
    from qbench.analysis.gradient_mismatch import mismatch_table

    return "\n" + markdown([mismatch_table(list(mismatch.values()))]) + "\n" if mismatch else ""


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
