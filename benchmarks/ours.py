"""This engine's entries, as the benchmark calls them. The only file here that knows what they are called."""

from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from xsmom_nb.backtest.batch import run_batch
from xsmom_nb.backtest.prepared import prepare_run, run_prepared
from xsmom_nb.backtest.vector import backtest
from xsmom_nb.clock import SimulatedClock, timeframe_ms
from xsmom_nb.config import Config, with_values
from xsmom_nb.market.panel import Panel
from xsmom_nb.strategy.core import history_bars


def prepared_run(panel: Panel, config: Config, risk: str = "core") -> Callable[[], np.ndarray]:
    "A call that runs the kernel over arrays prepared here and gives the equity; compiled already."
    config = with_values(config, {"backtest.risk": risk})
    prepared = prepare_run(panel, config)

    def run() -> np.ndarray:
        return run_prepared(prepared, config, detailed=False)[0].equity

    run()
    return run


def whole_backtest(panel: Panel, config: Config) -> np.ndarray:
    "The equity of a whole backtest, with everything that `xsmom backtest` computes."
    return backtest(panel, config, holdout=True).equity["equity"].to_numpy()


def batch_run(panel: Panel, configs: Sequence[Config], risk: str, threads: int) -> Callable[[], np.ndarray]:
    "A call that runs all configs over arrays prepared here and gives their returns, shape (P, R); compiled already."
    configs = [with_values(config, {"backtest.risk": risk}) for config in configs]
    prepared = prepare_run(panel, configs[0])
    run_batch(prepared, configs[:1])
    return lambda: run_batch(prepared, configs, threads=threads).returns


def live_decision(panel: Panel, config: Config) -> Callable[[], object]:
    "A call that takes the decision of a panel's last row as the live cycle does, with reasons; an account that holds nothing."
    from xsmom_nb.decide import decide
    from xsmom_nb.decision import Memory, Snapshot
    from xsmom_nb.exchange.recorded import RecordedMarket
    from xsmom_nb.ports import Account

    now_ms = int(panel.open_time_ms[-1]) + timeframe_ms(panel.timeframe) + 60_000
    market = RecordedMarket(panel, SimulatedClock(now_ms), config.paper.spread_bps)
    window = panel.slice(int(panel.open_time_ms[-history_bars(config)]))
    account = Account(*[Decimal(10_000)] * 3)
    snapshot = Snapshot(now_ms, window, account, (), (), tuple(market.fetch_tickers()), tuple(market.fetch_instruments()))
    assert decide(snapshot, Memory(), config).intents, "a decision that orders nothing would be too easy"
    return lambda: decide(snapshot, Memory(), config)


def replayed_hours(panel: Panel, inner: Panel | None, config: Config, hours: int) -> Callable[[], int]:
    "A call that replays the last hours of a panel through the live cycle and its guard, and says how many it took."
    from xsmom_nb.backtest.replay import replay

    watched, start_ms = with_values(config, {"backtest.risk": "full"}), int(panel.open_time_ms[-hours])
    return lambda: len(replay(panel, watched, start_ms, holdout=True, inner=inner).equity)
