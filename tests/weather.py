"""Bybit in bad weather: a seeded trader works through ccxt while every tenth request goes wrong, and must end knowing the truth.

    python tests/weather.py --faults 1000 --seed 1        # prints one line of figures; its exit status is 1 if anything differs
"""

import argparse
import json
import random
import sys
import tempfile
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from venues import HOUR, USER, line_to, paper_config, simulated

from xsmom_nb.config import Config
from xsmom_nb.exchange.bybit import BybitExchange, set_up
from xsmom_nb.exchange.faults import SURVIVABLE, FaultPlan, weather
from xsmom_nb.exchange.journal import Journal
from xsmom_nb.exchange.limits import AddressGuard
from xsmom_nb.exchange.line import Line, RequestPace
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator, Terms
from xsmom_nb.execution import reconcile
from xsmom_nb.execution.execute import send_intents
from xsmom_nb.execution.intents import Intent, Leg, link_id
from xsmom_nb.execution.journal import held_quantities
from xsmom_nb.execution.reconcile import Recovery, ask, recover
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import Instrument, OrderRequest, OrderType, Position, Side, Ticker, TransientError
from xsmom_nb.state import State, export, open_state, symbol_versions

FIRST = 300  # hour of the recording in which trading begins
KINDS = (*SURVIVABLE, "lagging", "short_page", "clock_skew", "forbidden")
EQUITY_TOLERANCE = Decimal("1e-6")  # quote currency


# ── A simulator without hurry ────────────────────────────────────────────────────────────────────────────────────────
def unhurried(simulator: Simulator, journal: Path | None = None) -> Simulator:
    "The simulator without limits of rate, so that a test measures what it means to."
    simulator.terms = Terms(rate_limits=False, address_limit=None)
    simulator.guard = AddressGuard(None)
    simulator.journal = Journal(journal)
    return simulator


def quick_line(simulator: Simulator, url: str, **settings: object) -> Line:
    "A line that does not wait between requests."
    line, seconds = line_to(simulator, url, **settings), [0.0]

    def skip(wait: float) -> None:
        seconds[0] += wait

    return Line(line._client, RequestPace(lambda: seconds[0], skip))


def truth_of(url: str) -> dict[str, Any]:
    "The account as it is, by the side channel."
    with urllib.request.urlopen(f"{url}/__sim/truth", timeout=10) as answer:
        return json.load(answer)["accounts"][str(USER)]


def sent_names(journal: Path) -> Counter[str]:
    "How often an order of each name was posted, whatever became of the request."
    lines = map(json.loads, journal.read_text().splitlines())
    posts = (json.loads(each["body"]) for each in lines if each["kind"] == "request" and each["path"] == "/v5/order/create")
    return Counter(post["orderLinkId"] for post in posts)


# ── What the adapter sees, beside what is ────────────────────────────────────────────────────────────────────────────
OPEN = ("New", "PartiallyFilled", "Untriggered", "Triggered")


def differences(port: BybitExchange, truth: dict[str, Any], start_ms: int) -> list[str]:
    "Where the adapter's view is not the truth; empty: nowhere."
    found: list[str] = []

    def compare(what: str, seen: Any, true: Any) -> None:
        if seen != true:
            found.append(f"{what}: the adapter sees {seen}, true is {true}")

    seen = {each.symbol: each for each in port.fetch_positions()}
    held = {symbol: (Decimal(each["quantity"]), each["stop"] and Decimal(each["stop"]))
            for symbol, each in truth["positions"].items()}
    compare("positions", {symbol: (each.quantity, each.stop_price) for symbol, each in seen.items()}, held)
    for symbol in set(seen) & set(held):
        ratio = seen[symbol].average_price / Decimal(truth["positions"][symbol]["average_price"])
        compare(f"average price of {symbol}", abs(ratio - 1) < Decimal("1e-6"), True)
    ours = {name: each for name, each in truth["orders"].items() if each["link_id"]}
    compare("open orders", {each.order_id: (each.link_id, each.filled_quantity) for each in port.fetch_open_orders()},
            {name: (each["link_id"], Decimal(each["filled"])) for name, each in ours.items() if each["status"] in OPEN})
    fields = ("order_id", "link_id", "symbol", "side", "time_ms")
    compare("fills", [(each.fill_id, *(getattr(each, name) for name in fields), each.quantity, each.price, each.fee)
                      for each in sorted(port.fetch_fills(start_ms), key=lambda fill: (fill.time_ms, fill.fill_id))],
            [(each["id"], *(each[name] for name in fields), *(Decimal(each[name]) for name in ("quantity", "price", "fee")))
             for each in sorted(truth["fills"], key=lambda fill: (fill["time_ms"], fill["id"])) if each["kind"] != "Funding"])
    account = port.fetch_account()
    for what, amount, true in (("equity", account.equity, truth["equity"]), ("wallet", account.wallet_balance, truth["wallet"]),
                               ("ledger", sum(each.amount for each in port.fetch_ledger(start_ms)), truth["wallet"])):
        if abs(amount - Decimal(true)) > EQUITY_TOLERANCE:
            found.append(f"{what}: the adapter sees {amount}, true is {true}")
    return found


