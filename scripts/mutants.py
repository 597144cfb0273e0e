#!/usr/bin/env python3
"""Measure the quality of the tests with mutants, which are small changes of the code that tests should notice.

    .venv/bin/python scripts/mutants.py --cover          # first: store which tests run which lines (whole fast suite)
    .venv/bin/python scripts/mutants.py --sample 120     # then: 120 mutants; a stopped run continues
    .venv/bin/python scripts/mutants.py --report         # the score and the survivors of the stored outcomes
    .venv/bin/python scripts/mutants.py --report --docs  # also write them into docs/reliability.md

A mutant has one change: another comparison or arithmetic operator, `and` instead of `or`, a negated condition, a number
plus one, a flipped truth value, `min` instead of `max`, an omitted call, or None instead of a result. The sample is
drawn with a fixed seed from all mutants, with equally many from each folder. In a copy of the working tree, the script
runs only the tests that execute the changed line. A mutant is killed if a test fails or runs out of time. Otherwise, it
survives, for example because no test executes the changed line.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("quant", "methods", "report/statistics", "training", "runs")
"""Folders of qbench/ whose code is mutated."""
COPIED = ("qbench", "conf", "tests", "scripts", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
MOST_TESTS = 400
"""Maximum number of tests that are run for a mutant. Tests of the mutant's own folder come first."""

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "*"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}


