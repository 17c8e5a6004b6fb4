"""The guard on the paper exchange: each exit with its fill and its equity worked out by hand, long and short."""

import math
import time
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_account import COIN, FLAT, HOUR, Bench, Line

from xsmom_nb.execution import reconcile
from xsmom_nb.execution.journal import unfinished_intents
from xsmom_nb.live.guard import guard_once
from xsmom_nb.live.memory import recall
from xsmom_nb.outbox import undelivered
from xsmom_nb.ports import Submission
from xsmom_nb.risk.exits import Tick
from xsmom_nb.state import export

TICK = 0.001
OFF = {"risk.breakeven_after_r": 0.0, "risk.trail_atr_mult": 0.0, "risk.partial_tp_ladder": []}


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(reconcile, "FIRST_PAUSE_SECONDS", 0.0001)


def on_tick(price: float, up: bool) -> float:
    "A price on the grid."
    steps = price / TICK
    return (math.ceil(steps - 1e-6) if up else math.floor(steps + 1e-6)) * TICK


def at_market(last: float, is_buy: bool) -> float:
    "What a market order pays: the book is one tick wide above the last price, slippage is a basis point."
    return on_tick((last + TICK) * 1.0001, up=True) if is_buy else on_tick(last * 0.9999, up=False)


def at_stop(level: float, is_buy: bool) -> float:
    "What the exchange's stop pays: its level, or the open beyond it, and the slippage."
    return level * (1.0001 if is_buy else 0.9999)


def mirrored(bar):
    open_, high, low, close = bar
    return 200 - open_, 200 - low, 200 - high, 200 - close


def price_of(kind: str, number: float, entry: float, direction: int) -> float:
    "What a case says an exit was paid."
    is_buy, seen = direction < 0, number if direction > 0 else 200 - number
    if kind == "market":
        return at_market(seen, is_buy)
    level = {"open": seen, "level": on_tick(seen, is_buy), "stop": on_tick(entry + direction * number, is_buy)}[kind]
    return at_stop(level, is_buy)


# A case: settings, bars from hour 1 on, and what leaves: (hour, quantity, "market" with the last price or "stop" with the
# distance of the level from the entry in the position's favour, reason that is remembered).
CASES = {
    "initial_stop": ({}, [(100, 101, 95, 95.5)], [(1, 10, "market", 95.5)]),
    "catastrophic_stop": ({}, [(100, 101, 92, 94)], [(1, 10, "stop", -7.0)]),
    "no initial stop": ({**OFF, "risk.atr_mult_sl": 0.0}, [(100, 101, 93.5, 94), (94, 94, 92, 93)], [(2, 10, "stop", -7.0)]),
    "a gap through the stop": ({}, [(90, 91, 89, 90.5)], [(1, 10, "open", 90.0)]),
    "breakeven_stop": ({}, [(100, 102.5, 99.5, 102), (102, 102, 99, 99.5)], [(2, 10, "stop", 0.0)]),
    "trailing_stop": ({"risk.partial_tp_ladder": []}, [(100, 106, 99.5, 105), (105, 105, 102.5, 103)], [(2, 10, "level", 103.0)]),
    "take_profit": ({}, [(100, 103.5, 99.5, 103.5)], [(1, 3, "market", 103.5)]),
    "a ladder": ({"risk.partial_tp_ladder": [[0.5, 0.5], [0.75, 0.5]]}, [(100, 103.5, 99.5, 103.5)], [(1, 10, "market", 103.5)]),
    "partial, then stop": ({}, [(100, 103.5, 99.5, 103.5), (103.5, 103.6, 99, 99.5)],
                           [(1, 3, "market", 103.5), (2, 7, "stop", 0.0)]),
    "no_progress": ({**OFF, "risk.no_progress.enabled": True, "risk.no_progress.minutes": 120},
                    [(100, 101, 99, 100.5)] * 2, [(2, 10, "market", 100.5)]),
    "max_hold": ({**OFF, "risk.max_hold_hours": 3}, [(100, 103, 99, 103)] * 3, [(3, 10, "market", 103.0)]),
    "nothing": ({}, [(100, 102.3, 96.1, 101)], []),
}
STOPS = {"initial_stop", "catastrophic_stop", "no initial stop", "a gap through the stop", "breakeven_stop", "trailing_stop",
         "partial, then stop"}


