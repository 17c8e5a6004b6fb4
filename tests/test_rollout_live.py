"""A rollout with an account that trades: from paper to a quarter of the capital, and back by itself when a gate breaks."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_account import MARKET, recording
from test_deploy import HOUR, MET, Tree
from typer.testing import CliRunner

from xsmom_nb.backtest.figure import PARITY, keep_figure
from xsmom_nb.backtest.ledger import AccountRecord, parity_ledger
from xsmom_nb.cli import app
from xsmom_nb.clock import DAY_MS, SystemClock
from xsmom_nb.config import Config, to_yaml, with_values
from xsmom_nb.decide import decide
from xsmom_nb.decision import Decided
from xsmom_nb.errors import RefusedError
from xsmom_nb.live.desk import open_desk
from xsmom_nb.market import synthetic
from xsmom_nb.ops.facts import facts_of, kill_in, shadow_config
from xsmom_nb.optimizer.deploy import read_current
from xsmom_nb.optimizer.versions import live_config, write_version
from xsmom_nb.outbox import emit, undelivered
from xsmom_nb.risk import brakes
from xsmom_nb.risk.tracking import risk_rules
from xsmom_nb.runs.batch import run_directly
from xsmom_nb.state import open_state, save_equity, save_memory

OPENS = recording().open_time_ms
START = int(next(open_ms for open_ms in OPENS[200:] if open_ms % DAY_MS == 0))  # a midnight: the rollout begins
MINUTE = 60_000
QUICK = {"filters.regime.ema_len": 5, "filters.regime.slope_bars": 4, "strategy.lookbacks": [2, 4, 8, 16],
         "strategy.vol_lookback": 24, "live.history_bars": 150, "strategy.kappa": 1.5,
         "live.state_url": "sqlite:///state/xsmom.sqlite", "paper.account_url": "sqlite:///state/paper.sqlite", **MARKET}


class Rollout:
    "A working tree, a version that a search has found, and the time."

    def __init__(self, folder: Any, monkeypatch: Any) -> None:
        (folder / "configs").mkdir(parents=True)
        live = with_values(Config(), QUICK)
        (folder / "configs" / "config.yaml").write_text(to_yaml(live))
        self.tree, self.patch, self.old = Tree(folder), monkeypatch, (folder / "configs" / "config.yaml").read_bytes()
        self.folder, self.configs, self.state = folder, self.tree.configs, self.tree.state
        index = pd.date_range("2025-01-01", periods=720, freq="h", tz="UTC", name="timestamp")
        returns = np.random.default_rng(5).normal(1e-5, 0.004, 720)

        def search(run: Any) -> None:
            run.write_frame("record", pd.DataFrame({"candidate_0": returns, "baseline_0": 0.0}, index=index))

        run_id = run_directly("optimize", search, {}, live, project=folder, state=self.state, secrets={}).run_id
        self.version = write_version(
            self.configs, with_values(live, {"strategy.kappa": 2.0}), live, verdict=[MET], approved=True, run_id=run_id,
            code_digest="ab" * 32, data_digest="cd" * 32, now_ms=START).version
        monkeypatch.chdir(folder)
        monkeypatch.setattr(synthetic, "synthetic_panel", lambda **_: recording())

    def begin(self, stage: str) -> None:
        self.tree.promote(self.version, stage=stage, who="weekly run", now_ms=START)

    def ask(self, hour: float, *words: str, status: int = 0) -> Any:
        "What `xsmom rollout` says at an hour of the rollout."
        self.patch.setattr(SystemClock, "now_ms", lambda _: START + round(hour * HOUR))
        answer = CliRunner().invoke(app, ["rollout", "--dataset", "synthetic", "--json", *words])
        assert answer.exit_code == status, answer.output
        return json.loads(answer.stdout)

    def trade(self, config: Config, hours: Any) -> tuple[list[Decided], Any]:
        "Trade some hours of the rollout on paper."
        decided: list[Decided] = []
        with open_desk(config, recording(), now_ms=START + hours[0] * HOUR + MINUTE, base=self.folder) as desk:
            clock: Any = desk.clock
            for hour in hours:
                clock.set(START + hour * HOUR + MINUTE)
                desk.cycle(SimpleNamespace(record=decided.append))
            return decided, AccountRecord(tuple(decided), tuple(desk.port.fetch_fills(0)), tuple(desk.port.fetch_ledger(0)))

    def equity(self, *values: float, first: int = 0) -> None:
        "Plant what the live account was worth."
        with self.state.write() as connection:
            for hour, value in enumerate(values, first):
                amount: Any = f"{value:f}"
                save_equity(connection, START + hour * HOUR + MINUTE, amount, amount)

    def events(self) -> list[Any]:
        with self.state.read() as connection:
            return undelivered(connection)

    def changes(self) -> list[dict[str, str]]:
        with (self.configs / "changes.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def rollout(tmp_path, monkeypatch) -> Any:
    made = Rollout(tmp_path / "checkout", monkeypatch)
    yield made
    made.state.close()


def criteria(told: Any) -> dict[str, Any]:
    return {each["criterion"]: each["ok"] for each in told["criteria"]}


def test_from_paper_to_a_quarter_and_back_by_itself(rollout):
    rollout.begin("shadow")
    shadow = shadow_config(rollout.configs, rollout.version)
    decided, record = rollout.trade(shadow, range(50))
    assert len(record.fills) > 20
    early = rollout.ask(47.5, "--step")
    assert (early["action"], criteria(early)["hours"], criteria(early)["parity"]) == ("stay", False, None)
    day = AccountRecord(tuple(decided[24:49]), record.fills, record.entries)
    with open_state(shadow.live.state_url, rollout.folder) as paper:
        ledger = parity_ledger(recording(), shadow, day)
        keep_figure(paper, ledger, shadow.rollout.max_parity_bps_per_day, "20250401T060000Z-5f00aa", START + 50 * HOUR)

    asked = rollout.ask(50)
    assert (asked["action"], asked["next_stage"], asked["carried_out"]) == ("advance", "small", False), asked["why"]
    assert set(criteria(asked).values()) == {True}
    assert live_config(rollout.configs).strategy.kappa == 1.5  # to ask changes nothing
    done = rollout.ask(50, "--step")
    assert (done["action"], done["carried_out"]) == ("advance", True)

    live = live_config(rollout.configs)
    assert live.strategy.kappa == 2.0
    quarter, _ = rollout.trade(live, range(51, 60))
    scaled = 0
    for each in quarter:
        assert each.memory.rollout == 0.25
        whole = decide(each.snapshot, replace(each.memory, rollout=1.0), live)
        for small, large in zip(each.decision.cards, whole.cards, strict=True):
            assert small.overlaid == pytest.approx(0.25 * large.overlaid, abs=1e-12)
            scaled += small.overlaid != 0.0
    assert scaled > 0
    standing = CliRunner().invoke(app, ["status"]).stdout
    assert f"{rollout.version}, stage small, 25% of its targets" in standing

    equity = float(quarter[-1].decision.equity)
    rollout.equity(equity, 0.9 * equity, 0.99 * equity, first=60)  # it came back, but it fell by a tenth
    broken = rollout.ask(62.5, "--step")
    assert (broken["action"], criteria(broken)["drawdown"]) == ("roll_back", False)
    assert (rollout.configs / "config.yaml").read_bytes() == rollout.old
    event = rollout.events()[-1]
    assert (event.kind, event.level, event.data["action"]) == ("rollback", "WARNING", "rollback")
    assert "drawdown" in event.text
    row = rollout.changes()[-1]
    assert (row["action"], row["previous"], row["who"]) == ("rollback", rollout.version, "rollout")
    assert "strategy.kappa: 2.0 -> 1.5" in row["changes"]

    with pytest.raises(RefusedError, match=r"kappa = 2\.0"):
        rollout.trade(live, [63])
    (again,), _ = rollout.trade(live_config(rollout.configs), [63])
    assert again.memory.rollout == 1.0
    assert rollout.ask(64, "--step")["watched"] is False


def test_a_ledger_beyond_the_budget_takes_the_version_back(rollout):
    rollout.begin("small")
    rollout.equity(*[10_000.0] * 26)
    assert rollout.ask(26, "--step")["action"] == "stay"
    ended = START + 25 * HOUR
    figure = {"bps_per_day": 9.0, "start_ms": START + HOUR, "end_ms": ended, "time_ms": ended, "run_id": "r"}
    with rollout.state.write() as connection:
        save_memory(connection, PARITY, {**figure, "start_ms": START - HOUR}, START)  # of another config's hours, in part
    assert criteria(rollout.ask(26, "--step"))["parity"] is None
    with rollout.state.write() as connection:
        save_memory(connection, PARITY, figure, START)
    broken = rollout.ask(26, "--step")
    assert (broken["action"], criteria(broken)["parity"]) == ("roll_back", False)
    assert live_config(rollout.configs).strategy.kappa == 1.5


def test_what_nobody_measured_keeps_the_stage_and_says_why(rollout):
    rollout.begin("shadow")
    told = rollout.ask(60, "--step")
    assert told["action"] == "stay"
    assert f"xsmom live --account {rollout.version}" in told["why"]
    assert {name for name, ok in criteria(told).items() if ok is not True} == {
        "parity", "drawdown", "kill_switch", "fill_error", "expected_returns"}
    assert rollout.events()[-1].kind == "rollout_held"
    rollout.trade(shadow_config(rollout.configs, rollout.version), range(4))  # then it went quiet
    told = rollout.ask(60, "--step")
    assert (told["action"], criteria(told)["drawdown"]) == ("stay", None)
    assert "4 of 60 cycles of the stage were taken" in told["why"]
    (rollout.configs / "config.yaml").write_bytes(rollout.old + b"\nstrategy: [\n")
    facts = facts_of(rollout.state, rollout.folder, read_current(rollout.state, rollout.configs), recording(), START + 60 * HOUR)
    assert facts.missing["drawdown_pct"] == "the live config cannot be read"


def test_a_withdrawal_is_no_drawdown_and_a_gap_hides_no_fall(rollout):
    rollout.begin("small")
    rollout.equity(10_000.0, 10_050.0, 5_050.0, 5_040.0)
    with rollout.state.write() as connection:
        connection.exec_driver_sql(f"INSERT INTO ledger VALUES ('out', {START + HOUR + 2 * MINUTE}, 'transfer', '', '-5000')")
    told = {each["criterion"]: each for each in rollout.ask(4)["criteria"]}
    assert told["drawdown"]["value"] == pytest.approx(100 * 10 / 10_050)
    rollout.equity(4_000.0, first=40)
    broken = rollout.ask(41)
    assert (broken["action"], criteria(broken)["drawdown"]) == ("roll_back", False)


def test_the_kill_switch_is_recognised_by_what_it_says(rollout):
    rules, facts = risk_rules(Config(), None), SimpleNamespace(equity=90.0)
    told = [brakes._of_account(facts, brakes.Brakes(), after, 0.2, rules)[0] for after in (
        brakes.Brakes(killed_until_ms=None), brakes.Brakes(paused_until_ms=START + DAY_MS, day_start=100.0, day_high=100.0))]
    for text in told:
        with rollout.state.write() as connection:
            connection.exec_driver_sql("DELETE FROM events")
        assert kill_in(rollout.state, START, START)[0] is None
        with rollout.state.write() as connection:
            emit(connection, START + HOUR, "WARNING", "notice", text)
        assert kill_in(rollout.state, START, START + HOUR) == (True, "")
    begun = brakes.Brakes(killed_until_ms=None)
    (still,) = brakes._of_account(facts, begun, begun, 0.2, rules)[:1]
    with rollout.state.write() as connection:
        connection.exec_driver_sql("DELETE FROM events")
        emit(connection, START + HOUR, "WARNING", "notice", still)
    assert kill_in(rollout.state, START, START + HOUR)[0] is None  # from before this stage
