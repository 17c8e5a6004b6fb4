"""Orders that are sent once, over a line that loses answers and by a process that dies: journal and exchange agree afterwards."""

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path

import pytest

from xsmom_nb.clock import SimulatedClock
from xsmom_nb.config import Config
from xsmom_nb.execution import execute, reconcile
from xsmom_nb.execution.execute import CRASH_POINTS, CRASH_VARIABLE, send_intents
from xsmom_nb.execution.intents import Intent, link_id
from xsmom_nb.execution.journal import Booked, book_fills, held_of, held_quantities, unfinished_intents
from xsmom_nb.execution.plan import plan_orders
from xsmom_nb.execution.reconcile import CLOCK_MARGIN_MS, OVERLAP_MS, recover
from xsmom_nb.outbox import undelivered
from xsmom_nb.ports import Fill, Instrument, LedgerEntry, Order, OrderRequest, Position, Submission, Ticker, TransientError
from xsmom_nb.state import check, open_state, symbol_versions

HOUR_MS = 3_600_000
ROW_MS = 1_704_067_200_000
NOW_MS = ROW_MS + HOUR_MS + 60_000  # the bar has closed a minute ago
CONFIG = Config()
TOO_LATE_MS = CONFIG.exchange.recv_window_ms + CLOCK_MARGIN_MS + 1  # for a request that was sent at a known time
PRICE = Decimal(100)


