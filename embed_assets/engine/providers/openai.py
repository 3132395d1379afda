"""``openai:<name>[+<MODEL>]``: a model behind an OpenAI-compatible embeddings endpoint, as Text Embeddings Inference,
vLLM, Infinity, Ollama and hosted services have. `<MODEL>`, if named, is one here whose tokenizer and limits it shares.

The key comes from the environment variable ``OPENAI_API_KEY`` alone, and none is needed where the server asks for none.
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
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from embed_assets.engine import remembered
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import find_directory
from embed_assets.engine.model_files import hash_tokenizer, max_seq_length_of, tokenizer_file
from embed_assets.engine.provider import EndpointOptions, EngineOptions
from embed_assets.engine.space import EmbeddingSpace, ModelChoice, truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts, word_tokenizer_json
from embed_assets.errors import EmbeddingError, ModelError, SettingsError
from embed_assets.records import hash_parts

_log = logging.getLogger(__name__)

libraries: Sequence[str] = ()
KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_WORDS = 256
"""Where the model's tokenizer is not here, words are counted instead: this many are seldom more than 512 tokens."""
_DEFAULT_BATCH_TEXTS = 32
"""What Text Embeddings Inference takes at most unless told otherwise; others take more."""
_TIMEOUT_SECONDS = (5.0, 600.0)
"""To connect, and between two bytes of an answer: what OpenAI's own client waits."""
_LONGEST_WAIT_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 120.0
"""What OpenAI's own client believes of a Retry-After header."""
_RETRYABLE = frozenset({408, 409, 424, 425, 429, 500, 502, 503, 504})
"""Statuses that pass: time-outs, overload, rate limits, and TEI's 424 for a device that failed."""
_ABOUT_THE_TEXT = frozenset({400, 413, 422})
"""Statuses by which servers refuse an input: too long, empty, too many at once."""
_QUOTA = "insufficient_quota"
"""Code of OpenAI's 429 that no waiting ends."""


@dataclass(frozen=True)
class EndpointSpace(EmbeddingSpace):
    """The space of a model on a server. Where the server is does not change a vector, so it is no part of it."""

    endpoint: str = field(kw_only=True, compare=False)
    """Base URL, as in ``http://localhost:8080/v1``."""
    served_name: str = field(kw_only=True)
    revision: str = field(kw_only=True)
    """What the server tells of the model it has, or EMBED_REVISION; empty where neither does."""
    is_revision_told: bool = field(kw_only=True, compare=False)
    """The revision is the server's word."""

    @property
    def table_name(self) -> str:
        """The served name: what comes after it only tells how texts are counted."""
        return self.served_name


def resolve(choice: ModelChoice) -> EndpointSpace:
    """The space of the served model. Asks the server which revision it has; if that can't be reached, what it said
    last counts. Raises ``SettingsError`` without EMBED_ENDPOINT, ``ModelError`` when the revision can't be told."""
    served_name, _, tokenizer_model = choice.model.removeprefix("openai:").partition("+")
    if not served_name or not choice.endpoint:
        raise SettingsError(
            f"a served model is openai:<name>[+<MODEL>] with EMBED_ENDPOINT, got EMBED_MODEL={choice.model!r} and "
            f"EMBED_ENDPOINT={choice.endpoint!r}; set both, as EMBED_ENDPOINT=http://localhost:8080/v1"
        )
    told = "" if choice.revision else _remembered_revision(choice.endpoint, served_name)
    revision = choice.revision or told
    common: dict[str, Any] = {
        "weights_hash": f"openai:{served_name}@{revision}",
        "modules_hash": "openai",
        "prompt": choice.prompt or "",
        "query_prompt": choice.query_prompt or "",
        "truncate_dim": choice.truncate_dim,
        "endpoint": choice.endpoint,
        "served_name": served_name,
        "revision": revision,
        "is_revision_told": bool(told),
    }
    if not tokenizer_model:
        words = word_tokenizer_json()
        return EndpointSpace(
            choice.model, tokenizer_hash="words", max_seq_length=_MAX_WORDS, tokenizer_json=words, **common
        )
    directory = find_directory(tokenizer_model, None, with_weights=False)
    return EndpointSpace(
        choice.model,
        tokenizer_hash=hash_tokenizer(directory),
        max_seq_length=max_seq_length_of(directory),
        tokenizer_json=tokenizer_file(directory).read_text("utf-8"),
        **common,
    )


