"""The strategy once more, as a quant would vectorise it: NumPy and pandas over whole panels, nothing of ours below it.

Selection and weights are panel arithmetic. The accounting cannot be: what is held drifts, the band asks what is held, and impact
asks how much money that is, so it walks bar by bar with one vector a step. `target_turnover` is what vectorised backtests do
instead (turnover is the change of the targets), and is quick because it leaves that out.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view

from xsmom_nb.config import Config
from xsmom_nb.market.panel import Panel

HOURS_PER_YEAR, HOURS_PER_DAY = 8760, 24


class Targets(NamedTuple):
    "Weights on the rebalance rows."

    rows: np.ndarray  # int64, shape (R,)
    weights: np.ndarray  # shape (R, N)
    volatility: np.ndarray  # of one bar, shape (T, N)


class Account(NamedTuple):
    "What a walk leaves; the last three only where they were asked for, else of shape (0, N)."

    equity: np.ndarray  # shape (T,)
    share: np.ndarray  # held after the trade, of the equity before its costs; shape (T, N)
    traded: np.ndarray  # bool, shape (T, N)
    rate: np.ndarray  # whole cost of a trade as a share of its value, shape (T, N)


def shifted(values: np.ndarray, by: int) -> np.ndarray:
    "The rows `by` bars earlier, NaN before the first."
    out = np.full_like(values, np.nan)
    out[by:] = values[:-by]
    return out


def regime(close: np.ndarray, config: Config) -> np.ndarray:
    "Where the EMA slopes enough to trade; bool (T, N)."
    rule, seen = config.filters.regime, np.cumsum(np.isfinite(close), axis=0)
    start = (seen == rule.ema_len) & np.isfinite(close)
    early = np.where(seen <= rule.ema_len, nan_to_zero(close), 0.0)
    seeded = np.where(start, early.sum(axis=0) / rule.ema_len, np.where(seen > rule.ema_len, close, np.nan))
    ema = pd.DataFrame(seeded).ewm(span=rule.ema_len, adjust=False, ignore_na=True).mean().to_numpy()
    slope = (ema / shifted(ema, rule.slope_bars) - 1.0) * 1e4 * HOURS_PER_DAY / rule.slope_bars
    return (np.abs(slope) >= rule.slope_min_bps_per_day) & (seen >= rule.ema_len + rule.slope_bars)


def nan_to_zero(values: np.ndarray) -> np.ndarray:
    "The values, 0 where there is none."
    return np.where(np.isfinite(values), values, 0.0)


def universe(panel: Panel, config: Config) -> np.ndarray:
    "Who may be traded, point in time; bool (T, N)."
    rule, warmup = config.universe, max(config.strategy.lookbacks) + config.strategy.vol_lookback + 5
    bar = np.arange(panel.shape[0])[:, None]
    run = bar - np.maximum.accumulate(np.where(np.isfinite(panel.close), -1, bar), axis=0)
    sums = np.cumsum(nan_to_zero(panel.close * panel.volume), axis=0)
    day = sums - nan_to_zero(shifted(sums, 24))
    inside = (run >= warmup) & (panel.close >= rule.min_price) & (day >= rule.min_quote_volume)
    if panel.shape[1] > config.exchange.max_symbols:
        place = np.argsort(np.argsort(np.where(inside, -day, np.inf), axis=1, kind="stable"), axis=1)
        inside &= place < config.exchange.max_symbols
    return inside


def moments(values: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Count, mean and population variance of each row's members."
    inside = np.where(members, values, 0.0)
    count = members.sum(axis=1)
    mean = inside.sum(axis=1) / np.maximum(count, 1)
    return count, mean, np.where(members, (values - mean[:, None]) ** 2, 0.0).sum(axis=1) / np.maximum(count, 1)


def names_per_side(deviation: np.ndarray, variance: np.ndarray, rows: np.ndarray, config: Config) -> np.ndarray:
    "K of each rebalance row, from how wide momentum spreads against random walks."
    rule = config.strategy
    if not rule.dynamic_k:
        return np.full(len(rows), rule.k_max)
    lags, shares = np.array(rule.lookbacks), np.array(rule.lookback_weights) / sum(rule.lookback_weights)
    walk = np.sqrt(shares @ np.minimum.outer(lags, lags) @ shares)
    usual = pd.Series(variance).rolling(rule.vol_lookback, min_periods=1).mean().to_numpy()[rows]
    dispersion = np.where(usual > 0.0, deviation / (np.sqrt(usual) * walk), 1.0)
    share = np.clip(0.5 + rule.kappa * (dispersion - 1.0), 0.0, 1.0)
    return (rule.k_min + np.floor((rule.k_max - rule.k_min) * share + 0.5)).astype(int)


def best_names(score: np.ndarray, k: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    "Columns of the `most` highest scores of each row, best first, and which of them are taken (0 is no candidate)."
    names = np.argsort(-score, axis=1, kind="stable")[:, :most]
    taken = (np.take_along_axis(score, names, axis=1) > 0.0) & (np.arange(names.shape[1]) < k[:, None])
    return names, taken


def capped(side: np.ndarray, cap: float) -> np.ndarray:
    "Weights of one side, the excess above the cap shared out until nothing exceeds it or all are there."
    while True:
        free = np.where(side < cap, side, 0.0)
        excess, room = np.maximum(side - cap, 0.0).sum(axis=1), free.sum(axis=1)
        again = (excess > 0.0) & (room > 0.0)
        side = np.minimum(side, cap)
        if not again.any():
            return side
        growth = 1.0 + np.where(again, excess, 0.0) / np.where(again, room, 1.0)
        side = np.where(free > 0.0, side * growth[:, None], side)


def scaled(side: np.ndarray, gross: float | np.ndarray) -> np.ndarray:
    "A side whose rows sum to `gross`; rows of zeros stay."
    total = side.sum(axis=1)
    return side * (gross / np.where(total > 0.0, total, 1.0))[:, None]


def volatility_scale(weights: np.ndarray, returns: np.ndarray, rows: np.ndarray, config: Config) -> np.ndarray:
    "What each row's book is multiplied by to meet the volatility target."
    rule, strategy = config.vol_target, config.strategy
    padded = np.vstack([np.zeros((rule.lookback_bars - 1, returns.shape[1])), returns])
    if len(rows) == len(returns):  # every bar: views of the past instead of copies
        past = np.einsum("ri,ril->rl", weights, sliding_window_view(padded, rule.lookback_bars, axis=0))
    else:
        past = np.stack([np.einsum("ri,ri->r", weights, padded[rows + lag]) for lag in range(rule.lookback_bars)], axis=1)
    annual = past.std(axis=1, ddof=1) * np.sqrt(HOURS_PER_YEAR)
    still = annual < 1e-8 * np.sqrt(HOURS_PER_YEAR)
    wanted = np.where(still, 1.0, np.clip(rule.target_ann_vol / np.where(still, 1.0, annual), rule.min_scale, rule.max_scale))
    largest, gross = np.abs(weights).max(axis=1), np.abs(weights).sum(axis=1)
    flat = gross == 0.0
    largest, gross = np.where(flat, 1.0, largest), np.where(flat, 1.0, gross)
    most = np.minimum(strategy.max_weight_per_asset / largest, strategy.gross_leverage / gross)
    return np.where(flat, 1.0, np.minimum(wanted, most))


def weights_of(z: np.ndarray, volatility: np.ndarray, k: np.ndarray, allowed: np.ndarray, config: Config) -> np.ndarray:
    "The book of each row before the volatility target: chosen, weighed, capped, neutral."
    strategy, book, sides = config.strategy, np.zeros(z.shape), []
    for sign in (1.0, -1.0):
        score = np.where(allowed & (sign * z >= strategy.entry_zscore_min), np.maximum(sign * z, 0.0), 0.0)
        names, taken = best_names(score, k, strategy.k_max)
        strength = np.take_along_axis(score, names, axis=1) ** strategy.signal_power
        raw = np.where(taken, strength / np.take_along_axis(volatility, names, axis=1), 0.0)
        sides.append((sign, names, capped(scaled(raw, strategy.gross_leverage / 2.0), strategy.max_weight_per_asset)))
    smaller = np.minimum(sides[0][2].sum(axis=1), sides[1][2].sum(axis=1))
    for sign, names, side in sides:
        signed = sign * scaled(side, smaller)
        np.put_along_axis(book, names, np.take_along_axis(book, names, axis=1) + signed, axis=1)
    return book


def core_targets(panel: Panel, config: Config) -> Targets:
    "Universe, momentum, K, filter, weights, volatility target, dust: the whole core, on the rebalance rows."
    strategy, close = config.strategy, panel.close
    returns = close / shifted(close, 1) - 1.0
    volatility = pd.DataFrame(returns).rolling(strategy.vol_lookback).std().to_numpy()
    members = universe(panel, config)
    count, _, variance = moments(returns, members)
    hour = panel.open_time_ms // 3_600_000 + 1
    rows = np.flatnonzero((hour - strategy.rebalance_offset_bars) % strategy.rebalance_every_bars == 0)
    shares = np.array(strategy.lookback_weights) / sum(strategy.lookback_weights)
    pairs = zip(strategy.lookbacks, shares, strict=True)
    momentum = sum(share * (close[rows] / shifted(close, lag)[rows] - 1.0) for lag, share in pairs)
    members_now = members[rows] & (volatility[rows] >= 1e-8)
    count_now, mean, spread = moments(momentum, members_now)
    deviation = np.where(count_now >= 3, np.sqrt(spread), 0.0)
    wide = deviation >= 1e-12
    z = np.where(members_now & wide[:, None], (momentum - mean[:, None]) / np.where(wide, deviation, 1.0)[:, None], 0.0)
    k = names_per_side(deviation, np.where(count >= 3, variance, np.nan), rows, config)
    book = weights_of(z, np.where(members_now, volatility[rows], 1.0), k, members_now & regime(close, config)[rows], config)
    book *= volatility_scale(book, nan_to_zero(returns), rows, config)[:, None]
    return Targets(rows, np.where(np.abs(book) >= config.sizing.min_weight, book, 0.0), volatility)


def fee_rate(config: Config) -> float:
    "Blended fee and base slippage of a trade, as a share of its value."
    costs = config.costs
    return (costs.maker_ratio * costs.maker_bps + (1 - costs.maker_ratio) * costs.taker_bps + costs.slippage_bps) / 1e4


def root_impact(panel: Panel, volatility: np.ndarray) -> np.ndarray:
    "Impact of one unit of money, before its root is taken: σ / √(quote volume), 0 where either is unknown; shape (T, N)."
    quote_volume = panel.close * panel.volume
    known = np.isfinite(volatility) & (quote_volume > 0.0)
    return np.where(known, volatility / np.sqrt(np.where(known, quote_volume, 1.0)), 0.0)


def drifted_holdings(panel: Panel, config: Config, targets: Targets, keep: bool = False) -> Account:
    "Walk over the bars with what is held: drift, funding, band, costs with impact."
    (bars, n), costs, rule = panel.shape, config.costs, config.execution
    returns, alive = nan_to_zero(panel.close / shifted(panel.close, 1) - 1.0), np.isfinite(panel.close)
    earned, growth = returns - panel.funding, 1.0 + returns
    impact, base = costs.impact_coef * root_impact(panel, targets.volatility), fee_rate(config)
    empty, wanted = panel.volume[targets.rows] <= 0.0, targets.weights != 0.0
    pace = np.where(wanted, rule.trade_rate, 1.0)  # a target of 0 is traded in full
    place = dict(zip(targets.rows.tolist(), range(len(targets.rows)), strict=True))
    ends = (~alive & np.isfinite(shifted(panel.close, 1))).any(axis=1)  # rows in which somebody's bars end
    kept = [np.zeros((bars if keep else 0, n), dtype) for dtype in (float, bool, float)]
    equity, share, curve = config.backtest.initial_equity, np.zeros(n), np.zeros(bars)
    for t in range(bars):
        before, equity = equity, equity * (1.0 + share @ earned[t])
        share = share * growth[t] * (before / equity)
        row = place.get(t)
        if row is None and not ends[t]:
            curve[t] = equity
            if keep:
                kept[0][t] = share
            continue
        step, rate = np.zeros(n), base
        if row is not None:
            limit = config.sizing.max_notional_per_asset / equity
            target = targets.weights[row] if limit > 1.0 else np.clip(targets.weights[row], -limit, limit)
            step = pace[row] * (target - share)
            step[(np.abs(target - share) < rule.rebalance_band) & wanted[row] | empty[row]] = 0.0
            rate = base + impact[t] * np.sqrt(np.abs(step) * equity)
        if ends[t]:
            step = np.where(alive[t], step, -share)
            rate = np.where(alive[t], rate, (costs.taker_bps + costs.slippage_bps) / 1e4)
        share = share + step
        if keep:
            kept[0][t], kept[1][t], kept[2][t] = share, step != 0.0, rate
        left = 1.0 - np.sum(np.abs(step) * rate)
        equity, share = equity * left, share / left
        curve[t] = equity
    return Account(curve, *kept)


def target_turnover(panel: Panel, config: Config, targets: Targets) -> np.ndarray:
    "Equity, shape (T,), where turnover is the change of the targets: the usual shortcut. No drift, no band, no growing impact."
    book = np.zeros(panel.shape)
    book[targets.rows] = targets.weights
    if len(targets.rows) < panel.shape[0]:
        last = np.maximum.accumulate(np.where(np.isin(np.arange(panel.shape[0]), targets.rows), np.arange(panel.shape[0]), 0))
        book = book[last]
    returns = nan_to_zero(panel.close / shifted(panel.close, 1) - 1.0)
    change = np.abs(np.diff(book, axis=0, prepend=0.0))
    impact = config.costs.impact_coef * root_impact(panel, targets.volatility) * np.sqrt(change * config.backtest.initial_equity)
    earned = np.zeros(panel.shape[0])
    earned[1:] = (book[:-1] * (returns[1:] - panel.funding[1:])).sum(axis=1)
    paid = (change * (fee_rate(config) + impact)).sum(axis=1)
    return config.backtest.initial_equity * np.cumprod(1.0 + earned - paid)
