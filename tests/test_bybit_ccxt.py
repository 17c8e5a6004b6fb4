"""ccxt trades on the simulator: every private call that ccxt makes, parsed; the rules of the exchange, each met through ccxt."""

import asyncio
import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from test_simulator_ccxt import pointed, side
from venues import HOUR, USER, paper_config, simulated, unhurried
from xsmom_nb.config import with_values
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.wire import matches_example
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ops.truth import truth_of

ccxt = pytest.importorskip("ccxt", reason="no package ccxt found")
asynchronous, streaming = pytest.importorskip("ccxt.async_support"), pytest.importorskip("ccxt.pro")

FIRST = 300  # hour of the recording in which trading begins
BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
KEYS = {"apiKey": "the-key", "secret": "the-secret", "enableRateLimit": False, "timeout": 60_000}


@pytest.fixture(scope="module")
def panel():
    return synthetic_panel(seed=11, bars=FIRST + 260, symbols=4)


class Desk:
    "A ccxt client, the exchange it talks to, and the truth."

    def __init__(self, simulator, url: str) -> None:
        self.simulator, self.url, self.start_ms = simulator, url, simulator.pace.now_ms()
        self.exchange = self.client()
        self.exchange.load_markets()

    def client(self, kind=None, **changes: Any):
        return pointed(kind or ccxt.bybit, self.simulator, self.url, **{**KEYS, **changes})

    def price(self, factor: str = "1", symbol: str = BTC) -> float:
        return float(self.exchange.price_to_precision(symbol, self.exchange.fetch_ticker(symbol)["markPrice"] * float(factor)))

    def amount(self, notional: float, symbol: str = BTC) -> float:
        return float(self.exchange.amount_to_precision(symbol, notional / self.price(symbol=symbol)))

    def buy(self, notional: float = 500, **parameters: Any) -> dict[str, Any]:
        return self.exchange.create_order(BTC, "market", "buy", self.amount(notional), None, parameters)

    def find(self, order: dict[str, Any]) -> dict[str, Any]:
        return self.exchange.fetch_order(order["id"], order["symbol"] or BTC, {"acknowledged": True})

    def advance(self, hours: int) -> None:
        pace = self.simulator.pace
        pace.move(pace.now_ms() + hours * HOUR)

    def truth(self) -> dict[str, Any]:
        return truth_of(self.url)

    def position(self, symbol: str = BTC) -> dict[str, Any] | None:
        return next((each for each in self.exchange.fetch_positions() if each["symbol"] == symbol), None)


@contextmanager
def desk_of(panel, hurried: bool = False, **values: Any):
    start_ms = int(panel.open_time_ms[FIRST]) + HOUR + 60_000
    simulator = simulated(panel, start_ms, with_values(paper_config(), values))
    simulator = simulator if hurried else unhurried(simulator)
    with serving(simulator) as url:
        yield Desk(simulator, url)


@pytest.fixture
def desk(panel):
    with desk_of(panel) as opened:
        yield opened


# ── Orders ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_order_that_waits_is_parsed_changed_and_cancelled(desk):
    exchange, price, amount = desk.exchange, desk.price("0.9"), desk.amount(300)
    made = exchange.create_order(BTC, "limit", "buy", amount, price, {"postOnly": True, "clientOrderId": "waits"})
    assert made["id"]
    assert made["clientOrderId"] == "waits"
    found = desk.find(made)
    assert {key: found[key] for key in ("symbol", "type", "side", "price", "amount", "filled", "remaining", "status", "postOnly",
                                        "timeInForce", "clientOrderId", "reduceOnly", "cost", "average", "triggerPrice")} == {
        "symbol": BTC, "type": "limit", "side": "buy", "price": price, "amount": amount, "filled": 0.0, "remaining": amount,
        "status": "open", "postOnly": True, "timeInForce": "PO", "clientOrderId": "waits", "reduceOnly": False, "cost": 0.0,
        "average": None, "triggerPrice": None}
    assert found["timestamp"] == desk.simulator.pace.now_ms()
    changed = exchange.edit_order(made["id"], BTC, "limit", "buy", desk.amount(200), desk.price("0.8"))
    assert changed["id"] == made["id"]
    assert (desk.find(made)["price"], desk.find(made)["amount"]) == (desk.price("0.8"), desk.amount(200))
    with pytest.raises(ccxt.BadRequest, match="10001"):  # nothing would change
        exchange.edit_order(made["id"], BTC, "limit", "buy", desk.amount(200), desk.price("0.8"))
    [by_name] = exchange.fetch_open_orders(BTC, params={"orderLinkId": "waits"})
    assert by_name["id"] == made["id"]
    assert exchange.cancel_order(made["id"], BTC)["id"] == made["id"]
    assert desk.find(made)["status"] == "canceled"
    for again in (lambda: exchange.cancel_order(made["id"], BTC), lambda: exchange.cancel_order(None, BTC, {"orderLinkId": "x"}),
                  lambda: exchange.edit_order(made["id"], BTC, "limit", "buy", desk.amount(100))):
        with pytest.raises(ccxt.OrderNotFound, match="110001"):
            again()
    assert [each["id"] for each in exchange.fetch_canceled_orders(BTC)] == [made["id"]]


def test_market_orders_go_in_and_out(desk):
    exchange, amount = desk.exchange, desk.amount(500)
    bought = desk.find(desk.buy(500, clientOrderId="in"))
    assert (bought["type"], bought["status"], bought["filled"], bought["remaining"]) == ("market", "closed", amount, 0.0)
    assert bought["fee"]["currency"] == "USDT"
    assert bought["cost"] == pytest.approx(amount * bought["average"])
    assert desk.position()["contracts"] == amount
    desk.simulator.pace.move(desk.simulator.pace.now_ms() + 1000)
    sold = exchange.create_order(BTC, "market", "sell", amount, None, {"reduceOnly": True})
    assert desk.find(sold)["reduceOnly"] is True
    assert exchange.fetch_positions() == []
    one = exchange.fetch_position(BTC)  # of a symbol that is named also nothing
    assert (one["contracts"], one["side"]) == (0.0, None)
    assert {each["id"] for each in exchange.fetch_closed_orders(BTC)} == {bought["id"], sold["id"]}
    assert exchange.fetch_closed_order(bought["id"], BTC)["clientOrderId"] == "in"
    trades = exchange.fetch_my_trades(BTC)
    assert [(each["order"], each["side"], each["amount"], each["takerOrMaker"]) for each in trades] == [
        (bought["id"], "buy", amount, "taker"), (sold["id"], "sell", amount, "taker")]
    true = {each["id"]: each for each in desk.truth()["fills"]}
    assert [(Decimal(repr(each["price"])), each["fee"]["cost"]) for each in trades] == [
        (Decimal(true[each["id"]]["price"]), float(true[each["id"]]["fee"])) for each in trades]
    assert [each["order"] for each in exchange.fetch_order_trades(bought["id"], BTC)] == [bought["id"]]
    [closed] = exchange.fetch_positions_history([BTC])
    assert (closed["symbol"], closed["contracts"]) == (BTC, amount)
    assert closed["realizedPnl"] == pytest.approx(float(desk.truth()["wallet"]) - 10_000 + bought["fee"]["cost"])


