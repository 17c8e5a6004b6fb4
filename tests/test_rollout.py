"""A rollout from outside: a gate that breaks takes the version back by itself, and nothing moves it on before its time."""

import csv
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_deploy import HOUR, OLD, Tree, remember_yaml

from xsmom_nb.config import Config
from xsmom_nb.deployments import find_deployment, running_share
from xsmom_nb.errors import RefusedError
from xsmom_nb.optimizer.rollout import FALSE_ALARM, Facts, evidence_against, judge, step_rollout
from xsmom_nb.outbox import undelivered
from xsmom_nb.state import check

SOUND = Facts("", "", parity_bps_per_day=1.0, drawdown_pct=1.0, killed=False, fills=50, slippage_bps=1.2,
              modelled_slippage_bps=1.0, slippage_error_bps=0.2, input_drift=0.02, surprises=(0.1, -0.1))
BROKEN: dict[str, Any] = {"parity_bps_per_day": 6.0, "drawdown_pct": 8.1, "killed": True, "slippage_bps": 4.0, "input_drift": 0.4,
                          "surprises": (-0.9,) * 40}


class Rollout:
    "A version on its way, step by step."

    def __init__(self, tree: Tree, stage: str = "shadow") -> None:
        self.tree, self.version = tree, tree.version(strategy__kappa=2.0)
        self.begin_ms = tree.promote(self.version, stage=stage, who="weekly run").time_ms

    def step(self, hours: float, stage: str, **changes: Any) -> str:
        facts = replace(SOUND, version=self.version, stage=stage, **changes)
        now_ms = self.begin_ms + round(hours * HOUR)
        return step_rollout(self.tree.state, self.tree.configs, facts, now_ms, environ={}).action

    @property
    def standing(self) -> tuple[float, float]:
        "What trades: kappa and share."
        with self.tree.state.read() as connection:
            return self.tree.kappa, running_share(connection)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Any:
    remember_yaml(monkeypatch.setattr)
    made = Tree(tmp_path / "checkout")
    yield made
    made.state.close()


@pytest.mark.parametrize("stage", ["shadow", "small", "full"])
def test_a_broken_gate_takes_the_version_back_in_every_stage(tree, stage):
    for name, value in BROKEN.items():
        rollout = Rollout(tree, "shadow" if stage == "shadow" else "small")
        if stage == "full":
            assert rollout.step(48, "small") == "advance"
        assert rollout.standing == {"shadow": (1.5, 1.0), "small": (2.0, 0.25), "full": (2.0, 1.0)}[stage]
        assert rollout.step(49, stage, **{name: value}) == "roll_back"
        assert rollout.standing == (1.5, 1.0)
        assert (tree.configs / "config.yaml").read_text() == OLD
        with tree.state.read() as connection:
            newest = undelivered(connection)[-1]
            assert find_deployment(connection, "candidate") is None
        assert newest.level == "WARNING"
        assert newest.data["action"] == ("withdraw" if stage == "shadow" else "rollback")
        assert "FAILED" in newest.text
        tree.hour += 100
    rows = list(csv.DictReader((tree.configs / "changes.csv").read_text().splitlines()))
    taken_back = [row for row in rows if row["action"] in ("withdraw", "rollback")]
    assert [row["who"] for row in taken_back] == ["rollout"] * len(BROKEN)
    assert check(tree.state) == []


def test_time_and_a_missing_fact_keep_a_version_where_it_is(tree):
    rollout = Rollout(tree)
    assert [rollout.step(hours, "shadow") for hours in (0, 47.99)] == ["stay", "stay"]
    for name in (*BROKEN, "slippage_error_bps"):
        assert rollout.step(60, "shadow", **{name: None}) == "stay"
    assert rollout.step(60, "shadow", fills=19) == "stay"
    with tree.state.read() as connection:
        held = [event for event in undelivered(connection) if event.kind == "rollout_held"]
    assert len(held) == len({event.text for event in held}) > len(BROKEN)
    assert rollout.standing == (1.5, 1.0)
    assert rollout.step(60, "shadow") == "advance"
    assert [rollout.step(hours, "small") for hours in (60, 107)] == ["stay", "stay"]  # its own 48 hours
    assert rollout.step(108, "small") == "advance"
    assert rollout.standing == (2.0, 1.0)


