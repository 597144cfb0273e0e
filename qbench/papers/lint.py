"""Finds contradictions and missing sources in numbers that were copied from papers.

Each rule is a function that yields a finding for every row that breaks the rule. A finding is a row and a text.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from qbench.config.schema import did_you_mean
from qbench.papers.row_types import CHECKPOINT, METRICS, PAPER, PROVENANCES, REPOSITORY, THIRD, Names, PublishedRow

MAX_GAIN = 1.0
"""Maximum gain over the float baseline in percentage points. A larger gain is a finding."""
CHANCE_SLACK = 1.0
"""Maximum distance below chance in percentage points. A larger distance is a finding."""
Finding = tuple[PublishedRow, str]


def lint(rows: Sequence[PublishedRow], names: Names) -> list[str]:
    """Apply all rules to the rows, and return one line per finding: `paper/id: rule: what is wrong`.

    The key `waive` of a row suppresses the findings of a rule and gives the reason. If the row does not break this
    rule, the waiver itself is a finding.
    """
    findings = [(row, rule, what) for rule, check in RULES.items() for row, what in check(rows, names)]
    broken = {(row.paper, row.top5_of or row.id, rule) for row, rule, _ in findings}
    lines = [f"{row.paper}/{row.id}: {rule}: {what}" for row, rule, what in findings if not row.waive.get(rule)]
    for row in rows:
        for rule in row.waive if not row.top5_of else ():
            if (row.paper, row.id, rule) not in broken:
                lines.append(
                    f"{row.paper}/{row.id}: waive: this row does not break the rule {rule}{did_you_mean(rule, RULES)}"
                )
    return lines


def duplicate_id(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find two rows of a paper with the same id."""
    seen = set()
    for row in rows:
        if (row.paper, row.id) in seen:
            yield row, "another row of this paper has the same id"
        seen.add((row.paper, row.id))


