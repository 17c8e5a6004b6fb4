"""Market data across modules: real files, torn files, several processes at once, and properties that hold for any input."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from xsmom_nb.clock import SimulatedClock, parse_utc
from xsmom_nb.errors import DataError, XsmomError
from xsmom_nb.market.panel import FIELDS, Panel, resample
from xsmom_nb.market.quality import check_store
from xsmom_nb.market.store import Store, Written
from xsmom_nb.market.sync import import_folder, sync
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.operations import Quality
from xsmom_nb.ports import Bar, FundingRate, TransientError

HOUR = 3_600_000
START = parse_utc("2024-01-01")


def frame_of(panel: Panel, column: int) -> pd.DataFrame:
    "The bars of one symbol as a file holds them."
    numbers = pd.DataFrame({name: getattr(panel, name)[:, column] for name in FIELDS})
    return numbers.assign(timestamp=panel.index)[["timestamp", *FIELDS]].dropna().reset_index(drop=True)


def frames_of(panel: Panel) -> dict[str, pd.DataFrame]:
    "One frame a symbol."
    return {symbol: frame_of(panel, i) for i, symbol in enumerate(panel.symbols)}


def store_of(panel: Panel, folder: Path) -> Store:
    "A store that holds the panel's bars."
    store = Store(folder, "small")
    for symbol, frame in frames_of(panel).items():
        store.write_bars(symbol, panel.timeframe, frame)
    return store


def bars(count: int, level: float = 100.0, start: int = START) -> pd.DataFrame:
    "Hourly bars that all say the same level."
    times = pd.to_datetime(start + HOUR * np.arange(count), unit="ms", utc=True)
    return pd.DataFrame({"timestamp": times, **dict.fromkeys(FIELDS, level)})


# ── The golden edge case ─────────────────────────────────────────────────────────────────────────────────────────────
def test_edge_panel(golden):
    panel = Store(golden, "edge").panel("1h")
    assert panel.shape == (1100, 12)
    assert panel.without_funding == ()
    alive = dict(zip(panel.symbols, np.isfinite(panel.close).T, strict=True))
    assert np.flatnonzero(alive["EEEUSDT"])[0] == 420  # lists late
    assert np.flatnonzero(alive["FFFUSDT"])[-1] == 819  # is delisted
    hole = np.flatnonzero(~alive["GGGUSDT"])
    assert len(hole) == 2
    assert hole[1] == hole[0] + 1
    settled = dict(zip(panel.symbols, (panel.funding != 0).T, strict=True))
    hours = panel.index.hour
    assert set(hours[settled["AAAUSDT"]]) == {7, 15, 23}  # settled at the closes of these bars
    assert set(hours[settled["IIIUSDT"]]) == {3, 7, 11, 15, 19, 23}


# ── The real data ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_real_panel(real_store):
    panel = real_store.panel("1h")
    assert len(panel.symbols) == 36
    assert np.isfinite(panel.close).sum() == 791_174
    assert len(panel.without_funding) == 10
    assert panel.index[-1] == pd.Timestamp("2025-09-30 23:00", tz="UTC")
    assert not panel.is_synthetic
    for symbol in panel.without_funding:
        assert not panel.funding[:, panel.symbols.index(symbol)].any()


def test_real_funding_is_summed_not_lost(real_store):
    panel = real_store.panel("1h")
    first, last = panel.index[0], panel.index[-1] + pd.Timedelta("1h")
    for symbol in set(panel.symbols) - set(panel.without_funding):
        file = real_store.read_funding(symbol)
        moment = file["timestamp"].dt.round("min")
        inside = file["funding_rate"][(moment > first) & (moment <= last)]
        np.testing.assert_allclose(panel.funding[:, panel.symbols.index(symbol)].sum(), inside.sum(), rtol=0, atol=1e-12)


def test_real_funding_at_two_four_and_eight_hours(real_store):
    panel = real_store.panel("1h")
    settled = panel.frame("funding") != 0
    hours = settled.index.hour.to_numpy()
    crash = settled.loc["2022-11-10":"2022-11-16", "SOLUSDT"]
    assert np.diff(np.flatnonzero(crash)).min() == 2
    assert panel.frame("funding").loc["2022-11", "SOLUSDT"].min() < -0.015
    assert set(hours[settled["TIAUSDT"]]) == {3, 7, 11, 15, 19, 23}
    assert set(hours[settled["BTCUSDT"]]) == {7, 15, 23}


def test_five_minutes_make_the_hours(real_store):
    "The 5 min files resample to the 1 h files exactly."
    hourly = resample(real_store.panel("5m"), "1h")
    start, end = int(hourly.open_time_ms[0]), int(hourly.open_time_ms[-1])
    files = real_store.panel("1h", start, end, hourly.symbols)
    whole = np.isfinite(hourly.close)  # the first hour of some files has fewer than twelve bars and is not made
    assert (np.isfinite(files.close) & ~whole).sum() < 30
    for name in ("open", "high", "low", "close"):
        np.testing.assert_array_equal(getattr(hourly, name)[whole], getattr(files, name)[whole])
    np.testing.assert_allclose(hourly.volume[whole], files.volume[whole], rtol=1e-9)
    np.testing.assert_allclose(hourly.funding, files.funding, rtol=0, atol=1e-15)


def test_four_hours_from_one(real_store):
    "The store makes bars it has no files of, as pandas would."
    start, end = parse_utc("2024-01-01"), parse_utc("2024-03-01")
    panel = real_store.panel("4h", start, end, ["BTCUSDT", "ETHUSDT"])
    assert panel.index[-1] == pd.Timestamp("2024-03-01", tz="UTC")  # a bar that opens at the end is whole
    bars = real_store.read_bars("BTCUSDT", "1h", start, end + 3 * HOUR).set_index("timestamp")
    expected = bars.resample("4h").agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
    for name in FIELDS:
        np.testing.assert_allclose(panel.frame(name)["BTCUSDT"], expected[name], rtol=1e-12)


def test_real_data_passes_the_checks(real_store):
    report = check_store(real_store, "1h", Quality())
    report.raise_if_refused()
    assert (len(report.symbols), report.bars, len(report.without_funding)) == (36, 791_174, 10)
    assert not set(report.frame()["verdict"]) - {"ok", "reported"}


def test_reading_is_quick(real_store):
    real_store.panel("1h")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        real_store.panel("1h")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0  # 0.4 s on an idle machine of two cores


def test_a_real_symbol_survives_csv(real_store, tmp_path):
    "Written as an exchange dump and imported, a symbol is the same to the last bit."
    real = real_store.read_bars("SOLUSDT", "1h")
    (tmp_path / "dump").mkdir()
    milliseconds = real["timestamp"].astype("int64")
    real.assign(timestamp=milliseconds).to_csv(tmp_path / "dump" / "SOLUSDT-1h.csv", index=False, header=False)
    store = Store(tmp_path, "imported")
    report = import_folder(tmp_path / "dump", store, "1h")[0]
    assert (report.error, report.refused_rows, report.new) == (None, {}, len(real))
    kept = store.read_bars("SOLUSDT", "1h")
    for name in FIELDS:
        assert kept[name].to_numpy().tobytes() == real[name].to_numpy().tobytes()


# ── Broken files, full disks ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.999])
def test_a_torn_file_is_named(tmp_path, share):
    store = store_of(synthetic_panel(bars=300, symbols=3), tmp_path)
    path = store.path("ETHUSDT", "1h")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"ETHUSDT\.parquet: cannot be read .* import or synchronise it again"):
        store.panel("1h")
    report = check_store(store, "1h", Quality())
    assert [(finding.symbol, finding.check) for finding in report.refused] == [("ETHUSDT", "readable")]


def test_every_flipped_byte_is_found_or_harmless(tmp_path):
    "A damaged file is refused; where the damage hits no data, the numbers are unchanged."
    store = Store(tmp_path, "small")
    store.write_bars("BTCUSDT", "1h", frame_of(synthetic_panel(bars=60, symbols=2), 0))
    path = store.path("BTCUSDT", "1h")
    content, sound = path.read_bytes(), store.read_bars("BTCUSDT", "1h")
    refused = 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            pd.testing.assert_frame_equal(store.read_bars("BTCUSDT", "1h"), sound)
        except DataError:
            refused += 1
    assert refused > 100


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import pyarrow.parquet as parquet

    store = Store(tmp_path, "small")
    store.write_bars("BTCUSDT", "1h", bars(10))

    def full(table, where, **options):
        Path(where).write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(XsmomError, match=r"BTCUSDT\.parquet: cannot be written .*disk is full"):
        store.write_bars("BTCUSDT", "1h", bars(20))
    assert len(store.read_bars("BTCUSDT", "1h")) == 10
    assert [path.name for path in store.path("BTCUSDT", "1h").parent.iterdir()] == ["BTCUSDT.parquet"]


# ── Several at once ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_reader_sees_the_old_file_or_the_new(tmp_path):
    store = Store(tmp_path, "small")
    store.write_bars("BTCUSDT", "1h", bars(2000, level=1.0))
    stop = threading.Event()

    def write():
        for level in range(2, 40):
            store.write_bars("BTCUSDT", "1h", bars(2000, level=float(level)))
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not stop.is_set():
        frame = store.read_bars("BTCUSDT", "1h")
        levels = set(np.unique(frame[list(FIELDS)]))
        assert len(frame) == 2000
        assert len(levels) == 1  # never a mixture
        seen |= levels
    writer.join()
    assert len(seen) > 1


def test_writers_at_once_lose_nothing(tmp_path):
    store = Store(tmp_path, "small")

    def write(part):
        for i in range(5):
            store.write_bars("BTCUSDT", "1h", bars(10, start=START + HOUR * 10 * (5 * part + i)))

    writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(store.read_bars("BTCUSDT", "1h")) == 200


# ── Download ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Exchange:
    "A port in memory with its own page size and holes, which fails now and then."

    def __init__(self, last_ms, page=7, holes=(), failures=0.0, seed=0):
        self.last_ms, self.page, self.holes, self.failures = last_ms, page, set(holes), failures
        self.rng, self.requests = np.random.default_rng(seed), 0

    def times(self, step):
        return [at for at in range(START, self.last_ms + 1, step) if at not in self.holes]

    def page_of(self, start_ms, limit, step):
        self.requests += 1
        if self.rng.random() < self.failures:
            raise TransientError("too many visits")
        return [at for at in self.times(step) if at >= start_ms][: min(limit, self.page)]

    def fetch_bars(self, symbol, timeframe, start_ms, limit):
        price = {at: 100.0 + at // HOUR % 97 for at in self.times(HOUR)}
        answer = [Bar(at, price[at], price[at] + 1, price[at] - 1, price[at], 1.0) for at in self.page_of(start_ms, limit, HOUR)]
        return [*answer, answer[-1]] if answer and self.rng.random() < 0.3 else answer  # a row twice

    def fetch_funding(self, symbol, start_ms, limit):
        return [FundingRate(at, 1e-4) for at in self.page_of(start_ms, limit, 8 * HOUR)]

    def fetch_instruments(self):
        return []


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 10_000), page=st.integers(4, 40), per_write=st.integers(1, 6),
    holes=st.sets(st.integers(1, 118), max_size=25), lost=st.sets(st.integers(0, 119), max_size=60),
)
def test_whatever_was_there_the_download_completes_it(tmp_path_factory, seed, page, per_write, holes, lost):
    last = START + 119 * HOUR
    exchange = Exchange(last, page, [START + HOUR * i for i in holes], failures=0.2, seed=seed)
    clock = SimulatedClock(last + HOUR + 60_000)
    store = Store(tmp_path_factory.mktemp("sync"), "fake")
    options = {"start_ms": START, "sleep": lambda seconds: None, "pages_per_write": per_write, "page_size": 50, "attempts": 50}
    sync(exchange, store, ["BTCUSDT"], "1h", clock, **options)
    whole = store.read_bars("BTCUSDT", "1h")
    assert whole["timestamp"].astype("int64").tolist() == exchange.times(HOUR)
    store.path("BTCUSDT", "1h").unlink()
    kept = whole[[i not in lost for i in range(len(whole))]]
    if len(kept):
        store.write_bars("BTCUSDT", "1h", kept)
    sync(exchange, store, ["BTCUSDT"], "1h", clock, **options)
    pd.testing.assert_frame_equal(store.read_bars("BTCUSDT", "1h"), whole)
    assert store.read_funding("BTCUSDT")["timestamp"].astype("int64").tolist() == exchange.times(8 * HOUR)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import xsmom_nb.market.store
from test_market import Exchange, START, HOUR
from xsmom_nb.clock import SimulatedClock
from xsmom_nb.market.store import Store
from xsmom_nb.market.sync import sync

writes = 0
replace = os.replace
def dying(source, target):  # the fourth file is written and flushed, but its name is never taken
    global writes
    writes += 1
    if writes == 4:
        os._exit(9)
    replace(source, target)
os.replace = dying
last = START + 119 * HOUR
clock = SimulatedClock(last + HOUR + 60_000)
sync(Exchange(last), Store({root!r}, "fake"), ["BTCUSDT"], "1h", clock, start_ms=START, pages_per_write=2)
"""


