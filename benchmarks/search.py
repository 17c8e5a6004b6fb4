"""`python -m benchmarks.search [--trials N] [--risk core full] [--processes 1 2]`: trials a second of a whole search.

Seven of ten trials are quasi-random and go through the batch kernel and the rung, the others are proposed one by one; one
rebalance phase a trial; a journal file; two years of 36 symbols. Goals: 100 a second with `core`, 60 with `full`, on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import load_average, source
from benchmarks.works import ROWS, SYMBOLS, market
from xsmom_nb.backtest.prepared import prepare_run
from xsmom_nb.config import Config, with_values
from xsmom_nb.optimizer.search import Progress, Task, search
from xsmom_nb.optimizer.space import longest_warmup_bars, nearest_point
from xsmom_nb.optimizer.storage import open_storage
from xsmom_nb.optimizer.study import Terms

GOALS = {"core": 100.0, "full": 60.0}


def task_of(risk: str, trials: int, threads: int) -> tuple[Task, Terms]:
    "The work, its arrays prepared and its code compiled."
    panel = market(source(), ROWS, SYMBOLS)
    base = with_values(Config(), {"optimizer.trials": trials, "optimizer.phases": 1, "backtest.risk": risk})
    task = Task(prepare_run(panel, base), base, longest_warmup_bars(base), ROWS, threads=threads)
    task.scores([nearest_point(base)])
    return task, Terms.of(base, panel.digest(), int(panel.open_time_ms[task.first]), int(panel.open_time_ms[-1]), seed=5)


def searched(risk: str, trials: int, threads: int, journal: Path) -> dict[str, float]:
    "Search, and say how long the net and the sampler took."
    task, terms = task_of(risk, trials, threads)
    from scipy.stats import qmc  # noqa: F401  # two seconds that a run of many studies pays once

    reached: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        reached.append((time.perf_counter() - begin, progress.done))

    begin, cpu = time.perf_counter(), time.process_time()
    search(open_storage(None, journal), "measured", task, terms, [nearest_point(task.base)], note)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    net = next(at for at, done in reached if done >= round(0.7 * trials))
    return {"wall_s": wall, "cpu_s": cpu, "net_s": net, "sampler_s": wall - net}


def measured(risk: str, trials: int, processes: int) -> dict[str, Any]:
    "One search by so many processes on two cores."
    with tempfile.TemporaryDirectory() as scratch:
        child = [risk, str(trials), str(2 // processes), f"{scratch}/journal"]
        command = [sys.executable, "-m", "benchmarks.search", "--child", *child]
        crew = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in crew]
    wall, cpu = max(each["wall_s"] for each in answers), sum(each["cpu_s"] for each in answers)
    return {"risk": risk, "trials": trials, "processes": processes, "threads": 2 // processes, "source": source(),
            "per_second": trials / wall, "goal": GOALS[risk], "wall_s": wall, "cpu_s": cpu,
            "net_s": answers[0]["net_s"], "sampler_s": answers[0]["sampler_s"], "load_average": load_average()}


def main(arguments: list[str]) -> int:
    "A line of JSON for each search."
    if arguments[:1] == ["--child"]:
        risk, trials, threads, journal = arguments[1:]
        print(json.dumps(searched(risk, int(trials), int(threads), Path(journal))))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--risk", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    chosen = parser.parse_args(arguments)
    for risk in chosen.risk:
        for processes in chosen.processes:
            print(json.dumps(measured(risk, chosen.trials, processes)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
