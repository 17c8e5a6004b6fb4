"""The schedule under stress: a week of accidents on a simulated clock, real processes that are killed, units that systemd reads.

What one look decides is shown in nbs/ops/30b_schedule.ipynb; here are many of them, and what only a process or a tool can show.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from xsmom_nb.cli import app
from xsmom_nb.cli_schedule import known_commands, refused_here
from xsmom_nb.clock import DAY_MS, SimulatedClock, SystemClock, format_utc, parse_utc
from xsmom_nb.market.panel import FIELDS
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.ops import jobs
from xsmom_nb.ops.entries import load_schedule, next_slot_ms, parse_schedule
from xsmom_nb.ops.jobs import LOCKS, start_child, still_running
from xsmom_nb.ops.schedule import EntryMemory, memory_as_json
from xsmom_nb.ops.scheduler import MEMORY, Processes, Scheduler, run_schedule
from xsmom_nb.ops.stopping import stop_on_signals
from xsmom_nb.ops.units import Place, calendar_of, schedule_units, timer_units, write_units
from xsmom_nb.outbox import heartbeats, undelivered
from xsmom_nb.state import State, memory_state, open_state, save_memory

XSMOM = Path(sys.executable).with_name("xsmom")
HOUR, MINUTE = 3_600_000, 60_000


# ── A week on a simulated clock ──────────────────────────────────────────────────────────────────────────────────────
WEEK = parse_schedule({"entries": [
    {"name": "data_sync", "command": "data sync", "cron": "1 * * * *", "catch_up": "run"},
    {"name": "live", "command": "live", "cron": "1 * * * *", "after": ["data_sync"], "grace_seconds": 1800},
    {"name": "report", "notebook": "daily_report", "cron": "5 0 * * *", "after": ["live"], "catch_up": "run"},
    {"name": "optimize", "notebook": "optimize", "cron": "20 2 * * sun", "catch_up": "run"},
    {"name": "notify", "command": "notify drain", "every": "30m", "grace_seconds": 60},
]}, "week.yaml")
MONDAY = parse_utc("2025-03-24")  # its Sunday is the day on which Europe's clocks go forward


@dataclass
class Pretended:
    "A run that ends by itself on the simulated clock."

    clock: SimulatedClock
    ends_ms: int
    status: int = 0
    why: str = ""

    def poll(self) -> tuple[bool, int | None]:
        return self.clock.now_ms() >= self.ends_ms, self.status

    def is_overdue(self) -> bool:
        return False

    def end(self, why: str) -> None: ...

    def last_line(self) -> str:
        return ""


@dataclass
class Pretence:
    "Starts pretended runs, and notes each."

    clock: SimulatedClock
    takes: Any  # entry and time to milliseconds
    begun: list[tuple[str, int, str]] = field(default_factory=list)  # entry, time, why
    open: dict[str, Pretended] = field(default_factory=dict)
    together: int = 0  # runs of an entry beside themselves

    def start(self, entry: Any, job: Any, now_ms: int) -> Pretended:
        self.together += entry.name in self.open and not self.open[entry.name].poll()[0]
        self.begun.append((entry.name, now_ms, job.why))
        self.open[entry.name] = Pretended(self.clock, now_ms + self.takes(entry.name, now_ms))
        return self.open[entry.name]

    def find(self, running: Any) -> dict[str, Pretended]:
        return {}

    def free_gb(self) -> float:
        return 100.0


def let_pass(scheduler: Scheduler, launcher: Pretence, until_ms: int) -> None:
    "Jump from one thing that happens to the next, up to a time."
    clock = launcher.clock
    scheduler.step()
    while True:
        ends = [child.ends_ms for child in scheduler.children.values()]
        moment = min([scheduler.next_ms() or until_ms, *ends])
        if moment > until_ms:
            break
        clock.set(max(moment, clock.now_ms()))
        scheduler.step()
    clock.set(until_ms)


def events_of(state: State) -> list[tuple[str, str]]:
    with state.read() as connection:
        return [(event.kind, str(event.data["entry"])) for event in undelivered(connection)]


def takes(name: str, now_ms: int) -> int:
    return {"data_sync": 40_000, "live": 50_000, "report": 2 * MINUTE, "optimize": 5 * HOUR, "notify": 1_000}[name]


def test_a_quiet_week():
    clock, state = SimulatedClock(MONDAY), memory_state()
    launcher = Pretence(clock, takes)
    scheduler = Scheduler(WEEK, state, clock, launcher)
    scheduler.recover()
    let_pass(scheduler, launcher, MONDAY + 7 * DAY_MS)
    counts = Counter(name for name, _, _ in launcher.begun)
    assert counts == {"data_sync": 168, "live": 168, "report": 7, "optimize": 1, "notify": 7 * 48}
    lives = [time_ms for name, time_ms, _ in launcher.begun if name == "live"]
    assert {time_ms % HOUR for time_ms in lives} == {MINUTE + 40_000}  # the moment the data were there, in every hour of the week
    assert launcher.together == 0
    assert events_of(state) == []


def test_a_week_of_accidents():
    "Runs that outlast their slots on Tuesday, a dead host from Wednesday to Thursday, a crash in the middle of Friday's report."
    clock, state = SimulatedClock(MONDAY), memory_state()
    slow = {("live", MONDAY + DAY_MS + 9 * HOUR): 2 * HOUR + 30 * MINUTE}

    def takes_its_time(name: str, now_ms: int) -> int:
        return slow.get((name, now_ms // HOUR * HOUR), takes(name, now_ms))

    launcher = Pretence(clock, takes_its_time)

    def begin() -> Scheduler:
        scheduler = Scheduler(WEEK, state, clock, launcher)
        scheduler.recover()
        return scheduler

    off_ms, on_ms = MONDAY + 2 * DAY_MS + 20 * HOUR + 30 * MINUTE, MONDAY + 3 * DAY_MS + 9 * HOUR + 40 * MINUTE
    let_pass(begin(), launcher, off_ms)
    assert [kind for kind, name in events_of(state) if name == "live"] == ["schedule_skipped"] * 2  # 10:01 and 11:01
    clock.set(on_ms)
    before = len(launcher.begun)
    crash_ms = MONDAY + 4 * DAY_MS + 6 * MINUTE
    let_pass(begin(), launcher, crash_ms)
    back = [(name, why) for name, time_ms, why in launcher.begun[before:] if time_ms < on_ms + 10 * MINUTE]
    counts = Counter(back)
    assert counts["data_sync", "caught up"] == counts["report", "caught up"] == 1  # once for thirteen missed hours, and for a day
    assert "live" not in {name for name, _ in back}  # its last hour was more than its grace ago
    assert launcher.begun[-1][0] == "report"  # it is Friday, 00:05, and the report runs
    launcher.open.clear()  # what ran has died with the schedule
    let_pass(begin(), launcher, MONDAY + 5 * DAY_MS)
    fridays = [why for name, time_ms, why in launcher.begun if name == "report" and time_ms >= crash_ms - MINUTE]
    assert fridays == ["on time", "again"]
    assert ("schedule_interrupted", "report") in events_of(state)
    assert launcher.together == 0
    lives = [time_ms // HOUR for name, time_ms, _ in launcher.begun if name == "live"]
    assert len(lives) == len(set(lives)) == 5 * 24 - 2 - 13


# ── Real processes ───────────────────────────────────────────────────────────────────────────────────────────────────
ONE = {"entries": [{"name": "job", "command": "live", "cron": "1 * * * *", "catch_up": "run", "time_limit_seconds": 3600}]}
DRIVER = """
import sys
from pathlib import Path
from test_schedule import ONE, Shell, parse_schedule, parse_utc, open_state, Scheduler, SimulatedClock, run_by_itself
folder = Path(sys.argv[1])
clock, state = SimulatedClock(parse_utc("2025-03-31T09:00")), open_state("sqlite:///state.sqlite", base=folder)
scheduler = Scheduler(parse_schedule(ONE, "it"), state, clock, Shell(folder, folder / "logs", script="echo begun; sleep 60"))
scheduler.recover(); scheduler.step()
clock.set(parse_utc("2025-03-31T09:01"))
run_by_itself(scheduler)
"""


@dataclass(frozen=True)
class Shell(Processes):
    "Runs a script instead of xsmom."

    script: str = "true"

    def start(self, entry: Any, job: Any, now_ms: int) -> Any:
        return start_child(entry, job.slot_ms, now_ms, self.project, self.logs, ["sh", "-c", self.script])


def run_by_itself(scheduler: Scheduler, once: bool = False) -> None:
    with stop_on_signals() as stop:
        run_schedule(scheduler, stop, lambda text: None, print, once)


def wait_until(true: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def killed(tmp_path, root):
    "A folder in which a schedule was killed with SIGKILL while its job ran; the job still does."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path], env=environment)
    log = tmp_path / "logs" / "job-20250331.log"
    wait_until(lambda: log.is_file() and "begun" in log.read_text().splitlines())
    process.kill()
    process.wait()
    pid = still_running(tmp_path / LOCKS, ["job"])["job"]
    yield tmp_path, pid
    if still_running(tmp_path / LOCKS, ["job"]):
        os.killpg(pid, signal.SIGKILL)


def second(folder: Path, at: str, **options: Any) -> Scheduler:
    clock = SimulatedClock(parse_utc(f"2025-03-31T{at}"))
    launcher = Shell(folder, folder / "logs", **options)
    scheduler = Scheduler(parse_schedule(ONE, "it"), open_state("sqlite:///state.sqlite", base=folder), clock, launcher)
    scheduler.recover()
    return scheduler


def test_a_job_that_outlived_its_schedule_is_not_started_twice(killed):
    folder, pid = killed
    scheduler = second(folder, "09:05")
    scheduler.step()
    assert list(scheduler.children) == ["job"]
    assert (folder / "logs" / "job-20250331.log").read_text().count("begun\n") == 1
    os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: scheduler.children["job"].poll()[0])
    scheduler.step()
    assert scheduler.memory["job"].last.result == "unknown"  # nobody saw how it ended
    scheduler.state.close()


def test_a_job_that_died_with_its_schedule_is_made_once_more(killed):
    folder, pid = killed
    os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: not still_running(folder / LOCKS, ["job"]))
    scheduler = second(folder, "09:05", script="echo again")
    run_by_itself(scheduler, once=True)
    assert events_of(scheduler.state) == [("schedule_interrupted", "job")]
    last = scheduler.memory["job"].last
    assert (last.result, last.again, format_utc(last.slot_ms)) == ("done", True, "2025-03-31T09:01:00Z")
    scheduler.state.close()


def test_a_hung_job_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "KILL_AFTER_SECONDS", 0.2)
    schedule = parse_schedule({"entries": [{**ONE["entries"][0], "time_limit_seconds": 1}]}, "it")
    clock, state = SimulatedClock(parse_utc("2025-03-31T09:00")), memory_state()
    launcher = Shell(tmp_path, tmp_path / "logs", script="trap '' TERM; while :; do sleep 0.05; done")
    scheduler = Scheduler(schedule, state, clock, launcher)
    scheduler.recover()
    scheduler.step()
    clock.set(parse_utc("2025-03-31T09:01"))
    run_by_itself(scheduler, once=True)
    assert events_of(state) == [("schedule_time_limit", "job")]
    assert scheduler.memory["job"].last.result == "time limit"


ASKED = """
import os, random, sys, time
from xsmom_nb.ops.stopping import stop_on_signals
chance, slowest = random.Random(1), 0.0
for _ in range(int(sys.argv[1])):
    with stop_on_signals() as stop:
        os.write(1, b".")
        begin, delay_ns = time.perf_counter_ns(), chance.randrange(200_000)
        while time.perf_counter_ns() - begin < delay_ns:
            pass
        stop.wait(60)
        slowest = max(slowest, time.perf_counter_ns() - begin)
