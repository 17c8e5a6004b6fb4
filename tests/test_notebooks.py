"""The examples and assertions of each notebook hold for the exported package, not only for the notebook's own cells.

nbdev-test runs a notebook from top to bottom, so what is tested there is the cell. Here the exported cells are left out and the
names come from the module: an import that only the notebook has, or a file that behaves otherwise than its cell, is found.

`.ci/run` runs this file with NUMBA_DISABLE_JIT=1. Then Python itself runs the bodies of the compiled functions: an index out of
bounds is an error instead of a wrong number, the assertions say whether compiled and interpreted code agree (nbdev-test ran the
compiled), and the coverage table sees inside.
"""

import ast
import asyncio
import importlib
import inspect
import os
import sys

import house
import matplotlib.pyplot as plt
import numba
import pytest

INTERPRETED = bool(numba.config.DISABLE_JIT)
os.environ.pop("NUMBA_DISABLE_JIT", None)  # numba has read it; what a notebook starts, a run for instance, is compiled
ONLY_COMPILED = {  # module to what Python does otherwise
    "backtest.batch": "backtests a hundred configs, which takes Python minutes; the kernel's own notebook reaches every line",
    "backtest.earnings": "backtests every phase, which takes Python minutes",
    "backtest.vector": "backtests years of bars, which takes Python minutes; the kernel's own notebook reaches every line",
    "compiled": "is about compiling",
    "exchange.fills": "divides scalars by zero, for which compiled code has inf and Python an exception",
    "optimizer.discovery": "sends markets through the whole optimizer, which takes Python minutes",
    "optimizer.pipeline": "sends a market through the whole optimizer, which takes Python minutes",
}


def chapters() -> list:
    "Each notebook that makes a module, with the module's dotted name."
    claims = house.default_exports(house.ROOT)
    chosen = (module for module in claims if not (INTERPRETED and module in ONLY_COMPILED))
    return [pytest.param(claims[module][0], f"{house.PACKAGE}.{module}", id=module) for module in chosen]


def run_cell(source: str, place: str, namespace: dict) -> None:
    "Execute a cell; one that awaits something, as a notebook allows, in an event loop of its own."
    code = compile(source, place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if inspect.iscoroutine(awaiting := eval(code, namespace)):
        asyncio.run(awaiting)


@pytest.mark.filterwarnings("default")  # as in a notebook, whose scratch folders are cleaned up when they are forgotten
@pytest.mark.parametrize(("notebook", "module"), chapters())
def test_package_passes_its_notebook(notebook, module, root, monkeypatch):
    made = importlib.import_module(module)
    monkeypatch.chdir((root / notebook).parent)  # as nbdev-test does
    monkeypatch.setitem(sys.modules, "__main__", made)  # what a notebook patches in `__main__` is patched where it is used
    namespace = {**vars(made), "__name__": "__main__"}
    for number, source in house.code_cells(root / notebook):
        if not house.is_exported(source) and "#| eval: false" not in source:
            run_cell(source, f"{notebook}, cell {number}", namespace)
    plt.close("all")
