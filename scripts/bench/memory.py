"""Measures the memory that ResNet-20 keeps for the backward pass under each method (batch 64, 3x32x32).

    .venv/bin/python scripts/bench/memory.py

Two numbers are measured, relative to the float network. `alive` is the number of bytes that a
forward pass allocates and does not free, according to torch's profiler. `saved` is the number of
bytes of the distinct storages that saved_tensors_hooks see. Tensors that a layer recomputes instead
of saving are not included in `saved`. If the method replaces activation functions, the quantized
network has a quantizer in place of each ReLU.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import machine, markdown
from plain import NHWC, data, placed, plain
from step import CASES, built, installed
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from qbench.experiment.device import with_autocast
from qbench.quant import ops


def alive(model: nn.Module, images: Tensor) -> int:
    """Return the number of bytes that are still allocated after a forward pass."""
    model(images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits = model(images)
    del logits
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def saved(model: nn.Module, images: Tensor) -> int:
    """Return the number of bytes of the distinct storages that are saved for the backward pass."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        model(images)
    return sum(storages.values())


def peak(epochs: int) -> int:
    """Return the peak memory in bytes of a process that trains the default run for a number of epochs."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"out={folder}", "method=dorefa", "bits=w2a2", "init=scratch", f"epochs={epochs}"]
        subprocess.run([sys.executable, "-m", "qbench", *words], check=True, capture_output=True)
        (result,) = Path(folder).rglob("result.json")
        return int(json.loads(result.read_text())["speed"]["peak_bytes"])


def in_bf16(model: nn.Module) -> nn.Module:
    """Change a network in place so that it computes as runtime.precision=bf16 does."""
    model.forward = with_autocast(model.forward, torch.device("cpu"), torch.bfloat16)
    return model


def row(name: str, model: nn.Module, images: Tensor, base: tuple[int, int], modes: int) -> tuple[str, ...]:
    """Return a row: the memory of the first `modes` modes of runtime.activation_memory, and of the plain definition.

    Each number is a share of `base`, the float network's (alive, saved) bytes. With 0 modes, a float network is
    measured.
    """
    columns = []
    for mode in ("recompute", "keep", "codes")[: max(modes, 1)]:
        with ops.activation_memory(mode):
            columns += [f"{alive(model, images) / base[0]:.2f}", f"{saved(model, images) / base[1]:.2f}"]
    columns += [""] * (6 - len(columns))
    if not modes:
        return name, *columns, ""
    with ops.reference_kernels():
        return name, *columns, f"{alive(model, images) / base[0]:.2f}"


def main() -> None:
    """Print the table."""
    images, _ = data("cpu", NHWC)
    float_model = placed(plain(), "cpu", NHWC)
    base = alive(float_model, images), saved(float_model, images)
    rows: list[tuple[str, ...]] = [("float", f"1.00 ({base[0] / 1e6:.1f} MB)", "1.00", "", "", "", "", "")]
    rows.append(row("float, runtime.precision=bf16", in_bf16(placed(plain(), "cpu", NHWC)), images, base, 0))
    for case in CASES:
        method = built(case)
        if method.bits.a == 32:
            continue
        modes = 3 if "cells_input" in method.traits else 2
        rows.append(row(case.label, installed(method).train(), images, base, modes))
        if case is CASES[0]:
            name = f"{case.label}, runtime.precision=bf16"
            rows.append(row(name, in_bf16(installed(method).train()), images, base, modes))
    print(f"{machine()}\n")
    head = ("kept for backward", "alive", "saved", "keep: alive", "saved", "codes: alive", "saved", "plain: alive")
    print(markdown(head, rows))
    peaks = {epochs: f"{peak(epochs) / 2**20:.0f} MiB" for epochs in (5, 200)}
    print("\n" + markdown([f"{epochs} epochs" for epochs in peaks], [list(peaks.values())]))
    print("\nPeak memory of a process that trains DoReFa W2A2 with the defaults (resnet8, digits).")


if __name__ == "__main__":
    main()