def journal_differences(state: State, truth: dict[str, Any]) -> list[str]:
    "Where our own journal is not the truth."
    kept, found = export(state), list[str]()
    arrived = {each["link_id"]: each for each in truth["orders"].values() if each["link_id"]}
    for row in kept["intents"]:
        name, status = row["link_id"], row["status"]
        expected = ("accepted",) if name in arrived and arrived[name]["status"] in OPEN else \
            ("closed",) if name in arrived else ("rejected", "dropped", "lost")
        if status not in expected:
            found.append(f"intent {name} is {status}; expected {' or '.join(expected)}")
    if strangers := set(arrived) - {row["link_id"] for row in kept["intents"]}:
        found.append(f"orders that nobody meant: {sorted(strangers)}")
    booked, true = {row["fill_id"] for row in kept["fills"]}, {each["id"] for each in truth["fills"] if each["kind"] != "Funding"}
    if booked != true:
        found.append(f"fills: {len(true - booked)} are missing, {len(booked - true)} never were")
    with state.read() as connection:
        ours = held_quantities(connection)
    if ours != {symbol: Decimal(each["quantity"]) for symbol, each in truth["positions"].items()}:
        found.append(f"positions: the journal has {ours}, true is {truth['positions']}")
    return found


# ── A trader ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Storm:
    "What a run through bad weather came to."

    faults: int = 0
    hours: int = 0
    hours_lost: int = 0  # in which the exchange could not be read
    orders: int = 0  # that were sent
    outcomes: Counter[str] = field(default_factory=Counter)  # of intents, as they were when they were sent
    fates: Counter[str] = field(default_factory=Counter)  # of intents, in the end
    fills: int = 0
    stops: Counter[str] = field(default_factory=Counter)  # outcomes of stops that were set
    struck: Counter[str] = field(default_factory=Counter)  # faults by kind
    twice: list[str] = field(default_factory=list)  # names of orders that were sent more than once
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"{self.faults} faults in {self.hours} hours ({self.hours_lost} not traded): {self.orders} orders "
                f"({dict(self.outcomes)}, in the end {dict(self.fates)}), {self.fills} fills, stops {dict(self.stops)}; "
                f"{len(self.twice)} sent twice, {len(self.differences)} differences")


def rounded(amount: Decimal, step: Decimal) -> Decimal:
    "The nearest multiple of a step."
    return (amount / step).to_integral_value() * step


def intents_of(chance: random.Random, row_ms: int, rules: dict[str, Instrument], tickers: dict[str, Ticker],
               held: dict[str, Position]) -> list[Intent]:
    "What a trader without any idea wants: to go in, to take more, less, or all of it off; at market, or waiting."
    intents = list[Intent]()
    for symbol in sorted(rules):
        if chance.random() < 0.4 or symbol not in tickers:
            continue
        position, contract, mark = held.get(symbol), rules[symbol], tickers[symbol].mark
        leg: Leg = chance.choice(("increase", "decrease", "close")) if position else "open"
        reduces = leg in ("decrease", "close")
        is_long = position.quantity > 0 if position else chance.random() < 0.5
        side: Side = "Buy" if is_long != reduces else "Sell"
        quantity = rounded(Decimal(chance.randrange(100, 900)) / mark, contract.quantity_step)
        if position and reduces:
            part = abs(position.quantity) / (1 if leg == "close" else 2)
            quantity = rounded(part, contract.quantity_step)
        at = chance.choice((None, None, "0.998", "1.002"))
        price = rounded(mark * Decimal(at), contract.price_tick) if at else None
        if quantity < contract.min_quantity:
            continue
        force = "IOC" if price is None else chance.choice(("GTC", "PostOnly"))
        kind: OrderType = "Limit" if price else "Market"
        name = link_id(row_ms, symbol, leg)
        intents.append(Intent(OrderRequest(name, symbol, side, kind, quantity, price, force, reduces), leg))
    return sorted(intents, key=lambda intent: not intent.request.reduce_only)


