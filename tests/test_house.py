"""The rules of the house hold; and each rule is able to notice that it does not."""

import json
import subprocess
import sys
from pathlib import Path

import house
import pytest


def none(findings: list[str]) -> None:
    "Fail with every finding on a line of its own."
    assert not findings, "\n" + "\n".join(findings)


# ── They hold ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "rule",
    [house.twice_exported, house.bad_shape, house.upward_imports, house.disagreements, house.forbidden_words],
    ids=lambda rule: rule.__name__,
)
def test_rule_holds(rule, root):
    none(rule(root))


def test_imports_stand_alone(root):
    none(house.mixed_imports(house.notebooks(root)))


def test_no_private_key(root):
    none(house.private_keys(house.text_files(root)))


def test_export_gives_no_difference(root, tmp_path):
    none(house.stale_export(root, tmp_path))


def test_notebooks_are_clean(root, tmp_path):
    none(house.unclean_notebooks(root, tmp_path))


def test_readme_is_in_step(root):
    from xsmom_nb.ops.readme import difference

    none(difference(root))


# ── They can fail ────────────────────────────────────────────────────────────────────────────────────────────────────
SETTINGS = "[DEFAULT]\nlib_path = xsmom_nb\nnbs_path = nbs\nversion = 1.0.0\nmin_python = 3.11\n"
PYPROJECT = """[tool.nbdev]
lib_path = "xsmom_nb"
nbs_path = "nbs"
allowed_cell_metadata_keys = ["tags"]
[tool.mypy]
python_version = "3.11"
[tool.ruff]
target-version = "py311"
"""


