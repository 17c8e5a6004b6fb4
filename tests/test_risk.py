"""Exits, limits, throttle and overlays: what must hold for any bars, any equity and any book."""

import json
from dataclasses import asdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmom_nb.clock import DAY_MS
from xsmom_nb.config import Config, with_values
from xsmom_nb.risk.exits import (
    DIRECTION,
    ENTRY,
    EXIT_FRACTION,
    EXIT_PRICE,
    EXIT_REASON,
    EXTREME,
    HIGHEST,
    LOWEST,
    MA_ATR,
    POSITION_FIELDS,
    REMAINING,
    STOP,
    ExitRules,
    Tick,
    TrackedPosition,
    as_record,
    as_row,
    empty_exits,
    exit_rules,
    follow_fill,
    is_stop_out,
    open_position,
    remaining_row,
    step,
    step_position,
)
from xsmom_nb.risk.limits import (
    BANNED_UNTIL_MS,
    DAYS,
    KILLED,
    LOSS_FIELDS,
    PAUSED,
    TRADES,
    account_drawdown,
    book_symbol_pnl,
    empty_account,
    limit_rules,
    recall_account,
    step_account,
)
from xsmom_nb.risk.overlays import ODDS_FIELDS, cap_notional, kelly_row, note_odds, overlaid_row, overlay_rules, wanted_share
from xsmom_nb.risk.throttle import FREE, PAUSE_FIELDS, ThrottleRules, throttle_row

HOUR_MS = 3_600_000.0
MIRROR = 2048.0  # prices are sixteenths below it, so that a reflection is exact

# ── Bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
sixteenths = lambda low, high: st.integers(low * 16, high * 16).map(lambda number: number / 16)


@st.composite
def bars(draw, most=20):
    "A path of bars from 1024, calm or wild, with gaps: open, high, low, close."
    size, rows, close = draw(st.sampled_from([0.125, 0.5, 1.5])), [], 1024.0
    moves = st.tuples(st.sampled_from([0, 0, 0, -8, 8]), st.integers(-8, 8), st.integers(0, 8), st.integers(0, 8))
    for gap, change, above, below in draw(st.lists(moves, min_size=1, max_size=most)):
        open_ = close + size * gap
        close = open_ + size * change
        rows.append((open_, max(open_, close) + size * above, min(open_, close) - size * below, close))
    return rows


@st.composite
def any_rules(draw):
    "Rules with every exit on or off; multiples are quarters, so that levels are exact."
    quarters = lambda low, high: st.integers(low * 4, high * 4).map(lambda number: number / 4)
    count = draw(st.integers(0, 3))
    profits = sorted(draw(st.sets(quarters(1, 4), min_size=count, max_size=count)))
    stop = draw(st.sampled_from([0.0, 1.0, 2.0, 3.0]))
    return ExitRules(
        stop_atr=stop, catastrophic_atr=max(3.5, stop + 1.0), breakeven_r=draw(st.sampled_from([0.0, 0.5, 1.0])),
        trail_mode=draw(st.sampled_from([EXTREME, MA_ATR])), trail_after_r=draw(st.sampled_from([0.0, 0.5, 1.0])),
        trail_atr=draw(st.sampled_from([0.0, 0.5, 1.5])), ladder_r=np.array(profits, dtype=np.float64),
        ladder_fraction=np.array([draw(st.sampled_from([0.125, 0.25])) for _ in profits], dtype=np.float64),
        flip_bars=draw(st.integers(0, 2)), no_progress_ms=draw(st.sampled_from([np.inf, 3 * HOUR_MS])), no_progress_r=0.25,
        max_hold_ms=draw(st.sampled_from([np.inf, 6 * HOUR_MS])))


