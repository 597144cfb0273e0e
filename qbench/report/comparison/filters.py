"""Selects runs by keys and values that were typed on the command line."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison import naming
from qbench.runs.reader import DONE, RunRecord

FIRST_KEYS = ("dataset", "model", "method", "bits", "seed")
"""Keys that `filter_words` tries first, because they are the most common ones."""
VALUES_LISTED = 20
"""Largest number of values that an error message lists."""
RUN_DIRECTORY = re.compile(r"(?P<method>[^/]+)-(?P<bits>w\d+a\d+g\d+)-s(?P<seed>\d+)-[0-9a-f]{8}")
WIDTHS = re.compile(r"(?:[wag]\d+)+")
RunKeys = Mapping[str, str]
"""The keys by which a run can be selected, with their values as JSON."""


def select_runs(
    runs: Sequence[RunRecord], where: Mapping[str, Sequence[str]], by: Sequence[str] = ()
) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that match `where`, their float baselines, and notes on values that no run has.

    Float baselines are returned even if they do not match, because differences are computed from their accuracies.

    Args:
        where: maps keys to the allowed values, as typed. A run matches if it has an allowed value for every key.
        by: keys by which tables will be divided. They select no runs, but each of them must exist in at least one run.

    Raises:
        ConfigError: a key exists in no run, or no run has any of the values that were typed for a key.
    """
    matched, notes = matching_runs(runs, where, by)
    return _with_baselines(matched, runs), notes


def matching_runs(
    runs: Sequence[RunRecord], where: Mapping[str, Sequence[str]], by: Sequence[str] = ()
) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that match `where`, and notes on values that no run has.

    The arguments are the same as for `select_runs`.
    """
    if not runs or not (where or by):
        return list(runs), []
    keys = {id(run): naming.run_keys(run.result) for run in runs if run.result is not None}
    known = set().union(*keys.values())
    for key in (*where, *by):
        if known and key not in known:
            raise ConfigError(_unknown_key(key, known))
    notes = _absent_values(where, runs, keys)
    return _matching(runs, where, keys), notes


def filter_words(own: Sequence[RunRecord], others: Sequence[RunRecord]) -> list[str]:
    """Return words KEY=VALUE,... for `qbench compare`. If possible, these words select the runs `own` and no others.

    The list is empty if there are no other runs. Float baselines do not count as other runs, because `select_runs`
    returns them in any case.
    """
    kept = [_keys_of(run) for run in own if not (run.result and naming.is_baseline(run.result))]
    paths = {run.path for run in own}
    left = [run for run in others if run.path not in paths and not (run.result and naming.is_baseline(run.result))]
    known = set.intersection(*map(set, kept)) if kept else set()
    words = []
    for key in [*(key for key in FIRST_KEYS if key in known), *sorted(known.difference(FIRST_KEYS, ("status",)))]:
        values = list(dict.fromkeys(_as_typed(keys[key]) for keys in kept))
        remaining = [run for run in left if _matches(_keys_of(run), {key: values}, run.result is None)]
        if len(remaining) < len(left) and not any("," in value for value in values):
            words.append(f"{key}={','.join(values)}")
            left = remaining
    return words


def _keys_of(run: RunRecord) -> RunKeys:
    return naming.run_keys(run.result) if run.result else _keys_of_directory(run)


def _as_typed(stored: str) -> str:
    value = json.loads(stored)
    return value if isinstance(value, str) else stored


def _unknown_key(key: str, known: Iterable[str]) -> str:
    short = sorted(name for name in known if "." not in name)
    allowed = f"{', '.join(short)} and nested keys such as optim.lr"
    return f"compare {key}: no run has this key{did_you_mean(key, known)}\nallowed: {allowed}"


def _absent_values(
    where: Mapping[str, Sequence[str]], runs: Sequence[RunRecord], keys: Mapping[int, RunKeys]
) -> list[str]:
    """Return one note for each value that the user typed and that no run has.

    Raises:
        ConfigError: no run has any of the values that were typed for a key.
    """
    run_keys = [keys.get(id(run)) or _keys_of_directory(run) for run in runs]
    notes = []
    for key, values in where.items():
        present = [keys_of_run[key] for keys_of_run in run_keys if key in keys_of_run]
        absent = [value for value in values if present and not any(_equals(key, stored, value) for stored in present)]
        if absent == values:
            known = sorted({str(json.loads(stored)) for stored in present}, key=lambda v: (v.isdecimal() and int(v), v))
            hint = _hint(values[0], known)
            more = f" and {len(known) - VALUES_LISTED} more" if len(known) > VALUES_LISTED else ""
            listed = ", ".join(known[:VALUES_LISTED]) + more
            raise ConfigError(f"compare {key}={','.join(values)}: no run has this value{hint}\nvalues found: {listed}")
        found = {str(json.loads(stored)) for stored in present}
        notes += [f"no run has {key}={value}{_hint(value, found)}" for value in absent]
    return notes


def _hint(value: str, known: Collection[str]) -> str:
    """Return `; did you mean ...?` with the most similar value, or an empty text for numbers and unlike values.

    A user's method has the name `module:function`. The module alone is therefore similar to it.
    """
    if value.isdecimal():
        return ""
    own = [name for name in known if name.partition(":")[0] == value]
    return f"; did you mean {own[0]}?" if own else did_you_mean(value, known)


def _matching(
    runs: Sequence[RunRecord], where: Mapping[str, Sequence[str]], keys: Mapping[int, RunKeys]
) -> list[RunRecord]:
    """Return the runs that match the typed values.

    If a run has no result, its method, widths and seed are read from the name of its directory. Such a run is left out
    only if one of these three values contradicts the filter.
    """
    return [run for run in runs if _matches(keys.get(id(run)) or _keys_of_directory(run), where, run.result is None)]


def _with_baselines(kept: Sequence[RunRecord], runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the selected runs and their float baselines, in the order of `runs`."""
    starts = [run.result.baseline for run in kept if run.result and run.result.baseline]
    baseline_names = {naming.directory_name(baseline.run) for baseline in starts if not baseline.pretrained}
    chosen = {id(run) for run in kept}
    baselines = [r for r in runs if r.result and r.status == DONE and naming.is_baseline(r.result)]
    chosen |= {id(run) for run in baselines if naming.directory_name(str(run.path)) in baseline_names}
    return [run for run in runs if id(run) in chosen]


