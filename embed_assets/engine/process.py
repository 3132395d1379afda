"""The model in a process of its own, which does nothing but run it.

    windows ─▶ Arrow file ─▶ child: LocalEmbedder ─▶ file of vectors ─▶ results

In one process, threads that read, join and commit hold Python's lock while the device's thread waits to launch its next
kernel: a forward pass of a small model took 3.5 times as long beside chunking. Also, the libraries of the model load
while the parent loads Dagster.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
import subprocess
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embed_assets.children import how_it_ended, receive, send, start_child
from embed_assets.engine.backend import EmbeddedWindow, OnTick, Window
from embed_assets.engine.embedder import WINDOWS_IN_FLIGHT
from embed_assets.engine.engine import EngineInfo, configured
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import token_lists
from embed_assets.errors import EmbeddingError
from embed_assets.scratch import ScratchFolder, scratch_errors

SENT = pa.schema([("text", pa.string()), ("ids", pa.list_(pa.int32()))])
"""A window: its texts and, if they are known, their token ids."""


@dataclass(frozen=True, slots=True)
class Result:
    """Results of a window, as the child sends them."""

    file: Path
    """NumPy's file of the vectors; the parent deletes it."""
    is_truncated: np.ndarray
    rejected: dict[int, str]
    stats: EngineStats
    info: EngineInfo


class ModelProcess:
    """A child process with a space's model. It starts with `start` or the first use, and again after it died."""

    def __init__(self, space: EmbeddingSpace, options: EngineOptions) -> None:
        self._space, self._options = space, options
        self._folder = ScratchFolder()
        weakref.finalize(self, self._folder.close)
        self._process: subprocess.Popen[bytes] | None = None
        self._info: EngineInfo | None = None
        self._lock = threading.Lock()

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs; until it is loaded, as configured."""
        return self._info or configured(self._options)

    @property
    def dimension(self) -> int:
        """Length of a vector; 0 until the model is loaded."""
        return self.info.dimension

    def start(self) -> None:
        """Start the process and load the model there. Returns without waiting."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = start_child("embed_assets.engine.process_child")
                self._info = None
                weakref.finalize(self, _end, self._process)
                self._send("load", (self._space, self._options, self._folder.path))

    def load(self, texts: Sequence[str], expected: int) -> None:
        """Wait until the model is loaded and, if `expected` texts like `texts` justify it, tuned.

        Raises ``ModelError`` or ``SettingsError`` when it can't be loaded.
        """
        self.start()
        self._send("tune", (list(texts), expected))
        kind, value = self._receive()
        assert kind == "info", kind
        self._info = value

    def embed_windows(
        self, windows: Iterable[Window], on_tick: OnTick = lambda texts, tokens: None
    ) -> Iterator[EmbeddedWindow]:
        """As `LocalEmbedder.embed_windows`. Raises ``EmbeddingError`` if the process dies; the next use restarts it."""
        in_flight: deque[Window] = deque()
        is_ended = False
        try:
            for window in windows:
                self._send("window", self._written(window))
                in_flight.append(window)
                if len(in_flight) == WINDOWS_IN_FLIGHT:
                    yield self._result(in_flight.popleft(), on_tick)
            self._send("end")
            is_ended = True
            while in_flight:
                yield self._result(in_flight.popleft(), on_tick)
            self._wait_until_idle()
        except (Exception, GeneratorExit):
            self._abandon(is_ended)
            raise
        except BaseException:
            self.close()  # an interrupt may have cut a message in two
            raise

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _result(self, window: Window, on_tick: OnTick) -> EmbeddedWindow:
        while True:
            kind, value = self._receive()
            if kind == "tick":
                on_tick(*value)
                continue
            assert kind == "result", kind
            self._info = value.info
            with scratch_errors():
                vectors = np.load(value.file)
                value.file.unlink()
            return EmbeddedWindow(window, vectors, value.is_truncated, value.rejected, value.stats)

    def _written(self, window: Window) -> Path:
        file = self._folder.path / f"{uuid.uuid4().hex}.window"
        ids = token_lists(window.tokens, len(window.texts))
        batch = pa.RecordBatch.from_arrays([pa.array(window.texts, pa.string()), ids], schema=SENT)
        with scratch_errors(), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SENT) as writer:
            writer.write_batch(batch)
        return file

    def _send(self, kind: str, value: object = None) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receiving tells why it ended
            send(process.stdin, pickle.dumps((kind, value)))

    def _receive(self) -> tuple[str, Any]:
        """The next message. Raises what the child raised."""
        kind, value = self._message()
        if kind == "error":
            raise value
        return kind, value

    def _message(self) -> tuple[str, Any]:
        """The next message, errors included; passes the child's log on. Raises ``EmbeddingError`` if it died."""
        process = self._process
        assert process is not None and process.stdout is not None
        while True:
            try:
                kind, value = pickle.loads(receive(process.stdout))
            except EOFError:
                raise EmbeddingError(_why(process), is_retryable=True) from None
            if kind != "log":
                return str(kind), value
            name, level, message = value
            logging.getLogger(name).log(level, "%s", message)

    def _wait_until_idle(self) -> None:
        """Ignore all messages but "idle"."""
        while (message := self._message())[0] != "idle":
            if message[0] == "result":
                message[1].file.unlink()

    def _abandon(self, is_ended: bool) -> None:
        """Stop what is under way after the current batch. If that fails, the process ends."""
        self._send("stop")
        if not is_ended:
            self._send("end")
        try:
            self._wait_until_idle()
        except EmbeddingError:  # it died, and the caller's error is under way already
            self.close()


def _why(process: subprocess.Popen[bytes]) -> str:
    how = how_it_ended(process)
    guess = ", perhaps for lack of memory" if process.returncode == -signal.SIGKILL else ""
    return f"the process that runs the model ended with {how}{guess}; finished windows are kept: run again"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError, ValueError):
        process.communicate()
