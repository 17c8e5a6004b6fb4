"""The README's table of what the strategy earned is recomputed from the real data, row by row."""

import pytest

from xsmom_nb.backtest.earnings import earnings_markdown, mean_earnings
from xsmom_nb.backtest.vector import backtest_phases
from xsmom_nb.clock import parse_utc
from xsmom_nb.config import Config, load_config


@pytest.mark.parametrize("name", ["code's defaults", "shipped config"])
def test_the_readme_quotes_what_the_data_gives(root, real_panel, name):
    config = Config() if name == "code's defaults" else load_config(root / "configs" / "config.yaml", environ={})
    table = mean_earnings(backtest_phases(real_panel, config, parse_utc("2023-01-01")))
    readme = (root / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in earnings_markdown({name: table}).splitlines() if line.startswith(f"| {name}")]
    assert len(rows) == 4
    for row in rows:
        assert row in readme, f"not in the README: {row!r}; take it from `xsmom run earnings` (`this config` is the shipped one)"
