"""The decision: one path with the backtest, deaf to the future, to order and to its surroundings, and quick."""

import ast
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from functools import cache

import house
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmom_nb.clock import SimulatedClock, parse_utc
from xsmom_nb.config import Config, load_config, with_values
from xsmom_nb.decide import decide
from xsmom_nb.decision import Memory, Snapshot, as_json, snapshot_as_json
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.files import canonical_json
from xsmom_nb.market.panel import FIELDS, Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import Account, Position
from xsmom_nb.strategy.core import core_weights, history_bars

HOUR = 3_600_000


def snapshot_at(recording: Panel, row: int, bars: int, positions: tuple[Position, ...] = (), market=None) -> Snapshot:
    "What the cycle sees one minute after the close of a row."
    now_ms = int(recording.open_time_ms[row]) + HOUR + 60_000
    window = recording.slice(int(recording.open_time_ms[max(0, row - bars + 1)]), int(recording.open_time_ms[row]))
    market = market or RecordedMarket(recording, SimulatedClock(now_ms), spread_bps=2.0)
    account = Account(*[Decimal(10_000)] * 3)
    return Snapshot(now_ms, window, account, positions, (), tuple(market.fetch_tickers()), tuple(market.fetch_instruments()))


def bytes_of(snapshot: Snapshot, config: Config, memory: Memory | None = None) -> bytes:
    return canonical_json(as_json(decide(snapshot, memory or Memory(), config)))


# ── One path ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["defaults", "shipped", "picky"])
def test_a_window_decides_as_the_full_history_over_500_real_hours(real_panel, root, name):
    shipped = load_config(root / "configs" / "config.yaml", environ={})
    choosy = {"filters.adx.enabled": True, "filters.regime.mode": "aligned", "universe.min_quote_volume": 5e7}
    picky = with_values(Config(), choosy)
    config = {"defaults": Config(), "shipped": shipped, "picky": picky}[name]
    rows = range(real_panel.shape[0] - 500, real_panel.shape[0])
    full = core_weights(real_panel, config)
    clock = SimulatedClock(int(real_panel.open_time_ms[rows[0]]) + HOUR + 60_000)
    market, worst, held = RecordedMarket(real_panel, clock, spread_bps=2.0), 0.0, 0.0
    for row in rows:
        clock.set(int(real_panel.open_time_ms[row]) + HOUR + 60_000)
        decision = decide(snapshot_at(real_panel, row, history_bars(config), market=market), Memory(), config)
        weights = np.array([decision.targets[symbol] for symbol in real_panel.symbols])
        worst, held = max(worst, float(np.abs(weights - full[row]).max())), held + float(np.abs(weights).sum())
    assert worst <= 1e-9
    assert held / len(rows) > 0.1  # the book was not empty, or the comparison would say nothing


# ── Deaf to the future, to order, to surroundings ────────────────────────────────────────────────────────────────────
@cache
def short_config() -> Config:
    "A config whose averages forget within the synthetic recording."
    quick = {"filters.regime.ema_len": 30, "strategy.lookbacks": [6, 12, 24, 48], "strategy.vol_lookback": 48}
    return with_values(Config(), quick)


@cache
def recording() -> Panel:
    return synthetic_panel(seed=11, bars=900, symbols=12)


@cache
def positions() -> tuple[Position, ...]:
    "Something held, on either side."
    names = recording().symbols
    prices = [Decimal(repr(float(price))) for price in recording().close[800]]
    sizes = [round(Decimal(500) / price, 3) * (-1) ** i for i, price in enumerate(prices[:6])]
    return tuple(Position(s, q, p, p) for s, q, p in zip(names, sizes, prices, strict=False) if q)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_future_does_not_matter(data):
    whole, row = recording(), data.draw(st.integers(500, 880), label="row decided")
    changed_row = data.draw(st.integers(row + 1, 899), label="row changed")
    column = data.draw(st.integers(0, 11), label="symbol")
    factor = data.draw(st.sampled_from([0.0, 0.5, 1000.0]), label="factor, 0: the bar is missing")
    values = {name: getattr(whole, name).copy() for name in FIELDS}
    for name in FIELDS:
        values[name][changed_row, column] *= factor if factor else np.nan
    altered = replace(whole, **values)
    bars = history_bars(short_config())
    assert bytes_of(snapshot_at(altered, row, bars), short_config()) == bytes_of(snapshot_at(whole, row, bars), short_config())


