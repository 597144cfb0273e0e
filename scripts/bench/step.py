"""Times a training step of ResNet-20 (batch 64, 3x32x32, SGD) under every method against float, and the peers beside.

    .venv/bin/python scripts/bench/step.py [--threads 1] [--rounds 21] [--device cpu] [NAME ...]

Ratios are of one process, interleaved: the median of the rounds and its quartiles. fp32 channels_last is the baseline;
its column of ratios to stock fp32 (NCHW, torch.optim.SGD as it comes) stands beside.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Work, interleaved, machine, markdown
from torch import Tensor, nn
from torch.nn import functional as F

from qbench import registry
from qbench.config import Optim
from qbench.methods import dorefa
from qbench.models import resnet
from qbench.quant.layers import install
from qbench.quant.method import Method, Probe
from qbench.train import optim

BATCH, SHAPE, CLASSES, EPOCHS = 64, (3, 32, 32), 10, 30
SGD = Optim(name="sgd", lr=1e-3, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A method at some widths; `epoch` is the one in which it is timed, for methods that change with time."""

    label: str
    method: str
    options: dict[str, Any]
    bar: float | None = 1.5
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
    Case("uniform w8a8", "uniform", {}),
    Case("inq w5, all frozen", "inq", {}, epoch=EPOCHS - 1),
    Case("slq w5, all frozen", "slq", {"w": 5}, epoch=EPOCHS - 1),
    Case("mlq w2, all frozen", "mlq", {"w": 2}, epoch=EPOCHS - 1),
    Case("qd w4, without its teacher", "qd", {}),
    Case("dq w4, without its teacher", "dq", {}),
    Case("gupta w16a16g16 nearest", "gupta", {"rounding": "nearest"}),
    Case("gupta w16a16g16 stochastic", "gupta", {}),
)


def network(norm: str = "affine") -> nn.Module:
    """Return a float ResNet-20, the same each time."""
    torch.manual_seed(0)
    return resnet.build(SHAPE, CLASSES, norm=norm).train()


def data(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch, channels_last."""
    torch.manual_seed(1)
    images, labels = torch.randn(BATCH, *SHAPE), torch.randint(CLASSES, (BATCH,))
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, method: Method | None = None
) -> Work:
    """Return one training step."""

    def work() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if method is not None and method.step is not None:
            method.step(model, optimizer)
        else:
            optimizer.step()

    return work


def fp32(device: torch.device) -> Work:
    """Return the baseline: the same network, loop and optimizer, without quantizers."""
    model = network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return step(model, *data(device), optim.build(model, SGD))


def stock(device: torch.device) -> Work:
    """Return fp32 as everybody has it."""
    model, (images, labels) = network().to(device), data(device)
    return step(model, images.contiguous(), labels, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))


def quantized(case: Case, device: torch.device) -> Work:
    """Return a step through the project's layers."""
    method = built(case)
    model = installed(method).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = data(device)
    probe = Probe([(images, labels)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    if method.on_epoch:
        for epoch in range(case.epoch + 1):
            method.on_epoch(model, epoch, EPOCHS, probe)
    return step(model.train(), images, labels, optim.build(model, SGD), method)


def built(case: Case) -> Method:
    """Return the method of a case."""
    method: Method = registry.find("method", case.method)(**case.options)
    return method


def installed(method: Method) -> nn.Module:
    """Return a ResNet-20 with a method in it."""
    return install(method, network(method.requires.norm or "affine"), example=torch.zeros(1, *SHAPE))


class PlainConv(nn.Conv2d):
    """A convolution in a net of one's own that calls DoReFa's public functions."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of quantized input and weights."""
        x, w = dorefa.quantize_activation(input, 2), dorefa.quantize_weight(self.weight, 2)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def public_functions(device: torch.device) -> Work:
    """Return a step of a plain network that calls the public functions, its ReLUs taken out."""
    model = network()
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Conv2d) and name != "conv1":
            module.__class__ = PlainConv
        elif isinstance(module, nn.ReLU) and parent:
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return step(model, *data(device), torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose label holds one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    made: dict[str, Callable[[], Work]] = {
        "fp32 channels_last": lambda: fp32(device),
        "fp32 stock": lambda: stock(device),
        "dorefa w2a2, public functions in a plain net": lambda: public_functions(device),
        **{case.label: lambda case=case: quantized(case, device) for case in CASES},  # type: ignore[misc]
    }
    bars = {"dorefa w2a2, public functions in a plain net": 1.3, **{case.label: case.bar for case in CASES}}
    words = [*asked.names, "fp32"] if asked.names else [""]
    wanted = {name: make for name, make in made.items() if any(word in name for word in words)}
    found = interleaved({name: make() for name, make in wanted.items()}, asked.rounds)
    base = found["fp32 stock"].median
    rows = [
        (name, str(ratio), f"{ratio.median / base:.2f}", f"{bars.get(name) or ''}", f"{1000 * ratio.seconds:.0f} ms")
        for name, ratio in found.items()
    ]
    print(f"{machine()}, {asked.threads} thread(s), {asked.device}, {asked.rounds} rounds\n")
    print(markdown(("step of ResNet-20, batch 64", "of fp32 channels_last", "of fp32 stock", "bar", "median"), rows))


if __name__ == "__main__":
    sys.exit(main())
