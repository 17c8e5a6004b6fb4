"""Tomorrow must not reach today: every exported stage that sees a whole panel, and the core, on the whole real panel."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xsmom_nb.backtest.vector import backtest
from xsmom_nb.clock import bars_per_day
from xsmom_nb.config import Config, with_values
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.universe import day_quote_volume, finite_runs
from xsmom_nb.strategy.core import core_parameters, core_weights, fresh_memory, prepare, remember_row
from xsmom_nb.strategy.filters import REGISTRY
from xsmom_nb.strategy.indicators import adx, atr, ema, rsi

CONFIG = with_values(Config(), {"filters.adx.enabled": True, "filters.adx.min_adx": 15.0})


def remembered(panel: Panel, what: str) -> np.ndarray:
    "One array of the core's memory after each row, shape (T, N) or (T, 1)."
    market, parameters = prepare(panel, CONFIG), core_parameters(CONFIG, panel.timeframe)
    memory, rows = fresh_memory(market, parameters), []
    for t in range(panel.shape[0]):
        remember_row(market, parameters, memory, t)
        rows.append(memory.spread[t : t + 1].copy() if what == "spread" else getattr(memory, what).copy())
    return np.array(rows, dtype=np.float64)


STAGES: dict[str, Callable[[Panel], np.ndarray]] = {
    "ema": lambda panel: ema(panel.close, 50),
    "atr": lambda panel: atr(panel.high, panel.low, panel.close, 28),
    "rsi": lambda panel: rsi(panel.close, 14),
    "adx": lambda panel: adx(panel.high, panel.low, panel.close, 14),
    "finite_runs": lambda panel: finite_runs(panel.close),
    "day_quote_volume": lambda panel: day_quote_volume(panel.close, panel.volume, bars_per_day(panel.timeframe)),
    **{f"filter {each.name}": (lambda panel, each=each: each.feature(panel, CONFIG)) for each in REGISTRY},
    "core": lambda panel: core_weights(panel, CONFIG),
    "held weights": lambda panel: backtest(panel, CONFIG, holdout=True).weights.to_numpy(),
    "equity": lambda panel: backtest(panel, CONFIG, holdout=True).equity.to_numpy(),
}
MEMORIES = ("members", "volatility", "spread")


def with_future(panel: Panel, cut: int, how: str, seed: int) -> Panel:
    "The panel with everything after row `cut` cut off, shuffled or replaced."
    if how == "truncate":
        return panel.slice(end_ms=int(panel.open_time_ms[cut]))
    rng, later = np.random.default_rng(seed), np.arange(cut + 1, panel.shape[0])
    arrays = {}
    order, factor = rng.permutation(later), np.exp(rng.normal(0, 0.5, (later.size, panel.shape[1])))
    for name in ("open", "high", "low", "close", "volume", "funding"):
        array = getattr(panel, name).copy()
        array[later] = array[order] if how == "shuffle" else array[later] * (1.0 if name == "funding" else factor)
        arrays[name] = array
    return replace(panel, **arrays)


@pytest.fixture(scope="module")
def present(real_panel):
    "Every stage on the whole panel, once."
    return {name: stage(real_panel) for name, stage in STAGES.items()}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.05, 0.98), how=st.sampled_from(["truncate", "shuffle", "replace"]), seed=st.integers(0, 2**32 - 1))
def test_the_future_changes_no_earlier_row(real_panel, present, share, how, seed):
    cut = int(share * real_panel.shape[0])
    other = with_future(real_panel, cut, how, seed)
    for name, stage in STAGES.items():
        told = f"{name} after {how} at row {cut}"
        np.testing.assert_array_equal(stage(other)[: cut + 1], present[name][: cut + 1], err_msg=told)


@pytest.mark.parametrize("what", MEMORIES)
@pytest.mark.parametrize("how", ["truncate", "shuffle", "replace"])
def test_the_future_changes_no_memory(real_panel, what, how):
    piece = real_panel.slice(end_ms=int(real_panel.open_time_ms[2000]))
    other = with_future(piece, 1200, how, seed=1)
    np.testing.assert_array_equal(remembered(other, what)[:1201], remembered(piece, what)[:1201])


def test_a_stage_that_peeks_is_caught(real_panel):
    "The check itself can fail: a centred mean sees one bar of the future."
    piece = real_panel.slice(end_ms=int(real_panel.open_time_ms[800]))

    def centred(panel: Panel) -> np.ndarray:
        return np.vstack([panel.close[1:], panel.close[-1:]])

    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(centred(with_future(piece, 400, "replace", 0))[:401], centred(piece)[:401])


def test_symbol_order_changes_nothing(real_panel):
    "Give each column another name, so that the order of columns changes: every symbol keeps its weights."
    rng = np.random.default_rng(0)
    piece = real_panel.slice(start_ms=int(real_panel.open_time_ms[-3000]))
    n = piece.shape[1]
    order = rng.permutation(n)
    arrays = {name: getattr(piece, name)[:, order] for name in ("open", "high", "low", "close", "volume", "funding")}
    renamed = replace(piece, **arrays)
    weights, permuted = core_weights(piece, CONFIG), core_weights(renamed, CONFIG)
    assert np.abs(weights).sum() > 0
    np.testing.assert_allclose(permuted, weights[:, order], rtol=0, atol=1e-12)
