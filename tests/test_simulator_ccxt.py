"""ccxt against the simulator: sync, async and pro read from it what was recorded, and take its errors for what they are."""

import asyncio
import json
import time
import urllib.request

import pytest
from xsmom_nb.exchange import public
from xsmom_nb.exchange.pace import Pace
from xsmom_nb.exchange.private import EmptyAccount
from xsmom_nb.exchange.protocol import ApiKey
from xsmom_nb.exchange.public import Market
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator, Terms
from xsmom_nb.exchange.tape import Tape, bars_at
from xsmom_nb.market.panel import resample
from xsmom_nb.market.synthetic import synthetic_panel

ccxt = pytest.importorskip("ccxt", reason="no package ccxt found")
asynchronous, streaming = pytest.importorskip("ccxt.async_support"), pytest.importorskip("ccxt.pro")

HOUR, MINUTE = 3_600_000, 60_000


class Twenty(EmptyAccount):
    "An account with twenty-five orders, and nothing else."

    def open_orders(self, query, now_ms):
        symbol = query.get("symbol") or "SYN01USDT"
        return [{"orderId": f"o{i}", "orderLinkId": f"x{i}", "symbol": symbol, "side": "Buy", "orderType": "Limit", "price": "1",
                 "qty": "2", "cumExecQty": "0", "leavesQty": "2", "orderStatus": "New", "timeInForce": "GTC", "tpslMode": "",
                 "createdTime": str(now_ms - i), "updatedTime": str(now_ms - i)} for i in range(25)]


@pytest.fixture(scope="module")
def short():
    return synthetic_panel(seed=4, bars=12 * 24 * 6, symbols=4, timeframe="5m")


@pytest.fixture
def running(short):
    "A simulator whose minute takes a wall second, its URL, and its clock."
    tape = Tape(resample(short, "1h"), short)
    pace = Pace(int(short.open_time_ms[0]) + 96 * HOUR + 50_000, time.monotonic, 60.0)
    engines = {1: Twenty(), 2: EmptyAccount()}
    simulator = Simulator(Market(tape), pace, [ApiKey("k", "s", user=1), ApiKey("e", "e", user=2)], engines, Terms())
    with serving(simulator) as url:
        yield simulator, url


def pointed(kind, simulator: Simulator, url: str, **changes):
    "A ccxt exchange that knows no other host than the simulator, and its clock."

    class Pointed(kind):
        def milliseconds(self):
            return simulator.pace.now_ms()

    names = ("spot", "futures", "v2", "public", "private")
    exchange = Pointed({"apiKey": "k", "secret": "s", "urls": {"api": dict.fromkeys(names, url)},
                        "options": {"fetchMarkets": {"types": ["linear"]}}, **changes})
    exchange.has["fetchCurrencies"] = False
    stream = url.replace("http", "ws")
    exchange.urls["api"]["ws"] = {
        "public": {name: f"{stream}/v5/public/{name}" for name in ("spot", "linear", "inverse", "option")},
        "private": {"spot": dict.fromkeys(("unified", "nonUnified"), f"{stream}/v5/private"), "contract": f"{stream}/v5/private",
                    "usdc": f"{stream}/v5/private", "trade": f"{stream}/v5/trade"}}
    return exchange


def told(exchange) -> str:
    "ccxt's name for the first contract."
    return sorted(exchange.symbols)[0]


