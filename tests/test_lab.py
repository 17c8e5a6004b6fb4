"""Life in the laboratory: a changed stage changes the backtest, git shows and merges notebooks, JupyterLab draws."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE = "nbs/strategy/01_momentum.ipynb"
BACKTEST = """
import time
from xsmom_nb.backtest.vector import backtest
from xsmom_nb.config import Config, with_values
from xsmom_nb.market.synthetic import synthetic_panel
config = with_values(Config(), {"strategy.lookbacks": [12, 24], "strategy.lookback_weights": [1, 1], "backtest.risk": "core",
                                "strategy.rebalance_every_bars": 8, "filters.regime.enabled": False})
result = backtest(synthetic_panel(seed=4, bars=300, symbols=8, momentum=3.0), config)
print(result.weights.iloc[-1].round(6).to_list(), result.metrics["total_return"])
"""


def run(*command: object, cwd: Path, **variables: str) -> str:
    "What a command prints; its errors are shown when it fails."
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"} | variables
    done = subprocess.run([str(each) for each in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def tool(name: str) -> Path:
    "A command of this environment; skips where it is not installed."
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        pytest.skip(f"no command {name} found")
    return found


def need_command(name: str) -> str:
    "A command of the system; skips where there is none."
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no command {name} found")
    return found


@pytest.fixture
def checkout(tmp_path) -> Path:
    "A copy of what an export reads and writes, with this environment."
    for name in ("settings.ini", "pyproject.toml", "Makefile", ".gitattributes", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "xsmom_nb", tmp_path / "xsmom_nb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs" / "strategy", tmp_path / "nbs" / "strategy", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "nbs" / "_template.ipynb", tmp_path / "nbs")
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("*.lock"))
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    return tmp_path


def edit(notebook: Path, old: str, new: str) -> None:
    "Replace a line of source in a notebook, as a person does in JupyterLab."
    content = json.loads(notebook.read_text(encoding="utf-8"))
    hits = [(cell, row) for cell in content["cells"] for row, line in enumerate(cell["source"]) if line.rstrip("\n") == old]
    assert len(hits) == 1, f"{old!r} stands in {len(hits)} lines of {notebook.name}"
    (cell, row), = hits
    cell["source"][row] = cell["source"][row].replace(old, new)
    notebook.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ── The minute ───────────────────────────────────────────────────────────────────────────────────────────────────────
def backtest(checkout: Path) -> str:
    "A small backtest by the copy's own package."
    return run(sys.executable, "-W", "ignore", "-c", BACKTEST, cwd=checkout, PYTHONPATH=str(checkout), NUMBA_DISABLE_JIT="1")


def test_a_changed_signal_changes_the_backtest_within_a_minute(checkout):
    before = backtest(checkout)
    begin = time.monotonic()
    edit(checkout / STAGE, "        out[i] = close[t, i] * out[i] - 1.0", "        out[i] = 1.0 - close[t, i] * out[i]")
    run(tool("nbdev-export"), "--path", STAGE, cwd=checkout)
    after = backtest(checkout)
    assert time.monotonic() - begin < 60.0
    assert after != before
    weights = [json.loads(each[: each.index("]") + 1]) for each in (before, after)]
    assert sum(abs(each) for each in weights[0]) > 0.1
    assert sum(a * b for a, b in zip(*weights, strict=True)) < 0.0, "momentum turned round holds the other side"


def test_a_new_chapter_is_whole_from_the_start(checkout):
    said = run("make", "-o", "setup", "chapter", "NOTEBOOK=nbs/strategy/01a_high_distance.ipynb", cwd=checkout,
               PYTHONPATH=str(checkout))
    assert "xsmom_nb.strategy.high_distance" in said
    notebook = checkout / "nbs/strategy/01a_high_distance.ipynb"
    before = notebook.read_bytes()
    run(tool("nbdev-clean"), "--fname", notebook, cwd=checkout)
    assert notebook.read_bytes() == before, "the template is clean"
    run(tool("nbdev-export"), "--path", notebook.relative_to(checkout), cwd=checkout)
    module = (checkout / "xsmom_nb/strategy/high_distance.py").read_text()
    assert "from ..compiled import njit" in module
    assert "def change_row(" in module
    run(tool("nbdev-test"), notebook.relative_to(checkout), "--n-workers", 0, cwd=checkout, PYTHONPATH=str(checkout),
        NUMBA_DISABLE_JIT="1")


def test_the_template_is_no_chapter_itself():
    import house

    assert (ROOT / "nbs" / "_template.ipynb").is_file()
    assert ROOT / "nbs" / "_template.ipynb" not in house.notebooks(ROOT)


# ── Compiled code that is out of date ────────────────────────────────────────────────────────────────────────────────
SESSION = """
import pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("%load_ext xsmom_nb.ops.lab")
shell.run_cell("import numpy as np; from xsmom_nb.strategy.sums import total; print(total(np.ones(4)))")
stage = pathlib.Path("xsmom_nb/strategy/sums.py")
stage.write_text(stage.read_text() + "\\n# changed\\n")
shell.run_cell("print('next cell')")
shell.run_cell("print('the one after')")
"""


def test_a_notebook_says_that_its_compiled_code_is_out_of_date(checkout):
    said = run(sys.executable, "-W", "ignore", "-c", SESSION, cwd=checkout, PYTHONPATH=str(checkout),
               XSMOM_CACHE_DIR=str(checkout / "cache"), IPYTHONDIR=str(checkout / "ipython"))
    warned, after = said.index("OUT OF DATE: strategy/sums.py"), said.index("the one after")
    assert said.index("4.0") < warned < said.index("next cell") < after
    assert said.count("OUT OF DATE") == 1


# ── git ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_git_shows_and_merges_notebooks_cell_by_cell(checkout):
    git = need_command("git")
    user = ("-c", "user.name=A Quant", "-c", "user.email=quant@example.invalid", "-c", "commit.gpgsign=false")
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "PYTHONPATH": str(checkout)}

    def act(*arguments: str) -> str:
        return run(git, *user, *arguments, cwd=checkout, **alone)

    act("init", "-q", "-b", "main")
    run("make", "-o", "setup", "hooks", cwd=checkout, **alone)
    assert (checkout / ".git/hooks/pre-commit").is_file()
    act("add", ".gitattributes", "nbs")
    act("commit", "-q", "--no-verify", "-m", "before")

    act("checkout", "-q", "-b", "theirs")
    least = "MIN_DEVIATION = 1e-{}  # a row that spreads less has no winners"
    edit(checkout / STAGE, least.format(12), least.format(11))
    shown = act("diff")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "+MIN_DEVIATION = 1e-11" in plain, shown
    assert '"cell_type"' not in plain, "no JSON in a diff of notebooks"
    act("commit", "-q", "--no-verify", "-am", "theirs")

    act("checkout", "-q", "main")
    floor = "VOLATILITY_FLOOR = 1e-{}  # below it nothing moved; a division by it would be a division by rounding errors"
    edit(checkout / STAGE, floor.format(8), floor.format(7))
    act("commit", "-q", "--no-verify", "-am", "ours")
    act("merge", "-q", "--no-edit", "theirs")
    merged = (checkout / STAGE).read_text(encoding="utf-8")
    assert "VOLATILITY_FLOOR = 1e-7" in merged
    assert "MIN_DEVIATION = 1e-11" in merged
    assert "<<<<" not in merged


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────────────────────────────────
def free_port() -> int:
    "A port of this machine that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def laboratory(checkout):
    "JupyterLab as `make lab` starts it, on a copy, without a browser; its address."
    pytest.importorskip("jupyterlab", reason="no package jupyterlab found")
    need_command("chromium")
    start = json.loads((ROOT / "nbs" / "research" / "00_start.ipynb").read_text(encoding="utf-8"))
    for cell in start["cells"]:
        cell |= {"outputs": []} if cell["cell_type"] == "code" else {}
    (checkout / "nbs" / "research").mkdir()
    (checkout / "nbs" / "research" / "00_start.ipynb").write_text(json.dumps(start), encoding="utf-8")
    (checkout / "no-data").mkdir()
    overrides = json.loads((checkout / "configs/lab/overrides.json").read_text())
    overrides["@jupyterlab/notebook-extension:tracker"]["windowingMode"] = "none"  # cells out of sight stay in the page
    (checkout / "configs/lab/overrides.json").write_text(json.dumps(overrides))
    port, token = free_port(), "secret-of-a-test"
    options = (f"--no-browser --allow-root --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0 "
               f"--IdentityProvider.token={token}")
    folders = {f"JUPYTER_{name}_DIR": str(checkout / f"jupyter-{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {
        "PYTHONPATH": str(checkout), "XSMOM_DATA": str(checkout / "no-data"), "IPYTHONDIR": str(checkout / "ipython")}
    for name in ("IN_TEST", "MPLBACKEND"):  # the kernel shall draw into the page, as it does for a person
        environment.pop(name, None)
    log = (checkout / "lab.log").open("wb")
    server = subprocess.Popen(
        ["make", "-o", "setup", "lab", f"LAB={options}"], cwd=checkout, env=environment, stdout=log, stderr=log,
        start_new_session=True)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (checkout / "lab.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/research/00_start.ipynb?token={token}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
        log.close()


CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]


@pytest.mark.filterwarnings("default")
def test_a_research_page_runs_in_jupyterlab_and_shows_its_plot(laboratory, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="no package playwright found")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=need_command("chromium"), args=CHROMIUM)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(laboratory, wait_until="domcontentloaded")
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(state="attached", timeout=120_000)
            assert page.locator(".jp-Notebook .jp-OutputArea-output img").count() == 0
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
            page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
            page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
            picture = page.locator(".jp-Notebook .jp-OutputArea-output img").first
            picture.wait_for(state="attached", timeout=120_000)
            picture.scroll_into_view_if_needed()
            drawn = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
            errors = page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
            page.screenshot(path=os.environ.get("LAB_SCREENSHOT", str(tmp_path / "lab.png")))
        finally:
            browser.close()
    assert drawn[0] > 400
    assert drawn[1] > 200
    assert errors == []
