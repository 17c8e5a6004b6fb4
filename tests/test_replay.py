"""What was decided can be proven: the recorded inputs give the recorded decision again, and nothing else passes for it."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import xsmom_nb
from xsmom_nb import cli_runs, files
from xsmom_nb.clock import SimulatedClock, format_utc, parse_utc
from xsmom_nb.compiled import source_digest
from xsmom_nb.config import load_config, with_values
from xsmom_nb.decide import decide
from xsmom_nb.decision import Decided, Memory, Snapshot, as_json, snapshot_as_json
from xsmom_nb.errors import DataError, IntegrityError, RunError, UsageError
from xsmom_nb.market.panel import FIELDS, Panel
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ports import Account, Instrument, Position, Ticker
from xsmom_nb.runs.cases import CASES, DECISION, DECISIONS, BatchRecorder, RunRecorder, read_cases
from xsmom_nb.runs.chain import entry_digest, prune_run, seal
from xsmom_nb.runs.execute import execute_run
from xsmom_nb.runs.provenance import library_versions, platform_name
from xsmom_nb.runs.rebuild import run_git
from xsmom_nb.runs.record import Provenance, RunFolder, begin_run, manifest_digest
from xsmom_nb.runs.replay import NothingToReplay, replay_run, replay_runs, summary, verdict_of
from xsmom_nb.runs.verify import verify
from xsmom_nb.runs.why import card_facts, explain
from xsmom_nb.state import open_state

QUICK = {  # a strategy that has seen enough after a few bars
    "strategy.lookbacks": [3, 6], "strategy.lookback_weights": [0.6, 0.4], "strategy.vol_lookback": 12, "strategy.k_max": 3,
    "strategy.rebalance_every_bars": 2, "filters.regime.ema_len": 8, "filters.regime.slope_bars": 4,
    "vol_target.lookback_bars": 12,
}  # fmt: skip
WINDOW = 60  # bars of a snapshot


@pytest.fixture(scope="module")
def config():
    return with_values(load_config("defaults"), QUICK)


@pytest.fixture(scope="module")
def market():
    return synthetic_panel(seed=2, bars=140, symbols=6)


def snapshot_of(market: Panel, row: int, positions: tuple[Position, ...] = (), window: int = WINDOW) -> Snapshot:
    "The world after the close of a row, with prices of a tick and lots that are easy to hold."
    seen = market.slice(int(market.open_time_ms[row + 1 - window]), int(market.open_time_ms[row]))
    now_ms = int(seen.open_time_ms[-1]) + 3_605_000
    last = {name: Decimal(f"{close:.8g}") for name, close in zip(seen.symbols, seen.close[-1], strict=True) if np.isfinite(close)}
    rules = [Decimal(text) for text in ("0.00000001", "0.001", "0.001", "1e9", "1e9", "5", "50")]
    return Snapshot(
        now_ms, seen, Account(Decimal(10_000 + row), Decimal("10000.00"), Decimal("9000")), positions, (),
        tuple(Ticker(name, now_ms - 1000, price, price, price, price) for name, price in last.items()),
        tuple(Instrument(name, name[:-4], "USDT", "Trading", *rules, 1_577_836_800_000, 480) for name in last),
    )  # fmt: skip


def decided_hours(market: Panel, rows, config, window: int = WINDOW):
    "Decisions of consecutive rows: every second order fills, so that there is always something unfinished."
    memory, held = Memory(), {}
    for row in rows:
        snapshot = snapshot_of(market, row, tuple(held[name] for name in sorted(held)), window)
        decision = decide(snapshot, memory, config)
        yield Decided(snapshot, memory, decision)
        marks = {ticker.symbol: ticker.mark for ticker in snapshot.tickers}
        for card in decision.cards[row % 2 :: 2]:
            held.pop(card.symbol, None)
            if card.wanted:
                held[card.symbol] = Position(card.symbol, card.wanted, marks[card.symbol], marks[card.symbol])
        memory = decision.memory


@pytest.fixture(scope="module")
def hours(market, config):
    return list(decided_hours(market, range(80, 110), config))


class Project:
    "A folder of runs with its state, and a clock."

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "runs"
        self.state = open_state(f"sqlite:///{base}/state.sqlite")
        self.clock = SimulatedClock(parse_utc("2025-04-01T00:00:10Z"))

    def keep(self, kind: str, decisions, config, status: str = "done", **facts: object) -> Path:
        "A sealed run of these decisions."
        here = {"code_digest": source_digest(), "python": platform.python_version(), "platform": platform_name()}
        provenance = Provenance(**{**here, "libraries": library_versions(), **facts})
        run = begin_run(self.root, kind, {}, config, provenance, clock=self.clock)
        recorder = (BatchRecorder if kind == "live" else RunRecorder)(run.folder)
        for decided in decisions:
            recorder.record(decided)
        self.clock.advance(60_000)
        seal(run, status, None if status == "done" else "something was wrong", state=self.state, clock=self.clock)
        return run.folder.path


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    yield made
    made.state.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, hours, config):
    "A run of one decision and a run of thirty; what a test breaks it must mend."
    made = Project(tmp_path_factory.mktemp("kept"))
    made.cycle, made.live = made.keep("live_cycle", hours[7:8], config), made.keep("live", hours, config)
    yield made
    made.state.close()


def xsmom(project: Project, *words: object):
    "Call a command of `xsmom runs` on the runs of a project."
    place = ["--config", "defaults", "--set", f"runs.root={project.root}"]
    return CliRunner().invoke(cli_runs.app, [*map(str, words), *place])


# ── Kept and given again ─────────────────────────────────────────────────────────────────────────────────────────────
def test_every_decision_is_given_again(kept, hours):
    assert {intent.leg for decided in hours for intent in decided.decision.intents} >= {"open", "close", "decrease"}
    assert any(decided.memory.unfinished for decided in hours)
    for folder, count in ((kept.cycle, 1), (kept.live, 30)):
        found = replay_run(folder)
        assert (found.decisions, found.equal, found.difference, found.changed, found.ok) == (count, count, None, {}, True)
        assert summary(found)[0].startswith(f"{count} of {count} decision")


def test_what_is_read_is_what_was_recorded(kept, hours):
    for folder, recorded in ((kept.cycle, hours[7:8]), (kept.live, hours)):
        for case, decided in zip(read_cases(folder), recorded, strict=True):
            assert snapshot_as_json(case.snapshot) == snapshot_as_json(decided.snapshot)
            assert case.snapshot.panel.origin == decided.snapshot.panel.origin
            assert case.memory == decided.memory
            assert case.recorded == files.canonical_json(as_json(decided.decision))


def test_the_files_of_a_cycle_are_those_that_others_read(kept, hours):
    decision = hours[7].decision
    bars = pd.read_parquet(kept.cycle / "inputs/panel.parquet")
    assert list(bars)[:2] == ["timestamp", "symbol"]
    assert bars[["timestamp", "symbol"]].apply(tuple, axis=1).is_monotonic_increasing
    targets = pd.read_parquet(kept.cycle / "outputs/targets.parquet")
    assert (targets.index.name, targets.index[0].timestamp() * 1000) == ("timestamp", decision.row_ms)
    assert targets.iloc[0].to_dict() == dict(decision.targets)
    orders = json.loads((kept.cycle / "outputs/orders.json").read_bytes())
    assert [order["request"]["link_id"] for order in orders] == [intent.request.link_id for intent in decision.intents]
    for folder in (kept.cycle, kept.live):
        assert json.loads((folder / "manifest.json").read_bytes())["origin"].startswith("synthetic")


def test_numbers_survive_to_the_last_bit(project, market, hours, config):
    odd = np.array([5e-324, 0.1 + 0.2, 1e308, 1 / 3, 2**53 + 2.0, 1e-300])
    wild = {name: np.where(np.isnan(market.close), np.nan, np.resize(odd, market.shape)) for name in FIELDS}
    wild |= {"volume": wild["volume"] * -0.0, "funding": np.resize([-0.0, 1e-17, -1 / 3], market.shape)}
    panel = replace(market, **wild, without_funding=market.symbols[:2])
    decisions = [replace(hours[0], snapshot=replace(hours[0].snapshot, panel=panel.slice(int(panel.open_time_ms[first]),
                 int(panel.open_time_ms[first + 50])))) for first in (0, 1, 2)]  # fmt: skip
    for kind, count in (("live_cycle", 1), ("live", 3)):
        folder = project.keep(kind, decisions[:count], config)
        for case, decided in zip(read_cases(folder), decisions, strict=False):
            for name in (*FIELDS, "funding"):
                old, new = (getattr(each.snapshot.panel, name) for each in (decided, case))
                known = ~np.isnan(old)
                assert (known == ~np.isnan(new)).all()
                assert (old[known].view(np.int64) == new[known].view(np.int64)).all(), name
            assert case.snapshot.panel.without_funding == market.symbols[:2]


def test_windows_that_do_not_simply_go_on(project, market, config):
    gone = np.zeros(market.shape, dtype=bool)
    gone[85, 3] = True  # a bar that comes an hour late
    late = replace(market, **{name: np.where(gone, np.nan, getattr(market, name)) for name in FIELDS})
    fewer = market.select(market.symbols[:5])
    seen = [market, market, late, market, fewer, fewer, market, market, market]
    rows = [83, 84, 85, 86, 87, 88, 89, 130, 120]
    decisions = [next(decided_hours(bars, [row], config)) for bars, row in zip(seen, rows, strict=True)]
    decisions += list(decided_hours(market, range(121, 123), config, window=WINDOW + 5))  # begins earlier
    folder = project.keep("live", [*decisions, decisions[-1]], config)
    lines = [json.loads(line) for line in (folder / CASES).read_bytes().splitlines()]
    assert [line["part"] for line in lines] == [1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5]
    assert [len(line["rows"]) for line in lines] == [0, 1, 1, 2, 0, 1, 0, 41, 0, 0, 1, 0]
    assert replay_run(folder).ok
    assert not verify(project.root, project.state).problems


def test_a_record_is_on_the_disk_when_it_returns(project, hours, config, monkeypatch):
    flushed, flush = [], os.fsync

    def noting(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", noting)
    run = begin_run(project.root, "live", {}, config)
    recorder = BatchRecorder(run.folder)
    recorder.record(hours[0])
    assert {"cases.jsonl", "decisions.jsonl", "inputs", "outputs", run.start.run_id} <= set(flushed)
    flushed.clear()
    recorder.record(hours[1])
    assert flushed == ["cases.jsonl", "decisions.jsonl"], "the decision comes after all that it was made from"
    run.release()
    flushed.clear()
    run = begin_run(project.root, "live_cycle", {}, config)
    RunRecorder(run.folder).record(hours[0])
    named = [name.split(".")[1] for name in flushed if name.startswith(".")]
    assert named[-1] == "decision"
    assert set(named) >= {"panel", "snapshot", "memory", "targets", "orders", "decision", "data"}
    run.release()


KEEP_ON = """
import pickle, sys
from pathlib import Path
from xsmom_nb.runs.cases import BatchRecorder
from xsmom_nb.runs.record import RunFolder
recorder = BatchRecorder(RunFolder(Path(sys.argv[1])))
for decided in pickle.loads(Path(sys.argv[2]).read_bytes()):
    recorder.record(decided)
    print(decided.snapshot.row_ms, flush=True)
