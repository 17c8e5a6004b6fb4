"""The parity ledger over a paper account: nothing where nothing happened, and each planted fault in its own cause."""

from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xsmom_nb.backtest.ledger import AccountRecord, balanced_books, outside_events, parity_ledger
from xsmom_nb.clock import format_utc, parse_utc
from xsmom_nb.config import Config, with_values
from xsmom_nb.errors import DataError, IntegrityError
from xsmom_nb.exchange.pieces import open_inner
from xsmom_nb.live.desk import open_desk
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import LedgerEntry, OrderRequest

HOUR, MINUTE = 3_600_000, 60_000
QUICK = {"filters.regime.ema_len": 5, "filters.regime.slope_bars": 4, "strategy.lookbacks": [2, 4, 8, 16],
         "strategy.vol_lookback": 24, "live.history_bars": 100, "optimizer.holdout_start": "2030-01-01",
         "live.state_url": "sqlite:///state.sqlite", "paper.account_url": "sqlite:///paper.sqlite"}
PANEL = synthetic_panel(seed=2, bars=110, symbols=6)
OPENS = PANEL.open_time_ms
CONFIG = with_values(Config(), QUICK)
OWN = ("account fee", "account funding", "account signal", "account sizing", "account rounding", "account fill")


def traded(folder: Path, rows: Any, panel: Panel = PANEL, config: Config = CONFIG, by_hand: int | None = None) -> AccountRecord:
    "Trade some rows on the paper exchange; after the row `by_hand` somebody sells something."
    decided: list[Any] = []

    class Listening:
        def record(self, each: Any) -> None:
            decided.append(each)

    with open_desk(config, panel, now_ms=int(OPENS[rows[0]]) + HOUR + MINUTE, base=folder) as desk:
        clock: Any = desk.clock
        for row in rows:
            clock.set(int(OPENS[row]) + HOUR + MINUTE)
            desk.cycle(Listening())
            if row == by_hand:
                clock.set(int(OPENS[row]) + HOUR + 10 * MINUTE)
                held = desk.port.fetch_positions()[0]
                side: Any = "Sell" if held.quantity > 0 else "Buy"
                request = OrderRequest("by-hand", held.symbol, side, "Market", abs(held.quantity), None, "IOC", reduce_only=True)
                assert desk.port.submit_order(request).outcome == "accepted"
        return AccountRecord(tuple(decided), tuple(desk.port.fetch_fills(0)), tuple(desk.port.fetch_ledger(0)))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return traded(tmp_path_factory.mktemp("calm"), range(78, 103))


@pytest.fixture(scope="module")
def calm(record):
    return parity_ledger(PANEL, CONFIG, record)


@pytest.fixture(scope="module")
def short(record):
    "The first hours of it."
    return replace(record, decided=record.decided[:8])


def adds_up(ledger: Any) -> None:
    assert ledger.table["money"].sum() == pytest.approx(ledger.account - ledger.vector, abs=1e-6)
    assert ledger.unexplained_bps_per_day < 0.1


def test_a_day_left_alone_has_nothing_to_explain(record, calm):
    adds_up(calm)
    assert calm.days == 1.0
    assert len(calm.books) == 24
    assert calm.missed == 0
    assert max(abs(calm.table["money"][name]) for name in OWN) < 1e-5
    assert calm.table["money"][["outside", "data"]].abs().max() == 0.0
    again = [(fill.symbol, fill.quantity, fill.price, fill.fee, fill.time_ms) for fill in calm.lives["as it was"].fills]
    there = [(fill.symbol, fill.quantity, fill.price, fill.fee, fill.time_ms) for hour in calm.books for fill in hour.fills]
    assert again == there
    assert len(again) > 50


def test_days_add_up_and_a_later_one_begins_with_positions(record, calm):
    parts = record.decided[:9], record.decided[8:13]
    halves = [parity_ledger(PANEL, CONFIG, replace(record, decided=decided)) for decided in parts]
    assert record.decided[8].snapshot.positions
    together = float(sum(hour.change for hour in calm.books[:12]))
    assert sum(half.account for half in halves) == pytest.approx(together, abs=1e-9)
    for half in halves:
        adds_up(half)
        assert max(abs(half.table["money"][name]) for name in OWN) < 1e-5


def test_a_missed_hour_is_timing(tmp_path):
    record = traded(tmp_path, [row for row in range(78, 90) if row not in (84, 85)])
    found = parity_ledger(PANEL, CONFIG, record)
    adds_up(found)
    assert found.missed == 2
    assert max(abs(found.table["money"][name]) for name in OWN) < 1e-5
    undisturbed = parity_ledger(PANEL, CONFIG, replace(record, decided=record.decided[:6]))  # until before it
    assert found.table["money"]["data"] == 0.0
    assert abs(found.table["money"]["timing"] - undisturbed.table["money"]["timing"]) > 1e-3


def test_a_bar_mended_afterwards_is_data(short, calm):
    closes = PANEL.close.copy()
    symbol = max(calm.lives["as it was"].price, key=lambda name: abs(calm.lives["as it was"].price[name]))
    closes[82, PANEL.symbols.index(symbol)] *= 1.004
    highs = PANEL.high.copy()
    highs[82] = np.maximum(highs[82], closes[82])
    found = parity_ledger(replace(PANEL, close=closes, high=highs), CONFIG, short)
    adds_up(found)
    assert max(abs(found.table["money"][name]) for name in OWN) < 1e-5
    assert abs(found.table["money"]["data"]) > 1e-3
    assert found.account == pytest.approx(float(sum(hour.change for hour in calm.books[:7])))


