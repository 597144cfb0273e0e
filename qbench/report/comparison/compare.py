"""Groups runs into settings, and settings into tables by data set, network and protocol."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qbench.bits import FLOAT
from qbench.report.comparison import naming
from qbench.report.comparison.aggregation import aggregate, control_notes, with_control
from qbench.report.comparison.columns import DEFAULT, columns_in
from qbench.report.comparison.comparable import compared_result, unlike_widths
from qbench.report.comparison.data_versions import separate_data_versions
from qbench.report.comparison.duplicates import without_duplicates
from qbench.report.comparison.lr_selection import SelectedLearningRate, is_candidate, select_learning_rate
from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import MissingRuns, with_columns
from qbench.report.comparison.warning_notes import warning_notes
from qbench.report.tables.table import Table
from qbench.runs.reader import DONE, FROM_LOGS, RunRecord
from qbench.runs.result import Evaluation, Result, short_commit

FAILED_TITLE, UNFINISHED_TITLE = "failed or unsupported", "not finished"
UNFINISHED = ("running", "unfinished", "not begun")
"""Statuses of runs that can still get a result."""


def compare(runs: Sequence[RunRecord], by: Sequence[str] = ()) -> list[Table]:
    """Return one table per data set, network and protocol, and tables of unfinished and of failed runs.

    A protocol consists of the configuration keys that must be equal in compared runs, such as the number of epochs.

    A row of a table is a setting: one method with its options and its widths. The accuracy of a setting is the test
    top-1 after the last epoch, averaged over seeds. The difference in accuracy is the mean difference between each run
    and its float baseline. Runs with different protocols or different images are never averaged and never share a
    table. The titles of tables name the keys in which the protocols differ. With lr_search=grid, a setting contains
    only the runs with the learning rate that is best on validation data. Test accuracies with other learning rates are
    not shown.

    Args:
        runs: the records that `qbench.runs.reader.read` returns.
        by: keys of `naming.run_keys`. Runs with different values of these keys go to separate tables.
    """
    runs, duplicate_notes = without_duplicates(runs)
    done = [run.result for run in runs if run.status == DONE and run.result is not None]
    results = separate_data_versions(done)
    context = _Context(
        baselines={naming.directory_name(r.run): r for r in results if naming.is_baseline(r)},
        labels=naming.labels(results),
        from_logs={str(run.path) for run in runs if FROM_LOGS in run.notes},
        failed=_by_setting(r.result for r in runs if r.status != DONE and r.result),
        unmarked={id(result): own for result, own in zip(results, done, strict=True)},
        file_bytes={str(run.path): run.file_bytes for run in runs if run.file_bytes is not None},
    )
    blocks = _blocks(results)
    titles = naming.titles(blocks)
    tables = [
        _table(titles[block] + suffix, part, context)
        for block, members in sorted(blocks.items())
        for suffix, part in _split(members, by)
    ]
    if tables:
        tables[-1] = replace(tables[-1], notes=tables[-1].notes + duplicate_notes)
    missing = [run for run in runs if run.status != DONE]
    tables += _missing_table(UNFINISHED_TITLE, [run for run in missing if run.status in UNFINISHED])
    tables += _missing_table(FAILED_TITLE, [run for run in missing if run.status not in UNFINISHED])
    unread = [f"{run.path.name}: {what}" for run in runs for what in run.unread]
    if unread:
        tables[-1] = replace(tables[-1], notes=tables[-1].notes + unread)
    return tables


@dataclass(frozen=True, kw_only=True)
class _Context:
    """Data that all tables share.

    Args:
        baselines: results of float baselines by directory name.
        labels: map from `id(result)` to the label of the result's method.
        from_logs: paths of the runs that were read from logs.
        failed: results of runs that did not finish, by `naming.setting_key`. Which images they used is not known.
        unmarked: map from `id(result)` to the result before `separate_data_versions` changed its protocol.
        file_bytes: sizes of exported packed files, by path of the run.
    """

    baselines: Mapping[str, Result]
    labels: Mapping[int, str]
    from_logs: set[str]
    file_bytes: Mapping[str, int]
    failed: Mapping[tuple[str, ...], Sequence[Result]]
    unmarked: Mapping[int, Result]

    def failed_like(self, result: Result) -> Sequence[Result]:
        """Return the failed results of the setting of a result."""
        return self.failed.get(naming.setting_key(self.unmarked[id(result)]), ()) if self.failed else ()


def _by_setting(results: Iterable[Result]) -> dict[tuple[str, ...], list[Result]]:
    grouped: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        grouped[naming.setting_key(result)].append(result)
    return dict(grouped)


def _blocks(results: Sequence[Result]) -> dict[naming.Block, list[Result]]:
    """Return the results by block, without the float baselines from which other runs started.

    The results of a block share data set, network and protocol.

    A baseline is kept in two cases. Either other runs only loaded its weights as a pretrained checkpoint, so that no
    other row shows the baseline's accuracy. Or runs that do not start from it were trained by the same protocol.
    """
    quantized = [r for r in results if not naming.is_baseline(r)]
    used = {naming.directory_name(r.baseline.run) for r in quantized if r.baseline and not r.baseline.pretrained}
    blocks: dict[naming.Block, list[Result]] = defaultdict(list)
    for result in quantized:
        blocks[_block(result)].append(result)
    for result in results:
        if naming.is_baseline(result) and (naming.directory_name(result.run) not in used or _block(result) in blocks):
            blocks[_block(result)].append(result)
    return blocks


def _block(result: Result) -> naming.Block:
    protocol = result.protocol.hash or naming.unknown_protocol(result.protocol.keys)
    return naming.Block(result.dataset, result.model, protocol)


def _split(results: Sequence[Result], by: Sequence[str]) -> list[tuple[str, list[Result]]]:
    """Split results by the values of some keys. Return pairs (suffix of the title, results)."""
    parts: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        keys = naming.run_keys(result) if by else {}
        parts[tuple(keys.get(key, "?") for key in by)].append(result)
    ordered = sorted(parts.items(), key=lambda part: [_sort_key(value) for value in part[0]])
    return [("".join(f"; {k}={v}" for k, v in zip(by, values, strict=True)), part) for values, part in ordered]


def _sort_key(value: str) -> tuple[bool, float, str]:
    """Return a sort key that puts numbers first, in ascending order."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _table(title: str, results: Sequence[Result], context: _Context) -> Table:
    """Return the table of one block: first float baselines, then settings sorted by label and widths."""
    settings, notes = list[Setting](), list[str]()

    def add(label: str, members: Sequence[Result], learning_rate: SelectedLearningRate | None = None) -> None:
        logged = [r for r in members if r.run in context.from_logs]
        source = FROM_LOGS if logged else "result.json"
        settings.append(aggregate(label, members, source, context.file_bytes, learning_rate))
        notes.extend([*_member_notes(settings[-1], logged), *_stop_notes(settings[-1], members)])

    for label, baselines in _baselines(results, context):
        add(label, baselines)
    labels = {id(r): context.labels[id(r)] for r in results}
    for label, members in _members(results, labels):
        failed = context.failed_like(members[0])
        if not is_candidate(members[0]):
            add(label, members)
            notes += _diverged_notes(settings[-1], failed)
            continue
        selection = select_learning_rate(f"{label} {members[0].widths}", members, failed)
        if selection.runs:
            add(label, selection.runs, selection.learning_rate)
        notes += selection.notes
    settings = with_control(settings)
    notes += [*_unlike_notes(results), *control_notes(settings), *warning_notes(settings)]
    notes += [*_protocol_notes(results, labels), *_retrained_notes(results, labels, context)]
    notes += _commit_notes(results, context)
    return with_columns(Table((), title=title, values=[*settings], notes=notes), columns_in(DEFAULT))


