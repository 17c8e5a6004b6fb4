"""A small market, a small account, a line that a test may spoil; and the audit of what is left."""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any


import numpy as np

from xsmom_nb.clock import SimulatedClock
from xsmom_nb.config import Config, with_values
from xsmom_nb.decision import DayOfEquity, Decided, Decision, Memory, as_json, from_json
from xsmom_nb.exchange.paper import PaperExchange
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.execution.execute import send_intents
from xsmom_nb.execution.intents import Intent, link_id
from xsmom_nb.execution.journal import held_quantities
from xsmom_nb.execution.reconcile import book_news
from xsmom_nb.files import canonical_json
from xsmom_nb.live.cycle import CycleReport
from xsmom_nb.live.desk import Desk, open_desk
from xsmom_nb.live.guard import GuardReport, guard_once
from xsmom_nb.live.history import History
from xsmom_nb.live.memory import follow, recall, remember
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import OrderRequest, Submission, TransientError
from xsmom_nb.risk.exits import Tick
from xsmom_nb.risk.tracking import SymbolRisk, Yardstick
from xsmom_nb.state import check, export, open_state

HOUR = 3_600_000
ROW = 200  # of the recording: the one that is decided in hour 0
MARKET = {"execution.order_type": "market", "paper.participation": 0.1}  # settings under which everything fills at once


@cache
def recording() -> Panel:
    return synthetic_panel(seed=3, bars=400, symbols=8)


def quick(folder: Path, **changes: Any) -> Config:
    "A config whose averages forget within 150 bars, and whose orders need some hours to fill."
    averages = {"filters.regime.ema_len": 5, "filters.regime.slope_bars": 4, "strategy.lookbacks": [2, 4, 8, 16],
                "strategy.vol_lookback": 24, "live.history_bars": 150, "paper.participation": 1e-5}
    places = {"live.state_url": f"sqlite:///{folder}/state.sqlite", "paper.account_url": f"sqlite:///{folder}/paper.sqlite",
              "live.emergency_stop_file": f"{folder}/STOP"}
    return with_values(Config(), averages | places | changes)


def time_of(hour: int) -> int:
    "A minute after the close of the row that is decided in an hour."
    return int(recording().open_time_ms[ROW + hour]) + HOUR + 60_000


class Memo:
    "A recorder that keeps decisions in a folder, a file an hour."

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "decisions"
        self.folder.mkdir(exist_ok=True)

    def record(self, decided: Decided) -> None:
        (self.folder / f"{decided.decision.row_ms}.json").write_bytes(canonical_json(as_json(decided.decision)))


def decisions_of(folder: Path) -> dict[int, Decision]:
    "What was decided, by row."
    paths = sorted((folder / "decisions").iterdir())
    return {int(path.stem): from_json(Decision, json.loads(path.read_bytes())) for path in paths}


def targets_of(folder: Path) -> dict[int, dict[str, float]]:
    "What the core wanted, by row; it depends on the market alone."
    return {row: dict(decision.targets) for row, decision in decisions_of(folder).items()}


def trade(folder: Path, hours: Sequence[int], changes: dict[str, Any]) -> list[CycleReport]:
    "Trade some hours, and look at the books after the last one."
    reports = []
    with open_desk(quick(folder, **changes), recording=recording(), now_ms=time_of(hours[0]), base=folder) as desk:
        for hour in hours:
            desk.clock.set(time_of(hour))
            (folder / "hour").write_text(str(hour))
            reports.append(desk.cycle(Memo(folder)))
        audit(desk, folder)
    return reports


def audit(desk: Desk, folder: Path) -> None:
    "Assert that state and account tell the same story, to the last fill and the last cent."
    assert check(desk.state) == []
    tables, fills, entries = export(desk.state), desk.port.fetch_fills(0), desk.port.fetch_ledger(0)
    with sqlite3.connect(folder / "paper.sqlite") as account:
        orders = dict(account.execute("SELECT link_id, order_id FROM orders"))
        (accepted,) = account.execute("SELECT accepted FROM account").fetchone()
    account.close()
    assert len(set(orders.values())) == len(orders) == accepted, "two orders of one name"
    by_order = {(fill.link_id, fill.order_id) for fill in fills if fill.link_id}
    assert len({link_id for link_id, _ in by_order}) == len(by_order), "two orders of one name have filled"
    assert orders.keys() == {row["link_id"] for row in tables["intents"] if row["status"] in ("accepted", "closed")}

    booked: dict[str, Decimal] = {}
    for fill in fills:
        booked[fill.symbol] = booked.get(fill.symbol, Decimal(0)) + fill.signed_quantity
    with desk.state.read() as connection:
        believed = held_quantities(connection)
    held = {position.symbol: position.quantity for position in desk.port.fetch_positions()}
    assert believed == held == {symbol: quantity for symbol, quantity in sorted(booked.items()) if quantity}
    assert {row["fill_id"] for row in tables["fills"]} == {fill.fill_id for fill in fills}
    assert {row["entry_id"] for row in tables["ledger"]} == {entry.entry_id for entry in entries}

    parts = [Decimal(row["pnl"]) for row in tables["trades"]]
    parts += [Decimal(row["realized"]) - Decimal(row["fees"]) - Decimal(row["funding"]) for row in tables["positions"]]
    earned = sum(entry.amount for entry in entries if entry.kind != "transfer")
    assert abs(sum(parts) - earned) < Decimal("1e-6"), "trades and positions do not explain the wallet"
    assert recall(desk.state).last_row_ms == desk.clock.now_ms() // HOUR * HOUR - HOUR


