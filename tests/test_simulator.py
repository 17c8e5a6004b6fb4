"""The simulator over real bars: Bybit's shapes, what is served, what a fault does, what the clock does."""

import http.client
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from xsmom_nb.clock import parse_utc
from xsmom_nb.errors import UsageError
from xsmom_nb.exchange import public
from xsmom_nb.exchange.broadcast import acknowledged, book_message, kline_message, pong, private_message, trade_message
from xsmom_nb.exchange.journal import Journal
from xsmom_nb.exchange.limits import AddressLimit
from xsmom_nb.exchange.pace import Pace
from xsmom_nb.exchange.private import EmptyAccount, Push, Reply
from xsmom_nb.exchange.protocol import ApiKey, signature
from xsmom_nb.exchange.public import Market
from xsmom_nb.exchange.quotes import trades_at
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator, Terms
from xsmom_nb.exchange.tape import Tape, bars_at
from xsmom_nb.exchange.topics import Hub, topic_of
from xsmom_nb.exchange.wire import matches_example
from xsmom_nb.market.panel import resample
from xsmom_nb.market.synthetic import synthetic_panel

HOUR, MINUTE = 3_600_000, 60_000
KEYS = [ApiKey("k", "s", user=1), ApiKey("other", "t", user=2)]


# ── A market ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def short():
    "Five-minute bars of four contracts."
    return synthetic_panel(seed=4, bars=12 * 24 * 6, symbols=4, timeframe="5m")


@pytest.fixture(scope="session")
def tape(short) -> Tape:
    return Tape(resample(short, "1h"), short)


@pytest.fixture(scope="session")
def begin(short) -> int:
    "Four days into the recording, twelve minutes past the hour."
    return int(short.open_time_ms[0]) + 96 * HOUR + 12 * MINUTE


def made(tape: Tape, begin: int, mode="paused", engine=None, journal=None, speed=1.0, **terms) -> Simulator:
    "A simulator with two users."
    pace = Pace(begin, time.monotonic, speed, mode, tape.end_ms)
    return Simulator(Market(tape), pace, KEYS, {1: engine or EmptyAccount(), 2: EmptyAccount()}, Terms(**terms), journal)


# ── A client that is not ccxt ────────────────────────────────────────────────────────────────────────────────────────
class Client:
    "Requests by the letter of the protocol; order of keys and spaces are the caller's."

    def __init__(self, url: str, key: str = "k", secret: str = "s", clock=None) -> None:
        self.url, self.key, self.secret, self.clock = url, key, secret, clock
        self.headers: dict[str, str] = {}

    def send(self, method: str, path: str, query: str = "", body: bytes | None = None, headers=None) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self.url}{path}?{query}", body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                self.headers = dict(answer.headers)
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def get(self, path: str, **query) -> dict:
        return json.loads(self.send("GET", path, urllib.parse.urlencode(query))[1])

    def signed(self, method: str, path: str, payload: bytes = b"", **changes: str) -> dict:
        stamp = str(self.clock() if self.clock else self.get("/v5/market/time")["time"])
        sign = signature(self.secret, f"{stamp}{self.key}5000".encode() + payload)
        headers = {"X-BAPI-API-KEY": self.key, "X-BAPI-TIMESTAMP": stamp, "X-BAPI-SIGN": sign, "X-BAPI-RECV-WINDOW": "5000"}
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        query, body = ("", payload) if method == "POST" else (payload.decode(), None)
        return json.loads(self.send(method, path, query, body, headers)[1])

    def side(self, operation: str, /, **body) -> dict:
        return json.loads(self.send("POST", f"/__sim/{operation}", "", json.dumps(body).encode())[1])


# ── Shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def example(root):
    "Reads an example of the documentation; skips where there are none."
    folder = root.parent / "shared" / "data" / "bybit" / "documentation_examples"
    if not folder.is_dir():
        pytest.skip("no market data found")
    return lambda name: json.loads((folder / f"{name}.json").read_text())


