"""Times exported ResNet-20 networks (3x32x32, one thread) in each runtime, relative to ONNX Runtime.

    .venv/bin/python scripts/bench/inference.py [--rounds 21] [--forms pre,post]
    .venv/bin/python scripts/bench/inference.py --formats    # only numba, with bit planes and with tables; needs AVX2

The weights are random, because times depend only on widths and sizes. The row `int8` of ONNX Runtime is ONNX Runtime's
own static quantization of the float network. The row `int8` of torch is FX graph mode quantization.

A contender is a runtime with a network. In every round, all contenders take turns. A ratio is the median over the
rounds, with quartiles. The first ratio is of wall time. The second ratio is of processor time, which other work on the
machine disturbs less. Memory is the difference of two numbers: the peak memory of a process that loads one file and
runs one image, and the memory of this process after its imports (torch and qbench). Memory includes the runtime itself.
For numba this includes the compiler, which is loaded even if compiled code is stored already.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Work, interleaved, machine, markdown, versions
from torch import Tensor, nn

from qbench.analysis.export import load_exported
from qbench.deploy import kernel_formats
from qbench.deploy.about import About
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.packed import pack_network
from qbench.deploy.trace import trace
from qbench.methods import dorefa
from qbench.models import resnet
from qbench.quant.install import install

SHAPE = (3, 32, 32)
WIDTHS = {"W1A1": (1, 1), "W1A2": (1, 2), "W2A2": (2, 2)}
TARGETS = {"W1A1": "0.50 int8", "W1A2": "0.55 int8", "W2A2": "0.65 int8"}
BATCH_TARGET = "0.40 fp32"


def network(form: str, w: int = 32, a: int = 32) -> nn.Module:
    """Return a ResNet-20 with random weights in evaluation mode, quantized to w and a bits."""
    torch.manual_seed(0)
    model = resnet.build(SHAPE, 10, form=form)
    if w < 32:
        install(dorefa.build(w=w, a=a), model, example=torch.randn(1, *SHAPE))
    with torch.no_grad():
        for _ in range(3):  # statistics of batch normalization
            model.train()(torch.randn(64, *SHAPE))
    return model.eval()


def about(form: str) -> About:
    """Return the description of the network in an exported file of the given form (`packed`, `onnx`, ...)."""
    return About(
        form=form, title="ResNet-20, random weights", identity="0", weights="last", dataset={"name": "cifar10"},
        shape=SHAPE, classes=10, mean=(0.5,) * 3, std=(0.5,) * 3, threads=1,
    )  # fmt: skip


def write_files(folder: Path, form: str) -> None:
    """Write all files of one form of ResNet-20."""
    images = torch.randn(6, *SHAPE)
    fp32 = folder / "fp32.onnx"
    fp32.write_bytes(to_onnx(trace(network(form), images), about("onnx")))
    quantize_static(fp32, folder / "int8.onnx")
    for name, (w, a) in (WIDTHS | {"W4A4": (4, 4)}).items():
        traced = trace(network(form, w, a), images)
        (folder / f"{name}.qbench").write_bytes(pack_network(traced, about("packed")))
        if w > 1:
            (folder / f"{name}.onnx").write_bytes(to_onnx(traced, about("int8")))


def quantize_static(fp32: Path, int8: Path) -> None:
    """Write ONNX Runtime's own 8-bit quantization of a float network, per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            draws = np.random.default_rng(0)
            self._batches = iter([{"images": draws.standard_normal((8, *SHAPE)).astype(np.float32)} for _ in range(4)])

        def get_next(self) -> Any:
            return next(self._batches, None)

    prepared = fp32.with_name("prepared.onnx")
    quant_pre_process(str(fp32), str(prepared))
    quantization.quantize_static(
        str(prepared), str(int8), Images(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip


def in_onnxruntime(file: Path) -> Callable[[Tensor], object]:
    """Return a function that runs an ONNX file of any origin in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})


def torch_int8(form: str) -> Callable[[Tensor], Tensor]:
    """Return torch's own 8-bit quantization of the float network."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    images = torch.randn(32, *SHAPE)
    prepared = prepare_fx(network(form), get_default_qconfig_mapping(), (images,))
    prepared(images)
    converted: Callable[[Tensor], Tensor] = convert_fx(prepared)
    return converted


def load(name: str, folder: Path, form: str) -> Callable[[Tensor], object]:
    """Return the function of a contender, which is named by a runtime and the network that it runs."""
    runtime, _, what = name.partition(" ")
    if runtime == "onnxruntime":
        return in_onnxruntime(folder / f"{what}.onnx")
    if runtime == "torch":
        return network(form) if what == "fp32" else torch_int8(form)
    return load_exported(folder / f"{what}.{'qbench' if runtime == 'numba' else 'onnx'}", runtime)[0]


def works(names: list[str], folder: Path, form: str, batch: int) -> dict[str, Work]:
    """Return functions, by contender, that run one batch."""
    images = torch.randn(batch, *SHAPE)

    def work(name: str) -> Work:
        function = load(name, folder, form)
        return lambda: function(images)

    return {name: work(name) for name in names}


def peak(name: str, folder: Path, form: str) -> float:
    """Return the peak memory in MiB of a process that runs one image."""
    words = [sys.executable, __file__, "--peak", name, str(folder), form]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(field: str) -> float:
    """Return a memory size of this process in MiB, as Linux reports it: VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@torch.no_grad()
def table(form: str, batch: int, names: Mapping[str, str], rounds: int, peaks: bool) -> str:
    """Return the table for one form of ResNet-20 and one batch size.

    Args:
        names: contenders, with their target ratios. The first two contenders are the baselines fp32 and int8.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, form)
        contenders = works(list(names), folder, form, batch)
        fp32, int8 = list(names)[:2]
        repeat = 20 if batch == 1 else 1
        ratios = {}
        for clock in (time.perf_counter, time.process_time):
            for base in (fp32, int8):
                order = {base: contenders[base]} | contenders
                ratios[base, clock] = interleaved(order, rounds, repeat=repeat, clock=clock)
        rows = []
        for name, target in names.items():
            cells = [
                str(ratios[base, clock][name])
                for base in (fp32, int8)
                for clock in (time.perf_counter, time.process_time)
            ]
            file = folder / f"{name.split()[1]}.{'qbench' if name.startswith('numba') else 'onnx'}"
            size = f"{file.stat().st_size:,}" if not name.startswith("torch") else ""
            peak_memory = f"{peak(name, folder, form):.0f}" if peaks else ""
            milliseconds = f"{1000 * ratios[fp32, time.process_time][name].seconds:.3f}"
            rows.append((name, *cells, target, milliseconds, size, peak_memory))
    head = (
        f"form={form}, batch {batch}", "wall / fp32", "processor / fp32", "wall / int8", "processor / int8", "target",
        "processor ms", "bytes", "peak MiB",
    )  # fmt: skip
    return markdown(head, rows)


@torch.no_grad()
def formats_table(form: str, rounds: int) -> str:
    """Return the processor times of kernels with bit planes and with tables, which compute the same bits."""
    usual = kernel_formats.tables_are_faster
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, form)
        contenders = works(["onnxruntime int8"], folder, form, 1)
        logits: dict[str, object] = {}
        for tables in (True, False):
            kernel_formats.tables_are_faster = lambda tables=tables: tables  # type: ignore[misc]
            for widths in TARGETS:
                torch.manual_seed(0)  # the same image
                work = works([f"numba {widths}"], folder, form, 1)[f"numba {widths}"]
                contenders[f"numba {widths}, {'tables' if tables else 'planes'}"] = work
                assert torch.equal(logits.setdefault(widths, work()), work())  # type: ignore[arg-type]
        kernel_formats.tables_are_faster = usual
        ratios = interleaved(contenders, rounds, repeat=5, clock=time.process_time)
    least = ratios["onnxruntime int8"].least
    rows = [
        (name, f"{1000 * ratio.least:.3f}", f"{ratio.least / least:.2f}", f"{1000 * ratio.seconds:.3f}", str(ratio))
        for name, ratio in ratios.items()
    ]
    head = f"form={form}, batch 1", "least ms", "least / int8", "median ms", "median of ratios to int8"
    return markdown(head, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "FOLDER", "FORM"), help=argparse.SUPPRESS)
    parser.add_argument("--formats", action="store_true", help="compare only bit planes and tables; needs AVX2")
    parser.add_argument("--forms", default="pre,post", help="forms of the network (default: pre,post)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.peak:
        name, folder, form = options.peak
        before = memory("VmRSS")
        works([name], Path(folder), form, 1)[name]()
        print(memory("VmHWM") - before)
        return
    print(f"{machine()}, {versions('onnxruntime', 'openvino', 'numba')}; 1 thread, {options.rounds} rounds\n")
    if options.formats:
        for form in options.forms.split(","):
            print(formats_table(form, options.rounds), end="\n\n", flush=True)
        return
    base = {"onnxruntime fp32": "", "onnxruntime int8": "", "torch fp32": "", "torch int8": ""}
    for form in options.forms.split(","):
        single = base | {f"numba {widths}": target for widths, target in TARGETS.items()}
        print(table(form, 1, single, options.rounds, peaks=True), end="\n\n")
        many = base | {f"openvino {widths}": BATCH_TARGET for widths in ("W2A2", "W4A4")} | {"numba W2A2": ""}
        print(table(form, 64, many, options.rounds, peaks=False), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
