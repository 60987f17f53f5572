"""docs/configuration.md is made from the settings models and up to date, and what it claims is so."""

from __future__ import annotations

import json
import re

import pytest

from server.cli import ConfigurationError, load_settings
from server.settings import Settings
from server.settings_page import page
from tests.packaging.sources import ROOT

DEMO = ["--config", str(ROOT / "deploy/config/demo.toml")]


def test_page_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == page(), "run: python -m server.settings_page > docs/configuration.md"


def test_every_option_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.+) \|$", page(), re.M)
    assert len(rows) > 35
    assert {name for name, *_ in rows} >= {"port", "api_keys", "served_model_name", "threshold", "max_num_seqs", "vllm"}
    assert all(len(meaning) > 5 for *_, meaning in rows)
    headings = [name for name in Settings.model_fields if f"[{name}]" in page() or f"[{name}.NAME]" in page()]
    names = [name for name in Settings.model_fields if f"`{name}`" in page() or name in headings]
    assert names == list(Settings.model_fields)


def test_command_line_goes_before_environment_and_environment_before_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(DEMO).scheduler.max_num_seqs == 32
    monkeypatch.setenv("COLLM_SCHEDULER__MAX_NUM_SEQS", "7")
    assert load_settings(DEMO).scheduler.max_num_seqs == 7
    assert load_settings([*DEMO, "--scheduler.max_num_seqs", "5"]).scheduler.max_num_seqs == 5
    monkeypatch.setenv("COLLM_CONFIG", DEMO[1])
    assert load_settings(["--port", "9"]).server.port == 9


def test_lists_flags_and_unknown_options(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing of the file's experts is left; this option must be the same in all lanes.
    options = {"structured_outputs_config": {"disable_any_whitespace": True}}
    experts = json.dumps([{"name": "codes", "model": "models/demo/codes", "vllm": options}])
    assert load_settings([*DEMO, "--experts", experts]).experts[0].vllm == options
    monkeypatch.setenv("COLLM_EXPERTS", experts)
    assert load_settings(DEMO).experts[0].vllm == options
    assert not load_settings([*DEMO, "--no-server.access_log"]).server.access_log
    monkeypatch.setenv("COLLM_API_KEY", "x")
    assert load_settings(DEMO).server.all_keys == ()
    with pytest.raises(ConfigurationError):
        load_settings([*DEMO, "--server.nonsense", "1"])
