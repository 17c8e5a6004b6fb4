"""The command line from outside: exit statuses, what is said on which stream, what is left behind, and what is not.

Cheap commands are called in this process. Runs are real processes in a small working tree of their own, with six symbols over
sixty days; the ones that several tests look at are made once.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from xsmom_nb.cli import app
from xsmom_nb.clock import parse_utc
from xsmom_nb.market.panel import FIELDS
from xsmom_nb.market.store import Store
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.optimizer.looks import holdout_looks, read_looks

XSMOM = Path(sys.executable).with_name("xsmom")
DAYS = 60
HOLDOUT = "2024-02-25"
SETTINGS = f"paths: {{dataset: small}}\noptimizer: {{holdout_start: {HOLDOUT}}}\n"

# ── A small working tree ─────────────────────────────────────────────────────────────────────────────────────────────
NOTEBOOKS = {
    "half": ("run_dir = ''\nwanted = 3", "print(wanted)", "assert wanted == 3, 'half-way there'", "print('the other half')"),
    "sleeper": (
        "run_dir = ''",
        "import os, pathlib, time",
        "pathlib.Path(run_dir, 'pid').write_text(str(os.getpid()))",
        "time.sleep(120)",
    ),
    "pair": (
        "run_dir = ''\nmeeting = ''\nname = ''\nother = ''",
        "import pathlib, time",
        "(pathlib.Path(meeting) / name).touch()",
        "until = time.monotonic() + 60",
        "while not (pathlib.Path(meeting) / other).exists():\n    assert time.monotonic() < until, 'alone'\n    time.sleep(0.05)",
    ),
    "keeper": ("run_dir = ''", "from xsmom_nb.runs.record import open_run\nopen_run(run_dir).write_json('result', [1, 2, 3])"),
}


def write_notebook(path: Path, cells: tuple[str, ...]) -> None:
    "A scheduled notebook whose first cell declares its parameters."
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


def bars_of(symbols: int) -> dict[str, pd.DataFrame]:
    "Bars of a synthetic market, as files hold them."
    panel = synthetic_panel(bars=24 * DAYS, symbols=symbols, momentum=2.0, start="2024-01-01")
    tables = {}
    for i, symbol in enumerate(panel.symbols):
        numbers = {name: getattr(panel, name)[:, i] for name in FIELDS}
        tables[symbol] = pd.DataFrame({"timestamp": panel.index, **numbers}).dropna().reset_index(drop=True)
    return tables


def make_tree(folder: Path, root: Path) -> Path:
    "A working tree with data: `small` without funding, `two` of two symbols."
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "config.yaml").write_text(SETTINGS)
    (folder / "scheduled").mkdir()
    shutil.copy(root / "scheduled" / "backtest.ipynb", folder / "scheduled")
    for name, cells in NOTEBOOKS.items():
        write_notebook(folder / "scheduled" / f"{name}.ipynb", cells)
    for dataset, symbols in {"small": 6, "two": 2}.items():
        for symbol, frame in bars_of(symbols).items():
            Store(folder / "data", dataset).write_bars(symbol, "1h", frame)
    return folder


def environment(**more: str) -> dict[str, str]:
    "Ours without its settings of this project; compiled code is still shared."
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XSMOM_") or name == "XSMOM_CACHE_DIR"}
    return {**ours, **more}


@pytest.fixture(scope="module")
def tree(tmp_path_factory, root) -> Path:
    "The working tree of this module's runs; what a test breaks it must mend."
    return make_tree(tmp_path_factory.mktemp("cli") / "checkout", root)


Outcome = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def xsmom(tree) -> Callable[..., Outcome]:
    "Call the installed command in the working tree, with its data."

    def call(*words: object, **more: str) -> Outcome:
        variables = environment(XSMOM_DATA=str(tree / "data"), **more)
        return subprocess.run([XSMOM, *map(str, words)], cwd=tree, env=variables, capture_output=True, text=True, timeout=300)

    return call


@pytest.fixture
def quick(tree, monkeypatch) -> Callable[..., Any]:
    "Call a command that starts no kernel, in this process."
    for name in [name for name in os.environ if name.startswith("XSMOM_") and name != "XSMOM_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("XSMOM_DATA", str(tree / "data"))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def run_folders(tree: Path) -> set[Path]:
    "All kept runs."
    return set((tree / "runs").glob("*/*Z-*"))


def manifest_of(folder: Path) -> dict[str, Any]:
    "The manifest of a kept run."
    return json.loads((folder / "manifest.json").read_bytes())


def no_traceback(text: str) -> None:
    "Fail when an error was not put into words."
    assert "Traceback" not in text, text


# ── Help ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_help_is_quick(xsmom):
    "Counted is the processor's time, which is the waiting time of an idle machine; other tests run beside this one."
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = xsmom("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("baseline", "backtest", "run", "runs", "data", "config", "version"))
    assert min(seconds) < 0.4, seconds


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["bakctest"], "Did you mean 'backtest'?"),
        (["backtest", "--sett", "strategy.kappa=2.0"], "--set"),
        (["runs", "lst"], "Did you mean 'list'?"),
        (["runs", "show"], "RUN"),
    ],
)
def test_wrong_words_are_answered(quick, words, hint):
    answer = quick(*words)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert hint in answer.stderr


# ── Config ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("command", [["config", "check"], ["backtest"], ["run", "backtest"], ["baseline"]], ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("strategy.kapa=2.0", "strategy.kapa = 2.0 (--set): unknown key; did you mean 'strategy.kappa'?"),
        ("strategy.k_max=0", "strategy.k_max = 0 (--set): expected a whole number"),
        ("strategy.kappa", "expected section.key=<JSON>"),
        ("filters.breadth.enabled=true", "filters.breadth.enabled = true: not built yet"),
        ('carry.enabled=true', "not built yet"),
    ],
)
def test_bad_settings_start_nothing(quick, tree, command, setting, said):
    before = run_folders(tree)
    answer = quick(*command, "--set", setting)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert said in answer.stderr
    no_traceback(answer.stderr)
    assert run_folders(tree) == before


def test_every_error_has_its_line(quick, monkeypatch):
    monkeypatch.setenv("XSMOM_STRATEGY__GAMMA", "1")
    answer = quick("config", "check", "--set", "strategy.k_max=0", "--set", "strategy.kapa=2.0")
    assert answer.exit_code == 2
    assert sorted(line.split()[1] for line in answer.stderr.splitlines()) == ["strategy.gamma", "strategy.k_max", "strategy.kapa"]


def test_config_files(quick, tree):
    assert quick("config", "check").exit_code == 0
    broken = tree / "broken.yaml"
    broken.write_text("strategy:\n  kappa: [1,\n")
    for path in (broken, tree / "nowhere.yaml"):
        answer = quick("config", "check", "--config", path)
        assert answer.exit_code == 2
        assert path.name in answer.stderr
        no_traceback(answer.stderr)


# ── Data and dates ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--end", "2024-02-25"], 3, "reaches into the holdout, which begins at 2024-02-25T00:00:00Z"),
        (["--end", "2024-02-29T23:00"], 3, "--holdout"),
        (["--start", "2024-02-01", "--end", "2024-01-15"], 2, "no bar between"),
        (["--start", "2025-01-01"], 2, "no bar between"),
        (["--end", "tomorrow"], 2, "expected a UTC date or time"),
        (["--data", "nowhere"], 2, "there is no folder"),
        (["--dataset", "smal"], 2, "did you mean 'small'?"),
        (["--dataset", "../small"], 2, "cannot be a file name"),
        (["--timeframe", "5m"], 2, "no bars of 5m"),
        (["--timeframe", "2d"], 2, "expected one of"),
    ],
)
def test_wrong_choices_start_nothing(quick, tree, words, status, said):
    before = run_folders(tree)
    answer = quick("backtest", *words)
    assert (answer.exit_code, answer.stdout) == (status, "")
    assert said in answer.stderr
    no_traceback(answer.stderr)
    assert run_folders(tree) == before


def test_the_holdout_of_the_synthetic_market_is_kept_too(quick, tree, monkeypatch, tmp_path):
    monkeypatch.delenv("XSMOM_DATA")
    shutil.copytree(tree / "scheduled", tmp_path / "a" / "b" / "scheduled")
    monkeypatch.chdir(tmp_path / "a" / "b")
    answer = quick("backtest", "--config", "defaults", "--end", "2025-04-01")
    assert answer.exit_code == 3
    assert "synthetic" not in answer.stdout
    assert not (tmp_path / "a" / "b" / "runs").exists()


def spoilt(tree: Path, how: str) -> Path:
    "A copy of the small dataset in which one file is wrong; its name is the data folder's."
    folder = tree / f"data-{how}"
    shutil.copytree(tree / "data" / "small", folder / "small", dirs_exist_ok=True)
    path = folder / "small" / "1h" / "ETHUSDT.parquet"
    frame = pd.read_parquet(path)
    if how == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "page":
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    elif how == "twice":
        pd.concat([frame.iloc[:100], frame.iloc[99:]]).to_parquet(path, index=False)
    elif how == "off":
        frame.loc[100, "timestamp"] += pd.Timedelta("7min")
        frame.to_parquet(path, index=False)
    return folder


BROKEN_DATA = {
    "torn": "ETHUSDT.parquet: cannot be read",
    "page": "ETHUSDT.parquet: cannot be read",
    "twice": "ETHUSDT duplicates: 1, first at 2024-01-05T03:00:00Z",
    "off": "ETHUSDT off_grid: 1, first at 2024-01-05T04:07:00Z",
}


@pytest.mark.parametrize("how", BROKEN_DATA)
def test_broken_data_is_found_and_named(quick, tree, how):
    answer = quick("data", "check", "--data", spoilt(tree, how), "--json")
    assert answer.exit_code == 1
    assert BROKEN_DATA[how] in answer.stderr
    no_traceback(answer.stderr)
    assert json.loads(answer.stdout)["verdict"] == "refused"


def test_a_torn_file_starts_nothing(quick, tree):
    before = run_folders(tree)
    answer = quick("backtest", "--data", spoilt(tree, "torn"))
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert BROKEN_DATA["torn"] in answer.stderr
    no_traceback(answer.stderr)
    assert run_folders(tree) == before


def test_no_data_at_all_is_missing_data(quick, tmp_path):
    answer = quick("backtest", "--data", tmp_path)
    assert answer.exit_code == 1
    assert "xsmom data import" in answer.stderr


def test_an_import_on_a_full_disk_leaves_what_was_there(quick, tree, tmp_path, monkeypatch):
    dump = tmp_path / "dump"
    dump.mkdir()
    bars_of(2)["BTCUSDT"].to_csv(dump / "BTCUSDT.csv", index=False)
    words = ["data", "import", dump, "--data", tmp_path / "data", "--dataset", "new"]
    assert quick(*words).exit_code == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.parquet")}
    bars_of(2)["BTCUSDT"].assign(volume=1.0).to_csv(dump / "BTCUSDT.csv", index=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = quick(*words, "--overwrite")
    assert answer.exit_code == 1
    assert "the disk is full; free some space and repeat" in answer.stderr
    there = (path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.suffix != ".lock")
    assert {path: path.read_bytes() for path in there} == kept


# ── A backtest ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def done(xsmom) -> dict[str, Any]:
    "A backtest of three weeks, as `--json` tells it."
    answer = xsmom("backtest", "--start", "2024-02-01", "--end", "2024-02-21", "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)  # one object and nothing else


def test_a_backtest_that_looks_at_the_holdout_is_counted(xsmom, tree, done):
    looks = tree / "runs" / "looks.jsonl"
    assert not looks.exists()  # the backtest before it had no business there
    answer = xsmom("backtest", "--start", "2024-02-20", "--end", "2024-02-25", "--holdout", "--json")
    assert answer.returncode == 0, answer.stderr
    (look,) = read_looks(looks)
    assert (look.purpose, look.study, look.run_id) == ("holdout", "backtest", json.loads(answer.stdout)["run_id"])
    assert holdout_looks([look], parse_utc(HOLDOUT), "small") == 1


def test_what_json_tells(done, tree):
    assert {"run_id", "path", "metrics", "status", "html", "holdout", "origin"} <= set(done)
    assert (done["status"], done["holdout"], done["origin"]) == ("done", False, "small")
    assert Path(done["path"]).parent == tree / "runs" / "backtest"
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", done["run_id"])
    assert done["metrics"] == json.loads(Path(done["path"], "outputs", "metrics.json").read_bytes())
    assert done["metrics"]["trades"] > 0


def test_dates_are_inclusive(done):
    equity = pd.read_parquet(Path(done["path"], "outputs", "equity.parquet"))
    assert len(equity) == 21 * 24
    assert [str(equity.index[i]) for i in (0, -1)] == ["2024-02-01 00:00:00+00:00", "2024-02-21 23:00:00+00:00"]
    assert list(equity.columns) == ["equity", "returns", "turnover", "fees", "slippage", "funding"]


def test_missing_funding_is_counted_as_zero_and_said(done):
    assert done["metrics"]["funding"] == 0.0
    assert re.search(r"6 of 6 symbols have no funding data.*counted as 0", Path(done["html"]).read_text())


def test_the_run_is_found_again(done, quick):
    listed = json.loads(quick("runs", "list", "backtest", "--status", "done", "--json").stdout)["runs"]
    assert done["run_id"] in [run["run_id"] for run in listed]
    shown = json.loads(quick("runs", "show", done["run_id"], "--json").stdout)
    assert (shown["parameters"]["end"], shown["metrics"]) == ("2024-02-21T23:00:00Z", done["metrics"])
    assert done["run_id"] in quick("runs", "show", done["run_id"]).stdout


def test_open_prints_the_page(done, quick, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    assert quick("runs", "open", done["run_id"]).stdout == f"{done['html']}\n"
    assert opened == [Path(done["html"]).as_uri()]
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert quick("runs", "open", done["run_id"]).exit_code == 0
    assert len(opened) == (2 if sys.platform == "darwin" else 1)


@pytest.mark.parametrize("name", ["notebook.ipynb", "notebook.html", "config.yaml", "events.jsonl", "inputs/data.json",
                                  "outputs/equity.parquet", "outputs/trades.parquet", "manifest.json"])  # fmt: skip
def test_a_flipped_bit_is_found_and_named(done, quick, name):
    path = Path(done["path"], name)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    path.write_bytes(changed)
    try:
        answer = quick("runs", "verify")
    finally:
        path.write_bytes(content)
    assert answer.exit_code == 1
    assert f"backtest/{done['run_id']}/{name}: was changed" in answer.stderr
    assert quick("runs", "verify").exit_code == 0


def test_what_is_missing_is_named(done, quick, tree):
    folder = Path(done["path"])
    folder.rename(tree / "aside")
    try:
        answer = quick("runs", "verify", "--json")
    finally:
        (tree / "aside").rename(folder)
    assert answer.exit_code == 1
    assert [problem["run_id"] for problem in json.loads(answer.stdout)["problems"]] == [done["run_id"]]


def test_pruning_only_says_what_it_would_do(done, quick):
    shown = json.loads(quick("runs", "prune", "--dry-run", "--set", "runs.keep_full_days=1", "--json").stdout)
    assert shown == {"dry_run": True, "bytes": 0, "runs": []}  # the runs are of today


def test_two_symbols_stay_flat_and_it_is_said(xsmom):
    answer = xsmom("backtest", "--dataset", "two", "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    equity = pd.read_parquet(Path(found["path"], "outputs", "equity.parquet"))
    assert (equity["equity"] == equity["equity"].iloc[0]).all()
    assert found["metrics"]["trades"] == 0
    assert "stays flat" in Path(found["html"]).read_text()


def test_a_bar_that_is_there_twice_fails_the_run_and_the_run_is_kept(xsmom, tree):
    answer = xsmom("backtest", "--data", spoilt(tree, "twice"), "--json")
    assert answer.returncode == 1
    assert "ETHUSDT at 2024-01-05T03:00:00Z: appears twice" in answer.stderr
    no_traceback(answer.stderr)
    kept = json.loads(answer.stdout)
    assert (kept["status"], manifest_of(Path(kept["path"]))["status"]) == ("failed", "failed")
    assert kept["path"] in answer.stderr


def test_the_main_job(xsmom):
    answer = xsmom("baseline", "--set", "strategy.k_max=3")
    assert answer.returncode == 0, answer.stderr
    table = answer.stdout[answer.stdout.index("What was done") :]
    assert re.search(r"^data +small: 6 symbols", table, re.MULTILINE)
    assert re.search(r"^quality +ok; funding unknown and counted as 0 for 6 symbols", table, re.MULTILINE)
    assert re.search(r"^decisions +2024-01-01T00:00:00Z to 2024-02-24T23:00:00Z", table, re.MULTILINE)
    assert re.search(r"^kept +\d+ runs, \d+ files: all as they were sealed", table, re.MULTILINE)
    pages = re.findall(r"^(configs/config.yaml|defaults) +(/\S+notebook\.html)$", table, re.MULTILINE)
    assert [name for name, _ in pages] == ["configs/config.yaml", "defaults"]
    assert all(Path(page).is_file() for _, page in pages)


# ── Any notebook ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["half", "-p", "wantd=1"], "did you mean 'wanted'?"),
        (["half", "-p", "wanted=three"], "wanted='three'"),
        (["half", "-p", "wanted"], "expected key=value"),
        (["hlaf"], "did you mean 'half'?"),
        (["backtest", "-p", "stat=2024-02-01"], "did you mean 'start'?"),
        (["half", "-p", "run_dir=elsewhere"], "set by the runner"),
    ],
)
def test_wrong_parameters_start_nothing(quick, tree, words, said):
    before = run_folders(tree)
    answer = quick("run", *words)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert said in answer.stderr
    assert run_folders(tree) == before


def test_a_parameter_can_reach_for_the_holdout_too(quick, tree):
    before = run_folders(tree)
    assert quick("run", "backtest", "-p", f"end={HOLDOUT}").exit_code == 3
    assert run_folders(tree) == before


def test_a_notebook_that_fails_half_way_is_kept(xsmom, tree):
    before = run_folders(tree)
    answer = xsmom("run", "half", "-p", "wanted=4")
    assert (answer.returncode, answer.stdout) == (1, "")
    (kept,) = run_folders(tree) - before
    assert str(kept) in answer.stderr
    assert "AssertionError: half-way there" in answer.stderr
    manifest = manifest_of(kept)
    assert (manifest["status"], manifest["parameters"]) == ("failed", {"wanted": 4})
    assert "half-way there" in (kept / "notebook.html").read_text()
    assert xsmom("runs", "verify").returncode == 0


# ── Interruptions ────────────────────────────────────────────────────────────────────────────────────────────────────
def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    "What a condition gives as soon as it gives something."
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


def lives(pid: int) -> bool:
    "Whether a process runs; a zombie that nobody has buried does not."
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").is_dir() else os.kill(pid, 0) is None
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def started(tree) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    "Start the command in a process group of its own, as a shell does; what still runs at the end is killed."
    processes = []

    def start(*words: object) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([XSMOM, *map(str, words)], cwd=tree, env=environment(), start_new_session=True, **streams)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_a_run_in_order(started, tree, xsmom):
    process = started("run", "sleeper")
    note = wait_for(lambda: [path for path in (tree / "runs" / "sleeper").glob("*/pid") if path.read_text()])[0]
    kernel = int(note.read_text())
    assert lives(kernel)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert "interrupted by SIGINT" in error
    no_traceback(error)
    assert str(note.parent) in error
    assert manifest_of(note.parent)["status"] == "aborted"
    wait_for(lambda: not lives(kernel), seconds=10)
    assert xsmom("runs", "verify").returncode == 0


def test_ctrl_c_outside_a_run_is_a_short_line(quick, monkeypatch):
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xsmom_nb.market.store.find_data", pressed)
    answer = quick("data", "list")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (1, "", "interrupted\n")


def test_two_runs_at_the_same_time(started, tree, xsmom, tmp_path):
    "Each waits for the other to have started, so they overlap or fail."
    words = ["run", "pair", "-p", f"meeting={tmp_path}", "--json"]
    first = started(*words, "-p", "name=a", "-p", "other=b")
    second = started(*words, "-p", "name=b", "-p", "other=a")
    told = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told
    a, b = (json.loads(output) for output, _ in told)
    assert a["run_id"] != b["run_id"]
    before = {(manifest_of(Path(run["path"]))["previous"] or {}).get("run_id") for run in (a, b)}
    assert len(before) == 2
    assert xsmom("runs", "verify").returncode == 0


# ── A full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────
FULL = """
import os
_replace = os.replace
def replace(source, target, **keywords):
    if str(target).endswith(os.environ["DISK_IS_FULL_AT"]):
        raise OSError(28, "No space left on device")
    return _replace(source, target, **keywords)
