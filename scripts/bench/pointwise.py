"""Times three forms of 1x1 convolution in small batches, forward and backward, in channels_last.

    .venv/bin/python scripts/bench/pointwise.py [--batch 8] [--threads 1] [--rounds 21]

With one thread and fewer than 16 images, torch computes 1x1 convolutions with stride 1 by its own code
(`_slow_conv2d`). It computes other convolutions by oneDNN. The script compares this code with oneDNN and with a linear
layer over the channels. A dilation of 2 has no effect on a 1x1 kernel, but makes torch use oneDNN. The layers are
pointwise convolutions of MobileNetV2 for 32x32 images.
"""

import argparse
import time
from collections.abc import Callable

import torch
from measure import interleaved, machine, markdown
from torch import Tensor
from torch.nn import functional as F

NHWC = torch.channels_last
LAYERS = ((32, 16, 32), (16, 96, 32), (96, 24, 16), (144, 32, 8), (320, 1280, 4))
"""Input channels, output channels, and height and width of the images."""


def as_linear(x: Tensor, w: Tensor) -> Tensor:
    """Return a 1x1 convolution of x (N, C, H, W) in channels_last as a matrix product over the channels."""
    return F.linear(x.permute(0, 2, 3, 1), w.flatten(1)).permute(0, 3, 1, 2)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch's choice": F.conv2d,
    "oneDNN": lambda x, w: F.conv2d(x, w, dilation=2),
    "linear": as_linear,
}


def step(form: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return a function that computes the output and both gradients."""

    def work() -> None:
        x.grad = w.grad = None
        torch.autograd.backward(form(x, w), grad)

    return work


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for inputs, outputs, size in LAYERS:
        x = torch.randn(options.batch, inputs, size, size).to(memory_format=NHWC).requires_grad_()
        w = torch.randn(outputs, inputs, 1, 1).requires_grad_()
        grad = torch.randn(options.batch, outputs, size, size).to(memory_format=NHWC)
        works = {name: step(form, x, w, grad) for name, form in FORMS.items()}
        ratios = interleaved(works, options.rounds, clock=time.process_time)
        first, *others = ratios.values()
        rows.append((f"{inputs} to {outputs}, {size}x{size}", f"{1000 * first.seconds:.2f} ms", *map(str, others)))
    where = f"{machine()}, {torch.backends.cpu.get_cpu_capability()}, threads: {options.threads}"
    print(f"{where}; batches of {options.batch}, processor time\n")
    print(markdown(("channels, image", *FORMS), rows))


if __name__ == "__main__":
    main()
