"""Every fault of a line, struck while an account trades and bars close: each is noticed, and afterwards the view is the truth."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from test_stream import BARS, FIRST, Desk, account_of, assert_stored, bars_of, run, wait_for
from venues import HOUR, quick_line, simulated, unhurried

from xsmom_nb.exchange import stream
from xsmom_nb.exchange.bybit import BybitExchange, set_up
from xsmom_nb.exchange.faults import FAULTS
from xsmom_nb.exchange.keeper import BarKeeper
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.view import AccountView
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ops.truth import OPEN, differing, truth_of

pytest.importorskip("ccxt", reason="no package ccxt found")
TOPICS = ("push kline*", "push order", "push execution", "push position", "push wallet")
SOCKETS = ("push kline*", "push execution")  # one topic of each socket


@dataclass(frozen=True)
class Case:
    "What goes wrong, and what has to be heard of it."

    fault: str
    on: tuple[str, ...]  # occasions; the first of a fault that strikes before anything is connected is of a socket
    parameters: Mapping[str, Any] = field(default_factory=dict)
    times: int | None = 1  # on each occasion
    probability: float = 1.0
    bars: str = ""  # what is said when the public socket is given up; empty: nothing has to be
    account: str = ""
    seconds: float = 600.0  # of silence that is borne
    rest: tuple[str, str, Mapping[str, Any]] | None = None  # fault, occasion, parameters: the answers are no good either


LONG = {"wait_ms": 60_000}
CASES = {
    "close": Case("close", SOCKETS, bars="connecting again", account="connecting again"),
    "close, and the answers are garbage": Case(
        "close", SOCKETS, account="connecting again", rest=("html", "GET /v5/order/realtime", {})),
    "close, and the answers lag": Case(
        "close", SOCKETS, account="connecting again", seconds=0.4, rest=("lagging", "GET /v5/execution/list", {"by_ms": 5000})),
    "silent": Case("silent", SOCKETS, LONG, bars="nothing said for 0.4 s", account="no message told of", seconds=0.4),
    "black hole": Case("black_hole", SOCKETS, LONG, bars="connecting again", account="no message told of", seconds=0.4),
    "black hole, noticed by pings": Case("black_hole", SOCKETS, LONG, bars="connecting again", account="connecting again"),
    "lose executions": Case("lose", ("push execution",), times=None, account="no message told of fill", seconds=0.4),
    "lose orders": Case("lose", ("push order",), times=None, account="no message told of order", seconds=0.4),
    "lose positions and wallets": Case("lose", ("push position", "push wallet"), times=None, seconds=0.4),
    "lose everything": Case("lose", TOPICS, times=None, bars="nothing said for 0.4 s", account="no message told of", seconds=0.4),
    "duplicate": Case("duplicate", TOPICS, times=None),
    "reorder": Case("reorder", TOPICS, times=3),
    "late": Case("late", TOPICS, {"wait_ms": 300}, times=None, probability=0.5),  # so that old news comes last
    "unacknowledged": Case(
        "unacknowledged", ("socket subscribe",), times=2, bars="no answer in 0.5 s", account="no answer in 0.5 s"),
    "closed at log-in": Case("close", ("socket auth",), account="connecting again"),
    "no answer to a log-in": Case("black_hole", ("socket auth",), LONG, account="no answer in 0.5 s"),
    "private first": Case("private_first", ("POST /v5/*",), times=None),
    "private last": Case("private_last", ("POST /v5/*",), {"wait_ms": 100}, times=None),
}  # fmt: skip


@pytest.fixture(scope="module")
def panel():
    return synthetic_panel(seed=11, bars=BARS, symbols=4)


@pytest.fixture
def desk(panel, tmp_path):
    simulator = simulated(panel, int(panel.open_time_ms[FIRST]) + HOUR + 60_000)
    with serving(unhurried(simulator)) as url:
        found = Desk(simulator, url, panel, tmp_path)
        found.port, found.hand = (BybitExchange(quick_line(simulator, url)) for _ in range(2))
        set_up(found.port.line, [each.symbol for each in found.port.fetch_instruments()], leverage=3)
        yield found


def counted(listener):
    "A listener that knows how often it asked."

    class Counted(type(listener)):
        asked = 0

        def resync(self):
            self.asked += 1
            return super().resync()

    listener.__class__ = Counted
    return listener


def differences(desk: Desk, view: AccountView, keeper: BarKeeper, bars: int) -> list[str]:
    "Where the view is not the simulator's truth; empty: nowhere."
    truth = truth_of(desk.url)
    true = {
        "positions": {symbol: (Decimal(each["quantity"]), each["stop"] and Decimal(each["stop"]))
                      for symbol, each in truth["positions"].items()},
        "open orders": {name: (each["link_id"], Decimal(each["filled"])) for name, each in truth["orders"].items()
                        if each["link_id"] and each["status"] in OPEN},
        "executions": sorted((each["id"], each["order_id"], each["symbol"], Decimal(each["quantity"]), Decimal(each["price"]),
                              Decimal(each["fee"]), each["time_ms"]) for each in truth["fills"] if each["kind"] != "Funding"),
        "wallet": Decimal(truth["wallet"]).quantize(Decimal("1e-6")),
        "last bars": {symbol: int(desk.panel.open_time_ms[FIRST + bars]) for symbol in keeper.symbols},
        "doubts": (False, False),
    }
    seen = {
        "positions": {symbol: (each.quantity, each.stop_price) for symbol, each in view.positions.items()},
        "open orders": {each.order_id: (each.link_id, each.filled_quantity) for each in view.open_orders},
        "executions": sorted((each.fill_id, each.order_id, each.symbol, each.quantity, each.price, each.fee, each.time_ms)
                             for each in list(desk.fills)),  # as they were handed on: one that comes twice is a difference
        "wallet": view.account.wallet_balance.quantize(Decimal("1e-6")) if view.account else None,
        "last bars": dict(keeper.newest),
        "doubts": (view.is_doubtful, keeper.is_doubtful),
    }
    return [each for name in true for each in differing(name, seen[name], true[name])]


async def trades(desk: Desk, number: int) -> None:
    "Taken, waiting, filled later, cancelled, protected: something of every kind, some of it within one millisecond."
    mark = next(each.mark for each in await asyncio.to_thread(desk.hand.fetch_tickers) if each.symbol == "BTCUSDT")
    tick = next(each.price_tick for each in await asyncio.to_thread(desk.hand.fetch_instruments) if each.symbol == "BTCUSDT")
    stop = (mark * (Decimal("0.5") + number * Decimal("0.05")) / tick).to_integral_value() * tick
    await desk.buy("0.05")
    await desk.buy("0.1", symbol="ETHUSDT", price="1960")
    waiting = f"order-{desk.orders}"
    sent = await asyncio.to_thread(desk.hand.set_position_stop, "BTCUSDT", stop)
    assert sent.outcome == "accepted", sent
    await desk.side("advance", by_ms=1000)
    await desk.buy("0.02", side="Sell")
    cancelled = await asyncio.to_thread(desk.hand.cancel_order, "ETHUSDT", waiting)
    assert cancelled.outcome == "accepted", cancelled
    await desk.buy("0.1", symbol="ETHUSDT", price="1950")


@pytest.mark.parametrize("name", CASES)
def test_after_a_fault_the_view_is_the_truth(desk, monkeypatch, name):
    case, view, keeper = CASES[name], counted(desk.view()), counted(desk.keeper())
    monkeypatch.setattr(stream, "_ANSWER_SECONDS", 0.5)
    found, before = ["never compared"], [0, 0]

    async def strike() -> None:
        for on in case.on:
            rule = {"fault": case.fault, "on": on, "times": case.times, "probability": case.probability,
                    "parameters": dict(case.parameters)}
            await desk.side("fault", name=f"{name} {on}", **rule)
        if case.rest:
            fault, on, parameters = case.rest
            await desk.side("fault", fault=fault, on=on, parameters=dict(parameters), name="answers")

    async def settled() -> bool:
        found[:] = await asyncio.to_thread(differences, desk, view, keeper, 2)
        return not found

    def noticed() -> bool:
        return all(any(words in line for line in desk.lines if path in line)
                   for path, words in (("/public/", case.bars), ("/private", case.account)) if words)

    async def story(client) -> None:
        await wait_for(desk.connected(2))
        await trades(desk, 1)
        await desk.side("advance", by_ms=HOUR)
        before[:] = view.asked, keeper.asked
        if not case.on[0].startswith("socket"):
            await strike()
        await trades(desk, 2)
        await desk.side("advance", by_ms=HOUR)
        async with asyncio.timeout(20):
            while not (await settled() and noticed()):
                if not found:  # true, because a doubt was cleared up meanwhile; what is lost next has to be noticed
                    for symbol, price in (("BTCUSDT", None), ("ETHUSDT", "1940")):
                        await desk.side("advance", by_ms=1000)
                        await desk.buy("0.01", symbol=symbol, price=price)
                await asyncio.sleep(0.05 if found else 0.6)

    if case.on[0].startswith("socket"):
        asyncio.run(strike())
    try:
        run(desk, [bars_of(keeper, case.seconds), account_of(view, case.seconds)], story,
            options={"ws": {"keepAlive": 200}} if "ping" in name or case.fault == "silent" else {})
    except TimeoutError:
        pytest.fail("\n".join([*found, "— what was said:", *desk.lines[-8:]]))
    assert_stored(desk, 2)
    struck = {rule.name: desk.simulator.plan.struck.get(rule.name, 0) for rule in desk.simulator.plan.rules}
    assert (all if case.probability == 1 else any)(struck.values()), struck
    if case.account and not case.on[0].startswith("socket"):
        assert view.asked > before[0]  # what no message told was asked for
    if case.bars and not case.on[0].startswith("socket"):
        assert keeper.asked > before[1]
    if not case.account and case.seconds > 60:
        assert not any("connecting again" in line for line in desk.lines if "/private" in line)  # none of this ends a connection


def test_every_fault_of_a_line_is_among_them():
    "A fault that the simulator learns has to be survived here."
    names = list(FAULTS)
    assert set(names[names.index("close"):]) == {case.fault for case in CASES.values()}
