"""``openai:<name>[+<MODEL>]``: a model behind an OpenAI-compatible embeddings endpoint.

Text Embeddings Inference (TEI), vLLM, Infinity, Ollama and hosted services offer one. `<MODEL>` is optional: a model
with the same tokenizer and maximum length, whose files are on this machine or the Hub. The key is read only from the
environment variable ``OPENAI_API_KEY``; a server that requires none needs none.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from embed_assets.engine import user_cache
from embed_assets.engine.backend import Fetched
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import TokenizerFiles
from embed_assets.engine.provider import EndpointOptions, EngineOptions
from embed_assets.engine.space import EmbeddingSpace, ModelChoice, truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import EmbeddingError, ModelError, SettingsError, hide_secrets
from embed_assets.records import hash_parts

_log = logging.getLogger(__name__)

libraries: Sequence[str] = ()
"""Empty: the server runs the models, so there is nothing to tune here."""
KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_WORDS = 256
"""Maximum length in words, which are counted when no tokenizer is named: rarely more than 512 tokens."""
_DEFAULT_BATCH_TEXTS = 32
"""Texts per request: TEI's default maximum. Other servers accept more."""
_TIMEOUT_SECONDS = (5.0, 120.0)
"""Timeouts to connect, and between two bytes of a response. A server on one CPU core took 8 s for 32 long chunks of
all-MiniLM-L6-v2; shorter would cut off larger models there, longer would hide a server that hangs."""
_MAX_WAIT_SECONDS = 30.0
"""Longest backoff between two tries, so that a server that recovers is used again within half a minute."""
_MAX_RETRY_AFTER_SECONDS = 120.0
"""Longest wait that a Retry-After header can ask for. Rate limits are per minute; a longer wait would only stall."""
_RETRYABLE = frozenset({408, 409, 424, 425, 429, 500, 502, 503, 504})
"""Statuses of transient failures: timeouts, overload, rate limits, and TEI's 424 for a failed device."""
_INPUT_REFUSED = frozenset({400, 413, 422})
"""Statuses with which servers refuse an input: too long, empty, or too many texts."""
_QUOTA_CODE = "insufficient_quota"
"""Error code of the 429 that OpenAI sends when the quota is used up. Retrying does not help."""


@dataclass(frozen=True)
class EndpointSpace(EmbeddingSpace):
    """The space of a model on a server. The server's address changes no vector, so it is not part of the space."""

    endpoint: str = field(kw_only=True, compare=False)
    """Base URL, as in ``http://localhost:8080/v1``."""
    served_name: str = field(kw_only=True)
    """The model's name on the server."""
    revision: str = field(kw_only=True)
    """EMBED_REVISION, or what the server reports about its model; empty if there is neither."""
    is_revision_reported: bool = field(kw_only=True, compare=False)
    """Whether the revision was reported by the server."""

    @property
    def is_remote(self) -> bool:
        """Always true."""
        return True

    @property
    def table_name(self) -> str:
        """The served name. The tokenizer's model that may follow it in the setting is left out."""
        return self.served_name


def resolve(choice: ModelChoice) -> EndpointSpace:
    """The space of the served model.

    Unless EMBED_REVISION is set, the server is asked for the model's revision. If it can't be reached, the revision it
    last reported is used. Raises ``SettingsError`` without EMBED_ENDPOINT, ``ModelError`` when the revision is unknown.
    """
    served_name, _, tokenizer_model = choice.model.removeprefix("openai:").partition("+")
    if not served_name or not choice.endpoint:
        raise SettingsError(
            f"a served model is openai:<name>[+<MODEL>] with EMBED_ENDPOINT, got EMBED_MODEL={choice.model!r} and "
            f"EMBED_ENDPOINT={choice.endpoint!r}; set both, as EMBED_ENDPOINT=http://localhost:8080/v1"
        )
    reported = "" if choice.revision else _reported_revision(choice.endpoint, served_name)
    revision = choice.revision or reported
    files = TokenizerFiles.of(tokenizer_model, _MAX_WORDS)
    return EndpointSpace(
        choice.model,
        weights_hash=f"openai:{served_name}@{revision}",
        tokenizer_hash=files.hash,
        modules_hash="openai",
        max_seq_length=files.max_seq_length,
        prompt=choice.prompt or "",
        query_prompt=choice.query_prompt or "",
        truncate_dim=choice.truncate_dim,
        tokenizer_json=files.description,
        endpoint=choice.endpoint,
        served_name=served_name,
        revision=revision,
        is_revision_reported=bool(reported),
    )


