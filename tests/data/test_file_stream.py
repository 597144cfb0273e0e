"""Streaming batches: equal to those in memory and to a slow reference, with any number of workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import image_sets
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from helpers import write_images
from image_sets import CPU, all_batches, build_folder, equal, expected_epoch_seed

from qbench.data import image_folders, images
from qbench.data.dataset import Split
from qbench.data.file_stream import FileSplit
from qbench.data.loader import Loader
from qbench.data.normalize import normalization

temporary_cache = image_sets.temporary_cache
streamed = image_sets.streamed


@pytest.mark.parametrize("augment", ["plain", "inception"])
def test_batches_do_not_depend_on_the_number_of_workers(augment: str, streamed: Path) -> None:
    data = build_folder(streamed, augment=augment, jitter=0.4)
    assert isinstance(data.train, FileSplit)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = all_batches(data)
    for workers in (1, 2):
        assert equal(all_batches(data, workers), whole)
        assert equal(all_batches(data, workers, start=3), whole[3:])
    assert equal(all_batches(data, 0, start=3), whole[3:])
    assert all_batches(data, 0, start=len(whole)) == []
    assert not equal(all_batches(data, epoch=2), whole)
    one, two = (list(Loader(data, 4, 0, CPU, workers).unaugmented("test", 10, 3)) for workers in (0, 2))
    assert equal(one, two)
    assert [len(y) for _, y in one] == [3, 3, 3, 1]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in whole + one)
    assert not multiprocessing.active_children()


def test_augmentation_of_an_image_does_not_depend_on_the_batch_size(streamed: Path) -> None:
    data = build_folder(streamed, augment="inception", jitter=0.2)
    wide, narrow = (torch.cat([x for x, _ in Loader(data, size, 0, CPU).train(0)]) for size in (12, 4))
    torch.testing.assert_close(wide, narrow, atol=1e-5, rtol=0)


def test_the_mean_is_that_of_evenly_spaced_images(streamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are sorted by class."""
    read: list[str] = []

    def decode(path: str, side: int) -> object:
        read.append(path)
        return images.decode_image(path, side)

    split = build_folder(streamed).train
    assert isinstance(split, FileSplit)
    monkeypatch.setattr(image_folders, "STATISTICS_IMAGES", len(split) - 2)
    monkeypatch.setattr(image_folders, "decode_image", decode)
    build_folder(streamed, normalize="own")
    every = list(split.paths(torch.arange(len(split))))
    assert len(read) == len(split) - 2
    assert set(read) & set(every[-2:]), "not only the first images"


def test_streamed_images_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", suffix="png", size=(20, 18))
    kept = build_folder(root, pad=2, jitter=0.3, val=0.4)
    monkeypatch.setattr(image_folders, "MAX_MEMORY", 1000)
    files = build_folder(root, pad=2, jitter=0.3, val=0.4)
    assert isinstance(kept.train, Split)
    assert isinstance(files.train, FileSplit)
    assert kept.shape == files.shape == (3, 12, 12)
    assert kept.train.images.shape[2:] == (16, 17)
    assert equal(all_batches(kept), all_batches(files))
    for name in ("train", "val", "test"):
        assert equal(list(Loader(kept, 4, 0, CPU).unaugmented(name)), list(Loader(files, 4, 0, CPU).unaugmented(name)))
    own = build_folder(root, val=0.4, normalize="own")
    torch.testing.assert_close((own.mean, own.std), normalization("own", kept.train.images))


