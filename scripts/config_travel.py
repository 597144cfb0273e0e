#!/usr/bin/env python3
"""Counts files that use a `Config`, and calls that create a run's directory.

    python scripts/config_travel.py

The first list contains files of qbench/ in which a parameter or a field of a class has the annotation `Config`. The
second list contains calls that create a `RunDirectory`, directly or through `planned_run` and `planned_runs`. Both
lists are computed from the syntax trees of the modules.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "qbench"
MAKERS = ("RunDirectory", "planned_run", "planned_runs")


def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the package, by path."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE.parent)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def names_config(annotation: ast.expr | None) -> bool:
    """Return whether an annotation contains the class `Config`, as a name or within a string."""
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Name) and node.id == "Config":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                quoted = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                continue
            if names_config(quoted):
                return True
    return False


def annotations(tree: ast.Module) -> Iterator[tuple[int, ast.expr | None]]:
    """Yield the line and the annotation of every parameter and of every field of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
                if arg is not None:
                    yield arg.lineno, arg.annotation
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign):
                    yield statement.lineno, statement.annotation


def takers() -> dict[str, list[int]]:
    """Return, by file, the lines at which a parameter or field has the annotation `Config`."""
    lines = {file: sorted(line for line, a in annotations(tree) if names_config(a)) for file, tree in trees().items()}
    return {file: found for file, found in lines.items() if found}


def makers() -> list[tuple[str, int, str]]:
    """Return (file, line, function) of every call that creates a run's directory."""
    calls = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in MAKERS:
                    calls.append((file, node.lineno, name))
    return calls


def main() -> None:
    """Print both lists."""
    files = takers()
    print(f"{len(files)} files use a Config:")
    for file, lines in files.items():
        print(f"    {file}: {len(lines)} ({', '.join(map(str, lines))})")
    calls = makers()
    print(f"{len(calls)} calls create a run's directory:")
    for file, line, name in calls:
        print(f"    {file}:{line}: {name}")


if __name__ == "__main__":
    main()
