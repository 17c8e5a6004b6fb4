"""A small sample of `xsmom honesty`: where there is nothing, nothing is deployed, and where there is much, something is."""

from dataclasses import replace

import pytest

from xsmom_nb.config import with_values
from xsmom_nb.market.panel import resample
from xsmom_nb.optimizer.discovery import (
    TIMEFRAME,
    Case,
    cases_path,
    examine,
    market_of,
    read_rows,
    run_cases,
    seeds_of,
    standard_bench,
)
from xsmom_nb.optimizer.rates import answers, rate_table

BENCH = standard_bench()
PLANTED = [Case("planted", seed, 1.0, 5.0) for seed in seeds_of(1, "planted", 2)]
NOISE = [Case("noise", seed) for seed in seeds_of(1, "noise", 2)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "Cases of two kinds in two processes, the rows in the order of the cases, and the file they were written to."
    kept = tmp_path_factory.mktemp("honesty")
    return run_cases([*PLANTED, *NOISE], BENCH, None, kept, processes=2), kept


def test_noise_is_refused_and_an_edge_is_deployed(rows):
    found, _ = rows
    assert [row["name"] for row in found] == [case.name for case in (*PLANTED, *NOISE)]
    table = rate_table(found)
    assert table.loc["planted", "deployed"].item() >= 1
    assert all(row["reference"] > 3 for row in found[:2])
    assert table.xs("noise", level="kind")["deployed"].item() == 0
    assert answers(table)[0].holds is None  # two markets prove nothing, and it says so


def test_what_processes_found_is_found_here_and_is_not_looked_for_twice(rows, tmp_path):
    "The same seed is the same case anywhere; what is written down is taken as it is."
    found, kept = rows
    alone, = run_cases(NOISE[:1], BENCH, None, tmp_path, processes=1)
    assert {**alone, "seconds": 0} == {**found[2], "seconds": 0}
    path = cases_path(kept, BENCH, None)
    before = path.read_bytes()
    assert run_cases([*PLANTED, *NOISE], BENCH, None, kept, processes=1) == found
    assert path.read_bytes() == before
    assert len(read_rows(path)) == 4


def test_the_verdict_does_not_depend_on_what_is_left_out(rows):
    "Every figure of a case that was deployed, and of one that was not because of its stress."
    deployed = next(case for case, row in zip(PLANTED, rows[0], strict=False) if row["approved"])
    panel = market_of(deployed, BENCH)
    strict = replace(BENCH, base=with_values(BENCH.base, {"optimizer.gate.max_p95_drawdown_pct": 0.5}))
    for bench, approved in ((BENCH, True), (strict, False)):
        quick, whole = (examine(panel, bench, deployed.seed, thorough) for thorough in (False, True))
        assert quick["approved"] == whole["approved"] == approved
        assert set(quick["refused_for"]) <= set(whole["refused_for"])
    assert quick["holdout"] is None
    assert whole["holdout"] is not None


def test_the_real_market_without_its_order_is_refused(real_panel, tmp_path):
    bars = resample(real_panel, TIMEFRAME)
    found = run_cases([Case("control", seed) for seed in seeds_of(1, "control", 2)], BENCH, bars, tmp_path, processes=1)
    assert [row["approved"] for row in found] == [False, False]
    assert all(row["error"] is None and row["deflated_sharpe"] is not None for row in found)
