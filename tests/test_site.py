"""A part of the site is built and read as a reader reads it, in a headless browser; and what must fail a build does.

The whole of it is built by `make docs`; what a part leaves out (two hundred more chapters) goes through the same steps.
"""

import json
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from browser import DESKTOP, PHONE, open_browser, overflow, watched
from typer.testing import CliRunner

from xsmom_nb.cli import app
from xsmom_nb.ops.docs import SiteError, build_site, check_links
from xsmom_nb.ops.serve import address, site_server

for package in ("sphinx", "myst_nb", "pydata_sphinx_theme"):
    pytest.importorskip(package, reason=f"no package {package} found")
ONLY = ["strategy/01_momentum.ipynb", "guide/01_own_data.ipynb"]
CHAPTER = "book/strategy/01_momentum.html"


@contextmanager
def served(folder: Path):
    "The address of built pages, while a server gives them out."
    with site_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield address(server)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    "A part of the site of this checkout, built once."
    return build_site(root, tmp_path_factory.mktemp("site"), ONLY, typer.main.get_command(app))


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def base(site):
    with served(site.index.parent) as base:
        yield base


def test_every_kind_of_page_is_there(site):
    made = {path.relative_to(site.index.parent).as_posix() for path in site.index.parent.rglob("*.html")}
    names = {"index", "quickstart", "architecture", "book/strategy/01_momentum", "book/guide/01_own_data", "howto/signal",
             "howto/filter", "howto/data", "howto/paper", "howto/run", "howto/rollback", "howto/release", "reference/config",
             "reference/commands", "reference/modules", "api/strategy.momentum", "project/changelog", "search"}  # fmt: skip
    assert {f"{name}.html" for name in names} <= made
    assert "book/strategy/02_filters.html" not in made  # a part is a part
    chapter = (site.index.parent / CHAPTER).read_text()
    assert "#|" not in chapter  # what speaks to nbdev is not for readers
    assert "from fastcore.test" not in chapter
    assert "<math" in chapter
    assert "tag_exported" in chapter


def test_a_reader_sees_front_page_and_plots(base, browser):
    with watched(browser) as (page, trouble):
        page.goto(base)
        assert page.inner_text("h1").startswith("xsmom_nb")
        page.click("text=momentum >> nth=-1")
        page.wait_for_url(f"**/{CHAPTER}")
        plots = page.locator("div.cell_output img")
        assert plots.count() == 2
        sizes = plots.evaluate_all("images => images.map(each => [each.naturalWidth, each.clientWidth])")
        assert all(natural > 300 and shown > 200 for natural, shown in sizes)
        formula = page.locator("math").first.bounding_box()
        assert formula["width"] > 20
        assert formula["height"] > 10
    assert trouble == []


def test_search_finds_a_function(base, browser):
    with watched(browser) as (page, trouble):
        page.goto(f"{base}search.html?q=slide_sums")
        first = page.locator("ul.search li a").first
        first.wait_for()
        assert "slide_sums" in first.inner_text()
        first.click()
        page.wait_for_url("**/api/strategy.momentum.html*#xsmom_nb.strategy.momentum.slide_sums")
        said = page.locator("dt[id='xsmom_nb.strategy.momentum.slide_sums'] + dd").inner_text()
        assert "one-bar returns, shape (T, N), 0 where missing" in said  # the comment behind the parameter
    assert trouble == []


def test_a_setting_has_an_address(base, browser):
    with watched(browser) as (page, trouble):
        page.goto(f"{base}reference/config.html#confval-strategy.kappa")
        entry = page.locator("[id='confval-strategy.kappa']")
        assert 0 <= entry.bounding_box()["y"] < DESKTOP["height"]
        assert "a number from 0" in entry.locator("xpath=following-sibling::dd").first.inner_text()
        for name in ("quickstart", "howto/rollback"):  # the pages only name it, and it is a link
            page.goto(f"{base}{name}.html")
            article = page.locator("article")
            assert "confval" not in article.inner_text()
            assert article.locator("a[href*='reference/config.html#confval-']").count() > 0
    assert trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(base, browser, scheme):
    with watched(browser, scheme=scheme) as (page, trouble):
        page.goto(f"{base}architecture.html")
        colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, "
                                "getComputedStyle(document.querySelector('svg.architecture text')).fill]")  # fmt: skip
        back, text = (sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) for colour in colours)
        assert (back > 600 and text < 300) if scheme == "light" else (back < 150 and text > 500)
    assert trouble == []


