"""A config goes live, or back, and is killed at every instruction on the way; what is found then is the old one or the new one.

The process that dies is a fork of a small program, so that every write, flush, rename and commit of a promotion can be its last.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_account import MARKET, Memo, quick, recording, time_of
from typer.testing import CliRunner

import xsmom_nb.deployments as module
from xsmom_nb.cli import app
from xsmom_nb.config import Config, config_digest, load_config, with_values
from xsmom_nb.database import sql
from xsmom_nb.decide import decide
from xsmom_nb.decision import Decision, Memory, as_json, from_json
from xsmom_nb.deployments import deploying, deployments, find_deployment, running_share, settle, steps
from xsmom_nb.errors import ConfigError, RefusedError, UsageError
from xsmom_nb.files import canonical_json, sha256_bytes, write_atomically
from xsmom_nb.live.desk import open_desk
from xsmom_nb.optimizer.deploy import enter_stage, history, promote, rollback
from xsmom_nb.optimizer.versions import VERSIONS, Finding, live_config, read_version, write_version
from xsmom_nb.outbox import undelivered
from xsmom_nb.state import State, check, open_state

NOW = 1_743_487_200_000
HOUR = 3_600_000
OLD = "strategy: {kappa: 1.5} # June 2024: less was noise\n"
MET = Finding("min_dsr", 0.97, 0.95, ok=True, why="deflated Sharpe ratio")
FACTS: dict[str, Any] = {"run_id": "20250401T060000Z-5f00aa", "code_digest": "ab" * 32, "data_digest": "cd" * 32}


class Tree:
    "A working tree with a live config, a state, and versions on request."

    def __init__(self, folder: Path) -> None:
        self.folder, self.configs = folder, folder / "configs"
        self.configs.mkdir(parents=True, exist_ok=True)
        (folder / "scheduled").mkdir(exist_ok=True)
        if not (self.configs / "config.yaml").exists():
            (self.configs / "config.yaml").write_text(OLD)
        self.state: State = open_state("sqlite:///state/xsmom.sqlite", base=folder)
        self.hour = 0

    def version(self, approved: bool = True, baseline: Config | None = None, **changes: Any) -> str:
        base = baseline or live_config(self.configs)
        config = with_values(base, {key.replace("__", "."): value for key, value in changes.items()})
        return write_version(
            self.configs, config, base, verdict=[MET], approved=approved, now_ms=self.later(), **FACTS).version

    def later(self) -> int:
        self.hour += 1
        return NOW + self.hour * HOUR

    def promote(self, version: str, **more: Any) -> Any:
        return promote(self.state, self.configs, version, **{"who": "ann", "now_ms": self.later(), "environ": {}, **more})

    def rollback(self, version: str | None = None, reason: str = "it lost") -> Any:
        return rollback(self.state, self.configs, version, who="ann", reason=reason, now_ms=self.later())

    @property
    def kappa(self) -> float:
        return live_config(self.configs).strategy.kappa

    @property
    def live(self) -> Any:
        with self.state.read() as connection:
            return find_deployment(connection, "live")

    def everything(self) -> tuple[Any, ...]:
        "What a refusal must not change: the live file, the rows, the log, the events."
        log = self.configs / "changes.csv"
        with self.state.read() as connection:
            rows = deployments(connection), steps(connection), undelivered(connection)
        return (self.configs / "config.yaml").read_bytes(), log.read_bytes() if log.exists() else b"", rows


@pytest.fixture
def tree(tmp_path) -> Any:
    made = Tree(tmp_path / "checkout")
    yield made
    made.state.close()


def remember_yaml(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    "Read each text of YAML once: a whole config takes a tenth of a second, and here a few are read hundreds of times."
    load, known = yaml.load, dict[bytes, Any]()

    def remembered(content: bytes, loader: Any) -> Any:
        if content not in known:
            known[content] = load(content, loader)
        return known[content]

    patch(yaml, "load", remembered)


# ── Killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────
KILLER = """
import os, shutil, sys
from pathlib import Path

