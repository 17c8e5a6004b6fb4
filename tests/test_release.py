"""From a commit to what services run: a release of this very tree is built, installed, taken into use, and taken back.

Its packages are lent by the environment of the tests, so that nothing is downloaded; everything else is as it will be. How
packages get into it, checked by their hashes, is tried with a release that needs two tiny ones.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xsmom_nb.cli import app
from xsmom_nb.compiled import notebooks_digest, source_digest
from xsmom_nb.errors import IntegrityError, RefusedError, RunError
from xsmom_nb.files import sha256_file
from xsmom_nb.lease import hold_lease
from xsmom_nb.ops import releases
from xsmom_nb.ops.release import Release, build_release, check_release, stale_modules
from xsmom_nb.ops.releases import current_name, install_release, installed_releases, prepare_home, switch_release
from xsmom_nb.outbox import undelivered
from xsmom_nb.state import open_state

FOLDERS = ("nbs", "scheduled", "configs", "xsmom_nb")
FILES = ("settings.ini", "setup.py", "pyproject.toml", "requirements.lock", "README.md")
IDENTITY = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "core.hooksPath=/dev/null")


def git(project: Path, *words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", project, *IDENTITY, *words], check=True, capture_output=True, env=environment)


def committed(project: Path) -> Path:
    "The same folder with everything in it committed."
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "all")
    return project


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> tuple[Release, Path, Path]:
    "A release of this tree as it is now, its folder, and the checkout it was built from."
    if shutil.which("git") is None:
        pytest.skip("no command git found")
    project = tmp_path_factory.mktemp("release") / "checkout"
    for name in FOLDERS:
        shutil.copytree(root / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in FILES:
        shutil.copy(root / name, project)
    return *build_release(committed(project), project.parent / "dist", stale=lambda tree: []), project


@pytest.fixture(scope="module")
def place(built) -> tuple[Path, Path]:
    "Prefix and home of an installation."
    release, folder, project = built
    prefix, home = project.parent / "opt", project.parent / "home"
    target = install_release(folder, prefix, packages_of=Path(sys.prefix))
    prepare_home(home, prefix, target)
    switch_release(release.name, prefix, None)
    return prefix, home


def test_what_is_built_is_this_tree(built, root):
    release, folder, _ = built
    assert check_release(folder) == release
    assert release.code_digest == source_digest(root / "xsmom_nb")
    assert release.notebooks_digest == notebooks_digest(root)
    assert (folder / release.wheel).is_file()


def test_all_of_it_is_compiled(built, place):
    "Services run as somebody who may not write there."
    (package,) = (place[0] / "releases" / built[0].name).glob("lib/python*/site-packages/xsmom_nb")
    sources = {path.relative_to(package) for path in package.rglob("*.py")}
    compiled = {path.parent.parent.relative_to(package) / f"{path.name.split('.')[0]}.py" for path in package.rglob("*.pyc")}
    assert sources == compiled


def test_it_works_at_home_without_the_checkout(built, place):
    release, (prefix, home) = built[0], place
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("XSMOM_", "PYTHONPATH"))}
    ours |= {name: value for name, value in os.environ.items() if name == "XSMOM_CACHE_DIR"}
    call = [prefix / "current" / "bin" / "xsmom"]
    said = json.loads(subprocess.run([*call, "version", "--json"], cwd=home, env=ours, capture_output=True, check=True).stdout)
    assert said["code_digest"] == release.code_digest
    assert Path(said["installed_in"]) == prefix / "releases" / release.name  # not `current`: a switch changes nothing that runs
    listed = subprocess.run([*call, "schedule", "list", "--json"], cwd=home, env=ours, capture_output=True, text=True)
    rows = {row["name"]: row for row in json.loads(listed.stdout)["entries"]}
    assert rows["live"]["next"]
    assert rows["parity_ledger"]["problem"] is None  # its notebook came along
    script = ("import json; from pathlib import Path; from xsmom_nb.config import Config; "
              "from xsmom_nb.runs.provenance import collect_provenance as collect; "
              "print(collect(Path.cwd(), Path('scheduled/live_cycle.ipynb'), Config()).model_dump_json())")
    python = prefix / "current" / "bin" / "python"
    known = json.loads(subprocess.run([python, "-c", script], cwd=home, env=ours, capture_output=True, check=True).stdout)
    assert known["git"] == {"commit": release.commit, "dirty": False, "patch": None, "patch_note": None}
    assert (known["code_digest"], known["lock_digest"]) == (release.code_digest, release.lock_digest)
    assert notebooks_digest(home) == release.notebooks_digest


def test_forth_and_back(built, place):
    release, (prefix, home) = built[0], place
    options = ["--prefix", str(prefix), "--home", str(home)]
    other = prefix / "releases" / "0.0.9-00000000"
    other.mkdir()
    described = json.loads((prefix / "releases" / release.name / "release.json").read_text())
    (other / "release.json").write_text(json.dumps({**described, "name": other.name}))
    with open_state("sqlite:///state/xsmom.sqlite", base=home) as state:
        with hold_lease(state, "trader", "code", "notebooks"):
            refused = CliRunner().invoke(app, ["release", "switch", other.name, *options])
            assert refused.exit_code == 3
            assert "while somebody works: another trader works" in refused.stderr
        assert current_name(prefix) == release.name
        assert CliRunner().invoke(app, ["release", "switch", other.name, *options]).exit_code == 0
        assert current_name(prefix) == other.name
        assert CliRunner().invoke(app, ["release", "switch", "--back", *options]).exit_code == 0
        assert [each.name for each in installed_releases(prefix) if each.is_current] == [release.name]
        with state.read() as connection:
            told = [event.data for event in undelivered(connection) if event.kind == "release_switched"]
    assert [(each["from"], each["to"]) for each in told] == [(release.name, other.name), (other.name, release.name)]
    lines = [json.loads(line) for line in (prefix / "releases.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["switching", "switched"] * 3
    assert all("@" in line["who"] for line in lines)


def test_a_tree_that_is_not_fit_is_refused(built):
    release, folder, project = built
    (project / "new.py").write_text("1\n")
    with pytest.raises(RefusedError, match=r"not everything is committed: new\.py"):
        build_release(project, project.parent / "dist", stale=lambda tree: [])
    (project / "new.py").unlink()
    wheel = folder / release.wheel
    content = wheel.read_bytes()
    try:
        wheel.write_bytes(content + b"!")
        with pytest.raises(IntegrityError, match="was changed since the release was built"):
            install_release(folder, project.parent / "elsewhere", packages_of=Path(sys.prefix))
    finally:
        wheel.write_bytes(content)


def test_a_notebook_that_was_not_exported_is_noticed(root, tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    for folder, names in (("nbs", ["00_errors.ipynb"]), ("xsmom_nb", ["__init__.py", "errors.py"])):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(root / folder / name, tmp_path / folder)
    (tmp_path / "xsmom_nb" / "gone.py").write_text("left = 1\n")
    notebook = tmp_path / "nbs" / "00_errors.ipynb"
    notebook.write_text(notebook.read_text().replace("A safety rule forbids", "A rule forbids"))
    assert [name for name in stale_modules(tmp_path) if name != "_modidx.py"] == ["errors.py", "gone.py"]


# ── Packages from a folder, without a network ────────────────────────────────────────────────────────────────────────
def tiny_wheel(folder: Path, name: str, content: str = "") -> Path:
    "A package of one module, as pip wants it."
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{name}.py", f"value = {content!r}\n")
        packed.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        packed.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{name}-1.0.dist-info/RECORD", f"{name}.py,,\n{name}-1.0.dist-info/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Release, Path, Path]:
    "A release that needs two tiny packages, its folder, and the folder that has them."
    if shutil.which("git") is None:
        pytest.skip("no command git found")
    place = tmp_path_factory.mktemp("tiny")
    wheels = [tiny_wheel(place / "wheels", name) for name in ("tiny_first", "tiny_second")]
    lock = "".join(f"{path.name.split('-')[0]}==1.0 \\\n    --hash=sha256:{sha256_file(path)}\n" for path in wheels)
    setup = "from setuptools import setup\nsetup(name='xsmom_nb', version='1.2.0', packages=['xsmom_nb'])\n"
    digest = "import functools, hashlib\nfrom pathlib import Path\nPACKAGE = Path(__file__).parent\n\n"
    digest += inspect.getsource(source_digest)
    for name, text in {"settings.ini": "[DEFAULT]\nversion = 1.2.0\n", "setup.py": setup, "requirements.lock": lock,
                       "configs/config.yaml": "{}\n", "nbs/00.ipynb": "{}", "scheduled/live_cycle.ipynb": "{}",
                       "xsmom_nb/__init__.py": "", "xsmom_nb/compiled.py": digest}.items():
        path = place / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return *build_release(committed(place / "checkout"), place / "dist", stale=lambda tree: []), place / "wheels"


def test_the_locked_packages_come_from_a_folder_and_nothing_else_comes(tiny, tmp_path):
    release, folder, wheels = tiny
    target = install_release(folder, tmp_path / "opt", wheels=wheels)
    site = next(target.glob("lib/python*/site-packages"))
    assert {path.name for path in site.glob("*.dist-info")} == {
        "tiny_first-1.0.dist-info", "tiny_second-1.0.dist-info", "xsmom_nb-1.2.0.dist-info"}
    asked = [target / "bin" / "python", "-I", "-c", "import tiny_first, tiny_second, xsmom_nb; print(xsmom_nb.__file__)"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(said).parent == site / "xsmom_nb"
    switch_release(release.name, tmp_path / "opt", None)
    assert [each.is_current for each in installed_releases(tmp_path / "opt")] == [True]


def test_a_wheel_that_was_changed_or_is_missing_is_named_before_anything_is_made(tiny, tmp_path):
    _, folder, wheels = tiny
    words = ["release", "install", str(folder), "--prefix", str(tmp_path / "opt"), "--home", str(tmp_path / "home")]
    shutil.copytree(wheels, tmp_path / "wheels")
    tiny_wheel(tmp_path / "wheels", "tiny_second", content="something else")
    refused = CliRunner().invoke(app, [*words, "--wheels", str(tmp_path / "wheels")])
    assert refused.exit_code == 1
    assert "tiny_second-1.0-py3-none-any.whl (SHA-256 " in refused.stderr
    assert "not what the lock names; nothing was installed" in refused.stderr
    for path in (tmp_path / "wheels").iterdir():
        path.unlink()
    refused = CliRunner().invoke(app, [*words, "--wheels", str(tmp_path / "wheels")])
    assert refused.exit_code == 2
    assert "2 of 2 locked packages are missing" in refused.stderr
    assert "tiny-first==1.0, tiny-second==1.0. Gather them with `xsmom release wheels`" in refused.stderr
    assert not (tmp_path / "opt").exists()


def test_pip_checks_the_hashes_itself_and_a_failed_installation_leaves_nothing(tiny, tmp_path, monkeypatch):
    "The folder is checked first, but a file may change after that."
    _, folder, wheels = tiny
    shutil.copytree(wheels, tmp_path / "wheels")
    tiny_wheel(tmp_path / "wheels", "tiny_first", content="something else")
    monkeypatch.setattr(releases, "check_wheels", lambda lock, folder: [])
    with pytest.raises(RunError, match=r"(?s)installing the locked packages failed: .*DO NOT MATCH THE HASHES.*tiny_first==1\.0"):
        install_release(folder, tmp_path / "opt", wheels=tmp_path / "wheels")
    assert installed_releases(tmp_path / "opt") == []