print(slowest / 1e9)
"""


def test_asked_to_end_at_any_instant():
    "Asked in the microseconds in which it begins to wait, it neither hangs nor sleeps on."
    times = 5000
    process = subprocess.Popen([sys.executable, "-c", ASKED, str(times)], stdout=subprocess.PIPE)
    patience = threading.Timer(60, process.kill)
    patience.start()
    try:
        for _ in range(times):
            assert process.stdout.read(1) == b"."
            process.send_signal(signal.SIGTERM)
        assert float(process.stdout.read()) < 5
    finally:
        patience.cancel()
        process.kill()
        process.communicate()


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────
ENTRIES = """
entries:
  - {name: telling, command: version, cron: "1 * * * *", catch_up: run}
  - {name: failing, command: runs show none, cron: "1 * * * *", catch_up: run, after: [telling]}
  - {name: huge, command: version, cron: "1 * * * *", catch_up: run, min_free_gb: 900000}
  - {name: gone, notebook: daily_repot, cron: "5 0 * * *"}
  - {name: behind, command: version, cron: "6 0 * * *", after: [gone]}
"""


def environment(**more: str) -> dict[str, str]:
    "Ours without its settings of this project."
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XSMOM_") or name == "XSMOM_CACHE_DIR"}
    return {**ours, **more}


@pytest.fixture
def tree(tmp_path) -> Path:
    "A working tree with a schedule that last looked three hours ago."
    (tmp_path / "configs").mkdir()
    (tmp_path / "scheduled").mkdir()
    (tmp_path / "configs" / "schedule.yaml").write_text(ENTRIES)
    ago_ms = SystemClock().now_ms() - 3 * HOUR
    with open_state("sqlite:///state/xsmom.sqlite", base=tmp_path) as state, state.write() as connection:
        memory = {name: EntryMemory(ago_ms) for name in ("telling", "failing", "huge")}
        save_memory(connection, MEMORY, memory_as_json(memory), ago_ms)
    return tmp_path


def test_once_from_outside(tree):
    done = subprocess.run([XSMOM, "schedule", "run", "--once"], cwd=tree, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gone does not run: 'daily_repot': no such notebook" in done.stderr
    assert "behind does not run: it comes after 'gone', which cannot run" in done.stderr
    with open_state("sqlite:///state/xsmom.sqlite", base=tree) as state:
        told = Counter(events_of(state))
        with state.read() as connection:
            texts = [event.text for event in undelivered(connection) if event.kind in ("schedule_failed", "schedule_disk_full")]
            assert [each.process for each in heartbeats(connection)] == ["schedule"]
    assert {kind for kind, name in told if name in ("gone", "behind")} == {"schedule_refused"}
    assert told["schedule_failed", "failing"] == told["schedule_disk_full", "huge"] == 1
    assert told["schedule_missed", "telling"] == 1  # three hours, one run, one note
    assert any("no run" in text or "none" in text for text in texts)  # the last line of what it said
    listed = subprocess.run([XSMOM, "schedule", "list", "--json"], cwd=tree, env=environment(), capture_output=True)
    results = {row["name"]: row["last"] and row["last"]["result"] for row in json.loads(listed.stdout)["entries"]}
    assert results == {"telling": "done", "failing": "failed", "huge": "not started", "gone": None, "behind": None}
    assert "code_digest" in next((tree / "logs" / "schedule").glob("telling-*.log")).read_text()


@contextmanager
def serving(process: subprocess.Popen, manager: socket.socket) -> Iterator[None]:
    "A service that says when it is ready, lives while the block runs, and ends well when it is asked to."
    try:
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"WATCHDOG=1"]
        yield
        process.terminate()
        assert process.wait(20) == 0
        assert manager.recv(100) == b"STOPPING=1"
    finally:
        process.kill()
        process.wait()


def test_ready_watchdog_and_the_end(tree):
    (tree / "configs" / "schedule.yaml").write_text('entries:\n  - {name: telling, command: version, cron: "0 0 1 1 *"}\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tree / "notify"))
        manager.settimeout(20)
        process = subprocess.Popen([XSMOM, "schedule", "run"], cwd=tree, env=environment(NOTIFY_SOCKET=str(tree / "notify")))
        with serving(process, manager):
            refused = subprocess.run([XSMOM, "schedule", "run"], cwd=tree, env=environment(), capture_output=True, text=True)
            assert refused.returncode == 3
            assert "another schedule works with" in refused.stderr


CONFINED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", """
for own in $1; do mount --bind "$own" "$own" || exit 125; done && mount -o remount,bind,ro / || exit 125
shift; exec "$@"
""", "sh"]


def test_the_line_of_the_unit_works_with_nothing_but_what_the_unit_gives(tree, tmp_path_factory):
    "As a service manager starts it: its line, its folder, its variables, and where that can be had, no other folder to write to."
    (tree / "configs" / "schedule.yaml").write_text('entries:\n  - {name: telling, command: version, cron: "0 0 1 1 *"}\n')
    run = tmp_path_factory.mktemp("run")
    place = Place(run / "opt", tree, run / "cache", run / "no secrets", executable=XSMOM)
    place.cache.mkdir()
    text = schedule_units(load_schedule(tree / "configs" / "schedule.yaml"), place)["xsmom-schedule.service"]
    settings = [line.split("=", 1) for line in text.splitlines() if "=" in line]
    given = dict(value.split("=", 1) for key, value in settings if key == "Environment")
    unit = {key: value for key, value in settings if key != "Environment"}
    assert unit["Type"] == "notify"
    prefix = [*CONFINED, unit["ReadWritePaths"]]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        prefix = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(run / "notify"))
        manager.settimeout(60)
        process = subprocess.Popen([*prefix, *shlex.split(unit["ExecStart"])], cwd=unit["WorkingDirectory"],
                                   env={"PATH": "/usr/bin:/bin", "NOTIFY_SOCKET": str(run / "notify"), **given})
        with serving(process, manager):
            pass
    assert {path.name for path in run.iterdir()} == {"cache", "notify"}, "it wrote elsewhere"
    with open_state("sqlite:///state/xsmom.sqlite", base=tree) as state, state.read() as connection:
        assert [each.process for each in heartbeats(connection)] == ["schedule"]


# ── On recorded hours ────────────────────────────────────────────────────────────────────────────────────────────────
SETTINGS = """
paths: {dataset: small}
optimizer: {holdout_start: 2024-02-05}
filters: {regime: {ema_len: 20}}
risk: {atr_len: 14}
"""


def test_a_paper_account_trades_under_the_schedule(tree, root, monkeypatch):
    (tree / "configs" / "config.yaml").write_text(SETTINGS)
    shutil.copy(root / "configs" / "schedule.yaml", tree / "configs")
    panel = synthetic_panel(bars=24 * 40, symbols=6, momentum=2.0, start="2024-01-01")
    for i, symbol in enumerate(panel.symbols):
        bars = pd.DataFrame({"timestamp": panel.index, **{name: getattr(panel, name)[:, i] for name in FIELDS}})
        Store(tree / "data", "small").write_bars(symbol, "1h", bars.dropna())
    for name in [name for name in os.environ if name.startswith("XSMOM_") and name != "XSMOM_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("XSMOM_DATA", str(tree / "data"))

    def call(*words: str) -> dict[str, Any]:
        answer = CliRunner().invoke(app, [*words, "--json"])
        assert answer.exit_code == 0, answer.stderr
        return json.loads(answer.stdout)

    first = call("schedule", "run", "--simulated", "--start", "2024-02-01T08:01", "--hours", "2", "--account", "mine")
    assert [(run["entry"], run["time"], run["status"]) for run in first["runs"]] == [
        ("live", "2024-02-01T08:01:00Z", 0), ("live", "2024-02-01T09:01:00Z", 0)]
    assert "data_sync" in first["left_out"]
    again = call("schedule", "run", "--simulated", "--hours", "1", "--account", "mine")  # it goes on where the account stands
    assert [run["time"] for run in again["runs"]] == ["2024-02-01T10:01:00Z"]
    status = call("status", "--account", "mine")
    assert status["traded"]
    assert status["time_ms"] == parse_utc("2024-02-01T10:01")
    assert not (tree / "state" / "paper.sqlite").exists()
    process = subprocess.Popen([XSMOM, "schedule", "run", "--simulated", "--hours", "100", "--account", "mine"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert "live" in process.stdout.readline()
        second = CliRunner().invoke(app, ["schedule", "run", "--simulated", "--account", "mine"])
        assert (second.exit_code, f"process {process.pid}" in second.stderr) == (3, True)
        process.send_signal(signal.SIGINT)  # as Ctrl-C, in whatever run it is by now
        said, why = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    ends = r"the simulation ends there: .*(interrupted by SIGINT|interrupted$)|told to end before its last hour"
    assert re.search(ends, why, re.MULTILINE), why
    assert said.count(" live ") < 20
    lost = CliRunner().invoke(app, ["schedule", "run", "--simulated", "--start", "2030-01-01T00:01", "--account", "late"])
    assert lost.exit_code == 2
    assert "ask for fewer, choose another --start" in lost.stderr


# ── Units ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_shipped_schedule_is_sound(root):
    schedule = load_schedule(root / "configs" / "schedule.yaml")
    by_name = {entry.name: entry for entry in schedule.entries}
    assert by_name["live"].cron == "1 * * * *"
    assert by_name["daily_report"].cron == "5 0 * * *"
    assert "data_sync" in by_name["live"].after
    assert by_name["rollout"].after == ("parity_ledger",)
    assert by_name["optimize"].cron.endswith(" sun")


def test_every_shipped_entry_can_run(root):
    context = SimpleNamespace(find_root=lambda: SimpleNamespace(command=get_command(app)))
    schedule = load_schedule(root / "configs" / "schedule.yaml")
    assert refused_here(schedule, root, context) == {}
    commands = {command[0] for command in known_commands(get_command(app))}
    assert [service.command for service in schedule.services if service.command.split()[0] not in commands] == []


def test_kept_units_are_what_is_generated(root):
    schedule = load_schedule(root / "configs" / "schedule.yaml")
    made = {**timer_units(schedule, Place()), **schedule_units(schedule, Place())}
    kept = {path.name: path.read_text() for path in (root / "scheduled" / "systemd").iterdir() if path.name != "README.md"}
    assert made == kept, "run `xsmom schedule install --folder scheduled/systemd`, and again with --timers"


@pytest.fixture(scope="module")
def analyze():
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no command systemd-analyze found")

    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True)

    return run


def test_systemd_takes_the_units_and_finds_them_locked_in(root, tmp_path, analyze):
    schedule, place = load_schedule(root / "configs" / "schedule.yaml"), Place(prefix=tmp_path)
    place.program.parent.mkdir(parents=True)
    place.program.write_text("#!/bin/sh\n")
    place.program.chmod(0o755)
    files = write_units({**timer_units(schedule, place), **schedule_units(schedule, place)}, tmp_path)
    verified = analyze("verify", *files)
    assert (verified.returncode, verified.stderr) == (0, "")
    for path in files:
        if path.suffix == ".service":
            said = analyze("security", "--offline=true", "--no-pager", path).stdout
            found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
            assert found, path.name
            assert float(found[1]) <= 3.0, path.name


def test_systemd_means_the_same_times(root, analyze):
    now_ms = parse_utc("2025-03-30T02:30")
    for entry in load_schedule(root / "configs" / "schedule.yaml").entries:
        if entry.cron is not None:
            said = analyze("calendar", "--base-time=2025-03-30 02:30:00 UTC", calendar_of(entry.cron))
            found = re.search(r"(?:Next elapse|\(in UTC\)): \w{3} ([\d-]+ [\d:]+) UTC", said.stdout)
            assert found, said.stderr
            assert found[1] == format_utc(next_slot_ms(entry, now_ms)).replace("T", " ").rstrip("Z"), entry.name
