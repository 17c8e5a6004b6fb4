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

FEW = ("lookback", "vol_lookback", "trade_rate", "rebalance_every_bars", "k_min")  # parameters, so that it takes seconds
BENCH = replace(standard_bench(), names=FEW, base=with_values(standard_bench().base, {"optimizer.trials": 12}))
EDGE = Case("planted", seeds_of(1, "planted", 5)[4], 0.7, 2.5)  # here it is seen; `make honesty` counts how often
NOISE = Case("noise", seeds_of(1, "noise", 1)[0])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "Cases of two kinds in two processes, the rows in the order of the cases, and the file they were written to."
    kept = tmp_path_factory.mktemp("honesty")
    return run_cases([EDGE, NOISE], BENCH, None, kept, processes=2), kept


def test_noise_is_refused_and_an_edge_is_deployed(rows):
    found, _ = rows
    assert [row["name"] for row in found] == [case.name for case in (EDGE, NOISE)]
    table = rate_table(found)
    assert found[0]["reference"] > 2
    assert table["deployed"].tolist() == [1, 0]
    assert answers(table)[0].holds is None  # one market proves nothing, and it says so


def test_what_processes_found_is_found_here_and_is_not_looked_for_twice(rows, tmp_path):
    "The same seed is the same case anywhere; what is written down is taken as it is."
    found, kept = rows
    alone, = run_cases([NOISE], BENCH, None, tmp_path, processes=1)
    assert {**alone, "seconds": 0} == {**found[1], "seconds": 0}
    path = cases_path(kept, BENCH, None)
    before = path.read_bytes()
    assert run_cases([EDGE, NOISE], BENCH, None, kept, processes=1) == found
    assert path.read_bytes() == before
    assert len(read_rows(path)) == 2


def test_the_verdict_does_not_depend_on_what_is_left_out(rows):
    "A case that is deployed has every figure; what noise is refused for is refused with every figure too."
    quick, panel = rows[0][0], market_of(EDGE, BENCH)
    whole = examine(panel, BENCH, EDGE.seed, thorough=True)
    assert {name: quick[name] for name in whole} == whole
    refused, everything = rows[0][1], examine(market_of(NOISE, BENCH), BENCH, NOISE.seed, thorough=True)
    assert refused["approved"] == everything["approved"] is False
    assert set(refused["refused_for"]) <= set(everything["refused_for"])
    assert (refused["holdout"] is None, everything["holdout"] is None) == (True, False)


def test_the_real_market_without_its_order_is_refused(real_panel, tmp_path):
    bars = resample(real_panel, TIMEFRAME)
    row, = run_cases([Case("control", seeds_of(1, "control", 1)[0])], BENCH, bars, tmp_path, processes=1)
    assert (row["approved"], row["error"]) == (False, None)
    assert 0.0 < row["deflated_sharpe"] < 0.95