# ── The exchange ─────────────────────────────────────────────────────────────────────────────────────────────────────
class Venue:
    "An exchange with a line that can be told to fail; kept in a file, so that it outlives its clients."

    def __init__(self, path: Path | None = None, clock: SimulatedClock | None = None) -> None:
        self.path, self.clock = path, clock or SimulatedClock(NOW_MS)
        self.orders: dict[str, Order] = {}
        self.fills: list[Fill] = []
        self.ledger: list[LedgerEntry] = []
        self.moved: dict[str, Decimal] = {}  # positions that changed without a fill being told
        self.faults: list[str] = []  # what happens to the next orders
        self.late: list[OrderRequest] = []  # on their way, for a long time
        self.posts: list[str] = []
        self.cancels: list[str] = []
        self.deaf = 0  # so many reads fail
        self.reads = 0
        if path and path.exists():
            self._load()

    def _load(self) -> None:
        kept = json.loads(self.path.read_text())
        orders = [Order(**{name: self._read(name, value) for name, value in row.items()}) for row in kept["orders"]]
        self.orders = {order.link_id: order for order in orders}
        self.fills = [Fill(**{name: self._read(name, value) for name, value in row.items()}) for row in kept["fills"]]
        self.posts = kept["posts"]

    @staticmethod
    def _read(name: str, value: object) -> object:
        is_number = name in ("quantity", "price", "filled_quantity", "average_price", "fee") and value is not None
        return Decimal(value) if is_number else value

    def _save(self) -> None:
        if self.path:
            kept = {"orders": [asdict(order) for order in self.orders.values()], "fills": [asdict(fill) for fill in self.fills]}
            self.path.write_text(json.dumps(kept | {"posts": self.posts}, default=str))

    # ── writes ──
    def submit_order(self, request: OrderRequest) -> Submission:
        fault = self.faults.pop(0) if self.faults else ""
        self.posts.append(request.link_id)
        if fault == "late":
            self.late.append(request)
        if fault in ("late", "never arrives"):
            self._save()
            return Submission("unknown", reason="time-out")
        no_margin = Submission("rejected", reason="110007 ab not enough for new order")
        answer = no_margin if fault == "refused" else self._accept(request)
        self._save()
        return Submission("unknown", reason="connection lost") if fault == "answer lost" else answer

    def _accept(self, request: OrderRequest) -> Submission:
        held = self.positions().get(request.symbol, Decimal(0))
        if request.link_id in self.orders:
            return Submission("rejected", reason="110072 duplicate link id")
        if request.reduce_only and held * request.signed_quantity >= 0:
            return Submission("rejected", reason="110017 current position is zero")
        now = self.clock.now_ms()
        self.orders[request.link_id] = Order(
            f"o-{len(self.orders)}", request.link_id, request.symbol, request.side, request.order_type, request.quantity,
            request.price, request.time_in_force, request.reduce_only, "New", Decimal(0), None, "", now, now)
        if request.order_type == "Market":
            self.fill(request.link_id, request.quantity)
        return Submission("accepted", self.orders[request.link_id].order_id)

    def cancel_order(self, symbol: str, name: str) -> Submission:
        self.cancels.append(name)
        order = self.orders.get(name)
        if order is None or not order.is_open:
            return Submission("rejected", reason="110001 order not exists or too late to cancel")
        fault = self.faults.pop(0) if self.faults and self.faults[0].startswith("cancel") else ""
        if fault == "cancel ignored":
            return Submission("accepted", order.order_id)
        self.orders[name] = replace(order, status="Cancelled", reason="by request", updated_ms=self.clock.now_ms())
        self._save()
        return Submission("unknown", reason="time-out") if fault == "cancel unknown" else Submission("accepted", order.order_id)

    # ── what happens by itself ──
    def arrive(self) -> None:
        while self.late:
            self._accept(self.late.pop())

    def fill(self, name: str, quantity: Decimal | int | str, price: Decimal = PRICE, fee: str = "0.1") -> None:
        order, quantity = self.orders[name], Decimal(quantity)
        if order.reduce_only:
            quantity = min(quantity, abs(self.positions().get(order.symbol, Decimal(0))))
        if not quantity:
            return
        filled = order.filled_quantity + quantity
        self.orders[name] = replace(order, filled_quantity=filled, average_price=price, updated_ms=self.clock.now_ms(),
                                    status="Filled" if filled == order.quantity else "PartiallyFilled")
        self.fills.append(Fill(f"f-{len(self.fills)}", order.order_id, order.link_id, order.symbol, order.side, quantity, price,
                               Decimal(fee), True, self.clock.now_ms()))

    def by_hand(self, symbol: str, quantity: str) -> None:
        "Somebody trades in the same account."
        amount = Decimal(quantity)
        self.fills.append(Fill(f"f-{len(self.fills)}", f"hand-{len(self.fills)}", "", symbol, "Buy" if amount > 0 else "Sell",
                               abs(amount), PRICE, Decimal(0), False, self.clock.now_ms()))

    # ── reads ──
    def positions(self) -> dict[str, Decimal]:
        held = dict(self.moved)
        for fill in self.fills:
            held[fill.symbol] = held.get(fill.symbol, Decimal(0)) + fill.signed_quantity
        return {symbol: quantity for symbol, quantity in sorted(held.items()) if quantity}

    def _listen(self) -> None:
        self.reads += 1
        if self.deaf:
            self.deaf -= 1
            raise TransientError("no connection")

    def find_order(self, symbol: str, name: str) -> Order | None:
        self._listen()
        return self.orders.get(name)

    def fetch_open_orders(self) -> list[Order]:
        self._listen()
        return [order for order in self.orders.values() if order.is_open]

    def fetch_fills(self, start_ms: int) -> list[Fill]:
        self._listen()
        return [fill for fill in self.fills if fill.time_ms >= start_ms]

    def fetch_ledger(self, start_ms: int) -> list[LedgerEntry]:
        self._listen()
        return [entry for entry in self.ledger if entry.time_ms >= start_ms]

    def fetch_positions(self) -> list[Position]:
        self._listen()
        return [Position(symbol, quantity, PRICE, PRICE) for symbol, quantity in self.positions().items()]

    def fetch_tickers(self) -> list[Ticker]:
        self._listen()
        return [Ticker(symbol, self.clock.now_ms(), PRICE, PRICE, PRICE, PRICE) for symbol in SYMBOLS]

    def fetch_time_ms(self) -> int:
        self._listen()
        return self.clock.now_ms()


SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")


def meant(symbol="AAAUSDT", leg="open", quantity="2", side="Buy", row_ms=ROW_MS, market=False, waits_for=None) -> Intent:
    price, tif = (None, "IOC") if market else (PRICE, "PostOnly")
    request = OrderRequest(link_id(row_ms, symbol, leg), symbol, side, "Market" if market else "Limit", Decimal(quantity), price,
                           tif, leg in ("decrease", "close"))
    return Intent(request, leg, waits_for)


