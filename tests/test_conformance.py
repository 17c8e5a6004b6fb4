"""What every exchange behind the port promises, the same tests word for word on paper and through Bybit's protocol."""

from decimal import Decimal

import numpy as np
import pytest

from xsmom_nb.errors import DataError
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import ExchangePort, OrderRequest
from venues import HOUR, VENUES

pytest.importorskip("ccxt", reason="no package ccxt found")
BARS, FIRST = 400, 300
SYMBOL, OTHER = "BTCUSDT", "ETHUSDT"


@pytest.fixture(scope="module")
def panel():
    return synthetic_panel(seed=11, bars=BARS, symbols=4)


@pytest.fixture(params=sorted(VENUES))
def venue(request, panel, tmp_path):
    start_ms = int(panel.open_time_ms[FIRST]) + HOUR + 60_000
    with VENUES[request.param](panel, start_ms, tmp_path) as opened:
        yield opened


def book(venue, symbol=SYMBOL):
    return next(each for each in venue.port.fetch_tickers() if each.symbol == symbol)


def rules(venue, symbol=SYMBOL):
    return next(each for each in venue.port.fetch_instruments() if each.symbol == symbol)


def level(venue, factor, symbol=SYMBOL):
    "A price at a factor of the mark."
    tick = rules(venue, symbol).price_tick
    return (book(venue, symbol).mark * Decimal(str(factor)) / tick).to_integral_value() * tick


def request_for(venue, name, side="Buy", notional=500, price=None, force="GTC", reduce_only=False, symbol=SYMBOL):
    "An order of about a value; a limit at a factor of the mark."
    contract, ticker = rules(venue, symbol), book(venue, symbol)
    quantity = (Decimal(notional) / ticker.mark / contract.quantity_step).to_integral_value() * contract.quantity_step
    limit = None if price is None else level(venue, price, symbol)
    kind = "Market" if limit is None else "Limit"
    return OrderRequest(name, symbol, side, kind, quantity, limit, "IOC" if limit is None else force, reduce_only)


def submit(venue, name, *arguments, **changes):
    asked = request_for(venue, name, *arguments, **changes)
    return asked, venue.port.submit_order(asked)


def held(venue, symbol=SYMBOL):
    return next((each for each in venue.port.fetch_positions() if each.symbol == symbol), None)


# ── Reading the market ───────────────────────────────────────────────────────────────────────────────────────────────
def test_it_keeps_the_protocol(venue):
    assert isinstance(venue.port, ExchangePort)


def test_its_clock_is_the_venues(venue):
    assert venue.port.fetch_time_ms() == venue.now_ms()
    venue.advance(HOUR)
    assert venue.port.fetch_time_ms() == venue.now_ms()


def test_instruments_ascend_and_trade(venue, panel):
    found = venue.port.fetch_instruments()
    assert [each.symbol for each in found] == sorted(each.symbol for each in found)
    assert {each.symbol for each in found} <= set(panel.symbols)
    assert rules(venue).is_trading
    assert rules(venue).price_tick > 0


def test_tickers_ascend_around_the_last_close(venue, panel):
    found = venue.port.fetch_tickers()
    assert [each.symbol for each in found] == sorted(each.symbol for each in found)
    assert float(book(venue).last) == panel.close[FIRST, panel.symbols.index(SYMBOL)]
    assert all(each.bid < each.ask for each in found)


def test_bars_are_the_first_ones_from_a_time_on(venue, panel):
    start_ms, i = int(panel.open_time_ms[40]), panel.symbols.index(SYMBOL)
    found = venue.port.fetch_bars(SYMBOL, "1h", start_ms, 30)
    assert [each.open_time_ms for each in found] == panel.open_time_ms[40:70].tolist()
    np.testing.assert_array_equal([each.close for each in found], panel.close[40:70, i])
    np.testing.assert_allclose([each.volume for each in found], panel.volume[40:70, i], rtol=1e-12)


def test_bars_go_on_page_by_page_to_the_present(venue, panel):
    times, start_ms = [], 0
    while page := venue.port.fetch_bars(SYMBOL, "1h", start_ms, 97):
        times += [each.open_time_ms for each in page]
        start_ms = times[-1] + 1
    closed = [each for each in times if each + HOUR <= venue.now_ms()]
    assert closed == panel.open_time_ms[: FIRST + 1].tolist()
    assert times == sorted(set(times))


def test_nothing_is_told_of_the_future(venue, panel):
    assert not venue.port.fetch_bars(SYMBOL, "1h", int(panel.open_time_ms[FIRST + 2]), 10)
    assert all(each.time_ms <= venue.now_ms() for each in venue.port.fetch_funding(SYMBOL, 0, 1000))


def test_funding_ascends_page_by_page(venue, panel):
    column = panel.funding[: FIRST + 1, panel.symbols.index(SYMBOL)]
    found, start_ms = [], 0
    while page := venue.port.fetch_funding(SYMBOL, start_ms, 7):
        found += page
        start_ms = found[-1].time_ms + 1
    np.testing.assert_allclose([each.rate for each in found], column[np.flatnonzero(column)], rtol=1e-9)


