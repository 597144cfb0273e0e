"""Measures whether N small networks (N seeds) train faster when they are joined into one network.

    .venv/bin/python scripts/bench/replicas.py [-n 8] [--rounds 21]

The step time of the joined network is compared with the total step time of the N separate networks. Each network keeps
its own parameters, quantizers, optimizer and batch norm, so every method can be used. Convolutions (grouped), norms and
sums of all networks run together on activations of shape (B, N C, H, W), for B images and C channels per network. One
thread is used. qbench does not train networks in this way, for the reason that docs/performance.md states.
"""

import argparse
import copy

import torch
from measure import Work, interleaved, machine, markdown
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods import dorefa
from qbench.methods import float as float_method
from qbench.models.residual_blocks import PadShortcut
from qbench.models.resnet import build
from qbench.quant.install import install
from qbench.quant.layers import QConv2d, QLinear
from qbench.quant.method import Method
from qbench.quant.quantizer import IdentityQuantizer

BATCH = 64
CASES = [((1, 8, 8), 8), ((1, 8, 8), 16), ((3, 32, 32), 8)]


class Convolutions(nn.Module):
    """N convolutions as one grouped convolution. Each convolution quantizes its own weights and input channels."""

    def __init__(self, layers: list[QConv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all networks, of shape (B, N O, H, W) for O output channels per network."""
        layers: list[QConv2d] = list(self.layers)  # type: ignore[arg-type]
        weights = torch.cat([layer.weight_q(layer.weight) for layer in layers])
        if not isinstance(layers[0].input_q, IdentityQuantizer):
            parts = zip(layers, x.chunk(len(layers), 1), strict=True)
            x = torch.cat([layer.input_q(part) for layer, part in parts], 1)
        return F.conv2d(x, weights, None, layers[0].stride, layers[0].padding, groups=len(layers))


class Norms(nn.Module):
    """N batch normalizations over N C channels."""

    def __init__(self, norms: list[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x. Running statistics are not updated, because a training step does not need them."""
        weight, bias = (torch.cat([getattr(norm, key) for norm in self.norms]) for key in ("weight", "bias"))
        return F.batch_norm(x, None, None, weight, bias, training=True)


class Linears(nn.Module):
    """N linear layers with inputs (B, N C) and outputs (N, B, K), for K classes."""

    def __init__(self, layers: list[QLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of all networks."""
        parts = zip(self.layers, x.chunk(len(self.layers), 1), strict=True)
        return torch.stack([layer(part) for layer, part in parts])


class Pads(nn.Module):
    """N shortcuts without parameters, each with its own channels."""

    def __init__(self, pads: list[PadShortcut]) -> None:
        super().__init__()
        self.pads = nn.ModuleList(pads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded channels of all networks, concatenated."""
        return torch.cat([pad(part) for pad, part in zip(self.pads, x.chunk(len(self.pads), 1), strict=True)], 1)


JOINED = {QConv2d: Convolutions, nn.BatchNorm2d: Norms, QLinear: Linears, PadShortcut: Pads}


def joined(networks: list[nn.Module]) -> nn.Module:
    """Return one network that joins the layers of all networks."""
    whole = copy.deepcopy(networks[0])
    for name, module in networks[0].named_modules():
        if kind := JOINED.get(type(module)):
            whole.set_submodule(name, kind([network.get_submodule(name) for network in networks]))
    return whole.train()


def network(method: Method, shape: tuple[int, int, int], width: int, seed: int) -> nn.Module:
    """Return a ResNet-8 that is quantized by a method."""
    torch.manual_seed(seed)
    model = install(method, build(shape, 10, depth=8, width=width), example=torch.zeros(1, *shape))
    return model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload,no-any-return]


def steps(method: Method, shape: tuple[int, int, int], width: int, n: int) -> tuple[Work, Work, Work]:
    """Return a step of N separate networks, a step of the joined network, and a function that compares losses."""
    networks = [network(method, shape, width, seed) for seed in range(n)]
    others = [network(method, shape, width, seed) for seed in range(n)]
    whole = joined(others)
    images = [torch.randn(BATCH, *shape).to(memory_format=torch.channels_last) for _ in range(n)]
    labels = torch.randint(10, (n, BATCH))
    alone = [torch.optim.Adam(one.parameters(), fused=True) for one in networks]
    together = torch.optim.Adam([p for one in others for p in one.parameters()], fused=True)

    def one_by_one() -> list[float]:
        losses = []
        for model, optimizer, x, y in zip(networks, alone, images, labels, strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def all_together() -> list[float]:
        logits = whole(torch.cat(images, 1))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(n, -1).mean(1)
        together.zero_grad()
        torch.autograd.backward(losses.sum())
        together.step()
        return losses.tolist()

    return one_by_one, all_together, lambda: max(abs(a - b) for a, b in zip(one_by_one(), all_together(), strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape, width in CASES:
        for name, method in (("float", float_method.build()), ("DoReFa W2A2", dorefa.build(w=2, a=2))):
            alone, together, largest_difference = steps(method, shape, width, options.n)
            difference = largest_difference()
            ratio = interleaved({"together": together, "one by one": alone}, options.rounds)["one by one"]
            image = "x".join(map(str, shape))
            rows.append((f"ResNet-8 of width {width}, {image}", name, str(ratio), f"{difference:.0e}"))
    print(f"{machine()}, 1 thread, {options.n} networks, {options.rounds} rounds\n")
    columns = ("network", "method", "time one by one / together", "difference of first losses")
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
