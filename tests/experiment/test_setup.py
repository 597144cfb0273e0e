"""The parts of an experiment: what they are made from, and what a result records of the data."""

from pathlib import Path

import pytest
from conftest import Configure

from qbench.config.identity import digest, run_identity
from qbench.data.dataset import Dataset
from qbench.data.spec import InputFormat, input_format
from qbench.experiment.builders import build_dataset, build_method, build_model
from qbench.experiment.planned_run import planned_run, planned_runs
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.runs.directory import directory_name

DIGITS = "88c60432dbf872263b31bacbbdb17b83cdc4aa31e86ab0604b3f29d4a0275638"
"""The digest of scikit-learn's digits with dataset.val=0.1. Stored results have it: a change of the loader, of the
split or of the fingerprint must not go unnoticed."""


def test_the_digest_of_the_data_is_stable() -> None:
    node = {"name": "digits", "val": 0.1, "pad": 1}
    assert digest(build_dataset(node).fingerprint()) == DIGITS
    assert digest(build_dataset(node | {"pad": 0}).fingerprint()) == DIGITS, "augmentation is not part of the data"
    assert digest(build_dataset(node | {"val": 0.2}).fingerprint()) != DIGITS, "the split is part of it"


def test_a_result_records_the_digest_of_its_data(smoke: Configure) -> None:
    config = smoke("method=dorefa", "init=scratch")
    result = run(planned_run(config))
    assert result.data_sha256 == DIGITS
    assert DIGITS not in str(run_identity(config).keys), "an identity is known without reading data"


def test_builders_take_their_own_nodes(configure: Configure) -> None:
    config = configure("method=hwgq", "seed=3")
    data = build_dataset(config.dataset)
    method = build_method(config.method, config.activation, config.bits.resolved())
    model = build_model(config.model, data, method, config.seed)
    setup = assemble(config)
    assert setup.data is data, "the runs of a sweep share it"
    assert setup.method.bits == method.bits == (1, 2, 32)
    same = zip(setup.float_model().state_dict().values(), model.state_dict().values(), strict=True)
    assert all(one.equal(other) for one, other in same)
    assert "layer1.0.bn1.weight" not in model.state_dict(), "hwgq requires normalization without scale and shift"


def test_a_run_of_a_sweep_is_planned_once(configure: Configure) -> None:
    configs = [configure("method=dorefa", *words) for words in ((), ("bits.w=2",), ("bits.w=4",), ("rerun=true",))]
    runs = planned_runs(configs)
    assert [run.identity.bits.w for run in runs] == [2, 4]
    assert runs[0].config.rerun, "of equal runs the last one counts"
    assert runs[0].path == Path(configs[0].out) / directory_name(run_identity(configs[0]))


def test_checkpoints_compute_the_input_format_once(smoke: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """For float images, the format contains the range of all training images."""
    setup = assemble(smoke("method=dorefa", "init=scratch"))
    calls = []

    def counted(data: Dataset) -> InputFormat:
        calls.append(data)
        return input_format(data)

    monkeypatch.setattr("qbench.experiment.setup.input_format", counted)
    model = setup.install(setup.float_model())
    first, second = setup.layers(model), setup.layers(model)
    assert first["input"] == second["input"] == input_format(setup.data)
    assert len(calls) == 1
