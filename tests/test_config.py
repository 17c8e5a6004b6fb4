"""The config across its modules: design page, shipped file, sources over one another, misspellings, digests."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmom_nb.config import (
    Config,
    build_config,
    config_digest,
    difference,
    flatten,
    load_config,
    read_options,
    reference_table,
    require_built,
    to_yaml,
    with_values,
)
from xsmom_nb.errors import ConfigError
from xsmom_nb.schema import known_fields

ROOT = Path(__file__).parents[1]
DESIGN = ROOT.parent / "shared" / "design" / "default_config.yaml"
GOLDEN = ROOT.parent / "shared" / "golden" / "core.json"


def dotted(value: object, prefix: str = "") -> dict[str, object]:
    "Nested groups as dotted keys; an empty group is a value."
    if not (isinstance(value, dict) and value):
        return {prefix: value}
    return {key: leaf for name, item in value.items() for key, leaf in dotted(item, f"{prefix}.{name}".lstrip(".")).items()}


# ---- the design page and the shipped file


@pytest.mark.skipif(not DESIGN.exists(), reason="no design page found")
def test_defaults_are_those_of_the_design_page() -> None:
    "Every key and value of the page, and no key besides but some sections and two limits that came with what needs them."
    page = dotted(yaml.safe_load(DESIGN.read_text(encoding="utf-8")))
    ours = dotted(Config().model_dump(mode="json"))
    page["optimizer.holdout_start"] = page["optimizer.holdout_start"].isoformat()
    assert {key: ours.get(key, "absent") for key in page} == page
    ours_alone = ("quality.", "paper.", "health.", "report.", "backup.", "notify.")
    added = {key for key in ours.keys() - page.keys() if not key.startswith(ours_alone)}
    assert added == {"live.max_ticker_age_seconds", "logging.keep_days"}


def test_shipped_config_changes_what_it_says_and_is_built() -> None:
    "What the README's table is about: slower momentum, rebalanced every eight hours; and what the exits study supports."
    shipped = load_config(ROOT / "configs" / "config.yaml", environ={})
    require_built(shipped)
    assert [(change.key, change.after) for change in difference(Config(), shipped)] == [
        ("strategy.lookbacks", [84, 168, 336, 672]),
        ("strategy.rebalance_every_bars", 8),
        ("risk.atr_mult_sl", 0.0), ("risk.catastrophic_atr_mult", 8.0), ("risk.breakeven_after_r", 0.0),
        ("risk.trail_atr_mult", 0.0), ("risk.partial_tp_ladder", []),
    ]


def test_the_file_of_the_working_tree_is_found_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    "A notebook runs in its own folder and reads the same config."
    monkeypatch.chdir(ROOT / "nbs" / "market")
    assert load_config(environ={}) == load_config(ROOT / "configs" / "config.yaml", environ={})


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers found")
def test_golden_configs_are_accepted() -> None:
    "Every case, and each is built."
    for case in json.loads(GOLDEN.read_text())["cases"].values():
        require_built(with_values(Config(), case["config"]))


SEARCHED = {  # the ranges of the optimised parameters
    "strategy.signal_power": [0.5, 2.0],
    "strategy.lookbacks": [[12, 24, 48, 96], [192, 384, 768, 1536]],
    "strategy.lookback_weights": [[1, 0.4, 0.4**2, 0.4**3], [1, 1.6, 1.6**2, 1.6**3]],
    "strategy.vol_lookback": [24, 168],
    "strategy.k_min": [2, 6],
    "strategy.k_max": [8, 18],
    "strategy.kappa": [0, 2],
    "strategy.entry_zscore_min": [0, 0.75],
    "execution.trade_rate": [0.05, 1],
    "strategy.max_weight_per_asset": [0.08, 0.30],
    "execution.rebalance_band": [0, 0.08],
    "filters.regime.slope_min_bps_per_day": [0, 80],
    "sizing.weighting": ["signal_inverse_vol", "inverse_vol", "equal"],
    "strategy.rebalance_every_bars": [1, 2, 4, 8, 12, 24],
    "risk.atr_mult_sl": [0, 3, 12],
    "risk.trail_atr_mult": [0, 3, 12],
    "risk.breakeven_after_r": [0, 0.5, 2],
    "risk.partial_tp_ladder": [[], [[0.5, 0.30]], [[3, 0.30]]],
}


def test_searched_ranges_are_accepted() -> None:
    "Lowest values together, highest values together, and each value by itself."
    for pick in (min, max):
        positions = {key: pick(range(len(values))) for key, values in SEARCHED.items()}
        with_values(Config(), {key: SEARCHED[key][position] for key, position in positions.items()})
    for key, values in SEARCHED.items():
        for value in values:
            changed = flatten(with_values(Config(), {key: value}))
            assert changed[key] == value


# ---- sources over one another


def test_environment_over_file_and_options_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Each source overlays the one before key by key, through the process's own environment."
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: {kappa: 2.0, k_min: 3, k_max: 7}\nfilters: {regime: {ema_len: 100}}\n")
    monkeypatch.setenv("XSMOM_STRATEGY__K_MIN", "4")
    monkeypatch.setenv("XSMOM_STRATEGY__K_MAX", "8")
    monkeypatch.setenv("XSMOM_FILTERS__REGIME__ENABLED", "false")
    monkeypatch.setenv("XSMOM_DATA", "/somewhere")  # none of the config's
    config = load_config(file, ["strategy.k_max=9", "sizing.weighting=equal"])
    assert (config.strategy.kappa, config.strategy.k_min, config.strategy.k_max) == (2.0, 4, 9)
    assert (config.filters.regime.enabled, config.filters.regime.ema_len, config.sizing.weighting) == (False, 100, "equal")


@pytest.mark.parametrize(
    ("value", "expected"), [("2025-04-01", "2025-04-01"), ('"2024-01-01"', "2024-01-01"), ("null", None)]
)
def test_holdout_start_is_a_day(tmp_path: Path, value: str, expected: str | None) -> None:
    "Written in a file, as an option, in the environment: the same day."
    file = tmp_path / "mine.yaml"
    file.write_text(f"optimizer: {{holdout_start: {value}}}\n")
    for config in (
        load_config(file, environ={}),
        load_config("defaults", [f"optimizer.holdout_start={value}"], {}),
        load_config("defaults", environ={"XSMOM_OPTIMIZER__HOLDOUT_START": value}),
    ):
        assert flatten(config)["optimizer.holdout_start"] == expected


def test_each_error_names_its_origin(tmp_path: Path) -> None:
    "One line for each, all of them at once."
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: {kappa: -1}\ncosts: {maker_ratio: 70}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["backtest.risk=all"], {"XSMOM_STRATEGY__K_MAX": "many"})
    assert set(str(caught.value).splitlines()) == {
        f"strategy.kappa = -1 ({file}): expected a number from 0 to 100",
        f"costs.maker_ratio = 70 ({file}): expected a number from 0 to 1",
        'strategy.k_max = "many" (environment variable XSMOM_STRATEGY__K_MAX): expected a whole number from 1 to 100',
        'backtest.risk = "all" (--set): expected core or full',
    }
    assert caught.value.exit_status == 2


def test_a_valid_value_hides_an_invalid_one_below_it(tmp_path: Path) -> None:
    "Only what takes effect is checked, so a broken file can be overruled while it is being repaired."
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: {kappa: -1}\n")
    assert load_config(file, ["strategy.kappa=0.5"], {}).strategy.kappa == 0.5


# ---- misspellings


@pytest.mark.parametrize("key", [key for key in known_fields() if len(key.rpartition(".")[2]) > 4])
def test_a_lost_letter_is_found(key: str) -> None:
    "Any key without its third last letter is refused, and the key that was meant is named."
    misspelt = key[:-3] + key[-2:]
    with pytest.raises(ConfigError, match="unknown key") as caught:
        build_config(read_options([f"{misspelt}=1"]))
    assert f"did you mean '{key}'" in str(caught.value)


def test_a_misspelt_section_is_one_error() -> None:
    "Not one for each of its keys."
    with pytest.raises(ConfigError) as caught:
        build_config(read_options(['stratgy={"kappa": 1, "k_min": 2}']))
    assert str(caught.value) == (
        """stratgy = {"kappa": 1, "k_min": 2} (--set): unknown key; did you mean 'strategy'?"""
    )


def test_a_secret_in_the_config_is_refused_and_not_shown(tmp_path: Path) -> None:
    "Neither as a key that looks plausible nor inside a database's URL."
    file = tmp_path / "mine.yaml"
    file.write_text("exchange: {api_key: hunter22}\n")
    with pytest.raises(ConfigError, match=r"exchange\.api_key") as caught:
        load_config(file, environ={})
    assert "hunter22" not in str(caught.value)
    with pytest.raises(ConfigError, match="without a password") as caught:
        load_config("defaults", ["live.state_url=postgresql://me:hunter22@db/x"], {})
    assert "hunter22" not in str(caught.value)


# ---- digests and round trips

PIECES = [
    ("strategy.kappa", 2, 2.0),
    ("strategy.lookback_weights", [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]),
    ("strategy.k_max", 9, 9),
    ("filters.regime.slope_min_bps_per_day", 20, 2e1),
    ("risk.partial_tp_ladder", [[1, 0.5]], [[1.0, 0.5]]),
    ("costs.maker_bps", 0, -0.0),
    ("live.history_bars", 5000, 5000),
    ("universe.banlist", ["USDCUSDT"], ["USDCUSDT"]),
]


@settings(max_examples=50, deadline=None)
@given(st.permutations(PIECES), st.lists(st.booleans(), min_size=len(PIECES), max_size=len(PIECES)))
def test_digest_depends_on_values_alone(order: list[tuple[str, object, object]], as_float: list[bool]) -> None:
    "Not on the order of the keys, and not on whether a number was written 1 or 1.0."
    options = [f"{key}={json.dumps(other if swap else value)}" for (key, value, other), swap in zip(order, as_float, strict=True)]
    written = build_config(read_options(options))
    plain = with_values(Config(), {key: value for key, value, _ in PIECES})
    assert written == plain
    assert config_digest(written) == config_digest(plain) != config_digest(Config())


def test_every_setting_is_in_the_digest() -> None:
    "Changing one key changes the digest, whichever it is."
    digests = [config_digest(Config())]
    for key, values in SEARCHED.items():
        digests += [config_digest(with_values(Config(), {key: value})) for value in values if value != flatten(Config())[key]]
    assert all(a != b for a, b in itertools.combinations(digests, 2))


def test_digest_is_the_same_in_another_process() -> None:
    "Nothing of the process, such as its hash seed, enters; nor do heavy libraries enter the process."
    code = (
        "import sys; from xsmom_nb.config import Config, config_digest; "
        "print(config_digest(Config())); print(*sorted({'numpy', 'pandas', 'pydantic_settings'} & set(sys.modules)))"
    )
    environ = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ).stdout
    assert output.split("\n")[:2] == [config_digest(Config()), ""]


CHANGES = st.fixed_dictionaries(
    {
        "logging.directory": st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30),
        "strategy.kappa": st.floats(0, 100),
        "backtest.initial_equity": st.floats(1e-3, 1e12),
        "universe.whitelist": st.lists(st.sampled_from(["BTCUSDT", "1000PEPEUSDT", "BTC-26SEP25"]), unique=True),
        "notify.routes": st.just([{"url_from": "CHAT_URL", "events": ["kill_switch"]}]),
    }
)


@settings(max_examples=20, deadline=None)
@given(CHANGES)
def test_text_form_reads_back(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]) -> None:
    "Written and read again it is the same config, bit for bit."
    config = with_values(Config(), changes)
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file, environ={}) == config


def test_reference_has_a_row_for_every_setting() -> None:
    "The generated page names each key with its default."
    rows = [line.split(" | ")[:2] for line in reference_table().splitlines()[2:]]
    assert rows == [[f"| `{key}`", f"`{json.dumps(value)}`"] for key, value in flatten(Config()).items()]
