"""Package metadata, read from settings.ini with configparser alone."""

import configparser
from pathlib import Path

from setuptools import find_packages, setup

parser = configparser.ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


extras = {key.removesuffix("_requirements"): lines(key) for key in settings if key.endswith("_requirements")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"],
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    python_requires=f">={settings['min_python']},<{settings['max_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
