"""Models behind an OpenAI-compatible endpoint: requests, retries, refusals, and whole syncs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embed_assets.engine.backend import Window
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.provider import EndpointOptions, EngineOptions
from embed_assets.engine.providers import openai
from embed_assets.engine.providers.openai import RateLimiter
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.errors import ModelError, SettingsError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import REJECTED
from embed_assets_tests.conftest import SAMPLE_MODEL, Project, resolve_space, topic
from embed_assets_tests.engine.endpoint import RESET, Answer, Endpoint, serving

MODEL = "openai:org/served"
TEXTS = [f"text number {i} " + "word " * (i % 40) for i in range(100)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


def embedder_for(endpoint: Endpoint, budget: int = 256, patience: float = 20.0, **choice: Any) -> LocalEmbedder:
    space = resolve_space(MODEL, endpoint=endpoint.url, **choice)
    options = EndpointOptions(concurrency=3, batch_texts=8, patience_seconds=patience)
    backend = openai.load(space, EngineOptions(endpoint=options))
    endpoint.requests.clear()
    endpoint.served.clear()
    return LocalEmbedder(backend, space.tokenizer, space.max_seq_length, budget, backoff_seconds=0.001)


def expected(endpoint: Endpoint, texts: list[str]) -> np.ndarray:
    return np.stack([endpoint.vector(text) for text in texts])


@pytest.mark.parametrize("knows_base64", [True, False], ids=["base64", "lists"])
def test_vectors_are_the_servers_in_order_and_requests_are_bounded(endpoint: Endpoint, knows_base64: bool) -> None:
    endpoint.knows_base64 = knows_base64
    embedder = embedder_for(endpoint)
    found = embedder.embed(TEXTS)
    assert not found.rejected
    assert np.allclose(found.vectors, expected(endpoint, TEXTS), atol=1e-6)
    assert max(map(len, endpoint.requests)) == 8, "texts of a request"
    counts = [sum(embedder._tokenizer.count(texts)) for texts in endpoint.requests if len(texts) > 1]
    assert max(counts) <= 256, "tokens of a request"
    assert sorted(endpoint.served) == sorted(TEXTS), "each text is sent once"


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(429, '{"error": {"message": "Rate limit reached"}}', {"Retry-After": "0.05"}),
        Answer(429, "{}", {"retry-after-ms": "20"}),
        Answer(503, "no healthy upstream"),
        Answer(424, '{"error_type": "backend"}'),
        Answer(200, "<html>a proxy's page</html>"),
        Answer(200, '{"data": []}'),
        RESET,
    ],
    ids=["429", "429 in ms", "503", "424", "no JSON", "no vectors", "reset"],
)
def test_transient_failures_are_retried(endpoint: Endpoint, trouble: Answer) -> None:
    embedder = embedder_for(endpoint)
    endpoint.weather = lambda number: trouble if number in (0, 3, 4, 5) else None
    found = embedder.embed(TEXTS)
    assert not found.rejected
    assert np.allclose(found.vectors, expected(endpoint, TEXTS), atol=1e-6)


def test_a_server_that_stays_down_is_a_retryable_error_and_rejects_no_text(endpoint: Endpoint) -> None:
    embedder = embedder_for(endpoint, patience=0.2)
    endpoint.weather = lambda number: Answer(503)
    with pytest.raises(ModelError, match=r"did not answer within 0 s of trying: HTTP 503.*EMBED_ENDPOINT") as caught:
        embedder.embed(TEXTS[:4])
    assert caught.value.is_retryable


def test_a_refused_text_is_found_and_the_others_are_embedded(endpoint: Endpoint) -> None:
    embedder = embedder_for(endpoint)
    endpoint.refused = "poison"
    texts = [*TEXTS[:20], "a poison pill", *TEXTS[20:40]]
    found = embedder.embed(texts)
    assert list(found.rejected) == [20]
    assert "maximum context length is 8 tokens" in found.rejected[20]
    good = [i for i in range(41) if i != 20]
    assert np.allclose(found.vectors[good], expected(endpoint, [texts[i] for i in good]), atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(404, '{"error": {"message": "The model does not exist"}}'), "does not serve 'org/served': HTTP 404"),
        (Answer(401, "{}"), "refuses access .*OPENAI_API_KEY is not set"),
        (Answer(429, '{"error": {"code": "insufficient_quota"}}'), "has no quota left"),
    ],
)
def test_permanent_failures_are_raised_at_once(endpoint: Endpoint, answer: Answer, words: str) -> None:
    endpoint.weather = lambda number: answer
    with pytest.raises(ModelError, match=words):
        embedder_for(endpoint)
    assert len(endpoint.requests) == 1


def test_the_key_comes_from_the_environment(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.key = "sk-planted"
    with pytest.raises(ModelError, match="is not set; put its key into OPENAI_API_KEY"):
        embedder_for(endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    assert len(embedder_for(endpoint).embed(TEXTS[:3]).vectors) == 3


def test_a_dimension_that_changes_during_a_run_is_an_error(endpoint: Endpoint) -> None:
    embedder = embedder_for(endpoint)
    endpoint.dimension = 12
    with pytest.raises(ModelError, match=r"must all have 16 dimensions, .* gave one of 12"):
        embedder.embed(TEXTS[:4])


def test_truncated_vectors_have_unit_norm(endpoint: Endpoint) -> None:
    found = embedder_for(endpoint, truncate_dim=5).embed(TEXTS[:3]).vectors
    cut = expected(endpoint, TEXTS[:3])[:, :5]
    assert np.allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(SettingsError, match="at most the model's 16 dimensions"):
        embedder_for(endpoint, truncate_dim=17)


def test_an_outage_is_never_a_texts_fault(endpoint: Endpoint) -> None:
    """The server is back when the health probe comes: a single text must not be rejected for its absence."""
    embedder = embedder_for(endpoint, patience=0.0)
    endpoint.weather = lambda number: Answer(503) if number < 2 else None
    with pytest.raises(ModelError, match="did not answer"):
        embedder.embed(["a single text"])
    assert len(endpoint.requests) == 2, "tried twice, and not probed"


def test_one_replica_with_another_model_ends_the_run_and_rejects_no_text(endpoint: Endpoint) -> None:
    embedder = embedder_for(endpoint)

    def weather(number: int) -> Answer | None:
        endpoint.dimension = 16 if number % 2 else 12
        return None

    endpoint.weather = weather
    with pytest.raises(ModelError, match="must all have 16 dimensions"):
        embedder.embed(["a single text"])


@pytest.mark.parametrize("key", ["sk-planted\n", " sk-planted"])
def test_white_space_around_the_key_is_dropped(endpoint: Endpoint, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.key = "sk-planted"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert len(embedder_for(endpoint).embed(TEXTS[:3]).vectors) == 3


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-pla\nnted")
    with pytest.raises(ModelError, match="OPENAI_API_KEY must be printable ASCII") as caught:
        embedder_for(endpoint)
    assert "nted" not in str(caught.value)


def test_no_other_credentials_are_sent(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    embedder_for(endpoint).embed(TEXTS[:2])
    assert set(endpoint.credentials) == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    endpoint.credentials.clear()
    embedder_for(endpoint).embed(TEXTS[:2])
    assert set(endpoint.credentials) == {"Bearer sk-planted"}


def test_redirects_are_not_followed(endpoint: Endpoint) -> None:
    endpoint.weather = lambda number: Answer(307, "", {"Location": "http://elsewhere.invalid/v1/embeddings"})
    with pytest.raises(ModelError, match=r"redirects to 'http://elsewhere.invalid.*set EMBED_ENDPOINT"):
        embedder_for(endpoint)


def test_waiting_for_the_limit_does_not_count_as_trying(endpoint: Endpoint) -> None:
    """Three threads share one request per 0.3 s, and each may try for 0.2 s: a reset is retried all the same."""
    space = resolve_space(MODEL, endpoint=endpoint.url)
    options = EndpointOptions(concurrency=3, batch_texts=1, requests_per_minute=200, patience_seconds=0.2)
    embedder = LocalEmbedder(openai.load(space, EngineOptions(endpoint=options)), space.tokenizer, 256, 64)
    endpoint.requests.clear()
    endpoint.weather = lambda number: RESET if number == 1 else None
    assert not embedder.embed(TEXTS[:6]).rejected


def test_an_interrupt_ends_the_wait_for_a_server(endpoint: Endpoint) -> None:
    embedder = embedder_for(endpoint, patience=300)
    is_waiting = threading.Event()

    def weather(number: int) -> Answer:
        is_waiting.set()
        return Answer(429, "", {"Retry-After": "100"})

    class Interrupted(Exception):
        pass

    def interrupt(texts: int, tokens: int) -> None:
        if is_waiting.is_set():
            raise Interrupted

    endpoint.weather = weather
    started = time.monotonic()
    with pytest.raises(Interrupted):
        list(embedder.embed_windows([Window(TEXTS)], interrupt))
    assert time.monotonic() - started < 90, "less than the server asked for"


PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "tei": ("/info", {"model_id": "org/model", "model_sha": "abc", "max_client_batch_size": 32}),
    "vllm": ("/v1/models", {"data": [{"id": "other", "root": "x"}, {"id": "org/served", "root": "/models/m@1"}]}),
    "ollama": ("/api/tags", {"models": [{"name": "org/served:latest", "digest": "abc"}]}),
}


@pytest.mark.parametrize("kind", PAGES)
def test_the_servers_revision_is_part_of_the_space_and_its_address_is_not(endpoint: Endpoint, kind: str) -> None:
    space = resolve_space(MODEL, endpoint=endpoint.url)
    path, page = PAGES[kind]
    endpoint.pages[path] = page
    told = resolve_space(MODEL, endpoint=endpoint.url)
    assert told.fingerprint != space.fingerprint
    assert told.name.startswith("served-")
    with serving(Endpoint(pages=dict(endpoint.pages))) as elsewhere:
        assert resolve_space(MODEL, endpoint=elsewhere.url).fingerprint == told.fingerprint
    endpoint.pages[path] = json.loads(json.dumps(page).replace("abc", "def").replace("m@1", "m@2"))
    assert resolve_space(MODEL, endpoint=endpoint.url).fingerprint != told.fingerprint
    with pytest.raises(ModelError, match="restart it to embed with the new one"):
        openai.load(told, EngineOptions())
    assert resolve_space(MODEL, endpoint=endpoint.url, revision="mine").revision == "mine"


def test_a_server_that_is_down_has_the_revision_it_last_reported() -> None:
    with serving(Endpoint(pages=dict(PAGES.values()))) as endpoint:
        told = resolve_space(MODEL, endpoint=endpoint.url)
    assert resolve_space(MODEL, endpoint=endpoint.url).fingerprint == told.fingerprint
    with pytest.raises(ModelError, match="can't be asked which revision of 'org/other'"):
        resolve_space("openai:org/other", endpoint=endpoint.url)
    with pytest.raises(ModelError, match="can't be reached") as caught:
        openai.load(told, EngineOptions())
    assert caught.value.is_retryable


def test_chunks_can_be_measured_with_the_served_models_tokenizer(
    endpoint: Endpoint, sample_space: EmbeddingSpace
) -> None:
    space, words = resolve_space(f"{MODEL}+{SAMPLE_MODEL}", endpoint=endpoint.url), ["antidisestablishmentarianism"]
    assert space.tokenizer.count(words) == sample_space.tokenizer.count(words)
    assert (space.max_seq_length, space.tokenizer_hash) == (sample_space.max_seq_length, sample_space.tokenizer_hash)
    assert space.name.startswith("served-")
    assert space.fingerprint != resolve_space(MODEL, endpoint=endpoint.url).fingerprint


def test_a_served_model_needs_an_endpoint() -> None:
    with pytest.raises(SettingsError, match="got EMBED_MODEL='openai:org/served' and EMBED_ENDPOINT=''"):
        resolve_space(MODEL)


def test_rate_limits_space_requests_out() -> None:
    now, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    limiter = RateLimiter(requests_per_minute=60, tokens_per_minute=600, clock=lambda: now[0], sleep=sleep)
    for tokens in (1, 100, 1):
        limiter.wait(tokens)
    assert slept == [1.0, 10.0], "a second per request, a tenth of one per token"
    limiter.pause(30)
    limiter.wait(1)
    assert slept[-1] == 30.0


def story(project: Project, name: str, **settings: str) -> list[tuple[int, int, int]]:
    """Texts (embedded, reused, dropped) by each sync: new corpus, unchanged, edited, copied, deleted, restored."""
    project.set(SOURCE=f"landing/{name}", LAKE=f"lakes/{name}", CHUNK_TOKENS="64", **settings)
    counts: list[tuple[int, int, int]] = []
    for change in ("", "", "edit", "copy", "delete", "back"):
        if change in ("", "back"):
            project.write(f"{name}/a/try.md", topic("try"))
            project.write(f"{name}/b/while.md", topic("while"))
        elif change == "edit":
            project.write(f"{name}/a/try.md", topic("try") + "\n\nOne more paragraph.\n")
        elif change == "copy":
            project.write(f"{name}/a/copy.md", topic("try"))
        else:
            (project.landing / name / "b/while.md").unlink()
        done = project.sync()
        counts.append((done["embedded"], done["reused"], done["dropped"]))
    return counts


def test_syncs_reuse_vectors_as_with_a_local_model_and_survive_faults(project: Project) -> None:
    troubles = (RESET, Answer(429, "", {"Retry-After": "0.01"}), Answer(502))

    def weather(number: int) -> Answer | None:
        return troubles[number // 4 % 3] if number % 4 == 1 else None

    local = story(project, "local", MODEL="fake:16")
    with serving(Endpoint(weather=weather)) as endpoint:
        assert story(project, "served", MODEL=MODEL, ENDPOINT=endpoint.url, ENDPOINT_BATCH_TEXTS="4") == local
        rows = project.rows("text", "embedding")
        got = np.array([row["embedding"] for row in rows], np.float32)
        assert len(got) > 10 and np.allclose(got, expected(endpoint, [row["text"] for row in rows]), atol=1e-6)
        [best, *_] = project.json("search", rows[0]["text"])["results"]
        assert best["text"] == rows[0]["text"]


def test_a_partition_whose_requests_fail_is_left_to_the_next_run(project: Project) -> None:
    """The server starts to refuse everything: one partition fails, finished work is kept."""
    stop = threading.Event()
    with serving(Endpoint(weather=lambda number: Answer(400, "no") if stop.is_set() else None)) as endpoint:
        project.set(MODEL=MODEL, ENDPOINT=endpoint.url, CHUNK_TOKENS="64")
        project.write("a/try.md", topic("try"))
        project.sync()
        stop.set()
        project.write("b/while.md", topic("while"))
        failed = project.sync(exit_code=1)
        assert "refused the text: HTTP 400: no" in failed["partitions"]["b"]["error"]
        assert failed["partitions"]["a"]["state"] == "fresh"
        stop.clear()
        assert project.sync()["partitions"]["b"]["state"] == "materialized"


def test_planning_sends_nothing_to_the_server(project: Project) -> None:
    with serving(Endpoint()) as endpoint:
        project.set(MODEL=MODEL, ENDPOINT=endpoint.url)
        project.write("a/try.md", topic("try"))
        planned = project.json("plan", "--count")
        assert planned["chunks_to_embed"] > 0 and planned["estimated_seconds"] is None
        assert endpoint.requests == []


def test_refused_chunks_are_recorded_once(project: Project) -> None:
    """Embedding another chunk of the partition does not write the same rejections again."""
    with serving(Endpoint(refused="poison")) as endpoint:
        project.set(MODEL=MODEL, ENDPOINT=endpoint.url)
        project.write("a/bad.md", "A poison pill.")
        assert project.sync()["partitions"]["a"]["rejected_chunks"] == 1
        before = Snapshot(project.pipeline().lake).version(REJECTED)
        project.write("a/good.md", "Something else.")
        done = project.sync()["partitions"]["a"]
        assert (done["embedded"], done["rejected_chunks"]) == (1, 1)
        assert Snapshot(project.pipeline().lake).version(REJECTED) == before
