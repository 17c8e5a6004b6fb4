"""A run is evidence: it is kept whatever happens to it, and no byte of it changes unnoticed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from xsmom_nb import files
from xsmom_nb.config import load_config, with_values
from xsmom_nb.errors import ConfigError, RunError, StateError, UsageError, XsmomError
from xsmom_nb.outbox import undelivered
from xsmom_nb.runs.browse import find_run, list_runs
from xsmom_nb.runs.chain import load_sign_key, parse_entry, public_key, read_chain, seal, settle
from xsmom_nb.runs.execute import RunFailed, execute_run
from xsmom_nb.runs.record import begin_run, open_run, read_manifest
from xsmom_nb.runs.verify import verify
from xsmom_nb.state import open_state

CANARY = "canary-9f2c/51<be>7a"
PARAMETERS = "run_dir: str = ''\nseconds: float = 0.0  # how long it sleeps\nname: str = 'note'"
WORKING = """
import os, time
import pandas as pd
from xsmom_nb.runs.record import open_run
run = open_run(run_dir)
run.write_json("kernel", {"pid": os.getpid()})
time.sleep(seconds)
run.write_metrics({"sharpe": 1.25})
days = pd.date_range("2024", periods=2, tz="UTC", name="timestamp")
run.write_frame("equity", pd.DataFrame({"equity": [1.0, 2.0]}, index=days))
run.record_inputs(origin="synthetic")
pd.DataFrame({"a": [1]})
"""
WHO = """
import os, sys
import xsmom_nb
from xsmom_nb.runs.record import open_run
open_run(run_dir).write_json("who", [sys.executable, os.getcwd(), xsmom_nb.__file__, "seconds" in dir()])
"""
CARELESS = """
import os
import pandas as pd
from xsmom_nb.runs.record import open_run
run = open_run(run_dir)
secret = os.environ["BYBIT_API_SECRET"]
print(secret)
run.logger.info("key", value=secret)
run.write_json("note", [secret])
run.write_frame("trades", pd.DataFrame({"note": [secret] * 1000}))
raise ValueError("cannot use " + secret)
"""
KILLS = """
import os, sys
from pathlib import Path
from xsmom_nb.config import load_config
from xsmom_nb.runs import chain
from xsmom_nb.runs.execute import Ending, RunFailed, keep_run
from xsmom_nb.runs.record import OpenRun
from xsmom_nb.state import State

PLACES = [(owner, name, when) for owner, name in [(chain, "write_atomically"), (chain, "append_line"), (State, "set_chain_head"),
          (OpenRun, "release")] for when in ("before", "after")]

def dying(step, when):
    def died(*arguments, **keywords):
        if when == "after":
            step(*arguments, **keywords)
        os._exit(137)
    return died

for owner, name, when in PLACES:
    if (child := os.fork()) == 0:
        setattr(owner, name, dying(getattr(owner, name), when))
        keep_run("nightly", {}, load_config("defaults"), lambda folder: Ending("failed", "cell 2: no bars", 1),
                 project=Path(sys.argv[1]), secrets={})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137, (name, when)
    try:
        keep_run("backtest", {}, load_config("defaults"), lambda folder: Ending("done"), project=Path(sys.argv[1]), secrets={})
    except RunFailed as error:
        sys.exit(str(error))
print(len(PLACES))
"""
START = """
import json, sys
from pathlib import Path
from xsmom_nb.config import load_config
from xsmom_nb.runs.execute import RunFailed, execute_run
try:
    run = execute_run(sys.argv[2], json.loads(sys.argv[3]), load_config("defaults"), project=Path(sys.argv[1]), progress=False)
except RunFailed as error:
    sys.exit(f"{error.run.manifest.status}: {error}")
