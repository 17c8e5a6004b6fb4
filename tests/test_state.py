"""The state store from outside: many processes, sudden deaths, old, foreign and broken files, one trader at a time.

What one module promises is shown in its notebook. Here processes meet, and nobody gets to clean up.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from xsmom_nb.cli_state import app
from xsmom_nb.clock import SimulatedClock, parse_utc
from xsmom_nb.database import open_database, sql
from xsmom_nb.errors import RefusedError, StateError, XsmomError
from xsmom_nb.files import canonical_json
from xsmom_nb.lease import hold_lease, read_leases, renew, require_same_code
from xsmom_nb.outbox import beat, emit, heartbeats, undelivered
from xsmom_nb.ports import LedgerKind, OrderStatus, Side
from xsmom_nb.state import (
    MIGRATIONS,
    ChainHead,
    State,
    check,
    export,
    load_memory,
    open_state,
    save_equity,
    save_memory,
    symbol_versions,
)

URL = "sqlite:///state.sqlite"
CODE, NOTEBOOKS = "ab" * 32, "cd" * 32
TABLES = {"chain", "intents", "orders", "fills", "ledger", "positions", "trades", "equity", "memory", "events", "deployments",
          "deployment_steps", "heartbeats", "lease", "messages", "deliveries", "routes", "schema_version"}  # fmt: skip


@pytest.fixture
def state(tmp_path) -> Iterator[State]:
    "An open store of its own."
    with open_state(URL, base=tmp_path) as opened:
        yield opened


def python(program: str, *words: object) -> subprocess.Popen[str]:
    "A Python process of its own."
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, text=True)


def one(state: State, query: str) -> object:
    "The only value a query gives."
    with state.read() as connection:
        return connection.execute(sql(query)).scalar_one()


# ── Many processes ───────────────────────────────────────────────────────────────────────────────────────────────────
INCREASE = """
import sys
from pathlib import Path
from xsmom_nb.database import sql
from xsmom_nb.outbox import emit
from xsmom_nb.state import load_memory, open_state, save_memory, symbol_versions

folder, rounds, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with open_state("sqlite:///state.sqlite", base=folder, busy_timeout_seconds=30) as state:
    for n in range(rounds):
        with state.write() as connection:
            version = symbol_versions(connection, ["BTCUSDT"])["BTCUSDT"]
            count = load_memory(connection, "count") or 0
            connection.execute(sql("UPDATE positions SET version = :version"), {"version": version + 1})
            save_memory(connection, "count", count + 1, n)
            event = emit(connection, n, "INFO", "round", f"{name} {n}")
        print(event)
"""


def test_three_processes_lose_no_update(state, tmp_path):
    with state.write() as connection:
        connection.execute(sql("INSERT INTO positions (symbol, quantity, version, updated_ms) VALUES ('BTCUSDT', '0', 0, 0)"))
    writers = [python(INCREASE, tmp_path, rounds, name) for name, rounds in (("a", 334), ("b", 333), ("c", 333))]
    printed = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    with state.read() as connection:
        assert symbol_versions(connection, ["BTCUSDT"]) == {"BTCUSDT": 1000}
        assert load_memory(connection, "count") == 1000
        events = undelivered(connection, limit=2000)
    assert sorted(int(event) for lines in printed for event in lines) == [event.event_id for event in events] == [*range(1, 1001)]
    assert len({event.text for event in events}) == 1000  # every round of everybody


def test_first_start_of_several_processes_makes_one_store(tmp_path):
    starters = [python(INCREASE, tmp_path, 1, name) for name in "abc"]
    assert [starter.communicate(timeout=60) and starter.returncode for starter in starters] == [0, 0, 0]
    with open_state(URL, base=tmp_path) as state:
        assert one(state, "SELECT COUNT(*) FROM schema_version") == 1
        assert check(state) == []


TWO_HALVES = """
import sys
from decimal import Decimal
from pathlib import Path
from xsmom_nb.outbox import beat, emit
from xsmom_nb.state import open_state, save_equity, save_memory