os.replace = replace
"""


@pytest.fixture(scope="module")
def full_disk(xsmom, tmp_path_factory) -> Callable[..., Outcome]:
    "Call the command on a machine whose disk is full when a certain file is written, by whichever process."
    folder = tmp_path_factory.mktemp("full")
    (folder / "sitecustomize.py").write_text(FULL)
    return lambda name, *words: xsmom(*words, PYTHONPATH=str(folder), DISK_IS_FULL_AT=name)


def test_a_disk_that_is_full_for_a_result_fails_the_run(full_disk, xsmom, tree):
    before = run_folders(tree)
    answer = full_disk("outputs/result.json", "run", "keeper")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "outputs/result.json: cannot be written (No space left on device): the disk is full; free some space" in answer.stderr
    no_traceback(answer.stderr)
    (kept,) = run_folders(tree) - before
    assert manifest_of(kept)["status"] == "failed"
    assert [path for path in kept.rglob("*") if "result.json" in path.name] == []
    assert xsmom("runs", "verify").returncode == 0


def test_a_run_that_could_not_be_sealed_is_sealed_by_the_next(full_disk, xsmom, tree):
    before = run_folders(tree)
    answer = full_disk("manifest.json", "run", "keeper")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "could not be sealed" in answer.stderr
    assert "the disk is full" in answer.stderr
    no_traceback(answer.stderr)
    (left,) = run_folders(tree) - before
    assert not (left / "manifest.json").exists()
    assert xsmom("run", "keeper").returncode == 0
    assert manifest_of(left)["status"] == "aborted"
    assert xsmom("runs", "verify").returncode == 0