@dataclass(frozen=True)
class Mutant:
    """A change of one file: `text` replaces the text from `start` to `end`."""

    file: str
    line: int
    start: int
    end: int
    text: str
    was: str

    @property
    def name(self) -> str:
        """The mutant's name, which is stable as long as the file does not change."""
        return f"{self.file}:{self.line}: {' '.join(self.was.split())} -> {' '.join(self.text.split())}"

    @property
    def key(self) -> str:
        """A digest of the change and of the file's content, under which the outcome is stored."""
        source = (ROOT / self.file).read_text("utf-8")
        return hashlib.sha256(f"{self.start} {self.text} {self.file} {source}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a mutant: killed, survived, timeout (counts as killed), or uncovered (no test runs the line)."""

    key: str
    name: str
    folder: str
    outcome: str
    tests: int
    seconds: float


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file, in the order of the source."""
    source = file.read_text("utf-8")
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    tree, data, name = ast.parse(source), source.encode(), str(file.relative_to(ROOT))

    def place(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def made(node: ast.expr | ast.stmt, text: str) -> Mutant:
        start, end = place(node)
        return Mutant(name, node.lineno, start, end, text, data[start:end].decode())

    for node in _walk(tree):
        for replaced in changes(node):
            yield made(node, replaced)


def _walk(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield the expressions and statements to mutate, without annotations, messages, docstrings and type imports."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.JoinedStr | ast.Raise) or _for_types(child):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _for_types(node: object) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def changes(node: ast.expr | ast.stmt) -> list[str]:
    """Return the texts that may replace a node."""
    text = ast.unparse
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in COMPARISONS:
            return [f"({text(left)} {COMPARISONS[type(op)]} {text(right)})"]
        case ast.BinOp(left, op, right) if type(op) in OPERATORS and not _is_text(left) and not _is_text(right):
            return [f"({text(left)} {OPERATORS[type(op)]} {text(right)})"]
        case ast.BoolOp(op, values):
            return [f"({(' or ' if isinstance(op, ast.And) else ' and ').join(f'({text(v)})' for v in values)})"]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            return [f"({text(operand)})"]
        case ast.Constant(bool(value)):
            return [str(not value)]
        case ast.Constant(int(value) | float(value)):
            return [repr(value + 1)]
        case ast.IfExp(test, body, orelse):
            return [f"({text(orelse)} if {text(test)} else {text(body)})"]
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
            return [text(node).removesuffix(name) + NAMES[name]]
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            return ["return None"]
        case ast.Expr(ast.Call()):
            return ["pass"]
    return []


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def sampled(count: int, seed: int, folders: Sequence[str]) -> list[Mutant]:
    """Return `count` mutants, with equally many from each folder."""
    chosen: list[Mutant] = []
    for i, folder in enumerate(folders):
        found = [m for file in sorted((ROOT / "qbench" / folder).glob("*.py")) for m in mutants_of(file)]
        share = count // len(folders) + (i < count % len(folders))
        chosen += random.Random(f"{seed} {folder}").sample(found, min(share, len(found)))
    return chosen


def covering_tests(data: CoverageData, mutant: Mutant) -> list[str]:
    """Return the tests that run the mutant's line. Tests of the mutant's own folder come first.

    A line outside functions, such as a constant, is executed by an import and by no test. The tests of such a line are
    the tests that run any line of its file.
    """
    measured = next((f for f in data.measured_files() if f.endswith("/" + mutant.file)), None)
    by_line = data.contexts_by_lineno(measured) if measured else {}
    contexts = set(by_line.get(mutant.line, []))
    if contexts == {""}:
        contexts = set().union(*by_line.values())
    tests = sorted({context.partition("|")[0] for context in contexts if "::" in context})
    own = "tests/" + mutant.file.removeprefix("qbench/").partition("/")[0] + "/"
    return sorted(tests, key=lambda test: (not test.startswith(own), test))[:MOST_TESTS]


def run_mutant(mutant: Mutant, tests: Sequence[str], tree: Path, limit: float) -> str:
    """Return the outcome of a mutant. The change is made in a copy of the tree, and undone afterwards."""
    if not tests:
        return "uncovered"
    path, listed = tree / mutant.file, tree / "tests.txt"
    source = path.read_bytes()
    listed.write_text("\n".join(tests), encoding="utf-8")
    path.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.end :])
    command = [sys.executable, "-B", "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", f"@{listed}"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        path.write_bytes(source)
    broken = b"ERROR collecting" in done.stdout or b"ImportError while loading conftest" in done.stderr
    if done.returncode not in (0, 1) and not broken:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr).decode()[-2000:]}")
    return "killed" if done.returncode else "survived"


def cover(tests: Sequence[str], file: Path) -> int:
    """Run the tests, and store which tests execute which lines."""
    measured = [f"--cov=qbench.{folder.replace('/', '.')}" for folder in FOLDERS]
    options = ["-n", "2", "-q", "-m", "not full and not gpu", "--cov-context=test", "--cov-report=", *measured]
    file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"COVERAGE_FILE": str(file), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment).returncode


def score(outcomes: Sequence[Outcome], command: str) -> str:
    """Return Markdown text with the total score, the score of each folder, and the mutants that survived."""
    dead = sum(o.outcome in ("killed", "timeout") for o in outcomes)
    lines = [f"`{command}`: {dead} of {len(outcomes)} mutants killed ({100 * dead / max(len(outcomes), 1):.0f} %).", ""]
    for folder in dict.fromkeys(o.folder for o in outcomes):
        counts = Counter(o.outcome for o in outcomes if o.folder == folder)
        lines.append(f"- {folder}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return "\n".join([*lines, "", *(f"- {o.outcome}: `{o.name}`" for o in outcomes if o.outcome in LIVING)])


LIVING = ("survived", "uncovered")
PAGE, BEGIN, END = ROOT / "docs" / "reliability.md", "<!-- mutants -->\n", "<!-- end -->"


def write_page(text: str) -> None:
    """Write the score between the two markers in docs/reliability.md."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/mutants.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cover", action="store_true", help="run the tests and store which lines they run")
    parser.add_argument("--report", action="store_true", help="print the score of the stored outcomes")
    parser.add_argument("--docs", action="store_true", help="write the score into docs/reliability.md")
    parser.add_argument("--sample", type=int, default=120, metavar="N", help="number of mutants (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample (default: 0)")
    parser.add_argument("--folders", default=",".join(FOLDERS), help="folders of qbench/ (default: all five)")
    parser.add_argument("--limit", type=float, default=600, metavar="S", help="seconds per mutant (default: 600)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "mutants", help="folder of the stored data")
    parser.add_argument("tests", nargs="*", default=["tests"], help="tests for --cover (default: the fast suite)")
    options = parser.parse_args(arguments)
    data_file, store = options.out.resolve() / "coverage", options.out.resolve() / "outcomes.jsonl"
    if options.cover:
        return cover(options.tests, data_file)
    if not data_file.is_file():
        parser.error(f"{data_file} is missing: run scripts/mutants.py --cover first")
    data = CoverageData(str(data_file))
    data.read()
    folders = options.folders.split(",")
    sample = sampled(options.sample, options.seed, folders)
    stored = {o.key: o for line in (store.read_text().splitlines() if store.is_file() else []) for o in [_load(line)]}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in COPIED if not options.report else ():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        for number, mutant in enumerate(sample if not options.report else (), 1):
            if mutant.key in stored:
                continue
            tests, began = covering_tests(data, mutant), time.monotonic()
            outcome = run_mutant(mutant, tests, tree, options.limit)
            folder = next(f for f in folders if mutant.file.startswith(f"qbench/{f}/"))
            done = Outcome(mutant.key, mutant.name, folder, outcome, len(tests), round(time.monotonic() - began, 1))
            stored[done.key] = done
            with open(store, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(done)) + "\n")
            print(
                f"{number}/{len(sample)} {done.outcome} ({done.tests} tests, {done.seconds} s) {done.name}", flush=True
            )
    outcomes = [stored[mutant.key] for mutant in sample if mutant.key in stored]
    text = score(outcomes, f"scripts/mutants.py --sample {options.sample} --seed {options.seed}")
    print(text)
    if options.docs:
        write_page(text)
    return 0


def _load(line: str) -> Outcome:
    return Outcome(**json.loads(line))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