def load(space: EmbeddingSpace, options: EngineOptions) -> EndpointBackend:
    """A backend over the server, once it has answered.

    Raises ``ModelError`` when it can't be reached (retryable), refuses, or serves another revision than at the start.
    """
    assert isinstance(space, EndpointSpace)
    server = Server(space.endpoint, space.served_name, options.endpoint)
    try:
        now = server.revision() if space.is_revision_reported else space.revision
    except TransientError as error:
        raise ModelError(
            f"the endpoint {space.endpoint!r} can't be reached: {error}; start it, or correct EMBED_ENDPOINT",
            is_retryable=True,
        ) from error
    if now != space.revision:
        raise ModelError(
            f"the endpoint {space.endpoint!r} had {space.revision!r} of {space.served_name!r} when this process began, "
            f"and has {now!r} now; restart it to embed with the new one"
        )
    return EndpointBackend(server, options.endpoint, space.truncate_dim)


class EndpointBackend:
    """Sends each batch to the server in one request, several at a time."""

    device = "endpoint"
    precision = "remote"
    name = "openai"
    cost = ModelCost()

    def __init__(self, server: Server, options: EndpointOptions, truncate_dim: int | None) -> None:
        self._server = server
        self._native_dimension = len(server.embed(["a"])[0])
        self.dimension = truncated_dimension(self._native_dimension, truncate_dim)
        max_texts = options.batch_texts or server.max_texts or _DEFAULT_BATCH_TEXTS
        self.layout = Layout(is_packed=True, max_rows=max_texts)
        self.workers = options.concurrency

    def stop_on(self, event: threading.Event) -> None:
        """Let waits for the server end when the event is set; a request under way still takes its time."""
        self._server.stop = event

    def enter_worker(self) -> None:
        """Does nothing: there is nothing to prepare."""

    def new_buffer(self, rows: int) -> np.ndarray:
        """Zeros: float32, shape (rows, dimension)."""
        return np.zeros((rows, self.dimension), dtype=np.float32)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        """Embed a batch in one request and write its vectors to its rows of `buffer`.

        Texts are sent in full; the server truncates or refuses those that are too long. Raises ``ModelError`` for a
        vector of another length, and what `Server.embed` raises.
        """
        vectors = self._server.embed([texts[row] for row in batch.rows], batch.tokens)
        for vector in vectors:
            if len(vector) != self._native_dimension:
                raise ModelError(
                    f"the vectors of {self._server.name!r} must all have {self._native_dimension} dimensions, "
                    f"{self._server.url!r} gave one of {len(vector)}; check which models are behind it"
                )
        buffer[batch.rows] = np.stack(vectors)[:, : self.dimension]

    def fetch(self, buffer: np.ndarray) -> Fetched:
        """The vectors in the buffer, scaled to unit length."""
        return Fetched.normalized(buffer)

    def usage(self) -> None:
        """Always None: there is no GPU on this machine."""

    def release_memory(self) -> None:
        """Does nothing: it holds no device memory."""


class RateLimiter:
    """Keeps requests under rate limits per minute, and pauses them when the server asks for it. Thread-safe."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._requests, self._tokens, self._clock, self._sleep = requests_per_minute, tokens_per_minute, clock, sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Block until a request of so many tokens may be sent."""
        cost = 60 / self._requests if self._requests else 0.0
        cost = max(cost, 60 * tokens / self._tokens if self._tokens else 0.0)
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)
            self._free_at = start + cost
        if start > now:
            self._sleep(start - now)

    def pause(self, seconds: float) -> None:
        """Hold back all requests for so many seconds."""
        with self._lock:
            self._free_at = max(self._free_at, self._clock() + seconds)


class TransientError(Exception):
    """A request failed in a way that a retry may fix."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asked to wait; 0 if it did not."""


