"""The package has layers, no import cycles, and one file for other packages' private names. Tests mirror it."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_logme

ROOT = Path(lightning_logme.__file__).parent
NAME = "lightning_logme"
# A layer imports from itself and from layers with a lower number. The files at the root are above all layers.
LAYERS = {"utilities": 0, "scores": 1, "features": 2, "tracking": 3, "ranking": 3}
ABOVE = 4
FILES = sorted(ROOT.rglob("*.py"))
ENTRIES_BESIDE = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
MOST_ENTRIES, MOST_LINES, EXCEPTIONS = 12, 370, {"features/heads.py": 450}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((NAME, *parts)).removesuffix(".__init__")


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a module imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0  # an absolute import
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if name in TREES]
            yield from found
            if len(found) < len(submodules):
                yield node.module


# The package itself imports its public names lazily, so it is left out.
INSIDE = {
    name: sorted({other for other in imports(tree) if other in TREES and other != NAME})
    for name, tree in TREES.items()
    if name != NAME
}


def layer_of(name: str) -> int:
    return LAYERS.get(name.split(".")[1], ABOVE)


def find_cycle(graph: dict[str, list[str]]) -> list[str]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in graph[name]:
                cycle = visit(other, [*path, name])
                if cycle:
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in graph if (cycle := visit(name, []))), [])


def test_import_cycle_is_found():
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_modules_have_no_import_cycle():
    assert len(INSIDE) > len(LAYERS)
    assert find_cycle(INSIDE) == []


def test_layers_import_only_from_lower_layers():
    wrong = []
    for name, others in INSIDE.items():
        for other in others:
            same = name.split(".")[1] == other.split(".")[1] if layer_of(name) < ABOVE else True
            if not (layer_of(other) < layer_of(name) or (layer_of(other) == layer_of(name) and same)):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_folder_is_a_layer():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - ENTRIES_BESIDE
    assert folders == set(LAYERS)


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith(f"{NAME}.scores")])
def test_scores_need_only_torch(name):
    packages = {other.partition(".")[0] for other in imports(TREES[name])}
    metrics = {"torchmetrics"} if name == f"{NAME}.scores.accuracy" else set()
    assert packages - set(sys.stdlib_module_names) <= {NAME, "torch"} | metrics


@pytest.mark.slow
@pytest.mark.parametrize("module", [f"{NAME}.functional", f"{NAME}.scores.accumulator", f"{NAME}.scores.reduction"])
def test_import_of_the_scores_does_not_import_lightning(module):
    script = f"import sys, {module}; print(*({{name.partition('.')[0] for name in sys.modules}} & set(sys.argv[1:])))"
    others = ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "matplotlib")
    command = [sys.executable, "-c", script, *(name for name in others if importlib.util.find_spec(name))]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == []


def test_functions_name_their_options():
    """``**options: Any`` would hide the options."""
    allowed = {
        f"{NAME}.metric.__init__",  # options of torchmetrics.Metric
        f"{NAME}.features.isolation._drop",  # does nothing
        f"{NAME}.ranking.model.forward",  # inputs of any encoder
        f"{NAME}.utilities.checks.check_flags",  # flags by name
        f"{NAME}.utilities.plots._line",  # options of matplotlib
    }
    found = {
        f"{name}.{node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg is not None
    }
    assert found == allowed


# Public names that begin with an underscore.
PUBLIC = {"_fields", "_replace", "_asdict", "_make"}  # attributes of named tuples
# Private names of other packages outside utilities/compat.py: (module, name).
OUTSIDE = {
    # Methods of torchmetrics that are overridden, and the attributes that these must update.
    (f"{NAME}.metric", "_reduce_states"),
    (f"{NAME}.metric", "_sync_dist"),
    (f"{NAME}.metric", "_load_from_state_dict"),
    (f"{NAME}.metric", "_apply"),
    (f"{NAME}.metric", "_plot"),
    (f"{NAME}.metric", "_computed"),
    (f"{NAME}.metric", "_update_count"),
    # Lightning calls it for the key of a callback's state.
    (f"{NAME}.callback", "_generate_state_key"),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in PUBLIC


def own_names(tree: ast.AST) -> set[str]:
    """Return the names that a module defines: functions, classes, fields and attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return found


def is_self(node: ast.AST) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def private_accesses(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the private names that a module accesses, and whether it accesses them on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, is_self(node.value)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, False) for alias in node.names if is_private(alias.name))
            yield from ((part, False) for part in (node.module or "").split(".") if is_private(part))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_lookup = node.func.id in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) > 1
            name = node.args[1].value if is_lookup and isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and is_private(name):
                yield name, is_self(node.args[0])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("module._buffers", [("_buffers", False)]),
        ("self._rows", [("_rows", True)]),
        ("super()._apply(f)", [("_apply", True)]),
        ("getattr(trainer, '_x', None)", [("_x", False)]),
        ("from torch.nn.modules.conv import _ConvNd", [("_ConvNd", False)]),
        ("batch._fields, module.__dict__, torch.nn", []),
    ],
)
def test_private_accesses_are_found(source, found):
    assert list(private_accesses(ast.parse(source))) == found


@pytest.mark.parametrize("name", [name for name in TREES if name != f"{NAME}.utilities.compat"])
def test_private_names_are_used_only_where_they_are_defined(name):
    """Private names of other packages belong in compat.py."""
    own = own_names(TREES[name])
    found = {attribute for attribute, _ in private_accesses(TREES[name]) if attribute not in own}
    assert found == {attribute for module, attribute in OUTSIDE if module == name and attribute not in own}


def test_every_exception_for_private_names_is_needed():
    for name, attribute in OUTSIDE:
        assert attribute in own_names(TREES[name]) | {found for found, _ in private_accesses(TREES[name])}


def test_root_has_few_entries():
    entries = {path.name for path in ROOT.iterdir()} - ENTRIES_BESIDE
    assert len(entries) <= MOST_ENTRIES


TESTS = Path(__file__).parent
TEST_FILES = sorted(path.relative_to(TESTS) for layer in LAYERS for path in (TESTS / layer).glob("test_*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=str)
def test_test_file_has_the_name_of_its_module(path):
    assert (ROOT / path.parent / path.name.removeprefix("test_")).is_file()


def test_only_layers_and_integration_have_folders_of_tests():
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert folders == {".", *LAYERS, "integration"}


def test_files_are_short():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    too_long = {path: number for path, number in lengths.items() if number > EXCEPTIONS.get(path, MOST_LINES)}
    assert too_long == {}
