"""Tests which settings with the same widths differ, and which are equivalent.

Each pair of settings with the same widths in a table is tested twice: for a difference, and for equivalence within a
margin. Runs are paired by seed. If predictions are stored, runs are also paired by test image. The p-values of each
test are adjusted by Holm's method, over all pairs with the same data set, network and protocol.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean
from types import MappingProxyType

from qbench.bits import Bits
from qbench.report.comparison.predictions import RunAccuracy, load_run_accuracy, paired_difference, same_test_images
from qbench.report.comparison.sentences import pair_notes, sample_notes
from qbench.report.comparison.setting import SeedAccuracy, Setting
from qbench.report.comparison.setting_pair import SettingPair
from qbench.report.comparison.setting_table import settings_of
from qbench.report.comparison.summary import summary
from qbench.report.comparison.verdicts import MARGIN, Conclusion, Verdict
from qbench.report.statistics.differences import ALPHA, sample_error, unpaired, with_seed_dof
from qbench.report.statistics.hypothesis_tests import equivalent, holm, mcnemar
from qbench.report.statistics.power import seeds_to_decide
from qbench.report.tables.table import Table
from qbench.runs.hits import Hits
from qbench.system import files

DIFF = (
    "pairs of settings have the same widths; diff: top-1 minus that of each run's float baseline, with an interval for "
    "this row alone"
)
"""The note that says what the tests of pairs and the column `diff` compare."""


def conclude(
    tables: Sequence[Table], margin: float = MARGIN, hits: Mapping[str, Hits] = MappingProxyType({})
) -> list[Table]:
    """Add conclusions to the settings in the tables of `compare`.

    The function also adds notes to the tables. The notes state the conclusions in words.

    Args:
        margin: equivalence margin in points of top-1.
        hits: the hits of runs that were read from a record (a JSON file with many results), by the run's directory.
            Hits say which test images a run classified correctly. The hits of all other runs are read from the runs'
            directories.

    Raises:
        ValueError: the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin:g}: must be above 0, in points of top-1")
    families: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, table in enumerate(tables):
        if settings := settings_of(table):
            families[settings[0].dataset, settings[0].model, settings[0].protocol].append(i)
    concluded = dict(enumerate(tables))
    for places in families.values():
        with_conclusions = _conclude_family([tables[i] for i in places], margin, hits)
        concluded |= dict(zip(places, with_conclusions, strict=True))
    return [concluded[i] for i in range(len(tables))]


def _conclude_family(tables: Sequence[Table], margin: float, hits: Mapping[str, Hits]) -> list[Table]:
    """Return the tables of one protocol with conclusions. The p-values of all these tables are adjusted together."""
    cache = {
        run.run: load_run_accuracy(run.run, run.top1, hits[run.run])
        for table in tables
        for setting in settings_of(table)
        for run in setting.runs
        if run.run in hits
    }
    by_table = [_pairs(settings_of(table), cache) for table in tables]
    adjusted = adjust_p_values([pair for pairs in by_table for pair in pairs], margin)
    remaining, concluded = iter(adjusted), []
    for table, pairs in zip(tables, by_table, strict=True):
        table_pairs = [next(remaining) for _ in pairs]
        settings = _with_conclusions(settings_of(table), table_pairs, margin, hits)
        by_old = dict(zip(map(id, settings_of(table)), settings, strict=True))
        # `pair_notes` reads the conclusion of the first setting, but only of leading pairs
        table_pairs = [replace(p, first=by_old[id(p.first)]) if p.leading else p for p in table_pairs]
        summed_up = [*filter(None, [summary(settings)])]
        explained = [DIFF] if summed_up and any(setting.difference for setting in settings) else []
        notes = [*summed_up, *explained, *table.notes, *sample_notes(settings), *pair_notes(table_pairs, margin)]
        concluded.append(replace(table, values=[*settings], notes=notes))
    return concluded


def _with_conclusions(
    settings: Sequence[Setting], pairs: Sequence[SettingPair], margin: float, hits: Mapping[str, Hits]
) -> list[Setting]:
    """Return the settings with their conclusions, which follow from the pairs and the number of test images."""
    by_first: dict[int, list[SettingPair]] = defaultdict(list)
    for pair in pairs:
        by_first[id(pair.first)].append(pair)
    # A float baseline can have other test images: it may be a checkpoint that was trained on another data set.
    measured = [setting for setting in settings if not setting.is_baseline] or settings
    runs = [run.run for setting in measured for run in setting.runs[:2]]
    counts = (len(hits[run].correct) if run in hits else count_test_images(Path(run)) for run in runs)
    images = next((count for count in counts if count), None)
    concluded = []
    for setting in settings:
        lower = by_first[id(setting)]
        conclusion = Conclusion(
            pairs=tuple(pair.conclusion(margin) for pair in lower),
            winner=bool(lower) and all(pair.leading and pair.verdict is Verdict.ABOVE for pair in lower),
            test_images=images,
            test_sample_ci95_half=sample_error(setting.top1.mean, images) if images else None,
        )
        concluded.append(replace(setting, conclusion=conclusion))
    return concluded


