"""A line that fails and lies, prices and bars that cannot be: what is not known is not traded on, and the rest is."""

import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from xsmom_nb.errors import DataError, RefusedError, XsmomError
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.execution import reconcile
from xsmom_nb.live import desk as desk_module
from xsmom_nb.live.desk import Desk, open_desk
from xsmom_nb.live.history import History
from xsmom_nb.market.panel import FIELDS
from xsmom_nb.ports import Account, OrderRequest, Submission, TransientError
from xsmom_nb.state import export
from small_account import (
    HOUR,
    MARKET,
    ROW,
    Line,
    Memo,
    audit,
    card_of,
    desk_with_line,
    held_in,
    next_hour,
    patient,
    quick,
    recording,
    time_of,
    trade,
)

READS = ("fetch_time_ms", "fetch_open_orders", "fetch_positions", "fetch_fills", "fetch_ledger", "fetch_instruments",
         "fetch_bars", "fetch_funding", "fetch_tickers", "fetch_account")


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(reconcile, "FIRST_PAUSE_SECONDS", 0.0001)


@pytest.fixture
def market_account(tmp_path) -> Path:
    "An account that holds most symbols, filled at market, at the end of hour 2."
    trade(tmp_path, range(3), MARKET)
    return tmp_path


@pytest.mark.parametrize("name", READS)
def test_reads_are_repeated_and_when_they_fail_for_good_the_hour_is_left_out(tmp_path, name):
    with desk_with_line(tmp_path) as (desk, line):
        desk.cycle(Memo(tmp_path))
        first = list(line.posts)
        line.deaf[name] = 2
        report = next_hour(desk, tmp_path)
        assert len(line.posts) > len(first)
        assert (line.deaf[name], report.decided.decision.row_ms) == (0, int(recording().open_time_ms[ROW + 1]))
        before = list(line.posts)
        line.deaf[name] = math.inf
        with pytest.raises(TransientError, match=name):
            next_hour(desk, tmp_path)
        assert line.posts == before  # not one order without having seen everything
        line.deaf.clear()
        next_hour(desk, tmp_path)
        assert len(line.posts) > len(before)
        audit(desk, tmp_path)


