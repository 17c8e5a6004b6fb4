"""The state on a PostgreSQL server: the promises of the file, kept by a server, and what it says when the server is gone."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from postgres import Postgres, free_port
from small_account import MARKET, Memo, decisions_of, quick, recording, targets_of, time_of
from typer.testing import CliRunner

from xsmom_nb.cli_state import app
from xsmom_nb.database import open_database, sql
from xsmom_nb.errors import RefusedError, StateError
from xsmom_nb.lease import hold_lease
from xsmom_nb.live.desk import open_desk
from xsmom_nb.outbox import emit, mark_delivered, undelivered
from xsmom_nb.state import State, check, export, load_memory, open_state, save_equity, save_memory


@pytest.fixture
def url(postgres, request) -> str:
    "The URL of an empty schema, as several accounts on one server would have."
    schema = request.node.name[:60]
    postgres.execute(f"CREATE SCHEMA {schema}")
    return f"{postgres.url}?options=-csearch_path%3D{schema}"


# ── The promises ─────────────────────────────────────────────────────────────────────────────────────────────────────
INCREASE = """
import sys
from xsmom_nb.outbox import emit
from xsmom_nb.state import load_memory, open_state, save_memory
with open_state(sys.argv[1], busy_timeout_seconds=30) as state:
    for n in range(100):
        with state.write() as connection:
            save_memory(connection, "count", (load_memory(connection, "count") or 0) + 1, n)
            emit(connection, n, "INFO", "round", str(n))
