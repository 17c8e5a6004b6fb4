"""The strategy's arithmetic against numbers computed by two independent implementations."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from xsmom_nb.backtest.vector import backtest
from xsmom_nb.clock import parse_utc
from xsmom_nb.config import Config, with_values
from xsmom_nb.market.store import Store

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden" / "core.json"  # also read when tests are collected, to name the cases
CASES = sorted(json.loads(GOLDEN.read_text())["cases"]) if GOLDEN.exists() else ["absent"]


@pytest.fixture(scope="module")
def numbers(golden):
    "The golden numbers, read."
    return json.loads((golden / "core.json").read_text())


@pytest.fixture(scope="module")
def results(numbers):
    "Each case's backtest, run once; a panel holds only the rows from `first` to `last`."
    panels, found = {}, {}
    for name, case in numbers["cases"].items():
        about = numbers["panels"][case["panel"]]
        if case["panel"] not in panels:
            folder = SHARED / about["path"]
            panels[case["panel"]] = Store(folder.parent, folder.name).panel(
                about["timeframe"], start_ms=parse_utc(about["first"]), end_ms=parse_utc(about["last"]))
        config = with_values(Config(), {**case["config"], "backtest.risk": "core"})
        found[name] = backtest(panels[case["panel"]], config, holdout=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_core_weights(numbers, results, name):
    for time, expected in numbers["cases"][name]["weights"].items():
        row = results[name].targets.loc[pd.Timestamp(time)]
        held = row[row != 0.0].to_dict()
        assert held.keys() == expected.keys(), f"{name} at {time}"
        for symbol, weight in expected.items():
            assert held[symbol] == pytest.approx(weight, abs=1e-9), f"{name} at {time}: {symbol}"


@pytest.mark.parametrize("name", CASES)
def test_equity_and_turnover(numbers, results, name):
    expected, result = numbers["cases"][name]["backtest_core"], results[name]
    times = pd.DatetimeIndex([pd.Timestamp(time) for time in expected["equity"]])
    np.testing.assert_allclose(result.equity.loc[times, "equity"], list(expected["equity"].values()), rtol=1e-9)
    assert result.equity["equity"].iloc[-1] == pytest.approx(expected["final_equity"], rel=1e-9)
    assert result.equity["turnover"].sum() == pytest.approx(expected["turnover_sum"], rel=1e-9)