@dataclass
class Trader:
    "A seeded trader, with the journal and the recovery that live trading has."

    port: BybitExchange
    state: State
    config: Config
    clock: Any
    rules: dict[str, Instrument]
    chance: random.Random
    storm: Storm = field(default_factory=Storm)

    def recover(self, row_ms: int) -> Recovery:
        return recover(self.port, self.state, row_ms, self.clock.now_ms(), self.config)

    def trade(self, row_ms: int) -> None:
        "One hour, as the live cycle goes: settle, look, send, protect."
        frozen = self.recover(row_ms).frozen
        held = {each.symbol: each for each in ask(self.port.fetch_positions)}
        tickers = {each.symbol: each for each in ask(self.port.fetch_tickers)}
        with self.state.read() as connection:
            versions = symbol_versions(connection, self.rules)
        intents = intents_of(self.chance, row_ms, self.rules, tickers, held)
        sent = send_intents(self.port, self.state, intents, row_ms, "storm", versions, frozen, self.clock, self.config)
        self.storm.outcomes.update(each.outcome for each in sent)
        for position in ask(self.port.fetch_positions):
            if position.symbol in tickers and self.chance.random() < 0.3:
                self.protect(position, tickers[position.symbol].mark)

    def protect(self, position: Position, mark: Decimal) -> None:
        "Set or take away a stop; asked again where it is not known, since a stop that stands may be set again."
        away = Decimal("0.97") if position.quantity > 0 else Decimal("1.03")
        level = None if self.chance.random() < 0.2 else rounded(mark * away, self.rules[position.symbol].price_tick)
        for _ in range(4):
            sent = self.port.set_position_stop(position.symbol, level)
            self.storm.stops[sent.outcome] += 1
            if sent.outcome != "unknown":
                return


def stormy(faults: int, seed: int, folder: Path, probability: float = 0.012, panel: Panel | None = None) -> Storm:
    "Trade until so many faults have struck; then let the weather clear, and compare everything with the truth."
    panel = panel or synthetic_panel(seed=seed, bars=FIRST + 24 + faults, symbols=4)
    config, start_ms, file = paper_config(), int(panel.open_time_ms[FIRST]) + HOUR + 60_000, folder / "journal.jsonl"
    simulator = unhurried(simulated(panel, start_ms, config), file)
    pace, clear = simulator.pace, reconcile.FIRST_PAUSE_SECONDS
    reconcile.FIRST_PAUSE_SECONDS = 0.0001
    try:
        with serving(simulator) as url, open_state(f"sqlite:///{folder}/state.sqlite") as state:
            line = quick_line(simulator, url, timeout=60_000)  # the first answer of a fresh checkout waits for a compiler
            port = BybitExchange(line)
            rules = {each.symbol: each for each in port.fetch_instruments()}
            set_up(line, list(rules), leverage=3)
            trader, row_ms = Trader(port, state, config, pace, rules, random.Random(seed)), start_ms // HOUR * HOUR - HOUR
            trader.recover(row_ms)
            simulator.plan, storm = weather(seed, probability, kinds=KINDS), trader.storm
            while sum(simulator.plan.struck.values()) < faults:
                try:
                    trader.trade(row_ms)
                except TransientError:
                    storm.hours_lost += 1
                storm.hours, row_ms = storm.hours + 1, row_ms + HOUR
                pace.move(pace.now_ms() + HOUR)
            storm.struck = Counter({name.split()[0]: 0 for name in simulator.plan.struck})
            for name, count in simulator.plan.struck.items():
                storm.struck[name.split()[0]] += count
            storm.faults, simulator.plan = sum(storm.struck.values()), FaultPlan()
            trader.recover(row_ms)
            truth = truth_of(url)
            storm.differences = differences(port, truth, start_ms) + journal_differences(state, truth)
            storm.fates = Counter(row["status"] for row in export(state)["intents"])
            storm.fills = len(truth["fills"])
    finally:
        reconcile.FIRST_PAUSE_SECONDS = clear
    names = sent_names(file)
    storm.orders, storm.twice = sum(names.values()), sorted(name for name, count in names.items() if count > 1)
    return storm


def main(arguments: list[str] | None = None) -> int:
    "The long run; prints its figures."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        storm = stormy(given.faults, given.seed, Path(folder))
    print(storm, *storm.twice, *storm.differences, sep="\n")
    return int(bool(storm.twice or storm.differences or storm.faults < given.faults))


if __name__ == "__main__":
    sys.exit(main())
