"""The strategy as it is usually written first: a loop over bars with pandas in its body. Nothing of ours below it."""

import numpy as np
import pandas as pd

from xsmom_nb.config import Config
from xsmom_nb.market.panel import Panel

HOURS_PER_YEAR = 8760


def ema_slope(close: pd.DataFrame, config: Config) -> pd.DataFrame:
    "Slope of the EMA in bps a day; the average is seeded with the mean of the first closes and skips missing ones."
    rule, slopes = config.filters.regime, {}
    for symbol, column in close.items():
        known = column.dropna()
        if len(known) < rule.ema_len + rule.slope_bars:
            continue
        seeded = known.iloc[rule.ema_len - 1 :].copy()
        seeded.iloc[0] = known.iloc[: rule.ema_len].mean()
        ema = seeded.ewm(span=rule.ema_len, adjust=False).mean().reindex(close.index).ffill()
        enough = column.notna().cumsum() >= rule.ema_len + rule.slope_bars
        slopes[symbol] = ((ema / ema.shift(rule.slope_bars) - 1) * 1e4 * 24 / rule.slope_bars).where(enough)
    return pd.DataFrame(slopes, index=close.index, columns=close.columns)


def capped(side: pd.Series, cap: float) -> pd.Series:
    "Cut to the cap and share the excess out over the others, again and again."
    while (side > cap).any() and (side < cap).any():
        excess, free = (side - cap).clip(lower=0).sum(), side[side < cap]
        side = side.clip(upper=cap)
        side[free.index] = free * (1 + excess / free.sum())
    return side.clip(upper=cap)


def names_per_side(spread: float, usual: float, walk: float, config: Config) -> int:
    "K, from how wide momentum spreads against random walks."
    rule = config.strategy
    if not rule.dynamic_k:
        return rule.k_max
    dispersion = spread / (usual * walk) if usual > 0 else 1.0
    share = min(max(0.5 + rule.kappa * (dispersion - 1), 0.0), 1.0)
    return rule.k_min + int(np.floor((rule.k_max - rule.k_min) * share + 0.5))


def chosen_book(momentum: pd.Series, vol: pd.Series, slope: pd.Series, usual: float, walk: float, config: Config) -> pd.Series:
    "Names and weights of both sides before the volatility target; empty where a side is."
    rule, nothing = config.strategy, pd.Series(dtype=float)
    spread = momentum.std(ddof=0)
    if len(momentum) < 3 or spread < 1e-12:
        return nothing
    z, k = (momentum - momentum.mean()) / spread, names_per_side(spread, usual, walk, config)
    z = z[(slope[z.index].abs() >= config.filters.regime.slope_min_bps_per_day) & (z.abs() >= rule.entry_zscore_min)]
    sides = []
    for side in (z[z > 0], -z[z < 0]):
        best = side.sort_values(ascending=False, kind="stable").head(k)
        raw = best**rule.signal_power / vol[best.index]
        sides.append(capped(raw / raw.sum() * rule.gross_leverage / 2, rule.max_weight_per_asset))
    gross = min(sides[0].sum(), sides[1].sum())
    return pd.concat([sides[0] / sides[0].sum() * gross, -sides[1] / sides[1].sum() * gross]) if gross > 0 else nothing


def aimed(book: pd.Series, past: pd.DataFrame, config: Config) -> pd.Series:
    "The book scaled to its volatility target, without dust."
    aim, rule = config.vol_target, config.strategy
    annual = (past.fillna(0) @ book).std() * np.sqrt(HOURS_PER_YEAR)
    scale = min(max(aim.target_ann_vol / annual, aim.min_scale), aim.max_scale) if annual > 0 else 1.0
    book = book * min(scale, rule.max_weight_per_asset / book.abs().max(), rule.gross_leverage / book.abs().sum())
    return book[book.abs() >= config.sizing.min_weight]


def walk_factor(config: Config) -> float:
    "How much wider momentum spreads than one bar's returns, were prices random walks."
    rule = config.strategy
    pairs = list(zip(rule.lookbacks, rule.lookback_weights, strict=True))
    return np.sqrt(sum(a * b * min(i, j) for i, a in pairs for j, b in pairs)) / sum(rule.lookback_weights)


def pandas_loop(panel: Panel, config: Config) -> pd.Series:
    "Equity after each bar."
    assert panel.shape[1] <= config.exchange.max_symbols, "the universe is not ranked here"
    close, volume, funding = (panel.frame(name) for name in ("close", "volume", "funding"))
    rule, costs, execution = config.strategy, config.costs, config.execution
    returns, slope, walk = close.pct_change(fill_method=None), ema_slope(close, config), walk_factor(config)
    vol, warmup = returns.rolling(rule.vol_lookback).std(), max(rule.lookbacks) + rule.vol_lookback + 5
    members = close.notna().rolling(warmup).sum() == warmup
    spread = returns.where(members).var(axis=1, ddof=0).where(members.sum(axis=1) >= 3)
    usual = np.sqrt(spread.rolling(rule.vol_lookback, min_periods=1).mean())
    weights = pd.Series(rule.lookback_weights) / sum(rule.lookback_weights)
    momentum = sum(weight * (close / close.shift(lag) - 1) for lag, weight in zip(rule.lookbacks, weights, strict=True))
    hour = panel.open_time_ms // 3_600_000 + 1 - rule.rebalance_offset_bars
    fee = costs.maker_ratio * costs.maker_bps + (1 - costs.maker_ratio) * costs.taker_bps + costs.slippage_bps
    equity, held = config.backtest.initial_equity, pd.Series(0.0, index=close.columns)
    curve = pd.Series(np.nan, index=close.index)
    for t in range(len(close)):
        earned = returns.iloc[t].fillna(0)
        before, equity = equity, equity * (1 + (held * (earned - funding.iloc[t])).sum())
        held = held * (1 + earned) * before / equity
        wanted = held
        if hour[t] % rule.rebalance_every_bars == 0:
            inside = close.columns[members.iloc[t] & (vol.iloc[t] >= 1e-8)]
            book = chosen_book(momentum.iloc[t][inside], vol.iloc[t], slope.iloc[t], usual.iloc[t], walk, config)
            if len(book):
                book = aimed(book, returns.iloc[max(0, t - config.vol_target.lookback_bars + 1) : t + 1][book.index], config)
            limit = config.sizing.max_notional_per_asset / equity
            target = book.reindex(close.columns, fill_value=0.0).clip(-limit, limit)
            still = ((target - held).abs() < execution.rebalance_band) & (target != 0) | (volume.iloc[t] <= 0)
            wanted = held.where(still, (held + execution.trade_rate * (target - held)).where(target != 0, 0.0))
        gone = close.iloc[t].isna()
        wanted = wanted.mask(gone, 0.0)
        traded = (wanted - held).abs()
        if traded.any():
            impact = costs.impact_coef * vol.iloc[t] * 1e4 * np.sqrt(traded * equity / (close.iloc[t] * volume.iloc[t]))
            bps = (fee + impact.where(np.isfinite(impact), 0.0)).mask(gone, costs.taker_bps + costs.slippage_bps)
            paid = (traded * bps).sum() / 1e4
            equity, held = equity * (1 - paid), wanted / (1 - paid)
        curve.iloc[t] = equity
    return curve
