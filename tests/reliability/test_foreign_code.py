"""Code that a run of somebody else names, or that lies in the working directory, is not run unasked."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiered
from helpers import qbench, write_images

from qbench.cli import run_options
from qbench.cli.main import main as cli
from qbench.config.foreign_code import foreign_code
from qbench.config.schema import to_dict
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.runs.reader import read

NETWORK = """
from pathlib import Path
from torch import nn
Path("imported").touch()
def net(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))
"""
SMOKE = ("epochs=1", "pretrain.epochs=1", "runtime.tensorboard=false")
FEW_STEPS = ("optim.batch_size=256", "pretrain.optim.batch_size=256")


@pytest.fixture
def stranger(tmp_path: Path) -> tuple[Path, Path]:
    """Return a working directory with a file strange.py, and the run of somebody else who used it."""
    (tmp_path / "strange.py").write_text(NETWORK)
    done = qbench("method=dorefa", "bits=w2", "model=strange:net", *SMOKE, *FEW_STEPS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "imported").unlink()
    return tmp_path, next(tmp_path.rglob("dorefa*"))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
def test_code_named_by_a_run_needs_trust(stranger: tuple[Path, Path], every: bool) -> None:
    work, run = stranger
    command = f"{run.relative_to(work)}"
    refused = [["evaluate", command], ["settle", command, "method=lsq bits=w2"]]
    refused += [["method=lsq", "distill=kd", f"distill.teacher={command}", *SMOKE]]
    refused += [["inspect", command], ["sensitivity", command], ["evaluate", command, "dataset=digits"]]
    for words in refused if every else refused[:3]:
        done = qbench(*words, cwd=work)
        assert done.returncode == 2, (words, done)
        assert "names code that is not part of qbench: model.name=strange:net\nto run that code" in done.stderr
        assert not done.stdout
        assert not (work / "imported").exists(), words
    trusted = qbench("evaluate", command, "--trust", cwd=work)
    assert trusted.returncode == 0, trusted.stderr
    assert (work / "imported").exists()
    for more in ("distill.trust=true", "model=strange:net")[: 2 if every else 1]:
        taught = qbench("method=lsq", "distill=kd", f"distill.teacher={command}", more, *SMOKE, *FEW_STEPS, cwd=work)
        assert taught.returncode == 0, taught.stderr


@pytest.mark.parametrize("group", ["method", "model", "dataset", "activation"])
@pytest.mark.parametrize("key", ["name", "family"])
def test_code_is_found_in_every_group(group: str, key: str, tmp_path: Path, configure: Any) -> None:
    values = to_dict(configure("method=dorefa"))
    assert foreign_code(values) == []
    values[group] = values[group] | {key: "outputs.stranger.evil:build"}
    assert foreign_code(values) == [f"{group}.{key}=outputs.stranger.evil:build"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"{group}.{key}=outputs.stranger.evil:build\nto run that code: --trust"):
        run_options.parse_evaluate([str(tmp_path)])
    assert run_options.parse_evaluate([str(tmp_path), "--trust"]).run == tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out", "${oc.env:SECRET}"),
        ("dataset", {"name": "digits", "root": "x${oc.env:SECRET}"}),
        ("seed", "${oc.decode:${oc.env:SECRET}}"),
        ("optim", {"lr": 0.1, "milestones": ["${oc.env:SECRET}"]}),
        ("init", "${out}"),
    ],
)
def test_interpolations_of_a_stored_configuration_are_refused(
    key: str, value: Any, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SECRET", "the-password")
    values = to_dict(configure("method=dorefa")) | {key: value}
    with pytest.raises(ConfigError, match="a configuration must contain values") as raised:
        from_dict(values)
    assert "the-password" not in str(raised.value)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "final", "step": 1, "test_top1": 50}\n')
    assert "the-password" not in repr(read([str(tmp_path)]))
    for words in (
        ["evaluate", str(tmp_path)],
        ["settle", str(tmp_path), "method=lsq"],
        ["list", "runs", str(tmp_path)],
    ):
        cli(words)
        assert "the-password" not in "".join(capsys.readouterr()), words


@pytest.mark.parametrize("of", tiered(["a sweep", "a data set"], []))
def test_worker_processes_import_nothing_from_the_working_directory(tmp_path: Path, of: str) -> None:
    work, program = tmp_path / "work", tmp_path / "bin" / "qbench"
    work.mkdir()
    program.parent.mkdir()
    program.write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom qbench.cli.main import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    for module in ("selectors", "socket", "signal", "random", "multiprocessing", "numpy"):
        (work / f"{module}.py").write_text("open('imported', 'a').write(__name__)\nraise SystemExit(7)\n")
    images = write_images(tmp_path / "set", count=8)
    folder = [
        "dataset=folder", f"dataset.root={images}", "dataset.size=16", "dataset.resize=18", "runtime.num_workers=2",
    ]  # fmt: skip
    sweep = ["-m", "seed=0,1", "init=scratch", *FEW_STEPS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    words = sweep if of == "a sweep" else folder
    done = subprocess.run(
        [sys.executable, str(program), "experiment=smoke", "method=dorefa", "bits=w2", *SMOKE, *words],
        cwd=work, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert not (work / "imported").exists(), words
    assert done.returncode == 0, done