def load(space: EmbeddingSpace, options: EngineOptions) -> EndpointBackend:
    """The server, once it has answered. Raises ``ModelError`` when it refuses, or has another model than before."""
    assert isinstance(space, EndpointSpace)
    server = Server(space.endpoint, space.served_name, options.endpoint)
    try:
        now = server.revision() if space.is_revision_told else space.revision
    except _Passing as error:
        raise ModelError(
            f"the endpoint {space.endpoint!r} can't be reached: {error}; start it, or correct EMBED_ENDPOINT",
            is_retryable=True,
        ) from error
    if now != space.revision:
        raise ModelError(
            f"the endpoint {space.endpoint!r} had {space.revision!r} of {space.served_name!r} when this process began, "
            f"and has {now!r} now; start again to embed with the new one"
        )
    return EndpointBackend(server, options.endpoint, space.truncate_dim)


class EndpointBackend:
    """Sends batches to the server, several at a time."""

    device = "endpoint"
    precision = "remote"
    name = "openai"
    cost = ModelCost()

    def __init__(self, server: Server, options: EndpointOptions, truncate_dim: int | None) -> None:
        self._server = server
        self._native_dimension = len(server.embed(["a"])[0])
        self.dimension = truncated_dimension(self._native_dimension, truncate_dim)
        most_texts = options.batch_texts or server.most_texts or _DEFAULT_BATCH_TEXTS
        self.layout = Layout(is_packed=True, max_rows=most_texts)
        self.workers = options.concurrency

    def enter_worker(self) -> None:
        """Nothing to prepare."""

    def new_buffer(self, rows: int) -> np.ndarray:
        """float32, shape (rows, dimension)."""
        return np.zeros((rows, self.dimension), dtype=np.float32)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        """One request for the batch's texts, whole: the server cuts what is too long for its model, or refuses it."""
        vectors = self._server.embed([texts[row] for row in batch.rows], batch.tokens)
        for vector in vectors:
            if len(vector) != self._native_dimension:
                raise ModelError(
                    f"the vectors of {self._server.name!r} must all have {self._native_dimension} dimensions, "
                    f"{self._server.url!r} gave one of {len(vector)}; check which models are behind it"
                )
        buffer[batch.rows] = np.stack(vectors)[:, : self.dimension]

    def fetch(self, buffer: np.ndarray) -> np.ndarray:
        """The buffer itself."""
        return buffer

    def usage(self) -> None:
        """There is no GPU here."""

    def release_memory(self) -> None:
        """It holds none."""


class Pace:
    """Keeps requests under limits per minute, and away from a server that asked for a pause. Thread-safe."""

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
        """Wait until a request of so many tokens may be sent."""
        cost = 60 / self._requests if self._requests else 0.0
        cost = max(cost, 60 * tokens / self._tokens if self._tokens else 0.0)
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)
            self._free_at = start + cost
        if start > now:
            self._sleep(start - now)

    def pause(self, seconds: float) -> None:
        """Send nothing for a while."""
        with self._lock:
            self._free_at = max(self._free_at, self._clock() + seconds)