def test_facts_of_something_else_decide_nothing(tree):
    rollout = Rollout(tree)
    for changes in ({"version": "config_20200101_000000"}, {"stage": "small"}):
        facts = replace(SOUND, **{"version": rollout.version, "stage": "shadow", **changes})
        with pytest.raises(RefusedError, match="measure that one"):
            step_rollout(tree.state, tree.configs, facts, rollout.begin_ms + 60 * HOUR, environ={})
    tree.rollback()
    assert step_rollout(tree.state, tree.configs, SOUND, rollout.begin_ms + 60 * HOUR) is None


def test_an_edit_by_hand_stops_the_way_forward_and_not_the_way_back(tree):
    rollout = Rollout(tree, "small")
    path = tree.configs / "config.yaml"
    path.write_text(path.read_text().replace("kappa: 2.0", "kappa: 2.2"))
    assert rollout.step(60, "small") == "stay"
    with tree.state.read() as connection:
        assert "strategy.kappa: 2.0 -> 2.2" in undelivered(connection)[-1].text
    assert "kappa: 2.2" in path.read_text()
    assert rollout.step(61, "small", drawdown_pct=9.0) == "roll_back"
    assert path.read_text() == OLD
    path.write_text("strategy: {kappa: ")  # nothing is watched, and nobody minds
    assert step_rollout(tree.state, tree.configs, SOUND, rollout.begin_ms + 62 * HOUR) is None


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_measured_capital_follows_the_stages(tree, seed):
    "Random facts at random hours: a stage lasts its 48 hours, and only a version of which all is known leaves it for the next."
    rng, rollout, hours, stage, entered = random.Random(seed), Rollout(tree), 0.0, "shadow", 0.0
    order, shares = ("shadow", "small", "full"), {"shadow": (1.5, 1.0), "small": (2.0, 0.25), "full": (2.0, 1.0)}
    for _ in range(25):
        hours += rng.choice([1, 12, 30])
        changes = {name: getattr(SOUND, name) for name in BROKEN}
        changes |= {name: rng.choice([value, None]) for name, value in BROKEN.items() if rng.random() < 0.02}
        action = rollout.step(hours, stage, **changes)
        if action == "roll_back":
            assert any(changes[name] == value for name, value in BROKEN.items())
            assert rollout.standing == (1.5, 1.0)
            break
        if action == "advance":
            assert hours - entered >= 48
            assert None not in changes.values()
            stage, entered = order[order.index(stage) + 1], hours
        assert rollout.standing == shares[stage]
    assert check(tree.state) == []


def test_the_sequential_test_keeps_its_word():
    "Four years of daily looks at versions that earn what was promised; dead ones are found, the better they were the sooner."
    rng, limit = np.random.default_rng(3), -np.log(FALSE_ALARM)
    days = rng.standard_t(5, (400, 4 * 365)) / np.sqrt(5 / 3)
    alarms = (evidence_against(days).max(axis=1) >= limit).mean()
    assert alarms <= FALSE_ALARM
    found = [(evidence_against(days[:, :365] - sharpe / np.sqrt(365)).max(axis=1) >= limit).mean() for sharpe in (0, 2, 4, 6)]
    assert found == sorted(found)
    assert found[0] < FALSE_ALARM
    assert found[-1] > 0.95


def test_a_great_gain_is_no_reason_to_go_back():
    "Also where the sum of the surprises is so large that its exponential overflows."
    ruling = judge("small", 100.0, replace(SOUND, surprises=(50.0,) * 300), Config())
    assert ruling.action == "advance"
    assert judge("small", 100.0, replace(SOUND, surprises=(-50.0,) * 300), Config()).action == "roll_back"
    assert judge("small", 100.0, replace(SOUND, surprises=()), Config()).action == "advance"