def test_another_schedule_of_fees_is_a_fee(short, calm):
    charged = [replace(fill, fee=fill.fee * 2) for fill in short.fills]
    found = parity_ledger(PANEL, with_values(CONFIG, {"costs.taker_bps": 11.0, "costs.maker_bps": 4.0}), short)
    there = [fill for hour in calm.books[:7] for fill in hour.fills]
    assert found.table["money"]["account fee"] == pytest.approx(float(sum(fill.fee for fill in there)), rel=0.01)
    assert abs(found.table["money"]["account fill"]) < 0.1 * found.table["money"]["account fee"]
    adds_up(found)
    with pytest.raises(IntegrityError, match="does not balance"):  # the same fee, charged behind the ledger's back
        balanced_books(replace(short, fills=tuple(charged)))


def test_other_targets_are_the_signal(short):
    found = parity_ledger(PANEL, with_values(CONFIG, {"vol_target.target_ann_vol": 0.3}), short)
    adds_up(found)
    assert abs(found.table["money"]["account signal"]) > 1e-3
    assert abs(found.table["money"]["account fill"]) < 1e-5


def test_a_trade_by_hand_is_nobody_s_decision(tmp_path):
    record = traded(tmp_path, range(78, 90), by_hand=84)
    found = parity_ledger(PANEL, CONFIG, record)
    assert [event.link_id for event in outside_events(found.books)] == ["by-hand"]
    adds_up(found)
    assert abs(found.table["money"]["outside"]) > 1e-3
    assert max(abs(found.table["money"][name]) for name in OWN) < 1e-5


def with_transfer(record: AccountRecord, amount: Decimal, place: int) -> AccountRecord:
    "The same record, with money that came between two snapshots."
    def richer(decided: Any) -> Any:
        account = decided.snapshot.account
        more = replace(account, equity=account.equity + amount, wallet_balance=account.wallet_balance + amount)
        return replace(decided, snapshot=replace(decided.snapshot, account=more))

    time_ms = record.decided[place].snapshot.time_ms - MINUTE
    entries = sorted([*record.entries, LedgerEntry("gift", time_ms, "transfer", "", amount)], key=lambda each: each.time_ms)
    decided = (*record.decided[:place], *map(richer, record.decided[place:]))
    return replace(record, decided=decided, entries=tuple(entries))


def test_a_transfer_is_no_gain(record, calm):
    richer = with_transfer(replace(record, decided=record.decided[:6]), Decimal(2000), 5)
    found = parity_ledger(PANEL, CONFIG, richer)
    assert [event.amount for event in outside_events(found.books)] == [Decimal(2000)]
    assert sum(hour.transfers for hour in found.books) == 2000
    assert found.account == pytest.approx(float(sum(hour.change for hour in calm.books[:5])), abs=1e-9)
    adds_up(found)


def test_books_that_do_not_balance_are_refused_with_their_hour(record):
    gone = next(entry for entry in record.entries if entry.kind == "fee" and entry.time_ms > int(OPENS[84]))
    hour = next(each.snapshot.time_ms for each in record.decided if each.snapshot.time_ms >= gone.time_ms)
    with pytest.raises(IntegrityError, match=r"hour from .* does not balance") as raised:
        parity_ledger(PANEL, CONFIG, replace(record, entries=tuple(each for each in record.entries if each is not gone)))
    assert format_utc(hour) in str(raised.value) or format_utc(hour + HOUR) in str(raised.value)
    trade = record.fills[20]
    with pytest.raises(IntegrityError, match="do not lead from the old positions"):
        balanced_books(replace(record, fills=tuple(each for each in record.fills if each is not trade)))


def test_too_little_is_refused(record):
    with pytest.raises(DataError, match="expected two at least"):
        parity_ledger(PANEL, CONFIG, replace(record, decided=record.decided[:1]))
    with pytest.raises(DataError, match="data sync"):
        parity_ledger(PANEL.slice(end_ms=int(OPENS[90])), CONFIG, record)


def test_real_hours(real_store, root, tmp_path):
    "A real day behind the holdout: paper trading is free of it."
    config = with_values(Config(), {name: value for name, value in QUICK.items() if name.endswith("url")})
    start_ms, decided = parse_utc("2025-07-06T00:00:00Z"), list[Any]()

    class Listening:
        def record(self, each: Any) -> None:
            decided.append(each)

    with open_desk(config, data=real_store.root, now_ms=start_ms + HOUR + MINUTE, base=tmp_path) as desk:
        clock: Any = desk.clock
        with closing(desk.port):
            for hour in range(5):
                clock.set(start_ms + (hour + 1) * HOUR + MINUTE)
                desk.cycle(Listening())
            record = AccountRecord(tuple(decided), tuple(desk.port.fetch_fills(0)), tuple(desk.port.fetch_ledger(0)))
    panel, inner = real_store.panel("1h"), open_inner(config, real_store.root, None, start_ms)
    found = parity_ledger(panel, config, record, inner=inner)
    adds_up(found)
    assert max(abs(found.table["money"][name]) for name in OWN) < 1e-4
    assert found.is_within(config.rollout.max_parity_bps_per_day)
