"""Everything that is measured, one function a section of the results."""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours
from benchmarks.contest import absent, contest, with_ratios
from benchmarks.engines import ENGINES, timed
from benchmarks.worker import ONE_THREAD, ROOT
from benchmarks.works import ROWS, SETTINGS, SYMBOLS, Work, has_market_data, parameter_sets

PACKAGES = ("numpy", "pandas", "numba", "vectorbt", "bt", "pyarrow", "SQLAlchemy")
Say = Callable[[str], None]
Rows = list[dict[str, Any]]


def processor() -> str:
    "The processor's name, where the system tells it."
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> str | None:
    "A package's version; None where it is absent."
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load_average() -> float:
    "Processes that wanted a core in the last minute."
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    "Where the figures come from, and how busy it was."
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor(), "cores": cores, "system": platform.system(), "python": platform.python_version(),
            "packages": {name: installed(name) for name in PACKAGES}, "commit": commit.stdout.strip() or None,
            "load_average": load_average()}  # fmt: skip


def source() -> str:
    "The real bars where there are some, else the seeded market; every row of the results says which."
    return "real" if has_market_data() else "synthetic"


# ── Engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def peers(quick: bool, say: Say) -> Rows:
    "All engines on both settings."
    rows: Rows = []
    for setting in SETTINGS:
        work = Work(setting, source=source(), first_rows=1_500 if quick else None)
        chosen = [name for name in ENGINES if not quick or name not in ("bt", "pandas loop")]
        rows += with_ratios(contest(work, chosen, 1 if quick else 7, 0.0 if quick else 0.3, say))
    return rows


def growth(quick: bool, say: Say) -> Rows:
    """In bars and in symbols, on the seeded market.

    Without costs: sixteen years of the defaults' costs leave an account too small for vectorbt's absolute tolerances.
    """
    sizes = [(factor, SYMBOLS) for factor in ((0.05, 0.1) if quick else (0.5, 1, 2, 4, 8))]
    sizes += [] if quick else [(1, 100), (1, 300)]
    rows: Rows = []
    for factor, symbols in sizes:
        work = Work("defaults, every bar", rows=round(ROWS * factor), symbols=symbols, source="synthetic", frictions="none")
        engines = ("kernel", "NumPy") if quick else ("kernel", "NumPy", "vectorbt")
        told = lambda text, work=work: say(f"{work.rows:,} × {work.symbols}, {text}")
        rows += with_ratios(contest(work, engines, 1 if quick else 3, 0.0 if quick else 0.2, told))
    return rows


def batch(quick: bool, say: Say) -> Rows:
    "Parameter sets a second, at 1 and 2 threads; each set's returns equal those of a run by itself."
    count, rows = (4, 1_500) if quick else (64, ROWS)
    work = Work("defaults, every bar", source=source(), first_rows=rows)
    panel, result = work.panel(), []
    for drawn, every in (("search space", None), ("search space, every bar", 1)):
        configs = [work.but(values=values).config() for values in parameter_sets(count, every_bars=every)]
        for risk in ("core", "full") if every is None else ("core",):
            say(f"batch of {count} from the {drawn}, {risk}")
            calls = {threads: ours.batch_run(panel, configs, risk, threads) for threads in (1, 2)}
            returns = {threads: call() for threads, call in calls.items()}
            np.testing.assert_array_equal(returns[1], returns[2])
            for place in (0, count - 1):
                equity = ours.prepared_run(panel, configs[place], risk)()
                np.testing.assert_allclose(np.cumprod(1.0 + returns[1][place]), equity / 10_000.0, rtol=1e-9)
            walls = {threads: [timed(call)[1].wall_ms for _ in range(1 if quick else 5)] for threads, call in calls.items()}
            for threads, taken in walls.items():
                result.append({
                    "sets": count, "drawn": drawn, "risk": risk, "threads": threads, "bars": rows, "symbols": SYMBOLS,
                    "median_per_second": 1e3 * count / statistics.median(taken), "best_per_second": 1e3 * count / min(taken)})
    return result