class Desk:
    "Journal, exchange and clock of one test."

    def __init__(self, folder: Path, venue: Venue | None = None) -> None:
        self.folder, self.venue = folder, venue or Venue()
        self.clock = self.venue.clock
        self.state = open_state(f"sqlite:///{folder}/state.sqlite")
        recover(self.venue, self.state, ROW_MS, self.clock.now_ms(), CONFIG)  # opens the books

    def send(self, *intents: Intent, row_ms=ROW_MS, frozen=frozenset(), versions=None):
        if versions is None:
            with self.state.read() as connection:
                versions = symbol_versions(connection, SYMBOLS)
        return send_intents(self.venue, self.state, intents, row_ms, "run", versions, frozen, self.clock, CONFIG)

    def recover(self, row_ms=ROW_MS + HOUR_MS, later_ms=0):
        self.clock.advance(later_ms)
        return recover(self.venue, self.state, row_ms, self.clock.now_ms(), CONFIG)

    def held(self) -> dict[str, Decimal]:
        with self.state.read() as connection:
            return held_quantities(connection)

    def statuses(self) -> dict[str, str]:
        with self.state.read() as connection:
            return dict(connection.exec_driver_sql("SELECT link_id, status FROM intents").all())

    def told(self) -> list[str]:
        with self.state.read() as connection:
            return [event.kind for event in undelivered(connection)]

    def agrees(self) -> None:
        "Assert that journal and exchange tell the same story."
        assert check(self.state) == []
        assert self.held() == self.venue.positions()
        arrived = {name for name, status in self.statuses().items() if status in ("accepted", "closed")}
        assert arrived == {name for name in self.venue.orders if name in self.statuses()}
        assert len(set(self.venue.posts)) == len(self.venue.posts), "an order was sent twice"


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(reconcile, "FIRST_PAUSE_SECONDS", 0.0001)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.state.close()


# ── Answers that are lost ────────────────────────────────────────────────────────────────────────────────────────────
def test_a_lost_answer_is_asked_for_and_the_order_adopted(desk):
    desk.venue.faults = ["answer lost"]
    (sent,) = desk.send(meant())
    assert sent.outcome == "accepted"
    assert len(desk.venue.posts) == 1
    desk.venue.fill(meant().request.link_id, 2)
    desk.recover()
    assert desk.statuses() == {meant().request.link_id: "closed"}
    desk.agrees()


def test_an_unknown_order_freezes_its_symbol_until_it_is_found(desk):
    desk.venue.faults = ["late"]
    sent = desk.send(meant(), meant(leg="increase"), meant(leg="decrease"), meant("BBBUSDT"))
    assert [each.outcome for each in sent] == ["unknown", "exists", "dropped", "accepted"]
    found = desk.recover(row_ms=ROW_MS)
    assert found.frozen == {"AAAUSDT"}
    assert desk.send(meant(row_ms=ROW_MS + HOUR_MS), frozen=found.frozen)[0].outcome == "dropped"
    desk.venue.arrive()
    assert desk.recover(row_ms=ROW_MS).settled.adopted == (meant().request.link_id,)
    desk.agrees()


def test_an_order_that_never_arrived_is_lost_only_after_it_can_no_longer_arrive(desk):
    desk.venue.faults = ["never arrives"]
    desk.send(meant())
    assert desk.recover(later_ms=TOO_LATE_MS - 1).frozen == {"AAAUSDT"}
    assert desk.statuses() == {meant().request.link_id: "unknown"}
    found = desk.recover(later_ms=1)
    assert found.settled.lost == (meant().request.link_id,)
    assert not found.frozen
    assert desk.send(meant())[0].outcome == "exists"  # this name has had its chance
    assert desk.send(meant(row_ms=ROW_MS + HOUR_MS), row_ms=ROW_MS + HOUR_MS)[0].outcome == "accepted"
    desk.agrees()


def test_an_order_that_was_given_up_and_arrives_all_the_same_is_ours(desk):
    desk.venue.faults = ["late"]
    desk.send(meant())
    desk.recover(later_ms=HOUR_MS)
    desk.venue.arrive()
    desk.venue.fill(meant().request.link_id, 1)
    found = desk.recover()
    assert [order.status for order in found.cancelled.ended] == ["Cancelled"]
    assert not found.cancelled.foreign
    assert desk.held() == {"AAAUSDT": 1}
    desk.agrees()


def test_while_the_line_is_down_nothing_is_concluded_and_nothing_sent_again(desk):
    desk.venue.faults = ["answer lost"]
    desk.venue.deaf = reconcile.READ_ATTEMPTS
    (sent,) = desk.send(meant())
    assert (sent.outcome, len(desk.venue.posts)) == ("unknown", 1)
    desk.venue.deaf = 1000
    with pytest.raises(TransientError):
        desk.recover(later_ms=HOUR_MS)
    assert desk.statuses() == {meant().request.link_id: "unknown"}
    desk.venue.deaf = 2  # reads are repeated
    assert desk.recover().settled.adopted == (meant().request.link_id,)
    desk.agrees()


