"""The simulator's sockets by the letter of the protocol: authentication, private messages, order entry, faults of a stream."""

import asyncio
import json
import time
from dataclasses import replace

import aiohttp
import pytest
from xsmom_nb.exchange.absence import Absences
from xsmom_nb.exchange.journal import Journal
from xsmom_nb.exchange.limits import AddressGuard, AddressLimit
from xsmom_nb.exchange.pace import Pace
from xsmom_nb.exchange.private import EmptyAccount, Push, Reply
from xsmom_nb.exchange.protocol import ApiKey, Refusal, signature
from xsmom_nb.exchange.public import Market
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator, Terms
from xsmom_nb.exchange.tape import Tape
from xsmom_nb.market.panel import resample
from xsmom_nb.market.synthetic import synthetic_panel

MINUTE = 60_000


class Taking(EmptyAccount):
    "An account that takes every order and tells of it."

    def __init__(self):
        self.taken = []

    def create_order(self, order, now_ms):
        self.taken.append(order)
        result = {"orderId": f"id{len(self.taken)}", "orderLinkId": order.get("orderLinkId", "")}
        told = {**result, "category": "linear", "symbol": order["symbol"], "side": order["side"], "execId": f"e{len(self.taken)}"}
        return Reply(result, (Push("order", (told,)), Push("execution", (told,)), Push("wallet", ({"coin": []},))))

    def advance(self, now_ms):
        return [Push("position", ({"symbol": "X"},))] if now_ms % (30 * MINUTE) == 0 else []


@pytest.fixture(scope="module")
def short():
    return synthetic_panel(seed=4, bars=12 * 24 * 3, symbols=2, timeframe="5m")


@pytest.fixture
def running(short, tmp_path):
    "A paused simulator with one account that takes orders, and its URL."
    tape = Tape(resample(short, "1h"), short)
    pace = Pace(int(short.open_time_ms[0]) + 40 * 3_600_000 + 12 * MINUTE, time.monotonic, mode="paused")
    keys = [ApiKey("k", "s", user=1), ApiKey("reader", "s", user=1, read_only=True), ApiKey("other", "t", user=2)]
    journal = Journal(tmp_path / "journal.jsonl")
    simulator = Simulator(Market(tape), pace, keys, {1: Taking(), 2: EmptyAccount()}, Terms(push_ms=300_000), journal)
    with serving(simulator) as url:
        yield simulator, url


class Line:
    "One connection."

    def __init__(self, client, url: str, path: str, now_ms: int) -> None:
        self.client, self.url, self.path, self.now_ms = client, url, path, now_ms

    async def __aenter__(self):
        self.line = await self.client.ws_connect(self.url + self.path)
        return self

    async def __aexit__(self, *_):
        await self.line.close()

    async def ask(self, **request):
        await self.line.send_json(request)
        return await self.next()

    async def next(self, seconds: float = 5.0):
        message = await self.line.receive(timeout=seconds)
        return json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else message.type

    async def log_in(self, key="k", secret="s", as_text=False):
        expires = self.now_ms + 10_000
        sign = signature(secret, f"GET/realtime{expires}".encode())
        return await self.ask(op="auth", args=[key, str(expires) if as_text else expires, sign])

    async def side(self, operation, /, **body):
        async with self.client.post(f"{self.url}/__sim/{operation}", json=body) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()


def on(running, path, work):
    "Run `work(line)` on a connection to a path."
    simulator, url = running

    async def whole():
        async with aiohttp.ClientSession() as client, Line(client, url, path, simulator.pace.now_ms()) as line:
            return await work(line)

    return asyncio.run(whole())