def test_a_killed_download_goes_on(tmp_path):
    "Killed between writing a file and renaming it: the file before is whole, the next start does the rest."
    script = KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    store, last = Store(tmp_path, "fake"), START + 119 * HOUR
    assert len(store.read_bars("BTCUSDT", "1h")) == 3 * 2 * 7
    exchange = Exchange(last)
    report = sync(exchange, store, ["BTCUSDT"], "1h", SimulatedClock(last + HOUR + 60_000))[0]
    assert (report.new_bars, report.missing, report.error) == (120 - 42, 0, None)
    assert store.read_bars("BTCUSDT", "1h")["timestamp"].astype("int64").tolist() == exchange.times(HOUR)


# ── Properties ───────────────────────────────────────────────────────────────────────────────────────────────────────
MARKET = synthetic_panel(seed=3, bars=120, symbols=6, start="2024-01-01")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)), seed=st.integers(0, 10_000))
def test_order_of_symbols_and_rows_changes_nothing(order, seed):
    frames, funding = frames_of(MARKET), {}
    for i, symbol in enumerate(MARKET.symbols[:4]):
        settled = np.flatnonzero(MARKET.funding[:, i])
        funding[symbol] = pd.DataFrame({"timestamp": MARKET.index[settled] + pd.Timedelta("1h"),
                                        "funding_rate": MARKET.funding[settled, i]})
    straight = Panel.from_frames(frames, funding)
    mixed = {symbol: frame.sample(frac=1, random_state=seed).sort_values("timestamp") for symbol, frame in frames.items()}
    shuffled = {MARKET.symbols[i]: mixed[MARKET.symbols[i]] for i in order}
    again = Panel.from_frames(shuffled, dict(reversed(funding.items())))
    assert again.digest() == straight.digest()
    assert again.without_funding == straight.without_funding == MARKET.symbols[4:]
    for name in (*FIELDS, "funding"):
        assert getattr(again, name).tobytes() == getattr(straight, name).tobytes()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(end=st.integers(0, 119), start=st.integers(0, 119))
