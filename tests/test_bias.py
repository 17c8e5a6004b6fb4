"""Tomorrow, the seed and the alphabet must not reach today's decision: the bias laboratory over the whole real panel.

Every subject of ours passes on all real bars before the holdout, and one planted bias of each kind is found there, with its bar,
its symbol and its stage. Where the future is changed is fixed in the laboratory; hypothesis adds rows of its own.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xsmom_nb.backtest import subjects
from xsmom_nb.backtest.lookahead import (
    FUTURES,
    Bench,
    Subject,
    check_future,
    check_order,
    check_warm_up,
    examine,
    first_difference,
    set_up,
    spread_rows,
    with_future,
)
from xsmom_nb.backtest.subjects import all_subjects, core_stages, find_subjects, market_stages
from xsmom_nb.config import Config, with_values
from xsmom_nb.errors import DataError
from xsmom_nb.market.panel import FIELDS, Panel
from xsmom_nb.strategy import indicators
from xsmom_nb.strategy.core import core_parameters, core_weights, history_bars, prepare

CONFIG = with_values(Config(), {"filters.adx.enabled": True, "filters.adx.min_adx": 15.0, "filters.regime.mode": "aligned"})
OURS = all_subjects()
CUTS = {"core": 2, "backtest": 1}  # the slowest by far; 3 elsewhere


@pytest.fixture(scope="module")
def piece(real_panel) -> Panel:
    "The last 5,000 bars before the holdout."
    return real_panel.slice(start_ms=int(real_panel.open_time_ms[-5000]))


# ── Ours are clean ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", OURS)
def test_every_subject_is_clean_on_the_real_panel(real_panel, name):
    judged = examine(OURS[name], real_panel, CONFIG, cuts=CUTS.get(name, 3))
    assert {check: str(finding) for check, finding in judged.findings.items()} == {}
    left_open = {verdict.check for verdict in judged.verdicts if verdict.word == "open"}
    assert left_open == ({"warm-up"} if name == "backtest" else set())


def test_nothing_of_ours_is_left_out(piece):
    public = {f"indicator.{name}" for name in indicators.__all__} - {"indicator.check_panel"}
    assert public == {name for name in OURS if name.startswith("indicator.")}
    stages = core_stages(piece, CONFIG)
    np.testing.assert_array_equal(stages["weights"], core_weights(piece, CONFIG))  # the walk that keeps them is the core's
    assert {name for name in stages if not name.startswith("filter ")} == set(subjects.CORE_STAGES)


@pytest.fixture(scope="module")
def bench(real_panel) -> Bench:
    return set_up(OURS["core"], real_panel, CONFIG)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.05, 0.98), kind=st.sampled_from(FUTURES))
def test_another_future_changes_no_stage_of_the_core(bench, share, kind):
    row = int(share * bench.panel.shape[0])
    changed = bench.changed(with_future(bench.panel, row, kind))
    assert first_difference(bench.whole, changed, 0.0, last_row=row) is None


# ── Planted ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def centred(panel: Panel, config: Config) -> np.ndarray:
    "A rolling mean around the bar, 12 bars to either side."
    sums = np.nancumsum(panel.close, axis=0)
    out = np.full(panel.shape, np.nan)
    out[13:-12] = (sums[25:] - sums[:-25]) / 25
    return out


def standardised(panel: Panel, config: Config) -> np.ndarray:
    "A z-score with the moments of the whole history."
    return (panel.close - np.nanmean(panel.close, axis=0)) / np.nanstd(panel.close, axis=0)


def tomorrow(panel: Panel, config: Config) -> np.ndarray:
    "A sign error: the next return, `shift(-1)`."
    return np.vstack([panel.close[1:] / panel.close[:-1] - 1.0, np.full((1, panel.shape[1]), np.nan)])


def unforgetting(panel: Panel, config: Config) -> np.ndarray:
    "A recursion that carries its first value along for ever."
    out, value = np.empty(panel.shape), np.nan_to_num(panel.close[0])
    for t in range(panel.shape[0]):
        change = panel.close[t] / panel.close[max(t - 1, 0)] - 1.0
        value = value + 0.1 * np.where(np.isfinite(change), change, 0.0)
        out[t] = value
    return out


def by_place(panel: Panel, config: Config) -> np.ndarray:
    "An argsort taken for ranks."
    return np.argsort(np.nan_to_num(panel.close[24:] / panel.close[:-24]), axis=1, kind="stable")


def listed_at_the_end(panel: Panel, config: Config) -> np.ndarray:
    "The closes of the survivors."
    return np.where(np.isfinite(panel.close[-1]), panel.close, 0.0)


PLANTED = {
    centred: {"prefix", "future"},
    standardised: {"prefix", "future", "warm-up"},
    tomorrow: {"prefix", "future"},
    unforgetting: {"warm-up"},
    by_place: {"order"},
    listed_at_the_end: {"future"},
}


@pytest.mark.parametrize(("planted", "checks"), PLANTED.items(), ids=[each.__name__ for each in PLANTED])
def test_a_planted_bias_of_each_kind_is_found(piece, planted, checks):
    complete = piece.select([symbol for i, symbol in enumerate(piece.symbols) if np.isfinite(piece.close[:, i]).all()])
    subject = Subject(planted.__name__, planted, lambda config: 500, 1e-12)
    findings = examine(subject, complete, CONFIG, cuts=4).findings
    assert set(findings) == checks
    for finding in findings.values():
        assert finding.stage == planted.__name__
        assert finding.symbol in complete.symbols
        assert finding.time_ms in complete.open_time_ms
        assert finding.expected != finding.found


@pytest.mark.parametrize(
    ("planted", "first", "ahead"),
    [(centred, 13, "12 bars ahead"), (tomorrow, 0, "1 bar ahead"), (standardised, 0, "to the end of the data")],
)
def test_a_finding_names_the_first_bar_and_how_far_it_looks(piece, planted, first, ahead):
    "With the value that somebody would compute by hand at that bar."
    bench = set_up(Subject("planted", planted, None, 1e-12), piece, CONFIG)
    finding = check_future(bench, ("cut",), spread_rows(500, 4998, 3)).finding
    column = int(np.flatnonzero(np.isfinite(bench.whole["planted"].values[first]))[0])
    assert (finding.time_ms, finding.symbol) == (piece.open_time_ms[first], piece.symbols[column])
    assert finding.expected == planted(piece, CONFIG)[first, column]
    assert np.isnan(finding.found)
    assert ahead in finding.remark


@pytest.mark.parametrize(("array", "stage"), [("features", "filter adx"), ("day_volume", "day_volume"), ("returns", "returns")])
def test_a_bias_in_the_core_is_named_by_its_stage(piece, array, stage):
    "Its last input is moved back by two bars; the weights, and much before them, are wrong after that."
    config = with_values(CONFIG, {"exchange.max_symbols": 20})

    def spoiled(panel: Panel, config: Config) -> dict[str, np.ndarray]:
        market = prepare(panel, config)
        moved = getattr(market, array).copy()
        target = moved[-1] if array == "features" else moved  # of the filters the second
        target[:-2] = target[2:].copy()
        return market_stages(market._replace(**{array: moved}), core_parameters(config, panel.timeframe), ["regime", "adx"])

    bench = set_up(Subject("core", spoiled, None), piece, config)
    finding = check_future(bench, ("cut",), [3000]).finding
    assert finding.stage == stage
    assert finding.remark == "it looks 2 bars ahead"


# ── What is declared ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_history_declared_too_short_is_found(piece):
    short = with_values(CONFIG, {"live.history_bars": 800})
    verdict = check_warm_up(set_up(OURS["core"], piece, short))
    assert verdict.finding.stage == "filter regime"
    assert 800 < max(verdict.bars.values()) <= history_bars(CONFIG)
    assert f"it needs {max(verdict.bars.values()):,} bars" == verdict.finding.remark
    assert check_warm_up(set_up(find_subjects(["core.momentum"])[0], piece, short)).bars == {"core.momentum": 97}


def test_an_exact_tie_is_decided_by_name_and_is_no_finding(piece):
    piece = piece.slice(start_ms=int(piece.open_time_ms[-1500]))
    twins = {name: getattr(piece, name).copy() for name in (*FIELDS, "funding")}
    for array in twins.values():
        array[:, 5] = array[:, 9]
    verdict = check_order(set_up(OURS["core"], replace(piece, **twins), CONFIG))
    assert (verdict.word, verdict.remark) == ("ok", "but for exact ties")
    assert check_order(set_up(OURS["core"], piece, CONFIG)).remark == ""


def test_a_subject_that_says_nothing_is_refused(piece):
    with pytest.raises(DataError, match="a check of nothing proves nothing"):
        examine(OURS["core"], piece.slice(end_ms=int(piece.open_time_ms[100])), CONFIG)
