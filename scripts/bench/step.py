"""Times a training step of ResNet-20 with every method and the peers, relative to float.

    .venv/bin/python scripts/bench/step.py [--threads 1] [--rounds 21] [--device cpu] [--no-peers]
        [NAME ...]

Methods are timed with torch's operations alone, and with the extra `fast`, which compiles their quantizers.

The network is ResNet-20 for 3x32x32 images, with batches of 64 and SGD. All steps are timed in turn in one process. The
table states the median and the quartiles of the ratios over the rounds. The baseline is fp32 in channels_last. A second
column states the ratio to stock fp32 (NCHW, torch's SGD with default options), computed from the medians. The peers
(peers.py) run in NCHW, their default memory format. On first use, the peers' packages are installed into a separate
environment.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import interleaved, machine, markdown, seconds, versions
from peers import contenders
from peers_venv import VENV, enter
from plain import NHWC, SHAPE, Act, Conv, Device, Work, data, plain, training_step
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config import registry
from qbench.config.schema import Optim
from qbench.experiment.device import COMPILERS, tune_malloc, with_autocast
from qbench.methods import dorefa
from qbench.quant import elementwise, ops
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.probe import Probe
from qbench.training import optimizer as optim

EPOCHS = 30
SGD = Optim(name="sgd", lr=0.01, momentum=0.9)
PUBLIC = "dorefa w2a2, public functions in a plain net"


@dataclass(frozen=True)
class Case:
    """A method to be timed, with its options and widths.

    `epoch` is the epoch in which an incremental method is timed. `target` is the largest acceptable ratio of the step
    time to the float step time.
    """

    label: str
    method: str
    options: dict[str, Any]
    target: float = 1.5
    epoch: int = 0


CASES = (
    Case("dorefa w2a2", "dorefa", {"w": 2, "a": 2}, 1.15),
    Case("dorefa w2a2g6", "dorefa", {"w": 2, "a": 2, "g": 6}, 1.5),
    Case("bwn w1", "bwn", {}),
    Case("twn w2", "twn", {}),
    Case("ttq w2", "ttq", {}),
    Case("xnor w1a1", "xnor", {}),
    Case("hwgq w1a2", "hwgq", {}),
    Case("hwgq w1a2 log_tailed", "hwgq", {"backward": "log_tailed"}),
    Case("pact w2a2", "pact", {}),
    Case("lsq w2a2", "lsq", {}),
    Case("apot w2a2", "apot", {"w": 2, "a": 2}),
    Case("uniform w8a8", "uniform", {}),
    Case("inq w5, all frozen", "inq", {}, epoch=EPOCHS - 1),
    Case("slq w5, all frozen", "slq", {"w": 5}, epoch=EPOCHS - 1),
    Case("mlq w2, all frozen", "mlq", {"w": 2}, epoch=EPOCHS - 1),
    Case("qd w4, without its teacher", "qd", {}),
    Case("dq w4, without its teacher", "dq", {}),
    Case("gupta w16a16g16 nearest", "gupta", {"rounding": "nearest"}),
    Case("gupta w16a16g16 stochastic", "gupta", {}),
)


TARGETS = {
    "dorefa w2a2, runtime.activation_memory=keep": "1.09",
    "dorefa w2a2, runtime.activation_memory=keep, extra fast": "1.06",
    **{f"{case.label}, extra fast": "1.2" for case in CASES},
}
"""Targets of variants of cases."""


def built(case: Case) -> Method:
    """Return the method of a case."""
    method: Method = registry.find("method", case.method)(**case.options)
    return method


def installed(method: Method) -> nn.Module:
    """Return a ResNet-20 in channels_last that is quantized by a method."""
    model = install(method, plain(norm=method.requires.norm or "affine"), example=torch.zeros(1, *SHAPE))
    return model.to(memory_format=NHWC)  # type: ignore[call-overload,no-any-return]


def fp32(device: Device) -> Work:
    """Return a step of the baseline, which has the same network, loop and optimizer as all cases but no quantizers."""
    net = plain().to(device)
    return training_step(net, device, optim.build_optimizer(net, SGD), layout=NHWC)


def quantized(case: Case, device: Device) -> Work:
    """Return a step of a network with the project's quantized layers."""
    method = built(case)
    model = installed(method).to(device)
    probe = Probe([data(device, NHWC)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    for epoch in range(case.epoch + 1 if method.on_epoch else 0):
        assert method.on_epoch is not None
        method.on_epoch(model, epoch, EPOCHS, probe)
    optimizer = optim.build_optimizer(model, SGD)
    update = partial(method.step, model, optimizer) if method.step else None
    return training_step(model, device, optimizer, layout=NHWC, update=update)


def public_functions(device: Device) -> Work:
    """Return a step of a network of plain torch layers that calls DoReFa's public functions."""
    net = plain(
        lambda layer: Conv(layer, partial(dorefa.quantize_weight, bits=2)),
        lambda: Act(partial(dorefa.quantize_activation, bits=2)),
    ).to(device)
    return training_step(net, device, optim.build_optimizer(net, SGD), layout=NHWC)


def compiled(make: Callable[[], nn.Module]) -> Callable[[Device], Work]:
    """Return a function that makes a step of a network under torch.compile, after a first untimed step."""

    def make_step(device: Device) -> Work:
        net = make().to(device)
        optimizer = optim.build_optimizer(net, SGD)
        net.compile()
        work = training_step(net, device, optimizer, layout=NHWC)
        print(f"torch.compile: {seconds(work):.0f} s for the first step", file=sys.stderr, flush=True)
        return work

    return make_step


def half_precision(make: Callable[[], nn.Module]) -> Callable[[Device], Work]:
    """Return a function that makes a step of a network with runtime.precision=bf16."""

    def make_step(device: Device) -> Work:
        net = make().to(device)
        optimizer = optim.build_optimizer(net, SGD)
        net.forward = with_autocast(net.forward, torch.device(device), torch.bfloat16)
        return training_step(net, device, optimizer, layout=NHWC)

    return make_step


def remembering(mode: str, make: Callable[[Device], Work]) -> Callable[[Device], Work]:
    """Return a function that makes a step with a value of runtime.activation_memory."""

    def make_step(device: Device) -> Work:
        work = make(device)

        def step() -> Tensor:
            with ops.activation_memory(mode):
                return work()

        return step

    return make_step


def without_extra(make: Callable[[Device], Work]) -> Callable[[Device], Work]:
    """Return a function that makes a step that does not use the extra `fast`."""

    def make_step(device: Device) -> Work:
        work = make(device)

        def step() -> Tensor:
            with elementwise.torch_operations():
                return work()

        return step

    return make_step


def dorefa_w2a2() -> nn.Module:
    """Return a network with DoReFa at 2 bits for weights and activations."""
    return installed(dorefa.build(w=2, a=2))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="time only contenders whose name contains NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    if not options.no_peers:
        enter(VENV)
    torch.set_num_threads(options.threads)
    tune_malloc()
    makes: dict[str, Callable[[Device], Work]] = {
        "fp32 channels_last": fp32,
        "fp32 stock": lambda device: training_step(plain(), device),
        PUBLIC: public_functions,
        **{case.label: partial(quantized, case) for case in CASES},
    }
    for name, net in (("fp32", plain), ("dorefa w2a2", dorefa_w2a2)):
        if any(map(shutil.which, COMPILERS)):
            makes[f"{name}, runtime.compile=true"] = compiled(net)
        makes[f"{name}, runtime.precision=bf16"] = half_precision(net)
    for mode in ("keep", "codes"):
        for name in ("dorefa w2a2", "dorefa w2a2, runtime.precision=bf16"):
            makes[f"{name}, runtime.activation_memory={mode}"] = remembering(mode, makes[name])
    plain_names = {"fp32 channels_last", "fp32 stock", PUBLIC}
    quantized_names = [name for name in makes if not name.startswith("fp32") and "compile" not in name]
    if elementwise.available():
        makes |= {f"{name}, extra fast": makes[name] for name in quantized_names if name not in plain_names}
    makes |= {name: without_extra(makes[name]) for name in quantized_names}
    elementwise.COMPILE_AFTER = 0
    if not options.no_peers:
        makes |= {f"peer: {name}": make for name, make in contenders().items()}
    words = [*options.names, "fp32"] if options.names else [""]
    chosen = {name: make for name, make in makes.items() if any(word in name for word in words)}
    measured = {name: make for name, make in chosen.items() if options.threads == 1 or "runtime" not in name}
    works = {name: make(options.device) for name, make in measured.items()}
    ratios = interleaved(works, options.rounds)
    targets = {PUBLIC: "1.3 / 1.05", **{case.label: f"{case.target}" for case in CASES}, "dorefa w2a2": "1.15 / 0.92"}
    targets |= TARGETS
    if options.threads > 1:
        targets = {"dorefa w2a2": "1.2"}
    base = ratios["fp32 stock"].median
    rows = [
        (name, str(ratio), f"{ratio.median / base:.2f}", targets.get(name, ""), f"{1000 * ratio.seconds:.0f} ms")
        for name, ratio in ratios.items()
    ]
    where = ", ".join(filter(None, (machine(), versions("brevitas", "qtorch"), f"{options.threads} thread(s)")))
    print(f"{where}, {options.device}, {options.rounds} rounds\n")
    print(
        markdown(
            ("step of ResNet-20, batch 64", "time / fp32 channels_last", "time / fp32 stock", "target", "median"), rows
        )
    )


if __name__ == "__main__":
    main()