def test_orders_that_wait_for_a_price(desk):
    exchange, amount = desk.exchange, desk.amount(300)
    desk.buy(500)
    falls = exchange.create_order(BTC, "market", "sell", amount, None, {
        "triggerPrice": desk.price("0.9"), "triggerDirection": "descending", "triggerBy": "MarkPrice"})
    stop = exchange.create_order(BTC, "market", "sell", amount, None, {"stopLossPrice": desk.price("0.8")})
    gain = exchange.create_order(BTC, "limit", "sell", amount, desk.price("1.2"), {"takeProfitPrice": desk.price("1.2")})
    found = {each["id"]: each for each in exchange.fetch_open_orders(BTC)}
    assert {falls["id"], stop["id"], gain["id"]} == set(found)
    assert [(found[each["id"]]["triggerPrice"], found[each["id"]]["reduceOnly"], found[each["id"]]["info"]["orderStatus"])
            for each in (falls, stop, gain)] == [
        (desk.price("0.9"), False, "Untriggered"), (desk.price("0.8"), True, "Untriggered"),
        (desk.price("1.2"), True, "Untriggered")]
    with pytest.raises(ccxt.InvalidOrder, match="110093"):
        exchange.create_order(BTC, "market", "sell", amount, None, {
            "triggerPrice": desk.price("1.1"), "triggerDirection": "descending"})
    assert {each["id"] for each in exchange.fetch_open_orders(BTC, params={"trigger": True})} == set(found)
    exchange.cancel_all_orders(BTC, {"trigger": True})
    assert exchange.fetch_open_orders(BTC) == []


def test_stops_come_with_an_order_or_to_a_position(desk):
    exchange = desk.exchange
    waits = exchange.create_order(BTC, "limit", "buy", desk.amount(300), desk.price("0.9"), {
        "stopLoss": {"triggerPrice": desk.price("0.7")}, "takeProfit": {"triggerPrice": desk.price("1.3")}})
    assert (desk.find(waits)["stopLossPrice"], desk.find(waits)["takeProfitPrice"]) == (desk.price("0.7"), desk.price("1.3"))
    desk.buy(500, stopLoss={"triggerPrice": desk.price("0.8")})
    assert desk.position()["stopLossPrice"] == desk.price("0.8")
    exchange.create_order(BTC, "market", "sell", 0, None, {"stopLossPrice": desk.price("0.85"), "tradingStopEndpoint": True})
    assert desk.position()["stopLossPrice"] == desk.price("0.85")
    own = {"category": "linear", "symbol": "BTCUSDT", "tpslMode": "Full", "positionIdx": 0}
    levels = {"stopLoss": str(desk.price("0.75")), "takeProfit": str(desk.price("1.2"))}
    exchange.private_post_v5_position_trading_stop({**own, **levels})
    position = desk.position()
    assert (position["stopLossPrice"], position["takeProfitPrice"]) == (desk.price("0.75"), desk.price("1.2"))
    shown = (each["info"] for each in exchange.fetch_open_orders(BTC))
    assert {(each["stopOrderType"], each["triggerDirection"], each["createType"]) for each in shown if each["stopOrderType"]} == {
        ("StopLoss", 2, "CreateByStopLoss"), ("TakeProfit", 1, "CreateByTakeProfit")}
    with pytest.raises(ccxt.ExchangeError, match="34040"):
        exchange.private_post_v5_position_trading_stop({**own, "stopLoss": str(desk.price("0.75"))})
    exchange.private_post_v5_position_trading_stop({**own, "stopLoss": "0", "takeProfit": "0"})
    assert desk.position()["stopLossPrice"] is None


def test_what_is_not_simulated_is_refused_and_never_ignored(desk):
    exchange, price = desk.exchange, desk.price
    desk.buy(500, stopLoss={"triggerPrice": price("0.8")})
    before, own = desk.truth(), {"category": "linear", "symbol": "BTCUSDT", "positionIdx": 0}
    amount, level = desk.amount(100), {"triggerPrice": price("0.7"), "price": price("0.69")}
    refused = {
        "trailingStop": lambda: exchange.create_order(
            BTC, "market", "sell", amount, None, {"trailingAmount": str(price("0.05"))}),
        "activePrice": lambda: exchange.private_post_v5_position_trading_stop({**own, "activePrice": str(price("1.1"))}),
        "tpslMode Partial": lambda: exchange.create_order(
            BTC, "market", "sell", amount, None, {"stopLossPrice": price("0.7"), "tradingStopEndpoint": True}),
        "slTriggerBy": lambda: exchange.private_post_v5_position_trading_stop(
            {**own, "stopLoss": str(price("0.7")), "tpslMode": "Full", "slTriggerBy": "MarkPrice"}),
        "Partial": lambda: exchange.create_order(BTC, "limit", "buy", amount, price("0.9"), {"stopLoss": level}),
        "cannot be amended": lambda: exchange.edit_order("", BTC, "limit", "buy", amount, price("0.9"), {
            "orderLinkId": "a", "stopLoss": {"triggerPrice": price("0.7")}}),
    }  # fmt: skip
    for words, ask in refused.items():
        with pytest.raises(ccxt.BadRequest, match=f"10001.*{words}"):
            ask()
        assert desk.truth() == before, words


