"""The stream against the simulator: bars as they close, an account as it changes, and the ways in which a line can fail."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pytest
from typer.testing import CliRunner
from venues import HOUR, line_to, simulated

from xsmom_nb.cli import app
from xsmom_nb.clock import format_utc
from xsmom_nb.errors import DataError
from xsmom_nb.exchange import stream
from xsmom_nb.exchange.bybit import BybitExchange, set_up
from xsmom_nb.exchange.keeper import BarKeeper
from xsmom_nb.exchange.line import require_addresses
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.stream import Channel, Feed, follow, private_channel, public_channel, stream_client, stream_urls
from xsmom_nb.exchange.view import AccountView, Quotes
from xsmom_nb.market.panel import FIELDS, times_ms
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import OrderRequest

pytest.importorskip("ccxt", reason="no package ccxt found")
BARS, FIRST, SYMBOLS = 60, 40, ("BTCUSDT", "ETHUSDT")


@pytest.fixture(scope="module")
def panel():
    return synthetic_panel(seed=11, bars=BARS, symbols=4)


class Desk:
    "A simulator, a port to it and its side channel."

    def __init__(self, simulator, url, panel, folder):
        self.simulator, self.url, self.panel = simulator, url, panel
        self.port, self.hand = (BybitExchange(line_to(simulator, url)) for _ in range(2))  # what the feeds ask, and who trades
        self.store, self.lines, self.fills, self.bars = Store(folder, "streamed"), [], [], []
        self.orders = 0

    def client(self, **settings):
        addresses = dict.fromkeys(("spot", "futures", "v2", "public", "private"), self.url)
        given = {"apiKey": "the-key", "secret": "the-secret", "urls": {"api": addresses}, **settings}
        made = stream_client(self.simulator.pace, **given)
        made.urls["api"]["ws"] = stream_urls(self.url)
        require_addresses(made.urls["api"], is_simulator=True)
        return made

    def keeper(self):
        start_ms = int(self.panel.open_time_ms[FIRST - 10])
        return BarKeeper(self.port, self.store, SYMBOLS, "1h", start_ms, lambda *bar: self.bars.append(bar), self.lines.append)

    def view(self):
        return AccountView(self.port, self.simulator.pace.now_ms(), self.fills.append)

    async def side(self, operation, **body):
        def ask():
            request = urllib.request.Request(f"{self.url}/__sim/{operation}", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)

        return await asyncio.to_thread(ask)

    async def buy(self, quantity="0.05", symbol="BTCUSDT", side="Buy", price=None):
        "Send an order; it is filled, or rests at a price that nobody meets."
        self.orders += 1
        kind, force = ("Limit", "GTC") if price else ("Market", "IOC")
        limit = Decimal(price) if price else None
        request = OrderRequest(f"order-{self.orders}", symbol, side, kind, Decimal(quantity), limit, force, False)
        sent = await asyncio.to_thread(self.hand.submit_order, request)
        assert sent.outcome == "accepted", sent

    def connected(self, times=1):
        return lambda: sum(": connection " in line for line in self.lines) >= times


@pytest.fixture
def desk(panel, tmp_path):
    simulator = simulated(panel, int(panel.open_time_ms[FIRST]) + HOUR + 60_000)
    with serving(simulator) as url:
        found = Desk(simulator, url, panel, tmp_path)
        set_up(found.port.line, [each.symbol for each in found.port.fetch_instruments()], leverage=3)
        yield found


async def wait_for(holds, seconds=20.0):
    "Until something holds."
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def run(desk, channels, story, **settings):
    "Follow channels while a story is told; what ends the feeds fails the test."

    async def whole():
        client, is_over = desk.client(**settings), False
        listeners = [(channel(client), listener) for channel, listener in channels]
        feeds = asyncio.ensure_future(follow(client, listeners, desk.lines.append, lambda: is_over))
        told = asyncio.ensure_future(story(client))
        done, _ = await asyncio.wait([feeds, told], return_when=asyncio.FIRST_COMPLETED)
        is_over = True
        if told not in done:
            told.cancel()
        await feeds
        await told

    asyncio.run(whole())


def bars_of(keeper, seconds=600.0):
    return (lambda client: public_channel(client, keeper.topics(seconds))), keeper


def account_of(view, seconds=600.0):
    return (lambda client: private_channel(client, seconds)), view


def assert_stored(desk, count):
    "The store holds the recorded bars up to one, bit for bit, and none besides."
    for symbol in SYMBOLS:
        column, stored = desk.panel.symbols.index(symbol), desk.store.read_bars(symbol, "1h")
        rows = slice(FIRST - 10, FIRST + 1 + count)
        assert times_ms(symbol, stored["timestamp"]).tolist() == desk.panel.open_time_ms[rows].tolist()
        for name in FIELDS:
            assert np.array_equal(stored[name].to_numpy(), getattr(desk.panel, name)[rows, column]), (symbol, name)


def assert_true(desk, view):
    "The view is what the exchange answers, and every fill was given once."
    def held(positions):
        return {each.symbol: (each.quantity, each.average_price, each.stop_price) for each in positions}

    assert held(view.positions.values()) == held(desk.port.fetch_positions())
    assert view.open_orders == list(desk.port.fetch_open_orders())
    truth = list(desk.port.fetch_fills(desk.simulator.pace.now_ms() - HOUR))
    assert sorted(view.fills) == sorted(fill.fill_id for fill in truth)
    assert sorted(fill.fill_id for fill in desk.fills) == sorted(fill.fill_id for fill in truth)
    assert {fill.fill_id: fill for fill in truth} == view.fills
    assert view.account.wallet_balance == desk.port.fetch_account().wallet_balance


# ── Bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_confirmed_bars_land_in_the_store_bit_for_bit(desk):
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())
        assert_stored(desk, 0)  # by REST, before anything was told
        for hour in range(3):  # one after the other: a repair that is under way would be first with the next bar
            await desk.side("advance", by_ms=HOUR)
            await wait_for(lambda told=2 * (hour + 1): len(desk.bars) >= told and not keeper.is_doubtful)

    run(desk, [bars_of(keeper)], story)
    assert_stored(desk, 3)
    assert (keeper.streamed, keeper.repaired) == (6, 22)
    assert len({(symbol, bar.open_time_ms) for symbol, bar in desk.bars}) == len(desk.bars) == 6
    assert len(desk.store.read_funding("BTCUSDT")) > 0


def test_a_gap_is_filled_after_the_line_was_cut(desk):
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())
        await desk.side("disconnect")
        await desk.side("advance", by_ms=4 * HOUR)  # nobody listens
        await wait_for(desk.connected(2))
        await desk.side("advance", by_ms=HOUR)
        await wait_for(lambda: len(desk.bars) >= 2 and not keeper.is_doubtful)

    run(desk, [bars_of(keeper)], story)
    assert_stored(desk, 5)


def test_bars_lost_twice_and_out_of_order(desk):
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())
        for fault, probability in (("lose", 0.3), ("duplicate", 0.5), ("reorder", 0.3)):
            await desk.side("fault", fault=fault, on="push kline*", probability=probability, times=None, name=fault)
        for _ in range(8):
            await desk.side("advance", by_ms=HOUR)
        await desk.side("clear-faults")
        await desk.side("advance", by_ms=HOUR)
        last_ms = desk.panel.open_time_ms[FIRST + 9]
        await wait_for(lambda: not keeper.is_doubtful and all(newest >= last_ms for newest in keeper.newest.values()))

    run(desk, [bars_of(keeper)], story)
    assert_stored(desk, 9)
    assert len({(symbol, bar.open_time_ms) for symbol, bar in desk.bars}) == len(desk.bars)


def test_a_socket_that_answers_pings_and_says_nothing_is_given_up(desk):
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())
        await desk.side("fault", fault="silent", on="push kline*", times=1, parameters={"wait_ms": 60_000})
        await desk.side("advance", by_ms=2 * HOUR)
        await wait_for(desk.connected(2))
        await wait_for(lambda: not keeper.is_doubtful)

    run(desk, [bars_of(keeper, seconds=0.8)], story, options={"ws": {"keepAlive": 200}})
    assert any("nothing said for 0.8 s" in line for line in desk.lines)
    assert_stored(desk, 2)


# ── The account ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_account_as_it_changes(desk):
    view = desk.view()

    async def story(client):
        await wait_for(desk.connected())
        await desk.buy("0.05")
        await desk.buy("0.02", side="Sell")
        await desk.buy("0.1", symbol="ETHUSDT", price="1960")
        await wait_for(lambda: len(desk.fills) >= 2 and len(view.open_orders) == 1 and not view.is_doubtful)
        await asyncio.sleep(0.5)  # what was said last, and doubts

    run(desk, [account_of(view)], story)
    assert_true(desk, view)
    assert view.positions["BTCUSDT"].quantity == Decimal("0.03")


def test_no_fill_is_lost_with_the_line_and_none_counts_twice(desk):
    view = desk.view()

    async def story(client):
        await wait_for(desk.connected())
        await desk.buy("0.05")
        await desk.buy("0.1", symbol="ETHUSDT", price="1960")
        await wait_for(lambda: len(desk.fills) == 1 and len(view.open_orders) == 1)
        await desk.side("fault", fault="close", on="push execution")  # the message is lost, and the line with it
        await desk.buy("0.02", side="Sell")
        cancelled = await asyncio.to_thread(desk.hand.cancel_order, "ETHUSDT", "order-2")
        assert cancelled.outcome == "accepted"
        await wait_for(desk.connected(2))
        await desk.buy("0.01")
        await wait_for(lambda: len(desk.fills) >= 3 and not view.open_orders)
        await asyncio.sleep(0.5)

    run(desk, [account_of(view)], story)
    assert_true(desk, view)
    assert len(desk.fills) == 3


def test_messages_out_of_order_late_and_twice_make_the_same_account(desk):
    view = desk.view()

    async def story(client):
        await wait_for(desk.connected())
        for fault, probability in (("duplicate", 0.5), ("reorder", 0.4), ("late", 0.3)):
            values = {"wait_ms": 100} if fault == "late" else {}
            await desk.side("fault", fault=fault, on="push *", probability=probability, times=None, name=fault, parameters=values)
        for i in range(8):
            await desk.buy("0.03", side="Sell" if i % 3 == 2 else "Buy", symbol=SYMBOLS[i % 2])
            await desk.side("advance", by_ms=10_000)
        await desk.side("clear-faults")
        await desk.buy("0.01")
        await wait_for(lambda: len(desk.fills) >= 9 and not view.is_doubtful)
        await asyncio.sleep(0.6)

    run(desk, [account_of(view)], story)
    assert_true(desk, view)


def test_an_account_that_is_silent_is_asked_and_a_line_that_lost_something_is_given_up(desk):
    view = desk.view()

    async def story(client):
        await wait_for(desk.connected())
        await asyncio.sleep(1.0)  # nothing happens: asked, and kept
        assert not any("connecting again" in line for line in desk.lines)
        await desk.side("fault", fault="silent", on="push *", times=1, parameters={"wait_ms": 60_000})
        await desk.buy("0.05")
        await wait_for(desk.connected(2))

    run(desk, [account_of(view, seconds=0.4)], story)
    assert any("no message told of" in line for line in desk.lines)
    assert_true(desk, view)


# ── Both, and what is refused ────────────────────────────────────────────────────────────────────────────────────────
def test_tickers_bars_and_account_together(desk):
    view, keeper, quotes = desk.view(), desk.keeper(), Quotes()

    class Both:
        "Bars and tickers of one socket."

        is_doubtful = property(lambda self: keeper.is_doubtful)
        resync = staticmethod(keeper.resync)

        def begin(self):
            keeper.begin()
            quotes.begin()

        def hear(self, message):
            (quotes if str(message.get("topic")).startswith("tickers") else keeper).hear(message)

    async def story(client):
        await wait_for(desk.connected(2))
        await desk.buy("0.05")
        await desk.side("advance", by_ms=HOUR)
        await wait_for(lambda: len(desk.bars) >= 2 and desk.fills and not keeper.is_doubtful)
        await asyncio.sleep(0.3)

    topics = {**keeper.topics(600.0), **{f"tickers.{symbol}": 600.0 for symbol in SYMBOLS}}
    run(desk, [(lambda client: public_channel(client, topics), Both()), account_of(view)], story)
    truth = {each.symbol: each for each in desk.port.fetch_tickers()}
    for symbol in SYMBOLS:
        told, true = quotes.ticker(symbol), truth[symbol]
        assert (told.bid, told.ask, told.last, told.mark) == (true.bid, true.ask, true.last, true.mark)
    assert_stored(desk, 1)


def test_a_message_that_is_none_ends_the_connection_and_not_the_feed(desk):
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())
        url = public_channel(client, {}).url
        client.handle_message(client.clients[url], "<html>We will be back soon</html>")
        await wait_for(desk.connected(2))
        client.handle_message(client.clients[url], {"topic": "kline.60.BTCUSDT", "data": [{"confirm": True}]})
        await wait_for(desk.connected(3))
        await desk.side("advance", by_ms=HOUR)
        await wait_for(lambda: len(desk.bars) >= 2)

    run(desk, [bars_of(keeper)], story)
    assert_stored(desk, 1)


def test_a_subscription_without_an_answer_is_tried_again(desk, monkeypatch):
    monkeypatch.setattr(stream, "_ANSWER_SECONDS", 0.5)
    keeper = desk.keeper()

    async def story(client):
        await wait_for(desk.connected())

    asyncio.run(desk.side("fault", fault="unacknowledged", on="socket subscribe"))
    run(desk, [bars_of(keeper)], story)
    assert any("no answer in 0.5 s" in line for line in desk.lines)


async def never(client):
    "A story that waits to be ended."
    await asyncio.sleep(30)


def test_what_the_exchange_refuses_ends_the_feed(desk):
    with pytest.raises(DataError, match="handler not found"):
        run(desk, [((lambda client: public_channel(client, {"kline.7.BTCUSDT": 60.0})), desk.keeper())], never)
    with pytest.raises(DataError, match="Authentication"):
        run(desk, [account_of(desk.view())], never, secret="wrong")


# ── From outside ─────────────────────────────────────────────────────────────────────────────────────────────────────
def words(desk, folder, *options):
    "What stands behind `xsmom` to stream from the simulator."
    address = f"exchange.mode_urls.simulator={json.dumps(desk.url)}"
    return ["stream", "--config", "defaults", "--set", 'live.mode="simulator"', "--set", address,
            "--set", f"logging.directory={json.dumps(str(folder / 'logs'))}", "--data", str(folder), "--dataset", "streamed",
            "--start", format_utc(int(desk.panel.open_time_ms[FIRST - 10])), *options]


def streamed(desk, folder, *options, hours=0):
    "`xsmom stream` from the simulator, where so many hours pass as soon as somebody listens."
    def pass_hours():
        deadline = time.monotonic() + 60.0
        while len(desk.simulator.hub.topics) < len(SYMBOLS) and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(hours):
            asyncio.run(desk.side("advance", by_ms=HOUR))

    with ThreadPoolExecutor(1) as pool:
        passing = pool.submit(pass_hours) if hours else None
        done = CliRunner().invoke(app, words(desk, folder, *options))
        if passing:
            passing.result()
    return done


def test_the_command_keeps_a_store_current(desk, tmp_path):
    named = ("--symbol", "BTCUSDT", "--symbol", "ETHUSDT")
    done = streamed(desk, tmp_path, *named, "--bars", "2", "--json", hours=2)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["symbols"], told["streamed"] + told["repaired"]) == (2, 26)
    assert_stored(desk, 2)
    asyncio.run(desk.side("advance", by_ms=3 * HOUR))  # nobody listens
    again = streamed(desk, tmp_path, "--bars", "1", hours=1)  # the symbols of the store
    assert again.exit_code == 0, again.output
    assert "BTCUSDT" in again.output
    assert_stored(desk, 6)
    lines = [json.loads(line) for path in (tmp_path / "logs").iterdir() for line in path.read_text().splitlines()]
    assert {line["process"] for line in lines} == {"stream"}
    assert [line["event"] for line in lines if line["event"] != "line"] == ["streaming", "ended"] * 2
    assert sum(": connection 1, " in line.get("said", "") for line in lines) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_that_is_told_to_end_ends_in_order(desk, tmp_path, number):
    command = [sys.executable, "-c", "from xsmom_nb.cli import app; app()", *words(desk, tmp_path, "--symbol", "BTCUSDT")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while "connection 1, " not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said.splitlines()[-1][:25]) == (0, "ended; the store is whole")
    lines = [json.loads(line) for path in (tmp_path / "logs").iterdir() for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "line"] == ["streaming", "ended"]


def test_the_command_refuses_an_address_elsewhere_and_a_topic_that_is_none(desk, tmp_path):
    address = f"exchange.mode_urls.live={json.dumps(desk.url)}"
    elsewhere = CliRunner().invoke(app, ["stream", "--config", "defaults", "--set", 'live.mode="live"', "--set", address,
                                         "--data", str(tmp_path), "--symbol", "BTCUSDT"])
    assert elsewhere.exit_code == 3
    unknown = streamed(desk, tmp_path, "--symbol", "NOPEUSDT", "--bars", "1")
    assert unknown.exit_code == 1
    assert "NOPEUSDT" in unknown.output


def test_who_is_told_to_end_ends_although_a_message_comes_in_that_moment():
    "`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes together with what it waits for."
    heard = []

    class Listener:
        is_doubtful = False
        hear = heard.append

    async def whole():
        inbox, channel = asyncio.Queue(), Channel("wss://nowhere", {"kline.60.BTCUSDT": 600.0})
        task = asyncio.ensure_future(Feed(None, channel, Listener(), heard.append, asyncio.Lock())._listen(inbox, []))
        await asyncio.sleep(0.01)
        inbox.put_nowait({"topic": "kline.60.BTCUSDT"})
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1.0)
        assert done == {task}
        assert task.cancelled()

    asyncio.run(whole())