class Server:
    """HTTP client of an endpoint. Thread-safe."""

    def __init__(self, url: str, name: str, options: EndpointOptions | None = None) -> None:
        options = options or EndpointOptions()
        self.url, self.name, self._patience_seconds = url.rstrip("/"), name, options.patience_seconds
        self.stop = threading.Event()
        """No request waits or is retried once it is set."""
        self._limiter = RateLimiter(options.requests_per_minute, options.tokens_per_minute, sleep=self._sleep)
        self._local = threading.local()
        self._encoding = "base64"  # about a quarter of the bytes of lists, which servers without base64 send
        self._retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=self._has_tried_enough,
            sleep=self._sleep,
            wait=_wait,
            before_sleep=self._warn,
            reraise=True,
        )

    def embed(self, texts: Sequence[str], tokens: int = 0) -> list[np.ndarray]:
        """The vectors of the texts in their order, float32 each. Transient failures are retried.

        Raises ``ModelError`` when the server does not serve the model, refuses access or (retryable) can't be reached,
        ``EmbeddingError`` when it refuses the texts.
        """
        self._limiter.wait(tokens)  # does not count as trying
        if self.stop.is_set():
            raise EmbeddingError("embedding was stopped before the request was sent; start it again")
        try:
            return self._retrying.copy()(self._embed, texts)
        except TransientError as error:
            raise ModelError(
                f"the endpoint {self.url!r} did not answer within {self._patience_seconds:.0f} s of trying: {error}; "
                "check EMBED_ENDPOINT and the server, and run again",
                is_retryable=True,
            ) from error

    def _sleep(self, seconds: float) -> None:
        self.stop.wait(seconds)

    def _has_tried_enough(self, state: RetryCallState) -> bool:
        """Twice at least: a single request may take longer than the patience lasts."""
        is_over = (state.seconds_since_start or 0.0) >= self._patience_seconds and state.attempt_number > 1
        return is_over or self.stop.is_set()

    def _warn(self, state: RetryCallState) -> None:
        _log.warning("a request to %s failed, retrying it: %s", self.url, state.outcome and state.outcome.exception())

    def revision(self) -> str:
        """What the server reports about its model; empty when it reports nothing.

        TEI reports model and commit, vLLM the path it was loaded from, Ollama the digest of its files. Raises
        ``TransientError`` when the server can't be reached, ``ModelError`` when it refuses access.
        """
        for read in (self._tei_revision, self._vllm_revision, self._ollama_revision):
            if found := read():
                return found
        return ""

    @cached_property
    def max_texts(self) -> int | None:
        """Maximum texts per request that TEI reports; None for other servers."""
        with contextlib.suppress(TransientError, ValueError, TypeError):
            return int(self._info["max_client_batch_size"]) if "max_client_batch_size" in self._info else None
        return None

    @cached_property
    def _info(self) -> Mapping[str, Any]:
        return self._get(f"{self.url.removesuffix('/v1')}/info")

    def _tei_revision(self) -> str:
        found = (str(self._info.get(name) or "") for name in ("model_id", "model_sha"))
        return "@".join(filter(None, found))

    def _vllm_revision(self) -> str:
        models = self._get(f"{self.url}/models").get("data")
        roots = [m.get("root") for m in models or () if isinstance(m, dict) and m.get("id") == self.name]
        return str(roots[0]) if roots and roots[0] else ""

    def _ollama_revision(self) -> str:
        models = self._get(f"{self.url.removesuffix('/v1')}/api/tags").get("models")
        names = {self.name, f"{self.name}:latest"}
        digests = [m.get("digest") for m in models or () if isinstance(m, dict) and m.get("name") in names]
        return str(digests[0]) if digests and digests[0] else ""

    def _get(self, url: str) -> Mapping[str, Any]:
        """The JSON object at a URL; empty where there is none.

        Raises ``TransientError`` when the server can't be reached, ``ModelError`` when it refuses access.
        """
        try:
            response = self._session.get(url, timeout=_TIMEOUT_SECONDS[0], allow_redirects=False)
        except requests.RequestException as error:
            raise TransientError(_reason(error)) from error
        if response.status_code in _RETRYABLE:
            raise TransientError(f"HTTP {response.status_code} for {url}")
        self._require_access(response)
        try:
            answer = response.json() if response.ok else {}
        except ValueError:
            answer = {}
        return answer if isinstance(answer, dict) else {}

    def _embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        body = {"model": self.name, "input": list(texts), "encoding_format": self._encoding}
        try:
            response = self._session.post(
                f"{self.url}/embeddings", json=body, timeout=_TIMEOUT_SECONDS, allow_redirects=False
            )
        except requests.RequestException as error:
            raise TransientError(_reason(error)) from error
        if response.status_code in _INPUT_REFUSED and self._encoding == "base64" and "encoding" in response.text:
            self._encoding = "float"
            return self._embed(texts)
        self._require_success(response)
        try:
            return _vectors(response.json(), len(texts))
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise TransientError(f"the response is not that of an embeddings endpoint ({_reason(error)})") from error

    def _require_success(self, response: requests.Response) -> None:
        if response.is_redirect:  # followed, the key could go to another host
            raise ModelError(
                f"the endpoint {self.url!r} redirects to {response.headers['location']!r}; set EMBED_ENDPOINT to the "
                "base URL that answers"
            )
        if response.ok:
            return
        problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300] or response.reason}"
        self._require_access(response)
        if response.status_code == 429 and _QUOTA_CODE in response.text:
            raise ModelError(f"the endpoint {self.url!r} has no quota left for the key in {KEY_VARIABLE}: {problem}")
        if response.status_code in _RETRYABLE:
            seconds = _retry_after(response.headers)
            if response.status_code in (429, 503):
                self._limiter.pause(seconds)  # holds back the other threads' requests too
            raise TransientError(problem, seconds)
        if response.status_code in _INPUT_REFUSED:
            raise EmbeddingError(f"the endpoint {self.url!r} refused the text: {problem}; change it or EMBED_ENDPOINT")
        raise ModelError(
            f"the endpoint {self.url!r} does not serve {self.name!r}: {problem}; set EMBED_MODEL or EMBED_ENDPOINT"
        )

    def _require_access(self, response: requests.Response) -> None:
        if response.status_code in (401, 403):
            state = "is set" if os.environ.get(KEY_VARIABLE) else "is not set"
            raise ModelError(
                f"the endpoint {self.url!r} refuses access (HTTP {response.status_code}), and {KEY_VARIABLE} {state}; "
                f"put its key into {KEY_VARIABLE}"
            )

    @property
    def _session(self) -> requests.Session:
        """The thread's own session: sessions keep connections open, but are not thread-safe."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.auth = _Bearer(_key())
        session: requests.Session = self._local.session
        return session


class _Bearer(requests.auth.AuthBase):
    """Sends the key, or none. Without an authentication of its own a session would send what ~/.netrc has."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _key() -> str:
    """The key in the environment, '' without one. Raises ``ModelError`` when it can't be sent in a header."""
    key = os.environ.get(KEY_VARIABLE, "").strip()  # secrets from files end with a line break
    if not (key.isascii() and key.isprintable()):
        raise ModelError(f"{KEY_VARIABLE} must be printable ASCII, it has other characters; set it again")
    return key


