"""The accounting against vectorbt, the metrics against empyrical-reloaded and ffn: three houses, one set of numbers."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from peers import imported

from xsmom_nb.backtest.metrics import return_metrics
from xsmom_nb.backtest.vector import backtest
from xsmom_nb.clock import bars_per_year
from xsmom_nb.config import Config, with_values
from xsmom_nb.exchange.fills import blended_fee_bps, slippage_bps

DAYS_90 = 90 * 24


@pytest.fixture(scope="module")
def result(real_panel):
    "Ninety real days with funding off."
    start = int(real_panel.open_time_ms[10_000])
    end = int(real_panel.open_time_ms[10_000 + DAYS_90 - 1])
    without_funding = replace(real_panel, funding=np.zeros(real_panel.shape))
    return backtest(without_funding, with_values(Config(), {"execution.trade_rate": 0.5, "backtest.risk": "core"}), start, end)


@pytest.fixture(scope="module")
def orders(real_panel, result):
    "Close, traded share of each bar (NaN where nothing was traded) and its whole cost rate, frames of shape (R, N)."
    config, costs = result.config, result.config.costs
    close = real_panel.frame("close").loc[result.equity.index]
    quote_volume = (real_panel.frame("close") * real_panel.frame("volume")).loc[result.equity.index]
    returns = real_panel.frame("close").pct_change(fill_method=None)
    volatility = returns.rolling(config.strategy.vol_lookback).std().loc[result.equity.index]
    equity = result.equity["equity"]
    cost = (result.equity["fees"] + result.equity["slippage"]) / (
        equity + result.equity["fees"] + result.equity["slippage"])
    share = result.weights.mul(1 - cost, axis=0)  # of the equity before costs
    before = equity.shift(1, fill_value=config.backtest.initial_equity)
    gross = equity / (1 - cost)  # before costs
    drifted = (result.weights.shift(1, fill_value=0.0) * (1 + returns.loc[share.index].fillna(0.0))).mul(before / gross, axis=0)
    traded = (share - drifted).abs()
    fee = blended_fee_bps(costs.maker_bps, costs.taker_bps, costs.maker_ratio)
    rate = pd.DataFrame(0.0, index=share.index, columns=share.columns)
    for t, i in np.argwhere(traded.to_numpy() > 1e-12):
        notional = traded.iat[t, i] * gross.iat[t]
        slip = slippage_bps(costs.slippage_bps, costs.impact_coef, volatility.iat[t, i], notional, quote_volume.iat[t, i])
        rate.iat[t, i] = (fee + slip) / 1e4
    return close, share.where(traded > 1e-12), rate


def test_equity_of_90_real_days_agrees_with_vectorbt(result, orders):
    vectorbt = imported("vectorbt")
    close, size, fees = orders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        portfolio = vectorbt.Portfolio.from_orders(
            close.ffill().bfill(), size, size_type="targetpercent", direction="both", fees=fees, freq="1h",
            init_cash=result.config.backtest.initial_equity, cash_sharing=True, group_by=True, call_seq="auto")
        value = portfolio.value()
    assert size.notna().to_numpy().sum() > 1000, "the ninety days must trade for this to prove anything"
    np.testing.assert_allclose(value.to_numpy(), result.equity["equity"].to_numpy(), rtol=1e-9)


def test_return_metrics_agree_with_empyrical(result):
    empyrical = imported("empyrical")
    returns, year = result.equity["returns"], int(bars_per_year("1h"))
    ours = return_metrics(returns.to_numpy(), year)
    theirs = {
        "total_return": empyrical.cum_returns_final(returns),
        "cagr": empyrical.cagr(returns, annualization=year),
        "annualized_volatility": empyrical.annual_volatility(returns, annualization=year),
        "sharpe": empyrical.sharpe_ratio(returns, annualization=year),
        "sortino": empyrical.sortino_ratio(returns, annualization=year),
        "calmar": empyrical.calmar_ratio(returns, annualization=year),
        "max_drawdown": -empyrical.max_drawdown(returns),
        "tail_ratio": empyrical.tail_ratio(returns),
    }
    assert ours["max_drawdown"] > 0.01
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name


def test_return_metrics_agree_with_ffn(result):
    ffn = imported("ffn")
    returns, year = result.equity["returns"], int(bars_per_year("1h"))
    ours = return_metrics(returns.to_numpy(), year)
    prices = pd.concat([pd.Series([1.0], index=[returns.index[0] - pd.Timedelta(hours=1)]), (1 + returns).cumprod()])
    theirs = {
        "total_return": ffn.calc_total_return(prices),
        "sharpe": ffn.calc_sharpe(returns, nperiods=year, annualize=True),
        "max_drawdown": -ffn.calc_max_drawdown(prices),
        "annualized_volatility": returns.std() * np.sqrt(year),
        "skewness": returns.skew(),
        "kurtosis": returns.kurt(),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name
