"""What `--help` prints: the whole on one screen, and a page for every verb with all its flags."""

from textwrap import fill


def help_screen() -> str:
    """Return what `qbench --help` prints."""
    from qbench.config.groups import format_names, group_names, option_names

    shown = "\n".join(
        fill(format_names(option_names(group)), 118, initial_indent=f"  {group:<11}", subsequent_indent=" " * 13)
        for group in group_names()
    )
    return f"""\
qbench: papers on low-precision CNNs on one trainer and one protocol

  qbench method=dorefa bits.w=2                 float pretraining (once), fine-tuning, evaluation, one row
  qbench -m method=dorefa bits.w=1,2,4 seed=0,1 every combination; stored runs are not run again
  qbench plan model=resnet18 dataset=imagenet   runs, layers, costs, time; needs no data and trains nothing
  qbench compare outputs [method=NAME ...]      runs side by side and what may be concluded; --by, --sort, --columns,
                                                --margin 0.5, --published, --format text|md|csv|json|latex|record
  qbench compare outputs --html report.html     one page to sort and filter, with pictures; --plot FILE.png|pdf|svg
  qbench settle "KEY=VALUE ..." RUN             more seeds of two cells until they are decided; --margin 0.5,
  --max-seeds 20
  qbench inspect RUN                            its layers: levels, SQNR, clipped, dead, and which of them hurt most
  qbench sensitivity RUN --budget w=3           bits.yaml, a width a layer under a budget; layers=@bits.yaml trains it
  qbench evaluate RUN [dataset=NAME]            test split or other data: accuracy, calibration, predictions
  qbench published [--paper X] [--missing]         what was published, by whom, how we know, and what was measured here
  qbench describe METHOD                        the method's card: formulas, choices, deviations
  qbench plot METHOD [--out FILE.png|pdf|svg]   staircase, gradient, levels, thresholds; --poster: all methods
  qbench check METHOD                           is it sound? levels, gradients, odd tensors, resume, at all widths
  qbench list methods                           the names in a group: models, datasets, ...; or list runs [DIR]
  qbench VERB --help                            all flags of compare, settle, inspect, ...

Groups, as GROUP=NAME, and keys inside them, as GROUP.KEY=VALUE:
{shown}
  bits takes any widths: bits=w2a2, bits=w4a4g8, or bits.w=2 bits.a=2
  method, model and dataset also take a function of your own: model=my.net:build

Keys of their own: seed, epochs, pretrain.epochs, init (auto, float, scratch or a path), recipe (unified, tuned), out,
  rerun
  qbench method=dorefa --cfg job                shows the whole configuration and runs nothing
  qbench -m ... hydra/launcher=joblib           a sweep on all cores; or submitit_local, submitit_slurm (extra `slurm`)
  qbench --hydra-help                           the flags of Hydra, which composes the configuration
  qbench --shell-completion install=bash        how to switch completion on: eval "$(qbench -sc install=bash)"

Results lie below out (default: outputs), one directory a run. Repeating a line shows the stored row; a stopped run goes
on. Exit status: 0 done, 1 a bug, 2 usage, 3 data, 4 checkpoint, 5 resources, 6 diverged, 8 sweep with failures,
75 interrupted and resumable."""


PAGES = {
    "plan": """\
qbench plan LINE
  What a command line would run: each run and its float parent, with size, BitOps, memory and about how long on this
  machine; of one run every layer, what it runs on, how it departs from its paper. Needs no data, trains nothing.""",
    "compare": """\
qbench compare PLACE... [KEY=VALUE ...] [flags]
  PLACE          a directory with runs at or below it, or a file that --format record wrote
  KEY=VALUE      only runs with this value, or one of several: method=dorefa,lsq bits.w=2 seed=0,1 optim.lr=1e-2
  --by KEY,...   a table for each value of these keys
  --sort COLUMN  method, W, size, top-1, diff, ...; or equal-bytes: by accuracy among cells of about the same bytes
  --columns SETS some of accuracy,cost,speed,verification (default: accuracy,cost)
  --margin X     points of top-1 within which two cells are as good as each other (default: 0.5)
  --published    what was published for each cell, by whom, how that is known, and the gap
  --format F     text, md, csv, json, latex; or record: the runs themselves, small, to be read by compare again
  --html FILE    one page to sort and filter, with pictures and each cell's runs; needs no network
  --plot FILE    .png, .pdf or .svg; bits.png, pareto.png, curves.png, layers.png: that picture alone, else all""",
    "settle": """\
qbench settle A B [--margin X] [--max-seeds N] [hydra/launcher=joblib]
  A, B           a run's directory, or a command line in quotes without seed: "method=dorefa bits=w2a2"
  --margin X     points of top-1 within which they are as good as each other (default: 0.5)
  --max-seeds N       seeds at most (default: 20)
  Runs seeds 0, 1, 2 of both, then more, until they are told apart or as good; the looks share an error of 5 %.""",
    "inspect": """\
qbench inspect RUN [flags]
  --sort leave-one-out|leave-one-in|sqnr|order   worst first by loss gained with the layer off, lost with it alone,
  SQNR; or as they run --weights last|best            which checkpoint
  --images N                     validation images that are looked at (default: 500)
  --bn-stats recompute|keep              whether batch normalization is measured anew for each change
  --format text|md|csv|json|latex
  --device auto|cpu|cuda""",
    "sensitivity": """\
qbench sensitivity RUN [method=NAME ...] [flags]
  --budget B         bytes=20k, bitops=1G, or w=3: mean bits a weight (default: the run's own width)
  --measure loss|mse what is added up: each layer's harm to the validation loss, or its weights' squared error
  --widths 1,2,4,8   widths to choose from (default: 1 to 8)
  --out FILE         where the widths go (default: bits.yaml); layers=@FILE trains them
  --images N         validation images that are looked at (default: 500)
  --bn-stats recompute|keep  whether batch normalization is measured anew
  --format text|md|csv|json|latex
  --device auto|cpu|cuda""",
    "evaluate": """\
qbench evaluate RUN [dataset=NAME dataset.KEY=VALUE ...] [flags]
  --predictions FILE index, label, predicted class and probability of every image, as .csv or .npy
  --weights last|best
  --format text|md|csv|json|latex
  --device auto|cpu|cuda""",
    "published": """\
qbench published [flags]
  --paper NAME       one paper's rows
  --provenance P     rows known so well: verified, second-hand, memory-high, memory-medium, memory-low, unknown
  --missing          rows not measured yet, and the line that runs each or what it lacks
  --format text|md|csv|json|latex""",
    "describe": """\
qbench describe METHOD
  The card: paper, formulas, what it leaves open and what was taken; flaws of public code that can be run.""",
    "plot": """\
qbench plot METHOD [bits.w=2 method.KEY=VALUE ...] [--out FILE]
qbench plot --poster [--out FILE]
  --out FILE         .png, .pdf or .svg (default: plot-NAME-WIDTHS.png here)""",
    "check": """\
qbench check METHOD [method.KEY=VALUE ...] [bits.w=2]
  Holds a method, of qbench or my_module:build, at every legal width against what all must hold; 0 if nothing fails.""",
    "list": """\
qbench list GROUP
qbench list runs [DIR ...]
  GROUP: methods, models, datasets, optims, experiments, ...""",
}
"""By verb; every flag that it takes stands there."""
