"""The figures to beat, each beside what was measured. A goal whose figure is missing is neither met nor missed."""

from typing import Any

Results = dict[str, Any]
Line = dict[str, Any]
FREQTRADE_MS = 13_900.0  # 36 pairs, its own rule, another day on the same kind of machine; it is not run here


def row(results: Results, section: str, **wanted: Any) -> dict[str, Any] | None:
    "The row of a section that has these values, unless it is absent."
    found = (each for each in results[section] if all(each.get(key) == value for key, value in wanted.items()))
    return next((each for each in found if "absent" not in each), None)


def at_most(what: str, setting: str, measured: float | None, limit: float, unit: str = "ms", remark: str = "") -> Line:
    "A goal from above."
    met = None if measured is None else measured <= limit
    return {"what": what, "setting": setting, "measured": measured, "unit": unit, "goal": f"≤ {limit:g}", "met": met,
            "remark": remark}  # fmt: skip


def at_least(what: str, setting: str, measured: float | None, limit: float, unit: str, remark: str = "") -> Line:
    "A goal from below."
    met = None if measured is None else measured >= limit
    return {**at_most(what, setting, measured, limit, unit, remark), "goal": f"≥ {limit:g}", "met": met}


def value(found: dict[str, Any] | None, key: str, divided_by: float = 1.0) -> float | None:
    "A figure of a row, None where there is no row."
    return None if found is None else found[key] / divided_by


def ratio(top: float | None, bottom: float | None) -> float | None:
    "How often `bottom` goes into `top`, None where one is missing."
    return None if top is None or bottom is None else top / bottom


def backtest_goals(results: Results) -> list[Line]:
    "One backtest, core and full, both settings."
    table, limits = [], {"defaults, every bar": (12, 25), "84…672, every 8 bars": (4, 10)}
    for setting, (core_limit, full_limit) in limits.items():
        core = value(row(results, "peers", engine="kernel", setting=setting), "median_ms")
        theirs = row(results, "peers", engine="vectorbt", setting=setting)
        accounting = None if theirs is None else theirs["parts_ms"]["accounting"]
        full = value(row(results, "peers", engine="full risk", setting=setting), "median_ms")
        table.append(at_most("one backtest, risk: core", setting, core, core_limit))
        if core_limit == 12:
            remark = "its accounting alone, against weights and accounting of ours"
            table.append(at_least("vectorbt / one backtest, risk: core", setting, ratio(accounting, core), 20, "×", remark))
        table.append(at_most("one backtest, risk: full", setting, full, full_limit))
        if core_limit == 12:
            remark = f"against {FREQTRADE_MS / 1e3:g} s quoted from another run, its own rule"
            table.append(at_least("freqtrade / one backtest, risk: full", setting, ratio(FREQTRADE_MS, full), 500, "×", remark))
    return table


def batch_goals(results: Results) -> list[Line]:
    "Sets a second at two threads, and what the second thread is worth."
    table, space, every = [], "search space", "search space, every bar"
    for drawn, risk, limit in ((space, "core", 280), (space, "full", 120), (every, "core", 150)):
        one, two = (value(row(results, "batch", drawn=drawn, risk=risk, threads=n), "best_per_second") for n in (1, 2))
        table.append(at_least(f"batch of 64, 2 threads, risk: {risk}", drawn, two, limit, "/s"))
        if (drawn, risk) == (space, "core"):
            table.append(at_least("second thread", drawn, ratio(two, one), 1.8, "×"))
    return table


def growth_goals(results: Results) -> list[Line]:
    "How time grows with bars and with symbols."
    def taken(bars: int, symbols: int) -> float | None:
        return value(row(results, "growth", engine="kernel", bars=bars, symbols=symbols), "median_ms")

    base = taken(17_520, 36)
    return [at_most("8 × the bars", "defaults, every bar, synthetic", ratio(taken(140_160, 36), base), 8.5, "×"),
            at_most("300 symbols for 36", "defaults, every bar, synthetic", ratio(taken(17_520, 300), base), 4, "×")]


def start_goals(results: Results) -> list[Line]:
    "Imports and the command line; compiled code."
    table = [at_most(name, "whole process", value(row(results, "imports", what=name), "median_ms"), limit)
             for name, limit in (("xsmom --help", 400), ("import xsmom_nb.strategy.core", 700))]
    run = value(row(results, "scheduled_run"), "wall_min_ms", 1e3)
    return [*table, at_most("scheduled live run", "start to manifest and HTML, caches warm", run, 6, "s")]


def live_goals(results: Results) -> list[Line]:
    "Decision and replay."
    setting = "defaults, every bar"
    decision = value(row(results, "decisions", setting=setting), "median_ms")
    cycle = value(row(results, "replays", setting=setting), "ms_per_cycle")
    days = None if cycle is None else cycle * 90 * 24 / 1e3
    return [at_most("live decision, 36 symbols, with reasons", setting, decision, 5),
            at_most("replay, a cycle", setting, cycle, 10), at_most("replay, 90 days", setting, days, 30, "s")]


def goals(results: Results) -> list[Line]:
    "All of them."
    return [line for part in (backtest_goals, batch_goals, growth_goals, live_goals, start_goals) for line in part(results)]
