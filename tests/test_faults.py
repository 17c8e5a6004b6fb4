"""Killed anywhere and started again, two at a time, files that are locked or damaged: account and state tell one story."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from xsmom_nb.decision import Decided
from xsmom_nb.errors import DataError, RefusedError, StateError, XsmomError
from xsmom_nb.exchange import paper
from xsmom_nb.execution import reconcile
from xsmom_nb.execution.execute import CRASH_POINTS, CRASH_VARIABLE
from xsmom_nb.execution.intents import EXIT
from xsmom_nb.live import cycle, guard, memory
from xsmom_nb.live import desk as desk_module
from xsmom_nb.live.desk import open_desk
from xsmom_nb.live.history import History
from xsmom_nb.state import check, open_state
from small_account import (
    MARKET,
    Bench,
    ROW,
    Memo,
    audit,
    decisions_of,
    desk_with_line,
    patient,
    quick,
    recording,
    targets_of,
    time_of,
    trade,
)

KILLED = 137  # exit status of a process that ends as a kill would end it


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(reconcile, "FIRST_PAUSE_SECONDS", 0.0001)


# ── Processes that die ───────────────────────────────────────────────────────────────────────────────────────────────
CRASH_HOUR, LAST_HOUR = 3, 9
FAMILY = multiprocessing.get_context("forkserver")  # a server that has imported what children need, so that they begin at once
FAMILY.set_forkserver_preload(["xsmom_nb.live.desk", "xsmom_nb.market.synthetic", "sqlalchemy.dialects.sqlite", "pytest"])
KILLS: dict[str, tuple[Any, str, str]] = {  # where a process is killed that has no crash point there: what, and when
    "settling intents": (reconcile, "settle_intents", "after"),
    "after a cancellation": (paper.PaperExchange, "cancel_order", "after"),
    "noting a cancelled order": (reconcile, "_note_ended", "after"),
    "booking fills": (reconcile, "book_fills", "after"),  # inside the transaction
    "booking funding": (reconcile, "book_ledger", "before"),
    "comparing positions": (reconcile, "differences", "before"),
    "recording": (cycle, "decide", "after"),
    "remembering": (cycle, "keep_decided", "before"),
    "before execution": (cycle, "send_intents", "before"),
    "after execution": (cycle, "send_intents", "after"),
    "following the fills": (memory, "_tell_exits", "after"),  # inside the transaction
    "keeping what the guard saw": (guard, "_keep", "after"),
    "protecting what was opened": (guard, "_protect", "before"),
    "before persisting": (cycle, "persist", "before"),
    "while persisting": (cycle, "save_equity", "after"),  # inside the transaction
}


def arm(point: str) -> None:
    "Make this process die at a point."
    if point in CRASH_POINTS:
        os.environ[CRASH_VARIABLE] = point
        return
    owner, name, when = KILLS[point]
    original = getattr(owner, name)

    def dying(*arguments: Any, **keywords: Any) -> None:
        if when == "after":
            original(*arguments, **keywords)
        os._exit(KILLED)

    setattr(owner, name, dying)


def die(folder: Path, point: str, changes: dict[str, Any]) -> None:
    "Take over an account and die in its next hour."
    arm(point)
    trade(folder, [CRASH_HOUR], changes)


def run_apart(target: Callable[..., None], *arguments: Any) -> int:
    "Run something in a process of its own; returns its exit status."
    process = FAMILY.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    status = process.exitcode
    process.close()
    return status


KINDS = {"limit": {}, "market": MARKET}


@pytest.fixture(scope="module")
def accounts(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    "An account before the hour of the crash, and the same one hours later, undisturbed; by kind of order."

    @cache
    def accounts(kind: str) -> tuple[Path, Path]:
        before, after = (tmp_path_factory.mktemp(kind) / name for name in ("before", "after"))
        before.mkdir()
        trade(before, range(CRASH_HOUR), KINDS[kind])
        shutil.copytree(before, after)
        for hour in range(CRASH_HOUR, LAST_HOUR):
            trade(after, [hour], KINDS[kind])
        return before, after

    return accounts


LIMIT_POINTS = [("limit", point) for point in (*CRASH_POINTS, *KILLS)]
MARKET_POINTS = [("market", point) for point in (  # nothing to cancel there
    *CRASH_POINTS, "booking fills", "after execution", "following the fills", "protecting what was opened")]


@pytest.mark.parametrize(("kind", "point"), [*LIMIT_POINTS, *MARKET_POINTS])
def test_killed_anywhere_and_started_again(accounts, kind, point, tmp_path):
    (before, undisturbed), changes = accounts(kind), KINDS[kind]
    crashed, later = tmp_path / "crashed", tmp_path / "later"
    shutil.copytree(before, crashed)
    assert run_apart(die, crashed, point, changes) == KILLED
    shutil.copytree(crashed, later)
    reports = trade(crashed, range(CRASH_HOUR, LAST_HOUR), changes)  # started again at once
    trade(later, range(CRASH_HOUR + 3, LAST_HOUR), changes)  # nobody noticed for three hours
    for folder in (crashed, later):
        assert targets_of(folder).items() <= targets_of(undisturbed).items()
    if point == "after_commit_before_post":  # it cannot be known yet that the order never left
        assert len(reports[0].recovery.settled.frozen) == 1
        assert len(reports[1].recovery.settled.lost) == 1
    elif kind == "limit":
        assert decisions_of(crashed) == decisions_of(undisturbed)  # to the last order, although it was killed


# ── A guard that dies ────────────────────────────────────────────────────────────────────────────────────────────────
GUARD_KILLS = {
    "deciding": (guard, "guard_step", "after"),
    "writing down": (guard, "keep_risk", "after"),  # inside the transaction
    "written down": (guard, "_keep", "after"),
    "way cleared": (guard, "_clear_way", "after"),
    "left": (guard, "_leave", "after"),
    "following": (guard, "follow", "before"),
    "before the stop": (guard, "_protect", "before"),
    "stop set": (paper.PaperExchange, "set_position_stop", "after"),
}
FALLS = [(100.0, 101.0, 95.0, 95.5), *[(95.5, 96.0, 95.0, 95.5)] * 3]
CLIMBS = [(100.0, 103.5, 99.5, 103.5), *[(103.5, 103.5, 103.0, 103.5)] * 3]


def guard_and_die(folder: Path, hours: list[tuple[float, ...]], point: str) -> None:
    "Let the guard see the first hour, and die."
    bench = Bench(folder, hours)
    KILLS.update(GUARD_KILLS)
    arm(point)
    bench.hour()


@pytest.mark.parametrize(("hours", "left"), [(FALLS, 0), (CLIMBS, 7)], ids=["all of it", "a part"])
@pytest.mark.parametrize("point", [*CRASH_POINTS, *GUARD_KILLS])
def test_a_guard_killed_anywhere_leaves_once_and_never_without_a_stop(tmp_path, hours, left, point):
    bench = Bench(tmp_path, hours).begin()
    bench.close()
    status = run_apart(guard_and_die, tmp_path, hours, point)
    needs_stop = point == "stop set" and not left  # nothing is left to protect, so it was not killed
    assert status == (0 if needs_stop else KILLED)
    bench = Bench(tmp_path, hours, hour=2)
    assert all(position.stop_price is not None for position in bench.port.fetch_positions())  # that of before, at least
    first = bench.guard()
    assert first.unprotected == ()
    assert all(position.stop_price is not None for position in bench.port.fetch_positions())
    bench.clock.advance(30_000)  # an order that had not left by then never will
    bench.guard()
    assert [name for name in posts_of(tmp_path) if name.endswith(EXIT)] == [posts_of(tmp_path)[-1]]
    held = [(float(each.quantity), float(each.stop_price)) for each in bench.port.fetch_positions()]
    assert held == ([(7, 100.012)] if left else [])
    risk = bench.risk
    assert (float(risk.quantity), risk.leaving, risk.trades) == (left, None, 0 if left else 1)
    assert check(bench.state) == []
    bench.close()


def open_and_die(folder: Path) -> None:
    "Buy, and die before the stop was asked for."
    KILLS.update(GUARD_KILLS)
    bench = Bench(folder, FALLS)
    arm("before the stop")
    bench.begin()


def test_killed_between_the_entry_and_its_stop(tmp_path):
    assert run_apart(open_and_die, tmp_path) == KILLED
    bench = Bench(tmp_path, FALLS)
    assert [position.stop_price for position in bench.port.fetch_positions()] == [None]
    assert bench.guard().unprotected == ()
    assert [float(position.stop_price) for position in bench.port.fetch_positions()] == [93.012]
    bench.close()


def trade_on(folder: Path, first_hour: int) -> None:
    "Trade hour after hour, until the recording or the process ends."
    trade(folder, range(first_hour, 400 - ROW), {})


def wait_until(path: Path, hour: int) -> None:
    "Wait until a process has begun an hour."
    deadline = time.monotonic() + 60
    while not path.exists() or int(path.read_text() or -1) < hour:
        assert time.monotonic() < deadline, f"hour {hour} was not begun"
        time.sleep(0.002)


def test_killed_at_any_instant_twenty_times(tmp_path):
    rng, hours = random.Random(11), [0]
    for _ in range(20):
        process = FAMILY.Process(target=trade_on, args=(tmp_path, hours[-1]))
        process.start()
        wait_until(tmp_path / "hour", hours[-1] + rng.randrange(3))
        time.sleep(rng.uniform(0.0, 0.1))  # anywhere in a cycle
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        process.close()
        hours.append(int((tmp_path / "hour").read_text() or hours[-1]))
    assert hours[-1] >= 10, f"hardly anything was killed: {hours}"
    trade(tmp_path, range(hours[-1], hours[-1] + 6), {})
    assert len(decisions_of(tmp_path)) >= hours[-1]
    reference = tmp_path / "reference"
    reference.mkdir()
    trade(reference, range(6), {})
    assert targets_of(reference).items() <= targets_of(tmp_path).items()


# ── Two at a time ────────────────────────────────────────────────────────────────────────────────────────────────────
def knock(folder: Path) -> None:
    "Try to trade an account."
    try:
        trade(folder, [0], {})
    except XsmomError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_status)


def occupy(folder: Path) -> None:
    "Hold an account until killed."
    with open_desk(quick(folder), recording=recording(), now_ms=time_of(0), base=folder) as desk:
        desk.cycle(Memo(folder))
        (folder / "inside").touch()
        time.sleep(60)


def test_a_second_trader_is_turned_away_and_takes_over_when_the_first_is_dead(tmp_path):
    process = FAMILY.Process(target=occupy, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "inside").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    sent = posts_of(tmp_path)
    with pytest.raises(RefusedError, match=f"kill {process.pid}") as refused:
        trade(tmp_path, [1], {})
    assert refused.value.exit_status == 3
    assert run_apart(knock, tmp_path) == 3
    assert posts_of(tmp_path) == sent != []
    process.kill()
    process.join()
    process.close()
    trade(tmp_path, range(1, 4), {})


def posts_of(folder: Path) -> list[str]:
    "Names of the orders that the paper exchange has accepted, in that order."
    with sqlite3.connect(folder / "paper.sqlite") as account:
        names = [name for (name,) in account.execute("SELECT link_id FROM orders ORDER BY number")]
    account.close()
    return names


@pytest.fixture
def market_account(tmp_path) -> Path:
    "An account that holds most symbols, filled at market, at the end of hour 2."
    trade(tmp_path, range(3), MARKET)
    return tmp_path


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def lock_on(path: Path) -> Iterator[None]:
    "Somebody else writes, and does not finish."
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_locked_state_file_stops_the_start(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "open_state", partial(open_state, busy_timeout_seconds=0.05))
    sent = posts_of(market_account)
    with lock_on(market_account / "state.sqlite"), pytest.raises(StateError, match=r"state\.sqlite is locked by another process"):
        trade(market_account, [3], MARKET)
    assert posts_of(market_account) == sent
    trade(market_account, [3], MARKET)


def test_a_state_file_that_is_locked_when_orders_go_out_keeps_them_in(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "open_state", partial(open_state, busy_timeout_seconds=0.05))
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):

        class Locking(Memo):
            def record(self, decided: Decided) -> None:
                held.enter_context(lock_on(market_account / "state.sqlite"))

        with ExitStack() as held, pytest.raises(StateError, match="is locked by another process"):
            desk.cycle(Locking(market_account))
        assert line.posts == []  # no order without an intent on the disk
        assert desk.cycle(Memo(market_account)).sent
        audit(desk, market_account)


@pytest.mark.parametrize("name", ["state.sqlite", "paper.sqlite"])
def test_a_damaged_file_is_named_and_nothing_is_sent(market_account, name):
    path = market_account / name
    content = bytearray(path.read_bytes())
    rng = random.Random(5)
    content[4096 : len(content) // 2] = rng.randbytes(len(content) // 2 - 4096)
    sound = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(StateError, match=rf"{name} is damaged .*: move the file"):
        trade(market_account, [3], MARKET)
    path.write_bytes(sound)
    sent = posts_of(market_account)
    trade(market_account, [3], MARKET)
    assert len(posts_of(market_account)) > len(sent)


@pytest.mark.parametrize(("value", "words"), [
    ('{"last_row_ms": "soon"}', "last_row_ms is 'soon'"),
    ('{"days": [{"day_ms": 0, "start": "NaN", "high": "1", "last": "1"}]}', "start"),
    ('{"last_row_ms": 16', "memory 'decide' is not JSON"),
])
def test_a_memory_that_cannot_be_read_is_not_replaced_by_none(market_account, value, words):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        with desk.state.write() as connection:
            connection.exec_driver_sql("UPDATE memory SET value = ? WHERE name = 'decide'", (value,))
        with pytest.raises((DataError, StateError), match=words):
            desk.cycle(Memo(market_account))
        assert line.posts == []


def test_a_recorder_that_fails_keeps_every_order_in(market_account):
    class Full:
        def record(self, decided: Decided) -> None:
            raise XsmomError("decisions: the disk is full")

    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        with pytest.raises(XsmomError, match="the disk is full"):
            desk.cycle(Full())
        assert line.posts == []
        assert len(desk.cycle(Memo(market_account)).sent) == len(line.posts) > 0
        audit(desk, market_account)


def test_a_clock_that_goes_backwards_is_refused_by_account_and_memory(market_account):
    sent = posts_of(market_account)
    with pytest.raises(RefusedError, match="expected a clock that goes forward"):
        trade(market_account, [1], MARKET)
    assert posts_of(market_account) == sent
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        yesterday = replace(desk, clock=Late(time_of(0)), history=History(line, "1h", 150, sleep=patient))
        line.spoilt["fetch_time_ms"] = lambda _: time_of(0)
        with pytest.raises(RefusedError, match="was decided already; a clock goes backwards"):
            yesterday.cycle(Memo(market_account))
        assert line.posts == []


class Late:
    "A clock that stands still."

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms
