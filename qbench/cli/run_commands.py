"""The verbs about finished runs: from what was typed to what is printed. What is typed wrongly needs no torch."""

from collections.abc import Sequence

from qbench.cli import run_arguments as words


def inspect(arguments: Sequence[str]) -> str:
    """Return what each layer of a run holds, loses, and costs the network."""
    asked = words.asked("inspect", arguments, words.INSPECT)
    images = asked.whole("images")
    from qbench.analysis.inspect import inspect as table_of

    flags = {key: asked.flags[key] for key in ("sort", "weights", "device")} | {"bn_stats": asked.flags["bn-stats"]}
    return words.shown(asked, [table_of(asked.run, images=images, **flags)])


def sensitivity(arguments: Sequence[str]) -> str:
    """Choose one width a layer of a run under a budget, write it to a file, and return the choices."""
    asked = words.asked("sensitivity", arguments, words.SENSITIVITY, words="[method=NAME ...] [--budget w=3]")
    images, widths = asked.whole("images"), asked.widths()
    from qbench.analysis.sensitivity import sensitivity as tables_of

    flags = {key: asked.flags[key] for key in ("budget", "measure", "out", "device")}
    flags |= {"bn_stats": asked.flags["bn-stats"]}
    return words.shown(asked, tables_of(asked.run, asked.words, images=images, widths=widths, **flags))


def evaluate(arguments: Sequence[str]) -> str:
    """Return a run's figures on its test split, or on other data."""
    asked = words.asked("evaluate", arguments, words.EVALUATE, words="[dataset=NAME ...]")
    file = asked.predictions()
    from qbench.analysis.evaluate import evaluate as table_of

    flags = {key: asked.flags[key] for key in ("weights", "device")}
    return words.shown(asked, [table_of(asked.run, asked.words, predictions=file, **flags)])