def walk(rows, rules, direction=1.0, entry=1024.0, atr=8.0, mirrored=False, scale=1.0, slopes=None):
    "Exits and states of a position over bars, optionally seen from the other side; ends when everything has left."
    reflect = lambda price: scale * (MIRROR - price if mirrored else price)
    position, exits, found, states = np.zeros(POSITION_FIELDS), empty_exits(rules), [], []
    open_position(position, -direction if mirrored else direction, reflect(entry), scale * atr, np.nan, 0.0, rules)
    states.append(position.copy())
    for t, (open_, high, low, close) in enumerate(rows):
        high, low = (low, high) if mirrored else (high, low)
        slope = np.nan if slopes is None else (-slopes[t] if mirrored else slopes[t])
        average = reflect((high + low) / 2)
        count = step(position, reflect(open_), reflect(high), reflect(low), reflect(close), average, slope, (t + 1) * HOUR_MS,
                     rules, exits)
        found += [(t, *exits[k]) for k in range(count)]
        states.append(position.copy())
        if count and exits[count - 1, EXIT_FRACTION] == 1.0:
            break
    return found, states


# ── Exits ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(bars(), any_rules(), st.sampled_from([1.0, -1.0]))
@settings(max_examples=200, deadline=None)
def test_a_stop_never_moves_against_the_position(rows, rules, direction):
    _, states = walk(rows, rules, direction)
    stops = direction * np.array([state[STOP] for state in states])
    assert (np.diff(stops) >= 0).all()
    resting = direction * np.array([as_record(state).resting_stop for state in states])
    assert (np.diff(resting) >= 0).all()
    assert (resting <= stops).all()  # what rests at the exchange never acts before the stop of the guard


@given(bars(), any_rules(), st.sampled_from([1.0, -1.0]))
@settings(max_examples=200, deadline=None)
def test_fills_lie_inside_their_bar_and_never_sell_more_than_is_held(rows, rules, direction):
    found, states = walk(rows, rules, direction)
    left = 1.0
    for t, price, fraction, reason in found:
        _, high, low, _ = rows[t]
        assert low <= price <= high
        assert 0.0 < fraction <= 1.0
        left *= 1.0 - fraction
        if is_stop_out(int(reason)):
            assert fraction == 1.0
            assert direction * price <= direction * states[t][STOP]  # at the stop known before the bar, or at a worse open
    assert left >= 0.0
    partial = np.prod([1.0 - fraction for _, _, fraction, _ in found if fraction < 1.0])
    assert np.isclose(partial, states[-1][REMAINING], rtol=1e-12)  # the ladders drawn here never take all


