"""Reads the config.yaml of a run, and refuses a file that was edited after the run."""

from pathlib import Path

from qbench.config.identity import run_identity
from qbench.config.schema import STARTS, Config
from qbench.config.validate import from_dict
from qbench.errors import CheckpointError, ConfigError
from qbench.runs.result import Result, load_result
from qbench.system import files


def stored_config(run: Path, identity: str | None = None) -> Config:
    """Return the configuration with which a run was trained.

    The checkpoints that `init` and `distill.teacher` name need not exist, because the run's identity depends
    only on their digests, which result.json contains.

    Args:
        identity: digest of the run's identity, as stored with the weights. If it is None, the configuration must
            match the identity in result.json. If there is no result.json either, any configuration is accepted.

    Raises:
        OSError: config.yaml cannot be read.
        CheckpointError: config.yaml describes another run, or is not a configuration.
    """
    file, result = run / "config.yaml", load_result(run)
    try:
        config = _parse(files.read_yaml(file), run)
        found = run_identity(config, recorded_files(result)).digest
    except (TypeError, KeyError, ConfigError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is not valid: {why}") from None
    if found != (identity or (result.identity if result else found)):
        raise CheckpointError(
            f"{file} was edited after the run: the stored weights and result belong to other settings\n"
            "restore the file; to train the edited configuration, type its keys on a command line"
        )
    return config


def recorded_files(result: Result | None) -> dict[str, str]:
    """Return the sha256 of the checkpoints that `init` and `distill.teacher` name, by key."""
    keys = result.protocol.keys if result else {}
    digests = {"init": keys.get("init"), "distill.teacher": (keys.get("distill") or {}).get("teacher")}
    return {key: str(value) for key, value in digests.items() if value}


def _parse(values: object, run: Path) -> Config:
    """Return the configuration in the values of a file. Checkpoints that the configuration names need not exist."""
    if not isinstance(values, dict):
        raise ConfigError(f"the file contains {values!r}, not keys and values")
    init, teacher = values["init"], values["distill"]["teacher"]
    if init not in STARTS:
        values |= {"init": str(run)}
    if teacher != "baseline":
        values["distill"] |= {"teacher": str(run)}
    config = from_dict(values)
    config.init, config.distill.teacher = init, teacher
    return config