"""


def test_nothing_that_was_recorded_is_lost_in_a_kill(tmp_path, hours):
    import pickle

    (tmp_path / "hours").write_bytes(pickle.dumps(hours))
    command = [sys.executable, "-c", KEEP_ON, str(tmp_path / "run"), str(tmp_path / "hours")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    told = [int(process.stdout.readline()) for _ in range(9)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    rows = [case.snapshot.row_ms for case in read_cases(tmp_path / "run")]
    assert rows[: len(told)] == told
    assert rows == [decided.snapshot.row_ms for decided in hours[: len(rows)]]


def test_a_recorder_that_failed_does_not_go_on(tmp_path, hours, monkeypatch):
    recorder = BatchRecorder(RunFolder(tmp_path))
    recorder.record(hours[0])
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(files.XsmomError, match="the disk is full"):
            recorder.record(hours[1])
    with pytest.raises(RunError, match="was not kept whole"):
        recorder.record(hours[1])
    assert len(list(read_cases(tmp_path))) == 1


# ── Anything else is noticed ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_flipped_byte_in_any_file_is_named(kept):
    for folder in (kept.cycle, kept.live):
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert {"manifest.json", "config.yaml", "data.json", "events.jsonl"} < names
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            original = path.read_bytes()
            for position in {0, len(original) // 2, len(original) - 1}:
                path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
                with pytest.raises(IntegrityError) as error:
                    replay_run(folder)
                assert str(error.value).startswith(path.relative_to(kept.root).as_posix())
            path.write_bytes(original)
        assert replay_run(folder).ok


@pytest.mark.parametrize("name", ["inputs/panel.parquet", "inputs/snapshot.json", "inputs/memory.json", DECISION, "config.yaml"])
def test_a_missing_file_is_named(kept, name):
    path = kept.cycle / name
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(IntegrityError, match=f"{name}: is missing, and was not pruned"):
            replay_run(kept.cycle)
        if name != "config.yaml":
            with pytest.raises(RunError, match=f"{name}: missing; expected"):
                list(read_cases(kept.cycle))
    finally:
        path.write_bytes(content)


def vouch(folder: Path, *names: str) -> None:
    "Make the manifest of a run vouch for files that were changed."
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for path in (folder / name for name in names):
        manifest["files"][path.relative_to(folder).as_posix()] = {"sha256": files.sha256_file(path), "size": path.stat().st_size}
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(files.canonical_json(manifest) + b"\n")


def chain_anew(folder: Path) -> None:
    "Write the chain of one run anew, so that nothing but a replay is left to notice a change."
    manifest = json.loads((folder / "manifest.json").read_bytes())
    entry = {**json.loads((folder.parents[1] / "chain.jsonl").read_bytes()), "manifest": manifest["digest"]}
    (folder.parents[1] / "chain.jsonl").write_bytes(files.canonical_json({**entry, "digest": entry_digest(entry)}) + b"\n")


def edit(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_an_edited_decision_is_found_however_well_it_is_covered(project, hours, config):
    folder = project.keep("live", hours, config)
    answers = (folder / DECISIONS).read_bytes().splitlines()
    edited = json.loads(answers[17])
    edited["targets"]["ETHUSDT"] += 0.01
    edit(folder / DECISIONS, answers[17], files.canonical_json(edited))
    vouch(folder, DECISIONS)
    with pytest.raises(IntegrityError, match=r"manifest\.json: is another one than was sealed"):
        replay_run(folder)
    chain_anew(folder)
    found = replay_run(folder)
    assert (found.equal, found.ok) == (29, False)
    assert (found.difference.time, found.difference.key) == (format_utc(edited["row_ms"]), "targets.ETHUSDT")


def test_edited_inputs_are_found(project, hours, config):
    folder = project.keep("live_cycle", hours[4:5], config)
    edit(folder / "inputs/snapshot.json", b'"equity":"100', b'"equity":"200')
    vouch(folder, "inputs/snapshot.json")
    chain_anew(folder)
    found = replay_run(folder)
    assert (found.ok, found.decisions, found.equal) == (False, 1, 0)
    answer = xsmom(project, "replay", folder.name)
    assert (answer.exit_code, f"run {folder.name} is not confirmed" in answer.stderr) == (1, True)


def test_other_bars_than_those_of_the_snapshot_are_refused(project, hours, config):
    folder = project.keep("live_cycle", hours[4:5], config)
    other = project.keep("live_cycle", hours[5:6], config)
    shutil.copy(other / "inputs/panel.parquet", folder / "inputs/panel.parquet")
    with pytest.raises(IntegrityError, match=r"snapshot\.json: .* expected the bars that were recorded with it"):
        list(read_cases(folder))


def test_a_config_that_the_present_code_cannot_read(project, hours, config):
    folder = project.keep("live_cycle", hours[:1], config)
    edit(folder / "config.yaml", b"kappa:", b"kapa:")
    vouch(folder, "config.yaml")
    chain_anew(folder)
    with pytest.raises(RunError, match=r"(?s)present code cannot read its config\.yaml .*kapa.*--at-run"):
        replay_run(folder)


# ── Nothing to replay ────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_pruned_run_keeps_its_decisions_and_its_reasons(project, hours, config):
    cycle, live = project.keep("live_cycle", hours[:1], config), project.keep("live", hours[:5], config)
    for folder, left in ((cycle, DECISION), (live, DECISIONS)):
        prune_run(folder, state=project.state, clock=project.clock)
        kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert kept == {"manifest.json", left}
        with pytest.raises(NothingToReplay, match=r"was pruned on 2025-04-01; only its decision is left"):
            replay_run(folder)
        assert explain(folder, "BTCUSDT")["card"]["symbol"] == "BTCUSDT"
    assert not verify(project.root, project.state).problems


def test_a_run_in_progress_can_be_asked_why_but_not_replayed(project, hours, config):
    run = begin_run(project.root, "live", {}, config)
    recorder = BatchRecorder(run.folder)
    for decided in hours[:2]:
        recorder.record(decided)
    assert explain(run.folder.path, "ETHUSDT")["row"] == format_utc(hours[1].decision.row_ms)
    with pytest.raises(RunError, match="not sealed yet"):
        replay_run(run.folder.path)
    assert list(replay_runs(project.root)) == []
    run.release()


def test_replaying_all_ends_with_a_count(project, hours, config):
    assert xsmom(project, "replay", "--all").exit_code == 0
    good = [project.keep("live_cycle", [decided], config) for decided in hours[:3]]
    pruned = project.keep("live", hours[:3], config)
    prune_run(pruned, state=project.state, clock=project.clock)
    failed = project.keep("live_cycle", [], config, status="failed")
    project.keep("report", [], config)
    verdicts = {folder.name: verdict_of(result) for folder, result in replay_runs(project.root)}
    expected = {**dict.fromkeys([*good], "confirmed"), **dict.fromkeys([pruned, failed], "nothing to replay")}
    assert verdicts == {folder.name: verdict for folder, verdict in expected.items()}
    answer = xsmom(project, "replay", "--all")
    assert answer.exit_code == 0
    assert "5 runs: 3 confirmed, 2 nothing to replay" in answer.stdout

    other = project.keep("live_cycle", hours[:1], config, code_digest="0" * 64)
    answer = xsmom(project, "replay", "--kind", "live_cycle", "--json")
    assert answer.exit_code == 1
    assert "1 of 5 runs are not confirmed" in answer.stderr
    told = {run["run_id"]: run for run in json.loads(answer.stdout)["runs"]}
    assert told[other.name]["verdict"] == "not confirmed"
    assert told[good[0].name]["ok"] is True
    with pytest.raises(UsageError, match="decides nothing that could be replayed"):
        replay_run(project.keep("report", [], config))


# ── Other code ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_equal_answer_of_other_code_confirms_nothing(project, hours, config):
    folder = project.keep("live", hours[:3], config, code_digest="0" * 64, python="3.9.1")
    found = replay_run(folder)
    assert (found.is_equal, found.same_code, found.ok) == (True, False, False)
    assert found.changed == {"code_digest": ["0" * 64, source_digest()], "python": ["3.9.1", platform.python_version()]}
    answer = xsmom(project, "replay", folder.name)
    assert answer.exit_code == 1
    assert "3 of 3 decisions equal, bit for bit, with OTHER code" in answer.stdout
    assert "code_digest was 000000000000…, is here" in answer.stdout
    with pytest.raises(RunError, match="not made in a git repository"):
        replay_run(folder, at_run=True)


DECIDE_THERE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])  # the tests, whose market this is
import test_replay as here
from xsmom_nb.config import load_config, with_values
from xsmom_nb.runs.provenance import collect_provenance
project, base = here.Project(Path(sys.argv[1])), Path(sys.argv[2])
config = with_values(load_config("defaults"), here.QUICK)
market = here.synthetic_panel(seed=2, bars=140, symbols=6)
provenance = collect_provenance(base, base / "notebook.ipynb", config)
print(project.keep("live", here.decided_hours(market, range(80, 84), config), config, **dict(provenance)))
project.state.close()
"""


