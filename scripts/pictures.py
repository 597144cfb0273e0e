#!/usr/bin/env python3
"""Draws docs/pictures: the quantizers of each method, a poster of all methods, and the README's comparison.

    .venv/bin/python scripts/pictures.py [METHOD ...]

scripts/test makes the environment .venv.
"""

import sys
from pathlib import Path

from qbench.config import groups

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qbench.cli.compare import run_compare  # noqa: E402
from qbench.cli.plot import draw, illustrative_bits  # noqa: E402
from qbench.config import compose  # noqa: E402
from qbench.experiment.builders import build_method  # noqa: E402


def main() -> None:
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:] or groups.option_names("method"):
        (config,) = compose.configurations([f"method={name}"])
        bits = illustrative_bits(build_method(config.method, config.activation, config.bits.resolved()))
        print(draw([f"method={name}", f"bits={bits}", "--out", str(folder / f"{name}.png")]))
    if not sys.argv[1:]:
        print(draw(["--poster", "--out", str(folder / "poster.png")]))
        record = ROOT / "docs" / "records" / "unified.json"
        run_compare([str(record), "model.width=16", "--plot", str(folder / "bits.png")])


if __name__ == "__main__":
    main()
