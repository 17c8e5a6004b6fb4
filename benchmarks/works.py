"""What is computed: a market, a config, and which frictions act. A work travels between processes as JSON."""

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from xsmom_nb.config import Config, with_values
from xsmom_nb.market.panel import Panel
from xsmom_nb.market.store import Store, find_data
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.optimizer.space import draw, settings_at

ROWS, SYMBOLS = 17_520, 36  # two years of hours, the universe of the shipped config
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults, every bar": {},
    "84…672, every 8 bars": {"strategy.lookbacks": [84, 168, 336, 672], "strategy.rebalance_every_bars": 8},
}
FREE = {f"costs.{name}": 0.0 for name in ("maker_bps", "taker_bps", "slippage_bps", "impact_coef")}


@dataclass(frozen=True)
class Work:
    "A market and a config."

    setting: str  # one of `SETTINGS`
    rows: int = ROWS
    symbols: int = SYMBOLS
    source: str = "real"  # or `synthetic`, the seeded market
    frictions: str = "all"  # `all`; `no funding` (vectorbt knows none); `none`: neither costs nor funding (for bt)
    first_rows: int | None = None  # of the market's rows only so many from the front; None: all
    values: dict[str, Any] = field(default_factory=dict)  # more of the config, as dotted keys

    def config(self) -> Config:
        "The config of this work; the universe holds every symbol of the market."
        free = FREE if self.frictions == "none" else {}
        core = {"backtest.risk": "core", "exchange.max_symbols": max(self.symbols, SYMBOLS)}
        return with_values(Config(), core | SETTINGS[self.setting] | free | self.values)

    def panel(self) -> Panel:
        "The market of this work."
        panel = market(self.source, self.rows, self.symbols)
        if self.first_rows is not None:
            panel = panel.slice(end_ms=int(panel.open_time_ms[self.first_rows - 1]))
        return panel if self.frictions == "all" else replace(panel, funding=np.zeros(panel.shape))

    def but(self, **changes: Any) -> "Work":
        "The same work with some fields changed."
        return replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        "Plain types, for `Work(**…)` in another process."
        return asdict(self)


@cache
def market(source: str, rows: int, symbols: int) -> Panel:
    "The last rows of the real bars, or a seeded market. Nothing is learned from the holdout here: only time is measured."
    if source == "synthetic":
        return synthetic_panel(seed=1, bars=rows, symbols=symbols)
    folder = find_data()
    assert folder is not None, "no market data found"
    panel = Store(folder, "binance_perp").panel("1h")
    panel = panel.slice(start_ms=int(panel.open_time_ms[-rows]))
    assert panel.shape == (rows, symbols), f"{panel.origin} has {panel.shape}, expected {(rows, symbols)}"
    return panel


def inner_bars(source: str) -> Panel | None:
    "The recorded five-minute bars, which end with the hours; the seeded market has none."
    folder = find_data()
    return Store(folder, "binance_perp").panel("5m") if source == "real" and folder is not None else None


def has_market_data() -> bool:
    "Whether this machine has the real bars."
    folder = find_data()
    return folder is not None and (folder / "binance_perp" / "1h").is_dir()


def parameter_sets(count: int, seed: int = 7, every_bars: int | None = None) -> list[dict[str, Any]]:
    "Settings drawn from the optimizer's whole search space; `every_bars` fixes how often all of them rebalance."
    fixed = {} if every_bars is None else {"rebalance_every_bars": every_bars}
    return [settings_at(Config(), point | fixed) for point in draw(count, seed)]