def unknown_name(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a network, data set, method or metric with a name that is not in `names.yaml` or `METRICS`."""
    for row in rows:
        known = (("net", names.nets), ("dataset", names.datasets), ("method", names.methods), ("metric", METRICS))
        for key, allowed in known:
            if (value := getattr(row, key)) not in allowed:
                yield row, f"{key} {value or '(none)'}{did_you_mean(value, allowed)}"


def no_origin(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a row whose provenance, source or `ran_by` is missing or not an allowed value."""
    for row in rows:
        if row.provenance not in PROVENANCES:
            yield row, f"provenance {row.provenance or '(none)'}; allowed: {', '.join(PROVENANCES)}"
        if not row.source:
            yield row, "no source: add source"
        named = row.ran_by.startswith(THIRD) and row.ran_by != THIRD
        if row.ran_by not in (PAPER, REPOSITORY, CHECKPOINT) and not named:
            yield row, f"ran_by {row.ran_by or '(none)'}; allowed: {PAPER}, {REPOSITORY}, {CHECKPOINT}, {THIRD}NAME"


def no_value(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a row that has neither a value nor a note, or has a value of unknown provenance."""
    for row in rows:
        if row.value is None and not row.note:
            yield row, "value is null: add a note that says why"
        if row.value is not None and row.provenance == "unknown":
            yield row, "value is set but provenance is unknown: set provenance, or set value to null"


def no_baseline(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a row of a quantized network that has neither a float baseline nor a note with the reason."""
    for row in rows:
        if row.method != "float" and row.baseline is None and not row.baseline_note:
            yield row, "no float baseline: add baseline, or baseline_note with the reason"


def no_recipe(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a row that has neither a recipe nor a reason why it cannot be run."""
    for row in rows:
        if not row.recipe and not row.lacks:
            yield row, "no recipe: add recipe, or lacks with the reason why the row cannot be run"


def out_of_range(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a percentage outside 0 to 100, or a range whose upper end is not above its lower end."""
    for row in rows:
        low = -100 if row.metric.endswith("increase") else 0
        for key in ("value", "upper", "baseline"):
            value = getattr(row, key)
            if value is not None and not low <= value <= 100:
                yield row, f"{key} {value} is outside {low} to 100"
        if row.upper is not None and (row.value is None or row.upper <= row.value):
            yield row, f"upper {row.upper} is not above value {row.value}"


def below_chance(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a value that is worse than guessing.

    Such a value is probably an error rate that was entered as an accuracy, or the reverse.
    """
    for row in rows:
        if row.metric.endswith("increase") or row.dataset not in names.datasets or row.metric not in METRICS:
            continue
        chance = (5 if row.metric.startswith("top5") else 1) * 100 / names.datasets[row.dataset].classes
        for key in ("value", "baseline"):
            value = getattr(row, key)
            if value is not None and row.accuracy(value) < chance - CHANCE_SLACK:
                yield row, f"{key} {value} is worse than chance; check whether it is an error or an accuracy"


def complement(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find two values whose sum is 100, for the same method, network and width.

    One of the two values may be an error rate that was entered as an accuracy.
    """
    for group in _grouped(rows, lambda r: (r.method, r.dataset, r.net, str(r.bits), r.metric)):
        for first, second in combinations(group, 2):
            a, b = first.value, second.value
            if a is not None and b is not None and abs(a - b) > 1 and abs(a + b - 100) < 0.05:
                yield second, f"{b} is 100 - {a} of {first.paper}/{first.id}; check whether one of them is an error"


def better_than_float(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find a quantized network that exceeds its float baseline by more than `MAX_GAIN` points."""
    for row in rows:
        if row.method != "float" and row.value is not None and row.baseline is not None:
            gained = row.accuracy(row.value) - row.accuracy(row.baseline)
            if gained > MAX_GAIN:
                yield row, f"{gained:.2f} points better than its float baseline {row.baseline}"


def two_nets(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find two networks that have the same value with the same method, width and data set."""
    for group in _grouped(rows, lambda r: (r.method, r.dataset, str(r.bits), r.levels)):
        for first, second in combinations(group, 2):
            a, b = first.value, second.value
            if first.net == second.net or a is None or b is None or first.metric[:4] != second.metric[:4]:
                continue
            if abs(first.accuracy(a) - second.accuracy(b)) < 0.005:
                yield (
                    second,
                    f"the value {b} for {second.net} is also the value of {first.paper}/{first.id} for {first.net}",
                )


def top1_and_top5(rows: Iterable[PublishedRow], names: Names) -> Iterator[Finding]:
    """Find rows in which a top-1 value may have been confused with a top-5 value.

    A row is reported if one run or one baseline has two different values of the same metric, or if top-5 is worse than
    top-1.
    """
    rows = list(rows)
    for group in _grouped(rows, lambda r: (r.paper, r.metric, *_run_key(r))):
        for first, second in combinations(group, 2):
            if first.value != second.value:
                yield second, f"{second.metric} is {second.value} here but {first.value} in {first.id}"
    for group in _grouped(rows, lambda r: (r.paper, r.table, r.net, r.dataset, r.metric)):
        if len({row.baseline for row in group if row.baseline is not None}) > 1:
            baselines = ", ".join(str(row.baseline) for row in group)
            yield (
                group[-1],
                f"one table has several float baselines for {group[-1].net}: {baselines}",
            )
    for group in _grouped(rows, lambda r: (r.paper, *_run_key(r))):
        for first in (r for r in group if r.metric.startswith("top1") and not r.metric.endswith("increase")):
            for second in (r for r in group if r.metric == first.metric.replace("top1", "top5")):
                for key in ("value", "baseline"):
                    a, b = getattr(first, key), getattr(second, key)
                    if a is not None and b is not None and first.accuracy(a) > second.accuracy(b):
                        yield second, f"{key}: top-5 {b} is worse than top-1 {a}"


def _run_key(row: PublishedRow) -> tuple[object, ...]:
    """Return a key that is equal for all rows whose values come from the same run."""
    protocol = (row.policy, row.init, row.words, row.recipe, row.note, row.ran_by, row.source)
    return (row.table, row.method, row.dataset, row.net, str(row.bits), row.levels, *protocol)


def _grouped(rows: Iterable[PublishedRow], key: Callable[[PublishedRow], object]) -> Iterable[list[PublishedRow]]:
    groups: dict[object, list[PublishedRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups.values()


Rule = Callable[[Sequence[PublishedRow], Names], Iterable[Finding]]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        duplicate_id, unknown_name, no_origin, no_value, no_baseline, no_recipe, out_of_range, below_chance, complement,
        better_than_float, two_nets, top1_and_top5,
    )
}  # fmt: skip
