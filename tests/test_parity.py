"""The live code over recorded hours, its pieces of five minutes, and what lies between it and the vector backtest."""

from dataclasses import fields, replace
from decimal import Decimal
from functools import cache

import numpy as np
import pytest

from xsmom_nb.backtest.parity import LADDER, parity, verdict
from xsmom_nb.backtest.replay import replay, replay_config
from xsmom_nb.backtest.vector import backtest
from xsmom_nb.clock import SimulatedClock, parse_utc
from xsmom_nb.config import Config, load_config, with_values
from xsmom_nb.database import memory_database
from xsmom_nb.exchange.account_file import MIGRATIONS
from xsmom_nb.exchange.frictions import NONE, REAL
from xsmom_nb.exchange.paper import PaperExchange
from xsmom_nb.exchange.pieces import Pieces, in_words
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.live.desk import open_desk
from xsmom_nb.market.panel import FIELDS, Panel, resample
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import OrderRequest

HOUR, PIECE = 3_600_000, 300_000
QUICK = {"filters.regime.ema_len": 5, "filters.regime.slope_bars": 4, "strategy.lookbacks": [2, 4, 8, 16],
         "strategy.vol_lookback": 24, "live.history_bars": 100, "backtest.risk": "core", "optimizer.holdout_start": "2030-01-01"}


@cache
def market(hours: int = 110, symbols: int = 8) -> tuple[Panel, Panel]:
    "A synthetic market in pieces of five minutes, and the hours made from them."
    made = synthetic_panel(seed=2, bars=12 * hours, symbols=symbols)
    short = replace(made, timeframe="5m", open_time_ms=made.open_time_ms[0] + PIECE * np.arange(12 * hours))
    return resample(short, "1h"), short


def window(first: int, last: int) -> tuple[int, int]:
    opens = market()[0].open_time_ms
    return int(opens[first]), int(opens[last])


# ── Real data ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def real(real_store):
    "Real hours from spring on, and the five-minute bars; skips where there are none."
    if "5m" not in real_store.timeframes():
        pytest.skip("no market data found")
    return real_store.panel("1h", parse_utc("2025-03-01")), real_store.panel("5m")


