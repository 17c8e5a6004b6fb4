"""requirements.lock covers settings.ini, pins by hash, names no place on any network, and is what is installed."""

import re
import tomllib
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version

import house
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def entries(root):
    "Every locked requirement with its hashes."
    text = (root / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.split("--hash")[0].strip()), re.findall(r"--hash=(\S+)", line)) for line in lines]


def wanted(root) -> list[Requirement]:
    "What settings.ini asks for in all its extras, and what the build needs."
    own = house.settings(root)
    asked = [line.strip() for key in own if key.endswith("requirements") for line in own[key].splitlines() if line.strip()]
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    return [Requirement(line) for line in [*asked, *build]]


def environment(python: str) -> dict[str, str]:
    "This machine, under another Python."
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.7"}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_covers_what_is_asked_for(entries, root, python):
    locked = defaultdict(list)
    for requirement, _ in entries:
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            locked[canonicalize_name(requirement.name)] += [specifier.version for specifier in requirement.specifier]
    assert [name for name, versions in locked.items() if len(versions) != 1] == []
    for requirement in wanted(root):
        versions = locked[canonicalize_name(requirement.name)]
        assert list(requirement.specifier.filter(versions)), f"{requirement}: locked is {versions or 'nothing'}; run `make lock`"


def test_every_entry_is_exact_and_hashed(entries):
    assert len(entries) > 100
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement


def test_names_no_place(root, entries):
    text = (root / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|^\s*-[a-z]|--(?!hash=)|(?<=[\s=])/|\.whl|@", text, re.MULTILINE)
    assert [requirement for requirement, _ in entries if requirement.url] == []


def test_is_what_is_installed(entries):
    other = []
    for requirement, _ in entries:
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                installed = "nothing"
            if installed not in requirement.specifier:
                other.append(f"{requirement.name}: installed is {installed}, locked {requirement.specifier}")
    assert other == [], "run `make setup`"
