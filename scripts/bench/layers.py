"""Times a training step with layers other than those of ResNet-20: small images, 1x1 and depthwise convolutions.

    .venv/bin/python scripts/bench/layers.py [--rounds 21]

All networks are quantized by DoReFa W2A2, and trained with batches of 64 images on one thread. The table states the
median and the quartiles of the ratios to the float step over the rounds.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measure import interleaved, machine, markdown
from plain import CLASSES, NHWC, Device, Work, training_step
from step import SGD, remembering, without_extra
from torch import nn

from qbench.experiment.device import tune_malloc
from qbench.methods import dorefa
from qbench.models import resnet
from qbench.quant import elementwise
from qbench.quant.install import install
from qbench.training import optimizer as optim

Shape = tuple[int, int, int]
WIDTH, BLOCKS = 64, 4


def stack(kernel: int, groups: int, shape: Shape) -> nn.Module:
    """Return a float 3x3 convolution, then quantized convolutions with the same number of channels, then a classifier.

    Batch normalization and ReLU follow each convolution.
    """
    convolutions = [nn.Conv2d(shape[0], WIDTH, 3, padding=1, bias=False)]
    convolutions += [nn.Conv2d(WIDTH, WIDTH, kernel, padding="same", groups=groups, bias=False) for _ in range(BLOCKS)]
    layers = [layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))


NETWORKS: dict[str, tuple[Callable[[Shape], nn.Module], Shape, str]] = {
    "ResNet-8, 1x8x8": (lambda shape: resnet.build(shape, CLASSES, depth=8, width=16), (1, 8, 8), "1.35"),
    "four 1x1 convolutions, 64x32x32": (partial(stack, 1, 1), (3, 32, 32), "1.15"),
    "four depthwise convolutions, 64x32x32": (partial(stack, 3, WIDTH), (3, 32, 32), "1.15"),
}
"""Maps a description to a function that makes the network, the shape of the images, and the target with the extra."""


def step(device: Device, make: Callable[[Shape], nn.Module], shape: Shape, *, quantized: bool) -> Work:
    """Return a training step of a network on images of the given shape."""
    torch.manual_seed(0)
    net = make(shape)
    if quantized:
        net = install(dorefa.build(w=2, a=2), net, example=torch.zeros(1, *shape))
    return training_step(net, device, optim.build_optimizer(net, SGD), layout=NHWC, shape=shape)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    if not elementwise.available():
        parser.error("this script needs the extra: pip install -e '.[fast]'")
    torch.set_num_threads(1)
    tune_malloc()
    elementwise.COMPILE_AFTER = 0
    rows = []
    for name, (make, shape, target) in NETWORKS.items():
        fast = partial(step, make=make, shape=shape, quantized=True)
        makes: dict[str, Callable[[Device], Work]] = {
            "float": partial(step, make=make, shape=shape, quantized=False),
            "plain": without_extra(fast),
            "fast": fast,
            "keep": remembering("keep", fast),
        }
        ratios = interleaved({key: made("cpu") for key, made in makes.items()}, options.rounds)
        found = [str(ratios[key]) for key in ("plain", "fast", "keep")]
        rows.append((name, *found, target, f"{1000 * ratios['float'].seconds:.1f} ms"))
    print(f"{machine()}, 1 thread, {options.rounds} rounds\n")
    head = ("network", "without the extra", "with the extra `fast`", "fast, keep", "target", "float step")
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