def test_real_pieces_are_the_hours_they_are_pieces_of(real):
    whole, short = real
    pieces = Pieces(whole, short)
    assert {each.what for each in pieces.contradictions} <= {"pieces"}, in_words(pieces.contradictions)
    assert pieces.agree.sum() > 50_000  # 26 symbols, 88 days
    edges = {each.open_time_ms // HOUR for each in pieces.contradictions}
    assert len(edges) <= 2, "only where the recording of a symbol begins or ends within an hour"


def test_parity_over_real_hours(root, real):
    config = with_values(load_config(root / "configs" / "config.yaml", environ={}), {"backtest.risk": "core"})
    start_ms = parse_utc("2025-07-06T00:00:00Z")
    found = parity(real[0], config, start_ms, start_ms + 23 * HOUR, holdout=True, inner=real[1])
    initial = config.backtest.initial_equity
    ends = [float(each.equity["equity"].iloc[-1]) for each in (found.real, found.vector)]
    assert found.table["bps"].sum() == pytest.approx((ends[0] - ends[1]) / initial * 1e4, abs=1e-9)
    assert list(found.table["kind"]) == [*(rung.kind for rung in LADDER), "unexplained"]
    assert found.ok, verdict(found)
    assert "within the budget" in verdict(found)
    assert abs(found.table["bps"]["unexplained"]) < 0.01
    assert np.abs(found.bare.targets.to_numpy() - found.vector.targets.to_numpy()).max() < 1e-9
    assert np.abs(found.bare.weights.to_numpy() - found.vector.weights.to_numpy()).max() < 1e-6
    assert len(found.real.fills) > 0


# ── One code ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_replay_is_what_the_desk_does_on_files(tmp_path):
    "State and account in memory, or in files through SQLAlchemy: the same fills, the same equity, to the last digit."
    whole, _ = market()
    config = with_values(Config(), QUICK)
    first, last = window(60, 67)
    played = replay(whole, config, first, last)
    places = {"live.state_url": "sqlite:///state.sqlite", "paper.account_url": "sqlite:///paper.sqlite"}
    own, equity = with_values(replay_config(config), places), []

    class Nobody:
        def record(self, decided: object) -> None:
            "Nothing is kept."

    with open_desk(own, whole, now_ms=first + HOUR + 60_000, base=tmp_path) as desk:
        for hour in range(8):
            desk.clock.set(first + (hour + 1) * HOUR + 60_000)
            equity.append(float(desk.cycle(Nobody()).account_after.equity))
        fills = desk.port.fetch_fills(0)
    assert played.equity["equity"].tolist() == equity
    assert [(fill.symbol, float(fill.quantity), float(fill.price)) for fill in fills] == list(
        played.fills[["symbol", "quantity", "price"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("seed", range(4))
def test_any_set_of_frictions_leaves_books_that_balance(seed):
    "A replay refuses itself when they do not."
    whole, short = market()
    names = [field.name for field in fields(REAL)]
    off = [name for name in names if np.random.default_rng(seed).random(len(names))[names.index(name)] < 0.5]
    result = replay(whole, with_values(Config(), QUICK), *window(60, 67), inner=short, frictions=REAL.without(*off))
    frame = result.equity
    change = frame["equity"].diff().fillna(frame["equity"].iloc[0] - 10_000)
    assert np.abs(change - (frame["price"] - frame["slippage"] - frame["fees"] - frame["funding"])).max() < 1e-6
    assert result.trades["pnl"].sum() == pytest.approx(frame["equity"].iloc[-1] - 10_000, abs=1e-6)


def test_without_frictions_a_replay_is_the_vector_backtest():
    whole, short = market()
    config = with_values(Config(), {**QUICK, "costs.impact_coef": 0.0})
    bare, fast = replay(whole, config, *window(60, 83), inner=short, frictions=NONE), backtest(whole, config, *window(60, 83))
    for column in fast.equity:
        assert np.abs(bare.equity[column] - fast.equity[column]).max() < 1e-5, column
    assert np.abs(bare.exposure - fast.exposure).max() < 1e-8


# ── Pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def orders_of(exchange: PaperExchange, rng: np.random.Generator, name: str) -> None:
    "A few orders that wait around the price, and a stop for what is held."
    rules = {each.symbol: each for each in exchange.fetch_instruments()}
    for number, ticker in enumerate(exchange.fetch_tickers()):
        rule, side = rules[ticker.symbol], ("Buy", "Sell")[int(rng.integers(2))]
        away = Decimal(repr(round(float(rng.normal(0, 0.003)), 5)))
        price = (ticker.last * (1 + away) / rule.price_tick).to_integral_value() * rule.price_tick
        quantity = (Decimal(300) / ticker.last / rule.quantity_step).to_integral_value() * rule.quantity_step
        exchange.submit_order(OrderRequest(f"{name}-{number}", ticker.symbol, side, "Limit", quantity, price, "GTC", False))
    for position in exchange.fetch_positions():
        factor = Decimal("0.99") if position.quantity > 0 else Decimal("1.01")
        exchange.set_position_stop(position.symbol, position.mark_price * factor)


@pytest.mark.parametrize("torn", [False, True])
def test_asleep_or_awake_in_pieces(torn):
    "An account that is asked every five minutes, and one that is asked every hour, come to the same; also over torn hours."
    whole, short = market()
    if torn:
        values = {name: getattr(short, name).copy() for name in FIELDS}
        for each in values.values():
            each[np.random.default_rng(1).integers(720, 900, 6), np.arange(6)] = np.nan
        short = replace(short, **values)
    config, told = Config(), []
    for looks in (1, 12):
        clock = SimulatedClock(int(whole.open_time_ms[60]) + 60_000)
        recorded = RecordedMarket(whole, clock, config.paper.spread_bps, short)
        assert (len(recorded.pieces.contradictions) > 3) is torn
        with PaperExchange(recorded, clock, config, database=memory_database(MIGRATIONS)) as exchange:
            rng = np.random.default_rng(5)
            for hour in range(12):
                orders_of(exchange, rng, f"h{hour}")
                for look in range(looks):
                    clock.set(int(whole.open_time_ms[60]) + hour * HOUR + (look + 1) * HOUR // looks + 60_000)
                    exchange.fetch_account()
            told.append((exchange.fetch_fills(0), exchange.fetch_positions(), exchange.fetch_account()))
    assert len(told[0][0]) > 20
    assert any(fill.fill_id.startswith("stop-") for fill in told[0][0])
    assert [replace(fill, time_ms=0) for fill in told[0][0]] == [replace(fill, time_ms=0) for fill in told[1][0]]
    assert told[0][1:] == told[1][1:]


def test_a_stop_in_pieces_fills_in_its_piece():
    "An hour that touches stop and limit: the pieces know which came first, the hour assumes the worse."
    whole, short = market()
    row, config = 60, Config()
    fell = {name: getattr(short, name).copy() for name in FIELDS}
    price, pieces = float(whole.close[row - 1, 0]), slice(12 * row, 12 * row + 12)
    for name in ("open", "high", "low", "close"):
        fell[name][pieces, 0] = price
    fell["high"][12 * row + 2, 0] = price * 1.02  # the limit is reached in the third piece,
    fell["low"][12 * row + 8, 0] = price * 0.95  # the stop in the ninth
    fell["volume"][pieces, 0] = 1e9
    short = replace(short, **fell)
    whole = resample(short, "1h")
    first = {}
    for name, inner in (("pieces", short), ("hours", None)):
        clock = SimulatedClock(int(whole.open_time_ms[row]))
        recorded, kept = RecordedMarket(whole, clock, 2.0, inner), memory_database(MIGRATIONS)
        with PaperExchange(recorded, clock, config, database=kept) as exchange:
            rule, ticker = exchange.fetch_instruments()[0], exchange.fetch_tickers()[0]
            quantity = (Decimal(500) / ticker.last / rule.quantity_step).to_integral_value() * rule.quantity_step
            buy = OrderRequest("in", ticker.symbol, "Buy", "Market", quantity, None, "IOC", False)
            limit = (ticker.last * Decimal("1.01") / rule.price_tick).to_integral_value() * rule.price_tick
            assert exchange.submit_order(buy).outcome == "accepted"
            out = OrderRequest("out", ticker.symbol, "Sell", "Limit", exchange.fetch_positions()[0].quantity, limit, "GTC", True)
            assert exchange.submit_order(out).outcome == "accepted"
            assert exchange.set_position_stop(ticker.symbol, ticker.last * Decimal("0.97")).outcome == "accepted"
            clock.advance(HOUR)
            assert exchange.fetch_positions() == []
            first[name] = exchange.fetch_fills(0)[-1]
    assert (first["pieces"].link_id, first["hours"].link_id) == ("out", "")
    assert first["pieces"].time_ms == int(whole.open_time_ms[row]) + 3 * PIECE
    assert first["hours"].fill_id.startswith("stop-")


# ── Everything that happens inside a bar ─────────────────────────────────────────────────────────────────────────────
RULES = {
    "the source's exits": {},
    "the stop at the exchange alone": {"risk.atr_mult_sl": 0, "risk.breakeven_after_r": 0, "risk.trail_atr_mult": 0,
                                       "risk.partial_tp_ladder": [], "risk.catastrophic_atr_mult": 1.5},
    "two targets, an average, flips and time": {
        "risk.partial_tp_ladder": [[0.25, 0.3], [0.5, 0.4]], "risk.trail_mode": "ma_atr", "risk.trail_after_r": 0.25,
        "risk.regime_flip.enabled": True, "risk.no_progress.enabled": True, "risk.no_progress.minutes": 180,
        "risk.max_hold_hours": 6},
    "limits that are reached, and close": {
        "risk.max_symbol_daily_loss_pct": 0.1, "risk.max_daily_loss_pct": 1.0, "risk.on_kill": "close",
        "risk.max_drawdown_pct": 3.0,
        "risk.dd_stepdown.start_pct": 0.5, "risk.dd_stepdown.full_pct": 2.0},
}


@pytest.mark.parametrize("name", RULES)
def test_without_frictions_every_exit_is_where_the_backtest_has_it(name):
    "Stops, targets, bans, kills, pauses: hour by hour the same equity, and the same book."
    whole, _ = market()
    config = with_values(Config(), {**QUICK, "backtest.risk": "full", "costs.impact_coef": 0.0, **RULES[name]})
    bare, fast = replay(whole, config, *window(50, 108), frictions=NONE), backtest(whole, config, *window(50, 108))
    assert len(set(fast.trades["exit_reason"]) - {"rebalance", "open"}) >= 1, "the rules have something to do"
    for column in ("equity", "fees", "slippage", "funding"):  # a turnover inside a bar is a share of another equity
        assert np.abs(bare.equity[column] - fast.equity[column]).max() < 1e-5, column
    assert np.abs(bare.weights.to_numpy() - fast.weights.to_numpy()).max() < 1e-8


@pytest.mark.parametrize("exits", ["shipped", "source"])
def test_real_exits_are_where_the_backtest_has_them(root, real, exits):
    "The short form of `xsmom proof parity parity-exits`."
    config = load_config(root / "configs" / "config.yaml", environ={})
    if exits == "source":
        risk = Config().risk
        names = ("atr_mult_sl", "catastrophic_atr_mult", "breakeven_after_r", "trail_atr_mult", "partial_tp_ladder")
        config = with_values(config, {f"risk.{name}": getattr(risk, name) for name in names})
    start_ms = parse_utc("2025-07-05T00:00:00Z")
    span = start_ms, start_ms + 48 * HOUR - HOUR
    bare, fast = replay(real[0], config, *span, True, frictions=NONE), backtest(real[0], config, *span, True)
    assert np.abs(bare.equity["equity"] - fast.equity["equity"]).max() < 1e-6
    stopped = fast.trades["exit_reason"].str.endswith("_stop").sum()
    assert stopped >= (10 if exits == "source" else 0)


def test_what_a_limit_closes_goes_at_market():
    "A ban closes a position for certain; an order that waits would wait for a market that has just left."
    whole, _ = market()
    config = with_values(Config(), {**QUICK, "backtest.risk": "full", "risk.max_symbol_daily_loss_pct": 0.1})
    closing = []

    def look(report):
        closing.extend(each.intent.request for each in report.sent
                       if any("banned" in said for card in report.decided.decision.cards
                              if card.symbol == each.intent.request.symbol and card.held for said in card.risk))

    replay(whole, config, *window(50, 80), on_cycle=look)
    assert closing
    assert {(each.order_type, each.reduce_only) for each in closing} == {("Market", True)}