def _keys_of_directory(run: RunRecord) -> dict[str, str]:
    """Return method, widths and seed from the name of a run directory.

    The result is empty if the name does not have the form of a run directory.
    """
    match = RUN_DIRECTORY.fullmatch(run.path.name)
    if not match:
        return {}
    widths = dict(re.findall(r"([wag])(\d+)", match["bits"]))
    named = {"method": json.dumps(match["method"]), "bits": json.dumps(match["bits"]), "seed": match["seed"]}
    return named | {f"bits.{key}": width for key, width in widths.items()}


def _matches(keys: RunKeys, where: Mapping[str, Sequence[str]], unknown_matches: bool) -> bool:
    """Return whether a run has an allowed value for every key.

    With `unknown_matches`, a key that the run does not have matches every value.
    """
    for key, allowed in where.items():
        if key not in keys:
            if not unknown_matches:
                return False
        elif not any(_equals(key, keys[key], value) for value in allowed):
            return False
    return True


def _equals(key: str, stored: str, typed: str) -> bool:
    """Return whether a stored JSON value equals a typed value.

    For example, 0.001 equals 1e-3, and w2a2g32 equals w2a2.
    """
    value = json.loads(stored)
    if isinstance(value, str):
        widths = key == "bits" and WIDTHS.fullmatch(typed)
        return value == typed or (bool(widths) and set(_widths(typed)) <= set(_widths(value)))
    if isinstance(value, bool) or value is None:
        return typed.lower() in (stored, {"null": "none"}.get(stored))
    try:
        parsed = json.loads(typed)
    except ValueError:
        return typed == stored
    return not isinstance(parsed, bool) and bool(parsed == value)  # True == 1 in Python


def _widths(text: str) -> list[str]:
    return re.findall(r"[wag]\d+", text)
