"""Imports run one way; the arrows of the design."""

import ast
from pathlib import Path

from conftest import ROOT

# A file or folder of the package, and all of ours that it may import. `errors` may be imported by anyone but quant and
# methods, which raise only what tensors and networks give reason for.
ARROWS = {
    "errors": set(),
    "values": {"errors"},
    "record.files": {"errors"},
    "config": {"errors", "record.files", "values"},
    "filling": {"config", "errors", "values"},
    "registry": {"config", "errors"},
    "quant.passes": set(),
    "quant.ops": {"quant.passes"},
    "quant.method": set(),
    "quant.policy": {"quant.method"},
    "quant.layers": {"quant.method", "quant.ops", "quant.policy"},
    "quant.masks": set(),
    "quant.verify": {"quant.method", "quant.layers"},
    "quant.kmeans": set(),
    "quant.product": {"quant.kmeans"},
    "quant.combine": {"quant.method"},
    "methods": {
        *("methods", "quant.method", "quant.ops", "quant.passes", "quant.layers", "quant.masks"),
        *("quant.kmeans", "quant.product"),
    },
    "deviations": {"deviations", "methods", "quant.method", "quant.ops", "quant.layers", "quant.masks"},
    "vision": set(),
    "models": {"models", "vision"},
    "data": {"data", "errors", "vision"},
    "train": {"train", "config", "errors", "quant.method", "quant.layers"},
    "record": {"record", "config", "errors", "quant.layers", "quant.method"},
    "cost": {"cost", "quant.method", "quant.layers", "quant.policy"},
    "report": {"filling", "report", "record", "config", "errors"},
    "report.standin": {"quant"},
    "report.readings": set(),
    "report.curves": {"quant", "report.readings", "report.standin"},
    "report.panels": {"report.readings"},
    "report.pages": {"quant.method", "report.curves", "report.panels", "report.readings"},
    "report.draw": {"report", "record", "config", "errors"},
    "start": {"config", "errors", "record", "train"},
    "assembly": {
        *("filling", "config", "deviations", "errors", "registry", "quant", "cost", "data", "record", "start", "train"),
    },
    "observe": {"quant.layers", "quant.masks", "quant.method", "quant.verify"},
    "sentinels": {"errors", "observe", "quant.layers"},
    "lookout": {"errors", "observe", "quant.layers", "record", "sentinels", "train"},
    "session": {"config", "errors", "lookout", "record", "train"},
    "experiment": {"assembly", "session", "config", "errors", "quant", "cost", "data", "record", "start", "train"},
    "check": {"check", "config", "models", "quant", "train"},
    "tuning": {"config", "errors", "registry"},
    "understand": {
        *("understand", "assembly", "compose", "config", "cost", "data", "errors", "experiment", "methods", "quant"),
        *("record", "registry", "report", "start", "train", "values"),
    },
    "compose": {"filling", "config", "errors", "record.files", "registry", "tuning", "values"},
    "interrupt": set(),
    "sweep": {"filling", "config", "errors", "interrupt", "record", "report"},
    "plan": {"assembly", "config", "cost", "data", "quant", "record", "report", "train"},
    "manual": set(),
    "cli": {"config", "errors", "interrupt", "manual", "values"},
    "__main__": {"cli"},
}
INSIDE_FUNCTIONS = {
    "cli": {
        *("assembly", "check", "compose", "experiment", "plan", "quant.method", "record"),
        *("registry", "report", "session", "sweep", "understand"),
    },
    "manual": {"compose"},
    "report": {"compose"},
    "report.draw": {"assembly", "compose", "quant.method", "registry"},
    "sweep": {"filling", "assembly", "compose", "experiment", "quant.method", "session"},
}
HYDRA = {"compose"}


def _ours(name: str) -> str:
    return name.removeprefix("qbench").removeprefix(".")


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module if node.module != "qbench" else f"qbench.{a.name}" for a in node.names}
    return found


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "qbench").with_suffix("").parts)


def _covered(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted((ROOT / "qbench").rglob("*.py")):
        module = _module(path)
        if path.name == "__init__.py":
            assert path.read_text() == "", f"{path} must stay empty"
            continue
        key = next((k for k in (module, module.partition(".")[0]) if k in ARROWS), None)
        assert key, f"{module} has no arrow: say in ARROWS what it may import"
        tree = ast.parse(path.read_text())
        top = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.If)], [])
        everywhere = {_ours(n) for n in _imports(tree) if n.partition(".")[0] == "qbench"}
        at_top = {_ours(n) for n in _imports(top) if n.partition(".")[0] == "qbench"}
        wrong += [f"{module} -> {n}" for n in at_top if not _covered(n, ARROWS[key])]
        allowed = ARROWS[key] | INSIDE_FUNCTIONS.get(key, set())
        wrong += [f"{module} -> {n} (inside)" for n in everywhere - at_top if not _covered(n, allowed)]
    assert not wrong, wrong


def test_hydra_is_imported_in_one_place() -> None:
    users = {
        _module(p)
        for p in (ROOT / "qbench").rglob("*.py")
        if any(n.partition(".")[0] == "hydra" for n in _imports(ast.parse(p.read_text())))
    }
    assert users == HYDRA


def test_no_private_torch_and_no_fx() -> None:
    for path in (ROOT / "qbench").rglob("*.py"):
        for name in _imports(ast.parse(path.read_text())):
            assert not name.startswith(("torch._", "torch.fx", "torch.ao", "torch.nn.utils.parametrize")), (
                path,
                name,
            )


def test_straight_through_lives_in_ops() -> None:
    for path in (ROOT / "qbench").rglob("*.py"):
        if path.name != "ops.py":
            names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert "save_for_backward" not in names, path
            assert "autograd.Function" not in path.read_text(), path
