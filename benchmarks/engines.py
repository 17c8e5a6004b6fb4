"""The engines, one class each: `prepare` once, `run` as often as time is taken, `equity` of the last run for the comparison.

`run` returns the milliseconds of each part; their sum is the engine's figure. `compared_under` names the frictions under which
its equity must be ours; None where it does other work. Imports are inside, so that a process loads its own engine alone.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.works import Work


class Taken(NamedTuple):
    "How long something took."

    cpu_ms: float  # of all threads of this process; what others on the same host do is not in it
    wall_ms: float


def timed(call: Callable[[], Any]) -> tuple[Any, Taken]:
    "What a call returns, and how long it took."
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, Taken(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall))


class Kernel:
    "This engine, arrays prepared: the optimiser's inner call."

    compared_under: str | None = "all"
    risk = "core"

    def prepare(self, work: Work) -> None:
        from benchmarks.ours import prepared_run

        self.call = prepared_run(work.panel(), work.config(), risk=self.risk)

    def run(self) -> dict[str, Taken]:
        self.equity, taken = timed(self.call)
        return {"run": taken}


class FullRisk(Kernel):
    "This engine with exits inside bars, limits and cooldowns, arrays prepared."

    compared_under = None  # no peer does this work; the project's tests check it
    risk = "full"


class EndToEnd:
    "This engine from the panel: checks, preparation, run, tables of weights, list of trades, metrics."

    compared_under = "all"

    def prepare(self, work: Work) -> None:
        from benchmarks.ours import whole_backtest

        self.call = partial(whole_backtest, work.panel(), work.config())
        self.call()  # compiles

    def run(self) -> dict[str, Taken]:
        self.equity, taken = timed(self.call)
        return {"run": taken}


class VectorisedNumPy:
    "NumPy and pandas: weights over whole panels, holdings bar by bar."

    compared_under = "all"

    def prepare(self, work: Work) -> None:
        self.panel, self.config = work.panel(), work.config()

    def run(self) -> dict[str, Taken]:
        from benchmarks.strategy_numpy import core_targets, drifted_holdings

        targets, weighing = timed(lambda: core_targets(self.panel, self.config))
        account, walking = timed(lambda: drifted_holdings(self.panel, self.config, targets))
        self.equity = account.equity
        return {"weights": weighing, "accounting": walking}


class TargetTurnover(VectorisedNumPy):
    "The same weights, with the usual shortcut for the accounting. Quick, and another equity."

    compared_under = None

    def run(self) -> dict[str, Taken]:
        from benchmarks.strategy_numpy import core_targets, target_turnover

        targets, weighing = timed(lambda: core_targets(self.panel, self.config))
        self.equity, counting = timed(lambda: target_turnover(self.panel, self.config, targets))
        return {"weights": weighing, "accounting": counting}


class PandasLoop:
    "A loop over bars with pandas in its body."

    compared_under = "all"

    def prepare(self, work: Work) -> None:
        self.panel, self.config = work.panel(), work.config()

    def run(self) -> dict[str, Taken]:
        from benchmarks.strategy_loop import pandas_loop

        curve, taken = timed(lambda: pandas_loop(self.panel, self.config))
        self.equity = np.asarray(curve)
        return {"run": taken}


class VectorBT:
    "vectorbt: `from_orders` with the traded shares handed to it, value and three statistics; the weights are NumPy's."

    compared_under = "no funding"  # it knows none

    def prepare(self, work: Work) -> None:
        import pandas as pd

        from benchmarks.strategy_numpy import core_targets, drifted_holdings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vectorbt
        self.panel, self.config = work.but(frictions="no funding").panel(), work.config()
        account = drifted_holdings(self.panel, self.config, core_targets(self.panel, self.config), keep=True)
        self.close = pd.DataFrame(self.panel.close).ffill().bfill()
        self.size, self.fees = pd.DataFrame(np.where(account.traded, account.share, np.nan)), pd.DataFrame(account.rate)
        self.from_orders = vectorbt.Portfolio.from_orders
        self.run()  # compiles

    def account(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            portfolio = self.from_orders(
                self.close, self.size, size_type="targetpercent", direction="both", fees=self.fees, freq="1h",
                init_cash=self.config.backtest.initial_equity, cash_sharing=True, group_by=True, call_seq="auto")
            return portfolio.value(), portfolio.sharpe_ratio(), portfolio.total_return(), portfolio.max_drawdown()

    def run(self) -> dict[str, Taken]:
        from benchmarks.strategy_numpy import core_targets

        _, weighing = timed(lambda: core_targets(self.panel, self.config))
        found, accounting = timed(self.account)
        self.equity = np.asarray(found[0])
        return {"weights": weighing, "accounting": accounting}


class BT:
    "bt: a chain of algos that rebalances to the held shares handed to it; commissions at the blended rate."

    compared_under = "none"  # with costs it sizes around the commission, and the equity differs by about 1e-4

    def prepare(self, work: Work) -> None:
        import pandas as pd

        from benchmarks.strategy_numpy import core_targets, drifted_holdings, fee_rate

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bt
        self.bt, panel, config = bt, work.panel(), work.config()
        targets = core_targets(panel, config)
        account = drifted_holdings(panel, config, targets, keep=True)
        self.close = panel.frame("close").tz_localize(None).ffill().bfill()
        acts = np.flatnonzero(account.traded.any(axis=1))
        held = np.where(account.share[acts] != 0.0, account.share[acts], np.nan)  # NaN: closed, and not looked at again
        self.book = pd.DataFrame(held, index=self.close.index[acts], columns=self.close.columns)
        self.rate, self.cash = fee_rate(config), config.backtest.initial_equity

    def run(self) -> dict[str, Taken]:
        algos, rate = self.bt.algos, self.rate
        chain = [algos.WeighTarget(self.book), algos.Rebalance()]  # acts on the rows of the book
        strategy = self.bt.Strategy("book", chain, list(self.close.columns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backtest = self.bt.Backtest(
                strategy, self.close, initial_capital=self.cash, integer_positions=False, progress_bar=False,
                commissions=lambda quantity, price: abs(quantity) * price * rate)
            _, taken = timed(backtest.run)
        self.equity = np.asarray(backtest.strategy.values)[-len(self.close):]
        return {"run": taken}


ENGINES: dict[str, type] = {
    "kernel": Kernel, "full risk": FullRisk, "end to end": EndToEnd, "NumPy": VectorisedNumPy,
    "NumPy, target turnover": TargetTurnover, "vectorbt": VectorBT, "bt": BT, "pandas loop": PandasLoop,
}
NEEDS = {"vectorbt": "vectorbt", "bt": "bt"}  # packages beyond those of xsmom_nb