@given(bars(), any_rules(), st.lists(st.sampled_from([-2.0, 2.0]), min_size=20, max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_short_is_a_long_in_the_mirror(rows, rules, slopes):
    long_found, long_states = walk(rows, rules, slopes=slopes)
    short_found, short_states = walk(rows, rules, mirrored=True, slopes=slopes)
    assert [(t, MIRROR - price, *rest) for t, price, *rest in short_found] == long_found
    assert [MIRROR - state[STOP] for state in short_states] == [state[STOP] for state in long_states]
    assert [MIRROR - state[LOWEST] for state in short_states] == [state[HIGHEST] for state in long_states]


@given(bars(), any_rules(), st.sampled_from([2.0**-30, 2.0**20]))
@settings(max_examples=100, deadline=None)
def test_the_unit_of_the_price_does_not_matter(rows, rules, scale):
    found, states = walk(rows, rules)
    scaled_found, scaled_states = walk(rows, rules, scale=scale)
    assert [(t, price * scale, *rest) for t, price, *rest in found] == scaled_found
    assert [state[STOP] * scale for state in states] == [state[STOP] for state in scaled_states]


@given(bars(most=1), any_rules(), st.integers(1, 15), st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=100, deadline=None)
def test_a_bar_that_is_not_there_changes_nothing(rows, rules, missing, value):
    position, exits = np.zeros(POSITION_FIELDS), empty_exits(rules)
    open_position(position, 1.0, 1024.0, 8.0, 1.0, 0.0, rules)
    before = position.copy()
    prices = [value if missing >> place & 1 else price for place, price in enumerate(rows[0])]
    assert step(position, *prices, 1024.0, -1.0, 1e12, rules, exits) == 0
    assert (position == before).all()
    flat = np.zeros(POSITION_FIELDS)
    assert step(flat, *rows[0], 1024.0, -1.0, 1e12, rules, exits) == 0
    assert not flat.any()


@given(bars(), any_rules(), st.sampled_from([1.0, -1.0]), st.integers(0, 19))
@settings(max_examples=100, deadline=None)
def test_the_next_bar_cannot_change_what_a_bar_did(rows, rules, direction, cut):
    found, states = walk(rows, rules, direction)
    short_found, short_states = walk(rows[: cut + 1], rules, direction)
    assert short_found == [each for each in found if each[0] <= cut]
    assert all((a == b).all() for a, b in zip(short_states, states, strict=False))


@given(bars(), any_rules(), st.sampled_from([1, -1]))
@settings(max_examples=60, deadline=None)
def test_the_guard_steps_as_the_backtest_does(rows, rules, direction):
    "The records of the guard, taken through JSON at every step, against the rows of the kernel."
    row, exits = np.zeros(POSITION_FIELDS), empty_exits(rules)
    open_position(row, float(direction), 1024.0, 8.0, np.nan, 0.0, rules)
    record = as_record(row)
    for t, bar in enumerate(rows):
        time_ms = int((t + 1) * HOUR_MS)
        count = step(row, *bar, 1020.0, np.nan, float(time_ms), rules, exits)
        record = TrackedPosition(**json.loads(json.dumps(asdict(record), allow_nan=False)))
        record, left = step_position(record, Tick(time_ms, *bar, average=1020.0), rules)
        assert (as_row(record) == row).all()
        assert [[each.price, each.fraction] for each in left] == exits[:count, EXIT_PRICE:EXIT_REASON].tolist()
        if row[REMAINING] == 0.0 or (count and exits[count - 1, EXIT_FRACTION] == 1.0):
            break


@given(st.lists(sixteenths(1001, 1047), min_size=1, max_size=40), any_rules())
@settings(max_examples=100, deadline=None)
def test_a_tick_fills_at_its_own_price(prices, rules):
    found, _ = walk([(price,) * 4 for price in prices], rules)
    assert all(price == prices[t] for t, price, *_ in found)


@given(st.lists(st.tuples(st.integers(-6, 6), sixteenths(1000, 1048)), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_entry_is_the_average_of_what_was_added(fills):
    rules, position, held = exit_rules(Config()), np.zeros(POSITION_FIELDS), 0
    average = first = np.nan
    for size, price in fills:
        after = held + size
        follow_fill(position, float(held), float(after), price, 8.0, np.nan, 0.0, rules)
        if after == 0:
            assert not position.any()
        elif held * after <= 0:
            average = first = price
        elif abs(after) > abs(held):
            average = (average * held + price * size) / after
        held = after
        if held:
            assert position[DIRECTION] == np.sign(held)
            assert np.isclose(position[ENTRY], average, rtol=1e-14)
            assert position[STOP] == first - np.sign(held) * 16.0


def test_partial_profit_is_not_bought_back_and_a_flip_starts_whole():
    rules, positions = exit_rules(Config()), np.zeros((2, POSITION_FIELDS))
    for position in positions:
        open_position(position, 1.0, 100.0, 2.0, np.nan, 0.0, rules)
    step(positions[0], 100.0, 103.5, 99.0, 103.0, np.nan, np.nan, HOUR_MS, rules, empty_exits(rules))
    factor = np.zeros(2)
    remaining_row(positions, np.array([0.2, 0.2]), factor)
    assert factor.tolist() == [0.7, 1.0]
    held = 0.2 * 0.7
    assert wanted_share(held, 0.2 * factor[0], 1e4, True, 1e9, 1.0, 0.005) == held
    follow_fill(positions[0], held, -0.2, 103.0, 2.0, np.nan, 2 * HOUR_MS, rules)
    remaining_row(positions, np.array([-0.2, 0.2]), factor)
    assert factor.tolist() == [1.0, 1.0]
    assert positions[0, ENTRY] == 103.0


def test_every_switch_of_the_config_reaches_its_exit():
    "One setting at a time: the exit it allows, or its absence, on bars that would cause it."
    only = {"risk.atr_mult_sl": 0.0, "risk.breakeven_after_r": 0.0, "risk.trail_atr_mult": 0.0, "risk.partial_tp_ladder": []}
    rise_and_fall = [(1024.0, 1100.0, 1020.0, 1095.0), (1095.0, 1096.0, 1000.0, 1002.0), (1002.0, 1003.0, 990.0, 991.0)]
    expected = {
        "risk.atr_mult_sl": (2.0, (1, 1008.0, 0.0)), "risk.breakeven_after_r": (0.5, (1, 1024.0, 2.0)),
        "risk.trail_atr_mult": (1.5, (1, 1088.0, 3.0)), "risk.partial_tp_ladder": ([[2.0, 1.0]], (0, 1080.0, 4.0)),
        "risk.max_hold_hours": (2, (1, 1002.0, 7.0)),
        "risk.no_progress": ({"enabled": True, "minutes": 120}, (1, 1002.0, 6.0)),
        "risk.regime_flip": ({"enabled": True}, (1, 1002.0, 5.0)),
    }
    for key, (value, (t, price, reason)) in expected.items():
        found, _ = walk(rise_and_fall, exit_rules(with_values(Config(), {**only, key: value})), slopes=[1.0, -1.0, -1.0])
        assert found == [(t, price, 1.0, reason)], key
    assert walk(rise_and_fall, exit_rules(with_values(Config(), only)), slopes=[1.0, -1.0, -1.0])[0] == [(2, 996.0, 1.0, 1.0)]


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def limits_in_words(equities, times, config):
    "The same verdicts from plain lists, as slowly as they are defined."
    risk, seen, paused, killed, verdicts = config.risk, [], None, None, []
    for equity, now in zip(equities, times, strict=True):
        today = now // DAY_MS
        seen.append((today, equity))
        if killed is not None and now >= killed:
            killed = paused = None
            seen = [(today, equity)]
        elif paused is not None and now >= paused:
            paused = None
            seen = [(day, each) for day, each in seen if day < today] + [(today, equity)]
        day_equities = [each for day, each in seen if day == today]
        high = max(each for day, each in seen if today - day < DAYS)
        if killed is None and high - equity >= risk.max_drawdown_pct / 100 * high:
            killed = now + config.backtest.hard_kill_resume_days * DAY_MS
        reference = max(day_equities) if risk.trailing_daily_loss else day_equities[0]
        if paused is None and reference - equity >= risk.max_daily_loss_pct / 100 * reference:
            paused = (today + 1) * DAY_MS
        verdicts.append(KILLED if killed is not None else PAUSED if paused is not None else TRADES)
    return verdicts


@given(st.lists(st.tuples(st.integers(-60, 60), st.integers(1, 60)), min_size=5, max_size=120), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_account_obeys_its_limits(moves, trailing):
    config = with_values(Config(), {"risk.trailing_daily_loss": trailing, "backtest.hard_kill_resume_days": 3})
    equities = np.round(10_000 * np.cumprod([1 + move / 1000 for move, _ in moves]), 2)
    times = np.cumsum([hours for _, hours in moves]) * int(HOUR_MS)
    account, rules = empty_account(), limit_rules(config, 3)
    verdicts = [step_account(account, equity, float(now), rules) for equity, now in zip(equities, times, strict=True)]
    assert verdicts == limits_in_words(equities, [int(now) for now in times], config)
    assert 0.0 <= account_drawdown(account, equities[-1]) < 1.0


@given(st.lists(st.integers(-40, 40), min_size=3, max_size=200))
@settings(max_examples=60, deadline=None)
def test_a_remembered_account_goes_on_as_one_that_never_stopped(moves):
    rules, account, days = limit_rules(Config()), empty_account(), []
    equities = 10_000 * np.cumprod([1 + move / 1000 for move in moves])
    for step_number, equity in enumerate(equities):
        now = step_number * 5 * int(HOUR_MS)
        midnight = now // DAY_MS * DAY_MS
        recalled = recall_account(days[-DAYS:], *account.fields[3:].tolist())
        assert step_account(account, equity, float(now), rules) == step_account(recalled, equity, float(now), rules)
        if not days or days[-1][0] != midnight:
            days.append((midnight, equity, equity))
        days[-1] = (midnight, days[-1][1], max(days[-1][2], equity))
        assert account_drawdown(account, equity) == account_drawdown(recalled, equity)


@given(st.lists(st.integers(-150, 100), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_symbol_is_banned_from_its_loss_to_midnight(pnls):
    rules, losses, banned_on = limit_rules(Config()), np.zeros(LOSS_FIELDS), set()
    for hour, pnl in enumerate(pnls, start=1):
        today = (hour - 1) // 24
        banned = book_symbol_pnl(losses, float(pnl), 10_000.0, hour * HOUR_MS, rules)
        booked = sum(pnls[today * 24 : hour])
        banned_on |= {today} if booked <= -200 else set()
        assert banned == (today in banned_on and hour % 24 != 0)
        assert not banned or losses[BANNED_UNTIL_MS] == (today + 1) * DAY_MS


# ── Throttle and overlays ────────────────────────────────────────────────────────────────────────────────────────────
shares = st.integers(-40, 40).map(lambda number: number / 100)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=15), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_entries_keep_to_their_number_and_to_their_order(book, most, entries):
    current, targets = (np.array(each) for each in zip(*book, strict=True))
    n, verdicts = len(book), np.zeros(len(book), dtype=np.int64)
    throttle_row(current, targets, np.zeros((n, PAUSE_FIELDS)), np.zeros((n, LOSS_FIELDS)), 1.0,
                 ThrottleRules(0.0, 3, 0.0, most, entries), verdicts)
    kept, wants = current * targets > 0, (current * targets <= 0) & (targets != 0)
    taken, refused = wants & (verdicts == FREE), wants & (verdicts != FREE)
    assert (verdicts[~wants] == FREE).all()
    assert taken.sum() == min(wants.sum(), entries, max(most - kept.sum(), 0))
    for side in (1, -1):
        let_in, out = np.abs(targets[taken & (side * targets > 0)]), np.abs(targets[refused & (side * targets > 0)])
        assert not let_in.size or not out.size or let_in.min() >= out.max()
    longs, shorts = (taken & (targets > 0)).sum(), (taken & (targets < 0)).sum()
    if (refused & (targets > 0)).any() and (refused & (targets < 0)).any():
        assert abs(longs - shorts) <= 1  # both sides still had names: they took turns


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=10), st.floats(1e2, 1e7), st.floats(0, 0.07999))
@settings(max_examples=100, deadline=None)
def test_overlays_that_do_not_act_change_no_bit(weights, equity, drawdown):
    targets, ones, out = np.array(weights), np.ones(len(weights)), np.zeros(len(weights))
    rules = overlay_rules(with_values(Config(), {"sizing.max_notional_per_asset": 1e12}))
    kelly = np.zeros(len(weights))
    kelly_row(np.zeros((len(weights), ODDS_FIELDS)), rules, kelly)
    overlaid_row(targets, equity, drawdown, 1.0, kelly, ones, np.full(len(weights), np.nan), rules, out)
    assert out.tobytes() == targets.tobytes()
    default = overlay_rules(Config())
    overlaid_row(targets, equity, drawdown, 1.0, kelly, ones, ones, default, out)
    clipped = [cap_notional(weight, equity, default.max_notional) for weight in weights]
    assert out.tolist() == clipped
    assert [cap_notional(weight, equity, default.max_notional) for weight in out] == clipped  # capped once is capped


@given(st.lists(st.lists(st.floats(-0.1, 0.1), min_size=0, max_size=30), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_kelly_multipliers_stay_in_their_range_and_follow_the_odds(records):
    config = with_values(Config(), {"sizing.kelly.enabled": True, "sizing.kelly.min_trades": 10})
    odds, out = np.zeros((len(records), ODDS_FIELDS)), np.zeros(len(records))
    for each, pnls in zip(odds, records, strict=True):
        for pnl in pnls:
            note_odds(each, pnl)
    kelly_row(odds, overlay_rules(config), out)
    few = np.array([len(pnls) < 10 for pnls in records])
    assert (out[few] == 1.0).all()
    if not (out == 1.0).all():
        assert ((out >= config.sizing.kelly.min_scale) & (out <= config.sizing.kelly.max_scale))[~few].all()
        for multiplier, pnls in zip(out[~few], [pnls for pnls in records if len(pnls) >= 10], strict=True):
            if sum(pnls) < -1e-9:  # a name that loses on average has a negative Kelly share
                assert multiplier == config.sizing.kelly.min_scale