with open_state("sqlite:///state.sqlite", base=Path(sys.argv[1])) as state:
    for n in range(int(sys.argv[2]), 100_000):
        with state.write() as connection:
            save_memory(connection, "half", {"n": n, "ballast": "x" * 20_000}, n)
            save_equity(connection, n, Decimal(n), Decimal(n))
            emit(connection, n, "INFO", "half", str(n))
            beat(connection, "cycle", n, "step", str(n))
        print(n, flush=True)
"""


def test_killed_writer_leaves_no_half_step(tmp_path):
    start, chance = 1, random.Random(7)
    for _ in range(6):
        writer = python(TWO_HALVES, tmp_path, start)
        assert writer.stdout is not None
        assert writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        writer.send_signal(signal.SIGKILL)
        acknowledged = int((writer.communicate()[0].split() or [start])[-1])
        with open_state(URL, base=tmp_path) as state:
            with state.read() as connection:
                n = load_memory(connection, "half")["n"]
                assert [beat.detail for beat in heartbeats(connection)] == [str(n)]
                assert undelivered(connection, limit=100_000)[-1].text == str(n)
            assert one(state, "SELECT MAX(time_ms) FROM equity") == one(state, "SELECT COUNT(*) FROM equity") == n
            assert check(state) == []
        assert n >= acknowledged
        start = n + 1


# ── Promises of a connection ─────────────────────────────────────────────────────────────────────────────────────────
def test_settings_of_every_connection(tmp_path):
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 700}
    with open_state(URL, base=tmp_path, busy_timeout_seconds=0.7) as state, state.read() as first, state.read() as second:
        for connection in (first, second):
            assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected} == expected


def test_locked_file_is_an_error_after_the_timeout(state, tmp_path):
    save = {"name": "live", "value": {}, "now_ms": 0}
    with open_state(URL, base=tmp_path, busy_timeout_seconds=0.3) as waiting:
        with state.write():
            begin = time.monotonic()
            refusal = r"state\.sqlite is locked by another process .*end it if it hangs"
            with pytest.raises(StateError, match=refusal), waiting.write():
                pytest.fail("the lock was given twice")
            assert 0.25 < time.monotonic() - begin < 5
            with pytest.raises(StateError, match="is locked"):
                open_state(URL, base=tmp_path, busy_timeout_seconds=0.1)
            with waiting.read() as connection:  # readers go on
                assert load_memory(connection, "live") is None
        with waiting.write() as connection:
            save_memory(connection, **save)


def test_reader_sees_one_moment(state, tmp_path):
    with state.write() as connection:
        save_equity(connection, 1, Decimal(1), Decimal(1))
    with open_state(URL, base=tmp_path) as other, other.read() as reader:
        before = reader.execute(sql("SELECT COUNT(*) FROM equity")).scalar_one()
        with state.write() as connection:
            save_equity(connection, 2, Decimal(1), Decimal(1))
        assert reader.execute(sql("SELECT COUNT(*) FROM equity")).scalar_one() == before == 1


# ── Files of other times and other makers ────────────────────────────────────────────────────────────────────────────
VERSION_1 = """
CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL);
CREATE TABLE chain (root TEXT PRIMARY KEY, run_id TEXT, digest TEXT NOT NULL, entry TEXT NOT NULL, length INTEGER);
DELETE FROM schema_version;
INSERT INTO schema_version VALUES (1);
"""  # as the first release made its file


def make_version_1(path: Path) -> None:
    "A store as the first release left it, with one chain."
    old = sqlite3.connect(path)
    old.execute("PRAGMA journal_mode=WAL")
    old.executescript(VERSION_1)
    old.execute("INSERT INTO chain VALUES ('runs', '20250331T230000Z-5f00aa', ?, ?, 42)", ("ab" * 32, "01" * 32))
    old.commit()
    old.close()


def test_store_of_the_first_release_keeps_what_it_knows(tmp_path):
    make_version_1(tmp_path / "state.sqlite")
    for _ in range(2):
        with open_state(URL, base=tmp_path) as state:
            assert state.chain_head(tmp_path / "runs") == ChainHead("20250331T230000Z-5f00aa", "ab" * 32, "01" * 32, 42)
            assert one(state, "SELECT version FROM schema_version") == len(MIGRATIONS)
            assert set(export(state)) == TABLES
            assert check(state) == []


def test_old_store_and_new_store_have_the_same_tables(tmp_path):
    make_version_1(tmp_path / "old.sqlite")
    schemas = []
    for name in ("old", "new"):
        with open_state(f"sqlite:///{name}.sqlite", base=tmp_path) as state, state.read() as connection:
            query = sql("SELECT name, sql FROM sqlite_master WHERE name <> 'sqlite_autoindex_chain_1' ORDER BY name")
            schemas.append(dict(connection.execute(query).all()))
    assert schemas[0] == schemas[1]


def test_released_migrations_were_not_edited():
    released = ["f18ac32c", "c2542ffc"]  # beginning of the SHA-256 of each released version, oldest first
    digests = [hashlib.sha256("\n".join(statements).encode()).hexdigest() for statements in MIGRATIONS]
    assert [digest[:8] for digest in digests[: len(released)]] == released


def test_tables_know_the_words_of_the_ports(state):
    "What a record of the ports may say, its table must take."
    order = "INSERT INTO orders VALUES (:id, '', 'BTCUSDT', :side, 'Limit', '1', '1', 'GTC', 0, :status, '0', NULL, '', 0, 0)"
    with state.write() as connection:
        for status in get_args(OrderStatus):
            for side in get_args(Side):
                connection.execute(sql(order), {"id": f"{status} {side}", "side": side, "status": status})
        for kind in get_args(LedgerKind):
            connection.execute(sql("INSERT INTO ledger VALUES (:kind, 0, :kind, '', '1')"), {"kind": kind})
    assert check(state) == []


def test_newer_store_is_refused_unchanged(state, tmp_path):
    with state.write() as connection:
        connection.execute(sql("UPDATE schema_version SET version = 99"))
    with pytest.raises(StateError, match=r"schema version 99, this program knows 4: run the newer program"):
        open_state(URL, base=tmp_path)
    assert one(state, "SELECT version FROM schema_version") == 99


def test_store_of_something_else_is_refused_unchanged(tmp_path):
    "The paper exchange's account under the trader's setting."
    open_database(URL, (("CREATE TABLE account (cash TEXT)",),), base=tmp_path, key="exchange.paper_url").close()
    before = (tmp_path / "state.sqlite").read_bytes()
    with pytest.raises(StateError, match=r"made for something else .*live\.state_url must name a file of its own"):
        open_state(URL, base=tmp_path)
    assert (tmp_path / "state.sqlite").read_bytes() == before


@pytest.mark.parametrize("place", [0, 20, 4096, 0.4, 0.9])
def test_damaged_file_is_refused(tmp_path, place):
    with open_state(URL, base=tmp_path) as state, state.write() as connection:
        for n in range(400):
            emit(connection, n, "INFO", "ballast", "x" * 200)
    file = tmp_path / "state.sqlite"
    content = bytearray(file.read_bytes())
    offset = place if isinstance(place, int) else int(len(content) * place) // 4096 * 4096
    content[offset : offset + 64] = bytes(byte ^ 0xFF for byte in content[offset : offset + 64])
    file.write_bytes(content)
    with pytest.raises(StateError, match=r"state\.sqlite is damaged .*restore the newest backup"):
        open_state(URL, base=tmp_path)
    assert file.read_bytes() == content  # nothing repaired by guessing


def test_missing_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(XsmomError, match=r"file: the folder cannot be made"):
        open_state("sqlite:///file/state/state.sqlite", base=tmp_path)


# ── One trader ───────────────────────────────────────────────────────────────────────────────────────────────────────
TRADER = """
import sys
from pathlib import Path
from xsmom_nb.console import new_app
from xsmom_nb.lease import hold_lease
from xsmom_nb.state import open_state

