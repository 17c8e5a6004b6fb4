"""The examples and assertions of each notebook hold for the exported package, from top to bottom.

The names of exported cells come from the module, cell by cell, as far as the notebook has come: an import that only the notebook
has, a file that behaves otherwise than its cell, an example that needs a later cell is found. `nbdev-test` does the same with the
cells themselves.

`.ci/run` runs this file twice. With NUMBA_DISABLE_JIT=1 Python itself runs the bodies of the compiled functions: an index out of
bounds is an error instead of a wrong number, and the coverage table sees inside. Without it the compiled code runs, in the
notebooks where that is another thing: so the assertions also say whether both agree.
"""

import ast
import asyncio
import importlib
import inspect
import os
import re
import sys
import types
from pathlib import Path

import house
import matplotlib.pyplot as plt
import numba
import pytest

INTERPRETED = bool(numba.config.DISABLE_JIT)
os.environ.pop("NUMBA_DISABLE_JIT", None)  # numba has read it; what a notebook starts, a run for instance, is compiled
ONLY_COMPILED = {  # module, or folder of modules, to what Python does otherwise
    "backtest.batch": "backtests a hundred configs, which takes Python minutes; the kernel's own notebook reaches every line",
    "backtest.earnings": "backtests every phase, which takes Python minutes",
    "backtest.parity": "backtests and replays weeks, and compiles nothing of its own",
    "backtest.vector": "backtests years of bars, which takes Python minutes; the kernel's own notebook reaches every line",
    "compiled": "is about compiling",
    "exchange.fills": "divides scalars by zero, for which compiled code has inf and Python an exception",
    "optimizer": "backtests hundreds of configs and compiles nothing of its own",
}


def only_compiled(module: str) -> bool:
    "Whether a module's notebook is not run by Python itself."
    return module in ONLY_COMPILED or module.partition(".")[0] in ONLY_COMPILED


def has_compiled(notebook: Path) -> bool:
    "Whether a notebook defines compiled functions."
    sources = (source for _, source in house.code_cells(house.ROOT / notebook))
    return any(re.search(r"^@(njit|stage)$", source, re.MULTILINE) for source in sources)


def has_a_turn(notebook: Path, module: str | None) -> bool:
    "Whether a notebook is run in this turn."
    if INTERPRETED:
        return module is not None and not only_compiled(module)
    return module is None or only_compiled(module) or has_compiled(notebook)


def chapters() -> list:
    "Each notebook of this turn, with its module's dotted name; None for one that makes none."
    claims = {paths[0]: module for module, paths in house.default_exports(house.ROOT).items()}
    found = [path.relative_to(house.ROOT) for path in house.notebooks() if house.ROOT / "nbs" in path.parents]
    found = [path for path in found if path.parts[1] != "research"]  # test_research.py runs those, on a small market
    pairs = [(path, claims.get(path)) for path in found if has_a_turn(path, claims.get(path))]
    return [pytest.param(path, module and f"{house.PACKAGE}.{module}", id=module or path.stem) for path, module in pairs]


def bound_names(source: str) -> set[str]:
    "The names that a cell binds for those after it."
    names = set()
    for statement in ast.parse(source).body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names


def run_cell(source: str, place: str, namespace: dict, runner: asyncio.Runner) -> None:
    "Execute a cell; one that awaits something, as a notebook allows, in the event loop of its notebook."
    code = compile(source, place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if inspect.iscoroutine(awaiting := eval(code, namespace)):
        runner.run(awaiting)


@pytest.mark.filterwarnings("default")  # as in a notebook, whose scratch folders are cleaned up when they are forgotten
@pytest.mark.parametrize(("notebook", "module"), chapters())
def test_package_passes_its_notebook(notebook, module, root, monkeypatch):
    made = importlib.import_module(module) if module else types.ModuleType("notebook")
    monkeypatch.chdir((root / notebook).parent)  # as nbdev-test does
    monkeypatch.setitem(sys.modules, "__main__", made)  # what a notebook patches in `__main__` is patched where it is used
    namespace = {"__name__": "__main__", "__file__": getattr(made, "__file__", None)}
    with asyncio.Runner() as runner:
        for number, source in house.code_cells(root / notebook):
            if house.is_exported(source):
                namespace |= {name: getattr(made, name) for name in bound_names(source) if hasattr(made, name)}
            elif "#| eval: false" not in source:
                run_cell(source, f"{notebook}, cell {number}", namespace, runner)
    plt.close("all")
