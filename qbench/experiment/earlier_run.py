"""Checks the initial weights and the teacher of a run, and compares the run with the run that they come from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qbench.config.identity import RunIdentity, current_sha256
from qbench.data.dataset_check import other_class_names
from qbench.data.spec import InputFormat, dataset_from_format
from qbench.errors import CheckpointError
from qbench.experiment.builders import images_sha256
from qbench.experiment.setup import OTHER_IMAGES, ExperimentSetup, image_warnings
from qbench.runs.result import Result, load_result

SAME_FUNCTION = frozenset(("head", "act", "norm", "bn_momentum"))
"""Keys of networks that may differ between a run and the run it starts from.

The last layer can be new, quantizers can replace activation functions, and other normalization has other tensors.
"""


MOST_CONSTANTS = 0.05
"""Differences between the normalization of two runs that have a warning, as a fraction of the standard deviation.

With `dataset.normalize=own`, the constants of two splits of the same images differ by less.
"""


def earlier_run_warnings(setup: ExperimentSetup, identity: RunIdentity, layers: Mapping[str, Any]) -> list[str]:
    """Return warnings about initial weights from another run. The list is empty if they come from any other file.

    Some test images of this run may be training images of the other run, or of a run from which that one started. The
    weights may also belong to another function, if the other run had another shortcut or other normalization, or to
    other classes.

    Args:
        layers: the `StoredLayers` of the checkpoint with the weights. Empty for files of other programs.
    """
    init = setup.config.init
    source = earlier_run(Path(init))
    warnings = [f"init={init}: {text}" for text in _other_inputs(setup, layers.get("input"))]
    if source is None:
        return warnings
    if source.dataset == setup.config.dataset["name"]:
        if source.data_sha256 not in (None, images_sha256(setup.data)):
            warnings.append(
                f"init={init} {OTHER_IMAGES} or another split of dataset={source.dataset}; some test or validation "
                "images of this run may be among its training images"
            )
        warnings += [f"init={init}: {text}" for text in image_warnings(source)]
    if differing := _differing_keys(source, identity):
        warnings.append(f"init={init} was trained with {differing}")
    return warnings


def _other_inputs(setup: ExperimentSetup, stored: InputFormat | None) -> Iterator[str]:
    """Yield warnings about classes and about the normalization of the images with which weights were trained.

    `stored` is the format of these images, or None if it is not known.
    """
    if stored is None:
        return
    trained, data = dataset_from_format(stored), setup.data
    if setup.config.model.get("head", "keep") == "keep" and trained.classes == data.classes:
        yield from other_class_names(trained.class_names, data, "; to train a new last layer, add model.head=new")
    if trained.shape[0] != data.shape[0]:
        return  # an error of the weights' shapes has more to say
    if trained.train.dtype != data.train.dtype:
        kinds = ("8-bit images", "float images")
        theirs, ours = (kinds[each.train.dtype != torch.uint8] for each in (trained, data))
        yield f"the weights were trained on {theirs}, and this run has {ours}, so the network reads other numbers"
        return
    constants = zip(trained.mean, data.mean, trained.std, data.std, strict=True)
    if any(max(abs(m - n), abs(s - t)) > MOST_CONSTANTS * s for m, n, s, t in constants):
        theirs, ours = (f"mean {_rounded(each.mean)}, deviation {_rounded(each.std)}" for each in (trained, data))
        yield (
            f"the weights were trained on images that are normalized with {theirs}; this run normalizes with {ours}, "
            "so the network reads other numbers"
        )


def _rounded(constants: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.3g}' for value in constants)})"


def refuse_replaced_files(setup: ExperimentSetup, identity: RunIdentity) -> None:
    """Refuse initial weights or a teacher whose file was replaced after the run's identity had been computed.

    Call this after the files were loaded.

    Raises:
        CheckpointError: a file has another content than the identity says.
    """
    config, expected = setup.config, {}
    if config.starts_from_file:
        expected["init", config.init] = identity.keys["init"]
    if config.distill.on and not config.distill.by_baseline:
        expected["distill.teacher", config.distill.teacher] = identity.keys["distill"]["teacher"]
    for (key, path), digest in expected.items():
        if current_sha256(key, path) != digest:
            raise CheckpointError(
                f"{key}={path} was replaced after this command had started\nto use the new file, repeat the command"
            )


def earlier_run(path: Path) -> Result | None:
    """Return the result of a run. `path` is the run's directory, or best.pt or last.pt in this directory."""
    if path.is_dir():
        return load_result(path)
    return load_result(path.parent) if path.name in ("best.pt", "last.pt") else None


def _differing_keys(source: Result, identity: RunIdentity) -> str:
    """Return the keys that change the function of a network and differ between a run and the run it starts from.

    These are the keys of the network, and the normalization of the images if both runs have the same data set.
    """
    groups = {"model": set(identity.protocol["model"]) - SAME_FUNCTION, "dataset": {"normalize"}}
    texts = []
    for group, keys in groups.items():
        then, now = source.protocol.keys.get(group), identity.protocol[group]
        if isinstance(then, dict) and then.get("name") == now["name"]:
            differing = [key for key in sorted(keys & then.keys() & now.keys()) if then[key] != now[key]]
            texts += [f"{group}.{key}={then[key]}, but this run has {group}.{key}={now[key]}" for key in differing]
    return "; ".join(texts)