# ── Answers that are no ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_rejection_is_final_for_its_row(desk):
    desk.venue.faults = ["refused"]
    sent = desk.send(meant(), meant())
    assert [each.outcome for each in sent] == ["rejected", "exists"]
    assert "110007" in sent[0].note
    assert desk.told() == ["order_rejected", "intent_exists"]
    assert desk.recover().settled == reconcile.Settled()
    desk.agrees()


def test_nothing_to_reduce_is_no_trouble(desk):
    (sent,) = desk.send(meant(leg="close", side="Sell"))
    assert sent.outcome == "rejected"
    assert desk.told() == ["nothing_to_reduce"]


def test_a_name_that_was_used_before_is_an_order_that_exists(desk, tmp_path):
    "The journal was restored from a backup that does not know the order."
    desk.send(meant(market=True))
    restored = Desk(tmp_path / "restored", desk.venue)
    assert restored.held() == {"AAAUSDT": 2}  # found by comparison, before the books were opened
    desk.venue.fills[-1] = replace(desk.venue.fills[-1], time_ms=NOW_MS - 1)
    (sent,) = restored.send(meant(market=True))
    assert sent.outcome == "accepted"
    assert restored.statuses() == {meant().request.link_id: "closed"}
    assert len(desk.venue.orders) == 1
    restored.state.close()


# ── Parts, races, and the others ─────────────────────────────────────────────────────────────────────────────────────
def test_what_filled_before_the_cancellation_counts(desk):
    desk.send(meant(quantity="3"))
    desk.venue.fill(meant().request.link_id, 1)
    found = desk.recover(later_ms=HOUR_MS)
    assert [(order.status, order.filled_quantity) for order in found.cancelled.ended] == [("Cancelled", 1)]
    assert desk.held() == {"AAAUSDT": 1}
    desk.agrees()


def test_a_fill_that_is_quicker_than_the_cancellation(desk, monkeypatch):
    desk.send(meant())
    cancel = desk.venue.cancel_order

    def race(symbol, name):
        desk.venue.fill(name, 2)
        return cancel(symbol, name)

    monkeypatch.setattr(desk.venue, "cancel_order", race)
    assert [order.status for order in desk.recover(later_ms=HOUR_MS).cancelled.ended] == ["Filled"]
    assert desk.held() == {"AAAUSDT": 2}
    desk.agrees()


@pytest.mark.parametrize(("fault", "frozen"), [("cancel unknown", set()), ("cancel ignored", {"AAAUSDT"})])
def test_an_order_decides_whether_it_was_cancelled_not_the_answer(desk, fault, frozen):
    desk.send(meant())
    desk.venue.faults = [fault]
    assert desk.recover(later_ms=HOUR_MS).frozen == frozen
    assert desk.recover().frozen == set()
    desk.agrees()


def test_orders_of_this_row_are_left_open(desk):
    desk.send(meant())
    assert desk.recover(row_ms=ROW_MS).cancelled.ended == ()
    assert desk.venue.cancels == []


def test_foreign_orders_are_reported_once_and_never_touched(desk):
    desk.venue.submit_order(OrderRequest("by-hand", "BBBUSDT", "Sell", "Limit", Decimal(1), PRICE, "GTC", False))
    for _ in range(3):
        assert [order.link_id for order in desk.recover(later_ms=HOUR_MS).cancelled.foreign] == ["by-hand"]
    assert desk.told() == ["foreign_order"]
    assert desk.venue.cancels == []
    desk.venue.fill("by-hand", 1)
    desk.recover(later_ms=HOUR_MS)
    assert desk.held() == {"BBBUSDT": -1}
    desk.agrees()


def test_the_other_side_is_opened_only_after_the_close_has_filled(desk):
    desk.send(meant(market=True))
    desk.recover(row_ms=ROW_MS)
    close = meant(leg="close", side="Sell", row_ms=ROW_MS + HOUR_MS)
    turn = meant(leg="open", side="Sell", row_ms=ROW_MS + HOUR_MS, waits_for=close.request.link_id)
    assert [each.outcome for each in desk.send(close, turn, row_ms=ROW_MS + HOUR_MS)] == ["accepted", "dropped"]
    desk.venue.fill(close.request.link_id, 2)
    desk.recover(row_ms=ROW_MS + 2 * HOUR_MS, later_ms=HOUR_MS)
    assert desk.held() == {}
    later = ROW_MS + 2 * HOUR_MS
    assert desk.send(meant(leg="open", side="Sell", row_ms=later, market=True), row_ms=later)[0].outcome == "accepted"
    desk.recover(row_ms=later)
    assert desk.held() == {"AAAUSDT": -2}
    desk.agrees()


