"""`qbench --help`, on one screen. The help text of a subcommand is made by its parser."""

from textwrap import fill

from qbench.cli.arguments import SUMMARIES, help_width


def group_lines() -> str:
    """Return a line for each group of the configuration, with its options."""
    from qbench.config.groups import format_names, group_names, option_names

    def line(group: str) -> str:
        options = format_names(option_names(group))
        return fill(options, help_width(), initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)

    return "\n".join(map(line, group_names()))


def help_screen() -> str:
    """Return what `qbench --help` prints."""
    width = help_width()
    subcommands = "\n".join(
        fill(summary, width, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        for name, summary in SUMMARIES.items()
    )
    return f"""\
qbench: papers on low-precision CNNs on one trainer and one protocol

  qbench method=dorefa bits.w=2                  pretrain a float baseline (once), fine-tune, evaluate, print one row
  qbench -m method=dorefa bits.w=1,2,4 seed=0,1  every combination; stored runs are not run again
  qbench SUBCOMMAND ...                          qbench SUBCOMMAND --help shows its flags

Subcommands:
{subcommands}

Groups, as GROUP=OPTION; keys inside them, as GROUP.KEY=VALUE:
{group_lines()}
  bits takes any widths: bits=w2a2, bits=w4a4g8, or bits.w=2 bits.a=2
  method, model and dataset also take a function of your own: model=my.net:build

Other keys: seed, epochs, pretrain.epochs, init (auto, float, scratch or a path), lr_search (none, grid), out, rerun

  qbench method=dorefa --cfg job                 show the whole configuration and run nothing
  qbench -m ... hydra/launcher=joblib            a sweep on all cores; or submitit_local, submitit_slurm
  qbench --hydra-help                            flags of Hydra, which composes the configuration
  eval "$(qbench completion bash)"               switch shell completion on

Results are written below out (default: outputs), one directory per run. The same line prints the stored row again, and
resumes an interrupted run. Exit status: 0 done, 1 bug, 2 usage, 3 data, 4 checkpoint, 5 resources, 6 diverged,
8 sweep with failures, 75 interrupted and resumable."""
