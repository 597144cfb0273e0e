"""Starts torchrun, passes signals on to qbench, and returns qbench's exit status.

    python -m qbench.distributed.torchrun --nproc-per-node=4 -m qbench method=dorefa batch_shards=4

Without this module, torchrun passes on only some signals. If a process fails, torchrun then always ends with status 1,
not with the status of the process.
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from qbench.distributed.launch import STARTED_BY, STATUS_FOLDER
from qbench.errors import Interrupted

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def main(arguments: list[str]) -> int:
    """Run torchrun with the given arguments. Return the exit status.

    Each process writes its status to a file. The result is the status of the process with the lowest rank that wrote
    one. If no process wrote a status, the result is the largest exit status of a failed process or, if signals ended
    the processes, the status of an interrupted run.
    """
    for name in SIGNALS.split(","):  # torchrun replaces these handlers before it starts processes
        signal.signal(getattr(signal, name), _stop)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic", "torch.distributed.run"):  # qbench prints its own messages
        logging.getLogger(name).setLevel(logging.CRITICAL)
    unknown = 0  # the status if no process has written its own
    with tempfile.TemporaryDirectory(prefix="qbench-") as folder:
        os.environ |= {STATUS_FOLDER: folder, STARTED_BY: str(os.getpid())}
        try:
            run.main([f"--signals-to-handle={SIGNALS}", *arguments])
        except SignalException:
            unknown = Interrupted.status
        except ChildFailedError as error:
            ends = [failure.exitcode for failure in error.failures.values()]  # below 0: ended by a signal
            unknown = max(ends) if max(ends) > 0 else Interrupted.status
        for name in SIGNALS.split(","):  # a late signal must not replace the status, as in `ignore_stop_signals`
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        statuses = {int(path.name): int(path.read_text()) for path in Path(folder).iterdir()}
    if statuses:
        return statuses[min(statuses)]
    if unknown == Interrupted.status:
        print("qbench: all processes were stopped; to continue, repeat the command", file=sys.stderr)
    return unknown


def _stop(number: int, frame: FrameType | None) -> None:
    print(f"qbench: stopped by signal {number}; to continue, repeat the command", file=sys.stderr)
    sys.exit(Interrupted.status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