def test_a_position_that_changed_since_the_snapshot_takes_no_order(desk):
    with desk.state.read() as connection:
        seen = symbol_versions(connection, SYMBOLS)
    desk.venue.by_hand("AAAUSDT", "1")
    desk.recover(row_ms=ROW_MS)
    sent = desk.send(meant(), meant("BBBUSDT"), versions=seen)
    assert [each.outcome for each in sent] == ["dropped", "accepted"]
    assert desk.venue.posts == [meant("BBBUSDT").request.link_id]
    assert desk.told() == ["intent_dropped"]


# ── Books ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_fills_told_twice_and_out_of_order_are_booked_once(tmp_path):
    rng = random.Random(1)
    fills = [Fill(f"f-{i}", "o", "", SYMBOLS[i % 2], rng.choice(["Buy", "Sell"]), Decimal(rng.randint(1, 5)), PRICE + i,
                  Decimal("0.01"), True, i) for i in range(30)]
    results = []
    for number in range(5):
        told = [fill for fill in fills for _ in range(rng.randint(1, 3))]
        rng.shuffle(told)
        with open_state(f"sqlite:///{tmp_path}/{number}.sqlite") as state, state.write() as connection:
            booked = book_fills(connection, told, 0)
            assert book_fills(connection, fills, 0) == Booked()
            results.append((booked, [held_of(connection, symbol) for symbol in SYMBOLS]))
    assert all(result == results[0] for result in results)
    held = {symbol: sum((fill.signed_quantity for fill in fills if fill.symbol == symbol), Decimal(0)) for symbol in SYMBOLS}
    assert {symbol: position.quantity for symbol, position in zip(SYMBOLS, results[0][1], strict=True)} == held


def test_money_is_conserved_by_positions_and_trades(tmp_path):
    "Gains of trades and positions, less fees and funding, are the cash that flowed and the value of what is held."
    rng = random.Random(2)
    with open_state(f"sqlite:///{tmp_path}/state.sqlite") as state, state.write() as connection:
        cash, pnl = Decimal(0), Decimal(0)
        for i in range(120):
            fill = Fill(f"f-{i}", "o", "", "AAAUSDT", rng.choice(["Buy", "Sell"]), Decimal(rng.randint(1, 9)) / 4,
                        Decimal(rng.randint(50, 150)), Decimal(rng.randint(-1, 5)) / 100, True, i * 10)
            cash -= fill.signed_quantity * fill.price + fill.fee
            before = held_of(connection, "AAAUSDT").quantity
            for trade in book_fills(connection, [fill], i).trades:
                pnl += trade.pnl
                sign = 1 if trade.side == "long" else -1
                gain = sign * (trade.exit_price - trade.entry_price) * trade.quantity - trade.fees - trade.funding
                assert abs(gain - trade.pnl) < Decimal("1e-15")
            held = held_of(connection, "AAAUSDT")
            if before * held.quantity < 0:  # through zero: a new position, at the price of this fill
                assert (held.average_price, held.opened_ms, held.realized) == (fill.price, fill.time_ms, 0)
        value = held.quantity * (held.average_price or 0)
        assert abs(pnl + held.realized - held.fees - value - cash) < Decimal("1e-15")