def _baselines(results: Sequence[Result], context: _Context) -> list[tuple[str, list[Result]]]:
    """Return pairs (label, float baselines).

    A label names the network keys and, for pretrained weights, the checkpoint.

    The row of a pretrained checkpoint shows the accuracy that was measured before quantization. The result of the run
    that made the checkpoint is not shown. It belongs to other weights (after the last epoch), and possibly to other
    images.
    """
    grouped: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        if result.baseline:
            name = naming.directory_name(result.baseline.run)
            pretrained = result.baseline.pretrained
            file = name if pretrained else ""
            label = " ".join(word for word in ("float", naming.network_keys(result), file) if word)
            found = context.baselines.get(name)
            own = found is not None and found.same_data(result) and not pretrained
            if found and own:
                grouped[label][name] = found
            else:
                grouped[label][name] = _recorded_baseline(result, other_run=found is not None or pretrained)
    return [(label, list(baselines.values())) for label, baselines in sorted(grouped.items())]


def _members(results: Sequence[Result], labels: Mapping[int, str]) -> list[tuple[str, list[Result]]]:
    """Return pairs (label, results), one per setting, sorted by label and then by descending widths."""
    members: dict[tuple[str, int, int, int], list[Result]] = defaultdict(list)
    for result in results:
        widths = result.bits
        members[labels[id(result)], -widths["w"], -widths["a"], -widths["g"]].append(result)
    return [(key[0], results) for key, results in sorted(members.items(), key=lambda item: item[0])]