def side(url: str, operation: str, **body) -> dict:
    "A request on the side channel."
    request = urllib.request.Request(f"{url}/__sim/{operation}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


# ── Sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_public_calls(running):
    simulator, url = running
    exchange, market = pointed(ccxt.bybit, simulator, url), simulator.market
    markets = exchange.load_markets()
    symbol, tape = told(exchange), market.tape
    name = markets[symbol]["id"]
    assert sorted(each["id"] for each in markets.values()) == list(tape.panel.symbols)
    assert all(each["swap"] and each["linear"] and each["settle"] == "USDT" for each in markets.values())
    rules = market.rules(name, simulator.pace.now_ms())
    assert markets[symbol]["precision"] == {"amount": float(rules.quantity_step), "price": float(rules.price_tick)}
    assert abs(exchange.fetch_time() - simulator.pace.now_ms()) < 60_000
    assert exchange.fetch_status()["status"] == "ok"

    hours = exchange.fetch_ohlcv(symbol, "1h", limit=50)
    bars = bars_at(tape, name, "60", simulator.pace.now_ms(), 50)
    assert [row[:5] for row in hours[:-1]] == [[b.open_time_ms, b.open, b.high, b.low, b.close] for b in bars[:-1]]
    since = bars[10].open_time_ms
    assert [row[0] for row in exchange.fetch_ohlcv(symbol, "5m", since, 7)] == [since + k * 5 * MINUTE for k in range(7)]
    marks = exchange.fetch_ohlcv(symbol, "1h", limit=3, params={"price": "mark"})
    assert [row[1:5] for row in marks[:2]] == [row[1:5] for row in hours[-3:-1]]

    tickers = exchange.fetch_tickers()
    quote = market.quotation(name, simulator.pace.now_ms())
    assert len(tickers) == 4
    told_of = tickers[symbol]
    assert (told_of["last"], told_of["bid"], told_of["high"]) == (quote.last, float(quote.bid), quote.day_high)
    assert exchange.fetch_ticker(symbol)["symbol"] == symbol
    funding = exchange.fetch_funding_rate(symbol)
    assert (funding["fundingRate"], funding["fundingTimestamp"]) == (quote.funding_rate, quote.next_funding_ms)
    book = exchange.fetch_order_book(symbol, 10)
    assert [len(book["bids"]), len(book["asks"])] == [10, 10]
    assert book["bids"][0][0] < book["asks"][0][0]
    settled = exchange.fetch_funding_rate_history(symbol, bars[0].open_time_ms)
    asked = {"category": "linear", "symbol": name}
    rows = public.funding_history(market, asked, simulator.pace.now_ms())["list"]
    assert [row["fundingRate"] for row in settled] == [
        float(row["fundingRate"]) for row in reversed(rows) if int(row["fundingRateTimestamp"]) >= bars[0].open_time_ms]
    trades = exchange.fetch_trades(symbol, limit=9)
    assert len(trades) == 9
    assert exchange.fetch_market_leverage_tiers(symbol)[0]["maxLeverage"] == float(rules.max_leverage)
    assert exchange.fetch_open_interest_history(symbol, "1h", limit=5)[-1]["openInterestAmount"] > 0


def test_private_calls_are_signed_and_paged(running):
    simulator, url = running
    exchange = pointed(ccxt.bybit, simulator, url)
    exchange.load_markets()
    symbol = told(exchange)
    assert exchange.fetch_balance()["info"]["retCode"] == 0
    assert exchange.fetch_positions() == []
    assert len(exchange.fetch_open_orders(symbol)) == 20  # the page that one gets unasked
    assert len(exchange.fetch_open_orders(symbol, params={"paginate": True})) == 25
    assert int(exchange.last_response_headers["X-Bapi-Limit"]) == 50
    with pytest.raises(ccxt.InsufficientFunds):
        exchange.create_order(symbol, "limit", "buy", 10.0, 1.0)
    done = exchange.cancel_all_orders()
    assert done == [] or done["info"]["success"] == "1"
    for wrong, error in (({"secret": "no"}, ccxt.AuthenticationError), ({"apiKey": "no"}, ccxt.AuthenticationError)):
        with pytest.raises(error):
            pointed(ccxt.bybit, simulator, url, **wrong).fetch_balance()


def test_errors_are_taken_for_what_they_are(running):
    simulator, url = running
    exchange = pointed(ccxt.bybit, simulator, url)
    exchange.load_markets()
    cases = [("ret_code", {"code": 10016, "message": "Request timeout, please try again later"}, ccxt.RequestTimeout),
             ("ret_code", {"code": 10000}, ccxt.ExchangeError), ("ret_code", {"code": 10002}, ccxt.InvalidNonce),
             ("ret_code", {"code": 10005}, ccxt.PermissionDenied), ("ret_code", {"code": 110001}, ccxt.OrderNotFound),
             ("ret_code", {"code": 110025}, ccxt.NoChange), ("ret_code", {"code": 110072}, ccxt.InvalidOrder),
             ("rate_limit", {}, ccxt.RateLimitExceeded), ("status", {"status": 503}, ccxt.ExchangeNotAvailable),
             ("status_after", {"status": 504}, ccxt.RequestTimeout), ("drop_before", {}, ccxt.NetworkError),
             ("drop_after", {}, ccxt.NetworkError), ("forbidden", {}, ccxt.RateLimitExceeded)]
    for fault, parameters, error in cases:
        side(url, "fault", fault=fault, on="GET /v5/account/wallet-balance", parameters=parameters)
        with pytest.raises(error):
            exchange.fetch_balance()
    for fault in ("empty", "html", "truncated", "null_result"):  # what plain ccxt takes for success
        side(url, "fault", fault=fault, on="GET /v5/position/list")
        assert exchange.fetch_positions() == []
    assert exchange.fetch_balance()["info"]["retCode"] == 0


# ── Async and pro ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_async(running):
    simulator, url = running

    async def work():
        exchange = pointed(asynchronous.bybit, simulator, url)
        try:
            await exchange.load_markets()
            symbol = told(exchange)
            found = await asyncio.gather(exchange.fetch_tickers(), exchange.fetch_ohlcv(symbol, "4h", limit=5),
                                         exchange.fetch_open_orders(symbol, params={"paginate": True}))
            return [len(each) for each in found]
        finally:
            await exchange.close()

    assert asyncio.run(work()) == [4, 5, 25]


def test_pro(running):
    simulator, url = running

    class Confirming(streaming.bybit):
        "Keeps what says whether a bar is over."

        confirmed: list = []  # noqa: RUF012  (of this test alone)

        def handle_ohlcv(self, client, message):
            self.confirmed += [row["start"] for row in message["data"] if row["confirm"]]
            super().handle_ohlcv(client, message)

    async def work():
        exchange = pointed(Confirming, simulator, url)
        try:
            await exchange.load_markets()
            symbol = told(exchange)
            ticker, book = await exchange.watch_ticker(symbol), await exchange.watch_order_book(symbol, 50)
            while not exchange.confirmed:  # a bar of five minutes takes five seconds here
                bars = await asyncio.wait_for(exchange.watch_ohlcv(symbol, "5m"), 20)
            trades = await asyncio.wait_for(exchange.watch_trades(symbol), 20)
            orders = asyncio.ensure_future(exchange.watch_orders())
            await asyncio.sleep(0.5)
            assert not orders.done()  # authenticated, subscribed, and nothing has happened
            orders.cancel()
            return symbol, ticker, book, bars, trades
        finally:
            await exchange.close()

    symbol, ticker, book, bars, trades = asyncio.run(work())
    assert ticker["symbol"] == symbol
    assert ticker["bid"] < ticker["ask"]
    assert book["bids"][0][0] < book["asks"][0][0]
    assert len(book["bids"]) == 50
    assert Confirming.confirmed[0] % (5 * MINUTE) == 0
    assert bars[-1][0] - Confirming.confirmed[0] in (0, 5 * MINUTE)
    assert trades[-1]["symbol"] == symbol


def test_pro_notices_a_cut_line_and_comes_back(running):
    simulator, url = running

    async def work():
        exchange = pointed(streaming.bybit, simulator, url)
        try:
            await exchange.load_markets()
            symbol = told(exchange)
            await exchange.watch_ohlcv(symbol, "5m")
            await asyncio.to_thread(side, url, "clock", mode="paused")  # nothing is said any more
            waiting = asyncio.ensure_future(exchange.watch_ohlcv(symbol, "5m"))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(side, url, "disconnect")
            with pytest.raises(ccxt.NetworkError):
                await asyncio.wait_for(waiting, 10)
            return await asyncio.wait_for(exchange.watch_ohlcv(symbol, "5m"), 10)
        finally:
            await exchange.close()

    assert asyncio.run(work())[-1][0] % (5 * MINUTE) == 0
