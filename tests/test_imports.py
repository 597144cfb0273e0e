"""Imports run one way: the order of folders that docs/architecture.md draws, as a test."""

import ast
from collections.abc import Iterable, Iterator

from conftest import ROOT

PACKAGE = ROOT / "qbench"
LAYERS = (  # a folder imports from folders below it in this list, never from one above
    "__main__",
    "api",
    "cli",
    "analysis",
    "papers",
    "report",
    "deploy",
    "check",
    "experiment",
    "training",
    "distributed",
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
SUBLAYERS = {"report": ("html", "quantizer_plots", "plots", "comparison", "tables", "statistics")}
"""The same order inside a folder of folders."""
ONLY = {  # folders that stay usable on their own, and all that they may import
    "bits": set(),
    "errors": set(),
    "system": {"errors"},
    "distributed": {"errors"},
    "config": {"bits", "errors", "system"},
    "quant": {"bits"},
    "cost": {"bits", "quant", "system"},
    "data": {"errors", "system"},
    "models": {"system"},
    "methods": {"bits", "quant"},
    "deviations": {"bits", "methods", "quant"},
    "deploy": {"bits", "errors", "quant", "system", "training"},
    "report/quantizer_plots": {"bits", "quant", "report/plots"},
    "report/statistics": set(),
    "report/tables": {"config", "errors", "report/statistics", "runs"},
}
NO_TORCH = (  # importing these must not import torch: --help, a stored row and compare answer at once
    "analysis/description",
    "bits",
    "errors",
    "api",
    "cli",
    "config",
    "data/sources",
    "experiment/data_check",
    "papers",
    "report/comparison",
    "report/html",
    "report/plots",
    "report/statistics",
    "report/tables",
    "runs/directory",
    "runs/reader",
    "runs/result",
)
HYDRA = {
    "config/compose", "config/overrides", "config/hydra_errors", "config/hydra_sources", "config/typed_groups",
}  # fmt: skip


def _read_modules() -> dict[str, ast.Module]:
    """Return `folder/name` -> syntax tree for every module with code."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py":
            assert path.parent == PACKAGE or path.read_text() == "", f"{path} must stay empty"
            continue
        trees[str(path.relative_to(PACKAGE).with_suffix(""))] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def _imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the dotted names that import statements among these nodes bring in."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements that run when a module is imported: not those of functions or for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _top_level(node)


MODULES = _read_modules()


def _package_modules(names: Iterable[str]) -> set[str]:
    """Return the modules of the package among dotted names, as `folder/name`."""
    paths = (name.removeprefix("qbench.").replace(".", "/") for name in names if name.startswith("qbench."))
    return {path for path in paths if path in MODULES}


IMPORTS = {module: _package_modules(_imports(ast.walk(tree))) - {module} for module, tree in MODULES.items()}
"""Module -> the modules that it imports anywhere, inside functions too."""


def _folder(module: str) -> str:
    return module.partition("/")[0]


def _is_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}/")


def test_every_folder_has_its_place() -> None:
    assert {_folder(module) for module in MODULES} == set(LAYERS)
    for folder, parts in SUBLAYERS.items():
        assert {module.split("/")[1] for module in MODULES if _is_in(module, folder)} == set(parts)


def test_every_folder_of_folders_has_an_order() -> None:
    assert {_folder(module) for module in MODULES if module.count("/") > 1} == set(SUBLAYERS)


def test_no_module_imports_from_a_folder_above_its_own() -> None:
    rank = {folder: i for i, folder in enumerate(LAYERS)}
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        if rank[_folder(name)] < rank[_folder(module)]
    ]
    assert not wrong, wrong


def test_no_module_imports_from_a_sister_folder_above_its_own() -> None:
    wrong = []
    for folder, parts in SUBLAYERS.items():
        rank = {f"{folder}/{part}": i for i, part in enumerate(parts)}
        for module, names in IMPORTS.items():
            place = rank.get(module.rpartition("/")[0])
            above = [name for name in names if place is not None and rank.get(name.rpartition("/")[0], place) < place]
            wrong += [f"{module} imports {name}" for name in above]
    assert not wrong, wrong


def test_folders_that_stay_usable_on_their_own_import_no_more_than_they_declare() -> None:
    wrong = []
    for folder, allowed in ONLY.items():
        for module, names in IMPORTS.items():
            if _is_in(module, folder):
                others = {name for name in names if not _is_in(name, folder)}
                wrong += [f"{module} imports {name}" for name in others if not any(_is_in(name, a) for a in allowed)]
    assert not wrong, wrong


def test_no_circle() -> None:
    """Imports inside functions count too: a module that needs another to work depends on it."""
    left = dict(IMPORTS)
    while free := [module for module, names in left.items() if not names & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


def test_modules_that_answer_at_once_import_no_torch() -> None:
    at_import = {module: _imports(_top_level(tree)) for module, tree in MODULES.items()}
    wrong = []
    for start in (module for module in MODULES if any(_is_in(module, folder) for folder in NO_TORCH)):
        seen, left = set(), [start]
        while left:
            module = left.pop()
            if module not in seen:
                seen.add(module)
                left += _package_modules(at_import[module])
        users = [m for m in seen if any(name.partition(".")[0] in ("torch", "torchvision") for name in at_import[m])]
        wrong += [f"{start} imports torch through {user}" for user in users]
    assert not wrong, wrong


def test_hydra_is_imported_by_the_composition_alone() -> None:
    users = {m for m, tree in MODULES.items() if any(n.partition(".")[0] == "hydra" for n in _imports(ast.walk(tree)))}
    assert users == HYDRA


def test_no_private_torch_and_no_fx() -> None:
    banned = ("torch._", "torch.fx", "torch.ao", "torch.nn.utils.parametrize")
    wrong = [(m, n) for m, tree in MODULES.items() for n in _imports(ast.walk(tree)) if n.startswith(banned)]
    assert not wrong, wrong


def test_no_module_imports_a_private_name_of_another() -> None:
    names = [(m, n) for m, tree in MODULES.items() for n in _imports(ast.walk(tree)) if n.startswith("qbench.")]
    wrong = [(module, name) for module, name in names if name.rpartition(".")[2].startswith("_")]
    assert not wrong, wrong


def test_straight_through_lives_in_ops() -> None:
    for module, tree in MODULES.items():
        if module != "quant/ops":
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"save_for_backward", "Function"}, module
            assert "torch.autograd.Function" not in _imports(ast.walk(tree)), module
