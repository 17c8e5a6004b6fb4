"""Several real processes on one study: killed, restarted, refused; by journal file, PostgreSQL and the gRPC proxy."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from postgres import Postgres, free_port

from xsmom_nb.config import Config, with_values
from xsmom_nb.market.panel import FIELDS, Panel
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.optimizer.search import Task, rung_row, search
from xsmom_nb.optimizer.space import point_of_trial
from xsmom_nb.optimizer.storage import open_storage
from xsmom_nb.optimizer.study import Terms, begin_study, finished, start_points, this_worker, trial_table
from xsmom_nb.optimizer.worker import Desk

NAMES = ("kappa", "trade_rate", "rebalance_every_bars", "signal_power")
SETTINGS = {"optimizer.phases": 1, "filters.regime.ema_len": 50, "backtest.risk": "core"}
FIRST, END = 200, 900


# ── A small market, a study of it ────────────────────────────────────────────────────────────────────────────────────
class Place:
    "A folder with market data, and the task that all processes have in common."

    def __init__(self, folder: Path, trials: int) -> None:
        self.folder, self.settings = folder, SETTINGS | {"optimizer.trials": trials}
        store, made = Store(folder / "data", "made"), synthetic_panel(seed=4, bars=END, symbols=5, momentum=1.0)
        for place, symbol in enumerate(made.symbols):
            bars = pd.DataFrame({"timestamp": made.index, **{name: getattr(made, name)[:, place] for name in FIELDS}})
            store.write_bars(symbol, "1h", bars.dropna().reset_index(drop=True))
        self.panel: Panel = store.panel("1h")
        self.config = with_values(Config(), self.settings)
        self.task = Task(Desk.of(self.panel, self.config).prepared, self.config, FIRST, END, NAMES, threads=1)
        first_ms, last_ms = (int(self.panel.open_time_ms[row]) for row in (FIRST, END - 1))
        self.terms = Terms.of(self.config, self.panel.digest(), first_ms, last_ms, seed=5)
        self.task.scores([{}])  # compiled once, here: a process that is killed while it compiles leaves nothing to the next

    def begin(self, storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
        "A study with all its slots free."
        return begin_study(storage, name, self.terms, start_points(self.terms.trials, 5, names=NAMES), NAMES)

    def worker(self, study: str, *options: str, **environment: str) -> subprocess.Popen:
        "A process of `xsmom worker`."
        command = [sys.executable, "-c", "from xsmom_nb.cli import app; app()", "worker", "--study", study, "--json",
                   "--config", "defaults", "--data", str(self.folder / "data"), "--dataset", "made", *options]
        given = [part for key, value in self.settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return subprocess.Popen([*command, *given], env={**os.environ, **environment}, text=True, cwd=self.folder,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("workers"), trials=40)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Place:
    "A study of few slots, since a database takes its time for each."
    return Place(tmp_path_factory.mktemp("few"), trials=20)


def ended(process: subprocess.Popen, seconds: float = 120.0) -> tuple[int, str, str]:
    "Exit status, output and errors of a process."
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def kill(process: subprocess.Popen) -> None:
    "End a process as a failing host does."
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for_done(study: optuna.Study, count: int, seconds: float = 120.0) -> None:
    "Wait until so many slots are done."
    deadline = time.monotonic() + seconds
    while len(finished(study)) < count:
        assert time.monotonic() < deadline, f"{len(finished(study))} of {count} slots after {seconds} s"
        time.sleep(0.02)


def assert_whole(place: Place, study: optuna.Study) -> None:
    "Every slot is done once, nothing is left over, and each value is what one process computes for that point."
    trials = study.get_trials(deepcopy=False)
    assert not [trial.number for trial in trials if not trial.state.is_finished()]
    results = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED") or "why" in trial.user_attrs]
    assert sorted(trial.user_attrs["slot"] for trial in results) == list(range(place.terms.trials))
    given = start_points(place.terms.trials, 5, names=NAMES)
    for trial in results:
        point, slot = point_of_trial(trial.params), trial.user_attrs["slot"]
        assert slot >= len(given) or point == given[slot]
        stopped = trial.state.name == "PRUNED"
        score = place.task.scores([point], rung_row(FIRST, END) if stopped else FIRST)[0]
        assert (trial.intermediate_values[1] if stopped else trial.value) == score.value


# ── One host, a journal ──────────────────────────────────────────────────────────────────────────────────────────────
def survive_kills(place: Place, folder: Path, kills: int, seed: int) -> None:
    "Two workers, one of them killed at a random moment and replaced, again and again."
    chance, journal = random.Random(seed), folder / "studies.journal"
    study = place.begin(open_storage(None, journal), "killed")
    options = ("killed", "--journal", str(journal))
    with ExitStack() as stack:
        crew = [place.worker(*options) for _ in range(2)]
        for number in range(kills):
            wait_for_done(study, max(1, (number + 1) * place.terms.trials // (kills + 2)))
            time.sleep(chance.uniform(0.0, 0.05))
            kill(crew.pop(chance.randrange(2)))
            crew.append(place.worker(*options))
        answers = [stack.enter_context(ended_later(process)) for process in crew]
    assert [status for status, _, _ in answers] == [0] * len(crew), answers
    assert_whole(place, study)


@contextmanager
def ended_later(process: subprocess.Popen) -> Iterator[tuple[int, str, str]]:
    yield ended(process)


def test_killed_workers_lose_and_double_nothing(place, tmp_path):
    survive_kills(place, tmp_path, kills=2, seed=1)


COORDINATOR = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_workers import Place
from xsmom_nb.optimizer.search import search
from xsmom_nb.optimizer.storage import open_storage
place = Place(Path({folder!r}), {trials})
search(open_storage(None, Path({journal!r})), "resumed", place.task, place.terms)
"""