def test_nothing_is_wider_than_a_phone(base, browser):
    with watched(browser, size=PHONE) as (page, trouble):
        for name in ("index", "quickstart", "architecture", "book/strategy/01_momentum", "book/guide/01_own_data", "howto/paper",
                     "reference/config", "reference/commands", "reference/modules", "api/strategy.momentum", "project/readme"):
            page.goto(f"{base}{name}.html")
            assert overflow(page) <= 0, name
    assert trouble == []


def test_nothing_comes_from_elsewhere(site):
    assert check_links(site.index.parent) == []
    assert site.megabytes < 40


# ── What fails a build ───────────────────────────────────────────────────────────────────────────────────────────────
def notebook(*cells: str) -> str:
    "A chapter with a heading and code."
    head = {"cell_type": "markdown", "id": "head", "metadata": {}, "source": cells[0]}
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    codes = [{**code, "id": f"c{number}", "source": source} for number, source in enumerate(cells[1:])]
    return json.dumps({"cells": [head, *codes], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def checkout(root, tmp_path):
    "A small checkout: the shape of this one with a chapter or two."
    for folder in ("nbs/guide", "nbs/strategy", "docs", "configs", "tests", "xsmom_nb"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(root / "docs" / "conf.py", tmp_path / "docs")
    shutil.copytree(root / "docs" / "_static", tmp_path / "docs" / "_static")
    shutil.copy(root / "tests" / "house.py", tmp_path / "tests")
    (tmp_path / "configs" / "config.yaml").write_text("strategy: {}\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    trees = "\n".join(["```{toctree}", *(f"/{name}/index" for name in ("book", "reference", "project")), "```"])
    (tmp_path / "docs" / "index.md").write_text(f"# Front\n\n{trees}\n")
    chapter = notebook("# One\n\n> The first.\n\n## Twice two\n\n$a_1$", "2 * 2")
    (tmp_path / "nbs" / "strategy" / "00_one.ipynb").write_text(chapter)
    return tmp_path


def test_every_fault_of_a_page_is_named_at_once(checkout):
    (checkout / "docs" / "page.md").write_text("# A page\n\n[one](../nbs/strategy/00_one.ipynb) and [gone](howto/gone.md)\n")
    failing = notebook("# Fails\n\n> In its third cell.", "one = 1", "{}['BTCUSDT']")
    (checkout / "nbs" / "guide" / "fails.ipynb").write_text(failing)
    with pytest.raises(SiteError) as error:
        build_site(checkout)
    assert "2 faults" in str(error.value)
    assert "docs/page.md: the link to howto/gone.md leads nowhere" in str(error.value)
    assert "nbs/guide/fails.ipynb: cell 3 failed with KeyError: 'BTCUSDT'" in str(error.value)


def test_sphinx_finds_the_rest(checkout):
    page = checkout / "docs" / "page.md"
    page.write_text("---\norphan: true\n---\n# A page\n\n[there](../nbs/strategy/00_one.ipynb#twice-three), $\\colour{a}$\n")
    with pytest.raises(SiteError) as error:
        build_site(checkout, jobs=1)
    assert "docs/page.md" in str(error.value)
    assert "twice-three" in str(error.value)
    assert r"the formula $\colour{a}$ cannot be shown" in str(error.value)
    assert "docs/index.md" not in str(error.value)
    assert not (checkout / "build" / "docs" / "doctrees").exists()  # so that the next build says it again


def test_a_port_in_use_is_named(site):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = CliRunner().invoke(app, ["docs", "serve", "--port", str(port), "--output", str(site.index.parent.parent)])
    assert answer.exit_code == 2
    assert f"port {port}: another program listens there; name another with --port" in answer.stderr
