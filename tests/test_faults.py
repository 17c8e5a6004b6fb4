"""Faults on purpose, in whole cycles: killed anywhere, lied to, cut off. Account and state tell the same story afterwards."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xsmom_nb.config import Config, with_values
from xsmom_nb.decision import Decided, Decision, as_json, from_json
from xsmom_nb.errors import DataError, RefusedError, StateError, XsmomError
from xsmom_nb.exchange import paper
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.execution import reconcile
from xsmom_nb.execution.execute import CRASH_POINTS, CRASH_VARIABLE
from xsmom_nb.execution.journal import held_quantities
from xsmom_nb.files import canonical_json
from xsmom_nb.live import cycle
from xsmom_nb.live import desk as desk_module
from xsmom_nb.live.cycle import CycleReport, recall
from xsmom_nb.live.desk import Desk, open_desk
from xsmom_nb.live.history import History
from xsmom_nb.market.panel import FIELDS, Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import Account, OrderRequest, Submission, TransientError
from xsmom_nb.state import check, export, open_state

HOUR = 3_600_000
ROW = 200  # of the recording: the one that is decided in hour 0
KILLED = 137  # exit status of a process that ends as a kill would end it
READS = ("fetch_time_ms", "fetch_open_orders", "fetch_positions", "fetch_fills", "fetch_ledger", "fetch_instruments",
         "fetch_bars", "fetch_funding", "fetch_tickers", "fetch_account")


# ── A small market, a small account ──────────────────────────────────────────────────────────────────────────────────
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


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(reconcile, "FIRST_PAUSE_SECONDS", 0.0001)


# ── Processes that die ───────────────────────────────────────────────────────────────────────────────────────────────
CRASH_HOUR, LAST_HOUR = 3, 9
FAMILY = multiprocessing.get_context("forkserver")  # a server that has imported what children need, so that they begin at once
FAMILY.set_forkserver_preload(["xsmom_nb.live.desk", "xsmom_nb.market.synthetic", "sqlalchemy.dialects.sqlite", "pytest"])
KILLS: dict[str, tuple[Any, str, str]] = {  # where a process is killed that has no crash point there: what, and when
    "settling intents": (reconcile, "settle_intents", "after"),
    "after a cancellation": (paper.PaperExchange, "cancel_order", "after"),
    "noting a cancelled order": (reconcile, "_note_ended", "after"),
    "booking fills": (reconcile, "book_fills", "after"),  # inside the transaction
    "booking funding": (reconcile, "book_ledger", "before"),
    "comparing positions": (reconcile, "differences", "before"),
    "recording": (cycle, "decide", "after"),
    "before execution": (cycle, "carry_out", "before"),
    "after execution": (cycle, "carry_out", "after"),
    "before persisting": (cycle, "persist", "before"),
    "while persisting": (cycle, "save_equity", "after"),  # inside the transaction
}


def arm(point: str) -> None:
    "Make this process die at a point."
    if point in CRASH_POINTS:
        os.environ[CRASH_VARIABLE] = point
        return
    owner, name, when = KILLS[point]
    original = getattr(owner, name)

    def dying(*arguments: Any, **keywords: Any) -> None:
        if when == "after":
            original(*arguments, **keywords)
        os._exit(KILLED)

    setattr(owner, name, dying)


def die(folder: Path, point: str, changes: dict[str, Any]) -> None:
    "Take over an account and die in its next hour."
    arm(point)
    trade(folder, [CRASH_HOUR], changes)


def run_apart(target: Callable[..., None], *arguments: Any) -> int:
    "Run something in a process of its own; returns its exit status."
    process = FAMILY.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    status = process.exitcode
    process.close()
    return status


MARKET = {"execution.order_type": "market", "paper.participation": 0.1}
KINDS = {"limit": {}, "market": MARKET}


@pytest.fixture(scope="module")
def accounts(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    "An account before the hour of the crash, and the same one hours later, undisturbed; by kind of order."

    @cache
    def accounts(kind: str) -> tuple[Path, Path]:
        before, after = (tmp_path_factory.mktemp(kind) / name for name in ("before", "after"))
        before.mkdir()
        trade(before, range(CRASH_HOUR), KINDS[kind])
        shutil.copytree(before, after)
        for hour in range(CRASH_HOUR, LAST_HOUR):
            trade(after, [hour], KINDS[kind])
        return before, after

    return accounts


LIMIT_POINTS = [("limit", point) for point in (*CRASH_POINTS, *KILLS)]
MARKET_POINTS = [("market", point) for point in (*CRASH_POINTS, "booking fills", "after execution")]  # nothing to cancel there


@pytest.mark.parametrize(("kind", "point"), [*LIMIT_POINTS, *MARKET_POINTS])
def test_killed_anywhere_and_started_again(accounts, kind, point, tmp_path):
    (before, undisturbed), changes = accounts(kind), KINDS[kind]
    crashed, later = tmp_path / "crashed", tmp_path / "later"
    shutil.copytree(before, crashed)
    assert run_apart(die, crashed, point, changes) == KILLED
    shutil.copytree(crashed, later)
    reports = trade(crashed, range(CRASH_HOUR, LAST_HOUR), changes)  # started again at once
    trade(later, range(CRASH_HOUR + 3, LAST_HOUR), changes)  # nobody noticed for three hours
    for folder in (crashed, later):
        assert targets_of(folder).items() <= targets_of(undisturbed).items()
    if point == "after_commit_before_post":  # it cannot be known yet that the order never left
        assert len(reports[0].recovery.settled.frozen) == 1
        assert len(reports[1].recovery.settled.lost) == 1
    elif kind == "limit":
        assert decisions_of(crashed) == decisions_of(undisturbed)  # to the last order, although it was killed


def trade_on(folder: Path, first_hour: int) -> None:
    "Trade hour after hour, until the recording or the process ends."
    trade(folder, range(first_hour, 400 - ROW), {})


def test_killed_at_any_instant_twenty_times(tmp_path):
    rng, hours = random.Random(11), [0]
    for _ in range(20):
        process = FAMILY.Process(target=trade_on, args=(tmp_path, hours[-1]))
        process.start()
        time.sleep(rng.uniform(0.0, 1.2))  # some die before they have opened anything, most amid their cycles
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        process.close()
        if (tmp_path / "hour").exists():
            hours.append(int((tmp_path / "hour").read_text() or hours[-1]))
    assert hours[-1] >= 10, f"hardly anything was killed: {hours}"
    trade(tmp_path, range(hours[-1], hours[-1] + 6), {})
    assert len(decisions_of(tmp_path)) >= hours[-1]
    reference = tmp_path / "reference"
    reference.mkdir()
    trade(reference, range(6), {})
    assert targets_of(reference).items() <= targets_of(tmp_path).items()


# ── Two at a time ────────────────────────────────────────────────────────────────────────────────────────────────────
def knock(folder: Path) -> None:
    "Try to trade an account."
    try:
        trade(folder, [0], {})
    except XsmomError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_status)


def occupy(folder: Path) -> None:
    "Hold an account until killed."
    with open_desk(quick(folder), recording=recording(), now_ms=time_of(0), base=folder) as desk:
        desk.cycle(Memo(folder))
        (folder / "inside").touch()
        time.sleep(60)


def test_a_second_trader_is_turned_away_and_takes_over_when_the_first_is_dead(tmp_path):
    process = FAMILY.Process(target=occupy, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "inside").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    sent = posts_of(tmp_path)
    with pytest.raises(RefusedError, match=f"kill {process.pid}") as refused:
        trade(tmp_path, [1], {})
    assert refused.value.exit_status == 3
    assert run_apart(knock, tmp_path) == 3
    assert posts_of(tmp_path) == sent != []
    process.kill()
    process.join()
    process.close()
    trade(tmp_path, range(1, 4), {})


def posts_of(folder: Path) -> list[str]:
    "Names of the orders that the paper exchange has accepted, in that order."
    with sqlite3.connect(folder / "paper.sqlite") as account:
        names = [name for (name,) in account.execute("SELECT link_id FROM orders ORDER BY number")]
    account.close()
    return names


# ── A line that fails and lies ───────────────────────────────────────────────────────────────────────────────────────
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


@pytest.fixture
def market_account(tmp_path) -> Path:
    "An account that holds most symbols, filled at market, at the end of hour 2."
    trade(tmp_path, range(3), MARKET)
    return tmp_path


def held_in(report: CycleReport) -> dict[str, Decimal]:
    return {position.symbol: position.quantity for position in report.positions_after}


def card_of(report: CycleReport, symbol: str) -> Any:
    return next(card for card in report.decided.decision.cards if card.symbol == symbol)


@pytest.mark.parametrize("name", READS)
def test_reads_are_repeated_and_when_they_fail_for_good_the_hour_is_left_out(tmp_path, name):
    with desk_with_line(tmp_path) as (desk, line):
        desk.cycle(Memo(tmp_path))
        first = list(line.posts)
        line.deaf[name] = 2
        report = next_hour(desk, tmp_path)
        assert len(line.posts) > len(first)
        assert (line.deaf[name], report.decided.decision.row_ms) == (0, int(recording().open_time_ms[ROW + 1]))
        before = list(line.posts)
        line.deaf[name] = math.inf
        with pytest.raises(TransientError, match=name):
            next_hour(desk, tmp_path)
        assert line.posts == before  # not one order without having seen everything
        line.deaf.clear()
        next_hour(desk, tmp_path)
        assert len(line.posts) > len(before)
        audit(desk, tmp_path)


def test_a_clock_ten_seconds_off_ends_the_cycle_before_it_begins(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        for error_ms in (10_000, -10_000):
            line.spoilt["fetch_time_ms"] = lambda now_ms, error_ms=error_ms: now_ms + error_ms
            with pytest.raises(RefusedError, match="set this machine's clock"):
                desk.cycle(Memo(tmp_path))
        assert set(line.calls) == {"fetch_time_ms"}
        line.spoilt.clear()
        assert next_hour(desk, tmp_path).sent


def test_an_hour_in_which_every_answer_is_lost(tmp_path):
    "The orders arrive, nobody says so, and nobody can be asked; the symbols freeze, and thaw when the line is back."
    with desk_with_line(tmp_path) as (desk, line):
        desk.cycle(Memo(tmp_path))
        known = len(line.posts)

        def lose(request: OrderRequest) -> Submission:
            line.port.submit_order(request)
            line.deaf["find_order"] = math.inf
            return Submission("unknown", reason="time-out")

        line.spoilt["submit_order"] = lose
        report = next_hour(desk, tmp_path)
        names = [request.link_id for request in line.posts[known:]]
        assert names
        assert {sent.outcome for sent in report.sent} <= {"unknown", "dropped"}
        with pytest.raises(TransientError):
            desk.cycle(Memo(tmp_path))  # as long as it cannot ask, it does nothing
        assert [request.link_id for request in line.posts[known:]] == names
        line.deaf.clear()
        line.spoilt.clear()
        report = next_hour(desk, tmp_path)
        assert set(report.recovery.settled.adopted) == set(names)
        assert report.recovery.frozen == frozenset()
        assert len({request.link_id for request in line.posts}) == len(line.posts)
        audit(desk, tmp_path)


def test_an_hour_in_which_no_order_arrives(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        line.spoilt["submit_order"] = lambda _: Submission("unknown", reason="time-out")
        report = desk.cycle(Memo(tmp_path))
        names, symbols = {each.link_id for each in line.posts}, {each.symbol for each in line.posts}
        assert {sent.outcome for sent in report.sent} == {"unknown"}
        again = desk.cycle(Memo(tmp_path))  # still the same minute: they may be on their way
        assert again.recovery.frozen == symbols
        assert {each.link_id for each in line.posts} == names
        line.spoilt.clear()
        report = next_hour(desk, tmp_path)
        assert set(report.recovery.settled.lost) == names
        assert report.recovery.frozen == frozenset()
        later = [each.link_id for each in line.posts[len(names):]]
        assert later
        assert not names & set(later)
        next_hour(desk, tmp_path)
        audit(desk, tmp_path)


# ── Something is missing, or cannot be ───────────────────────────────────────────────────────────────────────────────
def hide_bar(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_bars"] = lambda bars, asked, *_: [
        bar for bar in bars if asked != symbol or bar.open_time_ms < desk.clock.now_ms() // HOUR * HOUR - HOUR]


def tear_bar(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_bars"] = lambda bars, asked, *_: [
        replace(bar, close=math.nan) if asked == symbol and bar.open_time_ms == desk.clock.now_ms() // HOUR * HOUR - HOUR else bar
        for bar in bars]


def age_ticker(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_tickers"] = lambda tickers: [
        replace(each, time_ms=each.time_ms - 61_000) if each.symbol == symbol else each for each in tickers]


ABSENT: dict[str, tuple[Callable[[Line, Desk, str], None], str]] = {
    "no bar": (hide_bar, "its bar is missing"),
    "NaN in its bar": (tear_bar, "its bar is missing"),
    "no ticker": (lambda line, _, symbol: line.without("fetch_tickers", symbol), "it has no price"),
    "stale ticker": (age_ticker, "its price is 61 s old, at most 60 s are traded on"),
    "no trading rules": (
        lambda line, _, symbol: line.without("fetch_instruments", symbol), "the exchange has no trading rules for it"),
}


@pytest.mark.parametrize("fault", ABSENT)
def test_a_symbol_of_which_something_is_missing_is_left_alone(market_account, fault):
    spoil, words = ABSENT[fault]
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        positions = desk.port.fetch_positions()
        symbol, quantity = positions[0].symbol, positions[0].quantity
        spoil(line, desk, symbol)
        report = desk.cycle(Memo(market_account))
        assert symbol not in {each.symbol for each in line.posts}
        assert line.posts, "the others are traded"
        card = card_of(report, symbol)
        assert (card.held, card.wanted, card.outcome) == (quantity, quantity, f"left as it is: {words}")
        assert held_in(report)[symbol] == quantity
        told = " ".join(row["text"] for row in export(desk.state)["events"])
        assert f"{symbol}: left as it is: {words}" in told
        line.spoilt.clear()
        assert not card_of(next_hour(desk, market_account), symbol).outcome.startswith("left as it is")
        audit(desk, market_account)


@pytest.mark.parametrize("fault", ABSENT)
def test_a_symbol_of_which_something_is_missing_is_not_entered(tmp_path, fault):
    spoil, words = ABSENT[fault]
    sound, spoilt = tmp_path / "sound", tmp_path / "spoilt"
    sound.mkdir()
    spoilt.mkdir()
    (report,) = trade(sound, [0], MARKET)
    symbol = max(report.decided.decision.targets.items(), key=lambda item: abs(item[1]))[0]
    assert symbol in {sent.intent.request.symbol for sent in report.sent}
    with desk_with_line(spoilt, **MARKET) as (desk, line):
        spoil(line, desk, symbol)
        cards = {card.symbol: card for card in desk.cycle(Memo(spoilt)).decided.decision.cards}
        assert symbol not in {each.symbol for each in line.posts}
        assert line.posts, "the others are traded"
        if fault == "no trading rules":
            assert symbol not in cards  # a contract that is not listed is not looked at
        else:
            assert cards[symbol].outcome == f"left as it is: {words}"


class TornMarket(RecordedMarket):
    "A recording with a bar that cannot be."

    torn: tuple[str, int] | None = None

    def fetch_bars(self, symbol: str, timeframe: str, start_ms: int, limit: int):
        bars = super().fetch_bars(symbol, timeframe, start_ms, limit)
        return [replace(bar, close=math.nan) if (symbol, bar.open_time_ms) == self.torn else bar for bar in bars]


def test_a_nan_where_positions_are_valued_stops_the_hour_and_names_the_bar(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "RecordedMarket", TornMarket)
    with desk_with_line(market_account, 2, **MARKET) as (desk, line):
        symbol = desk.port.fetch_positions()[0].symbol
        monkeypatch.setattr(TornMarket, "torn", (symbol, int(recording().open_time_ms[ROW + 3])))
        with pytest.raises(DataError, match=rf"{symbol} at 2023-\S+: .*close=nan.*; expected finite prices above 0"):
            next_hour(desk, market_account)
        assert line.posts == []
        monkeypatch.setattr(TornMarket, "torn", None)
        next_hour(desk, market_account)
        audit(desk, market_account)


@pytest.mark.parametrize("equity", ["0", "-12.5"])
def test_an_account_that_is_worth_nothing_orders_nothing(market_account, equity):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        line.spoilt["fetch_account"] = lambda _: Account(Decimal(equity), Decimal(equity), Decimal(0))
        with pytest.raises(RefusedError, match=f"equity is {equity}; expected above 0"):
            desk.cycle(Memo(market_account))
        assert line.posts == []
        line.spoilt.clear()
        desk.cycle(Memo(market_account))
        audit(desk, market_account)


def test_a_position_that_left_the_universe_is_closed_by_an_order_that_can_only_close(market_account):
    symbol = paper_position(market_account)
    changes = {**MARKET, "universe.banlist": [symbol]}
    with desk_with_line(market_account, 3, **changes) as (desk, line):
        report = desk.cycle(Memo(market_account))
        (order,) = [each for each in line.posts if each.symbol == symbol]
        assert order.reduce_only
        assert card_of(report, symbol).why_not is not None
        assert symbol not in held_in(report)
        for _ in range(3):
            assert symbol not in held_in(next_hour(desk, market_account))
        assert len([each for each in line.posts if each.symbol == symbol]) == 1
        audit(desk, market_account)


def paper_position(folder: Path) -> str:
    "The first symbol that an account holds."
    with sqlite3.connect(folder / "paper.sqlite") as account:
        rows = account.execute("SELECT symbol FROM holdings WHERE quantity <> '0' ORDER BY symbol").fetchall()
    account.close()
    return str(rows[0][0])


def test_a_position_in_a_contract_that_ends_is_settled_and_booked(market_account):
    symbol, panel = paper_position(market_account), recording()
    values = {name: getattr(panel, name).copy() for name in FIELDS}
    for name in FIELDS:
        values[name][ROW + 3 :, panel.symbols.index(symbol)] = np.nan
    ending = replace(panel, **values)  # the last bar of the symbol is the one that was decided last
    with open_desk(quick(market_account, **MARKET), recording=ending, now_ms=time_of(3), base=market_account) as desk:
        report = desk.cycle(Memo(market_account))
        (settled,) = [fill for fill in desk.port.fetch_fills(0) if fill.order_id == "settlement"]
        assert (settled.symbol, symbol in held_in(report)) == (symbol, False)
        for _ in range(2):
            decision = next_hour(desk, market_account).decided.decision
            assert symbol not in {*decision.memory.unfinished, *(intent.request.symbol for intent in decision.intents)}
        trades = export(desk.state)["trades"]
        assert [row["exit_reason"] for row in trades if row["symbol"] == symbol][-1] == "outside"
        audit(desk, market_account)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def lock_on(path: Path) -> Iterator[None]:
    "Somebody else writes, and does not finish."
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_locked_state_file_stops_the_start(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "open_state", partial(open_state, busy_timeout_seconds=0.05))
    sent = posts_of(market_account)
    with lock_on(market_account / "state.sqlite"), pytest.raises(StateError, match=r"state\.sqlite is locked by another process"):
        trade(market_account, [3], MARKET)
    assert posts_of(market_account) == sent
    trade(market_account, [3], MARKET)


def test_a_state_file_that_is_locked_when_orders_go_out_keeps_them_in(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "open_state", partial(open_state, busy_timeout_seconds=0.05))
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):

        class Locking(Memo):
            def record(self, decided: Decided) -> None:
                held.enter_context(lock_on(market_account / "state.sqlite"))

        with ExitStack() as held, pytest.raises(StateError, match="is locked by another process"):
            desk.cycle(Locking(market_account))
        assert line.posts == []  # no order without an intent on the disk
        assert desk.cycle(Memo(market_account)).sent
        audit(desk, market_account)


@pytest.mark.parametrize("name", ["state.sqlite", "paper.sqlite"])
def test_a_damaged_file_is_named_and_nothing_is_sent(market_account, name):
    path = market_account / name
    content = bytearray(path.read_bytes())
    rng = random.Random(5)
    content[4096 : len(content) // 2] = rng.randbytes(len(content) // 2 - 4096)
    sound = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(StateError, match=rf"{name} is damaged .*: move the file"):
        trade(market_account, [3], MARKET)
    path.write_bytes(sound)
    sent = posts_of(market_account)
    trade(market_account, [3], MARKET)
    assert len(posts_of(market_account)) > len(sent)


@pytest.mark.parametrize(("value", "words"), [
    ('{"last_row_ms": "soon"}', "last_row_ms is 'soon'"),
    ('{"days": [{"day_ms": 0, "start": "NaN", "high": "1", "last": "1"}]}', "start"),
    ('{"last_row_ms": 16', "memory 'decide' is not JSON"),
])
def test_a_memory_that_cannot_be_read_is_not_replaced_by_none(market_account, value, words):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        with desk.state.write() as connection:
            connection.exec_driver_sql("UPDATE memory SET value = ? WHERE name = 'decide'", (value,))
        with pytest.raises((DataError, StateError), match=words):
            desk.cycle(Memo(market_account))
        assert line.posts == []


def test_a_recorder_that_fails_keeps_every_order_in(market_account):
    class Full:
        def record(self, decided: Decided) -> None:
            raise XsmomError("decisions: the disk is full")

    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        with pytest.raises(XsmomError, match="the disk is full"):
            desk.cycle(Full())
        assert line.posts == []
        assert len(desk.cycle(Memo(market_account)).sent) == len(line.posts) > 0
        audit(desk, market_account)


def test_a_clock_that_goes_backwards_is_refused_by_account_and_memory(market_account):
    sent = posts_of(market_account)
    with pytest.raises(RefusedError, match="expected a clock that goes forward"):
        trade(market_account, [1], MARKET)
    assert posts_of(market_account) == sent
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        yesterday = replace(desk, clock=Late(time_of(0)), history=History(line, "1h", 150, sleep=patient))
        line.spoilt["fetch_time_ms"] = lambda _: time_of(0)
        with pytest.raises(RefusedError, match="was decided already; a clock goes backwards"):
            yesterday.cycle(Memo(market_account))
        assert line.posts == []


class Late:
    "A clock that stands still."

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms
