"""torch's compiler is imported only by what compiles."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import long_tier

HEAD = "import sys, torch\n"
IS_DELAYED = "type(sys.modules['torch._dynamo']).__name__ == '_Placeholder'"


def executed(text: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + text], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_imports_neither_the_compiler_nor_sympy(tmp_path: Path) -> None:
    executed(
        "import qbench\n"
        "qbench.run('experiment=smoke', 'method=dorefa', 'epochs=1', 'init=scratch', out='.')\n"
        f"assert {IS_DELAYED}, 'the compiler was imported'\n"
        "assert not {'sympy', 'torch._inductor', 'torch.onnx'} & set(sys.modules)\n",
        tmp_path,
    )


@pytest.mark.full
def test_compilation_works_after_a_delayed_import(tmp_path: Path) -> None:
    executed(
        "import inspect\n"
        "from qbench.system.lazy_compiler import delay_import_of_compiler\n"
        "delay_import_of_compiler()\n"
        "weight = torch.nn.Parameter(torch.ones(3))\n"
        "optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "def step():\n"
        "    optimizer.zero_grad()\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
        "step()\n"
        "inspect.getmodule(torch.nn.Linear.forward)  # looks at all modules\n"
        f"assert {IS_DELAYED}\n"
        "graphs = []\n"
        "backend = lambda graph, _: graphs.append(graph) or graph.forward\n"
        "function = torch.compile(lambda x: x.sin() + 1, backend=backend)\n"
        "assert torch.equal(function(weight), weight.sin() + 1)\n"
        "assert len(graphs) == 1\n"
        f"assert not {IS_DELAYED}\n"
        "import torch._dynamo.config\n"
        "assert torch._dynamo is sys.modules['torch._dynamo']\n"
        "step()\n"
        "assert torch.allclose(weight, torch.tensor(0.8))\n",
        tmp_path,
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import torch._dynamo.config as it",
        *(long_tier(text) for text in ("from torch._dynamo import config as it", "it = torch._dynamo.config")),
    ],
)
def test_every_form_of_import_gives_the_compiler(tmp_path: Path, statement: str) -> None:
    executed(
        "from qbench.system.lazy_compiler import delay_import_of_compiler\n"
        "delay_import_of_compiler()\n"
        f"{statement}\n"
        "assert it.__name__ == 'torch._dynamo.config'\n"
        f"assert not {IS_DELAYED}\n"
        "delay_import_of_compiler()\n"
        f"assert not {IS_DELAYED}\n",
        tmp_path,
    )