sys.path[:0] = sys.argv[2:4]
import sqlalchemy.engine.default as engine
from test_deploy import Tree, remember_yaml

start, act, count = Path(sys.argv[1]), sys.argv[4], 0
version = (start / "version").read_text()


def work(tree):
    tree.hour = 50
    return tree.promote(version, stage="small") if act == "promote" else tree.rollback()



def deadly(owner, name):
    original = getattr(owner, name)

    def lethal(*words, **options):
        global count
        count += 1
        if count == limit:
            os._exit(137)
        return original(*words, **options)

    setattr(owner, name, lethal)


remember_yaml()
shutil.copytree(start, start.with_name("rehearsal"))
tree = Tree(start.with_name("rehearsal"))
work(tree)
tree.state.close()
for limit in range(1, 200):
    folder = start.with_name(f"{act}-{limit}")
    shutil.copytree(start, folder)
    child = os.fork()
    if child == 0:
        tree = Tree(folder)
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "pwrite"), (os, "close"), (engine.DefaultDialect, "do_commit")):
            deadly(owner, name)
        work(tree)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(limit, status, flush=True)
    if status == 0:
        break
"""


def killed_at_every_point(tree: Tree, act: str) -> list[Path]:
    "Copies of a tree in each of which a promotion or a rollback died one instruction later; the last one is whole."
    tree.state.close()
    words = [tree.folder, Path(__file__).parent, Path(__file__).parent.parent, act]
    done = subprocess.run([sys.executable, "-c", KILLER, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [status for _, status in lines] == ["137"] * (len(lines) - 1) + ["0"], done.stdout + done.stderr
    return [tree.folder.with_name(f"{act}-{number}") for number, _ in lines]


@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_killed_at_every_point_it_is_the_old_config_or_the_new_one(tree, act, monkeypatch):
    remember_yaml(monkeypatch.setattr)
    version = tree.version(strategy__kappa=2.0)
    (tree.folder / "version").write_text(version)
    before, after = (1.5, 1.0), (2.0, 0.25)
    if act == "rollback":
        tree.promote(version, stage="small")
        before, after = after, before
    folders = killed_at_every_point(tree, act)
    assert len(folders) > 12
    seen, left = [], set[Any]()
    for folder in folders:
        found = Tree(folder)
        with found.state.read() as connection:
            marks = found.kappa, *((step.action, step.status) for step in steps(connection))
        settle(found.state, found.configs, NOW + 60 * HOUR)  # what the next cycle does before anything else
        with found.state.read() as connection:
            share, live = running_share(connection), find_deployment(connection, "live")
            assert {step.status for step in steps(connection)} <= {"logged", "undone"}
        assert (found.kappa, share) in (before, after), folder.name
        seen.append((found.kappa, share))
        assert check(found.state) == []
        if live is not None:  # a promotion may have died before the old config was adopted
            assert read_version(found.configs, live.version).evidence.config_digest == config_digest(live_config(found.configs))
        log = found.configs / "changes.csv"
        with found.state.read() as connection:
            taken = [str(step.step) for step in steps(connection, "logged")]
        assert [row["step"] for row in csv.DictReader(log.read_text().splitlines())] == taken if taken else not log.exists()
        if marks not in left:  # and everything goes on from there
            left.add(marks)
            found.hour = 70
            if found.kappa == 1.5:
                found.promote(version, force=True, reason="once more")
            else:
                found.rollback()
            assert check(found.state) == []
        found.state.close()
    assert {(1.5, "pending"), (2.0, "pending")} <= {(kappa, taken[-1][1]) for kappa, *taken in left if taken}
    assert seen == sorted(seen, key=[before, after].index)  # first the old ones, then the new ones
    assert {before, after} == set(seen)


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_refused_leaves_everything_as_it_was(tree):
    good, bad = tree.version(strategy__kappa=2.0), tree.version(approved=False, strategy__kappa=3.0)
    moving = tree.version(paper__account_url="sqlite:///state/other.sqlite")
    other = tree.version(baseline=with_values(Config(), {"strategy.kappa": 9.0}), strategy__k_max=3)
    unbuilt = tree.version(carry__enabled=True)
    before = tree.everything()
    for version, more, kind, words in [
        (bad, {}, RefusedError, "the gate has not approved it"),
        (bad, {"force": True}, UsageError, "--reason"),
        (moving, {"force": True, "reason": "x"}, RefusedError, "would move the account .paper.account_url"),
        (other, {}, RefusedError, r"judged against another config .*strategy.kappa: 9.0 -> 1.5"),
        (unbuilt, {}, ConfigError, "carry.enabled"),
        (good, {"environ": {"XSMOM_STRATEGY__KAPPA": "4"}}, RefusedError, "XSMOM_STRATEGY__KAPPA"),
        (good, {"stage": "canary"}, UsageError, "shadow, small, full"),
        ("config_20200101_000000", {}, UsageError, "expected one of"),
    ]:
        with pytest.raises(kind, match=words):
            tree.promote(version, **more)
        assert tree.everything() == before
    for version in (None, good):
        with pytest.raises(RefusedError, match="nothing was deployed"):
            tree.rollback(version)
    assert tree.everything() == before
    tree.promote(bad, force=True, reason="a study says so")
    assert tree.live.version == bad
    assert "a study says so [overruled: the gate has not approved it]" in (tree.configs / "changes.csv").read_text()
    with pytest.raises(RefusedError, match="no setting differs"):
        tree.promote(bad)


def test_a_version_or_its_evidence_was_edited(tree):
    version = tree.version(strategy__kappa=2.0)
    path = tree.configs / VERSIONS / f"{version}.yaml"
    before, text = tree.everything(), path.read_text()
    for content, kind, words in [
        (text.replace("kappa: 2.0", "kappa: 2.5"), RefusedError, r"edited after it was judged \(strategy.kappa: 2.0 -> 2.5\)"),
        (text.replace("kappa:", "kapa:"), ConfigError, "strategy.kapa.*unknown key"),
        (text.replace("kappa: 2.0", "kappa: -2.0"), ConfigError, "strategy.kappa = -2.0"),
    ]:
        path.write_text(content)
        with pytest.raises(kind, match=words):
            tree.promote(version, force=True, reason="x")
        assert tree.everything() == before
    path.write_text(text)
    evidence = path.with_suffix(".json")
    whole = json.loads(evidence.read_bytes())
    evidence.write_bytes(canonical_json({**whole, "run_id": "another"}))
    with pytest.raises(RefusedError, match="evidence was edited"):
        tree.promote(version)
    evidence.unlink()
    with pytest.raises(RefusedError, match="evidence is missing"):
        tree.promote(version)
    assert tree.everything() == before


def test_a_default_that_has_changed_is_another_config(tree, monkeypatch):
    "A kept file says only some settings; evidence says what the others were."
    tree.promote(tree.version(strategy__kappa=2.0))
    kept = tree.live.previous
    path = tree.configs / VERSIONS / f"{kept}.json"
    evidence = read_version(tree.configs, kept).evidence
    then = replace(evidence, settings={**evidence.settings, "strategy.k_max": evidence.settings["strategy.k_max"] + 1})
    content = {**json.loads(path.read_bytes()), "settings": then.settings, "digest": then.digest}
    path.write_bytes(canonical_json(content))
    with pytest.raises(RefusedError, match=r"defaults of the code have changed \(strategy.k_max"):
        tree.rollback()
    assert tree.kappa == 2.0


def test_two_at_once(tree):
    version = tree.version(strategy__kappa=2.0)
    before = tree.everything()
    with deploying(tree.configs):
        with pytest.raises(RefusedError, match="another process is changing the live config"):
            tree.promote(version)
        assert tree.everything() == before
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(tree.folder), str(Path(__file__).parent), version, str(hour)],
                               stdout=subprocess.PIPE, text=True) for hour in (60, 61)]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert sorted(word.split(":")[0] for word in said) == ["RefusedError", "promoted"], said
    assert (tree.kappa, tree.live.version) == (2.0, version)
    with tree.state.read() as connection:
        assert [step.action for step in steps(connection)] == ["adopt", "promote"]


RACE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], str(Path(sys.argv[2]).parent)]
from test_deploy import Tree
from xsmom_nb.errors import RefusedError
tree = Tree(Path(sys.argv[1]))
tree.hour = int(sys.argv[4])
try:
    tree.promote(sys.argv[3])
    print("promoted")
except RefusedError as error:
    print(f"RefusedError: {error}")
"""


