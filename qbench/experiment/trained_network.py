"""Reads a finished run's configuration and weights, to build the network again."""

from pathlib import Path
from typing import Any

from torch import nn

from qbench.config.schema import Config
from qbench.config.validate import from_dict
from qbench.errors import CheckpointError, ConfigError
from qbench.system import files
from qbench.training.initial_weights import load_published


def stored_run(run: Path, named: str, weights: str = "best", device: str = "cpu") -> tuple[Config, dict[str, Any]]:
    """Return a finished run's configuration and checkpoint. The configuration has no initial weights and no teacher.

    Args:
        run: directory of the run.
        named: name of the run in error messages.
        weights: `best` for the best weights on validation, `last` for those of the last epoch.
        device: device to set in the configuration.

    Raises:
        CheckpointError: a file of the run is missing or damaged.
    """
    try:
        values = files.read_yaml(run / "config.yaml")
        state = load_published(run, f"{weights}.pt")
        values |= {"init": "scratch", "distill": {"name": "none"}}
        values["runtime"]["device"] = device
        return from_dict(values), state
    except OSError as error:
        raise CheckpointError(f"{named}: {error.filename}: {error.strerror}; the run may not be finished") from None
    except (TypeError, KeyError, ConfigError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{named}: its config.yaml is not valid: {why}") from None


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