def test_lists_of_the_past_span_seven_days(desk):
    exchange, day = desk.exchange, 24 * HOUR
    first = desk.buy(500, clientOrderId="first")
    waits = exchange.create_order(BTC, "limit", "buy", desk.amount(100), desk.price("0.5"), {"clientOrderId": "waits"})
    exchange.cancel_order(waits["id"], BTC)
    assert {each["clientOrderId"] for each in exchange.fetch_canceled_and_closed_orders(BTC)} == {"first", "waits"}
    desk.advance(25)
    assert {each["clientOrderId"] for each in exchange.fetch_canceled_and_closed_orders(BTC)} == {"first"}  # no fill, no trace
    assert desk.find(waits)["status"] == "canceled"  # by its name it is found
    desk.advance(7 * 24)
    assert exchange.fetch_canceled_and_closed_orders(BTC) == []
    assert exchange.fetch_my_trades(BTC) == []
    [trade] = exchange.fetch_my_trades(BTC, desk.start_ms)  # from a start: the seven days after it
    assert trade["order"] == first["id"]
    second = desk.buy(300)
    assert {each["order"] for each in exchange.fetch_my_trades(BTC, desk.start_ms)} == {first["id"]}  # and not the eighth
    assert {each["order"] for each in exchange.fetch_my_trades(BTC)} == {second["id"]}
    with pytest.raises(ccxt.BadRequest, match=r"10001.*7 days"):
        exchange.fetch_my_trades(BTC, desk.start_ms, params={"endTime": desk.start_ms + 8 * day})


def test_batches(desk):
    exchange = desk.exchange
    wanted = [{"symbol": BTC, "type": "limit", "side": "buy", "amount": desk.amount(100), "price": desk.price(str(0.9 - i / 100)),
               "params": {"clientOrderId": f"b{i}"}} for i in range(3)]
    wanted.append({**wanted[0], "amount": desk.amount(150_000), "params": {"clientOrderId": "b3"}})
    made = exchange.create_orders(wanted)
    assert [each["clientOrderId"] for each in made] == ["b0", "b1", "b2", "b3"]
    assert [each["status"] == "rejected" for each in made] == [False, False, False, True]
    assert len({each["id"] for each in exchange.fetch_open_orders()}) == 3
    edits = [{"id": each["id"], "symbol": BTC, "type": "limit", "side": "buy", "amount": desk.amount(150)} for each in made[:2]]
    assert len(exchange.edit_orders(edits)) == 2
    assert desk.find(made[0])["amount"] == desk.amount(150)
    assert len(exchange.cancel_orders([made[0]["id"], made[1]["id"]], BTC)) == 2
    exchange.create_order(ETH, "limit", "buy", desk.amount(100, ETH), desk.price("0.9", ETH))
    assert {each["symbol"] for each in exchange.fetch_open_orders()} == {BTC, ETH}
    exchange.cancel_all_orders(BTC)
    assert {each["symbol"] for each in exchange.fetch_open_orders()} == {ETH}
    exchange.cancel_all_orders()
    assert exchange.fetch_open_orders() == []
    assert exchange.cancel_all_orders_after(10_000)["retCode"] == 0


def test_pages(desk):
    exchange, amount, mark = desk.exchange, desk.amount(20), desk.price()
    for i in range(55):
        exchange.create_order(BTC, "limit", "buy", amount, float(exchange.price_to_precision(BTC, mark * (0.5 + i / 200))))
    assert len(exchange.fetch_open_orders(BTC)) == 20  # what one gets unasked
    assert len(exchange.fetch_open_orders(BTC, limit=500)) == 50  # what one gets at most
    everything = exchange.fetch_open_orders(BTC, params={"paginate": True})
    assert len({each["id"] for each in everything}) == len(everything) == 55
    assert len(exchange.cancel_all_orders(BTC)) == 55
    assert len(exchange.fetch_canceled_orders(BTC)) == 20
    for _ in range(52):
        desk.buy(20)
    assert len(exchange.fetch_my_trades(BTC)) == 50
    assert len(exchange.fetch_my_trades(BTC, limit=500)) == 52


# ── Account ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_account(desk):
    exchange = desk.exchange
    balance = exchange.fetch_balance()
    assert balance["USDT"] == {"free": 10_000.0, "used": 0.0, "total": 10_000.0, "debt": 0.0}
    desk.buy(3000)
    desk.advance(5)
    truth, balance, position = desk.truth(), exchange.fetch_balance(), desk.position()
    assert balance["USDT"]["total"] == pytest.approx(float(truth["wallet"]), abs=1e-6)  # without what is not realised
    assert float(balance["info"]["result"]["list"][0]["totalEquity"]) == pytest.approx(float(truth["equity"]), abs=1e-6)
    assert position["unrealizedPnl"] == pytest.approx(float(truth["equity"]) - float(truth["wallet"]), abs=1e-6)
    assert (position["side"], position["leverage"], position["hedged"]) == ("long", 10.0, False)
    assert position["entryPrice"] == pytest.approx(float(truth["positions"]["BTCUSDT"]["average_price"]))
    assert position["initialMargin"] == pytest.approx(position["contracts"] * position["markPrice"] / 10, rel=1e-3)
    fee = exchange.fetch_trading_fee(BTC)
    assert (fee["symbol"], fee["taker"], fee["maker"]) == (BTC, 0.00055, 0.0002)
    assert {each["taker"] for each in exchange.fetch_trading_fees().values()} == {0.00055}


def test_settings_are_made_once(desk):
    exchange = desk.exchange
    assert exchange.set_leverage(3, BTC)["retCode"] == 0
    with pytest.raises(ccxt.BadRequest, match="110043"):
        exchange.set_leverage(3, BTC)
    with pytest.raises(ccxt.BadRequest, match="110013"):
        exchange.set_leverage(1000, BTC)
    assert exchange.fetch_leverage(BTC)["longLeverage"] == 3
    with pytest.raises(ccxt.NoChange, match="110025"):
        exchange.set_position_mode(False, BTC)
    exchange.set_position_mode(True, BTC)
    long = exchange.create_order(BTC, "market", "buy", desk.amount(300), None, {"positionIdx": 1})
    exchange.create_order(BTC, "market", "sell", desk.amount(200), None, {"positionIdx": 2})
    assert desk.find(long)["info"]["positionIdx"] == 1
    assert {(each["side"], each["hedged"]) for each in exchange.fetch_positions()} == {("long", True), ("short", True)}
    with pytest.raises(ccxt.BadRequest, match="position idx not match position mode"):
        desk.buy(100)
    with pytest.raises(ccxt.BadRequest, match="110024"):
        exchange.set_position_mode(False, BTC)
    for mode in ("isolated", "portfolio", "cross"):
        assert exchange.set_margin_mode(mode)["retCode"] == 0