def test_an_edit_by_hand(tree):
    "Outside a rollout it is a config like any other; inside one it stops everything but the way back."
    version = tree.version(strategy__kappa=2.0)
    tree.promote(version, stage="small")
    path = tree.configs / "config.yaml"
    whole = path.read_text()
    path.write_text("# a remark changes nothing\n" + whole)
    assert history(tree.state, tree.configs, NOW).current.edits == ()
    path.write_text(whole.replace("kappa: 2.0", "kappa: 2.5"))
    before = tree.everything()
    for act in (lambda: tree.promote(tree.version(strategy__kappa=4.0), force=True, reason="x"),
                lambda: enter_stage(tree.state, tree.configs, "full", who="ann", reason="x", now_ms=NOW, environ={})):
        with pytest.raises(RefusedError, match=r"edited by hand while .* stage small: strategy.kappa: 2.0 -> 2.5; undo"):
            act()
        assert tree.everything() == before
    tree.rollback(reason="it lost")
    assert path.read_text() == OLD
    with pytest.raises(RefusedError, match="it was taken back once, from stage small"):
        tree.promote(version)
    kept = sorted((tree.configs / VERSIONS).glob("*.yaml"))[-1]
    assert "kappa: 2.5" in kept.read_text()
    path.write_text("strategy: {kappa: 1.25} # by hand\n")
    tree.promote(tree.version(strategy__kappa=5.0))
    with tree.state.read() as connection:
        assert [step.action for step in steps(connection)][-2:] == ["adopt", "promote"]
    tree.rollback()
    assert path.read_text() == "strategy: {kappa: 1.25} # by hand\n"


