"""A planted credential appears nowhere: not in output, logs, records, tables or errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embed_assets.errors import LakeError, SettingsError, hide_secrets
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project
from embed_assets_tests.s3 import BUCKET, SECRET, environment, running_server

PLANTED = "planted-option-value-5f2d"


def assert_unseen(where: Path, *texts: str) -> None:
    for secret in (SECRET, PLANTED):
        for text in texts:
            assert secret not in text
        for file in where.rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file


def test_a_planted_credential_is_found_nowhere(project: Project) -> None:
    with running_server() as port:
        for name, value in environment(port).items():
            project.monkeypatch.setenv(name, value)
        project.write("a/x.md", "A text.")
        project.set(LAKE=f"s3://{BUCKET}/lake", LAKE_OPTIONS=json.dumps({"aws_session_token": PLANTED}))
        outputs = [project.run(*command.split(), "--debug") for command in ("plan", "sync", "verify", "maintain")]
        assert [output.exit_code for output in outputs] == [0] * 4
        storage = project.pipeline().lake.storage
        stored = [storage.read(file.path).decode("latin-1") for folder in
                  ("raw_documents", "chunks", "embeddings") for file in storage.files(folder)]  # fmt: skip
        assert stored
        # Errors do not reveal it either: no such bucket, wrong options, no server.
        project.set(LAKE_OPTIONS=json.dumps({"aws_session_token": PLANTED, "max_retries": "0"}))
        project.write("a/y.md", "Another text.")
        for change in ({"LAKE": "s3://nobucket/lake"}, {"LAKE": f"s3://{BUCKET}/new", "SOURCE": "s3://nobucket/x"}):
            project.set(**change)
            failed = project.run("sync")
            assert (
                failed.exit_code and "NoSuchBucket" in failed.output.replace(" ", "")
            ) or "can't be listed" in failed.output
            outputs.append(failed)
    shown = [text for output in outputs for text in (output.stdout, output.stderr, str(output.exception))]
    assert_unseen(project.root, *shown, *stored)


def test_a_url_with_a_login_is_refused_without_showing_it(project: Project) -> None:
    for name in ("SOURCE", "LAKE"):
        project.set(**{name: f"s3://user:{PLANTED}@bucket/x"})
        result = project.run("plan", "--json")
        assert result.exit_code == 1 and "must not hold a login" in result.stdout
        assert_unseen(project.root, result.output)
        project.monkeypatch.delenv(f"EMBED_{name}")


@pytest.mark.parametrize("value", [PLANTED, f'{{"key": "{PLANTED}", ', f'{{"key": ["{PLANTED}"]}}', f'["{PLANTED}"]'])
def test_invalid_options_are_not_shown(project: Project, value: str) -> None:
    project.set(LAKE_OPTIONS=value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert PLANTED not in str(caught.value)


def test_an_account_in_a_container_url_is_not_a_login() -> None:
    place = "abfss://container@account.dfs.core.windows.net/lake"
    assert load_settings(lake=place).lake == place
    assert hide_secrets(place) == place


def test_secrets_of_the_environment_are_hidden_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("EMBED_SOURCE_OPTIONS", json.dumps({"secret": PLANTED, "anon": "false"}))
    error = LakeError(f"could not sign with {SECRET} or {PLANTED} at http://user:pass@host/x")
    assert str(error) == "could not sign with *** or *** at http://***@host/x"