print(run.run_id)
"""


def add_notebook(project: Path, name: str, *sources: str) -> None:
    "A scheduled notebook of these cells, the first of which holds its parameters."
    code = {"cell_type": "code", "metadata": {"tags": []}, "outputs": [], "execution_count": None}
    cells = [{**code, "id": f"c{number}", "source": source} for number, source in enumerate(sources)]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    folder = project / "scheduled"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def config():
    return load_config("defaults")


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with one notebook that works, in a home that was never used."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # a process that is killed leaves its kernel's folder there
    (tmp_path / "tmp").mkdir()
    add_notebook(tmp_path / "project", "work", PARAMETERS, WORKING)
    return tmp_path / "project"


@pytest.fixture
def state(project):
    with open_state("sqlite:///state/xsmom.sqlite", base=project) as opened:
        yield opened


@pytest.fixture
def quick_run(project, state, config):
    "Make a sealed run without a kernel."

    def make(**keywords):
        run = begin_run(project / "runs", "quick", {}, config)
        try:
            run.folder.write_metrics({"sharpe": 1.0})
            return seal(run, "done", state=state, **keywords)
        finally:
            run.release()

    return make


def start(project: Path, name: str = "work", **parameters: object) -> subprocess.Popen:
    "Start a run in a process of its own."
    command = [sys.executable, "-c", START, str(project), name, json.dumps(parameters)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 30.0):
    "Wait until a condition holds and return its value."
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def kernel_of(project: Path) -> int:
    "Process id of the kernel of the run in progress, once its first cell runs."
    found = wait_for(lambda: list(project.glob("runs/work/*/outputs/kernel.json")))
    return json.loads(found[0].read_text())["pid"]


def is_gone(pid: int) -> bool:
    "Whether a process has ended (a zombie has)."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def problems(project: Path, state) -> list[str]:
    return [str(problem) for problem in verify(project / "runs", state).problems]


# ── Whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_flipped_byte_in_any_kept_file_is_found_and_named(project, state, config):
    execute_run("work", {}, config, project=project, state=state, progress=False)
    root = project / "runs"
    kept = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "chain.jsonl.lock")
    names = {path.name for path in kept}
    assert {"notebook.ipynb", "notebook.html", "config.yaml", "events.jsonl", "manifest.json", "chain.jsonl"} < names
    assert {"data.json", "equity.parquet", "metrics.json"} < names
    for path in kept:
        original = path.read_bytes()
        for position in {0, len(original) // 3, len(original) - 1}:
            path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            found = verify(root, state)
            assert not found.ok
            place = path.relative_to(root).as_posix()
            assert any(problem.place.startswith(place) for problem in found.problems), (place, position)
            assert (found.first_broken_link is not None) == (path.name == "chain.jsonl")
        path.write_bytes(original)
    assert verify(root, state).ok


def test_the_page_fetches_nothing(project, state, config):
    add_notebook(
        project, "tempting", "run_dir: str = ''", "import matplotlib.pyplot as plt; plt.plot([1, 2]);",
        "from IPython.display import HTML, Markdown, Javascript\n"
        "HTML('<script src=\"https://cdn.example/plot.js\"></script><link href=\"http://x.example/a.css\" rel=\"stylesheet\">"
        "<style>@import url(https://x.example/b.css); p {background: url(//x.example/c.png)}</style><b>shown</b>')",
        "Markdown('![far](https://x.example/far.png) [link](https://x.example)')",
        "Javascript('import(\"https://x.example/m.js\")')",
    )  # fmt: skip
    page = execute_run("tempting", {}, config, project=project, state=state, progress=False).page.read_text()

    class Reader(HTMLParser):
        loads: list[str] = []  # noqa: RUF012 - one reader, one page
        styles = scripts = element = ""

        def handle_starttag(self, tag, attributes):
            self.element = tag
            for name, value in attributes:
                if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                    self.loads.append(value)

        def handle_data(self, text):
            self.styles += text if self.element == "style" else ""
            self.scripts += text if self.element == "script" else ""

    reader = Reader()
    reader.feed(page)
    assert any(load.startswith("data:image/png") for load in reader.loads), "the plot is in the page"
    assert not [load for load in reader.loads if not load.startswith(("data:", "#"))]
    assert not re.findall(r"@import|url\(['\"]?(?!data:|#)[^)]*\)", reader.styles)
    assert "://" not in reader.scripts
    assert "<b>shown</b>" in page
    assert 'href="https://x.example"' in page, "a link stays a link"
    assert "cdnjs" not in page
    assert page.index("default-src 'none'") < page.index("<style")


def test_a_notebook_that_fails_is_kept_up_to_the_failing_cell(project, state, config):
    add_notebook(project, "half", PARAMETERS, "print('be' + 'fore')", "raise KeyError('no such symbol')", "print('af' + 'ter')")
    with pytest.raises(RunFailed, match=r"half failed: cell 4: KeyError: 'no such symbol'; .*notebook\.html") as failed:
        execute_run("half", {}, config, project=project, state=state, progress=False)
    run = failed.value.run
    assert (run.manifest.status, failed.value.exit_status) == ("failed", 1)
    assert "KeyError" in run.page.read_text()
    assert "before" in run.page.read_text()
    assert "after" not in (run.folder / "notebook.ipynb").read_text()
    assert not problems(project, state)


def test_what_is_refused_leaves_no_trace(project, config):
    for name, parameters, message in (
        ("wrok", {}, "did you mean 'work'"),
        ("work", {"second": 1.0}, "has no parameter 'second'; did you mean 'seconds'"),
        ("work", {"seconds": "1"}, "seconds='1'"),
        ("work", {"run_dir": "elsewhere"}, "set by the runner"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            execute_run(name, parameters, config, project=project)
        assert refused.value.exit_status == 2
    with pytest.raises(ConfigError, match="sign_key"):
        execute_run("work", {}, with_values(config, {"runs.sign_key": "no.pem"}), project=project)
    assert not (project / "runs").exists()


def test_the_kernel_is_this_interpreter_and_nobody_elses(project, state, config, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "trap", "language": "python"}))
    startup = tmp_path / "home/.ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("seconds = 'changed by the user'")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    add_notebook(project, "who", "run_dir: str = ''", WHO)
    run = execute_run("who", {}, config, project=project, state=state, progress=False)
    package = str(Path(files.__file__).with_name("__init__.py"))
    assert json.loads((run.folder / "outputs/who.json").read_text()) == [sys.executable, str(project), package, False]
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path != startup / "00.py"]
    assert not [path for path in left if ".ipython" in path.parts or "jupyter" in path.parts]


def test_a_run_that_takes_too_long_or_kills_its_kernel_has_failed(project, state, config):
    short = with_values(config, {"runs.time_limit_seconds": 4})
    with pytest.raises(RunFailed, match=r"TimeLimit: .*runs\.time_limit_seconds") as failed:
        execute_run("work", {"seconds": 60.0}, short, project=project, state=state, progress=False)
    assert "TimeLimit" in failed.value.run.page.read_text()
    assert is_gone(json.loads((failed.value.run.folder / "outputs/kernel.json").read_text())["pid"])
    add_notebook(project, "crash", PARAMETERS, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunFailed, match=r"KernelDied: .*memory") as failed:
        execute_run("crash", {}, config, project=project, state=state, progress=False)
    assert failed.value.run.manifest.status == "failed"
    assert not problems(project, state)


# ── Interrupted, killed, at the same time ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_sealed_as_aborted(project, state, number):
    process = start(project, seconds=60.0)
    kernel = kernel_of(project)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.fullmatch(rf"aborted: work was stopped: the run was interrupted by {number.name}; .*notebook\.html\n", said)
    wait_for(lambda: is_gone(kernel), 5)
    assert [line.status for line in list_runs(project / "runs")] == ["aborted"]
    assert not problems(project, state)


def test_a_failed_run_is_told_of_once_wherever_its_process_is_killed(project, state):
    done = subprocess.run([sys.executable, "-c", KILLS, str(project)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    nightly = [line.run_id for line in list_runs(project / "runs") if line.kind == "nightly"]
    assert len(nightly) == int(done.stdout) == 8
    with state.read() as connection:
        told = [(event.kind, event.data["run_id"]) for event in undelivered(connection)]
    assert sorted(told) == sorted(("run_failed", run_id) for run_id in nightly)
    assert not problems(project, state)


def test_a_store_that_is_new_has_no_news_of_old_runs(project, state, config):
    for number in range(3):
        run = begin_run(project / "runs", "quick", {}, config)
        seal(run, "failed", f"reason {number}", state=state)
    with open_state("sqlite:///state/new.sqlite", base=project) as new:
        settle(project / "runs", state=new)
        with new.read() as connection:
            assert [event.text.rsplit(" ", 1)[1] for event in undelivered(connection)] == ["2"]


def test_a_killed_run_is_sealed_at_the_next_start(project, state, config):
    process = start(project, seconds=60.0)
    kernel = kernel_of(project)
    assert [line.status for line in list_runs(project / "runs")] == ["running"]
    assert settle(project / "runs", state=state) == []
    process.kill()
    process.communicate()
    wait_for(lambda: is_gone(kernel), 10)  # the kernel notices that its parent is gone
    assert [line.status for line in list_runs(project / "runs")] == ["killed"]
    assert not problems(project, state)

    execute_run("work", {}, config, project=project, state=state, progress=False)
    killed, done = list_runs(project / "runs")
    assert (killed.status, done.status) == ("aborted", "done")
    manifest = read_manifest(Path(killed.path))
    assert manifest.parameters["seconds"] == 60.0
    assert manifest.notebook_digest == read_manifest(Path(done.path)).notebook_digest
    assert f"process {process.pid} on " in manifest.error
    assert {"notebook.ipynb", "notebook.html", "outputs/kernel.json"} < set(manifest.files)
    assert manifest.ended_at < read_manifest(Path(done.path)).started_at
    assert not problems(project, state)
    with pytest.raises(RunError, match="is sealed"):
        open_run(killed.path).write_json("late", 1)


def test_two_runs_at_the_same_time(project, state):
    both = [start(project, seconds=1.0) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    entries = [parse_entry(line) for line in read_chain(project / "runs")[0]]
    assert {entry.run_id for entry in entries} == {out.strip() for out, _ in said}
    assert read_manifest(find_run(project / "runs", entries[1].run_id)).previous.run_id == entries[0].run_id
    assert not problems(project, state)


# ── Taking away ──────────────────────────────────────────────────────────────────────────────────────────────────────
def cut_chain(root: Path) -> None:
    lines = (root / "chain.jsonl").read_bytes().splitlines(keepends=True)
    (root / "chain.jsonl").write_bytes(b"".join(lines[:-1]))


def test_deleting_the_newest_run_is_noticed(project, state, quick_run):
    root = project / "runs"
    _, newest = quick_run(), quick_run()
    shutil.rmtree(root / "quick" / newest.run_id)
    assert [f"quick/{newest.run_id}: the run is missing" in problem for problem in problems(project, state)] == [True]
    cut_chain(root)
    found = verify(root, state)
    assert found.first_broken_link.startswith("chain.jsonl after line 1: the chain ended with line 2 and run " + newest.run_id)

    quick_run()  # the next one does not heal it
    quick_run()
    found = verify(root, state)
    assert found.first_broken_link == "chain.jsonl line 2: does not follow the line before it: 1 line(s) before it are missing"


def test_deleting_the_state_as_well_is_noticed(project, state, quick_run):
    quick_run()
    with open_state("sqlite:///state/new.sqlite", base=project) as empty:
        assert "remembers no run of this folder" in problems(project, empty)[0]


def test_runs_of_two_folders_do_not_mix(project, state, quick_run, config):
    quick_run()
    other = begin_run(project / "other", "quick", {}, config)
    assert seal(other, "done", state=state).previous is None
    assert verify(project / "other", state).ok
    assert verify(project / "runs", state).ok


def test_the_project_can_be_moved(project, state, quick_run):
    quick_run()
    state.close()
    moved = project.with_name("moved")
    shutil.copytree(project, moved)
    with open_state("sqlite:///state/xsmom.sqlite", base=moved) as there:
        assert verify(moved / "runs", there).ok


def test_signatures(project, state, quick_run, tmp_path):
    keys = []
    for name in ("a.pem", "b.pem"):
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / name).write_bytes(pem)
        (tmp_path / name).chmod(0o600)
        keys.append(load_sign_key(tmp_path / name))
    manifest = quick_run(sign_key=keys[0])
    root = project / "runs"
    assert verify(root, state, trusted_key=public_key(keys[0])).ok
    assert "signed with another key" in str(verify(root, state, trusted_key=public_key(keys[1])).problems[0])
    path = root / "quick" / manifest.run_id / "manifest.json"
    content = json.loads(path.read_bytes())
    for forged in (None, keys[1].sign(content["digest"].encode()).hex()):
        path.write_bytes(files.canonical_json({**content, "signature": forged}) + b"\n")
        assert [problem.message for problem in verify(root, state).problems] == ["its signature does not hold"]


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_secret_fails_the_run_and_is_in_no_file(project, state, config, monkeypatch, capfd):
    monkeypatch.setenv("BYBIT_API_SECRET", CANARY)
    add_notebook(project, "careless", PARAMETERS, CARELESS)
    with pytest.raises(RunFailed) as failed:
        execute_run("careless", {}, config, project=project, state=state)
    run = failed.value.run
    assert run.manifest.status == "failed"
    for name in ("notebook.ipynb", "notebook.html", "events.jsonl", "outputs/note.json", "outputs/trades.parquet"):
        assert f"{name} contained the value of BYBIT_API_SECRET" in str(failed.value)
    told = str(failed.value) + "".join(capfd.readouterr()) + (project / "runs/chain.jsonl").read_text()
    kept = b"\n".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    for spelling in (CANARY, json.dumps(CANARY)[1:-1], CANARY.replace("<", "&lt;").replace(">", "&gt;")):
        assert spelling not in told
        assert spelling.encode() not in kept
    assert not (run.folder / "outputs/trades.parquet").exists()
    assert not problems(project, state)

    with pytest.raises(RunError, match="parameter name: contains the value of BYBIT_API_SECRET"):
        execute_run("work", {"name": CANARY}, config, project=project, state=state)
    assert not (project / "runs/work").exists()


# ── Disk and database ────────────────────────────────────────────────────────────────────────────────────────────────
class FullDisk:
    "Refuses every flush after the first so many, as a disk does that has no room left."

    def __init__(self, monkeypatch, works: int) -> None:
        self.left, self.flush = works, os.fsync
        monkeypatch.setattr(files.os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.flush(descriptor)


def test_a_full_disk_at_any_moment_leaves_nothing_half_written(project, state, quick_run):
    root, survived = project / "runs", 0
    while True:
        with pytest.MonkeyPatch.context() as patched:
            disk = FullDisk(patched, works=survived)
            try:
                quick_run()
            except XsmomError as error:
                assert "the disk is full" in str(error)  # noqa: PT017 - which moment fails is found by trying
        for path in root.rglob("*.json"):
            json.loads(path.read_bytes())
        assert not list(root.rglob("*.tmp"))
        if disk.left >= 0:
            break
        survived += 1
    assert survived >= 10, "every flush of a run was tried"
    settle(root, state=state)
    assert not problems(project, state)
    statuses = [line.status for line in list_runs(root)]
    assert set(statuses) == {"aborted", "done"}, "a run that could not begin left nothing"


def test_a_disk_that_fills_up_while_the_notebook_runs(project, state, config, monkeypatch):
    with monkeypatch.context() as patched:
        FullDisk(patched, works=12)
        with pytest.raises(RunError, match="the disk is full"):
            execute_run("work", {}, config, project=project, state=state, progress=False)
    for path in project.glob("runs/work/*/notebook.ipynb"):
        json.loads(path.read_bytes())
    again = execute_run("work", {}, config, project=project, state=state, progress=False)
    assert {line.run_id: line.status for line in list_runs(project / "runs")}[again.run_id] == "done"
    assert not problems(project, state)


def test_a_damaged_state_is_refused_before_the_run_starts(project, config):
    (project / "state").mkdir()
    (project / "state/xsmom.sqlite").write_bytes(b"not a database " * 1000)
    with pytest.raises(StateError, match=r"state/xsmom\.sqlite is damaged .*restore the newest backup"):
        execute_run("work", {}, config, project=project)
    assert not (project / "runs").exists()
