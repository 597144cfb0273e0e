"""Imports run one way: the tree of docs/architecture.md as a test."""

import ast

from conftest import ROOT

PACKAGE = ROOT / "qbench"
LAYERS = (  # a folder imports from folders below it in this list, and never from one above
    "__main__",
    "cli",
    "analysis",
    "papers",
    "report",
    "check",
    "experiment",
    "training",
    "runs",
    "deviations",
    "methods",
    "models",
    "data",
    "cost",
    "quant",
    "config",
    "system",
    "bits",
    "errors",
)
ONLY = {  # folders that are to stay usable alone: all that they may import
    "bits": set(),
    "errors": set(),
    "system": {"errors"},
    "config": {"bits", "errors", "system"},
    "quant": {"bits"},
    "cost": {"bits", "quant"},
    "data": {"errors", "system"},
    "models": {"system"},
    "methods": {"bits", "quant"},
    "deviations": {"bits", "methods", "quant"},
    "report/statistics": set(),
    "report/tables": {"config", "errors", "report/statistics", "runs"},
}
HYDRA = {"config/compose", "config/hydra_errors", "config/hydra_sources"}


def _modules() -> dict[str, ast.Module]:
    """Return `folder/name` -> tree for every module with code."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py":
            assert path.read_text() == "", f"{path} must stay empty"
            continue
        found[str(path.relative_to(PACKAGE).with_suffix(""))] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = _modules()


def _ours(tree: ast.AST) -> set[str]:
    """Return the modules of the package that a tree imports anywhere, as `folder/name`."""
    names = (name.removeprefix("qbench.").replace(".", "/") for name in _imports(tree) if name.startswith("qbench."))
    return {name for name in names if name in MODULES}


def _folder(module: str) -> str:
    return module.partition("/")[0]


def test_every_folder_has_its_place() -> None:
    assert {_folder(module) for module in MODULES} == set(LAYERS)


def test_no_module_imports_from_a_folder_above_its_own() -> None:
    rank = {folder: i for i, folder in enumerate(LAYERS)}
    wrong = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in _ours(tree)
        if rank[_folder(name)] < rank[_folder(module)]
    ]
    assert not wrong, wrong


def test_folders_that_stay_usable_alone_import_no_more_than_they_declare() -> None:
    wrong = []
    for folder, allowed in ONLY.items():
        for module, tree in MODULES.items():
            if module == folder or module.startswith(f"{folder}/"):
                others = {name for name in _ours(tree) if not (name == folder or name.startswith(f"{folder}/"))}
                wrong += [
                    f"{module} imports {n}" for n in others if not any(n == a or n.startswith(f"{a}/") for a in allowed)
                ]
    assert not wrong, wrong


def test_no_circle() -> None:
    """Imports inside functions count too: a module that needs another to work depends on it."""
    needs = {module: _ours(tree) - {module} for module, tree in MODULES.items()}
    left = dict(needs)
    while free := [module for module, names in left.items() if not names & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


def test_hydra_is_imported_by_the_composition_alone() -> None:
    users = {m for m, tree in MODULES.items() if any(n.partition(".")[0] == "hydra" for n in _imports(tree))}
    assert users == HYDRA


def test_no_private_torch_and_no_fx() -> None:
    banned = ("torch._", "torch.fx", "torch.ao", "torch.nn.utils.parametrize")
    wrong = [(m, n) for m, tree in MODULES.items() for n in _imports(tree) if n.startswith(banned)]
    assert not wrong, wrong


def test_straight_through_lives_in_ops() -> None:
    for module, tree in MODULES.items():
        if module != "quant/ops":
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"save_for_backward", "Function"}, module
            assert "torch.autograd.Function" not in _imports(tree), module
