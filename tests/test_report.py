"""The daily report of an account that trades: its tables add up to the books, and its page says what is missing."""

import ast
import html
import json
import re
import shutil
from decimal import Decimal
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from small_account import MARKET, quick, time_of, trade

from xsmom_nb.backtest.metrics import curve_metrics
from xsmom_nb.clock import DAY_MS, format_utc
from xsmom_nb.config import Config, flatten, to_yaml, with_values
from xsmom_nb.files import write_atomically
from xsmom_nb.ops.breakdown import by_cause, by_day, by_part, by_symbol, costs, exposure
from xsmom_nb.ops.records import read_records
from xsmom_nb.ops.report import LONGEST, report_period
from xsmom_nb.ops.scorecard import account_metrics, earned_by_bar, uptime
from xsmom_nb.outbox import undelivered
from xsmom_nb.runs.execute import execute_run
from xsmom_nb.state import export, open_state

ROOT = Path(__file__).parents[1]
HOURS = range(24)


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A small account that has traded over a midnight."
    folder = tmp_path_factory.mktemp("account")
    trade(folder, HOURS, MARKET)
    return folder


def test_every_table_adds_up_to_the_books(account: Path) -> None:
    "Result by day, by part and by symbol is the change of the equity; fees, funding and gains are those of the wallet."
    start_ms, end_ms = time_of(0) // DAY_MS * DAY_MS, time_of(HOURS[-1]) + 1
    with open_state(f"sqlite:///{account}/state.sqlite") as state:
        records, tables = read_records(state, start_ms, end_ms, "1h"), export(state)
    change = Decimal(tables["equity"][-1]["equity"]) - Decimal(tables["equity"][0]["equity"])
    sums = {kind: float(sum(Decimal(row["amount"]) for row in tables["ledger"]
                            if row["kind"] == kind and row["time_ms"] > tables["equity"][0]["time_ms"]))
            for kind in ("trade", "fee", "funding")}
    days, parts, symbols = by_day(records), by_part(records), by_symbol(records)
    assert len(days) >= 2
    assert days["cycles"].sum() == len(HOURS)
    for found in (days["pnl"].sum(), parts["result"], parts.iloc[:-1].sum(), symbols["pnl"].sum()):
        assert found == pytest.approx(float(change), abs=1e-6)
    assert parts["price, realised"] == pytest.approx(sums["trade"])
    assert -costs(records)["fees"] == pytest.approx(sums["fee"])
    assert days["funding"].sum() == pytest.approx(sums["funding"])
    assert by_cause(records)["trades"].sum() == len(tables["trades"]) == days["trades"].sum() > 3
    assert by_cause(records)["pnl"].sum() == pytest.approx(float(sum(Decimal(row["pnl"]) for row in tables["trades"])))
    held = sum(Decimal(row["quantity"]) != 0 for row in tables["positions"])
    assert exposure(records)["positions"].iloc[-1] == held > 0


def test_the_scorecard_measures_as_a_backtest_does(account: Path) -> None:
    "Its Sharpe ratio and drawdown are those of `backtest.metrics` on the equity that was written; uptime counts gaps."
    start_ms = time_of(0) // DAY_MS * DAY_MS
    with open_state(f"sqlite:///{account}/state.sqlite") as state:
        records = read_records(state, start_ms, time_of(HOURS[-1]) // 3_600_000 * 3_600_000 + 3_600_000, "1h")
    plain = records.equity.pct_change().dropna().to_numpy()
    expected, found = curve_metrics(plain, 365 * 24), account_metrics(records)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert uptime(records) == 1.0
    assert np.allclose(earned_by_bar(records)["returns"].to_numpy()[1:], plain)


def project_of(folder: Path, config: Config) -> Path:
    "A working tree with the notebook of the report."
    (folder / "scheduled").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scheduled" / "daily_report.ipynb", folder / "scheduled")
    write_atomically(folder / "config.yaml", to_yaml(config))
    return folder


def words_of(page: Path) -> str:
    "What a reader sees of a page."
    markup = re.compile(r"<style.*?</style>|<script.*?</script>|<[^>]+>", re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(markup.sub(" ", page.read_text())))


def test_the_page_of_a_day(account: Path) -> None:
    "An audited run: the page, the picture, and the short form in the outbox; the run whose folder is gone is named."
    config = with_values(quick(account, **MARKET), {"health.min_free_gb": 0.0, "report.days": 5})
    day = format_utc(time_of(HOURS[-1]))[:10]
    with open_state(config.live.state_url) as state, state.write() as connection:
        connection.exec_driver_sql("UPDATE intents SET run_id = '20250101T000000Z-5f00aa'")
    run = execute_run("daily_report", {"date": day}, config, project=project_of(account, config), progress=False, secrets={})
    text = words_of(run.page)
    for said in ("Somebody should look at this", f"paper, {day}", "its folder is not there", "Sharpe", "above 1.50", "too early",
                 "not yet realised", "there is none yet", "heartbeat cycle"):
        assert said in text, said
    assert "Traceback" not in text
    with open_state(config.live.state_url) as state, state.read() as connection:
        event = undelivered(connection)[-1]
    report = json.loads((run.folder / "outputs" / "report.json").read_bytes())
    assert (event.kind, event.data["run_id"], event.text) == ("daily_report", run.run_id, report["text"])
    assert len(event.text) <= LONGEST
    assert Path(event.data["plot"]).read_bytes()[:4] == b"\x89PNG"
    assert run.metrics["equity"] == pytest.approx(event.data["figures"]["equity"])
    lines = next((account / "logs").iterdir()).read_text().splitlines()
    assert {json.loads(line)["run_id"] for line in lines} == {run.run_id}
    assert [json.loads(line)["event"] for line in lines] == ["run started", "report made", "run ended"]


def executed(project: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> str:
    "What the cells of the notebook show, executed in this process."
    mpl.use("Agg")
    monkeypatch.chdir(project)
    cells = json.loads((project / "scheduled" / "daily_report.ipynb").read_text())["cells"]
    shown: list[str] = []
    names: dict[str, object] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body[-1] = ast.Assign([ast.Name("_shown", ast.Store())], last.value)
            ast.fix_missing_locations(tree)
        exec(compile(tree, "cell", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update(parameters)
        if "display" in names:
            names["display"] = lambda *values: shown.extend(value.data for value in values)
        value = names.pop("_shown", None)
        shown.append(getattr(value, "_repr_html_", lambda value=value: None)() or getattr(value, "data", None) or str(value))
    return " ".join(map(str, shown))


def test_nothing_is_said_and_nothing_crashes(account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An account that never traded, and a day before the first cycle of one that did: both have a page that says so."
    config = with_values(quick(tmp_path, **MARKET), {"health.min_free_gb": 0.0})
    project = project_of(tmp_path, config)
    for key, value in flatten(config).items():
        if key in ("live.state_url", "paper.account_url", "health.min_free_gb", "live.emergency_stop_file"):
            monkeypatch.setenv(f"XSMOM_{key.replace('.', '__').upper()}", str(value))
    never = executed(project, monkeypatch)
    assert "this account has never completed a cycle" in never
    assert "There is nothing to report" in never
    monkeypatch.setenv("XSMOM_LIVE__STATE_URL", f"sqlite:///{account}/state.sqlite")
    before = report_period("", 1, time_of(0) - 3 * DAY_MS).day
    early = executed(project, monkeypatch, date=before, days=3, tell=False)
    assert f"no cycle was completed on {before}" in early
    assert "the account begins at" in early
