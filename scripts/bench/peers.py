"""Times training steps of peers, which are other quantization packages and implementations as in public code.

    .venv/bin/python scripts/bench/peers.py [--rounds 21] [--channels-last] [--here]

The network is ResNet-20 for 3x32x32 images, with batches of 64. A step consists of zero_grad, forward, cross entropy,
backward, and an update by SGD with momentum, in one thread. The time, and the bytes saved for the backward pass, are
relative to the float network in channels_last.

The packages are installed into a separate environment on first use (peers_venv.py). With --here,
nothing is installed, and only packages that this interpreter can import are measured. torchao is not
included, because its QAT does not quantize nn.Conv2d. The script takes about four minutes, or eight
minutes on first use.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, markdown, versions
from peers_venv import VENV, enter
from plain import NCHW, NHWC, Device, Layout, Make, Work, plain, sgd, training_step
from published import PUBLISHED, dorefa_net
from torch import Tensor, nn

LEARNING_STEPS = 300
"""Number of steps in which Brevitas collects statistics of activations, before it learns their scales."""


def contenders(compiled: bool = True) -> dict[str, Make]:
    """Return the peers that run in this interpreter, by name, and print which peers are skipped.

    A peer is a function `make(device, layout)` that returns a training step. The name of a peer states what it
    quantizes. The setup takes about 25 s for torch.compile (`compiled`) and 10 s for Brevitas. The first import of
    QPyTorch compiles the package, which takes about 30 s.
    """
    makes_by_name = dict(PUBLISHED)
    if compiled and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")))):
        print("skipped: torch.compile: no C++ compiler")
    elif compiled:
        makes_by_name["DoReFa W2A2 as everybody writes it, torch.compile"] = compiled_dorefa
    for package, makes in PACKAGES.items():
        if imports(package):
            makes_by_name |= makes
    return makes_by_name


def imports(package: str) -> bool:
    """Return whether a package can be imported. If it cannot, print the reason."""
    if package == "qtorch":  # qtorch calls ninja by name, so the folder of this interpreter must come first in PATH
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        importlib.import_module(package)
    except Exception as error:  # a package that builds itself on import may raise anything
        print(f"skipped: {package}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return False
    return True


def compiled_dorefa(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of DoReFa under torch.compile, after three untimed steps. Print the time of these three steps."""
    net = dorefa_net()
    work = training_step(net, device, layout=layout)
    net.compile()
    began = time.perf_counter()
    for _ in range(3):
        work()
    print(f"torch.compile: first three steps took {time.perf_counter() - began:.0f} s", flush=True)
    return work


def torch_ao(bits: int) -> Make:
    """Return a function that makes a step of torch.ao's QAT layers.

    The layers use fused moving averages. At 8 bits, weights have one scale per channel.
    """
    ao, qat = (importlib.import_module(name) for name in ("torch.ao.quantization", "torch.ao.nn.qat"))

    def make(device: Device, layout: Layout = NCHW) -> Work:
        if bits == 8:
            config = ao.get_default_qat_qconfig("onednn")
        else:
            fake, observer = ao.FusedMovingAvgObsFakeQuantize, ao.MovingAverageMinMaxObserver
            config = ao.QConfig(
                activation=fake.with_args(observer=observer, quant_min=0, quant_max=2**bits - 1, dtype=torch.quint8),
                weight=fake.with_args(
                    observer=observer,
                    quant_min=-(2 ** (bits - 1)),
                    quant_max=2 ** (bits - 1) - 1,
                    dtype=torch.qint8,
                    qscheme=torch.per_tensor_symmetric,
                ),
            )

        def convolution(layer: nn.Conv2d) -> nn.Module:
            layer.qconfig = config
            quantized: nn.Module = qat.Conv2d.from_float(layer)
            return quantized

        net = plain(convolution, lambda: nn.Sequential(nn.ReLU(), config.activation()))
        return training_step(net, device, layout=layout)

    return make


