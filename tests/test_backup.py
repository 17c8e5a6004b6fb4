"""Copies of an account that trades, brought back: the pair, the state alone, an older version, a newer one, under a trader."""

import shutil
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from small_account import MARKET, Memo, quick, recording, targets_of, time_of, trade
from xsmom_nb.cli import app
from xsmom_nb.database import open_database
from xsmom_nb.errors import IntegrityError, RefusedError, StateError
from xsmom_nb.execution.journal import held_quantities
from xsmom_nb.lease import hold_lease
from xsmom_nb.live.desk import open_desk
from xsmom_nb.ops.backup import back_up, check_copy, originals
from xsmom_nb.ops.restore import restore
from xsmom_nb.outbox import undelivered
from xsmom_nb.state import MIGRATIONS, check, export, open_state

NOW = 1_740_787_200_000


def copied(folder: Path) -> list[Path]:
    "Copy state and account."
    return [back_up(each, folder / "copies", NOW).path for each in originals(quick(folder, **MARKET), folder)]


def tables(folder: Path) -> dict[str, list[dict[str, object]]]:
    "All that an account remembers but what a restore adds, and what only says when."
    with open_state(f"sqlite:///{folder}/state.sqlite") as state:
        found = export(state)
    return {name: rows for name, rows in found.items() if name not in ("events", "lease", "memory")}


def test_an_account_goes_on_where_its_copy_was_taken(tmp_path: Path) -> None:
    "State and paper account come back together; the same hours once more give the same books."
    trade(tmp_path, range(3), MARKET)
    state, paper = copied(tmp_path)
    trade(tmp_path, range(3, 6), MARKET)
    once, targets = tables(tmp_path), targets_of(tmp_path)
    done = restore(state, quick(tmp_path, **MARKET), tmp_path, NOW + 60_000)
    assert [(each.kind, each.backup, each.problems) for each in done] == [("state", state, []), ("paper", paper, [])]
    assert all(each.kept is not None and check_copy(each.kept) for each in done)
    trade(tmp_path, range(3, 6), MARKET)  # which also audits the books
    assert tables(tmp_path) == once
    assert targets_of(tmp_path) == targets


def test_a_state_that_is_older_than_the_exchange_catches_up(tmp_path: Path) -> None:
    "The state alone is brought back, as after a crash: the next cycle asks what it missed, and the books are whole."
    trade(tmp_path, range(3), MARKET)
    state, paper = copied(tmp_path)
    trade(tmp_path, range(3, 5), MARKET)
    paper.unlink()
    (done,) = restore(state, quick(tmp_path, **MARKET), tmp_path, NOW + 60_000)
    assert done.kind == "state"
    known = {row["fill_id"] for row in tables(tmp_path)["fills"]}
    with open_desk(quick(tmp_path, **MARKET), recording=recording(), now_ms=time_of(5), base=tmp_path) as desk:
        desk.cycle(Memo(tmp_path))
        assert check(desk.state) == []
        theirs = {fill.fill_id for fill in desk.port.fetch_fills(0)}
        assert known < theirs == {row["fill_id"] for row in export(desk.state)["fills"]}
        with desk.state.read() as connection:
            believed, kinds = held_quantities(connection), [event.kind for event in undelivered(connection)]
        assert believed == {position.symbol: position.quantity for position in desk.port.fetch_positions()}
    assert "restored" in kinds


def test_older_versions_are_migrated_and_newer_refused(tmp_path: Path) -> None:
    "A backup of every version this program ever made comes back with today's tables."
    config = quick(tmp_path, **{"live.mode": "testnet"})
    for version in range(1, len(MIGRATIONS) + 1):
        old = tmp_path / f"old-{version}.sqlite"
        open_database(f"sqlite:///{old}", MIGRATIONS[:version]).close()
        with closing(sqlite3.connect(old)) as connection:
            connection.execute("INSERT INTO chain VALUES ('runs', 'r', ?, ?, 1)", ("a" * 64, "b" * 64))
            connection.commit()
        (done,) = restore(old, config, tmp_path, NOW + version * 60_000)
        with open_state(f"sqlite:///{tmp_path}/state.sqlite") as state:
            found = export(state)
        assert found["schema_version"] == [{"version": len(MIGRATIONS)}]
        assert (found["chain"][0]["run_id"], done.problems) == ("r", [])
        assert check_copy(old)["chain"] == 1, "the backup itself was touched"
    before = (tmp_path / "state.sqlite").read_bytes()
    newer = tmp_path / "newer.sqlite"
    shutil.copy(old, newer)
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("UPDATE schema_version SET version = ?", (len(MIGRATIONS) + 1,))
        connection.commit()
    with pytest.raises(StateError, match=r"newer\.sqlite has schema version .* run the newer program"):
        restore(newer, config, tmp_path, NOW)
    assert (tmp_path / "state.sqlite").read_bytes() == before


def test_a_process_that_trades_is_not_pulled_from_under(tmp_path: Path) -> None:
    "Refused by the lock of another process; afterwards it works."
    trade(tmp_path, range(1), MARKET)
    state, _ = copied(tmp_path)
    script = textwrap.dedent(f"""
        import sys
        from xsmom_nb.lease import hold_lease
        from xsmom_nb.state import open_state
        with open_state("sqlite:///{tmp_path}/state.sqlite") as state, hold_lease(state, "trader", "a", "b"):
            print("in", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trader:
        assert trader.stdout is not None
        assert trader.stdout.readline() == "in\n"
        words = ["state", "restore", str(state), "--set", f"live.state_url=sqlite:///{tmp_path}/state.sqlite"]
        answer = CliRunner().invoke(app, [*words, "--set", f"paper.account_url=sqlite:///{tmp_path}/paper.sqlite"])
        assert answer.exit_code == 3
        assert "a trader works with" in answer.stderr
        trader.communicate("")
    assert len(restore(state, quick(tmp_path, **MARKET), tmp_path, NOW)) == 2


def test_a_trader_on_another_host_is_believed(tmp_path: Path) -> None:
    "Its lease is a row; as long as it is fresh, nothing is restored."
    trade(tmp_path, range(1), MARKET)
    state, _ = copied(tmp_path)
    with open_state(f"sqlite:///{tmp_path}/state.sqlite") as opened:
        with hold_lease(opened, "trader", "a", "b") as lease:
            elsewhere = replace(lease, host="elsewhere", renewed_ms=NOW)
        row = tuple(getattr(elsewhere, name) for name in lease.__dataclass_fields__)
    with closing(sqlite3.connect(tmp_path / "state.sqlite")) as connection:
        columns, places = ", ".join(lease.__dataclass_fields__), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO lease ({columns}) VALUES ({places})", row)
        connection.commit()
    with pytest.raises(RefusedError, match="on host elsewhere"):
        restore(state, quick(tmp_path, **MARKET), tmp_path, NOW + 60_000)
    assert len(restore(state, quick(tmp_path, **MARKET), tmp_path, NOW + 200_000)) == 2


def test_half_a_copy_changes_nothing(tmp_path: Path) -> None:
    "When the paper account of a pair is damaged, the state is not replaced either."
    trade(tmp_path, range(1), MARKET)
    state, paper = copied(tmp_path)
    trade(tmp_path, range(1, 2), MARKET)
    before = tables(tmp_path)
    paper.write_bytes(paper.read_bytes()[:8192])
    with pytest.raises(IntegrityError, match=paper.name):
        restore(state, quick(tmp_path, **MARKET), tmp_path, NOW)
    assert tables(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if "restore" in path.name or "replaced" in path.name]
