"""The benchmark still measures equal work: every engine's equity agrees with ours, and what it keeps can be shown."""

import io
import json

import numpy as np
import pytest
from peers import imported
from rich.console import Console

from benchmarks import contest, goals, ours
from benchmarks.__main__ import rounded
from benchmarks.engines import ENGINES
from benchmarks.report import draw, show
from benchmarks.works import SETTINGS, Work, has_market_data, parameter_sets
from xsmom_nb.config import Config, with_values
from xsmom_nb.ops.readme import benchmark_markdown

BARS = 1_500
SHORT = {"pandas loop": 450, "bt": 450}  # bars that are enough to trade


def equity(engine: str, work: Work) -> np.ndarray:
    "The equity curve of one engine."
    runner = ENGINES[engine]()
    runner.prepare(work)
    runner.run()
    return runner.equity


EVERY_BAR = next(iter(SETTINGS))
COMPARED = [name for name, engine in ENGINES.items() if engine.compared_under and name != "kernel"]


@pytest.mark.parametrize(("engine", "setting"), [
    (name, setting) for name in COMPARED for setting in SETTINGS if setting == EVERY_BAR or name not in SHORT])
def test_engines_agree_to_1e_9(engine, setting):
    if contest.absent(engine):
        pytest.skip(f"no package {engine} found")
    if engine == "vectorbt":
        imported(engine)
    source = "real" if has_market_data() else "synthetic"
    work = Work(setting, source=source, first_rows=SHORT.get(engine, BARS), frictions=ENGINES[engine].compared_under)
    theirs, own = equity(engine, work), equity("kernel", work)
    assert np.ptp(own) / own[0] > 0.01, "an account that does not trade would agree with everything"
    np.testing.assert_allclose(theirs, own, rtol=1e-9)


def test_engines_agree_where_symbols_come_and_go():
    work = Work("defaults, every bar", rows=2_500, symbols=40, source="synthetic", values={"exchange.max_symbols": 30})
    close = work.panel().close
    assert np.isnan(close[0]).any(), "nobody lists late"
    assert np.isnan(close[-1]).any(), "nobody ends early"
    np.testing.assert_allclose(equity("NumPy", work), equity("kernel", work), rtol=1e-9)


def test_another_equity_stops_the_run(monkeypatch, tmp_path):
    class Answers:
        engine = "NumPy"

    curves = {"NumPy": np.array([1.0, 1.1, 1.2]), "kernel": np.array([1.0, 1.1, 1.2 + 1e-7])}
    monkeypatch.setattr(contest, "equity_of", lambda worker, work, folder: curves[worker.engine])
    kernel = type("Kernel", (), {"engine": "kernel"})()
    with pytest.raises(AssertionError, match="no time is taken of work that is not the same"):
        contest.equity_error(Answers(), kernel, Work("defaults, every bar", rows=3), tmp_path)


def test_engines_in_their_own_processes_are_timed():
    work = Work("defaults, every bar", rows=400, source="synthetic")
    rows = contest.with_ratios(contest.contest(work, ["kernel", "NumPy"], rounds=2, seconds=0.0))
    assert [row["engine"] for row in rows] == ["kernel", "NumPy"]
    for row in rows:
        assert row["equity_error"] <= 1e-9
        assert 0.0 < row["min_ms"] <= row["median_ms"]
        assert row["peak_mb"] > 50
    assert rows[1]["times_kernel"] > 1.0


def test_an_absent_peer_is_reported(monkeypatch):
    monkeypatch.setitem(contest.NEEDS, "bt", "no_such_package")
    rows = contest.contest(Work("defaults, every bar", rows=400, source="synthetic"), ["kernel", "bt"], rounds=1, seconds=0.0)
    assert rows[1]["absent"] == "not installed: no_such_package comes with the extra `bench`"
    assert "median_ms" not in rows[1]


def test_parameter_sets_are_valid_and_span_all_18():
    sets = parameter_sets(64)
    assert sets == parameter_sets(64)
    assert len(sets[0]) == 18
    assert {each["strategy.rebalance_every_bars"] for each in sets} == {1, 2, 4, 8, 12, 24}
    assert len({with_values(Config(), each).model_dump_json() for each in sets}) == 64


def test_the_kept_results_can_be_shown(root, tmp_path):
    results = json.loads((root / "benchmarks" / "results" / "latest.json").read_text(encoding="utf-8"))
    assert not results["quick"]
    assert results["goals"] == rounded(goals.goals(results))
    shown = io.StringIO()
    show(results, Console(file=shown, width=200))
    assert {row["engine"] for row in results["peers"] if row["engine"] not in shown.getvalue()} == set()
    draw(results, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size < 100_000
    assert benchmark_markdown(results) in (root / "README.md").read_text(encoding="utf-8"), "run `make readme`"


def test_our_engine_decides_something_in_the_live_benchmark():
    work = Work("defaults, every bar", rows=3_000, source="synthetic")
    assert ours.live_decision(work.panel(), work.config())().intents
