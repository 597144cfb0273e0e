"""A SLURM cluster of one machine, for tests: sbatch, srun, scontrol, sacct and scancel.

`install(folder)` writes the commands into a folder, to be put into PATH. Each of them calls this file:

    sbatch FILE          starts a controller in the background, which runs the jobs of an array at most two at a time
    srun ... COMMAND     runs the command in all tasks of the job
    scontrol requeue ID  lets the controller end the job and run it again
    sacct, scancel ID    reports and ends jobs

A job is a folder of the state: `script`, `state`, `turns` (how often it has begun), `pids` of its tasks, `requeue`.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "sacct", "scancel")
STATE = "FAKE_SLURM_STATE"
AT_A_TIME = 2


def install(folder: Path) -> dict[str, str]:
    """Write the commands into a folder. Return the environment in which they are found."""
    for name in (*COMMANDS, "state"):
        (folder / name).mkdir(parents=True) if name == "state" else folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", STATE: str(folder / "state")}


def jobs(folder: Path) -> dict[str, Path]:
    """Return the folders of all jobs, by id, such as 2_0 for the first job of array 2."""
    return {path.parent.name: path.parent for path in sorted((folder / "state").glob("*/state"))}


def signal_job(job: Path, kind: signal.Signals) -> None:
    """Send a signal to all tasks of a job, as SLURM does before the end of a job."""
    for pid in (job / "pids").read_text().split():
        os.kill(int(pid), kind)


def read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def options(script: str) -> dict[str, str]:
    """Return the options in the #SBATCH lines of a script."""
    return {m[1]: m[2].strip("'") for m in re.finditer(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE)}


def sbatch(state: Path, file: str) -> None:
    script = Path(file).read_text()
    number = 1 + sum(path.is_dir() for path in state.iterdir() if "_" not in path.name)
    (state / str(number)).mkdir()
    (state / str(number) / "script").write_text(script)
    array = re.match(r"0-(\d+)", options(script).get("array", ""))
    for name in [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]:
        (state / name).mkdir(exist_ok=True)
        (state / name / "state").write_text("PENDING")
    with open(state / str(number) / "controller.log", "w") as log:
        subprocess.Popen(
            [sys.executable, __file__, "controller", str(number)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    print(f"Submitted batch job {number}")


def controller(state: Path, number: str) -> None:
    script = read(state / number / "script")
    asked = options(script)
    after = asked.get("dependency", "").removeprefix("afterany:")
    while after and read(state / after / "state") in ("PENDING", "RUNNING"):
        time.sleep(0.05)
    free = threading.Semaphore(AT_A_TIME)
    names = [path.parent.name for path in state.glob("*/state") if path.parent.name.partition("_")[0] == number]
    workers = [threading.Thread(target=run_job, args=(state, name, asked, free)) for name in sorted(names)]
    for worker in workers:
        worker.start()


def run_job(state: Path, name: str, asked: dict[str, str], free: threading.Semaphore) -> None:
    array, _, index = name.partition("_")
    tasks = int(asked.get("ntasks-per-node", 1)) * int(asked.get("nodes", 1))
    variables = {"SLURM_JOB_ID": name.replace("_", "0"), "SLURM_NTASKS": str(tasks)}
    variables |= {"SLURM_JOB_NUM_NODES": asked.get("nodes", "1"), "SLURM_JOB_NODELIST": "localhost"}
    variables |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index} if index else {}
    job, turns = state / name, 0
    with free:
        while True:
            turns += 1
            (job / "turns").write_text(str(turns))
            (job / "state").write_text("RUNNING")
            process = subprocess.Popen(["bash", str(state / array / "script")], env={**os.environ, **variables,
                                       "FAKE_SLURM_JOB": str(job)}, start_new_session=True)  # fmt: skip
            while process.poll() is None and not (job / "requeue").exists():
                time.sleep(0.05)
            if not (job / "requeue").exists():
                break
            time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            (job / "requeue").unlink()
            (job / "pids").unlink()
        ended = "CANCELLED by 0" if (job / "cancelled").exists() else "FAILED"
        (job / "state").write_text("COMPLETED" if process.returncode == 0 else ended)


def srun(state: Path, *words: str) -> None:
    paths = {words[i]: words[i + 1] for i in range(len(words)) if words[i] in ("--output", "--error")}
    command = words[words.index(sys.executable) :]
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"%A": array, "%a": index, "%j": os.environ["SLURM_JOB_ID"], "%t": str(rank)}
        files = []
        for path in (paths["--output"], paths.get("--error", paths["--output"])):
            for key, value in place.items():
                path = path.replace(key, value)
            files.append(open(path, "a"))  # noqa: SIM115
        here = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        tasks.append(subprocess.Popen(command, stdout=files[0], stderr=files[1], env=os.environ | here))
    (Path(os.environ["FAKE_SLURM_JOB"]) / "pids").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(abs(task.wait()) for task in tasks))


def scontrol(state: Path, action: str, job: str) -> None:
    assert action == "requeue"
    (state / job / "requeue").touch()


def sacct(state: Path, *words: str) -> None:
    print("JobID|State|NodeList")
    for path in state.glob("*/state"):
        print(f"{path.parent.name}|{read(path)}|localhost")


def scancel(state: Path, *names: str) -> None:
    for name in names:
        (state / name / "cancelled").touch()
        signal_job(state / name, signal.SIGKILL)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ[STATE]), *sys.argv[2:])