@pytest.mark.parametrize("direction", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("name", CASES)
def test_an_exit_and_what_it_earns(tmp_path, name, direction):
    changes, hours, expected = CASES[name]
    bench = Bench(tmp_path, hours if direction > 0 else [mirrored(bar) for bar in hours], **changes).begin(10 * direction)
    entry, left = at_market(100.0, direction > 0), {}
    for hour in range(1, len(hours) + 1):
        known = len(bench.port.fetch_fills(0))
        bench.hour()
        for fill in bench.port.fetch_fills(0)[known:]:
            left[hour] = fill
    cash = -direction * 10 * entry
    fees = 10 * entry * 5.5e-4
    assert sorted(left) == [hour for hour, *_ in expected]
    for hour, quantity, kind, number in expected:
        fill, price = left[hour], price_of(kind, number, entry, direction)
        assert float(fill.price) == pytest.approx(price, abs=1e-9)
        assert float(fill.quantity) == quantity
        assert bool(fill.link_id) == (kind == "market")
        cash, fees = cash + direction * quantity * price, fees + quantity * price * 5.5e-4
    held = direction * (10 - sum(quantity for _, quantity, *_ in expected))
    last = hours[-1][3] if direction > 0 else 200 - hours[-1][3]
    assert float(bench.port.fetch_account().equity) == pytest.approx(10_000 + cash - fees + held * last, abs=1e-6)
    risk = bench.risk
    assert float(risk.quantity) == held
    assert risk.cash == pytest.approx(cash - fees, abs=1e-6)
    assert (risk.cooldown_until_ms > 0) == (name in STOPS)
    if name in STOPS:
        assert risk.cooldown_until_ms == (expected[-1][0] + 1 + 4) * HOUR
    assert all(position.stop_price is not None for position in bench.port.fetch_positions())
    bench.close()


@pytest.mark.parametrize("direction", [1, -1], ids=["long", "short"])
def test_a_slope_that_turns_is_counted_once_a_row(tmp_path, direction):
    "Against the side for two rows in a row: out with the first call after the second was decided."
    changes = {**OFF, "risk.regime_flip.enabled": True, "risk.regime_flip.confirm_bars": 2}
    bench = Bench(tmp_path, [FLAT] * 5, **changes).begin(10 * direction, slope=3.0 * direction)
    for hour in (1, 2):
        bench.hour()
        bench.clock.advance(60_000)
        bench.decided(hour, slope=-1.0 * direction)
        sent = [bench.guard().sent for _ in range(3)]  # the same row, looked at again and again
        assert [len(each) for each in sent] == ([0, 0, 0] if hour == 1 else [1, 0, 0])
    assert bench.risk.quantity == 0
    assert bench.risk.cooldown_until_ms == 0  # no stop
    bench.close()


def test_a_stop_that_follows_an_average(tmp_path):
    changes = {**OFF, "risk.trail_atr_mult": 1.5, "risk.trail_mode": "ma_atr", "risk.trail_after_r": 0.0}
    bench = Bench(tmp_path, [(100, 105, 99.5, 105), (105, 105, 104, 105)], **changes).begin()
    stops = []
    for hour in (1, 2):
        bench.hour()
        bench.clock.advance(60_000)
        bench.decided(hour, average={1: 104.0, 2: 103.0}[hour])
        bench.guard()
        stops.append(bench.port.fetch_positions()[0].stop_price)
    assert stops == [Decimal("101.000")] * 2  # 104 − 1.5 · 2, and never back
    bench.close()


# ── Lines that fail ──────────────────────────────────────────────────────────────────────────────────────────────────
FALL = [(100, 101, 95, 95.5), (95.5, 96, 95, 95.5), (95.5, 101, 95, 100.5)]


def test_an_exit_that_is_refused_is_asked_for_again_even_when_the_price_comes_back(tmp_path):
    bench = Bench(tmp_path, FALL).begin()
    line = Line(bench.port)
    bench.port = line
    line.spoilt["submit_order"] = lambda request: Submission("rejected", reason="10016 not now")
    first = bench.hour()
    assert [each.outcome for each in first.sent] == ["rejected"]
    assert bench.risk.leaving is not None
    second = bench.hour()
    assert [each.outcome for each in second.sent] == ["rejected"]
    line.spoilt.clear()
    third = bench.hour()  # back at 100.5, above the stop
    assert [each.outcome for each in third.sent] == ["accepted"]
    assert (bench.port.fetch_positions(), bench.risk.leaving) == ([], None)
    assert bench.risk.cooldown_until_ms == 8 * HOUR
    bench.close()


def test_an_exit_of_which_nothing_is_known_is_not_sent_again(tmp_path):
    bench = Bench(tmp_path, FALL).begin()
    line = Line(bench.port)
    bench.port = line
    line.spoilt["submit_order"] = lambda request: Submission("unknown", reason="connection lost")  # it never arrived
    assert [each.outcome for each in bench.hour().sent] == ["unknown"]
    line.spoilt.clear()
    assert bench.guard().sent == ()  # it may still arrive
    bench.clock.advance(30_000)
    assert [each.outcome for each in bench.guard().sent] == ["accepted"]  # it cannot any more
    assert len(line.posts) == 2
    assert bench.port.fetch_positions() == []
    bench.close()


def test_an_exit_whose_answer_is_lost_is_found(tmp_path):
    bench = Bench(tmp_path, FALL).begin()
    line = Line(bench.port)
    bench.port = line

    def lost(request):
        line.port.submit_order(request)
        return Submission("unknown", reason="time-out")

    line.spoilt["submit_order"] = lost
    assert [each.outcome for each in bench.hour().sent] == ["accepted"]
    assert (len(line.posts), bench.port.fetch_positions(), bench.risk.quantity) == (1, [], 0)
    bench.close()


def test_a_thin_market_is_left_in_several_calls(tmp_path):
    bench = Bench(tmp_path, FALL).begin()
    bench.close()
    bench = Bench(tmp_path, FALL, **{"paper.participation": 4e-6})  # four coins a bar
    quantities = [10.0]
    for _ in range(3):
        bench.hour()
        quantities.append(float(bench.risk.quantity))
    assert quantities == [10, 6, 2, 0]
    assert bench.risk.trades == 1
    bench.close()


def test_a_stop_that_was_taken_away_is_set_again_and_one_that_cannot_be_is_told(tmp_path):
    bench = Bench(tmp_path, [FLAT] * 4).begin()
    bench.port.set_position_stop(COIN, None)
    assert bench.hour().stops == {COIN: Decimal("93.012")}
    bench.port.set_position_stop(COIN, None)
    line = Line(bench.port)
    line.spoilt["set_position_stop"] = lambda *_: Submission("rejected", reason="10006 too many visits")
    line.port, bench.port = Refusing(bench.port), line
    for _ in range(3):
        assert bench.guard().unprotected == (COIN,)
    with bench.state.read() as connection:
        told = [event for event in undelivered(connection) if event.kind == "unprotected"]
    assert len(told) == 1  # once, not in every call
    assert "10006" in told[0].text
    bench.port = line.port.port
    assert bench.guard().unprotected == ()
    assert recall(bench.state).risk.unprotected == ()
    bench.close()


class Refusing:
    "An exchange that sets no stops."

    def __init__(self, port):
        self.port = port

    def __getattr__(self, name):
        return getattr(self.port, name)

    def set_position_stop(self, symbol, price):
        return Submission("rejected", reason="10006 too many visits")


def test_a_resting_entry_does_not_buy_back_what_an_exit_has_closed(tmp_path):
    from xsmom_nb.execution.execute import send_intents
    from xsmom_nb.execution.intents import Intent, link_id
    from xsmom_nb.ports import OrderRequest

    bench = Bench(tmp_path, FALL).begin()
    request = OrderRequest(link_id(HOUR, COIN, "increase"), COIN, "Buy", "Limit", Decimal(5), Decimal(94), "PostOnly", False)
    sent = send_intents(bench.port, bench.state, [Intent(request, "increase")], HOUR, "run", versions(bench), frozenset(),
                        bench.clock, bench.config)
    assert [each.outcome for each in sent] == ["accepted"]
    before = versions(bench)
    bench.hour()
    assert bench.port.fetch_open_orders() == []
    with bench.state.read() as connection:
        assert unfinished_intents(connection) == []
    late = replace(request, link_id=link_id(2 * HOUR, COIN, "open"))
    dropped = send_intents(bench.port, bench.state, [Intent(late, "open")], 2 * HOUR, "run", before, frozenset(), bench.clock,
                           bench.config)  # decided on a snapshot from before the exit
    assert [each.outcome for each in dropped] == ["dropped"]
    bench.close()


def versions(bench):
    with bench.state.read() as connection:
        return {row.symbol: row.version for row in connection.exec_driver_sql("SELECT symbol, version FROM positions")}


# ── Cheap ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_call_in_which_nothing_moves_writes_nothing_and_asks_little(tmp_path):
    bench = Bench(tmp_path, [FLAT] * 3).begin()
    bench.hour()
    line, before = Line(bench.port), export(bench.state)
    bench.port = line
    bench.guard({COIN: [Tick.at(2 * HOUR, 100.0)]})
    assert export(bench.state) == before
    assert line.calls == ["fetch_positions", "fetch_instruments"]
    spent = []
    for _ in range(30):
        begin = time.thread_time()
        guard_once(line.port, bench.state, bench.clock, bench.config, {})
        spent.append(time.thread_time() - begin)
    assert min(spent) < 0.01
    bench.close()


def test_a_flat_account_asks_nothing_at_all(tmp_path):
    bench = Bench(tmp_path, [FLAT] * 3)
    bench.port = line = Line(bench.port)
    assert bench.guard().sent == ()
    assert line.calls == []
    bench.close()


# ── Any path ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.lists(st.tuples(*[st.integers(-24, 24)] * 3), min_size=3, max_size=8), st.sampled_from([10, -10]))
@settings(max_examples=15, deadline=None)
def test_stops_never_move_back_and_never_are_missing(tmp_path_factory, moves, quantity):
    hours, close = [], 100.0
    for drift, up, down in moves:
        open_, close = close, max(close + drift / 8, 20.0)
        hours.append((open_, max(open_, close) + abs(up) / 8, min(open_, close) - abs(down) / 8, close))
    bench, stops = Bench(tmp_path_factory.mktemp("path"), hours).begin(quantity), []
    for _ in hours:
        bench.hour()
        for position in bench.port.fetch_positions():
            assert position.stop_price is not None
            stops.append(float(position.stop_price) * (1 if quantity > 0 else -1))
    assert stops == sorted(stops)
    fills = bench.port.fetch_fills(0)
    assert float(bench.risk.quantity) == float(sum(fill.signed_quantity for fill in fills))
    assert 0 <= float(bench.risk.quantity) * (1 if quantity > 0 else -1) <= 10
    bench.close()


def test_a_line_on_which_nothing_can_be_asked_about_an_order_still_protects_the_position(tmp_path):
    bench = Bench(tmp_path, FALL).begin()
    line = Line(bench.port)
    bench.port = line
    line.spoilt["submit_order"] = lambda request: Submission("unknown", reason="connection lost")
    line.deaf["find_order"] = math.inf
    assert [each.outcome for each in bench.hour().sent] == ["unknown"]
    line.port.set_position_stop(COIN, None)
    report = bench.guard()
    assert (report.sent, report.stops, report.unprotected) == ((), {COIN: Decimal("93.012")}, ())
    assert len(line.posts) == 1
    bench.close()