def test_a_fill_that_is_told_late_is_found(desk):
    desk.send(meant(market=True))
    (fill,) = desk.venue.fills
    desk.venue.fills = []
    desk.venue.moved = {"AAAUSDT": Decimal(2)}  # the position is there, its fill is not told yet
    assert [d.theirs for d in desk.recover(row_ms=ROW_MS).differences] == [2]
    desk.venue.fills, desk.venue.moved = [fill], {}
    desk.recover(row_ms=ROW_MS, later_ms=OVERLAP_MS // 2)
    desk.agrees()


def test_a_difference_is_taken_over_and_told(desk):
    desk.venue.moved = {"CCCUSDT": Decimal(-4)}
    found = desk.recover()
    assert [(d.symbol, d.ours, d.theirs) for d in found.differences] == [("CCCUSDT", 0, -4)]
    assert desk.told() == ["reconciled"]
    with desk.state.read() as connection:
        assert symbol_versions(connection, SYMBOLS)["CCCUSDT"] > 0
    assert desk.recover().differences == ()
    desk.agrees()


def test_a_position_that_moves_while_we_look_is_left_for_the_next_look(desk, monkeypatch):
    fetch = desk.venue.fetch_ledger

    def trade_meanwhile(start_ms):  # after the fills were read, before the positions are read again
        desk.venue.by_hand("AAAUSDT", "1")
        return fetch(start_ms)

    monkeypatch.setattr(desk.venue, "fetch_ledger", trade_meanwhile)
    assert desk.recover().differences == ()
    monkeypatch.undo()
    assert desk.recover().differences == ()
    assert desk.held() == {"AAAUSDT": 1}
    desk.agrees()


def test_funding_goes_to_the_position_it_was_paid_for(desk):
    desk.send(meant(market=True))
    desk.clock.advance(1000)
    desk.venue.ledger.append(LedgerEntry("l-1", desk.clock.now_ms(), "funding", "AAAUSDT", Decimal("-0.25")))
    desk.recover(row_ms=ROW_MS, later_ms=1000)
    with desk.state.read() as connection:
        assert held_of(connection, "AAAUSDT").funding == Decimal("0.25")
    desk.venue.by_hand("AAAUSDT", "-2")
    desk.recover(later_ms=1000)
    with desk.state.read() as connection:
        funding, pnl, reason = connection.exec_driver_sql("SELECT funding, pnl, exit_reason FROM trades").one()
    assert (Decimal(funding), Decimal(pnl), reason) == (Decimal("0.25"), Decimal("-0.35"), "outside")


def test_an_account_that_held_something_before_we_came(tmp_path):
    venue = Venue()
    venue.by_hand("AAAUSDT", "7")
    venue.clock.advance(HOUR_MS)
    desk = Desk(tmp_path, venue)
    assert desk.held() == {"AAAUSDT": 7}
    desk.recover(later_ms=1)
    desk.agrees()
    desk.state.close()


# ── Dying ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def crash_case() -> tuple[Intent, ...]:
    "What the process that dies was to send."
    return meant(), meant("BBBUSDT", market=True)


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_process_may_be_killed_at_every_line(tmp_path, point):
    environment = {**os.environ, CRASH_VARIABLE: point}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 137, done.stderr
    venue = Venue(tmp_path / "venue.json")
    desk = Desk(tmp_path, venue)
    name = meant().request.link_id
    expected = {"before_intent_commit": {}, "after_commit_before_post": {name: "unknown"}}
    assert desk.statuses() == expected.get(point, {name: "accepted"})
    desk.recover(row_ms=ROW_MS, later_ms=TOO_LATE_MS + CONFIG.exchange.recv_window_ms)
    desk.agrees()
    again = desk.send(*crash_case())  # the hour is decided again, and gives the same orders
    assert [each.outcome for each in again] == ["accepted" if point == "before_intent_commit" else "exists", "accepted"]
    desk.recover(later_ms=HOUR_MS)
    desk.agrees()
    assert desk.held() == {"BBBUSDT": 2}
    was_posted = point != "after_commit_before_post"
    assert venue.posts.count(name) == was_posted
    desk.state.close()


class Killed(BaseException):
    "What a kill looks like from inside one process."


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_journal_and_exchange_agree_in_the_end(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    desk = Desk(tmp_path)
    venue = desk.venue
    monkeypatch.setattr(execute, "crash_point", lambda name: kill() if rng.random() < 0.05 else None)

    def kill() -> None:
        raise Killed

    for row_ms in itertools.islice(itertools.count(ROW_MS, HOUR_MS), 10):
        found = desk.recover(row_ms=row_ms, later_ms=rng.choice([1000, HOUR_MS]))
        venue.arrive()
        faults = ["", "", "answer lost", "never arrives", "late", "refused", "cancel unknown", "cancel ignored"]
        venue.faults = [rng.choice(faults) for _ in range(4)]
        held = desk.held()
        intents = []
        for symbol in SYMBOLS:
            quantity, market = held.get(symbol, Decimal(0)), rng.random() < 0.5
            leg, side = ("close", "Sell" if quantity > 0 else "Buy") if quantity else ("open", rng.choice(["Buy", "Sell"]))
            intents.append(meant(symbol, leg, str(abs(quantity) or 3), side, row_ms, market))
        try:
            desk.send(*intents, row_ms=row_ms, frozen=found.frozen)
        except Killed:
            desk.state.close()
            desk.state = open_state(f"sqlite:///{tmp_path}/state.sqlite")
        for order in venue.fetch_open_orders():
            if rng.random() < 0.6:
                venue.fill(order.link_id, rng.choice([1, order.quantity - order.filled_quantity]))
        if rng.random() < 0.1:
            venue.by_hand(rng.choice(SYMBOLS), "1")
    venue.arrive()
    venue.faults = []
    for _ in range(2):
        desk.recover(row_ms=row_ms + HOUR_MS, later_ms=HOUR_MS)
    assert not venue.fetch_open_orders()
    with desk.state.read() as connection:
        assert unfinished_intents(connection) == []
    assert "reconciled" not in desk.told()  # every change was explained by a fill
    desk.agrees()
    desk.state.close()


# ── The paper exchange ───────────────────────────────────────────────────────────────────────────────────────────────
class Quotes:
    "A market that stands still, but for a range around its price in every bar."

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock

    def fetch_bars(self, symbol, timeframe, start_ms, limit):
        from xsmom_nb.ports import Bar

        first = -(-start_ms // HOUR_MS) * HOUR_MS
        times = range(first, min(first + limit * HOUR_MS, self.clock.now_ms()), HOUR_MS)
        return [Bar(time_ms, 100.0, 101.0, 99.0, 100.0, 5000.0) for time_ms in times]

    def fetch_funding(self, symbol, start_ms, limit):
        return []

    def fetch_instruments(self):
        least, most = Decimal("0.01"), Decimal(9999)
        return [Instrument(symbol, symbol[:3], "USDT", "Trading", least, least, least, most, most, Decimal(5), Decimal(50), 0, 60)
                for symbol in SYMBOLS]

    def fetch_tickers(self):
        now = self.clock.now_ms()
        return [Ticker(symbol, now, Decimal("99.99"), Decimal("100.01"), PRICE, PRICE) for symbol in SYMBOLS]


def test_a_day_on_the_paper_exchange(tmp_path):
    "Plans lead where they were meant to, and the journal knows what the account knows."
    from xsmom_nb.exchange.paper import PaperExchange

    clock, rng = SimulatedClock(NOW_MS), random.Random(3)
    quotes = Quotes(clock)
    tickers = {ticker.symbol: ticker for ticker in quotes.fetch_tickers()}
    instruments = {instrument.symbol: instrument for instrument in quotes.fetch_instruments()}
    wanted: dict[str, Decimal] = {}
    with (open_state(f"sqlite:///{tmp_path}/state.sqlite") as state,
          PaperExchange(quotes, clock, CONFIG, f"sqlite:///{tmp_path}/paper.sqlite") as port):
        for hour in range(24):
            row_ms = ROW_MS + hour * HOUR_MS
            found = recover(port, state, row_ms, clock.now_ms(), CONFIG)
            assert found.differences == ()
            if hour % 8 == 0:
                wanted = {symbol: Decimal(rng.choice(["-15", "-7.5", "0", "4.25", "12"])) for symbol in SYMBOLS}
            with state.read() as connection:
                versions = symbol_versions(connection, SYMBOLS)
            plan = plan_orders(wanted, port.fetch_positions(), tickers, instruments, port.fetch_account().equity, row_ms, CONFIG)
            sent = send_intents(port, state, plan.intents, row_ms, "run", versions, found.frozen, clock, CONFIG)
            assert {each.outcome for each in sent} <= {"accepted", "dropped"}
            clock.advance(HOUR_MS)
        recover(port, state, row_ms + HOUR_MS, clock.now_ms(), CONFIG)
        assert check(state) == []
        with state.read() as connection:
            held = held_quantities(connection)
            fills = connection.exec_driver_sql("SELECT COUNT(*) FROM fills").scalar()
        assert held == {position.symbol: position.quantity for position in port.fetch_positions()}
        assert held == {symbol: quantity for symbol, quantity in wanted.items() if quantity}
        assert fills > 5


if __name__ == "__main__":  # the process that dies
    folder = Path(sys.argv[1])
    doomed = Desk(folder, Venue(folder / "venue.json"))
    doomed.send(*crash_case())