def _reported_revision(endpoint: str, name: str) -> str:
    """The revision that the server reports for its model; the one it last reported when it can't be reached.

    Raises ``ModelError`` when it can't be reached and has reported none before.
    """
    place = hash_parts((endpoint.rstrip("/"), name))
    try:
        revision = Server(endpoint, name).revision()
    except TransientError as error:
        known = user_cache.read("endpoints", place)
        if known is None:
            raise ModelError(
                f"the endpoint {endpoint!r} can't be asked which revision of {name!r} it has: {error}; start it, or "
                "set EMBED_REVISION"
            ) from error
        return known
    user_cache.write("endpoints", place, revision)
    return revision


def _vectors(answer: Mapping[str, Any], count: int) -> list[np.ndarray]:
    """The vectors in a response, in the order of the texts. Raises ``ValueError`` when there is not one per text."""
    items = sorted(answer["data"], key=lambda item: int(item["index"]))
    if [int(item["index"]) for item in items] != list(range(count)):
        raise ValueError(f"{len(items)} vectors for {count} texts")
    return [_vector(item["embedding"]) for item in items]


def _vector(value: str | Sequence[float]) -> np.ndarray:
    """A float32 vector, decoded from base64 of little-endian float32 or taken from a list."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.asarray(value, dtype=np.float32)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, by Azure's header in milliseconds or the standard one; 0 without them."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return min(_MAX_RETRY_AFTER_SECONDS, max(0.0, float(headers[name]) * unit))
    return 0.0


_backoff = wait_random_exponential(multiplier=0.5, max=_MAX_WAIT_SECONDS)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: as long as the server asked for, otherwise exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    return (isinstance(error, TransientError) and error.retry_after) or _backoff(state)


def _reason(error: Exception) -> str:
    """Type and message of an error on one line of at most 300 characters."""
    return hide_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