def write_notebook(path: Path, *cells: str, **metadata: object) -> Path:
    "A notebook with these code cells, in the form that cleaning leaves."
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    blank = {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": []}
    code = [{**blank, "id": f"{number:08x}", "source": cell.splitlines(True)} for number, cell in enumerate(cells)]
    notebook = {"cells": code, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_house(tmp_path):
    "A house of two rooms in which every rule holds."
    top = tmp_path / "house"
    write_notebook(top / "nbs/00_errors.ipynb", "#| default_exp errors", "#| export\nLIMIT = 3", "assert LIMIT == 3")
    write_notebook(
        top / "nbs/market/00_panel.ipynb",
        "#| default_exp market.panel",
        "#| export\nfrom xsmom_nb.errors import LIMIT",
        "#| export\nWIDTH = 2 * LIMIT",
        "assert WIDTH == 6",
    )
    (top / "settings.ini").write_text(SETTINGS)
    (top / "pyproject.toml").write_text(PYPROJECT)
    (top / "xsmom_nb").mkdir()
    (top / "xsmom_nb/__init__.py").write_text('__version__ = "1.0.0"\n')
    house.tool("nbdev-export", cwd=top)
    return top


RULES = {
    "twice": lambda top, scratch: house.twice_exported(top),
    "shape": lambda top, scratch: house.bad_shape(top),
    "layers": lambda top, scratch: house.upward_imports(top),
    "settings": lambda top, scratch: house.disagreements(top),
    "words": lambda top, scratch: house.forbidden_words(top),
    "imports": lambda top, scratch: house.mixed_imports(house.notebooks(top)),
    "keys": lambda top, scratch: house.private_keys(house.text_files(top)),
    "export": house.stale_export,
    "clean": house.unclean_notebooks,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_good_house_has_no_findings(small_house, tmp_path, rule):
    (tmp_path / "scratch").mkdir()
    assert RULES[rule](small_house, tmp_path / "scratch") == []


def second_claim(top):
    write_notebook(top / "nbs/01_more.ipynb", "#| default_exp errors")


def long_cell(top):
    write_notebook(top / "nbs/00_errors.ipynb", "#| default_exp errors", "#| export\n" + "LIMIT = 3\n" * 61, "assert LIMIT == 3")
    house.tool("nbdev-export", cwd=top)


def no_assertion(top):
    write_notebook(top / "nbs/00_errors.ipynb", "#| default_exp errors", "#| export\nLIMIT = 3")
    house.tool("nbdev-export", cwd=top)


def import_upwards(top):
    write_notebook(
        top / "nbs/00_errors.ipynb",
        "#| default_exp errors",
        "#| export\ndef limit():\n    from xsmom_nb.market import panel\n    return panel.WIDTH\nLIMIT = 3",
        "assert LIMIT == 3",
    )
    house.tool("nbdev-export", cwd=top)


def import_of_a_later_notebook(top):
    write_notebook(top / "nbs/market/01_store.ipynb", "#| default_exp market.store", "#| export\nROWS = 1", "assert ROWS == 1")
    late = "#| export\nimport xsmom_nb.market.store"
    write_notebook(top / "nbs/market/00_panel.ipynb", "#| default_exp market.panel", late, "assert xsmom_nb")
    house.tool("nbdev-export", cwd=top)


def room_without_layer(top):
    write_notebook(top / "nbs/00_utils.ipynb", "#| default_exp utils", "#| export\nX = 1", "assert X == 1")
    house.tool("nbdev-export", cwd=top)


def other_version(top):
    (top / "settings.ini").write_text(SETTINGS.replace("1.0.0", "1.0.1"))


def other_folder(top):
    (top / "settings.ini").write_text(SETTINGS.replace("lib_path = xsmom_nb", "lib_path = elsewhere"))


def machine_path(top):
    (top / "notes.md").write_text("see " + "/home" + "/someone/data\n")


def registry_host(top):
    (top / "requirements.txt").write_text("--index-url " + house.HOSTS[0] + "\n")


def mixed_cell(top):
    write_notebook(top / "nbs/index.ipynb", "import os\nprint(os.name)")


def private_key(top):
    (top / "tests").mkdir()
    (top / "tests/key.txt").write_text("-----BEGIN " + "RSA PRIVATE KEY-----\n")


def edited_package(top):
    (top / "xsmom_nb/errors.py").write_text((top / "xsmom_nb/errors.py").read_text().replace("LIMIT = 3", "LIMIT = 4"))


def orphaned_module(top):
    (top / "xsmom_nb/market/old.py").write_text("X = 1\n")


def executed_notebook(top):
    write_notebook(top / "nbs/index.ipynb", "1 + 1", collapsed=True)


@pytest.mark.parametrize(
    ("damage", "rule", "named"),
    [
        (second_claim, "twice", "nbs/01_more.ipynb"),
        (long_cell, "shape", "exports 61 lines"),
        (no_assertion, "shape", "asserts nothing"),
        (import_upwards, "layers", "xsmom_nb/errors.py:8 imports market.panel of layer 1, itself of layer 0"),
        (import_of_a_later_notebook, "layers", "imports market.store"),
        (room_without_layer, "layers", "utils: not in LAYERS"),
        (other_version, "settings", "version: settings.ini says 1.0.1"),
        (other_folder, "settings", "lib_path"),
        (machine_path, "words", "notes.md:1 names a path of one machine"),
        (registry_host, "words", "requirements.txt:1 names a package registry's host"),
        (mixed_cell, "imports", "cell 1 mixes imports"),
        (private_key, "keys", "tests/key.txt"),
        (edited_package, "export", "xsmom_nb/errors.py: differs in line"),
        (orphaned_module, "export", "its notebook is gone"),
        (executed_notebook, "clean", "nbs/index.ipynb: differs in line"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_found(small_house, tmp_path, damage, rule, named):
    damage(small_house)
    (tmp_path / "scratch").mkdir()
    assert named in " ".join(RULES[rule](small_house, tmp_path / "scratch"))


def test_relative_imports_are_resolved():
    modules = {"errors", "market.panel", "market.store", "strategy.core"}
    source = "from ..errors import X\nfrom . import store\nfrom .store import y\nimport re\nfrom xsmom_nb.strategy import core\n"
    found = list(house.imported_modules(source, "market.panel", modules))
    assert found == [(1, "errors"), (2, "market.store"), (3, "market.store"), (5, "strategy.core")]


# ── Skipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("test", "status"),
    [
        ("def test_a(): pytest.skip('no market data found')", 0),
        ("def test_a(): pytest.skip('no command git found')", 0),
        ("def test_a(): pytest.skip('too slow')", 1),
        ("pytest.skip('later', allow_module_level=True)", 1),
        ("@pytest.mark.skip(reason='broken')\ndef test_a(): pass", 1),
        ("@pytest.mark.xfail(reason='known')\ndef test_a(): assert False", 1),
    ],
)
def test_only_absence_excuses_a_skip(root, tmp_path, test, status):
    (tmp_path / "conftest.py").write_text((root / "tests/conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{test}\ndef test_b(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert ("SKIPPED WITHOUT EXCUSE" in done.stdout) == bool(status)
