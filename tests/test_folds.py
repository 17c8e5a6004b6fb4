"""Folds on the real data, and row by row against skfolio's splitters."""

from importlib.util import find_spec

import numpy as np
import pytest

from xsmom_nb.config import Config, with_values
from xsmom_nb.errors import ConfigError
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.optimizer.folds import Rows, combinatorial, first_holdout_row, plan_folds, walk_forward
from xsmom_nb.optimizer.space import config_at, draw, longest_warmup_bars
from xsmom_nb.strategy.core import core_weights

with_skfolio = pytest.mark.skipif(find_spec("skfolio") is None, reason="no package skfolio found")


@pytest.fixture(scope="module")
def whole_panel(real_store) -> Panel:
    "The real bars, the holdout among them: only where they lie is looked at."
    return real_store.panel("1h")


def rows_of(*spans: Rows) -> np.ndarray:
    "Spans as the indices a splitter gives."
    return np.concatenate([np.arange(span.first, span.end) for span in spans])


@with_skfolio
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"train_bars": 4320, "test_bars": 1440, "count": 6, "purge_bars": 24},  # the defaults, on hours
        {"train_bars": 50, "test_bars": 7, "count": 11, "purge_bars": 0},
        {"train_bars": 5, "test_bars": 30, "count": 1, "purge_bars": 3},
    ],
)
def test_walk_forward_is_skfolios(settings, anchored):
    from skfolio.model_selection import WalkForward

    needed = settings["train_bars"] + settings["purge_bars"] + settings["count"] * settings["test_bars"]
    theirs = WalkForward(
        train_size=settings["train_bars"],
        test_size=settings["test_bars"],
        purged_size=settings["purge_bars"],
        expand_train=anchored,
    )
    ours = walk_forward(Rows(0, needed), **settings, anchored=anchored)
    pairs = list(theirs.split(np.zeros((needed, 1))))
    assert len(pairs) == len(ours) == settings["count"]
    for fold, (train, test) in zip(ours, pairs, strict=True):
        np.testing.assert_array_equal(rows_of(fold.train), train)
        np.testing.assert_array_equal(rows_of(fold.test), test)


@with_skfolio
@pytest.mark.parametrize(
    ("bars", "groups", "tested", "purge", "embargo"),
    [(1000, 10, 8, 0, 0), (1003, 6, 2, 24, 100), (1003, 6, 3, 24, 0), (997, 5, 2, 0, 150), (50, 3, 2, 1, 2)],
)
def test_combinatorial_splits_are_skfolios(bars, groups, tested, purge, embargo):
    from skfolio.model_selection import CombinatorialPurgedCV

    theirs = CombinatorialPurgedCV(n_folds=groups, n_test_folds=tested, purged_size=purge, embargo_size=embargo)
    ours = combinatorial(Rows(0, bars), groups, tested, purge, embargo)
    pairs = list(theirs.split(np.zeros((bars, 1))))
    assert len(pairs) == len(ours)
    for split, (train, tests) in zip(ours, pairs, strict=True):
        np.testing.assert_array_equal(rows_of(*split.train) if split.train else [], train)
        assert [test.tolist() for test in tests] == [rows_of(test).tolist() for test in split.tests]


@pytest.mark.parametrize("scheme", ["rolling", "anchored"])
def test_the_shipped_folds_fit_the_real_data(whole_panel, scheme):
    config = with_values(Config(), {"optimizer.scheme": scheme})
    plan = plan_folds(whole_panel, config)
    boundary = first_holdout_row(whole_panel, config)
    assert str(whole_panel.index[boundary])[:10] == "2025-04-01"
    assert len(plan.folds) == 6
    assert plan.usable == (longest_warmup_bars(config), boundary)
    assert plan.tested == (boundary - 168 - 6 * 60 * 24, boundary - 168)
    for fold in plan.folds:
        assert plan.usable.first <= fold.train.first
        assert fold.train.end + 24 == fold.test.first
        assert fold.train.bars >= 180 * 24
        assert fold.test.bars == 60 * 24
    assert plan.final.end == boundary - 24


def test_every_set_can_trade_from_the_first_usable_row():
    "The warm-up is long enough: no drawn set has its first universe after it."
    panel = synthetic_panel(seed=5, bars=1_800, symbols=6)
    base = with_values(Config(), {"filters.regime.slope_min_bps_per_day": 0.0, "strategy.entry_zscore_min": 0.0})
    first = longest_warmup_bars(base)
    for point in [{"lookback": 192, "vol_lookback": 168}, *draw(3, seed=2, names=["lookback", "vol_lookback", "decay"])]:
        weights = core_weights(panel, config_at(base, point))
        assert np.any(weights[first] != 0.0), point


def test_too_little_data_is_refused_in_days():
    panel = synthetic_panel(seed=5, bars=6_000, symbols=4)
    with pytest.raises(ConfigError, match=r"has 200\.0 days before the holdout .* 619\.2 are needed: 71\.2 to warm up"):
        plan_folds(panel, with_values(Config(), {"optimizer.holdout_start": "2023-07-20"}))