def test_there_is_a_way_back_even_from_nothing(tree):
    version = tree.version(strategy__kappa=2.0)
    tree.promote(version)
    path = tree.configs / "config.yaml"
    for spoilt, target, kappa in (("strategy: {kappa: ", None, 1.5), ("strategy: {kapa: 1}", version, 2.0), ("", version, 2.0)):
        path.write_text(spoilt)
        tree.rollback(target)
        assert (tree.kappa, tree.live.share) == (kappa, 1.0)
    assert len(list((tree.configs / VERSIONS).glob("unreadable_*.yaml"))) == 2
    path.write_text("strategy: {kappa: ")
    with pytest.raises(ConfigError, match="go back with `xsmom config rollback`"):
        tree.promote(version)
    (tree.configs / VERSIONS / f"{version}.json").unlink()  # and the evidence of what is live is gone
    tree.rollback(tree.live.previous)
    assert path.read_text() == OLD
    assert check(tree.state) == []


# ── The live cycle ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_share_of_a_stage_reaches_the_targets_and_the_record(tmp_path):
    "Two paper accounts in the same hour, one of them in the small stage; and the decision is taken again from what was kept."
    shares, reports = (1.0, 0.25), []
    for share in shares:
        folder = tmp_path / str(share)
        folder.mkdir()
        with open_desk(quick(folder, **MARKET), recording=recording(), now_ms=time_of(0), base=folder) as desk:
            with desk.state.write() as connection:
                connection.execute(sql("INSERT INTO deployments VALUES ('v2', '', 'small', :share, 0, '', 'live', 'v1')"),
                                   {"share": repr(share)})
            reports.append(desk.cycle(Memo(folder)))
            again = decide(reports[-1].decided.snapshot, reports[-1].decided.memory, desk.config)
            assert canonical_json(as_json(again)) == canonical_json(as_json(reports[-1].decided.decision))
    whole, quarter = ([card for card in report.decided.decision.cards if card.overlaid] for report in reports)
    assert len(whole) == len(quarter) > 3
    assert [card.overlaid for card in quarter] == [card.overlaid * 0.25 for card in whole]
    assert all("rollout × 0.25" in card.risk for card in quarter)
    assert as_json(reports[1].decided.memory)["rollout"] == 0.25
    gross = [sum(abs(float(position.notional)) for position in report.positions_after) for report in reports]
    assert 0.15 < gross[1] / gross[0] < 0.3
    old = as_json(reports[0].decided.memory)
    assert "rollout" not in old  # so that what was kept before there were rollouts has the same bytes
    assert from_json(Memory, old).rollout == 1.0
    assert "rollout" not in as_json(from_json(Decision, as_json(reports[1].decided.decision)))["memory"]