# ── Starts ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_child(command: list[str], environment: dict[str, str] | None = None) -> tuple[str, float, float]:
    "What a command prints, its processor time and its wall time in ms; raises when it fails."
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    full = {**os.environ, **ONE_THREAD, "PYTHONPATH": paths, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=full, check=True, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, 1e3 * cpu, 1e3 * wall


def probe(name: str, *arguments: object, **environment: str) -> dict[str, Any]:
    "The answer of one of `probes`, from a fresh process."
    printed = run_child([sys.executable, "-m", "benchmarks.probes", name, *map(str, arguments)], environment)[0]
    return json.loads(printed.splitlines()[-1])


def imports(quick: bool, say: Say) -> Rows:
    "Whole processes, from start to end, in turn."
    code = ("pass", "import pandas", "import xsmom_nb.strategy.core")
    commands = {text: [sys.executable, "-c", text] for text in code}
    commands["xsmom --help"] = [str(Path(sys.executable).with_name("xsmom")), "--help"]
    for package in ("vectorbt", "bt"):
        if absent(package) is None:
            commands[f"import {package}"] = [sys.executable, "-W", "ignore", "-c", f"import {package}"]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(1 if quick else 7):
        for name, command in commands.items():
            say(f"start {turn + 1}: {name}")
            taken[name].append(run_child(command)[1:])
    return [{"what": name, "median_ms": statistics.median(cpu for cpu, _ in times), "min_ms": min(cpu for cpu, _ in times),
             "wall_median_ms": statistics.median(wall for _, wall in times), "wall_min_ms": min(wall for _, wall in times),
             "runs": len(times)} for name, times in taken.items()]  # fmt: skip


def first_calls(quick: bool, say: Say) -> Rows:
    "The first call in a process: with an empty cache of compiled code, and with a filled one."
    rows, names = [], {"this engine": ("first_call", "XSMOM_CACHE_DIR")}
    if absent("vectorbt") is None and not quick:
        names["vectorbt"] = ("vectorbt_first_call", "NUMBA_CACHE_DIR")
    for engine, (name, variable) in names.items():
        with tempfile.TemporaryDirectory() as cache:
            say(f"first call of {engine}, compiling")
            cold = probe(name, **{variable: cache})
            say(f"first call of {engine}, from its cache")
            warm = [probe(name, **{variable: cache}) for _ in range(1 if quick else 3)]
        rows.append({"engine": engine, "compiling_ms": cold["first_call_ms"], "runs": len(warm),
                     "cached_median_ms": statistics.median(each["first_call_ms"] for each in warm),
                     "import_median_ms": statistics.median(each["import_ms"] for each in warm)})
    return rows


# ── Live ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def decisions(quick: bool, say: Say) -> Rows:
    "The decision of an hour, with reasons."
    say("live decisions")
    taken = probe("decision", source(), 20 if quick else 300)
    return [{"setting": setting, "symbols": SYMBOLS, "median_ms": statistics.median(cpu for cpu, _ in times),
             "min_ms": min(cpu for cpu, _ in times), "wall_median_ms": statistics.median(wall for _, wall in times),
             "runs": len(times)} for setting, times in taken.items()]  # fmt: skip


def replays(quick: bool, say: Say) -> Rows:
    "The live code, hour by hour, on the paper exchange."
    say("replay")
    taken = probe("replay", source(), 12 if quick else 240)
    return [{"setting": setting, "cycles": each["hours"], "ms_per_cycle": each["cpu_ms"] / each["hours"],
             "wall_ms_per_cycle": each["wall_ms"] / each["hours"],
             "cycles_per_second": 1e3 * each["hours"] / each["cpu_ms"]} for setting, each in taken.items()]


def scheduled_run(quick: bool, say: Say) -> Rows:
    "One audited live cycle: a fresh process, the notebook, its plots, the HTML, the manifest."
    if quick:
        return []
    taken, account = [], "benchmark"
    for turn in range(3):
        say(f"scheduled live run {turn + 1}")
        with tempfile.TemporaryDirectory() as scratch:
            places = [f'runs.root="{scratch}/runs"', f'live.state_url="sqlite:///{scratch}/state.sqlite"']
            options = [part for place in places for part in ("--set", place)]
            command = [str(Path(sys.executable).with_name("xsmom")), "live", "--cycles", "1", "--fresh", "--account", account]
            try:
                taken.append(run_child([*command, *options])[1:])
            finally:
                shutil.rmtree(ROOT / "state" / "accounts" / account, ignore_errors=True)
    warm = taken[1:]
    return [{"median_ms": statistics.median(cpu for cpu, _ in warm), "min_ms": min(cpu for cpu, _ in warm),
             "wall_min_ms": min(wall for _, wall in warm), "first_ms": taken[0][0], "runs": len(warm)}]