# ── The rules of the exchange ────────────────────────────────────────────────────────────────────────────────────────
def test_signatures_are_checked(desk):
    for wrong, code in (({"secret": "another"}, "10004"), ({"apiKey": "another"}, "10003")):
        with pytest.raises(ccxt.AuthenticationError, match=code):
            desk.client(**wrong).fetch_balance()
        stranger = desk.client(**wrong)
        stranger.load_markets()
        stranger.options.update(enableUnifiedMargin=False, enableUnifiedAccount=True)
        with pytest.raises(ccxt.AuthenticationError, match=code):
            stranger.create_order(BTC, "limit", "buy", desk.amount(100), desk.price("0.9"))
    assert desk.truth()["orders"] == {}


@pytest.mark.parametrize(("late_ms", "window_ms", "passes"), [
    (0, 5000, True), (4900, 5000, True), (5100, 5000, False), (9000, 10_000, True), (-900, 5000, True), (-1000, 5000, False)])
def test_requests_from_another_time_are_refused(desk, late_ms, window_ms, passes):
    exchange = desk.client(options={"recvWindow": window_ms, "enableUnifiedMargin": False, "enableUnifiedAccount": True})
    now_ms = desk.simulator.pace.now_ms()
    exchange.milliseconds = lambda: now_ms - late_ms
    if passes:
        assert exchange.fetch_balance()["USDT"]["total"] == 10_000
    else:
        with pytest.raises(ccxt.InvalidNonce, match="10002"):
            exchange.fetch_balance()


def test_rates_are_limited(panel):
    with desk_of(panel, hurried=True) as desk:
        exchange, amount, price = desk.exchange, desk.amount(20), desk.price("0.9")
        exchange.fetch_balance()
        for i in range(10):
            exchange.create_order(BTC, "limit", "buy", amount, price)
            headers = exchange.last_response_headers
            assert (headers["X-Bapi-Limit"], headers["X-Bapi-Limit-Status"]) == ("10", str(9 - i))
        with pytest.raises(ccxt.RateLimitExceeded, match="10006"):
            exchange.create_order(BTC, "limit", "buy", amount, price)
        assert len(desk.truth()["orders"]) == 10
        assert len(exchange.cancel_all_orders(BTC)) == 10  # another limit
        time.sleep(1.01)
        many = [{"symbol": BTC, "type": "limit", "side": "buy", "amount": amount, "price": price} for _ in range(12)]
        made = exchange.create_orders(many)
        assert [each["status"] == "rejected" for each in made] == [False] * 10 + [True] * 2


def test_a_name_is_used_once(desk):
    order = (BTC, "limit", "buy", desk.amount(100), desk.price("0.9"), {"clientOrderId": "twice"})
    first = desk.exchange.create_order(*order)
    with pytest.raises(ccxt.InvalidOrder, match="110072"):
        desk.exchange.create_order(*order)
    desk.exchange.cancel_order(first["id"], BTC)
    with pytest.raises(ccxt.InvalidOrder, match="110072"):  # also after its end
        desk.exchange.create_order(*order)


def test_post_only_is_accepted_and_then_cancelled(desk):
    made = desk.exchange.create_order(BTC, "limit", "buy", desk.amount(100), desk.price("1.01"), {"postOnly": True})
    found = desk.find(made)
    assert (found["status"], found["filled"]) == ("canceled", 0.0)
    assert found["info"]["rejectReason"] == "EC_PostOnlyWillTakeLiquidity"


def test_reduce_only_takes_no_more_than_there_is(desk):
    with pytest.raises(ccxt.InvalidOrder, match="110017"):
        desk.exchange.create_order(BTC, "market", "sell", desk.amount(100), None, {"reduceOnly": True})
    desk.buy(500)
    held = desk.position()["contracts"]
    found = desk.find(desk.exchange.create_order(BTC, "market", "sell", desk.amount(900), None, {"reduceOnly": True}))
    assert (found["status"], found["filled"], found["info"]["cancelType"]) == ("canceled", held, "CancelByReduceOnly")
    assert desk.position() is None


@pytest.mark.parametrize("exempts", [True, False])
def test_a_reduction_below_the_least_value_passes_or_not_as_one_chooses(desk, exempts):
    desk.simulator.engines[USER].account.exempts_reductions = exempts
    desk.buy(500)
    least = desk.exchange.market(BTC)["limits"]["amount"]["min"]
    assert least * desk.price() < 5
    if exempts:
        desk.exchange.create_order(BTC, "market", "sell", least, None, {"reduceOnly": True})
        assert desk.position()["contracts"] < desk.amount(500)
    else:
        with pytest.raises(ccxt.InvalidOrder, match="110094"):
            desk.exchange.create_order(BTC, "market", "sell", least, None, {"reduceOnly": True})


def test_a_book_that_is_too_thin_fills_a_part(panel):
    with desk_of(panel, **{"paper.participation": 1e-6}) as desk:
        found = desk.find(desk.buy(9000))
        assert (found["status"], found["info"]["rejectReason"]) == ("canceled", "EC_NoImmediateQtyToFill")
        assert 0 < found["filled"] < found["amount"]
        assert desk.position()["contracts"] == found["filled"]
        waits = desk.exchange.create_order(BTC, "limit", "buy", desk.amount(9000), desk.price("1.05"))
        found = desk.find(waits)
        assert (found["status"], found["info"]["orderStatus"]) == ("open", "PartiallyFilled")
        assert 0 < found["filled"] < found["amount"]
        assert found["remaining"] == pytest.approx(found["amount"] - found["filled"])
        desk.advance(3)
        assert found["filled"] < desk.find(waits)["filled"]
        assert {each["takerOrMaker"] for each in desk.exchange.fetch_order_trades(waits["id"], BTC)} == {"taker", "maker"}
        desk.exchange.cancel_order(waits["id"], BTC)
        found = desk.find(waits)
        assert (found["status"], found["filled"] > 0) == ("canceled", True)  # cancelled is not unfilled