def test_a_cycle_does_not_trade_a_config_that_was_taken_back(tmp_path):
    "It was read before the rollback; the share that is live now is not meant for it."
    tree = Tree(tmp_path)
    config = quick(tmp_path, **MARKET, **{"live.state_url": f"sqlite:///{tmp_path}/state/xsmom.sqlite"})
    tree.promote(tree.version(strategy__kappa=2.0), stage="small")
    stale, fresh = (with_values(config, {"strategy.kappa": kappa}) for kappa in (2.0, 1.5))
    tree.rollback()
    with open_desk(stale, recording=recording(), now_ms=time_of(0), base=tmp_path) as desk:
        with pytest.raises(RefusedError, match=r"strategy.kappa = 2.0, which rollback of .* replaced"):
            desk.cycle(Memo(tmp_path))
        assert desk.port.fetch_open_orders() == []
    with open_desk(fresh, recording=recording(), now_ms=time_of(0), base=tmp_path) as desk:
        assert desk.cycle(Memo(tmp_path)).sent
    tree.state.close()


def test_a_cycle_settles_what_a_kill_left(tmp_path, monkeypatch):
    tree, original = Tree(tmp_path), module._apply
    version = tree.version(strategy__kappa=2.0)

    def die(connection: Any, step: Any) -> None:
        if step.action == "promote":
            raise KeyboardInterrupt
        original(connection, step)

    monkeypatch.setattr(module, "_apply", die)
    with pytest.raises(KeyboardInterrupt):
        tree.promote(version, stage="small")
    monkeypatch.undo()
    assert (tree.kappa, tree.live.share) == (2.0, 1.0)  # the file is the new one, the state does not know it yet
    config = quick(tmp_path, **MARKET, **{"live.state_url": f"sqlite:///{tmp_path}/state/xsmom.sqlite", "strategy.kappa": 2.0})
    with open_desk(config, recording=recording(), now_ms=time_of(0), base=tmp_path) as desk:
        assert desk.cycle(Memo(tmp_path)).decided.memory.rollout == 0.25
    assert tree.live.version == version
    tree.state.close()