def test_a_killed_coordinator_loses_no_finished_trial(place, tmp_path):
    journal = tmp_path / "studies.journal"
    study = place.begin(open_storage(None, journal), "resumed")
    script = COORDINATOR.format(tests=str(Path(__file__).parent), folder=str(tmp_path), trials=place.terms.trials,
                                journal=str(journal))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    wait_for_done(study, 5)
    kill(process)
    before = trial_table(study)
    assert len(before) >= 5
    after = trial_table(search(open_storage(None, journal), "resumed", place.task, place.terms))
    pd.testing.assert_frame_equal(after[after.slot.isin(before.slot)].reset_index(drop=True)[before.columns], before)
    assert_whole(place, study)


def test_two_that_offer_a_slot_again_at_once(place, tmp_path):
    storage = open_storage(None, tmp_path / "studies.journal")
    study = place.begin(storage, "offered")
    for slot in (3, 3, 35):  # as two coordinators do that both found it gone
        study.add_trial(optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            **({"params": study.trials[slot].params, "distributions": study.trials[slot].distributions} if slot == 3 else {}),
            user_attrs={"slot": slot, "source": "start" if slot == 3 else "sampler"}))
    assert_whole(place, search(storage, "offered", place.task, place.terms))


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_others_are_refused_by_name(place, tmp_path):
    storage = open_storage(None, tmp_path / "studies.journal")
    study = place.begin(storage, "strict")
    options = ("--journal", str(tmp_path / "studies.journal"))
    other = place.begin(storage, "other-code")
    other.set_user_attr("terms", other.user_attrs["terms"] | {"code": "0" * 64})
    stale = place.begin(storage, "other-data")
    stale.set_user_attr("terms", stale.user_attrs["terms"] | {"data": "0" * 64})
    crew = {"the config": place.worker("strict", *options, "--set", "costs.taker_bps=9.0"),
            "the code": place.worker("other-code", *options), "the market data": place.worker("other-data", *options)}
    for what, process in crew.items():
        status, _, errors = ended(process)
        assert (status, f"{what} of this process is not what the study was begun with" in errors) == (3, True), errors
    assert not finished(study)


def test_a_clock_of_another_country_loses_nobody():
    "What Optuna notes is local time; whether a process elsewhere is lost must not hang on it."
    from xsmom_nb.optimizer.study import is_lost

    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    trial.datetime_start = pd.Timestamp.now().to_pydatetime() - pd.Timedelta(hours=9)
    now = time.time()
    trial.set_user_attr("worker", this_worker() | {"host": "elsewhere", "since": now - 30})
    assert not is_lost(trial, now)
    assert is_lost(trial, now + 600)


# ── PostgreSQL ───────────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def opened(url: str) -> Iterator[optuna.storages.BaseStorage]:
    "A database's storage; its connections are closed at the end."
    storage = open_storage(url, Path())
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def survive_restart(place: Place, server: Postgres, name: str, url: str, workers: int) -> None:
    "So many workers, one of them killed, the server stopped at once in the middle and started again."
    with opened(server.url) as storage:
        study = place.begin(storage, name)
        crew = [place.worker(name, "--storage", url) for _ in range(workers)]
        wait_for_done(study, 2)
        kill(crew.pop())
        server.stop()
        time.sleep(0.5)
        server.start()
        answers = [ended(process) for process in crew]
        assert [status for status, _, _ in answers] == [0] * len(crew), answers
        assert_whole(place, study)


def test_postgres_is_restarted(small, postgres):
    survive_restart(small, postgres, "restarted", postgres.url, workers=2)


PROXY = """
import sys, optuna
from optuna.storages import RDBStorage
optuna.storages.run_grpc_proxy_server(RDBStorage(sys.argv[1], engine_kwargs={"pool_pre_ping": True}),
                                      host="127.0.0.1", port=int(sys.argv[2]))
"""


@contextmanager
def proxy(server: Postgres) -> Iterator[str]:
    "The URL of a proxy in front of a database."
    port = free_port()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROXY, server.url, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        kill(process)


def test_workers_behind_a_proxy(small, postgres):
    pytest.importorskip("grpc", reason="no package grpcio found")
    with opened(postgres.url) as storage, proxy(postgres) as url:
        study = small.begin(storage, "behind")
        crew = [small.worker("behind", "--storage", url) for _ in range(2)]
        wait_for_done(study, 2)
        kill(crew.pop())
        status, out, errors = ended(crew[0])
        assert status == 0, errors
        assert json.loads(out)["studies"][0]["done"] == small.terms.trials
        assert_whole(small, study)


def test_a_server_that_stays_away(place, postgres):
    script = "import xsmom_nb.optimizer.storage as s; s.PATIENCE_SECONDS = 0.2; from xsmom_nb.cli import app; app()"
    command = [sys.executable, "-c", script, "worker", "--study", "s", "--config", "defaults", "--data",
               str(place.folder / "data"), "--dataset", "made", "--storage"]
    for url in (f"postgresql+psycopg://study@127.0.0.1:{free_port()}/postgres", f"grpc://127.0.0.1:{free_port()}"):
        done = subprocess.run([*command, url], text=True, capture_output=True, cwd=place.folder)
        assert (done.returncode, url in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr


def long_form(folder: Path, rounds: int = 10) -> None:
    "By hand: `python -c 'import test_workers, pathlib; test_workers.long_form(pathlib.Path(\"/tmp/long\"))'`."
    place = Place(folder, trials=300)
    for number in range(rounds):
        survive_kills(place, folder / f"round{number}", kills=5, seed=int(np.random.default_rng(number).integers(1000)))
