"""What cannot be in the ledger: rows that contradict themselves or each other, or do not say where they are from."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from qbench.config.schema import did_you_mean
from qbench.papers.rows import METRICS, PAPER, PROVENANCES, REPOSITORY, THIRD, Names, Row

BETTER = 1.0
"""Points by which a quantized network may beat its float baseline without a waiver."""
SLACK = 1.0
"""Points below chance that a network that learned nothing may score."""
Finding = tuple[Row, str]


def lint(rows: Sequence[Row], names: Names) -> list[str]:
    """Return what is wrong with some rows, a line each: `paper/id: rule: what`.

    A row may waive a rule by name with a reason; a waiver of nothing is wrong too.
    """
    found = [(row, rule, what) for rule, check in RULES.items() for row, what in check(rows, names)]
    broken = {(row.paper, row.of or row.id, rule) for row, rule, _ in found}
    lines = [f"{row.paper}/{row.id}: {rule}: {what}" for row, rule, what in found if not row.waive.get(rule)]
    for row in rows:
        for rule in row.waive if not row.of else ():
            if (row.paper, row.id, rule) not in broken:
                lines.append(f"{row.paper}/{row.id}: waive: {rule} finds nothing here{did_you_mean(rule, RULES)}")
    return lines


def duplicate_id(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """Two rows of a paper have one id."""
    seen = set()
    for row in rows:
        if (row.paper, row.id) in seen:
            yield row, "another row of the paper has this id"
        seen.add((row.paper, row.id))


def unknown_name(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """A net, data set, method or metric that `names.yaml` or the reader does not know."""
    for row in rows:
        known = (("net", names.nets), ("dataset", names.datasets), ("method", names.methods), ("metric", METRICS))
        for key, allowed in known:
            if (got := getattr(row, key)) not in allowed:
                yield row, f"{key} {got or '(none)'}{did_you_mean(got, allowed)}"


def no_origin(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """Provenance, source or who ran it is missing or is none of the words for it."""
    for row in rows:
        if row.provenance not in PROVENANCES:
            yield row, f"provenance {row.provenance or '(none)'}; allowed: {', '.join(PROVENANCES)}"
        if not row.source:
            yield row, "no source"
        named = row.ran_by.startswith(THIRD) and row.ran_by != THIRD
        if row.ran_by not in (PAPER, REPOSITORY) and not named:
            yield row, f"ran_by {row.ran_by or '(none)'}; allowed: {PAPER}, {REPOSITORY}, {THIRD}NAME"


def no_value(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """No figure, and no note why; or a figure whose provenance is unknown."""
    for row in rows:
        if row.value is None and not row.note:
            yield row, "value is null: a note must say why"
        if row.value is not None and row.provenance == "unknown":
            yield row, "a figure of unknown provenance"


def no_baseline(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """A quantized row has neither a float baseline nor a note why not."""
    for row in rows:
        if row.method != "float" and row.baseline is None and not row.baseline_note:
            yield row, "no float baseline: give it, or baseline_note why there is none"


def no_recipe(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """A row has neither a recipe nor the reason why it cannot be run."""
    for row in rows:
        if not row.recipe and not row.lacks:
            yield row, "no recipe: name it, or say in lacks why it cannot be run"


def out_of_range(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """A percentage outside 0 to 100, or a range that is none."""
    for row in rows:
        low = -100 if row.metric.endswith("increase") else 0
        for key in ("value", "upper", "baseline"):
            got = getattr(row, key)
            if got is not None and not low <= got <= 100:
                yield row, f"{key} {got} outside {low} to 100"
        if row.upper is not None and (row.value is None or row.upper <= row.value):
            yield row, f"upper {row.upper} is not above value {row.value}"


def below_chance(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """Worse than guessing: an error printed as accuracy, or the reverse."""
    for row in rows:
        if row.metric.endswith("increase") or row.dataset not in names.datasets or row.metric not in METRICS:
            continue
        chance = (5 if row.metric.startswith("top5") else 1) * 100 / names.datasets[row.dataset]["classes"]
        for key in ("value", "baseline"):
            got = getattr(row, key)
            if got is not None and row.accuracy(got) < chance - SLACK:
                yield row, f"{key} {got} is worse than chance: an error printed as accuracy, or the reverse?"


def complement(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """One figure of a method, net and width is 100 less another: one of them an error printed as accuracy."""
    for group in _grouped(rows, lambda r: (r.method, r.dataset, r.net, str(r.bits), r.metric)):
        for first, second in combinations(group, 2):
            a, b = first.value, second.value
            if a is not None and b is not None and abs(a - b) > 1 and abs(a + b - 100) < 0.05:
                yield second, f"{b} is 100 - {a} of {first.paper}/{first.id}: an error printed as accuracy?"


def better_than_float(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """Quantized better than float by more than `BETTER` points."""
    for row in rows:
        if row.method != "float" and row.value is not None and row.baseline is not None:
            gained = row.accuracy(row.value) - row.accuracy(row.baseline)
            if gained > BETTER:
                yield row, f"{gained:.2f} points better than its float baseline {row.baseline}"


def two_nets(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """One method, data set, width and figure under two networks."""
    for group in _grouped(rows, lambda r: (r.method, r.dataset, str(r.bits), r.levels)):
        for first, second in combinations(group, 2):
            a, b = first.value, second.value
            if first.net == second.net or a is None or b is None or first.metric[:4] != second.metric[:4]:
                continue
            if abs(first.accuracy(a) - second.accuracy(b)) < 0.005:
                yield second, f"{b} is {first.net}'s figure in {first.paper}/{first.id}, here under {second.net}"


def top1_and_top5(rows: Iterable[Row], names: Names) -> Iterator[Finding]:
    """Top-1 beside top-5 under one metric: one run or one baseline with two figures, or top-5 below top-1."""
    rows = list(rows)
    for group in _grouped(rows, lambda r: (r.paper, r.metric, *_run(r))):
        for first, second in combinations(group, 2):
            if first.value != second.value:
                yield second, f"{second.metric} is {second.value} here and {first.value} in {first.id}"
    for group in _grouped(rows, lambda r: (r.paper, r.table, r.net, r.dataset, r.metric)):
        if len({row.baseline for row in group if row.baseline is not None}) > 1:
            given = ", ".join(str(row.baseline) for row in group)
            yield group[-1], f"one table gives {group[-1].net} several float baselines of {group[-1].metric}: {given}"
    for group in _grouped(rows, lambda r: (r.paper, *_run(r))):
        for first in (r for r in group if r.metric.startswith("top1") and not r.metric.endswith("increase")):
            for second in (r for r in group if r.metric == first.metric.replace("top1", "top5")):
                for key in ("value", "baseline"):
                    a, b = getattr(first, key), getattr(second, key)
                    if a is not None and b is not None and first.accuracy(a) > second.accuracy(b):
                        yield second, f"{key}: top-5 {b} is worse than top-1 {a}"


def _run(row: Row) -> tuple[object, ...]:
    """Return what two figures of one run have in common."""
    told = (row.policy, row.init, row.words, row.recipe, row.note, row.ran_by, row.source)
    return (row.table, row.method, row.dataset, row.net, str(row.bits), row.levels, *told)


def _grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> Iterable[list[Row]]:
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups.values()


Rule = Callable[[Sequence[Row], Names], Iterable[Finding]]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        duplicate_id, unknown_name, no_origin, no_value, no_baseline, no_recipe, out_of_range, below_chance, complement,
        better_than_float, two_nets, top1_and_top5,
    )
}  # fmt: skip
