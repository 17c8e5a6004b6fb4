"""The live cycle on the simulator, by one option, against the same hours on paper: the same decisions, orders and fills.

Six hours here; `python tests/test_simulated_live.py [hours]` compares 48, or as many as are named.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from xsmom_nb.clock import parse_utc
from xsmom_nb.config import Config, with_values
from xsmom_nb.decision import Decided
from xsmom_nb.exchange.launch import scene_of, simulator_on
from xsmom_nb.exchange.server import serving
from xsmom_nb.live.desk import Desk, open_desk
from xsmom_nb.market.panel import Panel
from xsmom_nb.ports import Account, Fill, OrderRequest, Position

pytest.importorskip("ccxt", reason="no package ccxt found")
HOUR = 3_600_000
LAST = "2025-03-31T23:00:00Z"  # before the holdout


class Hours(NamedTuple):
    "What came of some hours on one exchange."

    wanted: list[list[OrderRequest]]  # orders of each decision
    outcomes: list[list[tuple[str, str]]]  # name and outcome of each order
    fills: list[Fill]  # ascending
    accounts: list[Account]  # after each hour
    positions: tuple[Position, ...]  # at the end
    seconds: float


class Recorder:
    "Keeps nothing; the cycle wants one."

    def record(self, decided: Decided) -> None:
        pass


def config_in(folder: Path, **changes: Any) -> Config:
    "A config whose state and account lie in a folder of their own."
    places = {"live.state_url": f"sqlite:///{folder}/state.sqlite", "paper.account_url": f"sqlite:///{folder}/paper.sqlite"}
    more = {"live.emergency_stop_file": f"{folder}/STOP", "live.bar_wait_seconds": 0.0}
    return with_values(Config(), {**places, **more, **changes})


@contextmanager
def on_paper(panel: Panel, start_ms: int, folder: Path) -> Iterator[tuple[Desk, Any]]:
    "A desk on paper, and what moves its clock."
    with open_desk(config_in(folder), panel, now_ms=start_ms, base=folder) as desk:
        yield desk, desk.clock.advance


@contextmanager
def on_simulator(panel: Panel, start_ms: int, folder: Path) -> Iterator[tuple[Desk, Any]]:
    "A desk at the simulator, and what moves its clock."
    simulator = simulator_on(scene_of(panel, None, start_ms), Config(), mode="paused")
    with serving(simulator) as url:
        config = config_in(folder, **{"live.mode": "simulator", "exchange.mode_urls.simulator": url})
        with open_desk(config, base=folder) as desk:
            yield desk, lambda ms: simulator.pace.move(simulator.pace.now_ms() + ms)


def traded(venue: Any, panel: Panel, start_ms: int, hours: int) -> Hours:
    "Some hours of the live cycle."
    begin, wanted, outcomes, accounts = time.perf_counter(), [], [], []
    with TemporaryDirectory() as folder, venue(panel, start_ms, Path(folder)) as (desk, advance):
        for _ in range(hours):
            report = desk.cycle(Recorder())
            wanted.append([each.request for each in report.decided.decision.intents])
            outcomes.append([(each.intent.request.link_id, each.outcome) for each in report.sent])
            accounts.append(report.account_after)
            advance(HOUR)
        fills, positions = list(desk.port.fetch_fills(start_ms)), tuple(desk.port.fetch_positions())
    return Hours(wanted, outcomes, fills, accounts, positions, time.perf_counter() - begin)


def compared(panel: Panel, hours: int) -> tuple[Hours, Hours]:
    "The same hours on both; raises `AssertionError` for the first difference."
    start_ms = parse_utc(LAST) - (hours - 1) * HOUR + HOUR + 60_000
    paper, simulator = (traded(venue, panel, start_ms, hours) for venue in (on_paper, on_simulator))
    for hour, (ours, theirs) in enumerate(zip(paper.wanted, simulator.wanted, strict=True)):
        assert ours == theirs, f"hour {hour}"
    assert paper.outcomes == simulator.outcomes
    assert told(paper.fills) == told(simulator.fills)
    equities = zip(paper.accounts, simulator.accounts, strict=True)
    assert all(abs(ours.equity - theirs.equity) < Decimal("1e-6") for ours, theirs in equities)
    assert len(paper.positions) == len(simulator.positions)
    for ours, theirs in zip(paper.positions, simulator.positions, strict=True):
        same = ("symbol", "quantity", "mark_price", "stop_price")
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
        assert abs(ours.average_price / theirs.average_price - 1) < Decimal("1e-9")  # the exchange tells a rounded one
    return paper, simulator


def told(fills: list[Fill]) -> list[tuple[Any, ...]]:
    "Fills without the names that an exchange gives them, in an order that is the same everywhere."
    return sorted((each.time_ms, each.link_id, each.symbol, each.side, each.quantity, each.price, each.fee, each.is_maker)
                  for each in fills)


def test_six_hours_are_the_same_on_the_simulator(real_store):
    panel = real_store.panel("1h", end_ms=parse_utc(LAST) + 2 * HOUR)
    paper, simulator = compared(panel.select(panel.symbols[:8]), 6)
    assert sum(map(len, paper.wanted)) > 5
    assert len(simulator.fills) > 3


def main(hours: int) -> None:
    "Compare more hours and say how long it took."
    from xsmom_nb.market.synthetic import open_panel

    paper, simulator = compared(open_panel(Config(), end_ms=parse_utc(LAST) + 2 * HOUR), hours)
    print(f"{hours} hours: {sum(map(len, paper.wanted))} orders, {len(paper.fills)} fills, the same on both; "
          f"paper {paper.seconds:.0f} s, simulator {simulator.seconds:.0f} s, equity {simulator.accounts[-1].equity}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
