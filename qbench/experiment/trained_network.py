"""Reads the configuration and the weights of a finished run, from which its network can be rebuilt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qbench.config.foreign_code import refuse_edited_code
from qbench.config.schema import Config, Distill, to_dict
from qbench.errors import CheckpointError
from qbench.runs.stored_config import stored_config
from qbench.training.initial_weights import load_published


def stored_run(run: Path, named: str, weights: str = "best", device: str = "cpu") -> tuple[Config, dict[str, Any]]:
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
    runtime = replace(config.runtime, device=device)
    return replace(config, init="scratch", distill=Distill("none"), runtime=runtime), state


def load_weights(model: nn.Module, state: dict[str, Any], named: str) -> nn.Module:
    """Load a run's checkpoint into the network, and return the network.

    Raises:
        CheckpointError: the checkpoint belongs to another network.
    """
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{named} and config.yaml belong to different networks: {why}") from None
    return model
