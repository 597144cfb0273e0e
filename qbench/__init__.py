"""Compares methods for low-precision CNNs under one protocol.

    import qbench

    result = qbench.run("method=dorefa", "bits=w2a2")
    print(result.top1)

docs/reference/python.md describes the functions. Each function is imported on first use, so that `import qbench` is
fast and does not import torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbench.api.networks import install
    from qbench.api.results import Runs, Tables, compare, load, load_finished_run, load_model
    from qbench.api.training import run, sweep
    from qbench.errors import QbenchError
    from qbench.quant.fold import fold_quantized_weights as fold
    from qbench.runs.reader import RunRecord
    from qbench.runs.result import Result
else:
    HOMES = {
        "QbenchError": "qbench.errors",
        "Result": "qbench.runs.result",
        "RunRecord": "qbench.runs.reader",
        "Runs": "qbench.api.results",
        "Tables": "qbench.api.results",
        "compare": "qbench.api.results",
        "fold": "qbench.quant.fold:fold_quantized_weights",
        "install": "qbench.api.networks",
        "load": "qbench.api.results",
        "load_finished_run": "qbench.api.results",
        "load_model": "qbench.api.results",
        "run": "qbench.api.training",
        "sweep": "qbench.api.training",
    }

    def __getattr__(name):
        if name not in HOMES:
            raise AttributeError(f"module 'qbench' has no attribute {name!r}")
        from importlib import import_module

        module, _, attribute = HOMES[name].partition(":")
        return getattr(import_module(module), attribute or name)

    def __dir__():
        return [*globals(), *HOMES]


__all__ = [
    "QbenchError",
    "Result",
    "RunRecord",
    "Runs",
    "Tables",
    "compare",
    "fold",
    "install",
    "load",
    "load_finished_run",
    "load_model",
    "run",
    "sweep",
]
