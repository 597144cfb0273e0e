"""Checks that a stored run was trained on the images that its data set holds now.

Images are not part of a run's identity, which must be known before any data is read. A result and a
checkpoint hold the digest of the images instead, and it is compared whenever one of them is used.
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
    """Return the digest of the images that a data set holds now.

    The images are read only if their files may have changed since they were read last.

    Raises:
        DataError: the files are missing or damaged.
    """
    return _current_sha256(json.dumps(node, sort_keys=True))


@cached_for_command(8)
def _current_sha256(node_json: str) -> str:
    node = json.loads(node_json)
    if sources.are_gone(node):
        raise DataError("its files are not there")
    if known := sources.cached_sha256(node):
        return known
    from qbench.experiment.builders import build_dataset, images_sha256

    return images_sha256(build_dataset(node))


def has_other_data(planned: PlannedRun, result: Result, warn: Callable[[str], object]) -> bool:
    """Whether a result was measured with other images than its data set holds now.

    If the images cannot be read, call `warn` and return False.
    """
    if result.data_sha256 is None:
        return False
    try:
        return current_sha256(planned.config.dataset) != result.data_sha256
    except DataError as error:
        why = str(error).partition("\n")[0]
        warn(f"warning: stored results on dataset={result.dataset} are not compared with its images: {why}")
        return False


def check_stored(runs: Sequence[PlannedRun]) -> None:
    """Compare every stored result of some runs with the images that its data set holds now.

    Raises:
        CheckpointError: some were measured with other images. The message names the first.
    """
    stored = [(planned, planned.directory.stored()) for planned in runs if not planned.config.rerun]
    warnings: dict[str, None] = {}
    other = [p for p, result in stored if result and has_other_data(p, result, warnings.setdefault)]
    for warning in warnings:
        print(warning, file=sys.stderr)
    if other:
        raise other_data_error([planned.path for planned in other], other[0].identity.dataset)


def check_same_data(run: Path, sha256: str, dataset: str) -> None:
    """Compare the images that a finished run was trained on with those of its data set.

    Args:
        sha256: digest of the images that the data set holds now.

    Raises:
        CheckpointError: they are other images.
    """
    result = load_result(run)
    if result and result.data_sha256 not in (None, sha256):
        raise other_data_error([run], dataset)


def other_data_error(paths: Sequence[Path], dataset: str) -> CheckpointError:
    """Return the error about runs that were trained on other images."""
    were = f" and {len(paths) - 1} other runs were" if len(paths) > 1 else " was"
    return CheckpointError(
        f"{paths[0]}{were} trained on other images than dataset={dataset} holds now\n"
        "restore the images; rerun=true trains again with these, and out=DIR trains in another directory"
    )