app = new_app("trade")

@app.command()
def live():
    with open_state("sqlite:///state.sqlite", base=Path(sys.argv[1])) as state, hold_lease(state, "trader", "ab", "cd"):
        print("held", flush=True)
        sys.stdin.read()

app(["live"])
"""


@pytest.fixture
def trader(tmp_path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    "Starts a process that wants to trade, ends it at the end."
    started = []

    def start() -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-c", TRADER, tmp_path], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_second_trader_is_refused_with_status_3(trader, state):
    first = trader()
    assert first.stdout.readline() == "held\n"
    second = trader()
    _, told = second.communicate(timeout=30)
    assert second.returncode == RefusedError.exit_status == 3
    assert told.startswith(f"error: another trader works with {state.location}: ")
    assert f"process {first.pid} on host " in told
    assert f"`kill {first.pid}`" in told
    first.communicate("", timeout=30)  # it finishes in peace
    assert first.returncode == 0
    with state.read() as connection:
        assert read_leases(connection) == []


def test_killed_trader_is_replaced_at_once(trader, state):
    for _ in range(3):
        process = trader()
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        with state.read() as connection:
            assert [lease.pid for lease in read_leases(connection)] == [process.pid]
    with hold_lease(state, "trader", CODE, NOTEBOOKS) as lease:
        assert lease.pid == os.getpid()


def move_to_another_host(state: State) -> None:
    "Let a lease look as if it were held elsewhere."
    with state.write() as connection:
        connection.execute(sql("UPDATE lease SET host = 'elsewhere.example', holder = 'xsmom-far'"))


def test_trader_of_another_host_is_believed_for_two_minutes(state):
    wall = SimulatedClock(parse_utc("2025-03-31T23:00:00Z"))
    with hold_lease(state, "trader", CODE, NOTEBOOKS, wall):
        move_to_another_host(state)
    wall.advance(119_999)
    with pytest.raises(RefusedError, match=r"on host elsewhere\.example.*its lease ends at 2025-03-31T23:02:00Z"):
        hold_lease(state, "trader", CODE, NOTEBOOKS, wall).__enter__()
    wall.advance(1)
    with hold_lease(state, "trader", CODE, NOTEBOOKS, wall) as lease, state.write() as connection:
        assert [found.holder for found in read_leases(connection)] == [lease.holder]


def test_trader_that_lost_its_lease_can_send_nothing_more(state):
    "The transaction of an intent renews the lease; when that is refused, the intent is not there either."
    with hold_lease(state, "trader", CODE, NOTEBOOKS) as lease:
        with state.write() as connection:
            renew(connection, lease, lease.acquired_ms + 1000)
        move_to_another_host(state)

        def write_intent() -> None:
            with state.write() as connection:
                save_memory(connection, "intent", {"quantity": "0.3"}, 0)
                renew(connection, lease, lease.acquired_ms + 2000)

        with pytest.raises(RefusedError, match="must send nothing more"):
            write_intent()
        with state.read() as connection:
            assert load_memory(connection, "intent") is None
            assert [found.holder for found in read_leases(connection)] == ["xsmom-far"]
    with state.read() as connection:
        assert [found.holder for found in read_leases(connection)] == ["xsmom-far"]  # nor does it take away what is not its own


def test_without_a_file_to_lock_the_row_decides(state):
    "A state on a server: there is nothing to lock, so we look for the process."
    server = replace(state, folder=None)
    ended = python("")
    ended.communicate()
    with hold_lease(server, "trader", CODE, NOTEBOOKS):
        with pytest.raises(RefusedError, match=f"process {os.getpid()} on host .*`kill {os.getpid()}`"):
            hold_lease(server, "trader", CODE, NOTEBOOKS).__enter__()
        with state.write() as connection:
            connection.execute(sql("UPDATE lease SET pid = :pid"), {"pid": ended.pid})
        with hold_lease(server, "trader", CODE, NOTEBOOKS) as lease:
            assert lease.pid == os.getpid()


def test_roles_of_different_code_are_refused(state):
    refusal = "the guard runs notebooks cdcdcdcdcdcd against our efefefefefef"
    with (hold_lease(state, "guard", CODE, NOTEBOOKS), hold_lease(state, "trader", CODE, "ef" * 32) as lease,
          pytest.raises(RefusedError, match=refusal)):  # fmt: skip
        require_same_code(state, lease)
    with hold_lease(state, "trader", CODE, "ef" * 32) as lease:
        require_same_code(state, lease)


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def call(folder: Path, *words: str):
    "Call `xsmom state …` on the store of a folder."
    return CliRunner().invoke(app, [*words, "--config", "defaults", "--set", f"live.state_url=sqlite:///{folder}/state.sqlite"])


def test_export_is_canonical_and_without_secrets(state, tmp_path, monkeypatch):
    monkeypatch.setenv("BYBIT_API_KEY", "canary-api-key-1")
    with state.write() as connection:
        save_memory(connection, "live", {"b": Decimal("0.10"), "a": None}, 5)
        emit(connection, 6, "ERROR", "login_failed", "refused canary-api-key-1", data={"key": "canary-api-key-1"})
        beat(connection, "guard", 7, "look")
    first, again = call(tmp_path, "export"), call(tmp_path, "export", "--json")
    assert (first.exit_code, first.stdout) == (again.exit_code, again.stdout) == (0, first.stdout)
    tables = json.loads(first.stdout)
    assert first.stdout.encode() == canonical_json(tables) + b"\n"
    assert set(tables) == TABLES
    assert tables["memory"] == [{"name": "live", "value": '{"a":null,"b":"0.10"}', "updated_ms": 5}]
    assert "canary" not in first.stdout
    assert first.stdout.count("[secret BYBIT_API_KEY removed]") == 2


def test_check_says_what_is_wrong(state, tmp_path):
    well = call(tmp_path, "check")
    assert (well.exit_code, well.stderr) == (0, "")
    assert "1 rows in 18 tables hold together" in well.stdout
    with state.write() as connection:
        connection.execute(sql("INSERT INTO positions (symbol, quantity, version, updated_ms) VALUES ('BTCUSDT', '-0.3', 1, 0)"))
        connection.execute(sql("INSERT INTO fills VALUES ('f1', 'o1', 'l1', 'BTCUSDT', 'Sell', '0.2', '1', '0', 0, 0)"))
    ill = call(tmp_path, "check")
    assert ill.exit_code == 1
    assert ill.stderr.splitlines() == [
        "error: fill f1 in BTCUSDT: its order o1 of l1 is not known",
        "error: position in BTCUSDT is -0.3, its fills sum to -0.2; difference -0.1",
        f"error: 2 problems in {state.location}; let a cycle settle what is open, or restore the newest backup",
    ]
    told = json.loads(call(tmp_path, "check", "--json").stdout)
    assert (told["ok"], len(told["problems"])) == (False, 2)


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("positions", "(symbol, quantity, version, updated_ms) VALUES ('BTCUSDT', '0', -1, 0)"),
        ("ledger", "VALUES ('e1', 0, 'gift', '', '1')"),
        ("events", "VALUES (1, 0, 'LOUD', 'x', '', 'x', '{}', NULL)"),
        ("orders", "VALUES ('o', 'l', 'BTCUSDT', 'Buy', 'Limit', '1', '1', 'GTC', 0, 'Lost', '0', NULL, '', 0, 0)"),
        ("intents", "VALUES ('l', 0, NULL, 'X', 'Buy', 'Market', '1', NULL, 'IOC', 0, 'open', NULL, 'sent', '', '', 0, NULL, 0)"),
    ],
)
def test_rows_that_break_the_rules_are_found(state, tmp_path, table, row):
    "An unknown status or a version below 0, written past the constraints as another tool can."
    other = sqlite3.connect(state.location)
    other.execute("PRAGMA ignore_check_constraints=1")
    other.execute(f"INSERT INTO {table} {row}")
    other.commit()
    other.close()
    assert f"(CHECK constraint failed in {table})" in check(state)[0]
    with pytest.raises(StateError, match=f"CHECK constraint failed in {table}"):
        open_state(URL, base=tmp_path)


@pytest.mark.parametrize("command", ["export", "check"])
def test_commands_do_not_make_a_store_nor_trust_a_broken_one(tmp_path, command):
    missing = call(tmp_path, command)
    assert missing.exit_code == 1
    assert "state.sqlite does not exist" in missing.stderr
    assert not (tmp_path / "state.sqlite").exists()
    (tmp_path / "state.sqlite").write_bytes(b"no database" * 1000)
    broken = call(tmp_path, command)
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert "is damaged" in broken.stderr