LINEAR_ONLY = (
    "contractType", "deliveryFeeRate", "priceScale", "leverageFilter", "unifiedMarginTrade", "fundingInterval", "copyTrading",
    "upperFundingRate", "lowerFundingRate", "isPreListing", "preListingInfo", "maxMktOrderQty", "postOnlyMaxOrderQty",
    "minNotionalValue", "riskParameters", "symbolType")
SHAPES = [
    ("market__time.0", "/v5/market/time", {}, (), ()),
    ("market__kline.0", "/v5/market/kline", {"symbol": True, "interval": "60"}, (), ()),
    ("market__mark-kline.0", "/v5/market/mark-price-kline", {"symbol": True, "interval": "60"}, (), ()),
    ("market__index-kline.0", "/v5/market/index-price-kline", {"symbol": True, "interval": "60"}, (), ()),
    ("market__premium-index-kline.0", "/v5/market/premium-index-price-kline", {"symbol": True, "interval": "D"}, (), ()),
    ("market__tickers.0", "/v5/market/tickers", {}, (), ()),
    ("market__orderbook.0", "/v5/market/orderbook", {"symbol": True}, (), ()),
    ("market__history-fund-rate.0", "/v5/market/funding/history", {"symbol": True}, (), ()),
    ("market__recent-trade.0", "/v5/market/recent-trade", {"symbol": True}, (), ()),
    ("market__open-interest.0", "/v5/market/open-interest", {"symbol": True, "intervalTime": "1h"}, (), ()),
    ("market__order-price-limit.0", "/v5/market/price-limit", {"symbol": True}, (), ()),
    ("market__instrument.0", "/v5/market/instruments-info", {}, ("optionsType",), LINEAR_ONLY),
]


