"""Orders on the grid, within the limits, towards what is wanted: over invented markets, accounts and configs."""

import random
from decimal import Context, Decimal, localcontext
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from xsmom_nb.config import Config
from xsmom_nb.execution.plan import plan_orders, quantity_for
from xsmom_nb.ports import Instrument, Position, Ticker

EXACT = Context(prec=200)
SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")
ROW_MS = 1_704_067_200_000
USUAL = Config()


def powers(low: int, high: int) -> st.SearchStrategy[Decimal]:
    "Steps such as exchanges have them: 1, 2 or 5 times a power of ten."
    return st.builds(lambda digit, power: Decimal(digit).scaleb(power), st.sampled_from([1, 2, 5]), st.integers(low, high))


@st.composite
def markets(draw, symbol: str) -> tuple[Instrument, Ticker]:
    "Rules and quotes: most as exchanges have them, some that fit together as little as their promises demand."
    magnitude = draw(st.integers(-8, 5))  # of the price
    tick = draw(powers(max(-8, magnitude - 5), max(-8, min(2, magnitude - 2))))
    wild = draw(st.integers(0, 7)) == 7
    step = draw(powers(-6, 5) if wild else powers(max(-6, -magnitude - 3), max(-6, min(5, 1 - magnitude))))
    bid = max(1, Decimal(draw(st.integers(100, 999))).scaleb(magnitude - 2) // tick) * tick
    ask = bid + tick * draw(st.sampled_from([0, 1, 1, 1, 2, 5, 100]))
    mark = bid * draw(st.sampled_from(["0.95", "0.9999", "1", "1.000123", "1.05"]).map(Decimal))
    status = draw(st.sampled_from(["Trading"] * 9 + ["PreLaunch", "Delivering", "Closed"]))
    smallest = step * draw(st.sampled_from([0, 1, 1, 10]))
    largest = step * draw(st.sampled_from([10**9, 10**6, 1000, 7, 1]))
    notional = Decimal(draw(st.sampled_from(["5", "0", "1", "100"])))
    instrument = Instrument(symbol, symbol[:-4], "USDT", status, tick, step, smallest, largest, largest / 2, notional,
                            Decimal(50), 0, 480)
    return instrument, Ticker(symbol, 0, bid, ask, bid, mark)


class Case(NamedTuple):
    "What a plan is made from, in the order in which it is passed."

    wanted: dict[str, Decimal]
    positions: tuple[Position, ...]
    tickers: dict[str, Ticker]
    instruments: dict[str, Instrument]
    equity: Decimal


@st.composite
def accounts(draw) -> Case:
    "An account, what it should hold, and the markets it may trade in."
    equity = Decimal(draw(st.sampled_from(["10000", "123456.789", "9999999999", "100", "0", "-5"])))
    mille = st.sampled_from([0, 20, -20, 100, -100, 199, -199, 200, -200, 201, -1, 1, 500, -1000])
    shares = mille.map(lambda share: Decimal(share) / 1000)
    case = Case({}, (), {}, {}, equity)
    for symbol in SYMBOLS:
        instrument, ticker = draw(markets(symbol))
        with localcontext(EXACT):
            base = max(equity, Decimal(1)) / ticker.mark
            held, aim = draw(shares) * base, draw(shares) * base + draw(st.sampled_from([0, 0, 1, -1])) * instrument.quantity_step
            if draw(st.integers(0, 5)):  # positions are on the step, unless the exchange has changed it
                held = held // instrument.quantity_step * instrument.quantity_step
            if not draw(st.integers(0, 9)):
                aim = held
        if held:
            case = case._replace(positions=(*case.positions, Position(symbol, held, ticker.mark, ticker.mark)))
        missing = draw(st.sampled_from([None] * 12 + ["wanted", "tickers", "instruments"]))
        for name, item in (("wanted", aim), ("tickers", ticker), ("instruments", instrument)):
            if name != missing:
                getattr(case, name)[symbol] = item
    return case


def changed(execution: dict, max_weight: float, max_notional: float) -> Config:
    "The usual config with other execution settings and caps."
    return USUAL.model_copy(update={
        "execution": USUAL.execution.model_copy(update=execution),
        "strategy": USUAL.strategy.model_copy(update={"max_weight_per_asset": max_weight}),
        "sizing": USUAL.sizing.model_copy(update={"max_notional_per_asset": max_notional}),
    })  # fmt: skip


configs = st.builds(
    changed,
    st.fixed_dictionaries({
        "order_type": st.sampled_from(["limit", "limit", "market"]), "post_only": st.booleans(),
        "price_offset_bps": st.just(0.0) | st.floats(-100, 100), "spread_guard_bps": st.sampled_from([15.0, 1e4, 1e4, 0.0]),
        "leverage": st.sampled_from([1, 3]),
    }),
    st.sampled_from([0.09, 0.2, 1.0]),
    st.sampled_from([100.0, 20_000.0, 1e9]),
)  # fmt: skip
COMMON = hypothesis_settings(max_examples=150, deadline=None)


def is_multiple(value: Decimal, step: Decimal) -> bool:
    "Whether a number lies on a grid."
    return EXACT.remainder(value, step) == 0


def value_of(intent, tickers) -> Decimal:
    "What the exchange takes an order to be worth."
    ticker, request = tickers[intent.request.symbol], intent.request
    price = request.price if request.price is not None else ticker.ask if request.side == "Buy" else ticker.bid
    return EXACT.multiply(request.quantity, price)


@COMMON
@given(accounts(), configs)
def test_every_order_is_one_the_exchange_takes(case, config):
    for intent in plan_orders(*case, ROW_MS, config).intents:
        request, instrument = intent.request, case.instruments[intent.request.symbol]
        ticker = case.tickers[request.symbol]
        is_market = config.execution.order_type == "market"
        assert is_multiple(request.quantity, instrument.quantity_step)
        assert request.quantity <= (instrument.max_market_quantity if is_market else instrument.max_limit_quantity)
        assert request.quantity >= instrument.min_quantity
        assert value_of(intent, case.tickers) >= instrument.min_notional
        assert instrument.is_trading or request.reduce_only
        assert ticker.spread_bps <= config.execution.spread_guard_bps
        if is_market:
            assert (request.order_type, request.price, request.time_in_force) == ("Market", None, "IOC")
            continue
        assert is_multiple(request.price, instrument.price_tick)
        assert request.time_in_force == ("PostOnly" if config.execution.post_only else "GTC")
        if config.execution.post_only:
            assert request.price < ticker.ask if request.side == "Buy" else request.price > ticker.bid


@COMMON
@given(accounts(), configs)
def test_orders_lead_towards_what_is_wanted_and_never_past_it(case, config):
    wanted, tickers, instruments = case.wanted, case.tickers, case.instruments
    book = {position.symbol: position.quantity for position in case.positions}
    sent = []
    for intent in plan_orders(*case, ROW_MS, config).intents:
        symbol, instrument = intent.request.symbol, instruments[intent.request.symbol]
        held, after = book.get(symbol, Decimal(0)), EXACT.add(book.get(symbol, Decimal(0)), intent.request.signed_quantity)
        aim, mark = wanted[symbol], tickers[symbol].mark
        assert EXACT.multiply(held, after) >= 0, "one order turned the position round"
        if intent.request.reduce_only:
            assert held != 0
            assert abs(after) < abs(held)
            keeps = EXACT.multiply(held, aim) > 0 and abs(aim) >= instrument.min_quantity
            keeps = keeps and EXACT.multiply(abs(aim), mark) >= instrument.min_notional
            if keeps and abs(aim) >= instrument.quantity_step and intent.leg == "decrease":
                assert abs(after) > abs(aim) - instrument.quantity_step  # the step toward zero, never beyond
        else:
            assert EXACT.multiply(after, aim) > 0
            assert abs(held) < abs(after) <= abs(aim)
        if intent.waits_for:
            assert intent.leg == "open"
            assert intent.waits_for in sent
            assert held == 0
        assert (intent.leg == "open") == (held == 0)
        book[symbol] = after
        sent.append(intent.request.link_id)
    assert len(set(sent)) == len(sent)


@COMMON
@given(accounts(), configs)
def test_no_order_that_takes_on_risk_passes_a_cap(case, config):
    equity = case.equity
    book = {position.symbol: position.quantity for position in case.positions}
    marks = {p.symbol: p.mark_price for p in case.positions} | {symbol: ticker.mark for symbol, ticker in case.tickers.items()}
    plan = plan_orders(*case, ROW_MS, config)
    for intent in plan.intents:
        book[intent.request.symbol] = EXACT.add(book.get(intent.request.symbol, Decimal(0)), intent.request.signed_quantity)
    slack = 1 + Decimal("1e-9")
    for intent in plan.intents:
        if not intent.request.reduce_only:
            value = EXACT.multiply(abs(book[intent.request.symbol]), marks[intent.request.symbol])
            assert value <= Decimal(repr(config.sizing.max_notional_per_asset)) * slack
            assert value <= Decimal(repr(config.strategy.max_weight_per_asset)) * equity * slack
            with localcontext(EXACT):
                gross = sum(abs(quantity) * marks[symbol] for symbol, quantity in book.items())
            assert gross <= config.execution.leverage * equity * slack


@COMMON
@given(accounts(), configs, st.randoms(use_true_random=False))
def test_the_plan_is_the_same_in_every_order_and_precision(case, config, rng: random.Random):
    wanted, positions, tickers, instruments, equity = case
    plan = plan_orders(*case, ROW_MS, config)
    mixed = [dict(rng.sample(list(part.items()), len(part))) for part in (wanted, tickers, instruments)]
    with localcontext(Context(prec=6)):  # what another part of the program may have left behind
        again = plan_orders(mixed[0], rng.sample(positions, len(positions)), mixed[1], mixed[2], equity, ROW_MS, config)
    assert again == plan
    assert list(plan.notes) == sorted(wanted)
    assert all(plan.notes.values())
    kinds = [(not intent.request.reduce_only, intent.request.symbol) for intent in plan.intents]
    assert kinds == sorted(kinds)


@COMMON
@given(accounts(), configs)
def test_when_all_orders_fill_the_next_plan_is_empty_or_goes_on(case, config):
    "A plan that is carried out is not made again: else a full book would trade for ever."
    wanted, positions, tickers, instruments, equity = case
    assume(equity > 0)
    book = {position.symbol: position.quantity for position in positions}
    remaining = None
    for row in range(4):
        held = [Position(s, q, tickers[s].mark if s in tickers else Decimal(1), Decimal(1)) for s, q in book.items() if q]
        plan = plan_orders(wanted, held, tickers, instruments, equity, ROW_MS + row * 3_600_000, config)
        for intent in plan.intents:
            book[intent.request.symbol] = EXACT.add(book.get(intent.request.symbol, Decimal(0)), intent.request.signed_quantity)
        with localcontext(EXACT):
            distance = sum((abs(wanted[s] - book.get(s, Decimal(0))) for s in wanted), Decimal(0))
        if remaining is not None and plan.intents and not any(i.leg == "close" for i in plan.intents):
            assert distance < remaining
        remaining = distance
    cut = [s for s in plan.notes if "later row" in plan.notes[s]]
    arrived = [i for i in plan.intents if EXACT.subtract(wanted[i.request.symbol], book[i.request.symbol]) == 0]  # with this row
    assert not plan.intents or cut or arrived or any(i.leg == "open" for i in plan.intents)


@COMMON
@given(markets("AAAUSDT"), st.floats(-1, 1), st.decimals(1, 10**9, places=4))
def test_the_quantity_of_a_weight_never_exceeds_it(market, weight, equity):
    instrument, ticker = market
    quantity = quantity_for(weight, equity, ticker.mark, instrument)
    with localcontext(EXACT):
        asked = abs(Decimal(repr(weight))) * equity
        value = abs(quantity) * ticker.mark
        assert value <= asked
        assert is_multiple(quantity, instrument.quantity_step)
        if quantity:
            assert (quantity > 0) == (weight > 0)
            assert value >= instrument.min_notional
            assert abs(quantity) >= instrument.min_quantity
            assert value + instrument.quantity_step * ticker.mark > asked


@pytest.mark.parametrize("weight", [0.2, -0.2])
@given(market=markets("AAAUSDT"), equity=st.decimals(1, 10**5, places=4))
@hypothesis_settings(max_examples=150, deadline=None)
def test_a_weight_at_its_cap_passes(market, equity, weight):
    instrument, ticker = market
    assume(instrument.is_trading)
    config = changed({"spread_guard_bps": 10_000.0}, 0.2, 1e12)
    quantity = quantity_for(weight, equity, ticker.mark, instrument)
    notes = plan_orders({"AAAUSDT": quantity}, (), {"AAAUSDT": ticker}, {"AAAUSDT": instrument}, equity, ROW_MS, config).notes
    assert "refused" not in notes["AAAUSDT"]


def test_a_symbol_that_is_not_mentioned_is_left_alone():
    position = Position("AAAUSDT", Decimal(5), Decimal(10), Decimal(10))
    assert plan_orders({}, (position,), {}, {}, Decimal(100), ROW_MS, USUAL).intents == ()