def test_an_unknown_symbol_is_an_error_that_names_it(venue):
    with pytest.raises(DataError, match=r"NOUSDT|10001"):
        venue.port.fetch_bars("NOUSDT", "1h", 0, 10)


# ── An account ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_new_account_has_money_and_nothing_else(venue):
    account = venue.port.fetch_account()
    assert account.equity == account.wallet_balance == account.available == 10_000
    assert not venue.port.fetch_positions()
    assert not venue.port.fetch_open_orders()
    assert not venue.port.fetch_fills(venue.start_ms)
    assert [(each.kind, each.amount) for each in venue.port.fetch_ledger(venue.start_ms)] == [("transfer", Decimal(10_000))]


def test_a_limit_order_waits_and_is_found_by_its_name(venue):
    asked, sent = submit(venue, "waits", price=0.9)
    assert sent.outcome == "accepted"
    assert sent.order_id
    order = venue.port.find_order(SYMBOL, "waits")
    assert [order] == list(venue.port.fetch_open_orders())
    assert (order.order_id, order.link_id, order.status) == (sent.order_id, "waits", "New")
    assert (order.quantity, order.price, order.side, order.filled_quantity) == (asked.quantity, asked.price, "Buy", 0)


def test_margin_for_a_waiting_order_is_not_available(venue):
    asked, _ = submit(venue, "waits", notional=3000, price=0.95)
    account = venue.port.fetch_account()
    assert account.equity == 10_000
    assert abs(account.available - (10_000 - asked.quantity * book(venue).mark / 3)) < Decimal("0.01")


def test_a_name_that_nobody_used_finds_nothing(venue):
    assert venue.port.find_order(SYMBOL, "nobody") is None


def test_a_name_is_used_once(venue):
    submit(venue, "twice", price=0.9)
    _, again = submit(venue, "twice", price=0.9)
    assert (again.outcome, again.reason.split()[0]) == ("rejected", "110072")
    assert len(venue.port.fetch_open_orders()) == 1


def test_a_cancelled_order_ends_and_cannot_be_cancelled_again(venue):
    submit(venue, "gone", price=0.9)
    assert venue.port.cancel_order(SYMBOL, "gone").outcome == "accepted"
    assert not venue.port.fetch_open_orders()
    assert venue.port.find_order(SYMBOL, "gone").status == "Cancelled"
    again = venue.port.cancel_order(SYMBOL, "gone")
    assert (again.outcome, again.reason.split()[0]) == ("rejected", "110001")
    assert venue.port.cancel_order(SYMBOL, "nobody").outcome == "rejected"


def test_a_post_only_order_that_would_take_is_accepted_and_cancelled(venue):
    _, sent = submit(venue, "crosses", price=1.01, force="PostOnly")
    assert sent.outcome == "accepted"
    order = venue.port.find_order(SYMBOL, "crosses")
    assert (order.status, order.filled_quantity) == ("Cancelled", 0)
    assert order.reason == "EC_PostOnlyWillTakeLiquidity"


@pytest.mark.parametrize(("changes", "code"), [
    ({"quantity": Decimal("0.0000001")}, "10001"),
    ({"quantity": Decimal("1e12")}, "10001"),
    ({"symbol": "NOUSDT"}, "10001"),
    ({"reduce_only": True}, "110017"),
], ids=["below the least", "above the most", "unknown", "nothing to reduce"])
def test_what_cannot_be_is_rejected_with_bybits_number(venue, changes, code):
    asked = request_for(venue, "wrong")
    wrong = OrderRequest(**{name: changes.get(name, getattr(asked, name)) for name in asked.__dataclass_fields__})
    sent = venue.port.submit_order(wrong)
    assert (sent.outcome, sent.reason.split()[0]) == ("rejected", code)
    assert venue.port.find_order(asked.symbol, "wrong") is None


def test_more_than_can_be_afforded_is_rejected(venue):
    _, sent = submit(venue, "large", notional=40_000)
    assert (sent.outcome, sent.reason.split()[0]) == ("rejected", "110007")
    assert venue.port.fetch_account().available == 10_000


# ── Trading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_market_order_takes_at_once(venue):
    asked, sent = submit(venue, "now")
    order, [fill], position = venue.port.find_order(SYMBOL, "now"), venue.port.fetch_fills(venue.start_ms), held(venue)
    assert sent.outcome == "accepted"
    assert (order.status, order.filled_quantity, order.average_price) == ("Filled", asked.quantity, fill.price)
    assert (fill.order_id, fill.link_id, fill.quantity, fill.is_maker) == (sent.order_id, "now", asked.quantity, False)
    assert fill.price >= book(venue).ask
    assert (position.quantity, position.average_price) == (asked.quantity, fill.price)
    assert fill.fee == (fill.quantity * fill.price * Decimal("0.00055")).quantize(Decimal("1e-8"))


def test_equity_is_wallet_and_unrealised_gain(venue):
    submit(venue, "now", notional=3000)
    venue.advance(5 * HOUR)
    account, position = venue.port.fetch_account(), held(venue)
    assert abs(account.equity - account.wallet_balance - position.unrealized) < Decimal("1e-6")
    assert account.equity != account.wallet_balance


