"""Engines against each other on one work: first the equities, then the time, in turn, A B C A B C."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import ENGINES, NEEDS
from benchmarks.worker import Worker
from benchmarks.works import Work

TOLERANCE = 1e-9  # of every bar's equity, relative
LOOP_ROWS = 2_000  # for the pandas loop; the whole of it would take minutes
BT_ROWS = 4_000  # whose equity is compared with bt's; its time is taken over all
SLOW = {"bt": 1, "pandas loop": 1}  # rounds these take part in
Say = Callable[[str], None]


def absent(engine: str) -> str | None:
    "Why an engine cannot be measured here; None when it can."
    package = NEEDS.get(engine)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"not installed: {package} comes with the extra `bench`"
    return None


def own_work(engine: str, work: Work) -> Work:
    "The work as this engine gets it: the loop is given its beginning only."
    rows = work.first_rows or work.rows
    return work.but(first_rows=min(rows, LOOP_ROWS)) if engine == "pandas loop" else work


def equity_of(worker: Worker, work: Work, folder: Path) -> np.ndarray:
    "The equity curve an engine computes."
    path = folder / "equity.npy"
    worker.ask(prepare=work.as_json(), run=0.0, equity=str(path))
    return np.load(path)


def equity_error(worker: Worker, kernel: Worker, work: Work, folder: Path) -> tuple[float, str]:
    "Largest relative difference from our kernel's equity on the same work, and under which frictions; raises past the tolerance."
    engine = ENGINES[worker.engine]
    frictions = work.frictions if work.frictions != "all" else engine.compared_under or "all"
    checked = own_work(worker.engine, work).but(frictions=frictions)
    if worker.engine == "bt":
        checked = checked.but(first_rows=min(checked.first_rows or checked.rows, BT_ROWS))
    theirs, ours = equity_of(worker, checked, folder), equity_of(kernel, checked, folder)
    assert theirs.shape == ours.shape == (checked.first_rows or checked.rows,), (worker.engine, theirs.shape, ours.shape)
    error = float(np.abs(theirs / ours - 1.0).max())
    traded = float(np.ptp(ours)) / float(ours[0])
    assert traded > 1e-3, f"the equity moves by {traded:.1e}: an empty book would agree with everything"
    if engine.compared_under and not error <= TOLERANCE:
        raise AssertionError(f"{worker.engine}, {work.setting}, frictions: {frictions}: equity differs by {error:.1e}, "
                             f"expected at most {TOLERANCE:.0e}; no time is taken of work that is not the same")
    return error, frictions


def summary(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    "Median and minimum of the processor time of all parts together, median of the wall time, and of each part."
    cpu, wall = ([sum(part[clock] for part in run.values()) for run in runs] for clock in (0, 1))
    parts = {name: statistics.median(run[name][0] for run in runs) for name in runs[0]}
    return {"median_ms": statistics.median(cpu), "min_ms": min(cpu), "wall_median_ms": statistics.median(wall),
            "wall_min_ms": min(wall), "runs": len(runs), "parts_ms": parts}


def contest(
    work: Work,
    engines: Iterable[str],  # names of `ENGINES`, the kernel among them
    rounds: int,
    seconds: float,  # each engine runs at least so long in its turn
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:  # a row an engine; an absent one says why
    "Check equities, then take time."
    rows, present = [], []
    for engine in engines:
        reason = absent(engine)
        base = {"setting": work.setting, "engine": engine, "bars": own_work(engine, work).first_rows or work.rows,
                "symbols": work.symbols, "source": work.source}
        rows.append(base | ({"absent": reason} if reason else {}))
        present += [] if reason else [rows[-1]]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        workers = {row["engine"]: stack.enter_context(Worker(row["engine"])) for row in present}
        for row in present:
            say(f"{work.setting}: equity of {row['engine']}")
            error, frictions = equity_error(workers[row["engine"]], workers["kernel"], work, Path(scratch))
            same = ENGINES[row["engine"]].compared_under is not None
            row |= {"equity_error": error, "frictions_compared": frictions, "same_equity": same}
        taken: dict[str, list[dict[str, list[float]]]] = {name: [] for name in workers}
        for name, worker in workers.items():
            worker.ask(prepare=own_work(name, work).as_json())
        for turn in range(rounds):
            for name, worker in workers.items():
                if turn < SLOW.get(name, rounds):
                    say(f"{work.setting}: round {turn + 1} of {rounds}, {name}")
                    answer = worker.ask(run=seconds)
                    taken[name] += answer["runs"]
        for row in present:
            row |= summary(taken[row["engine"]]) | {"peak_mb": workers[row["engine"]].ask()["peak_mb"]}
            row["what"] = ENGINES[row["engine"]].__doc__
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "The same rows with the time for all bars, extrapolated where only the beginning was run, as a multiple of the kernel's."
    kernel = next(row for row in rows if row["engine"] == "kernel")
    for row in rows:
        if "median_ms" in row:
            row["extrapolated"] = row["bars"] != kernel["bars"]
            row["whole_ms"] = row["median_ms"] * kernel["bars"] / row["bars"]
            row["times_kernel"] = row["whole_ms"] / kernel["median_ms"]
    return rows