"""


def test_three_processes_lose_no_update_and_make_one_schema(url):
    writers = [subprocess.Popen([sys.executable, "-c", INCREASE, url]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with open_state(url) as state:
        assert check(state) == []
        with state.read() as connection:
            assert load_memory(connection, "count") == 300
            assert [event.event_id for event in undelivered(connection)] == [*range(1, 301)]
            assert connection.execute(sql("SELECT COUNT(*) FROM schema_version")).scalar_one() == 1


def fail_half_way(state: State) -> None:
    with state.write() as connection:
        save_memory(connection, "half", 1, 0)
        raise ZeroDivisionError


def test_half_a_step_is_none(url):
    with open_state(url) as state:
        with pytest.raises(ZeroDivisionError):
            fail_half_way(state)
        with state.read() as connection:
            assert load_memory(connection, "half") is None


def test_a_reader_sees_one_moment_and_changes_nothing(url):
    with open_state(url) as state, state.read() as reader:
        count = sql("SELECT COUNT(*) FROM equity")
        before = reader.execute(count).scalar_one()
        with state.write() as connection:
            save_equity(connection, 1, Decimal(1), Decimal(1))
        assert reader.execute(count).scalar_one() == before == 0
        with pytest.raises(Exception, match="read-only transaction"):
            save_equity(reader, 2, Decimal(1), Decimal(1))


def test_a_second_writer_waits_as_long_as_it_was_told(url):
    with open_state(url) as state, open_state(url, busy_timeout_seconds=0.3) as waiting:
        with state.write():
            begin = time.monotonic()
            with pytest.raises(StateError, match="is locked by another process"), waiting.write():
                pytest.fail("the lock was given twice")
            assert 0.25 < time.monotonic() - begin < 5
            with waiting.read() as connection:  # readers go on
                assert load_memory(connection, "live") is None
        with waiting.write() as connection:
            assert emit(connection, 0, "INFO", "after", "it goes on") == 1


def test_commits_are_flushed_whatever_the_server_says(url, postgres):
    postgres.execute("ALTER DATABASE postgres SET synchronous_commit = off")
    try:
        with open_state(url) as state, state.read() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    finally:
        postgres.execute("ALTER DATABASE postgres RESET synchronous_commit")


def test_an_event_that_is_not_there_is_named(url):
    with open_state(url) as state, state.write() as connection:
        emit(connection, 0, "INFO", "one", "one")
        emit(connection, 0, "INFO", "two", "two")
        mark_delivered(connection, [1, 2], 5)
        with pytest.raises(StateError, match="event 7 does not exist"):
            mark_delivered(connection, [2, 7], 5)


def test_other_tables_are_refused_and_one_trader_is_enough(url):
    with open_state(url) as state, hold_lease(state, "trader", "ab", "cd"):
        with pytest.raises(StateError, match=r"made for something else .*paper\.account_url must name .* schema of its own"):
            open_database(url, (("CREATE TABLE account (cash TEXT)",),), key="paper.account_url")
        with open_state(url) as other, pytest.raises(RefusedError, match=f"process {os.getpid()} on host"):
            hold_lease(other, "trader", "ab", "cd").__enter__()


# ── An account ───────────────────────────────────────────────────────────────────────────────────────────────────────
def tables_after(folder: Path, hours: int, changes: dict[str, str | float]) -> dict[str, list[dict[str, object]]]:
    "Everything the state knows when an account has traded some hours."
    folder.mkdir()
    with open_desk(quick(folder, **changes), recording=recording(), now_ms=time_of(0), base=folder) as desk:
        for hour in range(hours):
            desk.clock.set(time_of(hour))
            desk.cycle(Memo(folder))
        assert check(desk.state) == []
        return export(desk.state)


def test_an_account_on_a_server_is_the_account_in_a_file(url, tmp_path):
    "The same decisions, orders, fills, positions and events, to the last digit."
    in_file = tables_after(tmp_path / "file", 12, MARKET)
    on_server = tables_after(tmp_path / "server", 12, MARKET | {"live.state_url": url})
    assert targets_of(tmp_path / "file") == targets_of(tmp_path / "server")
    assert len(decisions_of(tmp_path / "server")) == 12
    assert len(on_server["fills"]) > 10
    ours = {"heartbeats", "lease"}  # say which process it was
    assert {name: rows for name, rows in in_file.items() if name not in ours} == {
        name: rows for name, rows in on_server.items() if name not in ours}


def test_commands_on_a_server(url):
    def call(*words: str):
        return CliRunner().invoke(app, [*words, "--config", "defaults", "--set", f"live.state_url={url}"])

    with open_state(url) as state, state.write() as connection:
        emit(connection, 0, "INFO", "one", "one")
    assert '"text":"one"' in call("export").stdout
    assert "hold together" in call("check").stdout
    refused = call("backup")
    assert refused.exit_code == 2
    assert "pg_dump" in refused.stderr


# ── A server that goes away ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def restarted(postgres) -> Iterator[Postgres]:
    "A server that a test may stop."
    yield postgres
    if not postgres.is_running():
        postgres.start()


def test_a_server_that_is_not_there():
    with pytest.raises(StateError, match=r"127\.0\.0\.1:\d+/postgres cannot be reached .*see that it runs") as refusal:
        open_state(f"postgresql://me:hunter22@127.0.0.1:{free_port()}/postgres")
    assert "hunter22" not in str(refusal.value)


def lose_server_half_way(state: State, server: Postgres) -> None:
    with state.write() as connection:
        save_memory(connection, "half", 1, 0)
        server.stop()
        save_memory(connection, "kept", 2, 0)


def test_a_server_that_is_started_anew_in_the_middle_of_a_step(url, restarted):
    with open_state(url) as state:
        with state.write() as connection:
            save_memory(connection, "kept", 1, 0)
        with pytest.raises(StateError, match="cannot be reached"):
            lose_server_half_way(state, restarted)
        with pytest.raises(StateError, match="cannot be reached"), state.write():
            pytest.fail("nobody answers")
        restarted.start()
        with state.write() as connection:  # by itself, on a new connection
            assert load_memory(connection, "kept") == 1
            assert load_memory(connection, "half") is None
            save_memory(connection, "kept", 3, 0)


def test_a_restart_between_two_steps_is_not_noticed(url, restarted):
    with open_state(url) as state:
        with state.write() as connection:
            save_memory(connection, "kept", 1, 0)
        restarted.stop()
        restarted.start()
        with state.read() as connection:
            assert load_memory(connection, "kept") == 1
