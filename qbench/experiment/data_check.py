"""Checks that a stored run was trained on the images that its data set contains now.

Images are not part of a run's identity, because the identity must be known before any data is read.
Instead, results and checkpoints contain the digest of the images. It is compared whenever a result
or a checkpoint is used.
This module does not import torch unless images must be read.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qbench.config.schema import Node
from qbench.data import sources
from qbench.errors import CheckpointError, DataError
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.result import Result, load_result
from qbench.system.caches import cached_for_command


def current_sha256(node: Node) -> str:
    """Return the digest of the images that a data set contains now.

    The images are read only if their files may have changed since they were read last.

    Raises:
        DataError: the files are missing or damaged.
    """
    return _current_sha256(json.dumps(node, sort_keys=True))


@cached_for_command(8)
def _current_sha256(node_json: str) -> str:
    node = json.loads(node_json)
    if sources.are_gone(node):
        raise DataError("its files are missing")
    if known := sources.cached_sha256(node):
        return known
    from qbench.experiment.builders import build_dataset, images_sha256

    return images_sha256(build_dataset(node))


def has_other_data(planned: PlannedRun, result: Result, warn: Callable[[str], object]) -> bool:
    """Return whether a result was measured on other images than its data set contains now.

    If the images cannot be read, call `warn` and return False.
    """
    if result.data_sha256 is None:
        return False
    try:
        return current_sha256(planned.config.dataset) != result.data_sha256
    except DataError as error:
        why = str(error).partition("\n")[0]
        warn(f"warning: cannot check the images of stored results on dataset={result.dataset}: {why}")
        return False


def check_stored(runs: Sequence[PlannedRun]) -> None:
    """Check that every stored result of some runs was measured on the images that its data set contains now.

    Raises:
        CheckpointError: results were measured on other images. The message names the first run.
    """
    stored = [(planned, planned.directory.stored()) for planned in runs if not planned.config.rerun]
    warnings: dict[str, None] = {}
    other = [p for p, result in stored if result and has_other_data(p, result, warnings.setdefault)]
    for warning in warnings:
        print(warning, file=sys.stderr)
    if other:
        raise other_data_error([planned.path for planned in other], other[0].identity.dataset)


def check_same_data(run: Path, sha256: str, dataset: str) -> None:
    """Check that a finished run was trained on the images that its data set contains now.

    Args:
        sha256: digest of the images that the data set contains now.

    Raises:
        CheckpointError: the images differ.
    """
    result = load_result(run)
    if result and result.data_sha256 not in (None, sha256):
        raise other_data_error([run], dataset)


def other_data_error(paths: Sequence[Path], dataset: str) -> CheckpointError:
    """Return the error about runs that were trained on other images."""
    were = f" and {len(paths) - 1} other runs were" if len(paths) > 1 else " was"
    return CheckpointError(
        f"{paths[0]}{were} trained on other images than dataset={dataset} contains now\n"
        "restore the images; or train on the new images: with rerun=true, or with out=DIR in another directory"
    )