def test_who_may_listen(running):
    async def work(line):
        refused = await line.ask(op="subscribe", args=["order"])
        wrong = await line.log_in(secret="no")
        right = await line.log_in(as_text=True)
        private = await line.ask(op="subscribe", args=["order", "wallet"])
        public = await line.ask(op="subscribe", args=["tickers.SYN01USDT"])
        pong = await line.ask(op="ping")
        return refused, wrong, right, private, public, pong

    refused, wrong, right, private, public, pong = on(running, "/v5/private", work)
    assert [each["success"] for each in (refused, wrong, right, private, public)] == [False, False, True, True, False]
    assert wrong["request"]["op"] == "auth"
    assert "req_id" not in private
    assert pong["op"] == "pong"


def test_private_messages_reach_their_owner_only(running):
    async def work(line):
        assert (await line.log_in())["success"]
        await line.ask(op="subscribe", args=["order", "execution.linear", "position"])
        async with Line(line.client, line.url, "/v5/private", line.now_ms) as other:
            assert (await other.log_in("other", "t"))["success"]
            await other.ask(op="subscribe", args=["order"])
            await line.side("by-hand", user=1, parameters={"symbol": "SYN01USDT", "side": "Buy", "orderLinkId": "mine"})
            heard = [await line.next(), await line.next()]
            await line.side("advance", by_ms=20 * MINUTE)
            heard.append(await line.next())
            with pytest.raises(asyncio.TimeoutError):
                await other.next(0.2)
        return heard

    heard = on(running, "/v5/private", work)
    assert sorted(message["topic"] for message in heard[:2]) == ["execution.linear", "order"]
    assert {message["data"][0]["orderLinkId"] for message in heard[:2]} == {"mine"}
    assert heard[2]["topic"] == "position"
    assert heard[2]["creationTime"] % (30 * MINUTE) == 0
    assert len({message["id"] for message in heard}) == 3


def test_orders_by_socket(running):
    order = {"category": "linear", "symbol": "SYN01USDT", "side": "Buy", "orderType": "Market", "qty": "1", "orderLinkId": "x1"}

    async def work(line):
        header = {"X-BAPI-TIMESTAMP": str(line.now_ms)}
        before = await line.ask(op="order.create", reqId="0", header=header, args=[order])
        login = await line.log_in()
        done = await line.ask(op="order.create", reqId="1", header=header, args=[order])
        late = await line.ask(op="order.create", reqId="2", header={"X-BAPI-TIMESTAMP": "1"}, args=[order])
        wrong = await line.ask(op="order.create", reqId="3", header=header, args=[])
        unknown = await line.ask(op="order.make", reqId="4", header=header, args=[order])
        batch = {"category": "linear", "request": [{**order, "orderLinkId": f"b{i}"} for i in range(12)]}
        many = await line.ask(op="order.create-batch", reqId="5", header=header, args=[batch])
        return before, login, done, late, wrong, unknown, many

    before, login, done, late, wrong, unknown, many = on(running, "/v5/trade", work)
    assert login.keys() == {"retCode", "retMsg", "op", "connId"}
    assert [each["retCode"] for each in (before, done, late, wrong, unknown)] == [10004, 0, 10002, 10001, 10001]
    assert (done["reqId"], done["data"]) == ("1", {"orderId": "id1", "orderLinkId": "x1"})
    assert done["header"]["X-Bapi-Limit-Status"] == "9"
    assert [fate["code"] for fate in many["retExtInfo"]["list"]] == [0] * 10 + [10006] * 2
    assert len(running[0].engines[1].taken) == 11


def test_a_key_that_may_only_read_places_nothing(running):
    async def work(line):
        await line.log_in("reader")
        header = {"X-BAPI-TIMESTAMP": str(line.now_ms)}
        return await line.ask(op="order.create", header=header, args=[{"category": "linear", "symbol": "SYN01USDT"}])

    assert on(running, "/v5/trade", work)["retCode"] == 10005


