"""Checks that a data set has not changed since a stored run was trained on it.

Images are not part of a run's identity, because the identity must be known before any data is read.
Instead, results and checkpoints contain a digest of the images. Whenever a result or a checkpoint
is used, this digest is compared with the digest of the current images. This module imports torch only if images must be
read.
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
    """Return the digest of a data set's current images.

    The images are read only if their files may have changed since the last reading.

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
    """Return whether the images of a data set have changed since a result was measured.

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
    """Check that the data sets of some runs have not changed since the runs' stored results were measured.

    Raises:
        CheckpointError: images have changed. The message names the first of these runs.
    """
    stored = [(planned, planned.directory.stored()) for planned in runs if not planned.config.rerun]
    warnings: dict[str, None] = {}
    other = [p for p, result in stored if result and has_other_data(p, result, warnings.setdefault)]
    for warning in warnings:
        print(warning, file=sys.stderr)
    if other:
        raise other_data_error([planned.path for planned in other], other[0].identity.dataset)


def check_same_data(run: Path, sha256: str, dataset: str) -> None:
    """Check that a data set has not changed since a finished run was trained.

    Args:
        sha256: digest of the data set's current images.

    Raises:
        CheckpointError: the images have changed.
    """
    result = load_result(run)
    if result and result.data_sha256 not in (None, sha256):
        raise other_data_error([run], dataset)


def other_data_error(paths: Sequence[Path], dataset: str) -> CheckpointError:
    """Return the error that says that a data set has changed since some runs were trained."""
    were = f" and {len(paths) - 1} other runs were" if len(paths) > 1 else " was"
    return CheckpointError(
        f"the images of dataset={dataset} have changed since {paths[0]}{were} trained\n"
        "restore the old images; or train on the new ones, with rerun=true or in another directory out=DIR"
    )
