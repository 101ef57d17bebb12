"""The rooms of the package: what `modeling/` holds, and that imports run in one direction only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_hyperflow"
MODELING = PACKAGE / "modeling"

#: What each room or file at the top may import from, beside itself.
BELOW = {
    "modeling": (),
    "extras": (),
    "arguments": (),
    "serving": ("modeling",),
    "export": ("modeling",),
    "data": ("modeling",),
    "finetuning": ("modeling", "data"),
    "benchmark": ("modeling", "serving", "export", "data", "finetuning", "extras", "arguments"),
    "training": ("modeling", "data", "finetuning", "benchmark", "extras", "arguments"),
    "info": ("modeling",),
    "download": ("modeling",),
    "pipeline": ("modeling", "download"),
    "demo": ("modeling", "data", "finetuning", "benchmark", "extras"),
    "cli": ("modeling", "export", "benchmark", "demo", "info", "download", "extras"),
    "__main__": ("cli", "extras"),
    "": ("modeling", "serving", "pipeline"),
}


def list_modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its name without the package's."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def list_imports(tree: ast.AST, *, at_module_level: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports anywhere in a module, or those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if at_module_level and (is_function or is_for_types):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from list_imports(node, at_module_level=at_module_level)


def resolve(node: ast.Import | ast.ImportFrom, module: str, modules: dict[str, ast.Module]) -> set[str]:
    """The modules of the package that an import names, without the package's name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level == 0:
        names = [node.module or ""]
    else:
        folder = module.split(".")
        if not any(name.startswith(f"{module}.") for name in modules if module):  # not a package itself
            folder = folder[:-1]
        base = ["hf_hyperflow", *folder[: len(folder) - node.level + 1]]
        names = [".".join([*base, *([node.module] if node.module else [])])]
    targets = set()
    for name in names:
        if name.split(".")[0] != "hf_hyperflow":
            continue
        target = name.removeprefix("hf_hyperflow").removeprefix(".")
        members = {f"{target}.{alias.name}".removeprefix(".") for alias in node.names}
        targets |= (members & modules.keys()) or {target}
    return targets


MODULES = list_modules()


def get_room(module: str) -> str:
    return module.split(".")[0]


def test_modeling_is_the_closure_of_the_adapter():
    """transformers copies the files that the root module imports, and theirs: all of the folder, and nothing else."""
    closure, to_visit = set(), ["adapter"]
    while to_visit:
        name = to_visit.pop()
        if name in closure:
            continue
        closure.add(name)
        for node in list_imports(MODULES[f"modeling.{name}"]):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert node.module, f"modeling/{name}.py: `from . import x` is not copied"
                to_visit.append(node.module)
    files = {path.stem for path in MODELING.iterdir() if path.suffix == ".py"} - {"__init__"}
    assert closure == files
    folders = {path.name for path in MODELING.iterdir() if path.is_dir()} - {"__pycache__"}
    assert not folders, "the folder is flat"


FILES = sorted(MODELING.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_modeling_imports_by_one_dot_only(path):
    text = path.read_text(encoding="utf-8")
    for node in list_imports(ast.parse(text)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, ast.unparse(node)
            names = [node.module or ""]
        assert not any(name.split(".")[0] == "hf_hyperflow" for name in names), ast.unparse(node)
    # For relative imports the loader reads lines, so that a line in a docstring counts, too.
    for name in re.findall(r"^\s*(?:from|import)\s+\.(\S*)", text, flags=re.MULTILINE):
        assert (MODELING / f"{name}.py").is_file(), f"{path.name}: .{name}"


def test_every_room_and_file_has_its_place():
    assert {get_room(module) for module in MODULES} == set(BELOW)
    for i, room in enumerate(BELOW):
        assert set(BELOW[room]) <= set(list(BELOW)[:i]), "the layers are in order"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_the_rooms_below_it(module):
    room = get_room(module)
    allowed = (room, *BELOW[room])
    for node in list_imports(MODULES[module]):
        for target in resolve(node, module, MODULES):
            assert get_room(target) in allowed, f"{module} imports {target or 'the whole package'}, line {node.lineno}"


def test_no_module_imports_a_script():
    for module, tree in MODULES.items():
        for node in list_imports(tree):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                continue
            for name in names:
                assert name.split(".")[0] not in ("training", "tests"), f"{module} imports {name}"


def test_there_are_no_cycles():
    """Of imports that run when a module is imported."""
    graph = {}
    for module, tree in MODULES.items():
        graph[module] = set()
        for node in list_imports(tree, at_module_level=True):
            graph[module] |= resolve(node, module, MODULES) - {module, ""}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])
