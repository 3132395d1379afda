"""An OpenAI-compatible embeddings server on loopback that can fail as real ones do."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from embed_assets.engine.providers.fake import FakeBackend
from embed_assets.engine.providers.fake import resolve as fake_space
from embed_assets.engine.space import ModelChoice

Weather = Callable[[int], "Answer | None"]
"""What happens to the request of that number, from 0; None: it is served."""


@dataclass(frozen=True)
class Answer:
    """A response other than vectors. Status 0 resets the connection."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


RESET = Answer(0)


@dataclass
class Endpoint:
    """The server's state; tests change it while it runs."""

    dimension: int = 16
    weather: Weather = lambda number: None
    pages: dict[str, Any] = field(default_factory=dict)
    """What GET answers, by path."""
    knows_base64: bool = True
    is_shuffled: bool = True
    key: str = ""
    most_texts: int = 64
    refused: str = ""
    """A text with this in it is refused."""
    url: str = ""
    requests: list[list[str]] = field(default_factory=list)
    """Texts of every request, also of those that failed."""
    served: list[str] = field(default_factory=list)
    credentials: list[str | None] = field(default_factory=list)
    """The Authorization header of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def vector(self, text: str) -> np.ndarray:
        """The model's vector of a text: float32, unit norm."""
        found = np.zeros((1, self.dimension), np.float32)
        backend = FakeBackend(fake_space(ModelChoice(f"fake:{self.dimension}@served")))
        backend.forward([text], None, _One(), found)  # type: ignore[arg-type]
        return np.asarray(found[0] / np.linalg.norm(found[0]), np.float32)

    def answer(self, body: dict[str, Any]) -> Answer:
        texts, encoding = body["input"], body["encoding_format"]
        with self.lock:
            number = len(self.requests)
            self.requests.append(texts)
        if (weather := self.weather(number)) is not None:
            return weather
        if encoding == "base64" and not self.knows_base64:
            return Answer(422, json.dumps({"detail": "encoding_format must be 'float'"}))
        if len(texts) > self.most_texts:
            return Answer(422, json.dumps({"message": f"batch size {len(texts)} > maximum {self.most_texts}"}))
        if self.refused and any(self.refused in text for text in texts):
            return Answer(400, json.dumps({"error": {"message": "maximum context length is 8 tokens"}}))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(self.vector(text), encoding)}
            for i, text in enumerate(texts)
        ]
        with self.lock:
            self.served += texts
        return Answer(200, json.dumps({"data": data[::-1] if self.is_shuffled else data, "model": body["model"]}))


class _One:
    rows = (0,)


def _encoded(vector: np.ndarray, encoding: str) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


@contextlib.contextmanager
def serving(endpoint: Endpoint | None = None) -> Iterator[Endpoint]:
    """Run a server on a free port until the end of the block."""
    endpoint = endpoint or Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            page = endpoint.pages.get(self.path)
            self._send(Answer(404, "{}") if page is None else Answer(200, json.dumps(page)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.credentials.append(self.headers["Authorization"])
            if endpoint.key and self.headers["Authorization"] != f"Bearer {endpoint.key}":
                self._send(Answer(401, '{"error": "Unauthorized"}'))
            elif self.path != "/v1/embeddings":
                self._send(Answer(404, "{}"))
            else:
                self._send(endpoint.answer(body))

        def _send(self, answer: Answer) -> None:
            if not answer.status:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            content = answer.body.encode()
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