@pytest.mark.parametrize(("name", "path", "query", "without", "beyond"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_answers_have_the_shape_of_the_documentation(example, tape, begin, name, path, query, without, beyond):
    asked = {"category": "linear", **query} | ({"symbol": tape.panel.symbols[0]} if "symbol" in query else {})
    answer = public.PUBLIC[path](Market(tape), asked, begin)
    assert answer.get("list", answer)
    matches_example(example(f"{name}.response")["result"], answer, without, beyond)


def test_messages_have_the_shape_of_the_documentation(example, tape, begin):
    market, symbol = Market(tape), tape.panel.symbols[0]
    rules, book = market.rules(symbol, begin), market.book(symbol, 50, begin)
    bar = bars_at(tape, symbol, "5", begin, 1)[0]
    shape = "websocket__public__{}.response".format
    matches_example(example(shape("kline.0")), kline_message(symbol, "5", bar, begin, rules, False, begin))
    matches_example(example(shape("orderbook.0")), book_message(book, None, 50, rules))
    matches_example(example(shape("trade.0")), trade_message(trades_at(tape, symbol, begin, 5), rules, begin), beyond=["RPI"])
    ticker = Hub(market, begin).join(topic_of(f"tickers.{symbol}", tape.panel.symbols))
    full = market.ticker(symbol, begin)
    matches_example(example(shape("ticker.1")), ticker, without=["usdIndexPrice"], beyond=list(full))
    private = example("websocket__private__order.1.response")
    assert private_message("order", [{}], "1", begin).keys() == private.keys()
    replies = "websocket__wss-authentication.{}".format
    matches_example(example(replies("0.response")), acknowledged("private", {"op": "auth"}, "c1"))
    matches_example(example(replies("1.response")), pong("public", {"op": "ping"}, "c1", begin))
    matches_example(example(replies("2.response")), pong("public", {"op": "ping", "req_id": ""}, "c1", begin))
    matches_example(example(replies("4.request")), pong("private", {"op": "ping", "req_id": "test"}, "c1", begin))
    matches_example(example(replies("7.response")), acknowledged("public", {"op": "subscribe", "req_id": "1"}, "c1"))
    matches_example(example("websocket__trade__guideline.6.response"), pong("trade", {"op": "ping"}, "c1", begin))


# ── Real bars ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def real_tape(real_store) -> Tape:
    "A fortnight of real bars: hours of 36 contracts, five minutes of 26."
    span = {"start_ms": parse_utc("2025-07-06"), "end_ms": parse_utc("2025-07-20")}
    return Tape(real_store.panel("1h", **span), real_store.panel("5m", **span))


def test_every_recorded_bar_comes_back_to_the_last_digit(real_tape):
    market, panel, now = Market(real_tape), real_tape.panel, real_tape.end_ms
    for panel, interval in ((real_tape.panel, "60"), (real_tape.inner, "5")):
        first, step = int(panel.open_time_ms[0]), int(np.diff(panel.open_time_ms[:2])[0])
        for symbol in panel.symbols[:: 7 if interval == "5" else 1]:
            rows, start = [], first
            while start < now:
                query = {"category": "linear", "symbol": symbol, "interval": interval, "limit": "1000", "start": str(start)}
                page = public.klines(market, query, now)["list"]
                rows = page + rows
                start = int(page[0][0]) + step
            values = np.array([row[1:6] for row in rows[::-1]], dtype=float)[: panel.shape[0]]
            i = panel.symbols.index(symbol)
            expected = np.stack([getattr(panel, name)[:, i] for name in ("open", "high", "low", "close", "volume")], axis=1)
            assert np.array_equal(values, expected), symbol
            assert len({row[0] for row in rows}) == len(rows)


def test_prices_are_those_of_the_paper_exchange(real_tape):
    class At:
        def now_ms(self):
            return at

    market, recorded = Market(real_tape, 2.0), RecordedMarket(real_tape.panel, At(), 2.0, real_tape.inner)
    for later in (0, 61_000, 6 * MINUTE, HOUR - 1, 9 * HOUR):
        at = real_tape.start_ms + 100 * HOUR + later
        said = {row["symbol"]: row for row in public.tickers(market, {"category": "linear"}, at)["list"]}
        paper = recorded.fetch_tickers()
        assert len(paper) == len(said) == 36
        for each in paper:
            row = said[each.symbol]
            assert [float(row[key]) for key in ("lastPrice", "bid1Price", "ask1Price", "markPrice")] == [
                float(each.last), float(each.bid), float(each.ask), float(each.mark)]


def test_running_bars_never_look_ahead(real_tape):
    market, now = Market(real_tape), real_tape.start_ms + 50 * HOUR + 22 * MINUTE
    cut = Tape(real_tape.panel.slice(end_ms=now // HOUR * HOUR), real_tape.inner.slice(end_ms=now - 5 * MINUTE))
    for symbol in real_tape.panel.symbols[::5]:
        for interval in ("60", "240", "D", "W"):
            assert bars_at(market.tape, symbol, interval, now, 20)[:-1] == bars_at(cut, symbol, interval, now, 20)[:-1]
        last = bars_at(market.tape, symbol, "60", now, 1)[0]
        assert last.open_time_ms == now // HOUR * HOUR


# ── The door ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_refused_and_how(tape, begin):
    with serving(made(tape, begin)) as url:
        client = Client(url)
        query, path = b"settleCoin=USDT&category=linear", "/v5/order/realtime"
        assert client.signed("GET", path, query)["retCode"] == 0
        assert int(client.headers["X-Bapi-Limit-Status"]) == 49
        assert client.signed("GET", path, query, X_BAPI_SIGN="0" * 64)["retCode"] == 10004
        assert client.signed("GET", path, query, X_BAPI_API_KEY="nobody")["retCode"] == 10003
        stale = Client(url, clock=lambda: begin - 60_000).signed("GET", path, query)
        assert stale["retCode"] == 10002
        assert f"server_timestamp[{begin}]" in stale["retMsg"]
        assert client.get(path)["retCode"] == 10001
        assert client.signed("GET", path, b"category=perp&settleCoin=USDT")["retMsg"] == "Illegal category"
        spaced = b'{ "symbol" : "X",  "category":"linear" }'  # signed as it is, spaces and all
        assert client.signed("POST", "/v5/order/create", spaced)["retCode"] == 110007
        assert client.signed("POST", "/v5/order/create", b"not json")["retCode"] == 10001
        unknown = "Not supported symbols"
        assert client.get("/v5/market/kline", category="linear", symbol="NOPE", interval="60")["retMsg"] == unknown
        for missing in ("/v2/public/tickers", "/v3/public/time", "/v5/nothing", "/"):
            assert client.send("GET", missing) == (404, b"")
        assert client.send("POST", "/v5/market/time", body=b"{}") == (404, b"")


def test_limits_by_user_and_by_address(tape, begin):
    with serving(made(tape, begin)) as url:
        client, order = Client(url, clock=lambda: begin), b'{"category":"linear","symbol":"X"}'
        codes = [client.signed("POST", "/v5/order/create", order)["retCode"] for _ in range(12)]
        assert codes[:10] == [110007] * 10
        assert codes[11] == 10006
        other = Client(url, "other", "t", clock=lambda: begin)
        assert other.signed("POST", "/v5/order/create", order)["retCode"] == 110007
    with serving(made(tape, begin, address_limit=AddressLimit(count=5))) as url:
        client = Client(url)
        assert [client.send("GET", "/v5/market/time")[0] for _ in range(7)] == [200] * 5 + [403] * 2
        assert client.side("clock")["mode"] == "paused"  # the side channel is not counted


def test_a_taken_port_and_a_wrong_start_are_said(tape, begin):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1: another program listens there"), serving(
                made(tape, begin), port=port):
            pass
    with pytest.raises(UsageError, match="the recording covers"):
        made(tape, 0)


# ── Faults on the line ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def faulty(tape, begin, tmp_path_factory):
    "A simulator with its journal."
    path = tmp_path_factory.mktemp("sim") / "journal.jsonl"
    with serving(made(tape, begin, journal=Journal(path), address_limit=None, rate_limits=False)) as url:
        yield Client(url), path


def noted(path: Path, kind: str) -> list[dict]:
    "Lines of a journal."
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


STATUS = [("status", {"status": 503}, 503), ("status_after", {"status": 504}, 504), ("forbidden", {}, 403)]
BODIES = [("empty", b""), ("html", b"<html>"), ("null_result", b'{"retCode":0'), ("truncated", b'{"retCode":0')]
CODES = [("ret_code", {"code": 10016}, 10016), ("ret_code_after", {"code": 10000}, 10000), ("rate_limit", {}, 10006)]


@pytest.mark.parametrize(("fault", "parameters", "status"), STATUS, ids=[each[0] for each in STATUS])
def test_statuses(faulty, fault, parameters, status):
    client, _ = faulty
    client.side("fault", name=f"{fault}-s", fault=fault, on="GET /v5/market/time", parameters=parameters)
    assert [client.send("GET", "/v5/market/time")[0] for _ in range(2)] == [status, 200]


@pytest.mark.parametrize(("fault", "start"), BODIES, ids=[each[0] for each in BODIES])
def test_bodies(faulty, fault, start):
    client, _ = faulty
    client.side("fault", name=f"{fault}-b", fault=fault, on="GET /v5/market/tickers")
    status, text = client.send("GET", "/v5/market/tickers", "category=linear")
    assert status == 200
    assert text.startswith(start)
    assert len(text) < len(client.send("GET", "/v5/market/tickers", "category=linear")[1])


@pytest.mark.parametrize(("fault", "parameters", "code"), CODES, ids=[each[0] for each in CODES])
def test_codes(faulty, fault, parameters, code):
    client, _ = faulty
    client.side("fault", name=f"{fault}-c", fault=fault, on="GET /v5/market/time", parameters=parameters)
    assert [client.get("/v5/market/time")["retCode"] for _ in range(2)] == [code, 0]


@pytest.mark.parametrize("fault", ["drop_before", "drop_after"])
def test_broken_lines(faulty, fault):
    client, path = faulty
    client.side("fault", name=f"{fault}-d", fault=fault, on="POST /v5/order/cancel-all")
    body = b'{"category":"linear","settleCoin":"USDT"}'
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError, urllib.error.URLError)):
        client.signed("POST", "/v5/order/cancel-all", body)
    last = [line for line in noted(path, "request") if line["path"] == "/v5/order/cancel-all"][-1]
    assert last["status"] == (0 if fault == "drop_before" else 200)  # whether the exchange did it
    assert noted(path, "fault")[-1]["fault"] == fault
    assert client.signed("POST", "/v5/order/cancel-all", body)["result"]["success"] == "1"


def test_a_skewed_clock_and_a_delay(faulty):
    client, _ = faulty
    client.side("fault", fault="clock_skew", on="GET /v5/account/info", parameters={"skew_ms": 6000})
    assert [client.signed("GET", "/v5/account/info")["retCode"] for _ in range(2)] == [10002, 0]
    client.side("fault", fault="delay", on="GET /v5/market/time", parameters={"wait_ms": 300})
    started = time.monotonic()
    client.get("/v5/market/time")
    assert time.monotonic() - started > 0.29


def test_nothing_secret_is_journalled(faulty):
    client, path = faulty
    client.signed("GET", "/v5/user/query-api")
    text = path.read_text()
    assert '"/v5/user/query-api"' in text
    assert "X-BAPI-SIGN" not in text
    assert client.side("truth")["journal"]["request"] == len(noted(path, "request"))


# ── Clock ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_stepped_clock_waits_for_everybody(tape, begin):
    with serving(made(tape, begin)) as url:
        client = Client(url)
        for process in ("cycle", "guard"):
            client.side("register", process=process)
        client.side("clock", mode="stepped")
        client.side("permit", process="cycle", until_ms=begin + HOUR)
        assert client.side("clock")["awaited"] == ["guard"]
        assert client.get("/v5/market/time")["time"] == begin
        client.side("permit", process="guard", until_ms=begin + 10 * MINUTE)
        deadline = time.monotonic() + 5
        while client.get("/v5/market/time")["time"] < begin + 10 * MINUTE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/v5/market/time")["time"] == begin // MINUTE * MINUTE + 10 * MINUTE
        client.side("unregister", process="guard")
        while client.get("/v5/market/time")["time"] < begin + HOUR and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/v5/market/time")["time"] == begin + HOUR


def test_a_fast_clock_keeps_windows_and_limits_fair(tape, begin):
    with serving(made(tape, begin, "running", speed=3600.0)) as url:
        client = Client(url)
        body = b'{"category":"linear","symbol":"X"}'
        codes = [client.signed("POST", "/v5/order/create", body)["retCode"] for _ in range(15)]
        assert codes == [110007] * 15  # every wall millisecond is more than three seconds long


# ── Determinism ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Busy(EmptyAccount):
    "An account that says four things for every order."

    def create_order(self, order, now_ms):
        rows = ({"orderLinkId": order.get("orderLinkId", "")},)
        topics = ("order", "execution", "position", "wallet")
        return Reply({"orderId": "1", "orderLinkId": ""}, tuple(Push(topic, rows) for topic in topics))


def script(url: str) -> None:
    "Some orders, faults and steps."
    client = Client(url)
    client.side("fault", fault="ret_code", on="POST *", times=None, probability=0.4)
    for number in range(10):
        order = {"category": "linear", "symbol": "X", "orderLinkId": f"o{number}"}
        client.signed("POST", "/v5/order/create", json.dumps(order).encode())
        client.side("advance", by_ms=7 * MINUTE)


def test_the_same_seed_gives_the_same_journal(tape, begin, tmp_path):
    texts = []
    for number, seed in enumerate((5, 5, 6)):
        path = tmp_path / f"{number}.jsonl"
        with serving(made(tape, begin, engine=Busy(), journal=Journal(path), seed=seed)) as url:
            script(url)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_halted_contracts_vanish(tape, begin):
    with serving(made(tape, begin)) as url:
        client, symbol = Client(url), tape.panel.symbols[1]
        client.side("status", symbol=symbol, status="Closed")
        listed = [row["symbol"] for row in client.get("/v5/market/instruments-info", category="linear")["result"]["list"]]
        assert symbol not in listed
        assert len(listed) == 3
        assert symbol not in [row["symbol"] for row in client.get("/v5/market/tickers", category="linear")["result"]["list"]]
        client.side("status", symbol=symbol, status="Trading", delivery_ms=begin + HOUR)
        found = client.get("/v5/market/instruments-info", category="linear", symbol=symbol)["result"]["list"][0]
        assert [found["status"], found["deliveryTime"]] == ["Trading", str(begin + HOUR)]