class Line:
    "The line to the exchange, on which a test listens, and which it spoils."

    def __init__(self, port: Any) -> None:
        self.port = port
        self.posts: list[OrderRequest] = []
        self.calls: list[str] = []
        self.deaf: dict[str, float] = {}  # how many of the next reads fail, by name
        self.spoilt: dict[str, Callable[..., Any]] = {}  # answer and arguments -> another answer, by name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def read(*arguments: Any) -> Any:
            self.calls.append(name)
            if self.deaf.get(name, 0) > 0:
                self.deaf[name] -= 1
                raise TransientError(f"{name}: connection lost")
            answer = getattr(self.port, name)(*arguments)
            return self.spoilt[name](answer, *arguments) if name in self.spoilt else answer

        return read

    def submit_order(self, request: OrderRequest) -> Submission:
        self.posts.append(request)
        spoil = self.spoilt.get("submit_order")
        return spoil(request) if spoil else self.port.submit_order(request)

    def without(self, name: str, symbol: str) -> None:
        "Leave a symbol out of a list."
        self.spoilt[name] = lambda answer, *_: [each for each in answer if each.symbol != symbol]


def patient(_: float) -> None:
    "Do not sleep."


@contextmanager
def desk_with_line(folder: Path, hour: int = 0, **changes: Any) -> Iterator[tuple[Desk, Line]]:
    "A desk whose line to the exchange can be spoilt."
    config = quick(folder, **changes)
    with open_desk(config, recording=recording(), now_ms=time_of(hour), base=folder) as desk:
        line = Line(desk.port)
        history = History(line, "1h", config.live.history_bars, origin=desk.origin, sleep=patient)
        yield replace(desk, port=line, history=history), line


def next_hour(desk: Desk, folder: Path) -> CycleReport:
    "The next hour's cycle."
    clock: Any = desk.clock
    row = desk.clock.now_ms() // HOUR * HOUR
    clock.set(row + HOUR + 60_000)
    return desk.cycle(Memo(folder))


def held_in(report: CycleReport) -> dict[str, Decimal]:
    return {position.symbol: position.quantity for position in report.positions_after}


def card_of(report: CycleReport, symbol: str) -> Any:
    return next(card for card in report.decided.decision.cards if card.symbol == symbol)


# ── One symbol, written by hand ──────────────────────────────────────────────────────────────────────────────────────
COIN = "AAAUSDT"
FLAT = (100.0, 100.0, 100.0, 100.0)


class Bench:
    "A paper account with ten coins bought at 100 in hour 1, an ATR of 2, and a guard that is called every hour."

    def __init__(self, folder: Path, hours: Sequence[tuple[float, ...]], hour: int = 1, **changes: Any) -> None:
        where = {"live.state_url": f"sqlite:///{folder}/state.sqlite", "paper.account_url": f"sqlite:///{folder}/paper.sqlite",
                 "costs.impact_coef": 0.0, "paper.spread_bps": 0.0}
        self.config = with_values(Config(), where | changes)
        columns = [np.array([bar[k] for bar in (FLAT, *hours)])[:, None] for k in range(4)]
        opens = np.arange(len(hours) + 1) * HOUR
        panel = Panel((COIN,), opens, *columns, np.full_like(columns[0], 1e6), np.zeros_like(columns[0]))
        self.clock: Any = SimulatedClock(hour * HOUR + 60_000)
        self.port: Any = PaperExchange(RecordedMarket(panel, self.clock, 0.0), self.clock, self.config)
        self.state = open_state(self.config.live.state_url)
        book_news(self.port, self.state, self.clock.now_ms())

    def begin(self, quantity: int = 10, slope: float | None = None) -> "Bench":
        "Buy, or sell, and let the guard protect it."
        self.decided(0, slope)
        side: Any = "Buy" if quantity > 0 else "Sell"
        name = link_id(0, COIN, "open")
        request = OrderRequest(name, COIN, side, "Market", Decimal(abs(quantity)), None, "IOC", reduce_only=False)
        send_intents(self.port, self.state, [Intent(request, "open")], 0, "run", {}, frozenset(), self.clock, self.config)
        self.guard()
        return self

    def decided(self, hour: int, slope: float | None = None, average: float | None = None) -> None:
        "Leave what a decision on the bar of an hour would leave."
        days = (DayOfEquity(0, *[Decimal(10_000)] * 3),)
        yardsticks = {COIN: Yardstick(2.0, slope, average)}
        left = Memory(last_row_ms=hour * HOUR, decided_ms=(hour + 1) * HOUR + 60_000, days=days, yardsticks=yardsticks)
        remember(self.state, left, self.clock.now_ms())

    def guard(self, bars: Any = None) -> GuardReport:
        return guard_once(self.port, self.state, self.clock, self.config, bars or {})

    def hour(self) -> GuardReport:
        "Let an hour pass, and call the guard with its bar."
        row = self.clock.now_ms() // HOUR
        self.clock.set((row + 1) * HOUR)
        (bar,) = self.port.fetch_bars(COIN, "1h", row * HOUR, 1)
        return self.guard({COIN: [Tick.of_bar(bar, HOUR)]})

    @property
    def risk(self) -> SymbolRisk:
        follow(self.state, self.config, self.clock.now_ms())
        return recall(self.state).risk.symbols[COIN]

    def close(self) -> None:
        self.port.close()
        self.state.close()
