"""The research pages, each from top to bottom on a small seeded market; and what is kept of them in the checkout."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from peers import imported

from xsmom_nb.backtest.window import holdout_start_ms
from xsmom_nb.config import load_config

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "research"
PAGES = sorted(FOLDER.glob("[!._]*.ipynb"))
BARS = {"01_vectorbt": 450}  # of the seeded market; the others take 3,000
NEEDS = {"01_vectorbt": "vectorbt", "02_factors": "alphalens"}


def cells(page: Path) -> list[dict]:
    "The code cells of a page."
    return [cell for cell in json.loads(page.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(page: Path, **parameters: object) -> tuple[dict, int]:
    "Execute a page with other parameters, as papermill would; its names, and how many figures it drew."
    namespace, figures = {"__name__": "__main__"}, 0
    for number, cell in enumerate(cells(page)):
        source = "".join(line for line in cell["source"] if not line.startswith("%"))  # magics belong to IPython
        exec(compile(source, f"{page.name}, code cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(parameters) <= set(namespace), f"{page.name} has no parameters {set(parameters) - set(namespace)}"
            namespace.update(parameters)
        figures += len(plt.get_fignums())
        plt.close("all")
    return namespace, figures


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_from_top_to_bottom(page, monkeypatch):
    if name := NEEDS.get(page.stem):
        imported(name)
    monkeypatch.chdir(page.parent)
    namespace, figures = run(page, synthetic_bars=BARS.get(page.stem, 3000))
    panel = namespace["panel"]
    assert panel.is_synthetic
    assert int(panel.open_time_ms[-1]) < holdout_start_ms(panel, namespace.get("config") or load_config())
    drawn = sum("plt.subplots" in "".join(cell["source"]) for cell in cells(page))
    assert figures == drawn >= 1


def test_an_empty_data_folder_means_the_seeded_market(tmp_path, monkeypatch):
    monkeypatch.setenv("XSMOM_DATA", str(tmp_path))
    monkeypatch.chdir(FOLDER)
    namespace, _ = run(FOLDER / "00_start.ipynb")
    assert namespace["panel"].is_synthetic


def test_a_look_is_written_down_when_asked(tmp_path, monkeypatch):
    from xsmom_nb.optimizer.looks import read_looks

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_bytes((FOLDER.parents[1] / "configs" / "config.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    run(FOLDER / "06_your_signal.ipynb", synthetic_bars=3000, record=True, versions_tried=7, signal_name="mine")
    looks = read_looks(tmp_path / "runs" / "looks.jsonl")
    assert [(look.study, look.trials, look.purpose) for look in looks] == [("mine", 7, "search")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_kept_of_a_page_is_whole(page):
    outputs = [output for cell in cells(page) for output in cell["outputs"]]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == sum("plt.subplots" in "".join(cell["source"]) for cell in cells(page)), "run `make notebooks`"
    for output in outputs:
        assert output["output_type"] != "error", output["ename"]
        assert output.get("name") != "stderr", "".join(output["text"])


def test_the_first_page_names_all_others():
    first = json.loads(PAGES[0].read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in first["cells"] if cell["cell_type"] == "markdown")
    assert sorted(set(re.findall(r"\((\d\d_\w+\.ipynb)\)", text))) == [page.name for page in PAGES[1:]]
    assert "TIME_" not in text