def test_streams_that_fall_silent(running):
    async def work(line):
        topic = f"kline.5.{running[0].market.tape.panel.symbols[0]}"
        await line.side("fault", fault="unacknowledged", on="socket subscribe")
        first = await line.ask(op="subscribe", args=[topic])  # the snapshot, and no word before it
        await line.side("fault", fault="silent", on="push *", parameters={"wait_ms": 300})
        await line.side("advance", by_ms=20 * MINUTE)
        pong = await line.ask(op="ping", req_id=1)
        await asyncio.sleep(0.35)
        await line.side("advance", by_ms=5 * MINUTE)
        again = await line.next()
        await line.next()
        await line.side("fault", fault="black_hole", on="socket ping", parameters={"wait_ms": 60_000})
        with pytest.raises(asyncio.TimeoutError):
            await line.ask(op="ping") and await line.next(0.2)
        return first, pong, again

    simulator, url = running

    async def whole():
        async with aiohttp.ClientSession() as client, Line(client, url, "/v5/public/linear", simulator.pace.now_ms()) as line:
            line.next = lambda seconds=0.5: Line.next(line, seconds)
            return await work(line)

    first, pong, again = asyncio.run(whole())
    assert first["topic"].startswith("kline.5.")
    assert pong["ret_msg"] == "pong"  # alive, and says nothing
    assert again["ts"] - first["ts"] > 20 * MINUTE  # what was not said meanwhile is not said later


def test_what_makes_no_sense(running):
    async def work(line):
        await line.line.send_str("hello")
        noise = await line.next()
        unknown = await line.ask(op="dance")
        missing = await line.ask(op="subscribe", args=["kline.7.SYN01USDT"], req_id="a")
        foreign = await line.ask(op="subscribe", args=["tickers.NOPE"])
        return noise, unknown, missing, foreign

    noise, unknown, missing, foreign = on(running, "/v5/public/linear", work)
    assert not any(each["success"] for each in (noise, unknown, missing, foreign))
    assert missing["ret_msg"] == "error:handler not found,topic:kline.7.SYN01USDT"
    assert missing["req_id"] == "a"
    assert foreign["ret_msg"] == "Invalid symbol :[tickers.NOPE]"


def test_connections_are_counted_and_idle_ones_cut(running):
    simulator, url = running
    simulator.door = AddressGuard(AddressLimit(3, 300_000, 300_000))
    simulator.terms = replace(simulator.terms, idle_seconds=0.4)
    simulator_ms = simulator.pace.now_ms()

    async def work():
        async with aiohttp.ClientSession() as client:
            def line():
                return Line(client, url, "/v5/public/linear", simulator_ms)

            async with line() as pinging, line() as idle, line():
                for _ in range(4):
                    await asyncio.sleep(0.2)
                    assert (await pinging.ask(op="ping"))["ret_msg"] == "pong"  # who says something is heard on
                assert await idle.next() in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR)
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    async with line():
                        pass
                return refused.value.status

    assert asyncio.run(work()) == 403


def test_orders_of_who_is_gone_are_cancelled_where_that_was_asked_for(running):
    simulator, url = running
    gone = []
    simulator.engines[1].cancel_all = lambda which, now_ms: gone.append(now_ms) or Reply({"list": [], "success": "1"})
    begin_ms = simulator.pace.now_ms()

    async def work():
        async with aiohttp.ClientSession() as client:
            for topics in (["order"], ["order", "dcp.future"]):
                async with Line(client, url, "/v5/private", simulator.pace.now_ms()) as line:
                    await line.log_in()
                    assert (await line.ask(op="subscribe", args=topics))["success"]
                await asyncio.sleep(0.05)
                await line.side("advance", by_ms=9_000)
                assert gone == []
                await line.side("advance", by_ms=2_000)
                assert bool(gone) == ("dcp.future" in topics)  # a socket that did not subscribe is not watched

    simulator.absences.set_window(1, {"timeWindow": 10})
    asyncio.run(work())
    assert gone == [begin_ms + 22_000]
    with pytest.raises(Refusal) as refused:  # by option, as for an account that is no institution
        Absences(is_allowed=False).set_window(1, {"timeWindow": 10})
    assert refused.value.code == 10005
