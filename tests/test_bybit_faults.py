"""Every fault of a line and an exchange, while the adapter works: its outcome is called right, and then it sees the truth."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from venues import HOUR, quick_line, simulated, unhurried
from xsmom_nb.errors import DataError
from xsmom_nb.exchange.bybit import BybitExchange, paged, set_up
from xsmom_nb.exchange.faults import FaultPlan, FaultRule
from xsmom_nb.exchange.protocol import ERRORS
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ops.storm import FIRST_BAR, rounded, storm_of
from xsmom_nb.ops.truth import sent_names, truth_of, view_differences
from xsmom_nb.ports import Instrument, OrderRequest, Submission, TransientError

pytest.importorskip("ccxt", reason="no package ccxt found")
SYMBOL, OTHER = "BTCUSDT", "ETHUSDT"
PATIENCE_MS = 250  # how long the client waits for an answer where the fault is that none comes
COLD_MS = 60_000  # … and else: the first answer of a fresh checkout waits for a compiler


@dataclass
class Bench:
    "An adapter at work on a simulator, and the truth beside it."

    simulator: Simulator
    url: str
    port: BybitExchange
    start_ms: int
    names: Any  # fresh names of orders
    rules: dict[str, Instrument]
    marks: dict[str, Decimal]  # the clock stands

    def strike(self, fault: str, on: str, **parameters: Any) -> None:
        "Let a fault befall the next request of a kind."
        self.client.timeout = PATIENCE_MS if fault in ("delay", "hang") else COLD_MS
        times = len(self.simulator.plan.rules)
        self.simulator.plan = self.simulator.plan.with_rule(FaultRule(f"{fault} {times}", fault, on, parameters=parameters))

    def wait_again(self) -> None:
        "Be patient once the fault has struck."
        self.client.timeout = COLD_MS

    @property
    def client(self) -> Any:
        "The client of ccxt under it all."
        return self.port.line._client

    def struck(self) -> int:
        return sum(self.simulator.plan.struck.values())

    def clear(self) -> None:
        self.simulator.plan = FaultPlan()
        self.wait_again()

    def truth(self) -> dict[str, Any]:
        return truth_of(self.url)

    def order(self, side: str = "Buy", notional: int = 300, at: str | None = None, reduce_only: bool = False,
              symbol: str = SYMBOL) -> OrderRequest:
        "An order under a fresh name; a limit at a factor of the mark."
        rules, mark = self.rules[symbol], self.marks[symbol]
        price = rounded(mark * Decimal(at), rules.price_tick) if at else None
        return OrderRequest(f"n{next(self.names)}", symbol, side, "Limit" if at else "Market",
                            rounded(Decimal(notional) / mark, rules.quantity_step), price, "GTC" if at else "IOC", reduce_only)

    def require_truth(self) -> None:
        assert view_differences(self.port, self.truth(), self.start_ms) == []


@pytest.fixture(scope="module")
def panel():
    return synthetic_panel(seed=11, bars=FIRST_BAR + 60, symbols=4)


@pytest.fixture(scope="module")
def opened(panel):
    "An account with two positions, one of them protected, and two orders that wait."
    start_ms = int(panel.open_time_ms[FIRST_BAR]) + HOUR + 60_000
    simulator = unhurried(simulated(panel, start_ms))
    with serving(simulator) as url:
        line = quick_line(simulator, url, timeout=COLD_MS)
        port = BybitExchange(line)
        set_up(line, [each.symbol for each in port.fetch_instruments()], leverage=3)
        rules, marks = {each.symbol: each for each in port.fetch_instruments()}, {}
        bench = Bench(simulator, url, port, start_ms, iter(range(10**6)), rules, marks)
        marks.update({each.symbol: each.mark for each in port.fetch_tickers()})
        for order in (bench.order(), bench.order("Sell", symbol=OTHER), bench.order(at="0.5"), bench.order("Sell", at="1.9")):
            assert port.submit_order(order).outcome == "accepted"
        position = port.fetch_positions()[0]
        tick = rules[position.symbol].price_tick
        assert port.set_position_stop(position.symbol, rounded(position.mark_price * Decimal("0.5"), tick)).outcome == "accepted"
        simulator.pace.move(simulator.pace.now_ms() + 9 * HOUR)
        marks.update({each.symbol: each.mark for each in port.fetch_tickers()})
        bench.require_truth()
        yield bench


@pytest.fixture
def bench(opened):
    opened.clear()
    yield opened
    opened.clear()
    opened.require_truth()


# ── What was sent ────────────────────────────────────────────────────────────────────────────────────────────────────
UNKNOWN_CODES = {429, 10000, 10016, 110079, 3400214}  # where the exchange does not know itself
SENT: dict[str, tuple[str, dict[str, Any], str, bool]] = {  # fault, its parameters, the outcome, whether the order arrived
    "delay": ("delay", {"wait_ms": 2 * PATIENCE_MS}, "unknown", True),  # … when nobody listens any more
    "line cut before": ("drop_before", {}, "unknown", False),
    "line cut after": ("drop_after", {}, "unknown", True),
    "no answer": ("hang", {"wait_ms": 2 * PATIENCE_MS}, "unknown", False),
    **{f"status {status}": ("status", {"status": status}, "unknown", False) for status in (400, 404, 408, 500, 502, 503, 504)},
    **{f"status {status}": ("status", {"status": status}, "rejected", False) for status in (401, 403, 429)},
    **{f"status {status} after": ("status_after", {"status": status}, "unknown", True) for status in (500, 502, 504)},
    **{kind: (kind, {}, "unknown", True) for kind in ("empty", "html", "truncated", "null_result")},
    "code 10016": ("ret_code", {"code": 10016}, "unknown", False),
    **{f"code {code}": ("ret_code", {"code": code}, "rejected", False) for code in (110001, 110008, 110010)},
    **{f"code {code} after": ("ret_code_after", {"code": code}, "unknown", True) for code in sorted(UNKNOWN_CODES)},
    "request timeout": ("ret_code", {"code": 10016, "message": "Request timeout, please try again later"}, "unknown", False),
    "rate limit": ("rate_limit", {}, "rejected", False),
    "shut out": ("forbidden", {}, "rejected", False),
    "clock of the server ahead": ("clock_skew", {"skew_ms": 10_000}, "rejected", False),
    "clock of the server behind": ("clock_skew", {"skew_ms": -10_000}, "rejected", False),
}


def later(bench: Bench, question: Callable[[], Any]) -> Any:
    "What is answered once late requests have arrived."
    end = time.monotonic() + 8 * PATIENCE_MS / 1000
    while not (found := question()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("case", SENT)
def test_an_order(bench, case):
    fault, parameters, outcome, arrives = SENT[case]
    order = bench.order(notional=20, at="0.6")
    bench.strike(fault, "POST /v5/order/create", **parameters)
    sent = bench.port.submit_order(order)
    bench.wait_again()
    assert bench.struck() == 1
    assert sent.outcome == outcome
    assert sent.reason
    assert not sent.order_id
    found = later(bench, lambda: bench.port.find_order(SYMBOL, order.link_id)) if arrives else \
        bench.port.find_order(SYMBOL, order.link_id)
    assert (found is not None) == arrives
    true = [each for each in bench.truth()["orders"].values() if each["link_id"] == order.link_id]
    assert len(true) == arrives
    if arrives:  # the same name again is no second order
        again = bench.port.submit_order(order)
        assert (again.outcome, again.reason.split()[0]) == ("rejected", "110072")
        assert bench.port.cancel_order(SYMBOL, order.link_id).outcome == "accepted"


def test_an_order_that_is_answered_with_a_number(bench):
    order = bench.order(notional=20, at="0.6")
    for code in ERRORS:
        bench.strike("ret_code", "POST /v5/order/create", code=code)
        sent = bench.port.submit_order(order)
        assert (sent.outcome, sent.reason.split()[0]) == ("unknown" if code in UNKNOWN_CODES else "rejected", str(code))
    assert (bench.struck(), bench.port.find_order(SYMBOL, order.link_id)) == (len(ERRORS), None)


CANCELLED = ("line cut before", "line cut after", "no answer", "status 502", "status 504 after", "empty", "html", "truncated",
             "null_result", "code 10016", "code 10000 after", "code 110001", "code 110008", "code 110010", "rate limit")


@pytest.mark.parametrize("case", CANCELLED)
def test_a_cancellation(bench, case):
    fault, parameters, outcome, arrives = SENT[case]
    order = bench.order(notional=20, at="0.6")
    bench.port.submit_order(order)
    bench.strike(fault, "POST /v5/order/cancel", **parameters)
    assert bench.port.cancel_order(SYMBOL, order.link_id).outcome == outcome
    bench.wait_again()
    assert bench.port.find_order(SYMBOL, order.link_id).is_open != arrives
    assert bench.port.cancel_order(SYMBOL, order.link_id).outcome == ("rejected" if arrives else "accepted")
    assert bench.port.find_order(SYMBOL, order.link_id).status == "Cancelled"


@pytest.mark.parametrize("case", CANCELLED[:11])
def test_a_stop(bench, case):
    fault, parameters, outcome, arrives = SENT[case]
    position = next(each for each in bench.port.fetch_positions() if each.symbol == SYMBOL)
    tick = bench.rules[SYMBOL].price_tick
    before, level = position.stop_price, (position.stop_price or rounded(position.mark_price / 2, tick)) + tick
    bench.strike(fault, "POST /v5/position/trading-stop", **parameters)
    assert bench.port.set_position_stop(SYMBOL, level).outcome == outcome

    def stop() -> Decimal | None:
        return next(each.stop_price for each in bench.port.fetch_positions() if each.symbol == SYMBOL)

    assert stop() == (level if arrives else before)
    assert bench.port.set_position_stop(SYMBOL, level) == Submission("accepted", "")  # set already, or set now
    assert stop() == level


def test_not_modified_is_believed_only_when_it_stands(bench):
    position = next(each for each in bench.port.fetch_positions() if each.stop_price is not None)
    assert bench.port.set_position_stop(position.symbol, position.stop_price).outcome == "accepted"
    bench.strike("ret_code", "POST /v5/position/trading-stop", code=34040)
    assert bench.port.set_position_stop(position.symbol, position.stop_price + 1).outcome == "rejected"


# ── What was read ────────────────────────────────────────────────────────────────────────────────────────────────────
READS: dict[str, tuple[str, Callable[[Bench], Any]]] = {
    "positions": ("GET /v5/position/list", lambda bench: bench.port.fetch_positions()),
    "open orders": ("GET /v5/order/realtime", lambda bench: bench.port.fetch_open_orders()),
    "one order": ("GET /v5/order/*", lambda bench: bench.port.find_order(SYMBOL, "n2")),
    "no order": ("GET /v5/execution/list", lambda bench: bench.port.find_order(SYMBOL, "nobody")),
    "fills": ("GET /v5/execution/list", lambda bench: bench.port.fetch_fills(bench.start_ms)),
    "ledger": ("GET /v5/account/transaction-log", lambda bench: bench.port.fetch_ledger(bench.start_ms)),
    "account": ("GET /v5/account/wallet-balance", lambda bench: bench.port.fetch_account()),
    "tickers": ("GET /v5/market/tickers", lambda bench: bench.port.fetch_tickers()),
    "instruments": ("GET /v5/market/instruments-info", lambda bench: bench.port.fetch_instruments()),
    "bars": ("GET /v5/market/kline", lambda bench: bench.port.fetch_bars(SYMBOL, "1h", bench.start_ms - 20 * HOUR, 10)),
    "funding": ("GET /v5/market/funding/history", lambda bench: bench.port.fetch_funding(SYMBOL, 0, 10)),
    "clock": ("GET /v5/market/time", lambda bench: bench.port.fetch_time_ms()),
}
PASSES = {429, 10000, 10002, 10006, 10016, 110063, 110079, 3400214}  # the same question may be answered later
LIES: dict[str, tuple[str, dict[str, Any], type[Exception]]] = {
    **{case: (fault, parameters, TransientError) for case, (fault, parameters, outcome, _) in SENT.items()
       if not fault.startswith(("ret_code", "clock_skew", "delay", "hang")) and outcome == "unknown"},
    "shut out": ("forbidden", {}, TransientError), "rate limit": ("rate_limit", {}, TransientError),
    "status 401": ("status", {"status": 401}, DataError), "status 429": ("status", {"status": 429}, TransientError),
    **{f"code {code}": ("ret_code", {"code": code}, TransientError if code in PASSES else DataError)
       for code in (*sorted(PASSES), 10001, 10003, 10004, 10005, 10010, 33004)},
}


@pytest.mark.parametrize("name", READS)
def test_a_read_fails_or_tells_the_truth(bench, name):
    path, read = READS[name]
    expected = read(bench)
    for case, (fault, parameters, error) in LIES.items():
        bench.clear()
        bench.strike(fault, path, **parameters)
        with pytest.raises((TransientError, DataError)) as caught:
            read(bench)
        assert caught.type is error, case
        assert bench.struck() == 1, case
        assert read(bench) == expected, case


@pytest.mark.parametrize("fault", ["delay", "hang"])
def test_a_read_that_takes_too_long_is_given_up(bench, fault):
    expected = bench.port.fetch_positions()
    bench.strike(fault, "GET /v5/position/list", wait_ms=2 * PATIENCE_MS)
    with pytest.raises(TransientError, match="RequestTimeout"):
        bench.port.fetch_positions()
    bench.wait_again()
    assert bench.port.fetch_positions() == expected


@pytest.mark.parametrize("skew_ms", [10_000, -10_000])
def test_a_read_at_the_wrong_time_passes(bench, skew_ms):
    bench.strike("clock_skew", "GET /v5/position/list", skew_ms=skew_ms)
    with pytest.raises(TransientError, match="10002"):
        bench.port.fetch_positions()


@pytest.mark.parametrize("name", ["positions", "open orders", "fills", "ledger"])
def test_short_pages_are_read_to_the_end(bench, name):
    path, read = READS[name]
    expected = read(bench)
    assert len(expected) >= 2
    bench.simulator.plan = FaultPlan(rules=(FaultRule("short", "short_page", path, times=None),))
    assert read(bench) == expected
    assert bench.struck() >= len(expected)


def test_a_list_without_end_is_an_error(bench):
    class Endless:
        def read(self, path: str, **query: object) -> dict[str, Any]:
            return {"list": [{}], "nextPageCursor": "again"}

    with pytest.raises(TransientError, match="does not end"):
        list(paged(Endless(), "order/realtime", 50))


def test_bars_in_disorder_ascend_and_a_gap_is_not_filled(bench):
    _, read = READS["bars"]
    expected = read(bench)
    bench.strike("out_of_order", "GET /v5/market/kline")
    assert read(bench) == expected
    bench.strike("gap", "GET /v5/market/kline", row=3)
    torn = read(bench)
    assert len(torn) == len(expected) - 1
    assert set(torn) < set(expected)


def test_prices_of_the_past_are_prices_of_the_past(bench):
    expected = bench.port.fetch_bars(SYMBOL, "1h", bench.start_ms, 20)
    bench.strike("stale", "GET /v5/market/kline", by_ms=3 * HOUR)
    stale = bench.port.fetch_bars(SYMBOL, "1h", bench.start_ms, 20)
    assert stale[:-1] == expected[: len(stale) - 1]
    assert len(stale) == len(expected) - 3


def test_lists_that_lag_are_caught_up_with(bench):
    "An order that REST does not tell yet is not lost: it is found as soon as the lists have caught up."
    order = bench.order(notional=20, at="0.6")
    bench.strike("drop_after", "POST /v5/order/create")
    bench.simulator.plan = bench.simulator.plan.with_rule(FaultRule("lag", "lagging", "GET /v5/*", times=3))
    assert bench.port.submit_order(order).outcome == "unknown"
    assert bench.port.find_order(SYMBOL, order.link_id) is None
    assert bench.port.find_order(SYMBOL, order.link_id).status == "New"
    bench.port.cancel_order(SYMBOL, order.link_id)


def test_an_order_that_filled_and_is_not_told_yet_is_not_lost(bench):
    order = bench.order(notional=20)
    assert bench.port.submit_order(order).outcome == "accepted"
    bench.simulator.plan = FaultPlan(rules=(FaultRule("lag", "lagging", "GET /v5/order/*", times=2),))
    with pytest.raises(TransientError, match="has filled and is not told yet"):
        bench.port.find_order(SYMBOL, order.link_id)
    assert bench.port.find_order(SYMBOL, order.link_id).status == "Filled"


# ── Races ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("share", [1, 2])
def test_a_fill_overtakes_a_cancellation(bench, share):
    order = bench.order(notional=200, at="0.99")
    assert bench.port.submit_order(order).outcome == "accepted"
    quantity = rounded(order.quantity / share, Decimal("0.00001"))
    bench.strike("engine", "POST /v5/order/cancel", name="fill",
                 parameters={"symbol": SYMBOL, "orderLinkId": order.link_id, "qty": str(quantity)})
    sent, found = bench.port.cancel_order(SYMBOL, order.link_id), bench.port.find_order(SYMBOL, order.link_id)
    assert (sent.outcome, found.status) == (("rejected", "Filled") if share == 1 else ("accepted", "Cancelled"))
    assert found.filled_quantity == quantity
    assert bench.port.fetch_fills(bench.start_ms)[-1].quantity == quantity


def test_a_position_that_is_taken_away_meets_its_own_closing(bench):
    position = next(each for each in bench.port.fetch_positions() if each.symbol == OTHER)
    closing = OrderRequest(f"n{next(bench.names)}", OTHER, "Buy", "Market", abs(position.quantity), None, "IOC", True)
    bench.strike("engine", "POST /v5/order/create", name="deleverage",
                 parameters={"symbol": OTHER, "qty": str(abs(position.quantity))})
    sent = bench.port.submit_order(closing)
    assert (sent.outcome, sent.reason.split()[0]) == ("rejected", "110017")
    assert OTHER not in {each.symbol for each in bench.port.fetch_positions()}
    assert bench.port.fetch_fills(bench.start_ms)[-1].link_id == ""
    assert bench.port.submit_order(bench.order("Sell", symbol=OTHER)).outcome == "accepted"


def test_somebody_trades_by_hand_meanwhile(bench):
    bench.strike("engine", "POST /v5/order/create", name="trade", parameters={"symbol": SYMBOL, "side": "Sell", "qty": "0.002"})
    before = next(each.quantity for each in bench.port.fetch_positions() if each.symbol == SYMBOL)
    order = bench.order(notional=100)
    assert bench.port.submit_order(order).outcome == "accepted"
    after = next(each.quantity for each in bench.port.fetch_positions() if each.symbol == SYMBOL)
    assert after == before + order.quantity - Decimal("0.002")


# ── All of it at once ────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_trader_in_bad_weather_ends_with_the_truth(tmp_path):
    storm = storm_of(faults=100, seed=random.Random("weather").randrange(1000), folder=tmp_path)
    assert storm.faults >= 100
    assert min(storm.orders, storm.fills) >= 20
    assert len([kind for kind, count in storm.struck.items() if count]) >= 10
    assert storm.twice == []
    assert storm.differences == []
    assert sum(sent_names(tmp_path / "journal.jsonl").values()) == storm.orders
