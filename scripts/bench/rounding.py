"""Times stochastic rounding of 2^20 numbers, relative to floor(x n + rand_like(x)).

.venv/bin/python scripts/bench/rounding.py [--threads 1] [--rounds 41]
"""

import argparse

import torch
from measure import interleaved, machine, markdown

from qbench.experiment.device import tune_malloc
from qbench.methods import dorefa, gupta
from qbench.quant import fused_kernels

COUNT, LEVELS = 2**20, 255


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_malloc()
    x = torch.rand(COUNT)
    gradient = torch.randn(64, COUNT // 64)
    works = {
        "floor(x n + rand_like(x))": lambda: torch.floor(x * LEVELS + torch.rand_like(x)),
        "stochastic_round(x n)": lambda: fused_kernels.stochastic_round(x * LEVELS),
        "uniform(x), instead of rand_like(x)": lambda: fused_kernels.uniform(x),
        "gupta.to_fixed, stochastic, <2,14>": lambda: gupta.to_fixed(x, 2, 14, "stochastic"),
        "dorefa.quantize_gradient, 6 bits": lambda: dorefa.quantize_gradient(gradient, 6),
    }
    ratios = interleaved(works, options.rounds)
    rows = [
        (name, str(ratio), "0.6" if name.startswith("stochastic_round") else "", f"{1000 * ratio.seconds:.2f} ms")
        for name, ratio in ratios.items()
    ]
    print(f"{machine()}, {options.threads} thread(s), {options.rounds} rounds\n")
    print(markdown((f"{COUNT:,} numbers", "time / first row", "target", "median"), rows))


if __name__ == "__main__":
    main()
