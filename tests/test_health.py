"""Health as a monitor sees it: exit status, HTTP, one alert an outage; and the log that several processes write."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from small_account import MARKET, quick, time_of, trade
from xsmom_nb.cli import app
from xsmom_nb.clock import SystemClock
from xsmom_nb.config import Config, with_values
from xsmom_nb.ops.monitor import exposition, take_reading
from xsmom_nb.ops.records import account_now_ms
from xsmom_nb.ops.silence import look_for_silence
from xsmom_nb.outbox import beat, undelivered
from xsmom_nb.state import open_state, save_equity

HOUR = 3_600_000


def completed(folder: Path, ago_ms: int) -> None:
    "Leave the traces of a cycle that was completed a while ago."
    moment = SystemClock().now_ms() - ago_ms
    with open_state("sqlite:///state/xsmom.sqlite", folder) as state, state.write() as connection:
        save_equity(connection, moment, Decimal(1000), Decimal(1000))
        beat(connection, "cycle", moment, "decided a bar")


def asked(port: int, path: str) -> tuple[int, str]:
    "Status and content of an answer."
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def free_port() -> int:
    "A port that nobody has at the moment."
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_monitors_are_answered_until_the_server_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "200 while all is well, 503 when the state is damaged under it; a second server is refused; SIGTERM ends it well."
    (tmp_path / "scheduled").mkdir()
    completed(tmp_path, 1000)
    port = free_port()
    command = ["health", "--serve", "--port", str(port), "--config", "defaults"]
    script = [sys.executable, "-c", "from xsmom_nb.cli import app; app()", *command, "--set", "health.min_free_gb=0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(script, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert f":{port}/health" in server.stderr.readline()
        status, text = asked(port, "/health")
        assert (status, json.loads(text)["status"]) == (200, "ok"), text
        families = {family.name: family for family in text_string_to_metric_families(asked(port, "/metrics")[1])}
        assert families["xsmom_equity"].samples[0].value == 1000.0
        assert {sample.labels["process"] for sample in families["xsmom_heartbeat_age_seconds"].samples} == {"cycle"}
        monkeypatch.chdir(tmp_path)
        second = CliRunner().invoke(app, ["health", "--serve", "--port", str(port), "--config", "defaults"])
        assert second.exit_code == 2
        assert f"port {port} of 127.0.0.1 is used by another process" in second.stderr
        with socket.socket() as elsewhere:  # nobody listens on another address of this machine
            assert elsewhere.connect_ex(("127.0.0.2", port)) != 0
        for ending in ("-wal", "-shm"):
            (tmp_path / "state" / f"xsmom.sqlite{ending}").unlink(missing_ok=True)
        (tmp_path / "state" / "xsmom.sqlite").write_bytes(b"x" * 20_000)
        time.sleep(1.1)  # for which a look is kept
        status, text = asked(port, "/health")
        assert (status, json.loads(text)["checks"][0]["name"]) == (503, "state")
        assert "xsmom_health 2.0" in asked(port, "/metrics")[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
        assert "Traceback" not in server.stderr.read()
    assert "serving" in next((tmp_path / "logs").iterdir()).read_text()


def test_an_outage_is_told_once_by_many(tmp_path: Path) -> None:
    "Eight at once see the same silence and the same return: one event of each."
    config, begin = Config(), 1_740_787_200_000
    open_state(f"sqlite:///{tmp_path}/state.sqlite").close()
    with open_state(f"sqlite:///{tmp_path}/state.sqlite") as state:
        for step, alive_ms in ((1, 0), (2, 2 * HOUR)):
            with state.write() as connection:
                beat(connection, "cycle", begin + alive_ms, "decided a bar")
            moment = begin + 2 * HOUR + step * 60_000
            lookers = [threading.Thread(target=look_for_silence, args=(state, config, moment)) for _ in range(8)]
            for thread in lookers:
                thread.start()
            for thread in lookers:
                thread.join()
        with state.read() as connection:
            assert [(event.level, event.kind) for event in undelivered(connection)] == [
                ("CRITICAL", "silence"), ("INFO", "recovered")]


def test_a_simulated_account_has_a_clock_of_its_own(tmp_path: Path) -> None:
    "By the wall it would be silent for years; by its own clock it has just completed an hour. Its gauges are its books."
    reports = trade(tmp_path, range(3), MARKET)
    config = with_values(quick(tmp_path, **MARKET), {"health.min_free_gb": 0.0, "runs.root": str(tmp_path / "runs")})
    assert account_now_ms(config, tmp_path, simulated=True) == time_of(2)
    own, wall = take_reading(config, config, tmp_path, "example"), take_reading(config, config, tmp_path, None)
    assert own.health.verdict == "ok", own.health.troubles
    assert {check.name for check in wall.health.troubles} == {"heartbeat cycle", "market data"}
    values = {family.name: family.samples[0].value for family in text_string_to_metric_families(exposition(own).decode())
              if family.samples}
    account, held = reports[-1].account_after, reports[-1].positions_after
    assert values["xsmom_equity"] == pytest.approx(float(reports[-1].decided.decision.equity))
    gross = sum(abs(position.notional) for position in held) / account.equity
    assert (values["xsmom_positions"], values["xsmom_gross_exposure_ratio"]) == (len(held), pytest.approx(float(gross), rel=1e-2))