def test_a_batch_equals_the_reference(streamed: Path) -> None:
    """Compute order, draws, crop and normalization of the streamed batches again, image by
    image.
    """
    data = build_folder(streamed, normalize="half")
    assert isinstance(data.train, FileSplit)
    loader = Loader(data, 4, 7, CPU)
    generator = torch.Generator().manual_seed(expected_epoch_seed(7, 2))
    order, draws = torch.randperm(24, generator=generator), torch.rand(24, 3, generator=generator)
    place = 0
    for x, y in loader.train(2):
        for got, label in zip(x, y, strict=True):
            n = int(order[place])
            image = torch.from_numpy(images.decode_image(streamed / data.train.names[n], 16)).movedim(2, 0)
            _, height, width = image.shape
            top, left = int(draws[n, 0] * (height - 11)), int(draws[n, 1] * (width - 11))
            crop = image[:, top : top + 12, left : left + 12]
            crop = crop.flip(2) if draws[n, 2] < 0.5 else crop
            torch.testing.assert_close(got, crop / 127.5 - 1, atol=1e-6, rtol=0)
            assert label == data.train.labels[n]
            place += 1
    assert place == 24


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(streamed: Path) -> None:
    data, device = build_folder(streamed, augment="inception"), torch.device("cuda")
    for (x, y), (u, v) in zip(all_batches(data), Loader(data, 4, 3, device, 2).train(1), strict=True):
        assert u.device.type == "cuda"
        assert torch.equal(x, u.cpu())
        assert torch.equal(y, v.cpu())


def test_an_interrupted_epoch_leaves_no_process(streamed: Path) -> None:
    batches = Loader(build_folder(streamed), 4, 0, CPU, 2).train(0)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_batches_continue_after_a_worker_was_killed(streamed: Path) -> None:
    data = build_folder(streamed)
    expected = all_batches(data)
    batches = Loader(data, 4, 3, CPU, 1).train(1)
    found = [next(batches)]
    (child,) = multiprocessing.active_children()
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match=r"ended .*; the main process will decode the rest"):
        found += list(batches)
    assert equal(found, expected)


SCRIPT = """
import os, signal, sys, torch
from filelock import FileLock
from qbench.data import folder
from qbench.data.loader import Loader

if __name__ == "__main__":
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(kind, lambda number, frame: None)
    with FileLock(sys.argv[2]), open(sys.argv[2] + ".log", "w"):
        data = folder.build(root=sys.argv[1], size=12, resize=16, val=0.0)
        batches = Loader(data, 2, 0, torch.device("cpu"), 2).train(0)
        next(batches)
        print("ready", flush=True)
        sys.stdin.readline()
        print(sum(1 for _ in batches), flush=True)
"""


def _processes(mark: str) -> list[int]:
    """Return the processes with this mark in their environment, which children inherit."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"QBENCH_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@contextmanager
def _running_script(root: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path, str]]:
    """Run a script until it has made one batch with two workers; yield its process, its lock and
    its mark.
    """
    script, lock, mark = tmp_path / "script.py", tmp_path / "lock", f"{os.getpid()}-{time.monotonic()}"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(root), str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "QBENCH_MARK": mark},
    ) as main:  # fmt: skip
        assert main.stdout
        assert main.stdout.readline() == "ready\n"
        yield main, lock, mark


def _all_ended(mark: str) -> bool:
    deadline = time.monotonic() + 20
    while _processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _processes(mark)


proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@proc
def test_workers_end_with_the_main_process_and_hold_no_lock(streamed: Path, tmp_path: Path) -> None:
    with _running_script(streamed, tmp_path) as (main, lock, mark):
        processes = _processes(mark)
        assert len(processes) >= 4, "the main process, two workers, the fork server"
        for file in (lock, lock.with_name("lock.log")):
            holders = [pid for pid in processes for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.resolve() == file]
            assert holders == [main.pid], "workers do not inherit open files"
        main.kill()
        main.wait(20)
        with FileLock(lock, timeout=0):
            pass
        assert _all_ended(mark)


@pytest.mark.full
@proc
def test_workers_ignore_signals_to_the_process_group(streamed: Path, tmp_path: Path) -> None:
    with _running_script(streamed, tmp_path) as (main, _, mark):
        for kind in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.killpg(main.pid, kind)
        time.sleep(0.5)
        assert len(_processes(mark)) >= 4
        out, errors = main.communicate("go\n", timeout=60)
        assert (main.returncode, out, errors) == (0, "11\n", "")
        assert _all_ended(mark)
