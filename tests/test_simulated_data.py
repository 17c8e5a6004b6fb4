"""`xsmom exchange simulate` as users start it, and `xsmom data sync` from it: interrupted, resumed, brought up to date."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pandas as pd
import pytest

from xsmom_nb.config import Config, with_values
from xsmom_nb.exchange.connect import ExchangeClock, connect_market
from xsmom_nb.market.panel import FIELDS
from xsmom_nb.market.store import Store
from xsmom_nb.market.sync import sync
from xsmom_nb.market.synthetic import synthetic_panel

pytest.importorskip("ccxt", reason="no package ccxt found")
XSMOM = Path(sys.executable).with_name("xsmom")
START = "2024-02-01"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Store:
    "Fifty days of hourly bars of four contracts, and their funding."
    panel = synthetic_panel(bars=24 * 50, symbols=4, start="2024-01-01")
    store = Store(tmp_path_factory.mktemp("source"), "source")
    for i, symbol in enumerate(panel.symbols):
        bars = pd.DataFrame({"timestamp": panel.index, **{name: getattr(panel, name)[:, i] for name in FIELDS}}).dropna()
        store.write_bars(symbol, "1h", bars)
        settled = panel.funding[:, i] != 0
        rates = pd.DataFrame({"timestamp": panel.index[settled] + pd.Timedelta("1h"), "funding_rate": panel.funding[settled, i]})
        store.write_funding(symbol, rates)
    return store


def environment() -> dict[str, str]:
    "Ours without settings and keys; compiled code is still shared."
    dropped = ("XSMOM_", "BYBIT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped) or name == "XSMOM_CACHE_DIR"}


def words_for(source: Store, *more: str) -> list[str]:
    "A call of the simulator over the source."
    return [str(XSMOM), "exchange", "simulate", "--config", "defaults", "--data", str(source.root), "--dataset", "source", *more]


@contextmanager
def simulated(source: Store, folder: Path, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    "A simulator as users start it, its clock standing, until it is sent a signal; its URL."
    words = words_for(source, "--port", "0", "--mode", "paused", "--start", START, "--journal", str(folder / "events.jsonl"))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), cwd=folder) as process:
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.send_signal(end)
            assert process.wait(20) == 0
    lines = [json.loads(line) for path in (folder / "logs").iterdir() for line in path.read_text().splitlines()]
    assert [(line["process"], line["event"]) for line in lines][-2:] == [("simulator", "serving"), ("simulator", "ended")]


def advance(url: str, hours: int) -> None:
    "Move the simulator's clock."
    with urlopen(Request(f"{url}/__sim/advance", json.dumps({"by_ms": hours * 3_600_000}).encode())) as answer:
        assert answer.status == 200


def equal_to_source(source: Store, store: Store, until: str) -> bool:
    "Whether a store holds what the source holds up to a time, each bar once, and nothing else."
    for symbol in source.symbols("1h"):
        bars, funding = source.read_bars(symbol, "1h"), source.read_funding(symbol)
        wanted = bars[bars["timestamp"] < pd.Timestamp(until, tz="UTC")]
        if wanted.empty:
            continue
        found = store.read_bars(symbol, "1h")
        assert found["timestamp"].is_unique
        pd.testing.assert_frame_equal(found, wanted.reset_index(drop=True), check_exact=False, rtol=1e-12)
        settled = funding[funding["timestamp"] <= pd.Timestamp(until, tz="UTC")].reset_index(drop=True)
        pd.testing.assert_frame_equal(store.read_funding(symbol), settled, check_exact=False, rtol=1e-12)
    return True


def test_a_store_is_filled_interrupted_resumed_and_brought_up_to_date(source, tmp_path):
    with simulated(source, tmp_path) as url:
        mode = {"live.mode": "simulator", "exchange.mode_urls.simulator": url}
        market, clock = connect_market(with_values(Config(), mode))
        assert isinstance(clock, ExchangeClock)
        store, start_ms = Store(tmp_path / "bars", "bybit_simulator"), int(pd.Timestamp("2024-01-01", tz="UTC").value // 10**6)
        asked = 0
        read, symbols = market.fetch_bars, [each.symbol for each in market.fetch_instruments()]

        def killed(*arguments: object) -> object:
            nonlocal asked
            asked += 1
            if asked == 7:
                raise KeyboardInterrupt
            return read(*arguments)

        market.fetch_bars = killed
        with pytest.raises(KeyboardInterrupt):
            sync(market, store, symbols, "1h", clock, start_ms, page_size=200, pages_per_write=2)
        stored = {symbol: len(store.read_bars(symbol, "1h")) for symbol in store.symbols("1h")}
        assert 0 < sum(stored.values()) < 31 * 24 * len(symbols)

        words = [str(XSMOM), "data", "sync", "--config", "defaults", "--data", str(tmp_path / "bars"), "--start", "2024-01-01",
                 "--json", "--set", 'live.mode="simulator"', "--set", f'exchange.mode_urls.simulator="{url}"']

        def synced() -> dict[str, int]:
            done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60)
            assert done.returncode == 0, done.stderr
            return {each["symbol"]: each["new_bars"] for each in json.loads(done.stdout)["symbols"]}

        for hours, until in ((0, "2024-01-31 23:00"), (25, "2024-02-02 00:00")):
            advance(url, hours)
            new = synced()
            assert equal_to_source(source, store, until)
            assert all(count == len(store.read_bars(symbol, "1h")) - stored.get(symbol, 0) for symbol, count in new.items())
            stored = {symbol: len(store.read_bars(symbol, "1h")) for symbol in store.symbols("1h")}
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()}
    assert {"request", "side"} <= kinds


def test_a_service_manager_ends_it_in_order_as_ctrl_c_does(source, tmp_path):
    with simulated(source, tmp_path, signal.SIGTERM) as url:
        advance(url, 1)
    assert "clock" in {json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()}


def test_what_cannot_be_served_is_said_and_nothing_listens(source, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = words_for(source, "--port", port, "--start", START)
        busy = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60)
    assert (busy.returncode, busy.stdout) == (2, "")
    assert f"port {port} of 127.0.0.1: another program listens there" in " ".join(busy.stderr.split())
