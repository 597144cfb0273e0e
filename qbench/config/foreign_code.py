"""Finds functions outside qbench that a stored configuration names.

A run's directory may come from somebody else. The config.yaml in this directory can name any
function as `package.module:function`, and qbench would import the function from the working
directory. Such code runs only if the user allows it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from qbench.config.registry import GROUPS, source_digest, users_file
from qbench.errors import CheckpointError, ConfigError, QbenchError
from qbench.system import files


def foreign_code(values: object) -> list[str]:
    """Return `KEY=NAME` for each function outside qbench that a configuration's values name."""
    nodes = values if isinstance(values, Mapping) else {}
    return [
        f"{group}.{key}={node[key]}"
        for group in (*GROUPS, "activation")
        if isinstance(node := nodes.get(group), Mapping)
        for key in ("name", "family")
        if ":" in str(node.get(key, ""))
    ]


def refuse_foreign_code(run: Path, named: str, fix: str, known: Collection[str] = ()) -> None:
    """Refuse a run whose config.yaml names code outside qbench, except the code in `known`.

    Args:
        named: name of the run for the message.
        fix: what to type to run the code.

    Raises:
        ConfigError: config.yaml names code that is neither in qbench nor in `known`.
    """
    try:
        values = files.read_yaml(run / "config.yaml")
    except (OSError, QbenchError):  # loading the run reports the error
        return
    if foreign := [code for code in foreign_code(values) if code not in known]:
        raise ConfigError(
            f"{named}: its config.yaml names code that is not part of qbench: {', '.join(foreign)}\n{fix}"
        )


def refuse_edited_code(run: Path, values: Mapping[str, object]) -> None:
    """Refuse a run whose configuration names a user's file that was edited after the run.

    The edited code would compute different outputs from the same weights.

    Args:
        values: the run's configuration as plain values.

    Raises:
        CheckpointError: the digest of a file differs from the digest in the configuration.
    """
    groups = {**dict.fromkeys(GROUPS, ""), "activation": "method"}
    nodes = [(own or key, node) for key, own in groups.items() if isinstance(node := values.get(key), Mapping)]
    for group, node in nodes:
        file = users_file(group, node)
        if file and node.get("source") not in (None, source_digest(file)):
            raise CheckpointError(
                f"{file} was edited after the run {run}; the run's weights belong to the old code\n"
                "restore the file, or train with the new code: repeat the run's command"
            )
