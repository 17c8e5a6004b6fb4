"""The live cycle on the simulator, by one option, against the same hours on paper; 48 of them: `xsmom proof simulator`."""

import pytest

from xsmom_nb.clock import parse_utc
from xsmom_nb.config import Config
from xsmom_nb.ops.twins import compare_hours

pytest.importorskip("ccxt", reason="no package ccxt found")
HOUR = 3_600_000
FIRST = parse_utc("2025-03-31T18:00:00Z")  # before the holdout


def test_six_hours_are_the_same_on_the_simulator(real_store):
    panel = real_store.panel("1h", end_ms=FIRST + 8 * HOUR)
    twins = compare_hours(Config(), panel.select(panel.symbols[:8]), FIRST + HOUR + 60_000, 6)
    assert twins.apart == []
    assert sum(map(len, twins.paper.wanted)) > 5
    assert len(twins.simulator.fills) > 3
    assert all(outcome == "accepted" for hour in twins.simulator.outcomes for _, outcome in hour)