def test_an_account_is_liquidated(desk, panel):
    exchange, column = desk.exchange, panel.close[:, panel.symbols.index("BTCUSDT")]
    exchange.set_leverage(100, BTC)
    later = column[FIRST + 1 : FIRST + 50] / column[FIRST] - 1
    side_ = "buy" if later.min() < -later.max() else "sell"
    exchange.create_order(BTC, "market", side_, desk.amount(700_000), None)
    assert desk.position()["side"] == {"buy": "long", "sell": "short"}[side_]
    desk.advance(50)
    assert exchange.fetch_positions() == []
    [bust] = exchange.fetch_my_trades(BTC, params={"execType": "BustTrade"})
    assert (bust["side"], bust["info"]["createType"]) == ("sell" if side_ == "buy" else "buy", "CreateByLiq")
    assert float(desk.truth()["equity"]) < 7000
    assert float(exchange.fetch_balance()["info"]["result"]["list"][0]["totalEquity"]) == pytest.approx(
        float(desk.truth()["equity"]), abs=1e-6)


def test_funding_is_paid(desk):
    desk.buy(5000)
    desk.advance(25)
    paid, true = desk.exchange.fetch_funding_history(BTC), [each for each in desk.truth()["fills"] if each["kind"] == "Funding"]
    assert len(paid) == len(true) == 3
    assert [each["timestamp"] for each in paid] == [each["time_ms"] for each in true]
    assert {each["timestamp"] % (8 * HOUR) for each in paid} == {0}
    rates = {each["timestamp"]: each["fundingRate"] for each in desk.exchange.fetch_funding_rate_history(BTC, desk.start_ms)}
    for each in paid:  # who is long pays a rate above 0
        row = each["info"]
        assert float(row["execFee"]) == pytest.approx(float(row["execValue"]) * rates[each["timestamp"]], abs=1e-6)
    logged = desk.exchange.fetch_ledger("USDT", params={"type": "SETTLEMENT"})
    assert sum(float(each["info"]["funding"]) for each in logged) == pytest.approx(-sum(float(each["fee"]) for each in true))


# ── Shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
LINEAR = {"category": "linear", "symbol": "BTCUSDT"}
NEWER = ("createType", "extraFees", "rpiMatchedQty", "rpiTakerAccess", "slippageTolerance", "slippageToleranceType", "USDT")
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {  # path, parameters, keys without, keys beyond
    "order__open-order": ("get order/realtime", LINEAR, ("MNT",), NEWER),
    "order__order-list": ("get order/history", LINEAR, ("MNT",), NEWER),
    "order__execution": ("get execution/list", LINEAR, (), NEWER),
    "position__position": ("get position/list", LINEAR, ("mmrSysUpdateTime",), ("mmrSysUpdatedTime",)),  # text and example differ
    "position__close-pnl": ("get position/closed-pnl", LINEAR, (), ()),
    "account__wallet-balance": ("get account/wallet-balance", {"accountType": "UNIFIED"}, (), ()),
    "account__account-info": ("get account/info", {}, (), ("retExtInfo", "time")),
    "account__fee-rate": ("get account/fee-rate", LINEAR, (), ()),
    "account__transaction-log": ("get account/transaction-log", {"accountType": "UNIFIED", **LINEAR}, (), ("category",)),
    "order__amend-order": ("post order/amend", {**LINEAR, "orderLinkId": "one", "qty": "0.02"}, (), ()),
    "order__cancel-order": ("post order/cancel", {**LINEAR, "orderLinkId": "one"}, (), ()),
    "order__batch-amend": ("post order/amend-batch", {
        "category": "linear", "request": [{"symbol": "BTCUSDT", "orderLinkId": "b1", "qty": "0.02"}]}, (), ()),
    "order__batch-cancel": ("post order/cancel-batch", {
        "category": "linear", "request": [{"symbol": "BTCUSDT", "orderLinkId": "b1"}]}, (), ()),
    "order__cancel-all": ("post order/cancel-all", LINEAR, (), ()),
    "position__leverage": ("post position/set-leverage", {**LINEAR, "buyLeverage": "3", "sellLeverage": "3"}, (), ()),
    "position__trading-stop": ("post position/trading-stop", {**LINEAR, "stopLoss": "1000", "positionIdx": 0}, (), ()),
    "position__position-mode": ("post position/switch-mode", {"category": "linear", "symbol": "ETHUSDT", "mode": 3}, (), ()),
    "account__set-margin-mode": ("post account/set-margin-mode", {"setMarginMode": "REGULAR_MARGIN"}, (), ("retExtInfo", "time")),
    "order__dcp": ("post order/disconnected-cancel-all", {"timeWindow": 10}, (), ()),
}  # fmt: skip


def test_private_answers_have_the_shape_of_the_documentation(desk, root):
    folder = root.parent / "shared" / "data" / "bybit" / "documentation_examples"
    if not folder.is_dir():
        pytest.skip("no market data found")

    def matches(name: str, answer: dict[str, Any], without: tuple[str, ...] = (), beyond: tuple[str, ...] = ()) -> None:
        whole = {**answer, **({"time": int(answer["time"])} if "time" in answer else {})}
        matches_example(json.loads((folder / f"{name}.0.response.json").read_text()), whole, without, beyond)

    exchange, low = desk.exchange, desk.exchange.price_to_precision(BTC, desk.price("0.9"))
    order = {**LINEAR, "side": "Buy", "orderType": "Limit", "qty": "0.01", "price": low}
    matches("order__create-order", exchange.private_post_v5_order_create({**order, "orderLinkId": "one", "stopLoss": "9000"}))
    both = [{**order, "orderLinkId": name} for name in ("b1", "b2")]
    matches("order__batch-place", exchange.private_post_v5_order_create_batch({"category": "linear", "request": both}))
    desk.buy(500, stopLoss={"triggerPrice": desk.price("0.8")})
    desk.advance(9)
    exchange.create_order(BTC, "market", "sell", desk.amount(100), None, {"reduceOnly": True})
    for name, (what, parameters, without, beyond) in SHAPES.items():
        verb, path = what.split()
        answer = getattr(exchange, f"private_{verb}_v5_{path.replace('/', '_').replace('-', '_')}")(parameters)
        assert verb == "post" or answer["result"].get("list", answer["result"]), name
        matches(name, answer, without, beyond)


