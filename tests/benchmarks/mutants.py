"""Mutation tests: the mathematics and the detection of padding are broken on purpose, one small change at a time."""

from __future__ import annotations

import ast
import copy
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import threadpoolctl

from tests.benchmarks.common import print_table

ROOT = Path(__file__).parents[2]
_TIME_LIMIT = 90  # seconds for the tests of one mutant; a mutant whose tests take longer counts as noticed

# Modules that take long to import. They are imported once, and not for every mutant.
_HEAVY = "lightning.pytorch torchmetrics.classification torch.multiprocessing matplotlib.pyplot scipy.stats"
_HEAVY += " scipy.optimize sklearn.datasets sklearn.linear_model hypothesis.strategies pytest"
# By file: the functions that are changed (all of them if none is named), and the fast tests that should notice.
_SCORES = (
    *(f"scores/test_{name}.py" for name in ("evidence", "maximum", "moments", "spectrum")),
    "integration/test_numbers.py",
    "test_functional.py",
    "features/test_labels.py",
)
SCOPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("scores/spectrum", "scores/maximum", "scores/evidence", "functional"), ((), _SCORES)),
    "scores/moments": ((), (*_SCORES, "test_metric.py", "scores/test_jackknife.py")),
    "scores/accumulator": ((), tuple(f"scores/test_{name}.py" for name in ("accumulator", "subset", "jackknife"))),
    "scores/subset": ((), ("scores/test_subset.py", "scores/test_accumulator.py")),
    "scores/curve": ((), ("scores/test_curve.py", "integration/test_curves.py")),
    "scores/leave_one_out": ((), ("scores/test_leave_one_out.py",)),
    "scores/accuracy": ((), ("scores/test_accuracy.py", "scores/test_curve.py")),
    "metric": ((), ("test_metric.py", "test_functional.py")),
    "features/padding": ((), ("features/test_padding.py",)),
    "tracking/validation": (
        ("add", "_segment", "_result"),
        ("integration/test_curves.py", "test_callback.py::TestErrors::test_error_in_the_evidence_is_named"),
    ),
}
_SLOW = (
    "integration/test_numbers.py::TestHalfPrecision::test_overflow_while_training",
    "scores/test_jackknife.py::test_ties",
    "scores/test_jackknife.py::test_error_bars",
    "scores/test_evidence.py::test_brute_force",
)

_PAIRS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or), (ast.Is, ast.IsNot)]
_PAIRS += [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)]
_PAIRS += [(ast.MatMult, ast.Mult), (ast.FloorDiv, ast.Mult), (ast.Pow, ast.Mult)]
_SWAPPED = {**{b: a for a, b in reversed(_PAIRS)}, **dict(_PAIRS)}
_RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "tril": "triu", "ceil": "floor"}


class Mutant(NamedTuple):
    """A source file with one change: its position, the code before and after, and the whole text."""

    place: str
    before: str
    after: str
    source: str


def mutants(path: Path, functions: tuple[str, ...]) -> Iterator[Mutant]:
    """Yield each possible change of a file, or of some of its functions."""
    tree = ast.parse(path.read_text())
    roots = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in functions] or [tree]
    for parent, siblings, place in (found for root in roots for found in _places(root)):
        node, line = siblings[place], getattr(siblings[place], "lineno", 0)
        for changed in _variants(node):
            before = _shown(parent, node)
            siblings[place] = changed
            yield Mutant(f"{path.name}:{line}", before, _shown(parent, changed), ast.unparse(tree))
            siblings[place] = node


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, Any, Any]]:
    """Yield the nodes below a node, without annotations and messages: the parent, its list or fields, index or name."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        siblings = value if isinstance(value, list) else vars(parent)
        for place in range(len(value)) if isinstance(value, list) else [field]:
            node = siblings[place]
            if isinstance(node, ast.AST) and not isinstance(node, (ast.Raise, ast.JoinedStr)):
                yield parent, siblings, place
                if not (isinstance(node, ast.Expr) and ast.unparse(node).startswith(("warnings.warn(", "rank_zero_"))):
                    yield from _places(node)


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the small mistakes that are possible in a node."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPPED:
            yield _with(node, op=_SWAPPED[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in _SWAPPED:
            yield _with(node, ops=[_SWAPPED[type(op)]()])
        case ast.Call(func=ast.Attribute(attr="sum" | "mean" | "all"), args=[ast.Constant(value=1)]):
            yield _with(node, args=[ast.Constant(0)])
    match node:
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield ast.Constant(value * 10 or 1.0)
        case ast.UnaryOp(operand=value) | ast.Attribute(attr="T", value=value):
            yield value
        case ast.Attribute(attr=name) if name in _RENAMED:
            yield _with(node, attr=_RENAMED[name])
        case ast.Name(id=name) if name in _RENAMED:
            yield _with(node, id=_RENAMED[name])
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Break() | ast.Continue():
            yield ast.Pass()


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def _shown(parent: ast.AST, node: ast.AST) -> str:
    whole = isinstance(parent, (ast.expr, ast.keyword, ast.Assign, ast.AugAssign, ast.Return))
    return " ".join(ast.unparse(parent if whole else node).split())


def noticed(repository: Path, tests: tuple[str, ...]) -> bool:
    """Return whether a test fails, or does not end, in a copy of the repository."""
    process = multiprocessing.get_context("fork").Process(target=_test, args=(repository, tests))
    process.start()
    process.join(_TIME_LIMIT)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode != 0


def _test(repository: Path, tests: tuple[str, ...]) -> None:
    import pytest
    from hypothesis import Phase, settings

    os.setsid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning_logme", "tests")]:
        del sys.modules[name]
    os.chdir(repository)
    sys.path.insert(0, str(repository))
    settings.register_profile("fixed", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("fixed")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # The search for plugins takes a second.
    options = ["-xq", "--tb=no", "-pno:cacheprovider", "-ppytest_timeout", "-otimeout=10"]
    slow = (f"--deselect=tests/{name}" for name in _SLOW)
    sys.exit(pytest.main([*options, *slow, *(f"tests/{name}" for name in tests)]))


def surviving(repository: Path, path: Path, every: list[Mutant], tests: tuple[str, ...]) -> Iterator[Mutant]:
    """Yield the mutants of a file, in a copy of the repository, that no test notices."""
    original = path.read_text()
    for number, mutant in enumerate(every):
        path.write_text(mutant.source)
        os.utime(path, (number, number))  # Cached bytecode is recognised by time and size.
        if not noticed(repository, tests):
            yield mutant
    path.write_text(original)


def report(repeats: int, quick: bool) -> None:
    """Print how many mutants are noticed, and list the others. The quick run takes every 20th mutant."""
    for name in _HEAVY.split():
        importlib.import_module(name)
    threadpoolctl.threadpool_limits(1)  # With small matrices, a second thread only waits for the first.
    survivors: list[Mutant] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.ckpt"))
        for name, (functions, tests) in SCOPE.items():
            path = repository / "lightning_logme" / f"{name}.py"
            every = list(mutants(path, functions))[:: 20 if quick else 1]
            if noticed(repository, tests):
                raise RuntimeError(f"the tests of {path.name} fail, or take too long, without any change")
            alive = list(surviving(repository, path, every, tests))
            number = len(every) - len(alive)
            rows.append((path.name, str(len(every)), str(number), f"{number / len(every):.1%}"))
            survivors += alive
    print_table("Mutants", ("file", "mutants", "noticed", "share"), rows)
    print("\n".join(f"- `{mutant.place}`: `{mutant.before}` → `{mutant.after}`" for mutant in survivors), "\n")