class _Passing(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asked for; 0 if it did not."""


class Server:
    """The endpoint, over HTTP."""

    def __init__(self, url: str, name: str, options: EndpointOptions | None = None) -> None:
        options = options or EndpointOptions()
        self.url, self.name, self._patience_seconds = url.rstrip("/"), name, options.patience_seconds
        self._pace = Pace(options.requests_per_minute, options.tokens_per_minute)
        self._local = threading.local()
        self._encoding = "base64"  # a quarter of the bytes; servers that do not know it answer with lists
        self._retrying = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_delay(options.patience_seconds),
            wait=_wait,
            before_sleep=self._warn,
            reraise=True,
        )

    def embed(self, texts: Sequence[str], tokens: int = 0) -> list[np.ndarray]:
        """The texts' vectors in their order, float32 each. Requests that fail in passing are tried again.

        Raises ``ModelError`` when the server will not serve the model, ``EmbeddingError`` when it refuses the texts
        or is not to be reached.
        """
        try:
            return self._retrying.copy()(self._embed, texts, tokens)
        except _Passing as error:
            raise EmbeddingError(
                f"the endpoint {self.url!r} did not answer within {self._patience_seconds:.0f} s of trying: {error}; "
                "check EMBED_ENDPOINT and the server, and run again",
                is_retryable=True,
            ) from error

    def _warn(self, state: RetryCallState) -> None:
        _log.warning(
            "a request to %s failed and is tried again: %s", self.url, state.outcome and state.outcome.exception()
        )

    def revision(self) -> str:
        """What the server tells of the model it has, '' when it tells nothing: TEI its model and commit, vLLM the
        path it was loaded from, Ollama the digest of its files. Raises ``_Passing`` when it can't be reached."""
        for read in (self._tei_revision, self._vllm_revision, self._ollama_revision):
            if found := read():
                return found
        return ""

    @cached_property
    def most_texts(self) -> int | None:
        """How many texts TEI takes at a time; None for others."""
        with contextlib.suppress(_Passing, ValueError, TypeError):
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
        """The JSON object at a URL; empty where there is none. Raises ``_Passing`` when the server can't be reached."""
        try:
            response = self._session.get(url, timeout=_TIMEOUT_SECONDS[0])
        except requests.RequestException as error:
            raise _Passing(_reason(error)) from error
        if response.status_code in _RETRYABLE:
            raise _Passing(f"HTTP {response.status_code} for {url}")
        self._require_access(response)
        try:
            answer = response.json() if response.ok else {}
        except ValueError:
            answer = {}
        return answer if isinstance(answer, dict) else {}

    def _embed(self, texts: Sequence[str], tokens: int) -> list[np.ndarray]:
        self._pace.wait(tokens)
        body = {"model": self.name, "input": list(texts), "encoding_format": self._encoding}
        try:
            response = self._session.post(f"{self.url}/embeddings", json=body, timeout=_TIMEOUT_SECONDS)
        except requests.RequestException as error:
            raise _Passing(_reason(error)) from error
        if response.status_code in _ABOUT_THE_TEXT and self._encoding == "base64" and "encoding" in response.text:
            self._encoding = "float"
            return self._embed(texts, tokens)
        self._require_success(response)
        try:
            return _vectors(response.json(), len(texts))
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise _Passing(f"an answer that is none of an embeddings endpoint ({_reason(error)})") from error

    def _require_success(self, response: requests.Response) -> None:
        if response.ok:
            return
        problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300] or response.reason}"
        self._require_access(response)
        if response.status_code == 429 and _QUOTA in response.text:
            raise ModelError(f"the endpoint {self.url!r} has no quota left for the key in {KEY_VARIABLE}: {problem}")
        if response.status_code in _RETRYABLE:
            seconds = _retry_after(response.headers)
            if response.status_code in (429, 503):
                self._pace.pause(seconds)  # for the other requests that are about to be sent
            raise _Passing(problem, seconds)
        if response.status_code in _ABOUT_THE_TEXT:
            raise EmbeddingError(f"the endpoint {self.url!r} refused it: {problem}; change the text or EMBED_ENDPOINT")
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
        """A session per thread: they keep connections open, and are not made to be shared."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            if key := os.environ.get(KEY_VARIABLE):
                self._local.session.headers["Authorization"] = f"Bearer {key}"
        session: requests.Session = self._local.session
        return session


def _remembered_revision(endpoint: str, name: str) -> str:
    """What the server tells of its model now, or what it told last when it can't be reached."""
    place = hash_parts((endpoint.rstrip("/"), name))
    try:
        revision = Server(endpoint, name).revision()
    except _Passing as error:
        known = remembered.recall("endpoints", place)
        if known is None:
            raise ModelError(
                f"the endpoint {endpoint!r} can't be asked which revision of {name!r} it has: {error}; start it, or "
                "set EMBED_REVISION"
            ) from error
        return known
    remembered.keep("endpoints", place, revision)
    return revision


def _vectors(answer: Mapping[str, Any], count: int) -> list[np.ndarray]:
    """The vectors of an answer, in the order of the texts. Raises ``ValueError`` when they are not one per text."""
    items = sorted(answer["data"], key=lambda item: int(item["index"]))
    if [int(item["index"]) for item in items] != list(range(count)):
        raise ValueError(f"{len(items)} vectors for {count} texts")
    return [_vector(item["embedding"]) for item in items]


def _vector(value: str | Sequence[float]) -> np.ndarray:
    """From base64 of little-endian float32, or a list."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.asarray(value, dtype=np.float32)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, 0 if it does not say: milliseconds as Azure has them, or seconds."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return min(_LONGEST_RETRY_AFTER_SECONDS, max(0.0, float(headers[name]) * unit))
    return 0.0


_backoff = wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_SECONDS)


def _wait(state: RetryCallState) -> float:
    """As long as the server asked for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome else None
    return (isinstance(error, _Passing) and error.retry_after) or _backoff(state)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
