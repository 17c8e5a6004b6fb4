"""Notifications from outside: a chat server that limits, fails, hangs, refuses and vanishes; a storm; and sudden deaths.

The server is a real one, on a port of this machine. What each module does by itself is shown in its notebook.
"""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr
from typer.testing import CliRunner

from xsmom_nb.cli_notify import app
from xsmom_nb.clock import SystemClock
from xsmom_nb.database import sql
from xsmom_nb.errors import RefusedError
from xsmom_nb.lease import hold_lease
from xsmom_nb.operations import Notify, Route
from xsmom_nb.ops.deliveries import standing
from xsmom_nb.ops.notify import Office, drain, keep_draining
from xsmom_nb.outbox import emit, heartbeats, undelivered
from xsmom_nb.state import State, check, export, open_state

TOKEN = "s3cr3tT0ken"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(100)
Answer = tuple[int, dict[str, Any], dict[str, str], float]  # status, body, headers, seconds before it
GOOD: Answer = (200, {"id": "1"}, {}, 0.0)


class Chat:
    "A server like Discord's: it answers each webhook as it is told to, and keeps what it has taken."

    def __init__(self, port: int = 0) -> None:
        self.script: dict[int, list[Answer]] = {}  # by webhook; when it is over, all is well
        self.always: dict[int, Answer] = {}
        self.asked: list[tuple[int, float, dict[str, Any], list[str]]] = []  # webhook, when, embed, attachments
        self.taken: list[tuple[int, dict[str, Any]]] = []  # webhook and embed
        self.on_message: Callable[[int], None] = lambda number: None  # is told how many were asked, before it is taken
        self.on_taken: Callable[[int], None] = lambda number: None
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(port,), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _answer(self, request: web.Request) -> web.Response:
        webhook, files = int(request.match_info["id"]), []
        assert request.query["wait"] == "true"
        if request.content_type.startswith("multipart"):
            parts = {part.name: await part.read() async for part in await request.multipart()}
            body, files = json.loads(parts.pop("payload_json")), [name for name, data in parts.items() if data == PICTURE]
        else:
            body = await request.json()
        self.asked.append((webhook, time.monotonic(), body["embeds"][0], files))
        number = len(self.asked)
        self.on_message(number)
        script = self.script.get(webhook)
        status, said, headers, seconds = script.pop(0) if script else self.always.get(webhook, GOOD)
        if 200 <= status < 300:
            self.taken.append((webhook, body["embeds"][0]))
            self.on_taken(number)
        await asyncio.sleep(seconds)
        return web.json_response(said, status=status, headers=headers)

    def _run(self, port: int) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application()
        application.router.add_post("/api/webhooks/{id}/{token}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
        self._loop.run_until_complete(self._runner.setup())
        self._loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", port).start())
        self.port = self._runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()

    def url(self, webhook: int) -> str:
        return f"http://127.0.0.1:{self.port}/api/webhooks/{webhook}/{TOKEN}"

    def titles(self, webhook: int = 1) -> list[str]:
        return [card["title"] for hook, card in self.taken if hook == webhook]

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def chat() -> Iterator[Chat]:
    "A server of its own."
    server = Chat()
    yield server
    server.close()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    "An open store of its own."
    with open_state("sqlite:///state/xsmom.sqlite", base=tmp_path) as opened:
        yield opened


def office_of(state: State, tmp_path: Path, urls: dict[str, str], **settings: Any) -> Office:
    "An office that is quick."
    routes = tuple(Route(**route) for route in settings.pop("routes", [{"url_from": name} for name in urls]))
    quick = {"retry_seconds": 0.05, "retry_max_minutes": 0.01, "poll_seconds": 0.05, "dedupe_minutes": 0.0, **settings}

    def addresses() -> dict[str, SecretStr]:
        return {name: SecretStr(url) for name, url in urls.items()}

    return Office(state, Notify(routes=routes, **quick), SystemClock(), addresses, tmp_path / "runs", "paper")


def tell(state: State, *kinds: str, level: str = "INFO", data: dict[str, Any] | None = None) -> None:
    "Something happens."
    with state.write() as connection:
        for kind in kinds:
            emit(connection, SystemClock().now_ms(), level, kind, f"{kind} happened", data=data)  # type: ignore[arg-type]


def told_until(office: Office, done: Callable[[], bool], seconds: float = 10.0) -> None:
    "Keep draining until something holds."

    async def work() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(keep_draining(office, stop))
        deadline = time.monotonic() + seconds
        while not done() and not task.done():
            assert time.monotonic() < deadline, standing(office.state)
            await asyncio.sleep(0.01)
        stop.set()
        await task

    asyncio.run(work())


def waits(state: State) -> list[str]:
    "Kinds of the events that not everybody was told of."
    with state.read() as connection:
        return [event.kind for event in undelivered(connection)]


def nothing_waits(state: State) -> Callable[[], bool]:
    return lambda: not waits(state)


# ── A service that is ill ────────────────────────────────────────────────────────────────────────────────────────────
def test_limits_and_failures_are_waited_out_in_order(chat, state, tmp_path):
    "429 twice, by body and by header; 500; an allowance that is used up: each pause is kept, nothing is lost or doubled."
    chat.script[1] = [(429, {"retry_after": 0.3}, {"Retry-After": "1"}, 0.0), (429, {}, {"Retry-After": "0.2"}, 0.0),
                      (500, {"message": "ill"}, {}, 0.0),
                      (200, {}, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset-After": "0.4"}, 0.0)]
    tell(state, "first", "second")
    told_until(office_of(state, tmp_path, {"CHAT": chat.url(1)}), nothing_waits(state))
    times = [when for _, when, _, _ in chat.asked]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert all(pause >= least for pause, least in zip(pauses, (0.3, 0.2, 0.02, 0.4), strict=True))
    assert chat.titles() == ["First", "Second"]
    assert not any("perhaps" in card["footer"]["text"] for _, card in chat.taken)


def test_a_message_that_may_have_arrived_is_repeated_and_says_so(chat, state, tmp_path):
    "The server takes it and then says nothing in time."
    chat.script[1] = [(200, {}, {}, 3.0)]
    tell(state, "exit")
    told_until(office_of(state, tmp_path, {"CHAT": chat.url(1)}, timeout_seconds=0.3), nothing_waits(state))
    assert [("perhaps told before" in card["footer"]["text"]) for _, card in chat.taken] == [False, True]


def test_a_limit_of_all_of_discord_rests_every_webhook(chat, state, tmp_path):
    chat.script[1] = [(429, {"retry_after": 0.5, "global": True}, {"X-RateLimit-Global": "true"}, 0.0)]
    routes = [{"url_from": "CHAT"}, {"url_from": "OTHER", "level": "ERROR"}]
    office = office_of(state, tmp_path, {"CHAT": chat.url(1), "OTHER": chat.url(2)}, routes=routes)
    tell(state, "exit")
    told_until(office, lambda: standing(state).routes != ())
    tell(state, "unprotected", level="ERROR")  # for both
    told_until(office, nothing_waits(state))
    (_, limited, _, _), *later = chat.asked
    assert all(when - limited >= 0.5 for _, when, _, _ in later)
    assert (chat.titles(1), chat.titles(2)) == (["Exit", "Unprotected"], ["Unprotected"])


# ── An address that is wrong ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("status", [404, 401])
def test_a_broken_route_is_said_once_and_delivers_when_it_is_mended(chat, state, tmp_path, status):
    chat.always[1] = (status, {"message": "Unknown Webhook", "code": 10015}, {}, 0.0)
    urls = {"CHAT": chat.url(1), "OTHER": chat.url(2)}
    office = office_of(state, tmp_path, urls)
    tell(state, "exit", "order_lost")
    told_until(office, lambda: len(chat.titles(2)) == 3)
    assert sorted(chat.titles(2)) == ["Exit", "Order lost", "Route broken"]  # the others go on
    assert [hook for hook, *_ in chat.asked].count(1) == 1  # and the broken one is left alone
    for _ in range(3):  # as the schedule does, each time a process of its own
        asyncio.run(drain(office_of(state, tmp_path, urls)))
    assert [hook for hook, *_ in chat.asked].count(1) == 1  # still, for its hour
    told_until(office, lambda: [hook for hook, *_ in chat.asked].count(1) == 2)  # a new start tries once, and does not tell again
    assert (waits(state), chat.titles(2)[3:]) == (["exit", "order_lost", "route_broken"], [])
    urls["CHAT"] = chat.url(3)  # a person has mended it
    told_until(office, nothing_waits(state))
    assert sorted(chat.titles(3)) == ["Exit", "Order lost", "Route broken", "Route mended"]
    assert chat.titles(2)[3:] == ["Route mended"]
    assert check(state) == []
    assert TOKEN not in json.dumps(export(state))


def test_nobody_listens_and_then_somebody_does(state, tmp_path):
    server = Chat()
    port, url = server.port, server.url(1)
    server.close()
    tell(state, "exit")
    office = office_of(state, tmp_path, {"CHAT": url})
    asyncio.run(drain(office, patience_seconds=0))
    (route,) = standing(state).routes
    assert (route.broken_ms, route.failures > 0, "Cannot connect" in route.last_error) == (None, True, True)
    server = Chat(port)
    try:
        told_until(office, nothing_waits(state))
        assert [card["footer"]["text"].endswith("Z") for _, card in server.taken] == [True]  # it cannot have arrived before
    finally:
        server.close()


def test_a_message_that_is_refused_is_tried_plainly_and_given_up(chat, state, tmp_path):
    chat.always[1] = (400, {"message": "Invalid Form Body", "code": 50035}, {}, 0.0)
    office = office_of(state, tmp_path, {"CHAT": chat.url(1)}, give_up_after=2)
    tell(state, "exit", data={"pnl": 1.5})
    told_until(office, nothing_waits(state))
    assert [("fields" in card) for _, _, card, _ in chat.asked][:2] == [True, False]
    given_up = [(row["kind"], row["status"], row["last_error"]) for row in standing(state).messages]
    reason = "HTTP 400: Invalid Form Body"
    assert given_up == [("exit", "given_up", reason), ("message_given_up", "given_up", reason)]  # and there it ends


def test_the_plot_of_a_run_goes_with_its_message(chat, state, tmp_path):
    run = tmp_path / "runs" / "daily_report" / "20250401T000500Z-0a1b2c" / "outputs"
    run.mkdir(parents=True)
    (run / "equity.png").write_bytes(PICTURE)
    tell(state, "daily_report", data={"run_id": run.parent.name, "plot": "outputs/equity.png", "outcome": "good"})
    told_until(office_of(state, tmp_path, {"CHAT": chat.url(1)}), nothing_waits(state))
    ((_, _, card, files),) = chat.asked
    assert (files, card["image"]["url"], card["color"]) == (["files[0]"], "attachment://equity.png", 0x2E9E5B)
    assert [field["name"] for field in card["fields"]] == ["Run id"]


# ── Who is told, and that only one tells ─────────────────────────────────────────────────────────────────────────────
def test_levels_and_kinds_choose_and_nobody_is_an_answer(chat, state, tmp_path):
    routes = [{"url_from": "CHAT", "level": "WARNING"}, {"url_from": "MAIL", "events": ("daily_report",)}]
    office = office_of(state, tmp_path, {"CHAT": chat.url(1), "MAIL": chat.url(2)}, routes=routes)
    tell(state, "exit", "daily_report")
    tell(state, "stale_data", level="WARNING")
    asyncio.run(drain(office))
    assert (chat.titles(1), chat.titles(2), waits(state)) == (["Stale data"], ["Daily report"], [])
    with state.read() as connection:
        assert connection.execute(sql("SELECT COUNT(*) FROM deliveries")).scalar() == 2


def test_a_second_teller_is_refused(chat, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold_lease(state, "notify", "code", "notebooks"):
        refused = CliRunner().invoke(app, ["drain", "--config", "defaults"])
    assert (refused.exit_code, "another notify works with" in refused.output) == (RefusedError.exit_status, True)


# ── A storm ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def program(tmp_path: Path, chat: Chat, **settings: Any) -> subprocess.Popen[str]:
    "`xsmom notify run` in a process of its own."
    rules = {"routes": [{"url_from": "CHAT_URL"}], "poll_seconds": 0.1, **settings}
    words = [word for key, value in rules.items() for word in ("--set", f"notify.{key}={json.dumps(value)}")]
    code = "import sys; from xsmom_nb.cli_notify import app; app(sys.argv[1:])"
    environment = {**os.environ, "CHAT_URL": chat.url(1), "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen([sys.executable, "-c", code, "run", "--config", "defaults", *words], cwd=tmp_path, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    "Wait until something holds."
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(f"it did not come: {process.communicate(timeout=5)[0]}")
        time.sleep(0.02)


def test_a_storm_is_a_few_messages_and_delays_no_writer(chat, state, tmp_path):
    """Ten thousand events of three thousand kinds and symbols, a server that is slow, and meanwhile a trader who writes.

    The kill switch among them is told first; every event is in exactly one message; a write waits for no message.
    """
    storm = [{"id": number, "level": "WARNING", "kind": f"kind_{number % 3}", "symbol": f"S{number % 1000}"}
             for number in range(1, 10_001)]
    storm[7_000] |= {"level": "CRITICAL", "kind": "kill_switch"}
    with state.write() as connection:
        connection.execute(sql("INSERT INTO events (event_id, time_ms, level, kind, symbol, text) "
                               "VALUES (:id, 1000 + :id, :level, :kind, :symbol, 'it happened')"), storm)
    chat.always[1] = (200, {}, {}, 0.05)
    process, waited = program(tmp_path, chat, max_messages_per_minute=30), []

    def step() -> bool:
        begin = time.perf_counter()
        with state.write() as connection:
            emit(connection, SystemClock().now_ms(), "DEBUG", "step", "a trader writes")
        waited.append(time.perf_counter() - begin)
        time.sleep(0.02)
        with state.read() as connection:
            return not connection.execute(sql("SELECT 1 FROM events WHERE delivered_ms IS NULL AND level <> 'DEBUG'")).scalar()

    wait_for(step, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert len(chat.taken) == 22  # the last quarter of the places is kept for what is critical
    assert chat.titles()[0].startswith("Kill switch")
    with state.read() as connection:
        counts = connection.execute(sql("SELECT form, COUNT(*), COUNT(DISTINCT d.event_id) FROM messages m JOIN deliveries d ON "
                                        "d.message_id = m.message_id WHERE m.status = 'sent' GROUP BY form")).all()
        assert connection.execute(sql("SELECT COUNT(*) FROM deliveries WHERE message_id IS NULL")).scalar() == 0
        assert [beat.process for beat in heartbeats(connection)] == ["notify"]
    assert sum(rows for _, rows, _ in counts) == sum(events for *_, events in counts) == 10_000
    waited.sort()
    median, late, longest = (1000 * waited[int(share * (len(waited) - 1))] for share in (0.5, 0.99, 1.0))
    print(f"{len(waited)} writes: median {median:.1f} ms, p99 {late:.1f} ms, longest {longest:.1f} ms")
    assert late < 250  # busy machines included; alone it is a few ms
    assert TOKEN not in output


# ── Sudden deaths ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_killed_with_a_full_queue_nothing_is_lost(chat, state, tmp_path):
    """The process dies when a message has arrived and is not answered; when one was not taken; and in the middle of it all.

    Afterwards everybody was told of every event, and what was told twice says that it may have been.
    """
    total, kills = 60, []
    with state.write() as connection:
        for number in range(total):
            emit(connection, 1_000, "INFO", f"kind_{number}", f"event {number}")
    running: list[subprocess.Popen[str]] = []

    def kill(number: int) -> None:
        kills.append(number)
        running[-1].kill()
        running[-1].wait()

    chat.on_message = lambda number: kill(number) if number == 12 else None  # it arrives nowhere: the answer will be 500
    chat.script[1] = [GOOD] * 11 + [(500, {}, {}, 0.0)]
    chat.on_taken = lambda number: kill(number) if number == 5 else None  # taken, and never answered
    while True:
        running.append(program(tmp_path, chat, dedupe_minutes=0, max_messages_per_minute=600, retry_seconds=0.05))
        if len(running) == 3:  # this one between two messages, whichever they are
            wait_for(lambda: len(chat.taken) >= 30, running[-1])
            kill(0)
        elif len(running) == 4:
            break
        else:
            running[-1].wait(timeout=60)
    wait_for(nothing_waits(state), running[-1])
    running[-1].send_signal(signal.SIGTERM)
    assert running[-1].wait(timeout=20) == 0
    for process in running:
        assert process.stdout is not None
        assert TOKEN not in process.stdout.read()
        process.stdout.close()
    assert len(kills) == 3
    told = [(int(re.search(r"event (\d+)", card["footer"]["text"])[1]), "perhaps told before" in card["footer"]["text"])
            for _, card in chat.taken]
    counts = Counter(event_id for event_id, _ in told)
    assert sorted(counts) == list(range(1, total + 1))  # none lost
    doubled = {event_id for event_id, count in counts.items() if count > 1}
    assert 1 <= len(doubled) <= len(kills)
    assert max(counts.values()) == 2
    assert all((event_id, True) in told and (event_id, False) in told for event_id in doubled)  # the repetition says so
    assert sum(in_doubt for _, in_doubt in told) <= len(kills)
    assert check(state) == []
