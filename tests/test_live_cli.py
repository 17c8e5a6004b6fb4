"""`xsmom live` and `xsmom status` from outside: what a rehearsal leaves, how it goes on, what is refused, and what a kill costs.

A small working tree of its own, with six symbols over forty days; one test does without any data. The notebook is executed once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from xsmom_nb.cli import app
from xsmom_nb.lease import hold_lease
from xsmom_nb.market.panel import FIELDS
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.runs.rehearsal import ACCOUNTS
from xsmom_nb.state import open_state

XSMOM = Path(sys.executable).with_name("xsmom")
SETTINGS = """
paths: {dataset: small}
optimizer: {holdout_start: 2024-02-05}
filters: {regime: {ema_len: 20}}
risk: {atr_len: 14}
"""
START = "2024-02-01T08:00"


@pytest.fixture(scope="module")
def tree(tmp_path_factory, root) -> Path:
    "A working tree with data; the accounts in it are told apart by their names."
    folder = tmp_path_factory.mktemp("live") / "checkout"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "config.yaml").write_text(SETTINGS)
    (folder / "scheduled").mkdir()
    shutil.copy(root / "scheduled" / "live_cycle.ipynb", folder / "scheduled")
    panel = synthetic_panel(bars=24 * 40, symbols=6, momentum=2.0, start="2024-01-01")
    for i, symbol in enumerate(panel.symbols):
        bars = pd.DataFrame({"timestamp": panel.index, **{name: getattr(panel, name)[:, i] for name in FIELDS}})
        Store(folder / "data", "small").write_bars(symbol, "1h", bars.dropna())
    return folder


def environment(**more: str) -> dict[str, str]:
    "Ours without its settings of this project; compiled code is still shared."
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XSMOM_") or name == "XSMOM_CACHE_DIR"}
    return {**ours, **more}


@pytest.fixture
def xsmom(tree, monkeypatch) -> Callable[..., Any]:
    "Call a command in this process."
    for name in [name for name in os.environ if name.startswith("XSMOM_") and name != "XSMOM_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("XSMOM_DATA", str(tree / "data"))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def answer_of(answer: Any) -> dict[str, Any]:
    "The JSON of a call that succeeded."
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


def runs_of(tree: Path, kind: str = "*") -> set[Path]:
    "The kept runs."
    return set((tree / "runs").glob(f"{kind}/*Z-*"))


# ── Rehearsals ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_hours_go_on_and_are_evidence(xsmom, tree):
    first = answer_of(xsmom("live", "--cycles", 3, "--start", START, "--direct", "--account", "steady", "--json"))
    again = answer_of(xsmom("live", "--cycles", 2, "--direct", "--account", "steady", "--json"))
    times = [hour["time"] for hour in [*first["hours"], *again["hours"]]]
    assert times == [f"2024-02-01T{hour:02}:01:00Z" for hour in range(8, 13)]
    assert sum(hour["orders"] for hour in first["hours"]) > 0
    assert sum(hour["fills"] for hour in again["hours"]) > 0
    assert first["kind"] == again["kind"] == "live"
    assert first["run_id"] != again["run_id"]
    standing = answer_of(xsmom("status", "--account", "steady", "--json"))
    assert standing["traded"]
    assert standing["paper"]["reached_ms"] == standing["time_ms"]
    assert {symbol: held["quantity"] for symbol, held in standing["positions"].items()} == standing["paper"]["positions"]
    assert float(standing["equity"]) == again["hours"][-1]["equity"]
    replayed = xsmom("runs", "replay", again["run_id"])
    assert replayed.exit_code == 0
    assert "2 of 2 decisions equal" in replayed.stdout
    why = xsmom("runs", "why", again["run_id"], "BTCUSDT")
    assert why.exit_code == 0
    assert "BTCUSDT" in why.stdout
    assert xsmom("runs", "verify").exit_code == 0
    assert not (tree / "state" / "paper.sqlite").exists()  # the account that counts was not touched


def test_the_notebook_decides_the_same(xsmom, tree):
    words = ["live", "--cycles", 1, "--start", START, "--json"]
    together = answer_of(xsmom(*words, "--direct", "--account", "together"))
    alone = answer_of(xsmom(*words, "--account", "alone"))
    assert alone["kind"] == "live_cycle"
    assert alone["hours"][0] | {"run_id": ""} == together["hours"][0] | {"run_id": ""}
    line = (Path(together["path"]) / "outputs" / "decisions.jsonl").read_bytes().splitlines()[0]
    folder = Path(alone["path"])
    assert (folder / "outputs" / "decision.json").read_bytes() == line + b"\n"
    orders = json.loads((folder / "outputs" / "orders.json").read_bytes())
    assert orders
    assert {order["outcome"] for order in orders} == {"accepted"}
    assert [{**order, "outcome": "", "note": ""} for order in json.loads(line)["intents"]] == [
        {**order, "outcome": "", "note": ""} for order in orders]
    assert json.loads((folder / "outputs" / "remarks.json").read_bytes()) == []
    assert len(pd.read_parquet(folder / "outputs" / "equity.parquet")) == 1
    page = (folder / "notebook.html").read_text()
    assert "Nothing needs anybody's attention." in page.replace("&#39;", "'")
    assert page.count("<img") == 4
    assert "Traceback" not in page
    assert "with open_desk" not in page
    assert xsmom("runs", "replay", alone["run_id"]).exit_code == 0


def test_without_any_data(tmp_path, monkeypatch):
    (tmp_path / "checkout" / "scheduled").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")
    for name in [name for name in os.environ if name.startswith("XSMOM_") and name != "XSMOM_CACHE_DIR"]:
        monkeypatch.delenv(name)
    shown = CliRunner().invoke(app, ["live", "--cycles", "2", "--direct"])
    assert shown.exit_code == 0, shown.stderr
    assert "2, from 2025-03-31T23:01:00Z to 2025-04-01T00:01:00Z" in shown.stdout  # the last hours before the holdout
    assert "SYNTHETIC DATA" in shown.stderr
    status = CliRunner().invoke(app, ["status"])
    assert status.exit_code == 0
    assert "nothing was traded yet" in status.stdout


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 3, "xsmom live --cycles"),
        (["--start", START], 2, "expected --cycles N"),
        (["--direct", "--fresh"], 2, "--fresh, --direct: for the simulated clock only"),
        (["--cycles", "1", "--start", "soon"], 2, "expected a UTC date"),
        (["--cycles", "1", "--account", "../main"], 2, "it names a folder in state/accounts"),
        (["--cycles", "1000", "--start", "2024-02-01"], 2, "the data of small has cycles from 2024-01-01T01:01:00Z"),
        (["--cycles", "1", "--start", "2023-06-01"], 2, "the data of small has cycles from 2024-01-01T01:01:00Z"),
        (["--cycles", "1", "--data", "nowhere"], 2, "nowhere"),
        (["--cycles", "1", "--dataset", "big"], 2, "big"),
        (["--cycles", "1", "--set", 'live.mode="demo"'], 2, "not built yet"),
        (["--cycles", "1", "--cycle", "2"], 2, "--cycles"),
    ],
)
def test_refused_before_it_starts(xsmom, tree, words, status, said):
    before = runs_of(tree), sorted((tree / ACCOUNTS).glob("*/*.sqlite"))
    answer = xsmom("live", *words)
    assert (answer.exit_code, answer.stdout) == (status, "")
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert (runs_of(tree), sorted((tree / ACCOUNTS).glob("*/*.sqlite"))) == before


def test_time_goes_forward_unless_begun_anew(xsmom):
    words = ["live", "--cycles", 1, "--direct", "--account", "forward"]
    assert xsmom(*words, "--start", START).exit_code == 0
    back = xsmom(*words, "--start", "2024-01-30")
    assert back.exit_code == 3
    assert "--fresh" in back.stderr
    assert "2024-01-30T00:01:00Z" in back.stderr
    assert "its next cycle is at 2024-02-01T09:01:00Z" in back.stderr
    anew = answer_of(xsmom(*words, "--start", "2024-01-30", "--fresh", "--json"))
    assert [hour["time"] for hour in anew["hours"]] == ["2024-01-30T00:01:00Z"]
    assert xsmom("runs", "verify").exit_code == 0  # what the first account did is still kept


def test_a_second_trader_is_turned_away(xsmom, tree):
    words = ["live", "--cycles", 1, "--direct", "--account", "busy"]
    assert xsmom(*words, "--start", START).exit_code == 0
    url = f"sqlite:///{tree / ACCOUNTS / 'busy' / 'state.sqlite'}"
    with open_state(url) as state, hold_lease(state, "trader", "code", "notebooks"):
        second, anew = xsmom(*words), xsmom(*words, "--start", START, "--fresh")
        shown = xsmom("status", "--account", "busy")
    assert second.exit_code == 3
    assert f"process {os.getpid()}" in second.stderr
    assert anew.exit_code == 3
    assert "a process trades with it" in anew.stderr
    assert shown.exit_code == 0
    assert f"process {os.getpid()}" in shown.stdout
    assert xsmom(*words).exit_code == 0


def test_a_damaged_account_is_no_new_one(xsmom, tree):
    words = ["--account", "damaged"]
    assert xsmom("live", "--cycles", 1, "--direct", "--start", START, *words).exit_code == 0
    (tree / ACCOUNTS / "damaged" / "paper.sqlite").write_bytes(b"not a database" * 500)
    for answer in (xsmom("live", "--cycles", 1, "--direct", *words), xsmom("status", *words)):
        assert answer.exit_code == 1
        assert "paper.sqlite is damaged" in answer.stderr
        assert "Traceback" not in answer.stderr


# ── Interruption ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_ctrl_c_keeps_what_was_done(xsmom, tree):
    before = runs_of(tree, "live")
    words = ["live", "--cycles", "80", "--start", START, "--direct", "--account", "stopped"]
    ours = environment(XSMOM_DATA=str(tree / "data"))
    with subprocess.Popen([XSMOM, *words], cwd=tree, env=ours, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 1, said
    assert all(line.startswith("2024-02-01T") for line in lines)
    assert "was stopped" in said
    assert "Traceback" not in said
    (folder,) = runs_of(tree, "live") - before
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["status"] == "aborted"
    assert 3 <= manifest["metrics"]["cycles"] < 80
    further = answer_of(xsmom("live", "--cycles", 1, "--direct", "--account", "stopped", "--json"))
    done = (folder / "outputs" / "decisions.jsonl").read_bytes().splitlines()
    last = pd.Timestamp(json.loads(done[-1])["time_ms"], unit="ms", tz="UTC")
    assert pd.Timestamp(further["hours"][0]["time"]) - last in (pd.Timedelta(0), pd.Timedelta(hours=1))
    assert xsmom("state", "check", "--set", f'live.state_url="sqlite:///{ACCOUNTS}/stopped/state.sqlite"').exit_code == 0