def _member_notes(setting: Setting, logged: Sequence[Result]) -> Iterator[str]:
    """Yield notes on seeds with several runs or with the same network, and on runs that were read from logs."""
    if len({run.seed for run in setting.runs}) < len(setting.runs):
        names = ", ".join(naming.directory_name(run.run) for run in setting.runs)
        yield f"{setting.name}: some seeds have several runs, which are averaged: {names}"
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in setting.runs:
        if run.weights_sha256:
            seeds[run.weights_sha256].add(run.seed)
    for same in (sorted(group) for group in seeds.values() if len(group) > 1):
        yield (
            f"warning: {setting.name}: seeds {', '.join(map(str, same))} have the same weights; they are one network, "
            "and show nothing about other seeds"
        )
    if logged:
        names = ", ".join(naming.directory_name(r.run) for r in sorted(logged, key=lambda r: (r.seed, r.run)))
        yield f"{setting.name}: {FROM_LOGS}: {names}"


def _stop_notes(setting: Setting, members: Sequence[Result]) -> Iterator[str]:
    """Yield a note if `optim.patience` stopped the training of some runs early. Their numbers of epochs then differ."""
    keys: object = members[0].protocol.keys
    prefix = "pretrain." if setting.is_baseline else ""
    recipe = keys.get("pretrain") if prefix and isinstance(keys, dict) else keys
    optim, epochs = (recipe.get("optim"), recipe.get("epochs")) if isinstance(recipe, dict) else (None, None)
    patience = optim.get("patience") if isinstance(optim, dict) else None
    if patience is None or not isinstance(epochs, int):
        return
    trained = [run.final.epoch + 1 for run in members if run.final and run.final.epoch is not None]
    if stopped := [count for count in trained if count < epochs]:
        span = f"{min(stopped)}" if len(set(stopped)) == 1 else f"{min(stopped)}-{max(stopped)}"
        runs = "" if len(members) == 1 else f" ({len(stopped)} of {len(members)} runs)"
        key = f"{prefix}optim.patience={patience}"
        yield f"{setting.name}: {key} stopped training after {span} of {epochs} epochs{runs}"


def _diverged_notes(setting: Setting, failed: Sequence[Result]) -> Iterator[str]:
    """Yield a note on diverged seeds. The mean leaves these seeds out, and may therefore be too high."""
    seeds = {r.seed for r in failed if r.status == "diverged"} - {run.seed for run in setting.runs}
    if seeds:
        named = ", ".join(map(str, sorted(seeds)))
        yield f"warning: {setting.name}: diverged with seed {named}, which the mean leaves out"


def _protocol_notes(results: Sequence[Result], labels: Mapping[int, str]) -> Iterator[str]:
    """Yield notes on network and protocol keys that methods require, and on synthetic data."""
    uses = {(labels[id(r)], naming.network_keys(r), bool(r.baseline)) for r in results if naming.network_keys(r)}
    for label, network, compared in sorted(uses):
        yield f"{label}: the network {'and its float baseline use' if compared else 'uses'} {network}"
    changes = {(labels[id(r)], _with_epochs(change, r)) for r in results for change in r.protocol_changes}
    for label, change in sorted(changes):
        yield f"{label}: {change}"
    files = {(naming.directory_name(r.baseline.run), r.baseline.sha256) for r in results if r.baseline}
    for name, sha256 in sorted((name, sha256) for name, sha256 in files if sha256):
        yield f"float {name}: pretrained weights, sha256 {sha256}"
    layers = results[0].protocol.keys.get("layers")  # the same for all results of a table
    if typed := naming.changed_layers(layers if isinstance(layers, dict) else {}):
        yield f"not the default layer policy: {typed}"
    if any(r.synthetic for r in results):
        yield "synthetic data: not comparable with papers' tables"


