"""The cycle, hour by hour over real data: the books balance, every decision can be made again, nothing is sent twice."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

from xsmom_nb.clock import parse_utc
from xsmom_nb.config import Config, load_config, to_yaml, with_values
from xsmom_nb.decide import decide
from xsmom_nb.decision import Decided, as_json
from xsmom_nb.exchange.paper import price_result, totals
from xsmom_nb.execution.journal import held_quantities
from xsmom_nb.files import canonical_json
from xsmom_nb.live.cycle import CycleReport
from xsmom_nb.live.desk import open_desk
from xsmom_nb.ports import Fill, Position
from xsmom_nb.runs.cases import BatchRecorder, read_cases
from xsmom_nb.runs.record import RunFolder
from xsmom_nb.state import check

HOUR = 3_600_000
HOURS = 720


def account_config(folder, config: Config, **changes) -> Config:
    "A config whose state and paper account lie in a folder of their own."
    places = {"live.state_url": f"sqlite:///{folder}/state.sqlite", "paper.account_url": f"sqlite:///{folder}/paper.sqlite"}
    return with_values(config, {**places, "live.emergency_stop_file": f"{folder}/STOP", **changes})


@pytest.fixture(scope="module")
def month(real_store, root, tmp_path_factory):
    "720 real hours on the paper exchange, recorded; every cycle's books are looked at."
    folder = tmp_path_factory.mktemp("month")
    config = account_config(folder, Config())
    run = RunFolder(folder / "run")
    run.path.mkdir()
    (run.path / "config.yaml").write_text(to_yaml(config))
    last_ms = parse_utc("2025-03-31T23:00:00Z")
    now_ms = last_ms - (HOURS - 1) * HOUR + HOUR + 60_000
    recorder, reports, books, seconds = BatchRecorder(run), [], [], []
    with open_desk(config, data=real_store.root, now_ms=now_ms, base=root) as desk:
        port, fills, entries = desk.port, {}, {}
        for _ in range(HOURS):
            begin = time.perf_counter()
            report = desk.cycle(recorder)
            seconds.append(time.perf_counter() - begin)
            reports.append(replace(report, decided=Decided(None, None, report.decided.decision)))  # 720 panels are gigabytes
            since_ms = desk.clock.now_ms() - 2 * HOUR
            fills |= {fill.fill_id: fill for fill in port.fetch_fills(since_ms)}
            entries |= {entry.entry_id: entry for entry in port.fetch_ledger(since_ms)}
            equity, positions = port.fetch_account().equity, port.fetch_positions()
            books.append(Books(equity, tuple(fills.values()), positions, totals(entries.values())))
            desk.clock.advance(HOUR)
        with desk.state.read() as connection:
            believed = held_quantities(connection)
        problems = check(desk.state)
    return Month(run.path, config, reports, books, seconds, believed, problems)


class Books(NamedTuple):
    "What the exchange says after a cycle."

    equity: Decimal
    fills: tuple[Fill, ...]  # all so far
    positions: Sequence[Position]
    ledger: dict[str, Decimal]  # sums by kind


class Month(NamedTuple):
    folder: Path
    config: Config
    reports: list[CycleReport]
    books: list[Books]
    seconds: list[float]
    believed: dict[str, Decimal]  # positions of the state, at the end
    problems: list[str]  # of the state, at the end


def test_the_books_balance_in_every_hour(month):
    for books in month.books:
        marks = {each.symbol: each.mark_price for each in books.positions}
        change = books.equity - Decimal(repr(month.config.paper.initial_equity))
        explained = price_result(books.fills, marks) - sum(fill.fee for fill in books.fills) + books.ledger["funding"]
        assert abs(change - explained) <= Decimal("0.000001")
    assert len(month.books[-1].fills) > 500  # it traded, or this says nothing
    assert month.books[-1].ledger["funding"] != 0 > month.books[-1].ledger["fee"]


def test_every_decision_can_be_made_again_bit_for_bit(month):
    equal = 0
    for case in read_cases(month.folder):
        equal += canonical_json(as_json(decide(case.snapshot, case.memory, month.config))) == case.recorded
    assert equal == HOURS


def test_what_we_believe_to_hold_is_what_the_exchange_holds(month):
    last = month.reports[-1]
    assert month.believed == {each.symbol: each.quantity for each in last.positions_after} != {}
    assert month.problems == []


def test_nothing_is_sent_twice_and_no_symbol_is_left_out(month):
    sent = [each.intent.request.link_id for report in month.reports for each in report.sent]
    assert len(sent) == len(set(sent)) > 1000
    symbols = {card.symbol for report in month.reports for card in report.decided.decision.cards}
    assert len(symbols) >= 35
    for report in month.reports:
        decision = report.decided.decision
        assert {card.symbol for card in decision.cards} == set(decision.targets)
        assert all(card.outcome for card in decision.cards)


def test_the_book_follows_its_targets_as_far_as_risk_allows(month):
    "Limit orders fill within some hours: on most hours most of what may be held is held."
    shares, refused = [], 0
    for report in month.reports[48:]:
        free = [card for card in report.decided.decision.cards if not any("no entry" in each for each in card.risk)]
        refused += len(report.decided.decision.cards) - len(free)
        wanted = sum(abs(card.overlaid) for card in free)
        missing = sum(abs(card.overlaid - (card.held_weight or 0.0)) for card in free)
        if wanted:
            shares.append(missing / wanted)
    assert sorted(shares)[len(shares) // 2] < 0.5
    assert refused > 100  # cooldowns and streaks acted


def test_every_position_has_its_stop_after_every_cycle(month):
    held = 0
    for report in month.reports:
        assert report.guarded[1].unprotected == ()
        assert all(each.stop_price is not None for each in report.positions_after)
        held += len(report.positions_after)
    assert held > 1000


def test_a_cycle_is_quick(month):
    limit = 0.3 if "PYTEST_XDIST_WORKER" in os.environ else 0.1  # seconds; other tests share caches and cores
    assert sorted(month.seconds)[len(month.seconds) // 10] < limit


def test_the_same_hours_give_the_same_decisions(month, real_store, root, tmp_path):
    "Another account, another process state, the same seed: the first day again, to the last byte."
    config = account_config(tmp_path, Config())
    again = []

    class Listening:
        def record(self, decided):
            again.append(canonical_json(as_json(decided.decision)))

    with open_desk(config, data=real_store.root, now_ms=month.reports[0].decided.decision.time_ms, base=root) as desk:
        for _ in range(24):
            desk.cycle(Listening())
            desk.clock.advance(HOUR)
    first = (month.folder / "outputs" / "decisions.jsonl").read_bytes().splitlines()[:24]
    assert [json.loads(line)["targets"] for line in again] == [json.loads(line)["targets"] for line in first]
    assert again == first


@pytest.mark.parametrize(("participation", "thin"), [(0.1, False), (1e-5, True)])
def test_between_rebalances_only_what_did_not_fill_is_ordered(real_store, root, tmp_path, participation, thin):
    shipped = load_config(root / "configs" / "config.yaml", environ={})
    config = account_config(tmp_path, shipped, **{"paper.participation": participation})
    decisions = []

    class Listening:
        def record(self, decided):
            decisions.append(decided)

    with open_desk(config, data=real_store.root, now_ms=parse_utc("2025-03-20T00:00:00Z") + 60_000, base=root) as desk:
        for _ in range(24):
            desk.cycle(Listening())
            desk.clock.advance(HOUR)
    assert [each.decision.rebalances for each in decisions] == [hour % 8 == 0 for hour in range(24)]
    between = [each for each in decisions if not each.decision.rebalances]
    for each in between:
        assert {intent.request.symbol for intent in each.decision.intents} <= set(each.memory.unfinished)
    assert (sum(len(each.decision.intents) for each in between) > 50) == thin
    assert (sum(not each.decision.intents for each in between) > 15) == (not thin)