# ── The commands ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def xsmom(tree, monkeypatch) -> Callable[..., Any]:
    "Call a command in this process."
    for name in [name for name in os.environ if name.startswith("XSMOM_") and name != "XSMOM_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tree.folder)
    return lambda *words: CliRunner().invoke(app, ["config", *[str(word) for word in words]])


def test_the_commands_and_their_exit_statuses(xsmom, tree):
    good, bad = tree.version(strategy__kappa=2.0), tree.version(approved=False, strategy__kappa=3.0)
    assert json.loads(xsmom("history", "--json").stdout)["live"] is None
    assert [xsmom(*words).exit_code for words in [
        ("promote", bad), ("promote", "nothing"), ("promote", good, "--force"), ("rollback", "--reason", "x"), ("rollback",),
        ("promote", good, "--stage", "canary")]] == [3, 2, 2, 3, 2, 2]
    assert tree.kappa == 1.5
    begun = xsmom("promote", good, "--stage", "shadow", "--json")
    assert (begun.exit_code, json.loads(begun.stdout)["action"], tree.kappa) == (0, "candidate", 1.5)
    assert xsmom("promote", good).exit_code == 3  # its rollout goes on by itself
    over = xsmom("promote", good, "--force", "--reason", "tested elsewhere")
    assert (over.exit_code, tree.kappa) == (0, 2.0)
    assert "from the next hour on" in over.stdout
    told = json.loads(xsmom("history", "--json").stdout)
    assert (told["live"]["version"], told["live"]["share"], told["candidate"]) == (good, 1.0, None)
    assert {line["version"]: line["evidence"]["approved"] for line in told["versions"]}[bad] is False
    (tree.configs / VERSIONS / f"{bad}.json").write_text("{}")
    listed = xsmom("history")
    assert listed.exit_code == 0
    assert "unreadable" in listed.stdout
    back = xsmom("rollback", "--reason", "it lost", "--json")
    assert (back.exit_code, json.loads(back.stdout)["action"]) == (0, "rollback")
    assert (tree.configs / "config.yaml").read_text() == OLD
    (tree.configs / "config.yaml").write_text("strategy: {kappa: ")
    assert xsmom("check").exit_code == 2
    assert xsmom("rollback", good, "--reason", "a broken file").exit_code == 0
    assert tree.kappa == 2.0


def test_from_outside(tree):
    version = tree.version(strategy__kappa=2.0)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XSMOM_") or name == "XSMOM_CACHE_DIR"}
    words = [sys.executable, "-m", "xsmom_nb.cli", "config", "promote", version]
    words[1:3] = ["-c", "from xsmom_nb.cli import app; app()"]
    done = subprocess.run(words, cwd=tree.folder, env=ours, capture_output=True, text=True)
    again = subprocess.run(words, cwd=tree.folder, env=ours, capture_output=True, text=True)
    assert (done.returncode, again.returncode) == (0, 3), done.stderr + again.stderr
    assert again.stderr.startswith("error: ")
    assert tree.kappa == 2.0
    assert load_config(tree.configs / "config.yaml", environ={}).strategy.kappa == 2.0
    content = (tree.configs / VERSIONS / f"{version}.yaml").read_bytes()
    assert sha256_bytes((tree.configs / "config.yaml").read_bytes()) == sha256_bytes(content)


def test_hours_that_are_simulated_take_a_promoted_config_up(xsmom, tree, monkeypatch):
    "The second hour trades the new config, in a run of its own; a setting on the command line is not overruled."
    from xsmom_nb import cli_live

    write_atomically(tree.configs / "config.yaml", "filters: {regime: {ema_len: 5}}\n")
    monkeypatch.setattr("xsmom_nb.runs.batch.trade_hours", Hours(tree))
    monkeypatch.setattr(cli_live, "hour_of_report", lambda report: cli_live.Hour("", 0.0, 0, 0, [], ""))
    hours, run = cli_live.run_together(cli_live.config_in_force(), [1, 2, 3, 4], {"data": "", "dataset": ""}, tree.state, print)
    assert [hour.run_id for hour in hours] == ["run-5", "run-5", "run-7", "run-7"]
    assert run.run_id == "run-7"


class Hours:
    "In place of the trading: notes the config of each hour, and promotes another one during the second."

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def __call__(self, config: Config, times_ms: Any, on_hour: Any, *, goes_on: Any, **_: Any) -> Any:
        length = config.filters.regime.ema_len
        for i, time_ms in enumerate(times_ms):
            if i and not goes_on():
                break
            on_hour(time_ms)
            if time_ms == 2:
                write_atomically(self.tree.configs / "config.yaml", "filters: {regime: {ema_len: 7}}\n")
        return type("Run", (), {"run_id": f"run-{length}"})()
