"""Builds the text of `qbench --help`. The help text of a subcommand comes from its parser."""

from textwrap import fill

from qbench.cli.arguments import SUMMARIES, help_width

OTHER_KEYS = "Other keys: seed, epochs, pretrain.epochs, init=auto|float|scratch|PATH, lr_search=none|grid, out, rerun"
RESULTS = (
    "Every run has its own directory below out (default: outputs). If you repeat a command, it prints the "
    "stored row, or resumes an interrupted run. Exit status: 0 done, 1 bug, 2 usage, 3 data, 4 checkpoint, 5 "
    "resources, "
    "6 diverged, 8 sweep with failures, 75 interrupted (can be resumed)."
)


def group_lines() -> str:
    """Return a line for each group of the configuration, with the group's options."""
    from qbench.config.groups import format_names, group_names, option_names

    def line(group: str) -> str:
        options = format_names(option_names(group))
        return fill(options, help_width(), initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)

    return "\n".join(map(line, group_names()))


def help_screen() -> str:
    """Return the text that `qbench --help` prints."""
    width = help_width()
    subcommands = "\n".join(
        fill(summary, width, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        for name, summary in SUMMARIES.items()
    )
    return f"""\
qbench: compares methods for low-precision CNNs under one protocol

  qbench method=dorefa bits.w=2                  train, quantize, print a row
  qbench -m method=dorefa bits.w=1,2,4 seed=0,1  train all combinations
  qbench SUBCOMMAND --help                       the flags of a subcommand

Subcommands:
{subcommands}

Groups (type GROUP=OPTION, and GROUP.KEY=VALUE for a key inside a group):
{group_lines()}
  bits accepts any widths: bits=w2a2, bits=w4a4g8, or bits.w=2 bits.a=2
  method, model and dataset accept your own functions: model=my.net:build

{fill(OTHER_KEYS, width)}

  qbench method=dorefa --cfg job                 the configuration; nothing runs
  qbench -m ... hydra/launcher=joblib            a sweep on all cores
  qbench --hydra-help                            flags of Hydra (configurations)
  eval "$(qbench completion bash)"               switch shell completion on

{fill(RESULTS, width)}"""
