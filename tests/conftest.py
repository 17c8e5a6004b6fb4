"""What the tests share: the rule about skipping, and market data, real where there is some and synthetic everywhere."""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))  # so that tests import house.py and each other's helpers by name

ROOT = Path(__file__).resolve().parent.parent

# ── Skipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# A skipped test proves nothing, so the only excuse is that something is absent from this machine, and it is said what.
EXCUSE = re.compile(r"no (market data|golden numbers|design page|command \S+|package \S+) found")
skipped: dict[str, str] = {}  # test to its reason


def note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    "Remember a skip; an expected failure is one too, since it also lets a broken thing pass."
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "expected failure")
        skipped[report.nodeid] = str(reason).removeprefix("Skipped: ")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    note_skip(report)


def unexcused() -> dict[str, str]:
    "Skipped tests whose reason is not that data or a tool is absent."
    return {test: reason for test, reason in skipped.items() if not EXCUSE.match(reason)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexcused() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test, reason in unexcused().items():
        terminalreporter.write_line(
            f"SKIPPED WITHOUT EXCUSE {test}: {reason!r}; expected 'no market data found', 'no golden numbers found', "
            "'no design page found', 'no command NAME found' or 'no package NAME found'",
            red=True,
        )


# ── Market data ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(scope="session")
def real_store():
    "The store of the real bars; skips where this machine has none."
    from xsmom_nb.market.store import Store, find_data

    folder = find_data(base=ROOT)
    if folder is None or not (folder / "binance_perp" / "1h").is_dir():
        pytest.skip("no market data found")
    return Store(folder, "binance_perp")


@pytest.fixture(scope="session")
def real_panel(real_store):
    "All real 1 h bars before the holdout, all symbols."
    from xsmom_nb.clock import parse_utc

    return real_store.panel("1h", end_ms=parse_utc("2025-03-31T23:00:00Z"))


@pytest.fixture(scope="session")
def golden():
    "The folder of the golden numbers; skips where this machine has none."
    folder = ROOT.parent / "shared" / "golden"
    if not (folder / "core.json").is_file():
        pytest.skip("no golden numbers found")
    return folder


# ── A server ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="session")
def postgres():
    "A running PostgreSQL server; skips where none is installed."
    from postgres import Postgres, initdb

    if (program := initdb()) is None:
        pytest.skip("no command initdb found")
    pytest.importorskip("psycopg", reason="no package psycopg found")
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:  # a socket's path must be short
        server = Postgres(Path(folder), str(program.parent))
        server.start()
        try:
            yield server
        finally:
            server.stop()