def brevitas(device: Device, layout: Layout = NCHW) -> Work:
    """Run the first 300 steps of Brevitas with four images each, and return its training step."""
    net = brevitas_net()
    first = training_step(net, device, layout=layout, batch=4)
    for _ in range(LEARNING_STEPS + 10):
        first()
    return training_step(net, device, layout=layout)


def brevitas_cold(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of Brevitas that collects statistics in its first 300 calls."""
    return training_step(brevitas_net(), device, layout=layout)


def brevitas_net() -> nn.Module:
    """Return a network with QuantConv2d and QuantReLU at two bits and with default options."""
    layers: Any = importlib.import_module("brevitas.nn")

    def convolution(layer: nn.Conv2d) -> nn.Module:
        quantized: nn.Module = layers.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=False,
            weight_bit_width=2,
        )
        quantized.load_state_dict(layer.state_dict(), strict=False)
        return quantized

    return plain(convolution, lambda: layers.QuantReLU(bit_width=2))


def qpytorch(device: Device, layout: Layout = NCHW) -> Work:
    """Return a step of QPyTorch at 8 bits.

    It quantizes weights, gradients and momentum, and also activations and their gradients after every ReLU.
    """
    qtorch, quant, optim = (importlib.import_module(name) for name in ("qtorch", "qtorch.quant", "qtorch.optim"))
    narrow, fine = qtorch.FixedPoint(wl=8, fl=4), qtorch.FixedPoint(wl=8, fl=7)

    def activation() -> nn.Module:
        return nn.Sequential(nn.ReLU(), quant.Quantizer(narrow, fine, "stochastic", "stochastic"))

    def rounding() -> Any:
        return quant.quantizer(forward_number=fine, forward_rounding="stochastic")

    net = plain(activation=activation).to(device)
    optimizer = optim.OptimLP(
        sgd(net.parameters()), weight_quant=rounding(), grad_quant=rounding(), momentum_quant=rounding()
    )
    return training_step(net, device, optimizer, layout=layout)


PACKAGES: Mapping[str, Mapping[str, Make]] = {
    "torch.ao.quantization": {"torch.ao QAT W8A8": torch_ao(8), "torch.ao QAT W2A2": torch_ao(2)},
    "brevitas": {"Brevitas W2A2": brevitas},
    "qtorch": {"QPyTorch fixed-point W/A/E stochastic 8 bit": qpytorch},
}


def saved_bytes(work: Work) -> int:
    """Return the number of bytes of the distinct storages that one call saves for the backward pass.

    Tensors that a Function keeps without save_for_backward are not counted.
    """
    kept: dict[int, Tensor] = {}  # the tensors are kept alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--channels-last", action="store_true", help="run the peers in channels_last too, instead of NCHW"
    )
    parser.add_argument("--here", action="store_true", help="install nothing, and measure only what can be imported")
    arguments = parser.parse_args()
    if not arguments.here:
        enter(VENV)
    torch.set_num_threads(1)
    print(f"{machine()}, {versions('brevitas', 'qtorch')}, {torch.get_num_threads()} thread", flush=True)
    layout = NHWC if arguments.channels_last else NCHW
    works = {
        "fp32 channels_last": training_step(plain(), "cpu", layout=NHWC),
        "fp32 NCHW": training_step(plain(), "cpu"),
    }
    makes = contenders()
    if "Brevitas W2A2" in makes:
        makes["Brevitas W2A2, its first 300 steps"] = brevitas_cold
    works |= {name: make("cpu", layout) for name, make in makes.items()}
    steps = interleaved(works, rounds=arguments.rounds)
    sizes = {name: saved_bytes(work) for name, work in works.items()}
    base = sizes["fp32 channels_last"]
    rows = [
        [name, str(ratio), f"{1000 * ratio.seconds:.0f}", f"{sizes[name] / base:.2f}"] for name, ratio in steps.items()
    ]
    where = "channels_last" if arguments.channels_last else "NCHW"
    print(f"\nStep over fp32 channels_last, {arguments.rounds} rounds; peers in {where}\n")
    print(markdown(["", "median (quartiles)", "ms", "bytes saved"], rows))


if __name__ == "__main__":
    main()