def test_private_messages_have_the_shape_of_the_documentation(panel, root):
    folder = root.parent / "shared" / "data" / "bybit" / "documentation_examples"
    if not folder.is_dir():
        pytest.skip("no market data found")
    order = {**LINEAR, "side": "Buy", "orderType": "Market", "qty": "0.01"}

    async def told(desk: Desk) -> tuple[dict[str, Any], dict[str, Any]]:
        now_ms, heard = desk.simulator.pace.now_ms(), dict[str, Any]()
        expires = now_ms + 10_000
        sign = hmac.new(b"the-secret", f"GET/realtime{expires}".encode(), hashlib.sha256).hexdigest()
        log_in = {"op": "auth", "args": ["the-key", expires, sign]}
        topics = ["order", "execution", "execution.fast", "position", "wallet"]
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{desk.url}/v5/private") as private, http.ws_connect(
                f"{desk.url}/v5/trade") as trade:
            for line in (private, trade):
                await line.send_json(log_in)
                await line.receive_json()
            await private.send_json({"op": "subscribe", "args": topics})
            header = {"X-BAPI-TIMESTAMP": str(now_ms), "X-BAPI-RECV-WINDOW": "5000"}
            await trade.send_json({"reqId": "r", "op": "order.create", "header": header, "args": [order]})
            reply = await trade.receive_json()
            while not set(topics) <= set(heard):
                message = await private.receive_json(timeout=5)
                heard[message.get("topic", "acknowledged")] = message
        return heard, reply

    with desk_of(panel, hurried=True) as desk:
        heard, reply = asyncio.run(told(desk))
    for name, topic, beyond in (("order.1", "order", NEWER), ("execution.1", "execution", ()),
                                ("fast-execution.1", "execution.fast", ()), ("position.1", "position", ()),
                                ("wallet.1", "wallet", ())):
        example = json.loads((folder / f"websocket__private__{name}.response.json").read_text())
        matches_example(example, heard[topic], ("MNT",), beyond)
    matches_example(json.loads((folder / "websocket__trade__guideline.2.response.json").read_text()), reply)


# ── Every call of the tables, by sync, async and pro ─────────────────────────────────────────────────────────────────
LEVEL, NAMED, STOP = "triggerPrice", "clientOrderId", {"tradingStopEndpoint": True}
CALLS: list[tuple[str, str, Any]] = [  # method of ccxt, path it must ask, arguments; `d` is the desk, `r` holds results by method
    ("fetch_time", "GET market/time", lambda d, r: ()),
    ("fetch_status", "GET system/status", lambda d, r: ()),
    ("fetch_ohlcv", "GET market/kline", lambda d, r: (BTC, "1h", None, 1000)),
    ("fetch_ohlcv", "GET market/kline", lambda d, r: (BTC, "4h", d.start_ms - 90 * HOUR, 7)),
    ("fetch_ohlcv", "GET market/mark-price-kline", lambda d, r: (BTC, "1h", None, 5, {"price": "mark"})),
    ("fetch_ohlcv", "GET market/index-price-kline", lambda d, r: (BTC, "1h", None, 5, {"price": "index"})),
    ("fetch_tickers", "GET market/tickers", lambda d, r: ()),
    ("fetch_tickers", "GET market/tickers", lambda d, r: ([BTC, ETH],)),
    ("fetch_ticker", "GET market/tickers", lambda d, r: (BTC,)),
    ("fetch_funding_rate", "GET market/tickers", lambda d, r: (BTC,)),
    ("fetch_order_book", "GET market/orderbook", lambda d, r: (BTC, 50)),
    ("fetch_trades", "GET market/recent-trade", lambda d, r: (BTC, None, 9)),
    ("fetch_funding_rate_history", "GET market/funding/history", lambda d, r: (BTC, d.start_ms - 90 * HOUR)),
    ("fetch_open_interest_history", "GET market/open-interest", lambda d, r: (BTC, "1h", None, 5)),
    ("fetch_market_leverage_tiers", "GET market/risk-limit", lambda d, r: (BTC,)),
    ("fetch_balance", "GET account/wallet-balance", lambda d, r: ()),
    ("set_leverage", "POST position/set-leverage", lambda d, r: (3, BTC)),
    ("fetch_leverage", "GET position/list", lambda d, r: (BTC,)),
    ("set_position_mode", "POST position/switch-mode", lambda d, r: (True, ETH)),
    ("set_margin_mode", "POST account/set-margin-mode", lambda d, r: ("cross",)),
    ("fetch_trading_fee", "GET account/fee-rate", lambda d, r: (BTC,)),
    ("fetch_trading_fees", "GET account/fee-rate", lambda d, r: ()),
    ("create_order", "POST order/create", lambda d, r: (BTC, "market", "buy", 0.02, None, {NAMED: "market"})),
    ("create_order", "POST order/create", lambda d, r: (BTC, "market", "sell", 0.005, None, {"reduceOnly": True})),
    ("create_order", "POST order/create", lambda d, r: (BTC, "market", "sell", 0.01, None, {
        LEVEL: d.price("0.8"), "triggerDirection": "descending", "triggerBy": "MarkPrice"})),
    ("create_order", "POST order/create", lambda d, r: (BTC, "market", "sell", 0.01, None, {"stopLossPrice": d.price("0.7")})),
    ("create_order", "POST order/create", lambda d, r: (BTC, "limit", "buy", 0.01, d.price("0.8"), {
        "stopLoss": {LEVEL: d.price("0.7")}, "takeProfit": {LEVEL: d.price("1.3")}})),
    ("create_order", "POST position/trading-stop", lambda d, r: (
        BTC, "market", "sell", 0, None, {"stopLossPrice": d.price("0.6"), **STOP})),
    ("create_order", "POST order/create", lambda d, r: (
        BTC, "limit", "buy", 0.01, d.price("0.9"), {"postOnly": True, NAMED: "w"})),
    ("edit_order", "POST order/amend", lambda d, r: (r["create_order"]["id"], BTC, "limit", "buy", 0.02, d.price("0.85"))),
    ("fetch_open_orders", "GET order/realtime", lambda d, r: (BTC,)),
    ("fetch_open_orders", "GET order/realtime", lambda d, r: (None, None, None, {"paginate": True})),
    ("fetch_order", "GET order/realtime", lambda d, r: (r["create_order"]["id"], BTC, {"acknowledged": True})),
    ("cancel_order", "POST order/cancel", lambda d, r: (r["create_order"]["id"], BTC)),
    ("create_orders", "POST order/create-batch", lambda d, r: ([
        {"symbol": BTC, "type": "limit", "side": "buy", "amount": 0.01, "price": d.price("0.9"), "params": {NAMED: name}}
        for name in ("b1", "b2")],)),
    ("edit_orders", "POST order/amend-batch", lambda d, r: ([
        {"id": r["create_orders"][0]["id"], "symbol": BTC, "type": "limit", "side": "buy", "amount": 0.02}],)),
    ("cancel_orders", "POST order/cancel-batch", lambda d, r: ([each["id"] for each in r["create_orders"]], BTC)),
    ("cancel_all_orders", "POST order/cancel-all", lambda d, r: (BTC, {"trigger": True})),
    ("cancel_all_orders", "POST order/cancel-all", lambda d, r: ()),
    ("cancel_all_orders_after", "POST order/disconnected-cancel-all", lambda d, r: (10_000,)),
    ("fetch_canceled_and_closed_orders", "GET order/history", lambda d, r: (BTC,)),
    ("fetch_closed_orders", "GET order/history", lambda d, r: (BTC,)),
    ("fetch_canceled_orders", "GET order/history", lambda d, r: (BTC,)),
    ("fetch_my_trades", "GET execution/list", lambda d, r: (BTC,)),
    ("fetch_order_trades", "GET execution/list", lambda d, r: (r["fetch_closed_orders"][0]["id"], BTC)),
    ("fetch_funding_history", "GET execution/list", lambda d, r: (BTC,)),
    ("fetch_positions", "GET position/list", lambda d, r: ()),
    ("fetch_position", "GET position/list", lambda d, r: (BTC,)),
    ("fetch_positions_history", "GET position/closed-pnl", lambda d, r: ([BTC],)),
    ("fetch_ledger", "GET account/transaction-log", lambda d, r: ("USDT",)),
]  # fmt: skip


