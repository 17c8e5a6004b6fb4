"""Compiled code never goes stale: a changed stage changes what calls it, in another file, whatever the file times say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "xsmom_nb"
SCRIPT = """
from xsmom_nb.config import Config
from xsmom_nb.market.synthetic import synthetic_panel
from xsmom_nb.strategy.core import core_weights
print(repr(float(abs(core_weights(synthetic_panel(seed=1, bars=600, symbols=8), Config())).sum())))
"""


def gross_of_all_bars(folder: Path) -> float:
    "Run the copy of the package in `folder`, with its cache beside it."
    own = {"PYTHONPATH": str(folder), "XSMOM_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_an_edited_stage_changes_the_weights_although_no_file_time_changed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "xsmom_nb", ignore=shutil.ignore_patterns("__pycache__"))
    before = gross_of_all_bars(tmp_path)
    assert gross_of_all_bars(tmp_path) == before
    caches = [folder for folder in (tmp_path / "cache").iterdir() if any(folder.rglob("*.nbi"))]
    assert len(caches) == 1, "the first run must leave compiled code behind"

    stage = tmp_path / "xsmom_nb" / "strategy" / "momentum.py"
    source, times = stage.read_text(), stage.stat()
    edited = source.replace("np.abs(z) ** signal_power", "np.abs(z) ** 9.99999999999", 1)
    assert edited != source
    stage.write_text(edited)
    os.utime(stage, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stage.stat().st_mtime_ns == times.st_mtime_ns

    assert gross_of_all_bars(tmp_path) != before
    stage.write_text(source)
    os.utime(stage, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert gross_of_all_bars(tmp_path) == before