def test_a_waiting_order_fills_when_the_price_comes(venue, panel):
    asked, _ = submit(venue, "patient", price=0.999)
    i, hours = panel.symbols.index(SYMBOL), 0
    while float(asked.price) <= panel.low[FIRST + 1 + hours, i]:
        hours += 1
    venue.advance((hours + 1) * HOUR)
    order, [fill] = venue.port.find_order(SYMBOL, "patient"), venue.port.fetch_fills(venue.start_ms)
    assert (order.status, fill.price, fill.is_maker) == ("Filled", asked.price, True)
    assert fill.time_ms == int(panel.open_time_ms[FIRST + 1 + hours]) + HOUR
    assert held(venue).quantity == asked.quantity


def test_a_sale_closes_what_was_bought_and_the_books_balance(venue):
    submit(venue, "in", notional=3000)
    venue.advance(30 * HOUR)
    position = held(venue)
    closing = OrderRequest("out", SYMBOL, "Sell", "Market", position.quantity, None, "IOC", reduce_only=True)
    assert venue.port.submit_order(closing).outcome == "accepted"
    assert held(venue) is None
    account, ledger = venue.port.fetch_account(), venue.port.fetch_ledger(venue.start_ms)
    assert {each.kind for each in ledger} == {"transfer", "trade", "fee", "funding"}
    assert abs(sum(each.amount for each in ledger) - account.equity) < Decimal("1e-6")
    assert [each.time_ms for each in ledger] == sorted(each.time_ms for each in ledger)
    assert len({each.entry_id for each in ledger}) == len(ledger)


def test_a_sale_beyond_the_position_turns_it(venue):
    first, _ = submit(venue, "in", notional=500)
    second, _ = submit(venue, "turn", side="Sell", notional=1500)
    assert held(venue).quantity == first.quantity - second.quantity < 0


def test_reduce_only_takes_no_more_than_there_is(venue):
    first, _ = submit(venue, "in", notional=500)
    submit(venue, "out", side="Sell", notional=1500, reduce_only=True)
    order = venue.port.find_order(SYMBOL, "out")
    assert held(venue) is None
    assert (order.status, order.filled_quantity) == ("Cancelled", first.quantity)


def test_fills_and_movements_begin_where_they_are_asked_from(venue):
    submit(venue, "one")
    venue.advance(26 * HOUR)
    since_ms = venue.now_ms()
    submit(venue, "two", symbol=OTHER)
    assert [each.link_id for each in venue.port.fetch_fills(since_ms)] == ["two"]
    assert [each.link_id for each in venue.port.fetch_fills(venue.start_ms)] == ["one", "two"]
    assert all(each.time_ms >= since_ms for each in venue.port.fetch_ledger(since_ms))


def test_many_open_orders_are_all_told(venue):
    for number in range(45):
        submit(venue, f"n{number}", notional=20, price=0.5 + number / 200)
    assert {each.link_id for each in venue.port.fetch_open_orders()} == {f"n{number}" for number in range(45)}


# ── Stops ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_stop_rests_moves_and_goes(venue):
    submit(venue, "in")
    first, second = level(venue, 0.8), level(venue, 0.85)
    for stop in (first, first, second, None, None):
        assert venue.port.set_position_stop(SYMBOL, stop).outcome == "accepted"
        assert held(venue).stop_price == stop
    assert not venue.port.fetch_open_orders()


def test_a_stop_needs_a_position_and_the_right_side(venue):
    assert venue.port.set_position_stop(SYMBOL, level(venue, 0.9)).outcome == "rejected"
    submit(venue, "in", side="Sell")
    assert venue.port.set_position_stop(SYMBOL, level(venue, 0.9)).outcome == "rejected"
    assert held(venue).stop_price is None
    assert venue.port.set_position_stop(SYMBOL, level(venue, 1.1)).outcome == "accepted"


def test_a_stop_that_is_reached_closes_the_position(venue, panel):
    asked, _ = submit(venue, "in", notional=2000)
    stop, i = level(venue, 0.995), panel.symbols.index(SYMBOL)
    assert venue.port.set_position_stop(SYMBOL, stop).outcome == "accepted"
    rows = np.arange(FIRST + 1, BARS)
    reached = int(rows[panel.low[FIRST + 1 :, i] <= float(stop)][0])
    venue.advance((reached - FIRST) * HOUR)
    assert held(venue) is None
    last = venue.port.fetch_fills(venue.start_ms)[-1]
    assert (last.side, last.quantity, last.link_id, last.is_maker) == ("Sell", asked.quantity, "", False)
    assert last.price <= stop


def test_a_stop_follows_the_size_and_dies_with_the_position(venue):
    first, _ = submit(venue, "in")
    venue.port.set_position_stop(SYMBOL, level(venue, 0.8))
    submit(venue, "more", notional=700)
    assert held(venue).stop_price is not None
    assert held(venue).quantity > first.quantity
    venue.port.submit_order(OrderRequest("out", SYMBOL, "Sell", "Market", held(venue).quantity, None, "IOC", reduce_only=True))
    submit(venue, "again")
    assert held(venue).stop_price is None
