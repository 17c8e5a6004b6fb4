"""The paper exchange across its modules: books that balance, draws that ask nobody, kills, late and missing bars."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmom_nb.clock import SimulatedClock
from xsmom_nb.config import Config, with_values
from xsmom_nb.errors import DataError, RefusedError, StateError
from xsmom_nb.exchange.books import Books, account_of, deposited, one_leverage
from xsmom_nb.exchange.matching import Happening, accepted, advanced, depth_of, ended, venue_of
from xsmom_nb.exchange.paper import PaperExchange, price_result, totals
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import Bar, Fill, FundingRate, Instrument, LedgerEntry, Order, OrderRequest, Ticker, TransientError

HOUR = 3_600_000
FIRST = 600  # row at which the accounts of these tests begin


@pytest.fixture(scope="session")
def panel() -> Panel:
    "A synthetic market: listings, an end, funding."
    return synthetic_panel(seed=3, bars=1500, symbols=14)


def start_of(panel: Panel) -> int:
    "A minute past the hour, as the live cycle."
    return int(panel.open_time_ms[FIRST]) + 60_000


def opened(
    panel: Panel, folder: Path, now_ms: int | None = None, config: Config | None = None
) -> tuple[PaperExchange, SimulatedClock]:
    "A paper exchange with its clock, in a folder that is made where it is missing."
    folder.mkdir(exist_ok=True)
    clock, config = SimulatedClock(start_of(panel) if now_ms is None else now_ms), config or Config()
    market = RecordedMarket(panel, clock, config.paper.spread_bps)
    return PaperExchange(market, clock, config, "sqlite:///paper.sqlite", folder), clock


def size(notional: float, ticker: Ticker, rules: Instrument) -> Decimal:
    "A tradable quantity worth about so much."
    steps = (Decimal(repr(notional)) / ticker.last / rules.quantity_step).to_integral_value()
    return max(steps, Decimal(1)) * rules.quantity_step


def random_orders(exchange: PaperExchange, rng: np.random.Generator, name: str, count: int) -> list[OrderRequest]:
    "Orders of all kinds, most of which can be placed."
    tickers, rules = exchange.fetch_tickers(), {rule.symbol: rule for rule in exchange.fetch_instruments()}
    orders = []
    for number in range(count):
        ticker = tickers[rng.integers(len(tickers))]
        rule, side, kind = rules[ticker.symbol], ("Buy", "Sell")[rng.integers(2)], rng.integers(5)
        away = Decimal(repr(round(float(rng.normal(0, 0.004)), 5)))
        price = (ticker.last * (1 + away) / rule.price_tick).to_integral_value() * rule.price_tick
        time_in_force = ("IOC", "PostOnly", "GTC", "FOK", "PostOnly")[kind]
        orders.append(OrderRequest(
            f"{name}-{number}", ticker.symbol, side, "Limit" if kind else "Market", size(rng.uniform(20, 1500), ticker, rule),
            price if kind else None, time_in_force, reduce_only=bool(rng.random() < 0.3)))
    return orders


def imbalance(exchange: PaperExchange) -> Decimal:
    "Change of equity less what prices, fees and funding explain; prices by fills and marks alone."
    marks = {ticker.symbol: ticker.mark for ticker in exchange.fetch_tickers()}
    marks |= {position.symbol: position.mark_price for position in exchange.fetch_positions()}
    sums, account = totals(exchange.fetch_ledger(0)), exchange.fetch_account()
    assert account.wallet_balance == sum(sums.values())
    open_gains = sum(position.unrealized for position in exchange.fetch_positions())  # from averages, which are rounded
    assert abs(account.equity - account.wallet_balance - open_gains) < Decimal("1e-12")
    fees = -sum(fill.fee for fill in exchange.fetch_fills(0))
    assert fees == sums["fee"]
    return account.equity - sums["transfer"] - price_result(exchange.fetch_fills(0), marks) - fees - sums["funding"]


def truth(exchange: PaperExchange) -> dict:
    "All that a paper exchange tells of its account."
    return {
        "account": exchange.fetch_account(), "positions": exchange.fetch_positions(), "open": exchange.fetch_open_orders(),
        "fills": exchange.fetch_fills(0), "ledger": exchange.fetch_ledger(0),
    }


# ── The books balance ────────────────────────────────────────────────────────────────────────────────────────────────
STEPS = {"price_tick": Decimal("0.01"), "quantity_step": Decimal("0.1"), "min_quantity": Decimal("0.1")}
LIMITS = {"max_limit_quantity": Decimal(10**6), "max_market_quantity": Decimal(10**5), "min_notional": Decimal(5)}
RULES = Instrument("XUSDT", "X", "USDT", "Trading", **STEPS, **LIMITS, max_leverage=Decimal(50), launch_time_ms=0,
                   funding_interval_minutes=480)
PRICES = st.integers(9000, 11_000).map(lambda cents: cents / 100)
BARS = st.tuples(st.lists(PRICES, min_size=4, max_size=4), st.integers(0, 500))
KINDS = st.sampled_from(["Market", "GTC", "PostOnly", "IOC", "FOK"])
ORDERS = st.tuples(st.sampled_from(["Buy", "Sell"]), KINDS, st.integers(1, 600), PRICES, st.booleans())
RATES = st.sampled_from([0.0, 0.0, 0.0, 0.0003, -0.0007])
HOURS = st.lists(st.tuples(st.lists(ORDERS, max_size=4), BARS, RATES), max_size=25)


@settings(max_examples=150, deadline=None)
@given(HOURS, st.integers(0, 3), st.booleans())
def test_engine_keeps_its_promises(hours, seed, cancels):
    "Whatever is ordered: the books balance, post-only never takes, reduce-only never grows or turns, bars are not overdrawn."
    venue, books, events, last = venue_of(Config(), HOUR, seed), deposited(Books(), Decimal(10_000), 0).books, [], 100.0
    for hour, (orders, (prices, volume), rate) in enumerate(hours):
        now_ms = hour * HOUR + 60_000
        for order in list(books.orders.values()) if cancels else ():
            step = ended(books, order, "EC_PerCancelRequest", now_ms)
            books, events = step.books, [*events, *step.events]
        tick = Decimal("0.01")
        mark = Decimal(repr(last))
        ticker = Ticker("XUSDT", now_ms, mark - tick, mark + tick, mark, mark)
        depth = depth_of(ticker, [Bar(0, last, last, last, last, 300.0)] * 3)
        for number, (side, kind, tenths, price, reduce_only) in enumerate(orders):
            held = books.holdings["XUSDT"].quantity if "XUSDT" in books.holdings else Decimal(0)
            if reduce_only and held * (1 if side == "Buy" else -1) >= 0:
                continue  # what admission refuses
            limit = None if kind == "Market" else Decimal(repr(price))
            quantity = Decimal(tenths) / 10
            terms = ("Limit", quantity, limit, kind) if limit else ("Market", quantity, None, "IOC")
            request = OrderRequest(f"{hour}-{number}", "XUSDT", side, *terms, reduce_only)
            step = accepted(books, request, depth, RULES, venue, now_ms, mark)
            books, events = step.books, [*events, *step.events]
        bar = Bar(hour * HOUR, prices[0], max(prices), min(prices), prices[3], float(volume))
        close_ms, last = (hour + 1) * HOUR, prices[3]
        step = advanced(books, [Happening(close_ms, "XUSDT", FundingRate(close_ms, rate)), Happening(close_ms, "XUSDT", bar)],
                        {"XUSDT": RULES}, venue, 0)
        books, events = step.books, [*events, *step.events]
        held = sum(event.signed_quantity for event in events if isinstance(event, Fill))  # with what this bar filled
        received = sum(entry.amount for entry in step.events if isinstance(entry, LedgerEntry) and entry.kind == "funding")
        assert abs(float(received) + float(held) * last * rate) < 1e-7  # a long pays a positive rate on the bar's close
    check_engine(books, events, last, venue)


def check_engine(books, events, last, venue):
    "The promises, told from the events alone."
    orders = {event.link_id: event for event in events if isinstance(event, Order)}
    fills = [event for event in events if isinstance(event, Fill)]
    entries = [event for event in events if isinstance(event, LedgerEntry)]
    held = Decimal(0)
    for fill in fills:
        order = orders[fill.link_id]
        assert fill.is_maker or order.time_in_force != "PostOnly"
        assert order.price is None or (fill.price <= order.price if fill.side == "Buy" else fill.price >= order.price)
        if order.reduce_only:
            assert held * fill.signed_quantity < 0
            assert abs(fill.signed_quantity) <= abs(held)
        held += fill.signed_quantity
    for order in orders.values():
        assert order.filled_quantity == sum(fill.quantity for fill in fills if fill.link_id == order.link_id) <= order.quantity
        assert order.is_open == (order.link_id in books.orders)
        if order.status == "Cancelled" and order.time_in_force == "FOK":
            assert order.filled_quantity == 0 or order.reduce_only
    for order in books.orders.values():
        assert not order.reduce_only or held * (1 if order.side == "Buy" else -1) < 0
    assert len({entry.entry_id for entry in entries}) == len(entries)
    assert len({fill.fill_id for fill in fills}) == len(fills)
    mark = Decimal(repr(last))
    account = account_of(books, one_leverage(3))
    assert books.wallet == 10_000 + sum(entry.amount for entry in entries)
    explained = price_result(fills, {"XUSDT": mark}) + sum(entry.amount for entry in entries if entry.kind in ("fee", "funding"))
    assert abs(account.equity - 10_000 - explained) < Decimal("1e-9")
    assert (books.holdings["XUSDT"].quantity if "XUSDT" in books.holdings else 0) == held


def test_a_month_of_random_orders_on_the_real_market(real_panel, tmp_path):
    "720 hours, all symbols: the difference nobody can explain is below a millionth of a USDT, and it stays so after a restart."
    exchange, clock = opened(real_panel.slice(start_ms=int(real_panel.open_time_ms[-2000])), tmp_path)
    rng = np.random.default_rng(11)
    for hour in range(720):
        for order in exchange.fetch_open_orders():
            if rng.random() < 0.7:
                assert exchange.cancel_order(order.symbol, order.link_id).outcome == "accepted"
        for request in random_orders(exchange, rng, f"{hour:x}", 3):
            exchange.submit_order(request)
        clock.advance(HOUR)
        if hour % 120 == 119:
            assert abs(imbalance(exchange)) < Decimal("1e-6")
    told = truth(exchange)
    assert len(told["fills"]) > 500
    assert len(told["positions"]) > 20
    assert {entry.kind for entry in told["ledger"]} == {"transfer", "trade", "fee", "funding"}
    exchange.close()
    exchange, _ = opened(real_panel.slice(start_ms=int(real_panel.open_time_ms[-2000])), tmp_path, clock.now_ms())
    with exchange:
        assert truth(exchange) == told
        assert abs(imbalance(exchange)) < Decimal("1e-6")


# ── Chance ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def touched_fills(folder: Path, seed: int) -> list[tuple[str, Decimal]]:
    "Fills of orders whose prices were exactly reached."
    shape = (60, 2)
    flat, times = np.full(shape, 100.0), 1_672_531_200_000 + HOUR * np.arange(60, dtype=np.int64)
    low, volume = np.full(shape, 99.0), np.full(shape, 400.0)
    made = Panel(("AUSDT", "BUSDT"), times, flat, flat, low, flat, volume, np.zeros(shape))
    exchange, clock = opened(made, folder, int(times[5]), with_values(Config(), {"paper.seed": seed}))
    with exchange:
        for symbol in made.symbols:
            request = OrderRequest(f"t-{symbol}", symbol, "Buy", "Limit", Decimal(100), Decimal(99), "PostOnly", False)
            assert exchange.submit_order(request).outcome == "accepted"
        for _ in range(6):
            clock.advance(HOUR)
            exchange.fetch_fills(0)
        return [(fill.fill_id, fill.quantity) for fill in exchange.fetch_fills(0)]


def test_draws_depend_on_seed_name_and_bar_alone(tmp_path):
    "The same seed gives the same fills, another one others; two symbols of the same bars have different queues."
    first, again, other = (touched_fills(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other
    assert len(first) > 6
    assert len({quantity for _, quantity in first}) > 4


def test_two_ports_on_one_file_are_one_account(panel, tmp_path):
    "Orders sent by turns through two ports, each of which reads in between, give what one port gives."
    alone, clock = opened(panel, tmp_path / "one")
    pair = [opened(panel, tmp_path / "two") for _ in range(2)]
    rng = np.random.default_rng(5)
    for hour in range(60):
        for number, request in enumerate(random_orders(alone, rng, f"h{hour}", 4)):
            assert alone.submit_order(request) == pair[number % 2][0].submit_order(request)
            assert alone.fetch_account() == pair[(number + hour) % 2][0].fetch_account()
        for every in (clock, *(its_clock for _, its_clock in pair)):
            every.advance(HOUR)
    for port, _ in pair:
        assert truth(port) == truth(alone)
        port.close()
    alone.close()


# ── Kills ────────────────────────────────────────────────────────────────────────────────────────────────────────────
HOURS_TRADED, ORDERS = 70, 6  # orders an hour


def trade(panel: Panel, folder: Path, end_of_hour: Callable[[], object] = int) -> None:
    "Trade from the order the last process got to."
    progress = folder / "order"  # an order that was refused is not sent again: by then it might be accepted
    following, begin = folder / "next", int(progress.read_text()) if progress.exists() else 0
    exchange, clock = opened(panel, folder, start_of(panel) + begin // ORDERS * HOUR)
    with exchange:
        for hour in range(begin // ORDERS, HOURS_TRADED):
            clock.set(start_of(panel) + hour * HOUR)
            requests = random_orders(exchange, np.random.default_rng(hour), f"h{hour}", ORDERS)
            for number in range(max(hour * ORDERS, begin), (hour + 1) * ORDERS):
                following.write_text(str(number))
                following.replace(progress)
                exchange.submit_order(requests[number % ORDERS])
            end_of_hour()


def trade_for(panel: Panel, folder: Path, hours: int, seconds: float) -> None:
    "Trade in a forked process that is killed so long after some hours; it does not run ahead of whoever kills it."
    (ended, tell), (may_go_on, permit) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        trade(panel, folder, lambda: (os.write(tell, b"."), os.read(may_go_on, 1)))
        os._exit(0)
    for _ in range(hours):
        os.read(ended, 1)
        os.write(permit, b".")
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    for end in (ended, tell, may_go_on, permit):
        os.close(end)


def trade_and_kill(folder: Path, kills: int) -> None:
    "Trade in processes that are killed somewhere in an hour; print the hour the last one got to."
    panel, rng = synthetic_panel(seed=3, bars=1500, symbols=14), np.random.default_rng(2)
    begin = time.monotonic()
    trade(panel, folder / "whole")
    hour_seconds = (time.monotonic() - begin) / HOURS_TRADED
    for _ in range(kills):
        trade_for(panel, folder / "killed", int(rng.integers(1, 3)), rng.uniform(0, hour_seconds))
    print(int((folder / "killed" / "order").read_text()) // ORDERS)
    trade(panel, folder / "killed")


def elsewhere(function: str, folder: Path, *numbers: int) -> str:
    "Call a function of this file in a fresh process, which may fork; what it printed."
    code = f"import test_paper; test_paper.{function}(test_paper.Path({str(folder)!r}), *{numbers})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_killed_process_loses_nothing_and_repeats_nothing(panel, tmp_path):
    "Killed again and again between two instructions, the account ends as that of a process which nobody killed."
    at_last = int(elsewhere("trade_and_kill", tmp_path, 20))
    assert 20 <= at_last <= 60 < HOURS_TRADED
    end_ms = start_of(panel) + HOURS_TRADED * HOUR
    (first, _), (second, _) = (opened(panel, tmp_path / name, end_ms) for name in ("whole", "killed"))
    with first, second:
        assert truth(second) == truth(first)
        assert abs(imbalance(second)) < Decimal("1e-6")
        assert len(first.fetch_fills(0)) > 100


def trade_at_once(folder: Path, processes: int, orders: int) -> None:
    "Let several forked processes send orders to one account at the same time."
    panel, children = synthetic_panel(seed=3, bars=1500, symbols=14), []
    opened(panel, folder)[0].close()
    waiting, starting = os.pipe()
    for name in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        os.close(starting)
        exchange, _ = opened(panel, folder)
        ticker, rules = exchange.fetch_tickers()[0], exchange.fetch_instruments()[0]
        os.read(waiting, 1)  # until the parent closes its end
        for number in range(orders):
            side, quantity = ("Buy", "Sell")[number % 2], size(50, ticker, rules)
            request = OrderRequest(f"{name}-{number}", ticker.symbol, side, "Market", quantity, None, "IOC", False)
            assert exchange.submit_order(request).outcome == "accepted"
        os._exit(0)
    os.close(waiting)
    time.sleep(0.5)
    os.close(starting)
    print([os.waitpid(child, 0)[1] for child in children])


def test_processes_at_once_lose_no_order(panel, tmp_path):
    "Three processes, 90 orders, one file: each order has a number of its own, and the books balance."
    assert elsewhere("trade_at_once", tmp_path, 3, 30) == "[0, 0, 0]"
    exchange, _ = opened(panel, tmp_path)
    with exchange:
        fills = exchange.fetch_fills(0)
        assert len(fills) == len({fill.order_id for fill in fills}) == 90
        assert exchange.fetch_positions() == []
        assert imbalance(exchange) == 0


def test_a_step_that_fails_leaves_nothing(panel, tmp_path, monkeypatch):
    "An error while the ledger is written takes the fill with it, and the next call does it all."
    import xsmom_nb.exchange.account_file as account_file

    exchange, clock = opened(panel, tmp_path)
    with exchange:
        for request in random_orders(exchange, np.random.default_rng(0), "a", 8):
            exchange.submit_order(request)
        before = exchange.fetch_ledger(0), exchange.fetch_fills(0)
        clock.advance(HOUR)
        real = account_file._write

        def failing(connection, table, rows, key=None):
            if table == "holdings":
                raise OSError("no space left")
            real(connection, table, rows, key)

        with monkeypatch.context() as patch:
            patch.setattr(account_file, "_write", failing)
            with pytest.raises(OSError, match="no space left"):
                exchange.fetch_account()
        with sqlite3.connect(tmp_path / "paper.sqlite") as other:
            assert other.execute("SELECT count(*) FROM ledger").fetchone()[0] == len(before[0])
        other.close()
        assert exchange.fetch_ledger(0) != before[0]
        assert exchange.fetch_ledger(0)[: len(before[0])] == before[0]
        assert abs(imbalance(exchange)) < Decimal("1e-6")


# ── Late, missing, ended ─────────────────────────────────────────────────────────────────────────────────────────────
class Slow:
    "A market whose newest bar comes only when it is told to."

    def __init__(self, market):
        self.market, self.hidden_from_ms, self.calls, self.error = market, None, 0, None

    def __getattr__(self, name):
        if self.error:
            raise self.error
        return getattr(self.market, name)

    def fetch_bars(self, symbol, timeframe, start_ms, limit):
        self.calls += 1
        if self.error:
            raise self.error
        bars = self.market.fetch_bars(symbol, timeframe, start_ms, limit)
        return [bar for bar in bars if self.hidden_from_ms is None or bar.open_time_ms < self.hidden_from_ms]


def slow(panel: Panel, folder: Path, now_ms: int | None = None) -> tuple[PaperExchange, SimulatedClock, Slow]:
    "A paper exchange on a market that can be held up."
    clock = SimulatedClock(start_of(panel) if now_ms is None else now_ms)
    market = Slow(RecordedMarket(panel, clock, 2.0))
    return PaperExchange(market, clock, Config(), "sqlite:///paper.sqlite", folder), clock, market


def through(exchange: PaperExchange, name: str, notional: float = 300.0) -> OrderRequest:
    "A bid for the first symbol, a tick below the last price."
    ticker, rules = exchange.fetch_tickers()[0], exchange.fetch_instruments()[0]
    quantity = size(notional, ticker, rules)
    return OrderRequest(name, ticker.symbol, "Buy", "Limit", quantity, ticker.bid, "PostOnly", reduce_only=False)


def test_a_late_bar_is_matched_when_it_comes_and_is_not_missed(panel, tmp_path):
    "Fills of a late bar carry the time that had been reached, so that asking from the last time seen finds them."
    exchange, clock, market = slow(panel, tmp_path)
    with exchange:
        assert exchange.submit_order(through(exchange, "early")).outcome == "accepted"
        market.hidden_from_ms = int(panel.open_time_ms[FIRST])
        clock.advance(HOUR)
        ticker, rules = exchange.fetch_tickers()[1], exchange.fetch_instruments()[1]
        other = OrderRequest("other", ticker.symbol, "Buy", "Market", size(300, ticker, rules), None, "IOC", False)
        assert exchange.submit_order(other).outcome == "accepted"
        seen = exchange.fetch_fills(0)
        assert [fill.link_id for fill in seen] == ["other"]
        clock.advance(5000)
        market.hidden_from_ms = None
        late = exchange.fetch_fills(seen[-1].time_ms)
        assert {fill.link_id for fill in late} == {"early", "other"}
        assert all(fill.time_ms == seen[-1].time_ms for fill in late)
        assert abs(imbalance(exchange)) < Decimal("1e-6")


def test_an_order_never_sees_a_bar_that_closed_before_it(panel, tmp_path):
    "Also when that bar is late, and comes after the order."
    row = FIRST + int(np.flatnonzero(panel.low[FIRST:, 0] < panel.close[FIRST:, 0] * 0.995)[0])  # closes well above its low
    exchange, clock, market = slow(panel, tmp_path, int(panel.open_time_ms[row]) + 60_000)
    with exchange:
        far = replace(through(exchange, "far"), price=through(exchange, "far").price // 2)  # keeps the symbol followed
        assert exchange.submit_order(far).outcome == "accepted"
        market.hidden_from_ms = int(panel.open_time_ms[row])
        clock.advance(HOUR)  # the bar of this row is over, and not there
        assert exchange.submit_order(through(exchange, "new")).outcome == "accepted"
        assert float(exchange.find_order("BTCUSDT", "new").price) > panel.low[row, 0] * 1.004  # the late bar went through it
        market.hidden_from_ms = None
        assert exchange.fetch_fills(0) == []
        clock.advance(HOUR)
        assert all(fill.time_ms == int(panel.open_time_ms[row + 2]) for fill in exchange.fetch_fills(0))


def test_a_market_that_fails_places_nothing(panel, tmp_path):
    "A write says rejected, a read says why; afterwards all is as before."
    exchange, clock, market = slow(panel, tmp_path)
    with exchange:
        request = through(exchange, "a")
        assert exchange.submit_order(request).outcome == "accepted"
        clock.advance(HOUR)
        market.error = TransientError("the line is cut")
        answer = exchange.submit_order(replace(request, link_id="b"))
        assert (answer.outcome, "the line is cut" in answer.reason) == ("rejected", True)
        with pytest.raises(TransientError, match="the line is cut"):
            exchange.fetch_account()
        market.error = None
        assert exchange.find_order(request.symbol, "b") is None
        assert exchange.submit_order(replace(request, link_id="b")).outcome == "accepted"


def test_an_account_without_positions_asks_for_no_bars(panel, tmp_path):
    "And one with a position asks once an hour and symbol, however long it slept."
    exchange, clock, market = slow(panel, tmp_path)
    with exchange:
        clock.advance(100 * HOUR)
        exchange.fetch_account()
        assert market.calls == 0
        exchange.submit_order(replace(through(exchange, "a"), order_type="Market", price=None, time_in_force="IOC"))
        assert len(exchange.fetch_positions()) == 1
        market.calls = 0
        clock.advance(700 * HOUR)
        for _ in range(3):
            exchange.fetch_account()
        assert market.calls == 1


def test_a_contract_that_ends_is_settled_at_its_last_price(panel, tmp_path):
    "An hour after its last bar: orders cancelled, position closed as taker, whether the account slept through it or not."
    known = np.isfinite(panel.close)
    column = int(np.flatnonzero(~known[-1])[0])
    symbol, end = panel.symbols[column], int(np.flatnonzero(known[:, column])[-1])
    results = []
    for name, step in (("awake", 1), ("asleep", 20)):
        exchange, clock = opened(panel, tmp_path / name, int(panel.open_time_ms[end - 3]) + 60_000)
        with exchange:
            ticker = next(found for found in exchange.fetch_tickers() if found.symbol == symbol)
            rules = next(found for found in exchange.fetch_instruments() if found.symbol == symbol)
            bought = OrderRequest("in", symbol, "Buy", "Market", size(500, ticker, rules), None, "IOC", False)
            price = (ticker.last * 2 / rules.price_tick).to_integral_value() * rules.price_tick
            assert exchange.submit_order(bought).outcome == "accepted"
            out = OrderRequest("out", symbol, "Sell", "Limit", bought.quantity, price, "GTC", reduce_only=True)
            assert exchange.submit_order(out).outcome == "accepted"
            for _ in range(20 // step):
                clock.advance(step * HOUR)
                exchange.fetch_account()
            last = exchange.fetch_fills(0)[-1]
            assert (last.link_id, last.is_maker, last.time_ms) == ("", False, int(panel.open_time_ms[end]) + 2 * HOUR)
            assert float(last.price) == pytest.approx(panel.close[end, column] * (1 - 1e-4), rel=1e-9)
            assert (exchange.fetch_positions(), exchange.fetch_open_orders()) == ([], [])
            assert exchange.find_order(symbol, "out").reason == "CancelBySettle"
            assert exchange.submit_order(replace(bought, link_id="again")).reason.startswith("110074")
            assert abs(imbalance(exchange)) < Decimal("1e-6")
            results.append(exchange.fetch_ledger(0))
    assert results[0] == results[1]


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_does_not_fit_is_rejected_in_words(panel, tmp_path):
    "An unknown symbol, a quantity off the step, a price off the tick, too much, too little; NaN never gets there."
    exchange, _ = opened(panel, tmp_path)
    with exchange:
        good, rules = through(exchange, "a"), exchange.fetch_instruments()[0]
        bad = {
            "10001 Not supported": replace(good, symbol="NONEUSDT"),
            "10001 Qty invalid": replace(good, quantity=good.quantity + rules.quantity_step / 3),
            "10001 Price invalid": replace(good, price=good.price + rules.price_tick / 2),
            "10001 The number of contracts exceeds maximum": replace(good, quantity=rules.max_limit_quantity * 2),
            "110094": replace(good, quantity=rules.quantity_step),
            "110007": replace(good, quantity=good.quantity * 150),
            "110017": replace(good, reduce_only=True),
        }
        for reason, request in bad.items():
            answer = exchange.submit_order(request)
            assert answer.outcome == "rejected"
            assert answer.reason.startswith(reason), answer.reason
            assert exchange.find_order(request.symbol, "a") is None
        assert exchange.submit_order(good).outcome == "accepted"
        assert exchange.submit_order(good).reason.startswith("110072")
    with pytest.raises(DataError, match="price is Decimal"):
        replace(good, price=Decimal("NaN"))


def test_a_price_that_is_none_neither_fills_nor_values_anything(panel, tmp_path):
    exchange, clock, market = slow(panel, tmp_path)
    with exchange:
        exchange.submit_order(through(exchange, "a"))
        clock.advance(HOUR)
        genuine = market.market.fetch_bars
        for close in (float("nan"), float("inf"), 0.0):
            market.market.fetch_bars = lambda *a, close=close: [replace(bar, close=close) for bar in genuine(*a)]
            assert exchange.fetch_fills(0) == []
            assert exchange.fetch_account().equity == Decimal(10_000)
        market.market.fetch_bars = genuine
        assert exchange.fetch_fills(0) != []  # the bar comes right, and is made up for
        assert exchange.fetch_account().equity.is_finite()


def test_time_does_not_go_back(panel, tmp_path):
    "Not for the process that was there, not for the next one, not for a second one beside it."
    exchange, clock = opened(panel, tmp_path)
    beside, its_clock = opened(panel, tmp_path)
    with exchange, beside:
        clock.advance(5 * HOUR)
        assert exchange.submit_order(through(exchange, "a")).outcome == "accepted"
        for ask in (beside.fetch_account, lambda: beside.submit_order(through(beside, "b"))):
            with pytest.raises(RefusedError, match="expected a clock that goes forward"):
                ask()
        its_clock.advance(5 * HOUR)
        assert len(beside.fetch_open_orders()) == 1
    with pytest.raises(RefusedError, match=r"the clock is at .*, the account has reached .*"):
        opened(panel, tmp_path)


@pytest.mark.parametrize("damage", ["noise", "row", "seed", "other"])
def test_a_file_that_cannot_be_trusted_is_refused(panel, tmp_path, damage):
    "Noise in its middle, a row that does not read, another seed, another program's database."
    exchange, clock = opened(panel, tmp_path)
    with exchange:
        for request in random_orders(exchange, np.random.default_rng(0), "a", 20):
            exchange.submit_order(request)
        clock.advance(3 * HOUR)
        assert exchange.fetch_positions()
    file = tmp_path / "paper.sqlite"
    config, kind, text = Config(), StateError, "is damaged"
    if damage == "noise":
        content = bytearray(file.read_bytes())
        content[4096:-4096] = os.urandom(len(content) - 8192)
        file.write_bytes(content)
    elif damage == "seed":
        config, kind, text = with_values(Config(), {"paper.seed": 9}), RefusedError, "was made with seed 0, paper.seed is 9"
    else:
        statement, text = {
            "row": ("UPDATE holdings SET quantity = 'some'", "holds a row that cannot be read"),
            "other": ("PRAGMA application_id = 77", "was made for something else"),
        }[damage]
        connection = sqlite3.connect(file)
        connection.execute(statement)
        connection.commit()
        connection.close()
    with pytest.raises(kind, match=text):
        opened(panel, tmp_path, clock.now_ms(), config)


def test_a_locked_file_leaves_an_order_unknown(panel, tmp_path, monkeypatch):
    "A write that could not get the lock may not be called rejected by somebody who does not know."
    import xsmom_nb.exchange.paper as paper

    real = paper.open_database
    monkeypatch.setattr(paper, "open_database", lambda *a, **k: real(*a, **k, busy_timeout_seconds=0.05))
    exchange, _ = opened(panel, tmp_path)
    with exchange:
        request = through(exchange, "a")
        holder = sqlite3.connect(tmp_path / "paper.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        answer = exchange.submit_order(request)
        holder.execute("ROLLBACK")
        holder.close()
        assert (answer.outcome, "is locked" in answer.reason) == ("unknown", True)
        assert exchange.find_order(request.symbol, "a") is None
        assert exchange.submit_order(request).outcome == "accepted"


def test_a_new_account_has_what_the_config_says(panel, tmp_path):
    "At the clock's time, as a transfer; later configs do not change what is in the wallet."
    exchange, clock = opened(panel, tmp_path, config=with_values(Config(), {"paper.initial_equity": 2500.5}))
    with exchange:
        first = LedgerEntry(f"transfer-{clock.now_ms()}", clock.now_ms(), "transfer", "", Decimal("2500.5"))
        assert exchange.fetch_ledger(0) == [first]
        assert exchange.fetch_time_ms() == clock.now_ms()
    again, _ = opened(panel, tmp_path)
    with again:
        assert again.fetch_account().equity == Decimal("2500.5")
