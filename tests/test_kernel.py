"""The compiled walk against a row at a time, against books in coins and cash, and on data that would break a careless one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmom_nb.backtest.batch import iterate_batch, run_batch
from xsmom_nb.backtest.books import EXIT_REASONS, REASON, profit
from xsmom_nb.backtest.prepared import plan_run, prepare_run, run_prepared
from xsmom_nb.backtest.vector import backtest
from xsmom_nb.config import Config, with_values
from xsmom_nb.errors import ConfigError, DataError, UsageError
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.risk.exits import Tick, fill_position, step_position
from xsmom_nb.risk.limits import BANNED_UNTIL_MS, TRADES, account_drawdown, book_symbol_pnl, empty_account, step_account
from xsmom_nb.risk.overlays import stepdown_scale, wanted_share
from xsmom_nb.risk.throttle import FREE, note_stop_out, throttle_row
from xsmom_nb.strategy.core import core_weights

FIELDS = ("open", "high", "low", "close", "volume")
QUICK = {"strategy.lookbacks": [3, 6, 12, 24], "strategy.vol_lookback": 24, "filters.regime.ema_len": 20,
         "filters.regime.slope_bars": 6, "vol_target.lookback_bars": 24, "strategy.k_max": 3, "risk.atr_len": 7}


def with_gaps(panel: Panel, gaps: list[tuple[int, int, int]]) -> Panel:
    "A panel without the bars (symbol, first row, rows) of `gaps`."
    arrays = {name: getattr(panel, name).copy() for name in FIELDS}
    funding = panel.funding.copy()
    for symbol, first, rows in gaps:
        for array in arrays.values():
            array[first : first + rows, symbol] = np.nan
        funding[first : first + rows, symbol] = 0.0
    return replace(panel, **arrays, funding=funding)


@st.composite
def panels(draw):
    "Random markets with late listings, delistings, holes, bad prints and bars without volume."
    seed, symbols = draw(st.integers(0, 10_000)), draw(st.integers(3, 9))
    panel = synthetic_panel(seed=seed, bars=360, symbols=symbols)
    heads = [(i, 0, draw(st.integers(1, 150))) for i in draw(st.sets(st.integers(0, symbols - 1), max_size=2))]
    tails = [(i, 360 - rows, rows) for i, rows in [(draw(st.integers(0, symbols - 1)), draw(st.integers(1, 120)))]]
    holes = [(draw(st.integers(0, symbols - 1)), draw(st.integers(100, 300)), draw(st.integers(1, 30))) for _ in range(2)]
    panel = with_gaps(panel, heads + tails + holes)
    row, symbol = draw(st.integers(120, 300)), draw(st.integers(0, symbols - 1))
    volume = panel.volume.copy()
    volume[row : row + 3, symbol] *= 0.0
    bad = {name: getattr(panel, name).copy() for name in ("high", "close")}
    if draw(st.booleans()):
        for array in bad.values():
            array[row - 40, symbol] *= 1000.0  # a print that a feed sends when it is tired
    return replace(panel, volume=volume, **bad)


@given(panel=panels(), rows=st.sets(st.integers(60, 359), min_size=3, max_size=5), every=st.sampled_from([1, 4]))
@settings(max_examples=25, deadline=None)
def test_the_walk_decides_as_a_row_alone_does(panel, rows, every):
    "Targets of the kernel against the core asked for one row of a panel that ends there."
    config = with_values(Config(), {**QUICK, "strategy.rebalance_every_bars": every, "backtest.risk": "core"})
    series, _ = run_prepared(prepare_run(panel, config), config)
    for row in (row for row in rows if series.equity[row] > 0.0):  # a print of a thousand times the price ruins a short
        alone = core_weights(panel.slice(end_ms=int(panel.open_time_ms[row])), config, rows=1)[0]
        np.testing.assert_allclose(series.targets[row], alone, rtol=0, atol=1e-12)


class Ledger:
    "An account in coins and cash whose positions, limits and pauses are records: the hour as the trader would live it."

    def __init__(self, panel: Panel, config: Config):
        self.panel, self.config = panel, config
        prepared = prepare_run(panel, config)
        self.plan, n = plan_run(prepared, config), panel.shape[1]
        self.cash, self.coins, self.last = config.backtest.initial_equity, np.zeros(n), np.full(n, np.nan)
        self.positions, self.account = [None] * n, empty_account()
        self.pauses, self.losses = np.zeros((n, 3)), np.zeros((n, 3))
        returns = np.full(panel.close.shape, np.nan)
        returns[1:] = panel.close[1:] / panel.close[:-1] - 1.0
        self.returns = returns

    @property
    def equity(self) -> float:
        return float(self.cash + np.nansum(self.coins * self.last))

    def volatility(self, t: int, i: int) -> float:
        length = self.config.strategy.vol_lookback
        return float(np.std(self.returns[t - length + 1 : t + 1, i], ddof=1)) if t >= length else np.nan

    def fill(self, t: int, i: int, coins: float, price: float, taker: bool, dead: bool = False) -> float:
        "Trade coins at a price; the fee and the slippage are paid from the cash."
        costs, notional = self.config.costs, abs(coins) * price
        blend = costs.maker_ratio * costs.maker_bps + (1 - costs.maker_ratio) * costs.taker_bps
        slipped = costs.slippage_bps
        if not dead:
            impact = costs.impact_coef * self.volatility(t, i) * 1e4 * np.sqrt(
                notional / (self.panel.close[t, i] * self.panel.volume[t, i]))
            slipped += impact if np.isfinite(impact) else 0.0
        paid = notional * ((costs.taker_bps if taker else blend) + slipped) / 1e4
        self.cash -= coins * price + paid
        before, self.coins[i] = self.coins[i], self.coins[i] + coins
        self.coins[i] = 0.0 if abs(self.coins[i]) < 1e-12 * abs(before) else self.coins[i]
        return paid

    def follow(self, t: int, i: int, before: float, price: float) -> None:
        "What a fill does to the record of a position."
        now_ms, after = self.plan.flows.close_ms[t], self.coins[i]
        atr = float(self.plan.flows.atr[t, i])
        self.positions[i] = fill_position(
            self.positions[i], before, after, price, atr if np.isfinite(atr) else None, None, int(now_ms), self.plan.watch.exits)

    def hour(self, t: int, targets: np.ndarray, rebalancing: bool) -> None:
        "Inside the bar, then its close."
        panel, flows, watch = self.panel, self.plan.flows, self.plan.watch
        bars = [getattr(panel, name)[t] for name in ("open", "high", "low", "close")]
        now_ms, start = flows.close_ms[t], self.coins * np.nan_to_num(self.last)
        pnl = -start * panel.funding[t]
        self.cash += pnl.sum()
        for i in np.flatnonzero(self.coins):
            if not panel.close[t, i] * panel.volume[t, i] > 0.0:
                continue
            tick = Tick(int(now_ms), *(float(bar[i]) for bar in bars))
            self.positions[i], left = step_position(self.positions[i], tick, watch.exits)
            for each in left:
                before, held = self.coins[i], self.positions[i]
                paid = self.fill(t, i, -before * each.fraction, each.price, taker=True)
                pnl[i] += before * each.fraction * (each.price - self.last[i]) - paid
                if each.fraction == 1.0:
                    self.coins[i] = 0.0
                    self.positions[i] = held
                    self.follow(t, i, before, each.price)
                    if each.reason.endswith("stop"):
                        note_stop_out(self.pauses[i], now_ms, watch.throttle)
        fresh = np.where(np.isfinite(panel.close[t]), panel.close[t], self.last)
        pnl += np.nan_to_num(self.coins * (fresh - self.last))
        self.last = fresh
        if self.equity > 0.0:
            self.close(t, targets, rebalancing, pnl, start != 0.0)

    def close(self, t: int, targets: np.ndarray, rebalancing: bool, pnl: np.ndarray, was_held: np.ndarray) -> None:
        "Judge, overlay, throttle, trade."
        panel, watch, now_ms, equity = self.panel, self.plan.watch, self.plan.flows.close_ms[t], self.equity
        verdict = step_account(self.account, equity, now_ms, watch.limits)
        for i in np.flatnonzero((pnl != 0.0) | (self.coins != 0.0)):
            book_symbol_pnl(self.losses[i], pnl[i], self.account.fields[1], now_ms, watch.limits)
        banned = self.losses[:, BANNED_UNTIL_MS] > now_ms
        remaining = np.array([1.0 if position is None or position.direction * target <= 0 else position.remaining
                              for position, target in zip(self.positions, targets, strict=True)])
        limit = self.config.sizing.max_notional_per_asset / equity
        stepdown = stepdown_scale(account_drawdown(self.account, equity), watch.overlays)
        wanted = np.clip(targets * stepdown * remaining, -limit, limit)
        verdicts = np.zeros(len(targets), dtype=np.int64)
        shares = self.coins * np.nan_to_num(self.last) / equity
        throttle_row(shares, wanted, self.pauses, self.losses, now_ms, watch.throttle, verdicts)
        for i in range(len(targets)):
            dead, share = not np.isfinite(panel.close[t, i]), shares[i]
            if rebalancing:
                enters = verdict == TRADES and verdicts[i] == FREE
                share = wanted_share(shares[i], wanted[i], equity, enters, 1e18, self.config.execution.trade_rate,
                                     self.config.execution.rebalance_band)
            forced = bool(banned[i]) or (verdict != TRADES and watch.limits.closes)
            share = 0.0 if forced else share
            share = shares[i] if not dead and not panel.volume[t, i] > 0.0 else share
            share = 0.0 if dead else share
            if share != shares[i]:
                before = self.coins[i]
                coins = -before if share == 0.0 else (share - shares[i]) * equity / self.last[i]
                paid = self.fill(t, i, coins, self.last[i], taker=dead or forced, dead=dead)
                self.follow(t, i, before, self.last[i])
                book_symbol_pnl(self.losses[i], -paid, self.account.fields[1], now_ms, watch.limits)


NO_STREAKS = {"throttle.max_losing_streak": 1000}  # the ledger counts no losing streaks
CASES = {
    "the source's exits": {},
    "only the catastrophic stop": {"risk.atr_mult_sl": 0, "risk.trail_atr_mult": 0, "risk.breakeven_after_r": 0,
                                   "risk.partial_tp_ladder": []},
    "wide stops, two rungs": {"risk.atr_mult_sl": 4, "risk.trail_atr_mult": 5,
                              "risk.partial_tp_ladder": [[0.5, 0.3], [1.5, 0.3]]},
    "tight limits, closing": {"risk.max_daily_loss_pct": 0.3, "risk.max_drawdown_pct": 1.5, "risk.on_kill": "close",
                              "risk.max_symbol_daily_loss_pct": 0.15, "risk.dd_stepdown.start_pct": 0.2,
                              "risk.dd_stepdown.full_pct": 1.0, "backtest.hard_kill_resume_days": 2},
    "few places": {"throttle.cooldown_after_stop_bars": 12, "execution.trade_rate": 0.4, "risk.max_hold_hours": 30},
}


@pytest.mark.parametrize("case", CASES)
@given(panel=panels(), every=st.sampled_from([1, 4]))
@settings(max_examples=6, deadline=None)
def test_books_in_shares_and_books_in_coins_agree(case, panel, every):
    "Equity of the kernel with all of its risk against an account of coins and cash that lives hour by hour."
    config = with_values(Config(), {**QUICK, **NO_STREAKS, "strategy.rebalance_every_bars": every, **CASES[case]})
    series, _ = run_prepared(prepare_run(panel, config), config)
    ledger = Ledger(panel, config)
    for t in range(panel.shape[0]):
        number = int(ledger.plan.market.bar_number[t])
        ledger.hour(t, series.targets[t], number % every == 0)
        if series.equity[t] == 0.0:
            assert ledger.equity <= 0.0
            break
        assert ledger.equity == pytest.approx(series.equity[t], rel=1e-10), (t, case)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
CALM = synthetic_panel(seed=11, bars=400, symbols=8)
FULL, CORE = (with_values(Config(), {**QUICK, "backtest.risk": risk}) for risk in ("full", "core"))


def equity_of(panel: Panel, config: Config) -> np.ndarray:
    return run_prepared(prepare_run(panel, config), config)[0].equity


@pytest.mark.parametrize("config", [FULL, CORE], ids=["full", "core"])
def test_prices_of_any_size_stand_side_by_side(config):
    "The unit of a coin is a convention: 1e-8 and 1e6 a coin give the same equity."
    scale = np.array([1e-10, 1e4, 1.0, 1e-6, 10.0, 1e3, 1e-3, 1e2])
    scaled = {name: getattr(CALM, name) * scale for name in ("open", "high", "low", "close")}
    np.testing.assert_allclose(
        equity_of(replace(CALM, **scaled, volume=CALM.volume / scale), config), equity_of(CALM, config), rtol=1e-9)


@pytest.mark.parametrize("config", [FULL, CORE], ids=["full", "core"])
def test_a_day_without_bars_closes_the_book_and_the_next_opens_it(config):
    "In a backtest a missing close is a delisting: everything is closed at its last price, nothing is earned or lost meanwhile."
    whole = run_prepared(prepare_run(CALM, config), config)[0]
    assert whole.exposure[300] > 0
    holed, trades = run_prepared(prepare_run(with_gaps(CALM, [(i, 301, 24) for i in range(8)]), config), config)
    assert (holed.exposure[301:325] == 0).all()
    assert (holed.equity[301:325] == holed.equity[301]).all()
    assert "delisted" in {EXIT_REASONS[int(reason)] for reason in trades[:, REASON]}
    assert sum(profit(trade) for trade in trades) == pytest.approx(holed.equity[-1] - 10_000.0, abs=1e-6)


@pytest.mark.parametrize("config", [FULL, CORE], ids=["full", "core"])
def test_a_bar_without_volume_is_not_traded_on(config):
    "Neither at its close nor by a stop inside it."
    still = replace(CALM, volume=CALM.volume * (np.arange(400) < 200)[:, None])
    series = run_prepared(prepare_run(still, config), config)[0]
    assert series.exposure[199] > 0
    assert (series.turnover[200:] == 0).all()
    assert (series.fees[200:] == 0).all()


def test_nobody_left_after_the_filters_means_no_trade():
    "A slope that nothing reaches: the equity does not move."
    config = with_values(FULL, {"filters.regime.slope_min_bps_per_day": 10_000.0})
    result = backtest(CALM, config, holdout=True)
    assert (result.equity["equity"] == 10_000.0).all()
    assert result.trades.empty


def test_numbers_that_are_none_are_refused():
    "Infinity in a price, a negative volume, funding that is not there."
    for name, value in (("close", np.inf), ("high", -1.0), ("volume", -1.0), ("funding", np.nan)):
        array = getattr(CALM, name).copy()
        array[100, 3] = value
        with pytest.raises(DataError, match=f"{CALM.symbols[3]}.*{name}"):
            replace(CALM, **{name: array})


def test_configs_that_contradict_each_other_are_refused_before_anything_runs():
    "Within one config, and between two that share their arrays."
    with pytest.raises(ConfigError, match="k_min"):
        with_values(FULL, {"strategy.k_min": 9, "strategy.k_max": 3})
    prepared = prepare_run(CALM, FULL)
    with pytest.raises(UsageError, match=r"config 1 of 2: risk\.atr_len = 9: these arrays were prepared with 7"):
        run_batch(prepared, [FULL, with_values(FULL, {"risk.atr_len": 9})])


def drawn(count: int) -> list[Config]:
    "Configs all over the search space."
    rng = np.random.default_rng(3)
    return [with_values(FULL, {
        "strategy.signal_power": float(rng.uniform(0.5, 2)),
        "strategy.lookbacks": [int(length * rng.integers(2, 5)) for length in (1, 2, 4, 8)],
        "strategy.lookback_weights": [float(rng.uniform(0.4, 1.6)) ** j for j in range(4)],
        "strategy.vol_lookback": int(rng.integers(12, 60)), "strategy.k_min": 2, "strategy.k_max": int(rng.integers(2, 5)),
        "strategy.kappa": float(rng.uniform(0, 2)), "strategy.entry_zscore_min": float(rng.uniform(0, 0.7)),
        "execution.trade_rate": float(rng.uniform(0.05, 1)), "strategy.max_weight_per_asset": float(rng.uniform(0.08, 0.3)),
        "execution.rebalance_band": float(rng.uniform(0, 0.08)),
        "filters.regime.slope_min_bps_per_day": float(rng.uniform(0, 80)),
        "sizing.weighting": str(rng.choice(["signal_inverse_vol", "inverse_vol", "equal"])),
        "strategy.rebalance_every_bars": int(rng.choice([1, 2, 4, 8])), "risk.atr_mult_sl": float(rng.choice([0, 3, 8])),
        "risk.trail_atr_mult": float(rng.choice([0, 3, 8])), "risk.breakeven_after_r": float(rng.choice([0, 1])),
        "risk.partial_tp_ladder": [[float(rng.uniform(0.5, 3)), 0.3]] if rng.random() < 0.5 else []}) for _ in range(count)]


def test_a_batch_is_its_configs_one_by_one_bit_for_bit():
    "At one and two threads, in any order, all eighteen parameters free."
    configs, prepared = drawn(24), prepare_run(CALM, FULL)
    alone = np.array([np.diff(np.log(run_prepared(prepared, config)[0].equity), prepend=np.log(10_000.0)) for config in configs])
    one, two = (run_batch(prepared, configs, threads=threads) for threads in (1, 2))
    assert one.returns.tobytes() == two.returns.tobytes()
    assert one.metrics.equals(two.metrics)
    np.testing.assert_allclose(np.log1p(one.returns), alone, atol=1e-12)
    order = np.random.default_rng(5).permutation(24)
    shuffled = run_batch(prepared, [configs[place] for place in order], threads=2)
    assert shuffled.returns.tobytes() == one.returns[order].tobytes()
    assert len({row.tobytes() for row in one.returns}) > 20  # they are not all the same config


def test_an_interrupted_batch_stops_and_keeps_what_it_gave():
    "An interrupt in the middle ends the batch; what was taken is what it would have been."
    configs, prepared = drawn(12), prepare_run(CALM, FULL)
    whole, taken = run_batch(prepared, configs), []

    def interrupted():
        for outcome in iterate_batch(prepared, configs, threads=2):
            taken.append(outcome)
            if len(taken) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(taken) == 3
    for outcome in taken:
        assert outcome.returns.tobytes() == whole.returns[outcome.place].tobytes()
