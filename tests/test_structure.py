# SPDX-License-Identifier: Apache-2.0
"""The house, as docs/architecture.md describes it: floors, no circles, files and functions of a size to be read."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
PACKAGE, BENCHMARKS = "anomalib_flowood", "benchmarks"
LONGEST_FILE = {PACKAGE: 400, BENCHMARKS: 450}
LONGEST_BODY = 45

# From the ground up. What is in a line imports what is in the lines before it, and nothing else of the package.
FLOORS = (
    ("",),
    ("configuration", "files", "started"),
    ("checks", "look", "names", "noise", "trainers"),
    ("parsing", "processes", "saving"),
    ("engine",),
    ("conformal",),
    ("exported",),
    ("flows",),
    ("features",),
    ("scores", "metrics"),
    ("data",),
    ("models",),
    ("inference",),
    ("report",),
    ("explain",),
    ("benchmark", "serving"),
    ("cli",),
    ("__main__",),
)


class Import(NamedTuple):
    source: str
    target: str
    line: int


def path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for top in (PACKAGE, BENCHMARKS):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker looks at."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (nested for other in child.orelse for nested in (other, *executed(other)))
        else:
            yield child
            yield from executed(child)


def targets(module: str, node: ast.AST) -> list[str]:
    """Modules of this repository that a statement imports, wherever it stands."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if path_of(module).name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
    else:
        return []
    return [name for name in names if name in modules()]


@cache
def imports() -> frozenset[Import]:
    return frozenset(
        Import(module, target, node.lineno)
        for module, tree in modules().items()
        for node in executed(tree)
        for target in targets(module, node)
    )


def room(module: str) -> str:
    """What stands directly in the package: a folder, or a file."""
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    numbers = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert numbers, f"{module} is on no floor: give {room(module)!r} its place in FLOORS and docs/architecture.md."
    return numbers[0]


def test_no_import_runs_upwards():
    upwards = [
        f"{source}, line {line}: {target}"
        for source, target, line in sorted(imports())
        if source.split(".")[0] == PACKAGE
        and (target.split(".")[0] != PACKAGE or (room(source) != room(target) and floor(source) <= floor(target)))
    ]
    assert not upwards


def test_floors_name_rooms_that_there_are():
    rooms = {room(module) for module in modules() if module.split(".")[0] == PACKAGE}
    assert rooms == {name for names in FLOORS for name in names}


def test_the_page_has_every_room_from_the_top_down():
    table = re.search(r"^\| folder or file .*?\n\n", PAGE.read_text(), re.DOTALL | re.MULTILINE).group()
    rows = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in table.splitlines()[2:] if row]
    assert {name for names in rows for name in names} == {name for names in FLOORS for name in names} - {""}
    heights = [[floor(f"{PACKAGE}.{name}") for name in names] for names in rows]
    assert all(min(above) >= max(below) for above, below in pairwise(heights))


def test_no_module_imports_itself_over_others():
    """Imports inside functions count, too."""
    left = {module: {target for source, target, _ in imports() if source == module} for module in modules()}
    while free := [module for module, wanted in left.items() if not wanted & left.keys()]:
        for module in free:
            del left[module]
    # What is left imports a circle, or is in one.
    while free := [module for module in left if not any(module in wanted for wanted in left.values())]:
        for module in free:
            del left[module]
    assert not {module: sorted(wanted & left.keys()) for module, wanted in left.items()}


@pytest.mark.parametrize("top", [PACKAGE, BENCHMARKS])
def test_files_are_of_a_size_to_be_read(top: str):
    lengths = {module: len(path_of(module).read_text().splitlines()) for module in modules()}
    assert not {
        module: length
        for module, length in lengths.items()
        if module.split(".")[0] == top and length > LONGEST_FILE[top]
    }


def test_functions_are_of_a_size_to_be_read():
    long = {}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if length > LONGEST_BODY:
                long[f"{module}.{node.name}"] = length
    assert not long


def test_flows_and_scores_import_without_anomalib_and_lightning():
    code = (
        "import sys, anomalib_flowood.flows, anomalib_flowood.scores\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in {'anomalib', 'lightning', 'pytorch_lightning'}]\n"
        "sys.exit(f'loaded: {bad[:5]}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def documented(docstring: str) -> set[str]:
    """The arguments that a docstring describes, without their stars."""
    found = re.search(r"^( *)Args:\n((?:\1 .*\n|\n)+)", f"{docstring}\n", re.MULTILINE)
    return set(re.findall(rf"^{found[1]}    \**(\w+): ", found[2], re.MULTILINE)) if found else set()


def test_arguments_are_documented_under_the_names_that_they_have():
    """As the documentation site demands; of classes that leave their arguments to others it knows nothing."""
    wrong = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                maker = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
            elif isinstance(node, ast.FunctionDef):
                maker = node
            else:
                continue
            if maker is None:
                continue
            given = maker.args
            every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
            unknown = documented(ast.get_docstring(node) or "") - {part.arg for part in every if part is not None}
            wrong += [f"{module}.{node.name}: {name}" for name in sorted(unknown)]
    assert not wrong
