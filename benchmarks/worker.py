"""One engine in a process of its own: takes orders as lines of JSON, answers with lines of JSON. One thread of arithmetic."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "POLARS_MAX")}


def forget_peak() -> None:
    "Begin to look for the largest memory anew, where the system can: reading files and compiling are no part of a run."
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    "Largest resident memory of this process since `forget_peak`, or since its start, in MB."
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Worker:
    "The other end of the line: an engine in a child process."

    def __init__(self, engine: str) -> None:
        self.engine = engine
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", engine], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **order: Any) -> dict[str, Any]:
        "Send an order and wait for its answer; raises when the worker could not."
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine {self.engine} ended with status {self.process.wait()} at {order}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        "End the process."
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def serve(engine_name: str) -> None:
    "Answer orders until the line is closed: prepare a work, run it for a while, write the last equity."
    from benchmarks.engines import ENGINES
    from benchmarks.works import Work

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints must not be taken for an answer
    engine = ENGINES[engine_name]()
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "prepare" in order:
            engine.prepare(Work(**order["prepare"]))
            forget_peak()
        if "run" in order:
            answer["runs"], begin = [], time.perf_counter()
            while not answer["runs"] or time.perf_counter() - begin < order["run"]:
                answer["runs"].append(engine.run())
        if "equity" in order:
            np.save(order["equity"], engine.equity)
        print(json.dumps(answer | {"peak_mb": peak_mb()}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
