"""Aggregates the runs of a setting: mean accuracy over seeds, cost, speed and verified levels."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

from qbench.bits import Bits, LevelCount
from qbench.cost.network_cost import NetworkCost
from qbench.report.comparison import naming
from qbench.report.comparison.lr_selection import SelectedLearningRate
from qbench.report.comparison.setting import Estimate, LevelRange, SeedAccuracy, Setting, VerifiedLevels, estimate
from qbench.report.tables.units import si_format
from qbench.runs.reader import FROM_LOGS
from qbench.runs.result import Result, TrainingSpeed

NOT_FINE_TUNED = ("trained from scratch", "not trained")
"""Text with which an entry of `protocol_changes` begins if a run was not fine-tuned from a float baseline."""


def aggregate(
    label: str, results: Sequence[Result], source: str, file_bytes: Mapping[str, int],
    learning_rate: SelectedLearningRate | None = None,
) -> Setting:  # fmt: skip
    """Return the setting to which the results belong. Its runs are sorted by seed and directory.

    Args:
        label: the method's name, followed by the options that differ between runs of the method.
        results: one or more results with the same method, protocol and widths. All results have an accuracy.
        source: the kind of file that the results were read from.
        file_bytes: sizes of exported packed files in bytes, by directory of the run.
        learning_rate: how the learning rate was selected, or None without lr_search=grid.
    """
    results = sorted(results, key=lambda r: (r.seed, r.run))
    first = results[0]
    runs = tuple(_seed_accuracy(result) for result in results)
    differences = [run.top1 - run.baseline_top1 for run in runs if run.baseline_top1 is not None]
    complete = len(differences) == len(runs)
    return Setting(
        label=label,
        method=first.method,
        options=naming.options(first),
        bits=Bits(**first.bits),
        network=first.network,
        dataset=first.dataset,
        model=first.model,
        protocol=first.protocol.hash[:8],
        keys=first.protocol.keys,
        is_baseline=naming.is_baseline(first),
        fine_tuned=not any(change.startswith(NOT_FINE_TUNED) for change in first.protocol_changes),
        source=source,
        runs=runs,
        top1=estimate(_by_seed(runs, [run.top1 for run in runs])),
        difference=estimate(_by_seed(runs, differences)) if complete else None,
        levels=next((r.levels for r in results if r.levels is not None), None),
        cost=_mean_cost(results),
        file_bytes=next((file_bytes[r.run] for r in results if r.run in file_bytes), None),
        speed=_mean_speed(results),
        verified=_verified_levels(results),
        learning_rate=learning_rate,
        warnings=(*_warnings(results), *_size_warnings(results)),
    )


def with_control(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings with their differences from the float control of the table.

    The float control (`method=float init=float`) is a float network that starts from its float baseline and is trained
    for as many epochs as the other settings. A difference uses the seeds that the setting and the control have in
    common. A setting has no difference if no control has a network with the same normalization, or if the setting does
    not start from its float baseline. Logs contain neither of these two facts, so runs from logs are not used.
    """
    return [replace(setting, over_control=_over_control(setting, settings)) for setting in settings]


def control_notes(settings: Sequence[Setting]) -> list[str]:
    """Return notes on settings whose float control is missing, or has fewer seeds than the setting."""
    controls = [setting for setting in settings if _is_control(setting)]
    missing: dict[str, list[str]] = defaultdict(list)
    for setting in settings:
        if _can_have_control(setting) and not any(_same_norm(control, setting) for control in controls):
            keys = naming.normalization(setting.network)
            typed = " ".join(f"model.{key}={value}" for key, value in keys.items()) or "model.norm=auto"
            missing[typed].append(setting.name)
    start = "float" if not settings or settings[0].keys.get("init") in (None, "float", "scratch") else "FILE"
    notes = [
        f"{', '.join(names)}: no float control has the same normalization; "
        f"to add one, run method=float init={start} {typed}"
        for typed, names in missing.items()
        if controls
    ]
    for setting in settings:
        own = [control for control in controls if _same_norm(control, setting)]
        if len(own) == 1 and _can_have_control(setting) and not setting.over_control:
            notes.append(f"{setting.name}: over float is missing, because the float control has no run with its seeds")
        if setting.over_control and setting.over_control.n < setting.top1.n:
            notes.append(
                f"{setting.name}: over float is a mean over {setting.over_control.n} of {setting.top1.n} seeds, "
                "because the float control has no run with the other seeds"
            )
    return notes


def _is_control(setting: Setting) -> bool:
    return setting.method == "float" and not setting.is_baseline and setting.source != FROM_LOGS


