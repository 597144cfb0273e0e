"""Measures the time of single passes over memory, and the times of the parts of a training step.

    .venv/bin/python scripts/bench/where.py

The training step is a step of ResNet-20 with 64 images of 3x32x32, in one thread. torch's profiler
measures the step, and makes it a few per cent slower. In the table, "before" means the plain
definitions of the quantizers, which autograd differentiates (`ops.reference_kernels`). "After"
means the quantizers' fused kernels.
"""

import contextlib
import statistics

import torch
from measure import machine, markdown, seconds
from plain import Work, plain, training_step
from step import Case, fp32, quantized
from torch.profiler import ProfilerActivity, profile

from qbench.experiment.device import tune_malloc
from qbench.quant import ops

COUNT, STEPS, ROUNDS = 2**20, 3, 7
KINDS = {
    "convolutions": ("convolution", "mkldnn_convolution"),
    "batch normalization": ("batch_norm",),
    "masks: comparisons to bool, where, bool products": (
        "where",
        "eq",
        "ge",
        "gt",
        "le",
        "lt",
        "logical_and",
        "logical_or",
        "bitwise_and",
    ),
}


def passes() -> list[tuple[str, str]]:
    """Return the times in microseconds of several operations on 2^20 float32 numbers."""
    x, y, other = torch.randn(COUNT), torch.randn(COUNT), torch.randn(COUNT)
    mask = x > 0
    works: dict[str, Work] = {
        "relu, into new memory": lambda: torch.relu(x),
        "mul_ by a number, in place": lambda: y.mul_(1.0),
        "round_, in place": lambda: y.round_(),
        "hardtanh_backward": lambda: torch.ops.aten.hardtanh_backward(x, other, 0, 1),
        "ge_, in place, into floats": lambda: y.ge_(0.5),
        "x > 0, into bool": lambda: x > 0,
        "where(mask, x, 0)": lambda: torch.where(mask, x, 0.0),
        "x * mask": lambda: x * mask,
        "max of all": lambda: x.max(),
        "amax of all": lambda: x.amax(),
        "bucketize into 4": lambda: torch.bucketize(x, torch.tensor([0.3, 0.9, 1.4])),
        "rand_like": lambda: torch.rand_like(x),
        "a quarter as many 64-bit draws": lambda: torch.empty(COUNT // 4, dtype=torch.int64).random_(-(2**63), None),
    }
    return [(name, f"{1e6 * statistics.median(seconds(work) for _ in range(31)):.0f}") for name, work in works.items()]


def kinds(work: Work) -> dict[str, float]:
    """Return how many milliseconds of a step each kind of operation takes."""
    for _ in range(3):
        work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            work()
    times = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::").rstrip("_")
        matching = (k for k, words in KINDS.items() if name in words or any(len(w) > 9 and w in name for w in words))
        times[next(matching, "other operations")] += event.self_cpu_time_total / 1e3 / STEPS
    return times


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    tune_malloc()
    print(f"{machine()}, 1 thread\n")
    print(markdown(("a pass over 2^20 numbers", "microseconds"), passes()) + "\n")
    case = Case("dorefa w2a2", "dorefa", {"w": 2, "a": 2})
    columns = {"fp32 stock": training_step(plain(), "cpu"), "fp32 channels_last": fp32("cpu")}
    columns |= {"DoReFa W2A2 before": quantized(case, "cpu"), "DoReFa W2A2 after": quantized(case, "cpu")}
    spent: dict[str, dict[str, float]] = {name: {} for name in columns}
    for _ in range(ROUNDS):
        for name, work in columns.items():
            with ops.reference_kernels() if name.endswith("before") else contextlib.nullcontext():
                for kind, time in kinds(work).items():
                    spent[name][kind] = spent[name].get(kind, 0.0) + time / ROUNDS
    rows = [(kind, *[f"{times[kind]:.1f}" for times in spent.values()]) for kind in next(iter(spent.values()))]
    rows.append(("all", *[f"{sum(times.values()):.1f}" for times in spent.values()]))
    print(markdown(("milliseconds of a step", *spent), rows))


if __name__ == "__main__":
    main()