def called(panel, folder, kind) -> tuple[list[Any], list[list[str]]]:
    "What the calls gave, and which paths each asked."
    journal, results, found = folder / f"{kind.__module__}.jsonl", {}, []
    simulator = unhurried(simulated(panel, int(panel.open_time_ms[FIRST]) + HOUR + 60_000), journal)

    async def work(desk: Desk) -> None:
        exchange = desk.client(kind)
        try:
            markets = exchange.load_markets()
            await markets if asyncio.iscoroutine(markets) else None
            for method, _, arguments in CALLS:
                given = await asyncio.to_thread(arguments, desk, results)
                before = simulator.journal.number
                answer = getattr(exchange, method)(*given)
                results[method] = await answer if asyncio.iscoroutine(answer) else answer
                found.append((method, results[method], before, simulator.journal.number))
        finally:
            closing = exchange.close() if kind is not ccxt.bybit else None
            await closing if closing else None

    with serving(simulator) as url:
        asyncio.run(work(Desk(simulator, url)))
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    asked = ([each for each in lines[before:after] if each["kind"] == "request"] for _, _, before, after in found)
    paths = [[f"{each['method']} {each['path'].removeprefix('/v5/')}" for each in requests] for requests in asked]
    return [(method, answer) for method, answer, _, _ in found], paths


def test_every_call_of_the_tables_is_the_same_by_sync_async_and_pro(panel, tmp_path):
    runs = [called(panel, tmp_path, kind) for kind in (ccxt.bybit, asynchronous.bybit, streaming.bybit)]
    for (method, path, _), asked in zip(CALLS, runs[0][1], strict=True):
        assert path in asked, (method, asked)
    first = runs[0][0]
    assert [method for method, answer in first if not answer] == ["fetch_funding_history"]  # nothing was settled yet
    for answers, paths in runs[1:]:
        assert paths == runs[0][1]
        for (method, theirs), (_, ours) in zip(answers, first, strict=True):
            assert theirs == ours, method


# ── Async and pro ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_async(desk):
    amount, low = desk.amount(300), desk.price("0.9")

    async def work():
        exchange = desk.client(asynchronous.bybit)
        try:
            await exchange.load_markets()
            waits = await exchange.create_order(BTC, "limit", "buy", amount, low, {"postOnly": True, "clientOrderId": "a"})
            await exchange.create_order(BTC, "market", "buy", amount)
            lower = float(exchange.price_to_precision(BTC, low * 0.9))
            await exchange.edit_order(waits["id"], BTC, "limit", "buy", amount, lower)
            many = await asyncio.gather(
                exchange.fetch_open_orders(BTC, params={"paginate": True}), exchange.fetch_closed_orders(BTC),
                exchange.fetch_my_trades(BTC), exchange.fetch_positions(), exchange.fetch_trading_fee(BTC),
                exchange.fetch_order(waits["id"], BTC, {"acknowledged": True}), exchange.fetch_balance())
            await exchange.cancel_order(waits["id"], BTC)
            with pytest.raises(ccxt.OrderNotFound):
                await exchange.cancel_order(waits["id"], BTC)
            return many
        finally:
            await exchange.close()

    orders, closed, trades, positions, fee, order, balance = asyncio.run(work())
    assert [each["clientOrderId"] for each in orders] == ["a"] == [order["clientOrderId"]]
    assert len(closed) == len(trades) == len(positions) == 1
    assert (positions[0]["contracts"], fee["taker"]) == (amount, 0.00055)
    assert balance["USDT"]["total"] == pytest.approx(float(desk.truth()["wallet"]), abs=1e-6)


