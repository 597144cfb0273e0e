"""Reads the configuration and the weights of a finished run, from which its network can be rebuilt."""

from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

from torch import nn

from qbench.config.foreign_code import refuse_edited_code
from qbench.config.schema import Config, Distill, to_dict
from qbench.data.spec import InputFormat
from qbench.errors import CheckpointError
from qbench.quant.layers import quantized_layers, quantized_parts
from qbench.runs.result import load_result
from qbench.runs.stored_config import stored_config
from qbench.training.checkpoint import Saved
from qbench.training.initial_weights import load_published

LAYERS = "layers"
"""Key of a checkpoint for its `StoredLayers`."""

VERIFIED = "verified"
"""Key for the names of the quantized layers.

Checkpoints of earlier versions have no `LAYERS`. `stored_run` then reads these names from result.json.
"""


class StoredLayers(TypedDict):
    """The layers of a run's network, in a checkpoint. They can depend on the weights from which the run started.

    `order` contains the layers in the order of their first execution, `macs` the multiply-accumulates of each layer,
    and `quantized` the quantized parts (`quantized_parts`). `input` is the format of the images. Checkpoints of earlier
    versions do not contain `input`.
    """

    order: list[str]
    macs: dict[str, int]
    quantized: dict[str, str]
    input: NotRequired[InputFormat]


def stored_run(run: Path, named: str, weights: str = "best", device: str = "cpu") -> tuple[Config, Saved]:
    """Return a finished run's configuration and checkpoint.

    Initial weights and teacher are removed from the configuration.

    Args:
        run: directory of the run.
        named: name of the run in error messages.
        weights: `best` for the weights with the best validation accuracy, `last` for the weights of
            the last epoch.
        device: device to set in the configuration.

    Raises:
        CheckpointError: a file of the run is missing, is damaged or was edited, or a user's file
            that the run's configuration names was edited after the run.
    """
    try:
        state = load_published(run, f"{weights}.pt")
        config = stored_config(run, str(state.get("identity")))
    except OSError as error:
        raise CheckpointError(f"{named}: {error.filename}: {error.strerror}; the run may not be finished") from None
    refuse_edited_code(run, to_dict(config))
    if LAYERS not in state and (result := load_result(run)) and result.verified is not None:
        state[VERIFIED] = list(result.verified)
    runtime = replace(config.runtime, device=device)
    return replace(config, init="scratch", distill=Distill("none"), runtime=runtime), state


def load_weights(model: nn.Module, state: Saved, named: str) -> nn.Module:
    """Load a run's checkpoint into the network, and return the network.

    Raises:
        CheckpointError: the checkpoint belongs to another network, or to a network with other quantized layers.
    """
    check_quantized(model, state, named)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{named} and config.yaml belong to different networks: {why}") from None
    return model


def check_quantized(model: nn.Module, state: Saved, named: str) -> None:
    """Check that a rebuilt network has quantizers at the same places as the network of the checkpoint.

    The places can differ, because the layers that a network executes can depend on data or on unseeded random numbers.

    Args:
        state: the content of a checkpoint. Without information on the quantized layers, nothing is checked.
        named: name of the checkpoint in the error message.

    Raises:
        CheckpointError: the places differ. The message names them.
    """
    found = quantized_parts(model)
    if LAYERS in state:
        stored = dict(state[LAYERS]["quantized"])
    elif VERIFIED in state:
        found = {name: found[name] for name in quantized_layers(model)}
        stored = {name: found.get(name, "quantized") for name in state[VERIFIED]}
    else:
        return
    differing = [name for name in [*found, *stored.keys() - found] if found.get(name) != stored.get(name)]
    if differing:
        shown = "; ".join(f"{n} ({found.get(n, 'float')}, in the run {stored.get(n, 'float')})" for n in differing[:4])
        more = f" and {len(differing) - 4} more" if differing[4:] else ""
        raise CheckpointError(
            f"{named}: the rebuilt network has quantizers at other places than the network of the run: {shown}{more}\n"
            "which layers this network executes depends on its weights or on random numbers\n"
            "to train the run again, add rerun=true"
        )
