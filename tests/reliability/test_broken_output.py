"""Output that nobody can read: the display is lost, the run and its exit status are not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiered

from qbench.system.streams import READER_GONE, LossyFile

RUN = "experiment=smoke method=dorefa bits=w2 runtime.tensorboard=false out=o"
FAILING = "experiment=smoke method=float bits.w=2 out=o"  # unsupported: status 2


def shell(command: str, work: Path) -> subprocess.CompletedProcess[str]:
    """Run a bash command line in which QBENCH stands for the program; show its status last."""
    line = command.replace("QBENCH", f"{sys.executable} -m qbench")
    return subprocess.run(
        ["bash", "-c", f"{line}; echo status ${{PIPESTATUS[0]}}"], cwd=work, capture_output=True, text=True,
        timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


LOST = {
    "both into head": "QBENCH {} 2>&1 | head -1",
    "both into a reader that is gone": "QBENCH {} 2>&1 | true",
    "both closed": "QBENCH {} >&- 2>&- <&-",
    "stdout closed": "QBENCH {} >&-",
    "stderr closed": "QBENCH {} 2>&-",
    "stderr on a full disk": "QBENCH {} 2> /dev/full",
}


@pytest.mark.parametrize("case", tiered(LOST, ["both closed"]))
def test_a_run_survives_the_loss_of_its_display(case: str, tmp_path: Path) -> None:
    done = shell(LOST[case].format(RUN), tmp_path)
    results = [json.loads(path.read_text()) for path in (tmp_path / "o").rglob("result.json")]
    assert [result["status"] for result in results] == ["done"] * 2, done
    assert done.stdout.endswith("status 0\n"), done
    for path in (tmp_path / "o").rglob("log.txt"):
        assert "Traceback" not in path.read_text()


@pytest.mark.parametrize("case", tiered(list(LOST)[1:5], ["stdout closed"]))
def test_the_status_is_that_of_the_command(case: str, tmp_path: Path) -> None:
    assert shell(LOST[case].format(FAILING), tmp_path).stdout.endswith("status 2\n")
    assert shell(LOST[case].format("method=dorfa"), tmp_path).stdout.endswith("status 2\n")
    assert shell(LOST[case].format("list methods"), tmp_path).stdout.endswith("status 0\n")


@pytest.mark.full
def test_a_sweep_with_workers_survives_the_loss_of_its_display(tmp_path: Path) -> None:
    words = f"-m {RUN} seed=0,1 hydra/launcher=joblib hydra.launcher.n_jobs=2"
    assert shell(f"QBENCH {words} 2>&1 | true", tmp_path).stdout.endswith("status 0\n")
    results = [json.loads(path.read_text()) for path in (tmp_path / "o").rglob("result.json")]
    assert [result["status"] for result in results] == ["done"] * 4


@pytest.mark.full
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_sweep_survives_a_terminal_that_is_hung_up(terminal: str, tmp_path: Path) -> None:
    master, slave = os.openpty()
    words = ["-m", *RUN.split(), "seed=0,1", "epochs=20", "runtime.tensorboard=false"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=slave, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": terminal},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"dorefa w2a32g32 s0" not in shown:
        shown += os.read(master, 4096)
    os.close(master)
    out = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 0
    assert out.rstrip().endswith("qbench compare o --html report.html")
    assert (b"\x1b" in shown) == (terminal == "xterm")


def test_a_full_disk_under_stdout_is_an_error(tmp_path: Path) -> None:
    done = shell("QBENCH list methods > /dev/full", tmp_path)
    assert (done.stdout, done.stderr) == ("status 5\n", "qbench: No space left on device\n")


def test_a_descriptor_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = os.fork()
    if not child:
        os.close(writer)
        while os.read(reader, 2**16):
            pass
        os._exit(0)
    with LossyFile(writer, READER_GONE) as file:
        for _ in range(64):
            assert file.write(bytes(2**16)) > 0
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)


def test_other_errors_than_a_lost_reader_are_raised() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        assert LossyFile(full.fileno(), None).write(b"text") == 4
        with pytest.raises(OSError, match="No space left"):
            LossyFile(full.fileno(), READER_GONE).write(b"text")