def _same_norm(control: Setting, setting: Setting) -> bool:
    return naming.normalization(control.network) == naming.normalization(setting.network)


def _can_have_control(setting: Setting) -> bool:
    return setting.fine_tuned and setting.method != "float" and setting.source != FROM_LOGS


def _over_control(setting: Setting, settings: Sequence[Setting]) -> Estimate | None:
    """Return the difference of a setting from its float control.

    The result is None if no control, or more than one control, has a network with the same normalization.
    """
    controls = [s for s in settings if _is_control(s) and _same_norm(s, setting)]
    if len(controls) != 1 or not _can_have_control(setting):
        return None
    control = controls[0].runs
    seeds = dict.fromkeys(run.seed for run in control)
    by_seed = dict(zip(seeds, _by_seed(control, [run.top1 for run in control]), strict=True))
    runs = [run for run in setting.runs if run.seed in by_seed]
    return estimate(_by_seed(runs, [run.top1 - by_seed[run.seed] for run in runs])) if runs else None


def _seed_accuracy(result: Result) -> SeedAccuracy:
    assert result.top1 is not None, "a run that is done has an accuracy"
    baseline = result.baseline.run if result.baseline else None
    return SeedAccuracy(
        seed=result.seed, run=result.run, top1=result.top1, baseline=baseline, baseline_top1=result.baseline_top1,
        weights_sha256=result.weights_sha256,
    )  # fmt: skip


def _by_seed(runs: Sequence[SeedAccuracy], values: Sequence[float]) -> list[float]:
    """Return one value per seed. If a seed has several runs, the value is the mean over these runs."""
    grouped: dict[int, list[float]] = defaultdict(list)
    for run, value in zip(runs, values, strict=True):
        grouped[run.seed].append(value)
    return [mean(values) if len(values) > 1 else values[0] for values in grouped.values()]  # `statistics.mean` is slow


def _mean_cost(results: Sequence[Result]) -> NetworkCost | None:
    """Return the cost of the runs.

    Sizes that depend on the trained network, as with `dq`, are averaged over the runs.
    """
    known = [r.cost for r in results if r.cost]
    if not known or known.count(known[0]) == len(known):
        return known[0] if known else None
    return replace(
        known[0],
        bitops=round(mean(cost.bitops for cost in known)),
        bytes_ideal=mean(cost.bytes_ideal for cost in known),
        bytes_packed=round(mean(cost.bytes_packed for cost in known)),
        bits_per_weight=mean(cost.bits_per_weight for cost in known),
    )


def _size_warnings(results: Sequence[Result]) -> list[str]:
    sizes = [r.cost.bytes_ideal for r in results if r.cost]
    if not sizes or min(sizes) == max(sizes):
        return []
    return [
        f"the size differs between runs, from {si_format(min(sizes))}B to {si_format(max(sizes))}B; the mean is shown"
    ]


def _mean_speed(results: Sequence[Result]) -> TrainingSpeed | None:
    """Return the mean speed of the runs and the largest peak memory."""
    known = [r.speed for r in results if r.speed]
    if not known:
        return None
    return TrainingSpeed(
        images_per_second=mean(s.images_per_second for s in known),
        seconds_per_epoch=mean(s.seconds_per_epoch for s in known),
        peak_bytes=max(s.peak_bytes for s in known),
    )


def _warnings(results: Sequence[Result]) -> tuple[str, ...]:
    """Return every warning once. If only some seeds have a warning, its text ends with these seeds."""
    seeds: dict[str, dict[int, None]] = defaultdict(dict)
    for result in results:
        for warning in result.warnings:
            seeds[warning][result.seed] = None
    count = len({result.seed for result in results})
    return tuple(
        text if len(having) == count else f"{text} (seed {', '.join(map(str, having))})"
        for text, having in seeds.items()
    )


def _verified_levels(results: Sequence[Result]) -> VerifiedLevels | None:
    # runs usually share one object, which is counted once
    known = list({id(r.verified): r.verified for r in results if r.verified is not None}.values())
    if not known:
        return None
    counts: dict[str, list[LevelCount]] = defaultdict(list)
    for layer in (layer for verified in known for layer in verified.values()):
        for key, count in layer.items():
            counts[key].append(count)
    found = {key: _level_range(slot) for key, slot in counts.items()}
    return VerifiedLevels(layers=min(map(len, known)), found=found)


def _level_range(counts: Sequence[LevelCount]) -> LevelRange:
    found, allowed = [count.found for count in counts], [count.allowed for count in counts]
    return LevelRange(fewest=min(found), most=max(found), allowed=max(allowed), fewest_allowed=min(allowed))