def test_the_code_of_then_is_rebuilt_and_asked(project, tmp_path, root, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # what is new would be compiled first
    base = tmp_path / "checkout"
    shutil.copytree(Path(xsmom_nb.__file__).parent, base / "xsmom_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (base / "notebook.ipynb").write_text("{}")
    run_git(base, "init", "-q")
    run_git(base, "add", ".")
    run_git(base, "-c", "user.name=Ann", "-c", "user.email=ann@example.com", "commit", "-qm", "all")
    stage = base / "xsmom_nb/strategy/momentum.py"
    before = stage.read_text()
    assert "np.abs(z) ** signal_power" in before
    stage.write_text(before.replace("np.abs(z) ** signal_power", "np.abs(z) ** (signal_power + 0.25)"))

    environment = {**os.environ, "PYTHONPATH": str(base)}
    command = [sys.executable, "-c", DECIDE_THERE, str(project.base), str(base), str(root / "tests")]
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    stage.write_text(before + "\n# the code goes on\n")

    present = replay_run(folder)
    assert (present.same_code, present.ok, present.equal < present.decisions) == (False, False, True)
    rebuilt = replay_run(folder, at_run=True, project=base)
    assert (rebuilt.at_run, rebuilt.same_code, rebuilt.decisions, rebuilt.equal, rebuilt.ok) == (True, True, 4, 4, True)
    assert "4 of 4 decisions equal, bit for bit, with the code of the run, rebuilt" in summary(rebuilt)[0]
    monkeypatch.chdir(base)
    (base / "scheduled").mkdir()
    assert xsmom(project, "replay", "latest", "--at-run").exit_code == 0

    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["git"]["dirty"]
    assert "signal_power + 0.25" in manifest["git"]["patch"]


# ── Backtests ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def backtested(project, tmp_path, root, config):
    "A sealed run of the scheduled backtest, on data of its own."
    store = Store(tmp_path / "data", "small")
    bars = synthetic_panel(seed=5, bars=600, symbols=5)
    for i, symbol in enumerate(bars.symbols):
        there = np.isfinite(bars.close[:, i])
        store.write_bars(symbol, "1h", pd.DataFrame({"timestamp": bars.index[there], **{
            name: getattr(bars, name)[there, i] for name in FIELDS}}))  # fmt: skip
    settings = with_values(config, {"optimizer.holdout_start": "2023-01-20"})
    run = execute_run(
        "backtest", {"data": str(tmp_path / "data"), "dataset": "small"}, settings, project=tmp_path, root=project.root,
        scheduled_dir=root / "scheduled", state=project.state, secrets={}, progress=False)  # fmt: skip
    return run.folder, store


def test_a_scheduled_backtest_is_given_again_from_the_same_data(project, backtested):
    folder, store = backtested
    found = replay_run(folder)
    assert found.ok
    assert found.decisions == found.equal == len(pd.read_parquet(folder / "outputs/equity.parquet")) > 400

    path = store.path("ETHUSDT", "1h")
    kept = path.read_bytes()
    row = store.read_bars("ETHUSDT", "1h").iloc[[300]]
    store.write_bars("ETHUSDT", "1h", row.assign(close=row["low"]))
    with pytest.raises(DataError, match=r"1h/ETHUSDT\.parquet: was changed since the run .* of the 5 files .*, 1 differ"):
        replay_run(folder)
    assert xsmom(project, "replay", "backtest").exit_code == 1
    path.write_bytes(kept)
    store.write_funding("ETHUSDT", pd.DataFrame({"timestamp": row["timestamp"], "funding_rate": [0.01]}))
    with pytest.raises(DataError, match="files were added to the data"):
        replay_run(folder)
    store.path("ETHUSDT", "funding").unlink()

    weights = folder / "outputs/weights.parquet"
    table = pd.read_parquet(weights)
    place = int(np.flatnonzero(table["BTCUSDT"])[0])
    table.iloc[place, table.columns.get_loc("BTCUSDT")] *= 1 + 2**-52
    table.to_parquet(weights)
    vouch(folder, "outputs/weights.parquet")
    chain_anew(folder)
    found = replay_run(folder)
    assert (found.decisions - found.equal, found.difference.key) == (1, "weights.BTCUSDT")


# ── Why ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_card_of_a_symbol(kept, hours):
    decision = hours[-1].decision
    card = next(card for card in decision.cards if card.stages)
    told = json.loads(xsmom(kept, "why", "live", card.symbol, "--json").stdout)
    assert told["card"]["stages"] == dict(card.stages)
    assert list(told["card"]["stages"]) == list(card.stages), "in the order in which they act, not by name"
    assert (told["row"], told["card"]["z_score"]) == (format_utc(decision.row_ms), card.z_score)
    facts = card_facts(explain(kept.live, card.symbol))
    assert (facts["score"], facts["outcome"]) == (f"{card.z_score:+.3f}, {card.side}", card.outcome)
    assert facts["filter regime"].startswith(f"{card.verdicts[0].value:.4g}; {card.verdicts[0].limit}: ")
    lines = xsmom(kept, "why", "live", card.symbol).stdout.splitlines()
    assert len({len(line) - len(line[line.index("  ") :].lstrip()) for line in lines}) == 1, "aligned"


def test_a_row_of_many_can_be_named(kept, hours):
    decision = next(each.decision for each in hours if each.decision.intents)
    symbol = decision.intents[0].request.symbol
    row = format_utc(decision.row_ms)
    told = json.loads(xsmom(kept, "why", "live", symbol, "--row", row, "--json").stdout)
    assert (told["row"], told["orders"][0]["request"]["link_id"]) == (row, decision.intents[0].request.link_id)
    answer = xsmom(kept, "why", "live", symbol, "--row", "2022-01-01")
    assert answer.exit_code == 2
    span = " to ".join(format_utc(each.decision.row_ms) for each in (hours[0], hours[-1]))
    assert f"it decided 30 row(s), {span}" in answer.stderr
    wrong = xsmom(kept, "why", "live", "BTCUSD")
    assert (wrong.exit_code, "did you mean 'BTCUSDT'" in wrong.stderr) == (2, True)
