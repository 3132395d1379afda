"""Lake and source on a real S3 API over loopback, with and without faults."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from embed_assets_tests.conftest import Project
from embed_assets_tests.s3 import BUCKET, environment, running_proxy, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with running_server() as port:
        yield port


@pytest.fixture
def stored(project: Project, server: int, request: pytest.FixtureRequest) -> Project:
    """A project whose source and lake are folders of the bucket."""
    for name, value in environment(server).items():
        project.monkeypatch.setenv(name, value)
    place = f"s3://{BUCKET}/{request.node.name}"
    project.set(SOURCE=f"{place}/landing", LAKE=f"{place}/lake")
    return project


def put(project: Project, path: str, text: str) -> None:
    import s3fs

    source = project.pipeline().corpus.source.root
    s3fs.S3FileSystem(skip_instance_cache=True).pipe(f"{source}/{path}", text.encode())


@pytest.mark.long
def test_the_whole_pipeline_on_s3(stored: Project) -> None:
    for key in "ab":
        for i in range(3):
            put(stored, f"{key}/{i}.md", f"# Title {i}\n\nText {i} of {key}.")
    assert stored.json("plan")["partitions"][0]["assets"]["chunks"]["state"] == "missing"
    assert stored.sync()["embedded"] == 6
    assert stored.sync()["embedded"] == 0
    put(stored, "a/1.md", "# Title 1\n\nAnother text.")
    assert stored.sync()["embedded"] == 1
    assert stored.json("verify")["ok"]
    found = stored.json("search", "# Title 1\n\nAnother text.", "-k", "1")["results"][0]
    assert found["uri"].endswith("landing/a/1.md") and found["uri"].startswith("s3://")
    assert [s["is_current"] for s in stored.json("maintain")["spaces"]] == [True]
    assert not (stored.root / "lake").exists() and not (stored.root / "landing/a").exists()


@pytest.mark.long
def test_a_killed_sync_resumes_from_its_windows_on_s3(stored: Project) -> None:
    import os
    import signal
    import time

    rows = [f"Sentence number {i} of a long text that goes on." for i in range(900)]
    put(stored, "a/rows.jsonl", "\n".join(json.dumps({"id": i, "text": line}) for i, line in enumerate(rows)))
    pipeline = stored.pipeline()
    stored.set(MODEL="fake:16~200")
    process = stored.start_sync()
    while not (staged := list(pipeline.lake.storage.files("embeddings"))) or "_staging" not in staged[0].path:
        assert process.poll() is None, process.communicate()[0][-900:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()[0][-900:]
    stored.set(MODEL="fake:16")
    assert stored.sync()["embedded"] <= len(rows) - 256
    assert not [file for file in pipeline.lake.storage.files("embeddings") if "_staging" in file.path]


@pytest.mark.long
def test_faults_of_the_store_cost_only_time(stored: Project, server: int) -> None:
    """One request in ten fails: with an error, slowly, or with the connection cut before or after it is carried out."""
    for key in "abc":
        for i in range(4):
            put(stored, f"{key}/{i}.md", f"Text {i} of {key}.")
    with running_proxy(server, fault_percent=10) as proxy:
        stored.monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy)["AWS_ENDPOINT_URL"])
        result = stored.run("sync", "--json")
        print(result.stderr)
        answer = json.loads(result.stdout)
        print(answer)
    stored.monkeypatch.setenv("AWS_ENDPOINT_URL", environment(server)["AWS_ENDPOINT_URL"])
    assert stored.rows("reason", table="rejected_documents") == []
    assert stored.json("verify")["ok"]
    assert len(stored.rows("chunk_id")) == 12
