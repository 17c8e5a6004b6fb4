"""What is measured in a fresh process each time: `python -m benchmarks.probes NAME …` prints one line of JSON."""

import json
import sys
import time
from typing import Any


def first_call() -> dict[str, float]:
    "Imports up to the kernel, and its first call, over a small market."
    begin = time.process_time()
    import numpy as np

    from benchmarks.ours import prepared_run
    from benchmarks.works import Work

    imported = time.process_time()
    work = Work("defaults, every bar", rows=400, source="synthetic")
    panel, config = work.panel(), work.config()
    made = time.process_time()
    assert np.isfinite(prepared_run(panel, config)()).all()
    return {"import_ms": 1e3 * (imported - begin), "first_call_ms": 1e3 * (time.process_time() - made)}


def vectorbt_first_call() -> dict[str, float]:
    "The same of vectorbt."
    import warnings

    begin = time.process_time()
    import numpy as np
    import pandas as pd

    warnings.simplefilter("ignore")
    import vectorbt

    imported = time.process_time()
    close = pd.DataFrame(100.0 * np.exp(np.random.default_rng(1).normal(0.0, 0.01, (400, 4)).cumsum(axis=0)))
    portfolio = vectorbt.Portfolio.from_orders(
        close, 0.2, size_type="targetpercent", fees=0.001, freq="1h", cash_sharing=True, group_by=True, call_seq="auto")
    assert np.isfinite(portfolio.value()).all()
    return {"import_ms": 1e3 * (imported - begin), "first_call_ms": 1e3 * (time.process_time() - imported)}


def decision(source: str, repeats: str) -> dict[str, Any]:
    "Live decisions for 36 symbols, everything warm."
    from benchmarks.engines import timed
    from benchmarks.ours import live_decision
    from benchmarks.works import SETTINGS, Work

    taken = {}
    for setting in SETTINGS:
        work = Work(setting, rows=6_000, source=source)
        call = live_decision(work.panel(), work.config())
        call()
        taken[setting] = [timed(call)[1] for _ in range(int(repeats))]
    return taken


def replay(source: str, hours: str) -> dict[str, Any]:
    "Hours through the live cycle and its guard on the paper exchange, five-minute bars inside; the first dozen warms up."
    from benchmarks.engines import timed
    from benchmarks.ours import replayed_hours
    from benchmarks.works import SETTINGS, Work, inner_bars

    taken, inner = {}, inner_bars(source)
    for setting in SETTINGS:
        work = Work(setting, rows=8_760, source=source)
        replayed_hours(work.panel(), inner, work.config(), 12)()
        count, elapsed = timed(replayed_hours(work.panel(), inner, work.config(), int(hours)))
        taken[setting] = {"hours": count, "cpu_ms": elapsed.cpu_ms, "wall_ms": elapsed.wall_ms}
    return taken


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps({"first_call": first_call, "vectorbt_first_call": vectorbt_first_call, "decision": decision,
                      "replay": replay}[name](*arguments)))  # fmt: skip