@given(st.permutations(range(12)), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_order_of_symbols_does_not_matter(order, seed):
    config, bars = short_config(), history_bars(short_config())
    asked = snapshot_at(recording(), 800, bars, positions())
    names = [asked.panel.symbols[i] for i in order]
    index = pd.to_datetime(asked.panel.open_time_ms, unit="ms", utc=True)
    frames = {}
    for symbol in names:
        i = asked.panel.symbols.index(symbol)
        frame = pd.DataFrame({"timestamp": index, **{name: getattr(asked.panel, name)[:, i] for name in FIELDS}})
        frames[symbol] = frame.dropna().reset_index(drop=True)
    built = replace(Panel.from_frames(frames), funding=asked.panel.funding, origin=asked.panel.origin)
    shuffle = np.random.default_rng(seed).permutation
    parts = {name: tuple(getattr(asked, name)[i] for i in shuffle(len(getattr(asked, name))))
             for name in ("positions", "tickers", "instruments")}
    assert bytes_of(replace(asked, panel=built, **parts), config) == bytes_of(asked, config)


ASK = """
import sys, json
from decimal import Decimal
import test_decide as t
snapshot = t.snapshot_at(t.recording(), 800, t.history_bars(t.short_config()), t.positions())
sys.stdout.buffer.write(t.bytes_of(snapshot, t.short_config()))
"""


@pytest.mark.parametrize("surroundings", [
    {"TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
    {"PYTHONHASHSEED": "77", "XSMOM_STRATEGY__KAPPA": "2.0", "NUMBA_NUM_THREADS": "1", "BYBIT_API_KEY": "x" * 20},
    {"NUMBA_DISABLE_JIT": "1", "PYTHONOPTIMIZE": "1"},
])
def test_the_surroundings_do_not_matter(surroundings, root, tmp_path):
    here = bytes_of(snapshot_at(recording(), 800, history_bars(short_config()), positions()), short_config())
    environment = {**os.environ, "PYTHONPATH": f"{root / 'tests'}:{root}", **surroundings}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    there = json.loads(done.stdout)
    if surroundings.get("NUMBA_DISABLE_JIT"):  # the same source, another compiler: equal to rounding, not to the bit
        expected = json.loads(here)
        assert there["targets"] == pytest.approx(expected["targets"], abs=1e-12)
        first_words = [[card["outcome"].split()[0] for card in each["cards"]] for each in (there, expected)]
        assert first_words[0] == first_words[1]
    else:
        assert done.stdout == here


# ── Pure ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
PURE_ROOMS = (
    "strategy", "risk", "execution.intents", "execution.plan", "decision", "decide", "market.universe", "exchange.fills")
HARMLESS = {"__future__", "collections", "dataclasses", "decimal", "functools", "hashlib", "math", "operator", "typing", "re",
            "numpy", "pandas", "talib", "pydantic", "pydantic_core", "numba"}
PURE_NAMES = {  # what may be taken from modules that also hold effects
    "clock": {"DAY_MS", "bars_per_day", "bars_per_year", "format_utc", "last_closed_open_ms", "timeframe_ms"},
    "config": {"Config", "require_built"},
    "files": {"canonical_json"},
    "compiled": {"njit", "stage"},
    "operations": {"Execution", "Costs"},
    "schema": {"Config"},
}


def impure_imports(module: str, source: str) -> list[str]:
    "Imports of a pure module that reach for a clock, for files, for the environment or for chance."
    findings = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            findings += [f"{module}: import {name}" for name in names if name.split(".")[0] not in HARMLESS]
        elif isinstance(node, ast.ImportFrom):
            above = ["xsmom_nb", *module.split(".")[:-1]]
            parents = above[: len(above) + 1 - node.level] if node.level else []
            target = ".".join([*parents, *filter(None, [node.module])])
            if target.split(".")[0] != "xsmom_nb":
                findings += [f"{module}: from {target}"] if target.split(".")[0] not in HARMLESS else []
                continue
            inside = target.removeprefix("xsmom_nb").lstrip(".")
            if inside in PURE_NAMES:
                findings += [f"{module}: {name} of {inside}" for name in names if name not in PURE_NAMES[inside]]
            elif not inside.startswith((*PURE_ROOMS, "ports", "errors", "market.panel")):
                findings.append(f"{module}: {inside}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "input", "print", "eval", "exec"):
            findings.append(f"{module}: calls {ast.unparse(node.func)}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "pd.Timestamp.now", "np.load"):
            findings.append(f"{module}: {ast.unparse(node)}")
    return findings


def test_nothing_below_decide_imports_clock_files_or_chance(root):
    package, findings, seen = root / "xsmom_nb", [], 0
    for module in sorted(house.default_exports(root)):
        if module.startswith(PURE_ROOMS):
            source = (package / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
            findings, seen = findings + impure_imports(module, source), seen + 1
    assert seen >= 14
    assert findings == []
    assert impure_imports("strategy.x", "import time\nfrom ..clock import SystemClock\nopen('x')\nnp.random.rand()") == [
        "strategy.x: import time", "strategy.x: SystemClock of clock", "strategy.x: calls open", "strategy.x: np.random"]


WATCHED = """
import random, sys, time
import numpy as np
import test_decide as t
snapshot = t.snapshot_at(t.recording(), 800, t.history_bars(t.short_config()), t.positions())
expected = t.bytes_of(snapshot, t.short_config())

def refuse(*arguments, **keywords):
    raise AssertionError("a clock or a dice was asked")

for name in ("time", "time_ns", "monotonic", "perf_counter", "sleep", "gmtime", "localtime"):
    setattr(time, name, refuse)
for name in ("random", "randint", "getrandbits"):
    setattr(random, name, refuse)
np.random.default_rng = np.random.rand = refuse

def watch(event, arguments):
    if event.split(".")[0] in ("open", "socket", "subprocess", "os", "sqlite3", "shutil", "tempfile", "urllib", "import", "exec"):
        sys.stderr.write(f"{event} {arguments}\\n")
        raise SystemExit(7)

sys.addaudithook(watch)
again = t.bytes_of(snapshot, t.short_config())
assert again == expected
"""


def test_decide_touches_neither_files_nor_clock_nor_chance(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{root / 'tests'}:{root}"}
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ── Quick ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_decision_with_reasons_takes_milliseconds(real_panel):
    config = Config()
    asked = snapshot_at(real_panel, real_panel.shape[0] - 1, history_bars(config))
    decide(asked, Memory(), config)
    spent = []
    for _ in range(50):
        begin = time.thread_time()  # of this thread, and the best of many, since other tests run beside this one
        decision = decide(asked, Memory(), config)
        spent.append(time.thread_time() - begin)
    assert len(decision.cards) == len(real_panel.symbols) >= 30
    beside_others = "PYTEST_XDIST_WORKER" in os.environ  # they share caches and cores
    assert min(spent) < (0.012 if beside_others else 0.005), f"{1000 * min(spent):.1f} ms"


def test_a_snapshot_is_the_same_after_a_round_trip(real_panel):
    asked = snapshot_at(real_panel, real_panel.shape[0] - 1, 300)
    assert parse_utc("2025-03-31T23:00:00Z") == asked.row_ms
    assert canonical_json(snapshot_as_json(asked)) == canonical_json(json.loads(canonical_json(snapshot_as_json(asked))))