def test_as_of_reads_are_slices_of_the_whole(end, start):
    start, end = sorted((start, end))
    bounds = int(MARKET.open_time_ms[start]), int(MARKET.open_time_ms[end])
    cut = MARKET.slice(*bounds)
    known = [symbol for i, symbol in enumerate(cut.symbols) if np.isfinite(cut.close[:, i]).any()]
    read = WHOLE.panel("1h", *bounds)
    assert read.symbols == tuple(known)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(read, name), getattr(cut.select(known), name))


@pytest.fixture(autouse=True, scope="module")
def _whole_market(tmp_path_factory):
    global WHOLE
    WHOLE = store_of(MARKET, tmp_path_factory.mktemp("whole"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_merging_is_a_union_in_which_the_last_word_counts(tmp_path_factory, data):
    store, truth = Store(tmp_path_factory.mktemp("merge"), "small"), {}
    for level in range(1, data.draw(st.integers(2, 4)) + 1):
        rows = sorted(data.draw(st.sets(st.integers(0, 30), min_size=1)))
        new = len(set(rows) - set(truth))
        truth |= dict.fromkeys(rows, float(level))
        written = store.write_bars("BTCUSDT", "1h", bars(31, level=float(level)).iloc[rows])
        assert written == Written(new, len(rows) - new, len(truth))
    kept = store.read_bars("BTCUSDT", "1h")
    assert dict(zip((kept["timestamp"].astype("int64") - START) // HOUR, kept["close"], strict=True)) == truth


def test_no_temporary_file_is_ever_left(tmp_path):
    store = store_of(synthetic_panel(bars=50, symbols=3), tmp_path)
    left = [name for _, _, names in os.walk(store.root) for name in names if not name.endswith(".parquet")]
    assert left == [".store.lock"]