def adjust_p_values(family: Sequence[SettingPair], margin: float) -> list[SettingPair]:
    """Return the pairs with p-values that are adjusted by Holm's method.

    A pair is leading if its first setting is the best one at these widths. Undecided leading pairs also get the number
    of seeds that a verdict would need. Pairs whose difference is not known are not tested and do not count in the
    adjustment. p-values of McNemar's test are about networks instead of methods, and are adjusted on their own.
    """
    tested = [(i, pair.difference) for i, pair in enumerate(family) if pair.difference is not None]
    p_holm = holm([d.p for _, d in tested])
    p_equivalent_holm = holm([equivalent(d, margin) for _, d in tested])
    adjusted = list(family)
    for (i, _), p, p_equivalent in zip(tested, p_holm, p_equivalent_holm, strict=True):
        adjusted[i] = replace(family[i], p_holm=p, p_equivalent_holm=p_equivalent, family=len(tested))
    networks = [(i, pair.p_mcnemar) for i, pair in enumerate(family) if pair.p_mcnemar is not None]
    for (i, _), p in zip(networks, holm([p for _, p in networks]), strict=True):
        adjusted[i] = replace(family[i], p_mcnemar_holm=p, networks=len(networks))
    undecided = [i for i, pair in enumerate(adjusted) if pair.verdict is Verdict.UNDECIDED]
    for i in undecided:
        pair = adjusted[i]
        if pair.leading and pair.difference is not None:
            n = seeds_to_decide(pair.difference, margin, ALPHA / len(undecided))
            adjusted[i] = replace(pair, more_seeds=None if n is None else max(n - pair.difference.n, 1))
    return adjusted


def _pairs(settings: Sequence[Setting], cache: dict[str, RunAccuracy]) -> list[SettingPair]:
    """Return every pair of settings with the same widths. The setting with the higher mean comes first.

    Float baselines are left out.
    """
    by_widths: dict[Bits, list[Setting]] = defaultdict(list)
    for setting in settings:
        if not setting.is_baseline:
            by_widths[setting.bits].append(setting)
    pairs = []
    for same_widths in by_widths.values():
        ranked = sorted(same_widths, key=lambda s: (-s.top1.mean, s.label))
        accuracies = [_accuracies(setting, cache) for setting in ranked]
        for i, j in combinations(range(len(ranked)), 2):
            pair = partial(SettingPair, first=ranked[i], second=ranked[j], leading=i == 0)
            pairs.append(_compared(pair, (ranked[i], ranked[j]), (accuracies[i], accuracies[j])))
    return pairs


Accuracies = dict[int, Callable[[], RunAccuracy]]
"""Maps a seed to a function that returns the accuracy of the seed's runs. The function may read predictions."""


def _compared(
    pair: Callable[..., SettingPair], settings: tuple[Setting, Setting], groups: tuple[Accuracies, Accuracies]
) -> SettingPair:
    """Return a pair with its difference or its McNemar p-value.

    If the settings have two or more seeds in common, the difference is paired by seed. Otherwise, if both settings have
    two or more seeds, the difference is Welch's unpaired difference. If one setting has a single seed that the other
    setting also has, McNemar's test compares the two networks. Seeds with the same networks as an earlier seed are left
    out.
    """
    common = sorted(groups[0].keys() & groups[1].keys())
    seeds = _independent(common, settings)
    if len(seeds) > 1:
        runs = [[group[seed]() for seed in seeds] for group in groups]
        d = with_seed_dof(paired_difference(*runs))
        return pair(difference=d, paired_by="seed and test image" if d.items else "seed")
    own = [_independent(list(group), [setting]) for group, setting in zip(groups, settings, strict=True)]
    if len(common) < 2 and min(map(len, own)) > 1:
        top1 = [[group[seed]().top1 for seed in own_seeds] for group, own_seeds in zip(groups, own, strict=True)]
        return pair(difference=unpaired(*top1))
    if seeds:
        one, other = (group[seeds[0]]() for group in groups)
        if same_test_images([one, other]) and one.hits is not None and other.hits is not None:
            return pair(p_mcnemar=mcnemar(one.hits, other.hits))
    return pair()


def _independent(seeds: Sequence[int], settings: Sequence[Setting]) -> list[int]:
    runs = [run for setting in settings for run in setting.runs]
    return independent_seeds({seed: [run.weights_sha256 for run in runs if run.seed == seed] for seed in seeds})


def independent_seeds(weights: Mapping[int, Sequence[str | None]]) -> list[int]:
    """Return the seeds without those for which all settings have the same weights as for an earlier seed.

    Args:
        weights: maps a seed to the sha256 of the weights of each setting, or None for weights that are not known.
    """
    kept: dict[object, int] = {}
    for seed, digests in weights.items():
        kept.setdefault(seed if None in digests else tuple(digests), seed)
    return list(kept.values())


def _accuracies(setting: Setting, cache: dict[str, RunAccuracy]) -> Accuracies:
    """Return a map from seed to a function that returns the accuracy of the seed's run.

    If a seed has several runs, the function returns the mean accuracy of these runs.
    """
    runs: dict[int, list[SeedAccuracy]] = defaultdict(list)
    for run in setting.runs:
        runs[run.seed].append(run)

    def load(seed_runs: Sequence[SeedAccuracy]) -> RunAccuracy:
        if len(seed_runs) > 1:
            return RunAccuracy(mean(run.top1 for run in seed_runs))
        run = seed_runs[0]
        if run.run not in cache:
            cache[run.run] = load_run_accuracy(run.run, run.top1)
        return cache[run.run]

    return {seed: partial(load, seed_runs) for seed, seed_runs in runs.items()}


def count_test_images(run: Path) -> int | None:
    """Return the number of test images in a run's manifest, or None if the number is not recorded."""
    data = (files.read_json(run / "manifest.json") or {}).get("data")
    count = data.get("test_images") if isinstance(data, dict) else None
    return count if isinstance(count, int) and count > 0 else None
