"""Defines a planned run, which is a configuration with a directory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qbench.config.identity import RunIdentity, run_identity
from qbench.config.schema import Config
from qbench.runs.directory import RunDirectory, directory_name


@dataclass(frozen=True)
class PlannedRun:
    """A run's configuration and directory."""

    config: Config
    directory: RunDirectory

    @property
    def identity(self) -> RunIdentity:
        """The identity of the run."""
        return self.directory.identity

    @property
    def path(self) -> Path:
        """The path of the run's directory."""
        return self.directory.path


def planned_run(config: Config) -> PlannedRun:
    """Return the planned run of a configuration, with a directory below `out`. Nothing is written."""
    identity = run_identity(config)
    return PlannedRun(config, RunDirectory(identity, Path(config.out) / directory_name(identity)))


def planned_runs(configs: Iterable[Config]) -> list[PlannedRun]:
    """Return the planned runs of configurations. Configurations with the same directory give one run."""
    return list({run.path: run for run in map(planned_run, configs)}.values())
