"""Stress against known answers: resampled luck against theory, late fills against the kernel on real bars."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from xsmom_nb.backtest.prepared import prepare_run, run_prepared
from xsmom_nb.config import Config, with_values
from xsmom_nb.optimizer.resampling import bootstrap_returns
from xsmom_nb.optimizer.shocks import Multipliers, Variant, dearer, run_late, run_variants

YEAR = 8_760.0


def walk(volatility: float, drift: float, bars: int = 8_760) -> np.ndarray:
    "Returns whose logarithms have exactly this volatility and drift a year."
    noise = np.random.default_rng(0).standard_normal(bars)
    noise = (noise - noise.mean()) / noise.std()
    return np.expm1(drift / YEAR + volatility / math.sqrt(YEAR) * noise)


def test_independent_returns_spread_like_theory():
    "A year's Sharpe ratio has a standard error of one (Lo 2002), whatever the Sharpe ratio of the sample."
    found = bootstrap_returns(walk(0.3, 0.5), YEAR, paths=600, block_bars=1, seed=1).sharpe
    assert found.p95 - found.p5 == pytest.approx(2 * NormalDist().inv_cdf(0.95), rel=0.1)
    assert found.p50 == pytest.approx((0.5 + 0.045) / 0.3, abs=0.15)


def test_ruin_is_that_of_a_walk_with_drift():
    "The first passage of a Brownian motion with drift through a lower line."
    volatility, drift, line = 0.7, -0.2, math.log(0.5)
    normal = NormalDist(0.0, volatility)
    expected = normal.cdf(line - drift) + math.exp(2 * drift * line / volatility**2) * normal.cdf(line + drift)
    found = bootstrap_returns(walk(volatility, drift), YEAR, paths=600, block_bars=1, seed=2, ruin_share=0.5)
    assert found.ruin_probability == pytest.approx(expected, abs=0.06)
    assert found.max_drawdown.p5 > 0.2


def test_blocks_keep_losing_streaks():
    "Where losses come in a row, blocks fall deeper than single bars."
    streaks = np.repeat(np.random.default_rng(3).choice([-0.002, 0.0021], 200), 44)
    one, block = (bootstrap_returns(streaks, YEAR, 200, bars, seed=4).max_drawdown.p50 for bars in (1, 168))
    assert block > 2 * one


@pytest.mark.parametrize(
    "values",
    [{}, {"strategy.rebalance_every_bars": 8, "strategy.rebalance_offset_bars": 3, "risk.max_daily_loss_pct": 1.0}],
    ids=["defaults", "every 8 bars, tight limits"],
)
def test_late_fills_without_delay_are_the_backtest(real_panel, values):
    panel = real_panel.slice(start_ms=int(real_panel.open_time_ms[-2_000]))
    config = with_values(Config(), values)
    prepared = prepare_run(panel, config)
    exact, _ = run_prepared(prepared, config, 500, 1_800, detailed=False)
    prompt = run_late(prepared, config, 500, 1_800, delay_bars=0)
    for name in ("equity", "turnover", "fees", "slippage", "funding"):
        np.testing.assert_array_equal(getattr(prompt, name), getattr(exact, name))
    assert not np.array_equal(run_late(prepared, config, 500, 1_800).equity, exact.equity)


def test_dearer_by_nothing_is_the_backtest(real_panel):
    panel = real_panel.slice(start_ms=int(real_panel.open_time_ms[-1_500]))
    prepared = prepare_run(panel, Config())
    variants = [Variant("", {}, prepared, Config()), Variant("", {}, *dearer(prepared, Config(), Multipliers()))]
    same, dear = run_variants(variants, 500, 1_500)
    assert same == dear
    twice = run_variants([Variant("", {}, *dearer(prepared, Config(), Multipliers(funding=50.0)))], 500, 1_500)[0]
    assert twice.metrics["total_return"] != same.metrics["total_return"]