def test_pro_hears_of_everything(desk):
    amount, low = desk.amount(300), desk.price("0.9")

    async def work():
        exchange = desk.client(streaming.bybit, options={
            "fetchMarkets": {"types": ["linear"]}, "watchPositions": {"fetchPositionsSnapshot": False}})
        heard: dict[str, list[Any]] = {"orders": [], "my_trades": [], "positions": [], "balance": []}

        async def listen(topic: str) -> None:
            while True:
                told = await getattr(exchange, f"watch_{topic}")()
                heard[topic] += [dict(each) for each in told] if isinstance(told, list) else [told]

        try:
            await exchange.load_markets()
            tasks = [asyncio.ensure_future(listen(topic)) for topic in heard]
            while desk.simulator.journal.counts["socket"] < 2 + len(heard):  # opened, authenticated, and each topic subscribed to
                await asyncio.sleep(0.02)
            waits = await exchange.create_order(BTC, "limit", "buy", amount, low, {"clientOrderId": "p"})
            await exchange.cancel_order(waits["id"], BTC)
            taken = await exchange.create_order(BTC, "market", "buy", amount)
            end = time.monotonic() + 5
            while not all(heard.values()) and time.monotonic() < end:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return heard, waits["id"], taken["id"]
        finally:
            await exchange.close()

    heard, waits, taken = asyncio.run(work())
    assert [each["status"] for each in heard["orders"] if each["id"] == waits][-1] == "canceled"
    assert {each["clientOrderId"] for each in heard["orders"] if each["id"] == waits} == {"p"}
    assert "closed" in {each["status"] for each in heard["orders"] if each["id"] == taken}
    assert [(each["order"], each["symbol"], each["amount"]) for each in heard["my_trades"]] == [(taken, BTC, amount)]
    assert (heard["positions"][-1]["symbol"], heard["positions"][-1]["contracts"]) == (BTC, amount)
    assert heard["balance"][-1]["USDT"]["free"] == pytest.approx(float(desk.truth()["equity"]), abs=1e-6)  # so ccxt reads it


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
def spoken(desk: Desk, method: str, path: str, query: str = "", body: bytes = b"", key: str = "the-key",
           secret: str = "the-secret") -> tuple[int, dict[str, Any] | None]:
    "What another client hears: status, and the answer where there is one."
    stamp = str(desk.simulator.pace.now_ms())
    signed = hmac.new(secret.encode(), f"{stamp}{key}5000{query}".encode() + body, hashlib.sha256).hexdigest()
    headers = {"X-BAPI-API-KEY": key, "X-BAPI-TIMESTAMP": stamp, "X-BAPI-SIGN": signed, "X-BAPI-RECV-WINDOW": "5000",
               "Content-Type": "application/json"}
    request = urllib.request.Request(f"{desk.url}{path}?{query}", body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            text = error.read()
        return error.code, json.loads(text) if text else None


ORDER = {"category": "linear", "symbol": "BTCUSDT", "side": "Buy", "orderType": "Limit", "qty": "0.01", "price": "20000.1",
         "orderLinkId": "bad"}
WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "category": ({"category": "spot"}, 10001), "no category": ({"category": None}, 10001),
    "symbol": ({"symbol": "NOUSDT"}, 10001), "no symbol": ({"symbol": None}, 10001),
    "quantity off the step": ({"qty": "0.0100001234"}, 10001), "price off the tick": ({"price": "20000.123"}, 10001),
    "quantity that is no number": ({"qty": "many"}, 10001), "no quantity": ({"qty": None}, 10001),
    "quantity below zero": ({"qty": "-1"}, 10001), "side": ({"side": "buy"}, 10001), "kind": ({"orderType": "Stop"}, 10001),
    "no price": ({"price": None}, 10001), "time in force": ({"timeInForce": "DAY"}, 10001),
    "too small a value": ({"qty": "0.00001"}, 110094), "position index": ({"positionIdx": 1}, 10001),
    "price far away": ({"price": "1.0"}, 110003), "name too long": ({"orderLinkId": "x" * 37}, 10001),
    "direction of a trigger": ({"triggerPrice": "15000"}, 10001),
}


def test_wrong_orders_are_refused_in_bybits_words(desk):
    right = {**ORDER, "price": desk.exchange.price_to_precision(BTC, desk.price("0.9"))}
    for what, (changes, code) in WRONG.items():
        body = json.dumps({key: value for key, value in {**right, **changes}.items() if value is not None}).encode()
        status, answer = spoken(desk, "POST", "/v5/order/create", body=body)
        assert (status, answer["retCode"]) == (200, code), what
        assert set(answer) == {"retCode", "retMsg", "result", "retExtInfo", "time"}
        assert (answer["result"], bool(answer["retMsg"]), answer["time"]) == ({}, True, desk.simulator.pace.now_ms())
    assert desk.truth()["orders"] == {}
    status, answer = spoken(desk, "POST", "/v5/order/create", body=json.dumps(right).encode())
    assert (status, answer["retCode"], answer["result"]["orderLinkId"]) == (200, 0, "bad")


def test_wrong_requests_are_refused_in_bybits_words(desk):
    private, order = "/v5/account/wallet-balance", "/v5/order/create"
    cases = [
        ("another key", ("GET", private, "accountType=UNIFIED", b"", "nobody", "the-secret"), 10003),
        ("another secret", ("GET", private, "accountType=UNIFIED", b"", "the-key", "nobody's"), 10004),
        ("no body", ("POST", order), 10001), ("no JSON", ("POST", order, "", b"qty=1&side=Buy"), 10001),
        ("half a JSON", ("POST", order, "", b'{"category":"linear","sym'), 10001), ("a list", ("POST", order, "", b"[1]"), 10001),
        ("account type", ("GET", private, "accountType=SPOT"), 10001),
        ("category of a list", ("GET", "/v5/position/list", "category=nothing&symbol=BTCUSDT"), 10001),
        ("a list of nothing", ("GET", "/v5/order/realtime", "category=linear"), 10001),
        ("size of a page", ("GET", "/v5/order/realtime", "category=linear&symbol=BTCUSDT&limit=-1"), 10001),
        ("a cursor", ("GET", "/v5/order/realtime", "category=linear&symbol=BTCUSDT&cursor=x"), 10001),
        ("category of a kline", ("GET", "/v5/market/kline", "category=nothing&symbol=BTCUSDT&interval=60"), 10001),
        ("symbol of a kline", ("GET", "/v5/market/kline", "category=linear&symbol=NOUSDT&interval=60"), 10001),
        ("interval of a kline", ("GET", "/v5/market/kline", "category=linear&symbol=BTCUSDT&interval=7"), 10001),
    ]  # fmt: skip
    for what, asked, code in cases:
        status, answer = spoken(desk, *asked)
        assert (status, answer["retCode"]) == (200, code), what
        assert set(answer) == {"retCode", "retMsg", "result", "retExtInfo", "time"}, what
        assert answer["result"] == {}, what
    for path in ("/v2/private/order/create", "/v3/private/order/create", "/unified/v3/private/order/list", "/v6/order/create",
                 "/v5/no/such/thing", "/"):
        assert spoken(desk, "GET", path) == (404, None), path
    assert spoken(desk, "GET", order) == (404, None)  # the other verb
    assert spoken(desk, "POST", private, body=b"{}") == (404, None)


def test_the_owner_may_do_as_a_client_may(desk):
    side(desk.url, "by-hand", user=USER, parameters={"symbol": "BTCUSDT", "side": "Buy", "orderType": "Market", "qty": "0.01"})
    assert desk.position()["contracts"] == 0.01
    assert [each["amount"] for each in desk.exchange.fetch_my_trades(BTC)] == [0.01]