def test_a_clock_ten_seconds_off_ends_the_cycle_before_it_begins(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        for error_ms in (10_000, -10_000):
            line.spoilt["fetch_time_ms"] = lambda now_ms, error_ms=error_ms: now_ms + error_ms
            with pytest.raises(RefusedError, match="set this machine's clock"):
                desk.cycle(Memo(tmp_path))
        assert set(line.calls) == {"fetch_time_ms"}
        line.spoilt.clear()
        assert next_hour(desk, tmp_path).sent


def test_an_hour_in_which_every_answer_is_lost(tmp_path):
    "The orders arrive, nobody says so, and nobody can be asked; the symbols freeze, and thaw when the line is back."
    with desk_with_line(tmp_path) as (desk, line):
        desk.cycle(Memo(tmp_path))
        known = len(line.posts)

        def lose(request: OrderRequest) -> Submission:
            line.port.submit_order(request)
            line.deaf["find_order"] = math.inf
            return Submission("unknown", reason="time-out")

        line.spoilt["submit_order"] = lose
        report = next_hour(desk, tmp_path)
        names = [request.link_id for request in line.posts[known:]]
        assert names
        assert {sent.outcome for sent in report.sent} <= {"unknown", "dropped"}
        with pytest.raises(TransientError):
            desk.cycle(Memo(tmp_path))  # as long as it cannot ask, it does nothing
        assert [request.link_id for request in line.posts[known:]] == names
        line.deaf.clear()
        line.spoilt.clear()
        report = next_hour(desk, tmp_path)
        assert set(report.recovery.settled.adopted) == set(names)
        assert report.recovery.frozen == frozenset()
        assert len({request.link_id for request in line.posts}) == len(line.posts)
        audit(desk, tmp_path)


def test_an_hour_in_which_no_order_arrives(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        line.spoilt["submit_order"] = lambda _: Submission("unknown", reason="time-out")
        report = desk.cycle(Memo(tmp_path))
        names, symbols = {each.link_id for each in line.posts}, {each.symbol for each in line.posts}
        assert {sent.outcome for sent in report.sent} == {"unknown"}
        again = desk.cycle(Memo(tmp_path))  # still the same minute: they may be on their way
        assert again.recovery.frozen == symbols
        assert {each.link_id for each in line.posts} == names
        line.spoilt.clear()
        report = next_hour(desk, tmp_path)
        assert set(report.recovery.settled.lost) == names
        assert report.recovery.frozen == frozenset()
        later = [each.link_id for each in line.posts[len(names):]]
        assert later
        assert not names & set(later)
        next_hour(desk, tmp_path)
        audit(desk, tmp_path)


# ── Something is missing, or cannot be ───────────────────────────────────────────────────────────────────────────────
def hide_bar(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_bars"] = lambda bars, asked, *_: [
        bar for bar in bars if asked != symbol or bar.open_time_ms < desk.clock.now_ms() // HOUR * HOUR - HOUR]


def tear_bar(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_bars"] = lambda bars, asked, *_: [
        replace(bar, close=math.nan) if asked == symbol and bar.open_time_ms == desk.clock.now_ms() // HOUR * HOUR - HOUR else bar
        for bar in bars]


def age_ticker(line: Line, desk: Desk, symbol: str) -> None:
    line.spoilt["fetch_tickers"] = lambda tickers: [
        replace(each, time_ms=each.time_ms - 61_000) if each.symbol == symbol else each for each in tickers]


ABSENT: dict[str, tuple[Callable[[Line, Desk, str], None], str]] = {
    "no bar": (hide_bar, "its bar is missing"),
    "NaN in its bar": (tear_bar, "its bar is missing"),
    "no ticker": (lambda line, _, symbol: line.without("fetch_tickers", symbol), "it has no price"),
    "stale ticker": (age_ticker, "its price is 61 s old, at most 60 s are traded on"),
    "no trading rules": (
        lambda line, _, symbol: line.without("fetch_instruments", symbol), "the exchange has no trading rules for it"),
}


@pytest.mark.parametrize("fault", ABSENT)
def test_a_symbol_of_which_something_is_missing_is_left_alone(market_account, fault):
    spoil, words = ABSENT[fault]
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        positions = desk.port.fetch_positions()
        symbol, quantity = positions[0].symbol, positions[0].quantity
        spoil(line, desk, symbol)
        report = desk.cycle(Memo(market_account))
        assert symbol not in {each.symbol for each in line.posts}
        assert line.posts, "the others are traded"
        card = card_of(report, symbol)
        assert (card.held, card.wanted, card.outcome) == (quantity, quantity, f"left as it is: {words}")
        assert held_in(report)[symbol] == quantity
        told = " ".join(row["text"] for row in export(desk.state)["events"])
        assert f"{symbol}: left as it is: {words}" in told
        line.spoilt.clear()
        assert not card_of(next_hour(desk, market_account), symbol).outcome.startswith("left as it is")
        audit(desk, market_account)


@pytest.mark.parametrize("fault", ABSENT)
def test_a_symbol_of_which_something_is_missing_is_not_entered(tmp_path, fault):
    spoil, words = ABSENT[fault]
    sound, spoilt = tmp_path / "sound", tmp_path / "spoilt"
    sound.mkdir()
    spoilt.mkdir()
    (report,) = trade(sound, [0], MARKET)
    symbol = max(report.decided.decision.targets.items(), key=lambda item: abs(item[1]))[0]
    assert symbol in {sent.intent.request.symbol for sent in report.sent}
    with desk_with_line(spoilt, **MARKET) as (desk, line):
        spoil(line, desk, symbol)
        cards = {card.symbol: card for card in desk.cycle(Memo(spoilt)).decided.decision.cards}
        assert symbol not in {each.symbol for each in line.posts}
        assert line.posts, "the others are traded"
        if fault == "no trading rules":
            assert symbol not in cards  # a contract that is not listed is not looked at
        else:
            assert cards[symbol].outcome == f"left as it is: {words}"


class TornMarket(RecordedMarket):
    "A recording with a bar that cannot be."

    torn: tuple[str, int] | None = None

    def fetch_bars(self, symbol: str, timeframe: str, start_ms: int, limit: int):
        bars = super().fetch_bars(symbol, timeframe, start_ms, limit)
        return [replace(bar, close=math.nan) if (symbol, bar.open_time_ms) == self.torn else bar for bar in bars]


@pytest.mark.parametrize("equity", ["0", "-12.5"])
def test_an_account_that_is_worth_nothing_orders_nothing(market_account, equity):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        line.spoilt["fetch_account"] = lambda _: Account(Decimal(equity), Decimal(equity), Decimal(0))
        with pytest.raises(RefusedError, match=f"equity is {equity}; expected above 0"):
            desk.cycle(Memo(market_account))
        assert line.posts == []
        line.spoilt.clear()
        desk.cycle(Memo(market_account))
        audit(desk, market_account)


def test_a_position_that_left_the_universe_is_closed_by_an_order_that_can_only_close(market_account):
    symbol = paper_position(market_account)
    changes = {**MARKET, "universe.banlist": [symbol]}
    with desk_with_line(market_account, 3, **changes) as (desk, line):
        report = desk.cycle(Memo(market_account))
        (order,) = [each for each in line.posts if each.symbol == symbol]
        assert order.reduce_only
        assert card_of(report, symbol).why_not is not None
        assert symbol not in held_in(report)
        for _ in range(3):
            assert symbol not in held_in(next_hour(desk, market_account))
        assert len([each for each in line.posts if each.symbol == symbol]) == 1
        audit(desk, market_account)


def paper_position(folder: Path) -> str:
    "The first symbol that an account holds."
    with sqlite3.connect(folder / "paper.sqlite") as account:
        rows = account.execute("SELECT symbol FROM holdings WHERE quantity <> '0' ORDER BY symbol").fetchall()
    account.close()
    return str(rows[0][0])


def test_a_position_in_a_contract_that_ends_is_settled_and_booked(market_account):
    symbol, panel = paper_position(market_account), recording()
    values = {name: getattr(panel, name).copy() for name in FIELDS}
    for name in FIELDS:
        values[name][ROW + 3 :, panel.symbols.index(symbol)] = np.nan
    ending = replace(panel, **values)  # the last bar of the symbol is the one that was decided last
    with open_desk(quick(market_account, **MARKET), recording=ending, now_ms=time_of(3), base=market_account) as desk:
        report = desk.cycle(Memo(market_account))
        (settled,) = [fill for fill in desk.port.fetch_fills(0) if fill.order_id == "settlement"]
        assert (settled.symbol, symbol in held_in(report)) == (symbol, False)
        for _ in range(2):
            decision = next_hour(desk, market_account).decided.decision
            assert symbol not in {*decision.memory.unfinished, *(intent.request.symbol for intent in decision.intents)}
        trades = export(desk.state)["trades"]
        assert [row["exit_reason"] for row in trades if row["symbol"] == symbol][-1] == "outside"
        audit(desk, market_account)


# ── Hours that do not go as planned ──────────────────────────────────────────────────────────────────────────────────
def exposure(desk, symbol):
    "What would be held if everything filled."
    held = {p.symbol: p.quantity for p in desk.port.fetch_positions()}.get(symbol, Decimal(0))
    return held + sum((o.quantity - o.filled_quantity) * (1 if o.side == "Buy" else -1)
                      for o in desk.port.fetch_open_orders() if o.symbol == symbol)


def test_an_hour_begun_again_does_not_order_the_rest_under_another_name(tmp_path):
    "Limit orders that take a part at once: what first wanted to open now wants to increase, and has done so already."
    taking = {"execution.post_only": False, "execution.price_offset_bps": -20, "paper.participation": 2e-6}
    with desk_with_line(tmp_path, **taking) as (desk, _):
        first = desk.cycle(Memo(tmp_path))
        wanted = {card.symbol: card.wanted for card in first.decided.decision.cards if card.wanted}
        desk.cycle(Memo(tmp_path))
        assert {s: abs(exposure(desk, s)) <= abs(q) for s, q in wanted.items()} == dict.fromkeys(wanted, True)


def test_an_hour_begun_again_does_not_take_a_second_step(tmp_path):
    with desk_with_line(tmp_path, **MARKET, **{"execution.trade_rate": 0.1, "execution.rebalance_band": 0.0005}) as (desk, line):
        desk.cycle(Memo(tmp_path))
        sent = len(line.posts)
        desk.cycle(Memo(tmp_path))
        assert len(line.posts) == sent > 0


def test_an_hour_that_turns_between_recovery_and_snapshot_orders_nothing(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        desk.cycle(Memo(tmp_path))
        desk.clock.set(time_of(1) - 60_001)  # a millisecond before the next close
        sent = len(line.posts)

        def turn(entries, *_):
            line.spoilt.clear()
            desk.clock.set(time_of(1))
            return entries

        line.spoilt["fetch_ledger"] = turn
        with pytest.raises(RefusedError):
            desk.cycle(Memo(tmp_path))
        assert len(line.posts) == sent
        desk.cycle(Memo(tmp_path))
        audit(desk, tmp_path)


def test_what_was_wanted_survives_a_cycle_that_fails_after_sending(tmp_path):
    with desk_with_line(tmp_path, **{"strategy.rebalance_every_bars": 8}) as (desk, line):
        while (desk.clock.now_ms() // HOUR) % 8:
            desk.clock.advance(HOUR)
        real = line.port.submit_order

        def cut(request):
            line.deaf["fetch_fills"] = float("inf")
            return real(request)

        line.spoilt["submit_order"] = cut
        with pytest.raises(TransientError):
            desk.cycle(Memo(tmp_path))
        names = {each.symbol for each in line.posts}
        line.spoilt.clear()
        line.deaf.clear()
        report = next_hour(desk, tmp_path)
        assert not report.decided.decision.rebalances
        reached = {s for s in names if s in held_in(report) and s not in report.decided.decision.memory.unfinished}
        on_the_way = set(report.decided.decision.memory.unfinished)
        assert names == reached | on_the_way
        assert on_the_way


def test_orders_of_a_state_that_was_lost_do_not_rest_for_ever(tmp_path):
    trade(tmp_path, [0], {"paper.participation": 3e-6})
    for path in tmp_path.glob("state.sqlite*"):
        path.unlink()  # moved away, as the message about a damaged file advises
    with desk_with_line(tmp_path, 1, **{"paper.participation": 3e-6}) as (desk, line):
        desk.cycle(Memo(tmp_path))
        mine = {each.link_id for each in line.posts}
        assert {order.link_id for order in desk.port.fetch_open_orders()} <= mine


def test_a_feed_without_most_bars_is_no_market(market_account):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        gone = [position.symbol for position in desk.port.fetch_positions()][:5]
        newest = time_of(3) // HOUR * HOUR - HOUR
        line.spoilt["fetch_bars"] = lambda bars, asked, *_: [
            bar for bar in bars if asked not in gone or bar.open_time_ms < newest]
        with pytest.raises(RefusedError, match=r"4 of 8 symbols have their bar of .*expected at least 75%"):
            desk.cycle(Memo(market_account))
        assert line.posts == []


@pytest.mark.parametrize("spoil", [
    lambda each: replace(each, mark=each.mark / 10), lambda each: replace(each, bid=each.bid * 9, ask=each.ask * 9),
    lambda each: replace(each, bid=each.bid / 10, ask=each.ask / 10, mark=each.mark / 10, last=each.last / 10)])
def test_a_price_that_contradicts_the_others_is_not_traded_on(tmp_path, spoil):
    with desk_with_line(tmp_path, **MARKET) as (desk, line):
        bad = "ETHUSDT"
        line.spoilt["fetch_tickers"] = lambda tickers: [spoil(each) if each.symbol == bad else each for each in tickers]
        report = desk.cycle(Memo(tmp_path))
        assert line.posts
        assert bad not in {each.symbol for each in line.posts}, [str(x) for x in line.posts if x.symbol == bad]
        assert card_of(report, bad).outcome.startswith("left as it is")


def test_a_rebalance_that_could_not_look_does_not_chase_what_an_older_one_wanted(tmp_path):
    "Entries only: what is to be given back may go on."
    with desk_with_line(tmp_path, **{"strategy.rebalance_every_bars": 8, "paper.participation": 2e-6}) as (desk, line):
        while (desk.clock.now_ms() // HOUR) % 8:
            desk.clock.advance(HOUR)
        report = desk.cycle(Memo(tmp_path))
        for _ in range(7):
            report = next_hour(desk, tmp_path)
        aims = report.decided.decision.memory.unfinished
        growing = {s for s, aim in aims.items() if abs(aim.wanted) > abs(aim.held)}
        hidden = set(list(growing)[:1])
        assert hidden
        hide_bar(line, desk, *hidden)
        report = next_hour(desk, tmp_path)
        assert report.decided.decision.rebalances
        line.spoilt.clear()
        sent = len(line.posts)
        next_hour(desk, tmp_path)
        assert not hidden & {each.symbol for each in line.posts[sent:] if not each.reduce_only}


def test_every_card_says_why_there_is_no_order(tmp_path):
    small = {"paper.initial_equity": 1000.0, "execution.trade_rate": 0.02, "execution.rebalance_band": 0.0}
    with desk_with_line(tmp_path, **small) as (desk, _):
        cards = desk.cycle(Memo(tmp_path)).decided.decision.cards
        assert [card.symbol for card in cards if not card.outcome] == []


def test_a_bar_that_cannot_be_is_told(market_account):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        tear_bar(line, desk, "BTCUSDT")
        desk.cycle(Memo(market_account))
        assert "close=nan" in " ".join(row["text"] for row in export(desk.state)["events"])


def test_a_memory_that_does_not_fit_names_place_and_remedy(market_account):
    with desk_with_line(market_account, 3, **MARKET) as (desk, _):
        with desk.state.write() as connection:
            connection.exec_driver_sql("UPDATE memory SET value = '{\"last_row_ms\": \"soon\"}' WHERE name = 'decide'")
        with pytest.raises(XsmomError, match=r"state\.sqlite.*last_row_ms is 'soon'.*restore"):
            desk.cycle(Memo(market_account))


def test_an_order_sent_at_the_end_of_a_bar_does_not_fill_in_what_came_before_it(tmp_path):
    with desk_with_line(tmp_path) as (desk, line):
        desk.clock.set(time_of(1) - 61_000)  # a second before the close
        desk.cycle(Memo(tmp_path))
        assert line.posts
        desk.clock.advance(1_000)
        assert desk.port.fetch_fills(0) == []


def test_one_torn_bar_does_not_stop_the_other_symbols(market_account, monkeypatch):
    monkeypatch.setattr(desk_module, "RecordedMarket", TornMarket)
    with desk_with_line(market_account, 2, **MARKET) as (desk, line):
        symbol = desk.port.fetch_positions()[0].symbol
        monkeypatch.setattr(TornMarket, "torn", (symbol, int(recording().open_time_ms[ROW + 3])))
        next_hour(desk, market_account)
        assert line.posts


def test_a_held_symbol_that_the_exchange_does_not_know_does_not_stop_the_others(market_account):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        symbol = desk.port.fetch_positions()[0].symbol
        line.without("fetch_instruments", symbol)
        line.without("fetch_tickers", symbol)

        def unknown(bars, asked, *_):
            if asked == symbol:
                raise DataError(f"{symbol}: 10001 Not supported symbols")
            return bars

        line.spoilt["fetch_bars"] = unknown
        # a new process has no window yet
        desk = replace(desk, history=History(line, "1h", 150, sleep=patient))
        report = desk.cycle(Memo(market_account))
        assert line.posts
        assert card_of(report, symbol).outcome.startswith("left as it is")


def test_a_failed_look_after_everything_was_done_does_not_fail_the_cycle(market_account):
    with desk_with_line(market_account, 3, **MARKET) as (desk, line):
        seen = []

        def late(account, *_):
            seen.append(1)
            if len(seen) > 1:
                raise TransientError("time-out")
            return account

        line.spoilt["fetch_account"] = late
        desk.cycle(Memo(market_account))


def test_hours_that_were_slept_through_are_told(tmp_path):
    with desk_with_line(tmp_path, **{"strategy.rebalance_every_bars": 8}) as (desk, _):
        while (desk.clock.now_ms() // HOUR) % 8:
            desk.clock.advance(HOUR)
        desk.cycle(Memo(tmp_path))
        desk.clock.advance(9 * HOUR)
        decision = desk.cycle(Memo(tmp_path)).decided.decision
        assert any("not decided" in notice for notice in decision.notices)
