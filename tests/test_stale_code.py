"""Compiled code never goes stale: a changed stage changes what calls it, in another file, whatever the file times say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "xsmom_nb"
SCRIPT = """
import numpy as np
from xsmom_nb.strategy.sizing import book_volatility
returns = np.random.default_rng(1).normal(size=(4, 60))
print(repr(float(book_volatility(np.arange(4), np.full(4, 0.25), returns, 59, np.zeros(40)))))
"""


def volatility_of_a_book(folder: Path) -> float:
    "Run the copy of the package in `folder`, with its cache beside it."
    own = {"PYTHONPATH": str(folder), "XSMOM_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_an_edited_stage_changes_what_calls_it_although_no_file_time_changed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "xsmom_nb", ignore=shutil.ignore_patterns("__pycache__"))
    before = volatility_of_a_book(tmp_path)
    assert volatility_of_a_book(tmp_path) == before
    caches = [folder for folder in (tmp_path / "cache").iterdir() if any(folder.rglob("*.nbi"))]
    assert len(caches) == 1, "the first run must leave compiled code behind"

    stage = tmp_path / "xsmom_nb" / "strategy" / "sums.py"
    source, times = stage.read_text(), stage.stat()
    edited = source.replace("aa + p * p", "aa + p * p * p * p")
    assert edited != source
    stage.write_text(edited)
    os.utime(stage, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stage.stat().st_mtime_ns == times.st_mtime_ns

    assert volatility_of_a_book(tmp_path) != before
    stage.write_text(source)
    os.utime(stage, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert volatility_of_a_book(tmp_path) == before