def _retrained_notes(results: Sequence[Result], labels: Mapping[int, str], context: _Context) -> Iterator[str]:
    """Yield warnings about float baselines that were trained again, with another outcome, between two runs.

    The `diff` of such runs refers to different baselines, of which the table shows only one.
    """
    started: dict[str, list[tuple[Result, Evaluation]]] = defaultdict(list)
    for result in results:
        if result.baseline and not result.baseline.pretrained:
            started[naming.directory_name(result.baseline.run)].append((result, result.baseline.final))
    for name, pairs in sorted(started.items()):
        found = context.baselines.get(name)
        shown = found.final if found and found.same_data(pairs[0][0]) else pairs[-1][1]  # as in `_baselines`
        others = [run for run, final in pairs if shown and final.test != shown.test]
        if others:
            settings = ", ".join(dict.fromkeys(f"{labels[id(run)]} {run.widths}" for run in others))
            yield (
                f"warning: {settings}, seed {others[0].seed}: started from other weights of {name} than those of the "
                "row float, because this float baseline was trained again; to repeat these runs: rerun=true"
            )


def _unlike_notes(results: Sequence[Result]) -> Iterator[str]:
    """Yield notes on methods whose settings have no widths in common."""
    for unlike in unlike_widths(map(compared_result, results)):
        yield f"{unlike.statement} ({unlike.advice})" if unlike.advice else unlike.statement


def _with_epochs(change: str, result: Result) -> str:
    """Return a text that describes a change of the protocol.

    Other methods start from a trained float baseline. If the run was trained from scratch, the text also states the
    number of epochs of this baseline.
    """
    keys = result.protocol.keys
    epochs, before = keys.get("epochs"), (keys.get("pretrain") or {}).get("epochs")
    if not change.startswith("trained from scratch") or not epochs or not before:
        return change
    most = [
        "at most " if optim.get("patience") is not None else "" for optim in (keys["optim"], keys["pretrain"]["optim"])
    ]
    return (
        f"{change}, for {most[0]}{epochs} epochs; other methods have {most[1]}{before} more epochs, for their float "
        "baseline"
    )


def _commit_notes(results: Sequence[Result], context: _Context) -> Iterator[str]:
    """Yield a note if different commits of qbench trained the runs of a table and their float baselines."""
    names = {naming.directory_name(r.baseline.run) for r in results if r.baseline}
    every = [*results, *(context.baselines[name] for name in sorted(names & set(context.baselines)))]
    counts = Counter(" then ".join(map(short_commit, r.commits)) for r in every if r.commits)
    if len(counts) > 1:
        listed = ", ".join(f"{commits} ({count} run{'s' * (count > 1)})" for commits, count in counts.most_common())
        yield f"runs come from several commits of qbench, whose results may differ: {listed}"


def _missing_table(title: str, missing: Sequence[RunRecord]) -> list[Table]:
    """Return the table of runs without a result, or nothing if all runs have a result."""
    if not missing:
        return []
    grouped: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for run in missing:  # an unsupported setting gets one row for all seeds; any other run gets its own row
        unsupported = run.result if run.status == "unsupported" else None
        name = f"{unsupported.method} {unsupported.widths}" if unsupported else str(run.path)
        grouped[run.status, name, run.reason].append(run)
    rows, values = list[tuple[str, ...]](), list[object]()
    for (status, name, reason), alike in sorted(grouped.items()):
        count = f", {len(alike)} runs" if len(alike) > 1 else ""
        rows.append((status, name + count, reason.partition("\n")[0]))
        values.append(MissingRuns(status=status, runs=tuple(str(run.path) for run in alike), reason=reason))
    return [Table(("status", "run", "reason"), rows, values, title)]


def _recorded_baseline(result: Result, *, other_run: bool) -> Result:
    """Return the result of a float baseline, as recorded by a run that starts from this baseline.

    With `other_run`, the metrics and the manifest in the baseline's directory belong to other weights or images. The
    result then names the weights file instead of the directory. These metrics and this manifest are therefore not read.
    """
    assert result.baseline is not None
    run = Path(result.baseline.run)
    if other_run and run.is_dir():
        run /= "best.pt"
    return Result(
        status=DONE,
        method="float",
        bits=dict.fromkeys("wag", FLOAT),
        seed=result.seed,
        dataset=result.dataset,
        model=result.model,
        run=str(run),
        protocol=replace(result.protocol, keys=result.protocol.keys | {"init": "scratch"}),
        final=result.baseline.final,
        best=result.baseline.best,
        synthetic=result.synthetic,
    )
