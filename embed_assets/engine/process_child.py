"""The child of `ModelProcess`: runs the model on the windows that its parent sends."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from embed_assets.arrow_startup import skip_pandas
from embed_assets.children import own_pipes, receive, send
from embed_assets.engine.backend import Window
from embed_assets.engine.engine import Engine
from embed_assets.engine.process import Result
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import TokenizedTexts


class _Child:
    """The child's side: the main thread runs the model, another one reads the parent's messages."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._requests, self._answers = requests, answers
        self._waiting: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._load_error: Exception | None = None
        self._folder = Path()

    def serve(self) -> None:
        """Work until the process ends, which it does with the parent."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        while True:
            kind, value = self._waiting.get()
            try:
                if kind == "load":
                    self._load(*value)
                elif kind == "tune":
                    self._tune(*value)
                elif kind == "window":
                    self._embed(value)
                elif kind == "end":  # of a partition without windows
                    self.answer("idle")
            except Exception as error:
                self.answer("error", _picklable(error))

    def answer(self, kind: str, value: object = None) -> None:
        """Send a message to the parent; from any thread."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            send(self._answers, pickle.dumps((kind, value)))

    def _read(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                kind, value = pickle.loads(receive(self._requests))
                if kind != "stop":
                    self._waiting.put((kind, value))
                elif self._engine is not None:
                    self._engine.embedder.stop()
        os._exit(0)  # the parent is gone, and nobody needs what is under way

    def _load(self, space: EmbeddingSpace, options: EngineOptions, folder: Path) -> None:
        self._folder = folder
        self._engine = Engine(space, options)
        try:
            _ = self._engine.embedder
        except Exception as error:  # nobody waits for it yet
            self._load_error = error

    def _tune(self, texts: list[str], expected: int) -> None:
        if self._load_error is not None:
            error, self._load_error = self._load_error, None  # the next time it is tried again
            raise error
        assert self._engine is not None
        self._engine.embedder_for(texts, expected)
        self.answer("info", self._engine.info)

    def _embed(self, first: Path) -> None:
        """Embed windows as they come, up to the parent's "end"."""
        engine = self._engine
        assert engine is not None
        is_ended = False

        def windows() -> Iterator[Window]:
            nonlocal is_ended
            yield _read_window(first)
            while not is_ended:
                kind, file = self._waiting.get()
                is_ended = kind != "window"
                if not is_ended:
                    yield _read_window(file)

        try:
            embedder = engine.embedder
            for done in embedder.embed_windows(windows(), lambda texts, tokens: self.answer("tick", (texts, tokens))):
                file = self._folder / f"{uuid.uuid4().hex}.npy"
                np.save(file, done.vectors)
                self.answer("result", Result(file, done.is_truncated, done.rejected, done.stats, engine.info))
        except Exception as error:
            self.answer("error", _picklable(error))
            while not is_ended:  # what the parent sent before it saw the error
                kind, file = self._waiting.get()
                is_ended = kind != "window"
                if not is_ended:
                    file.unlink()
        self.answer("idle")


def _read_window(file: Path) -> Window:
    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        batch = reader.get_batch(0)
        window = Window(batch.column("text").to_pylist(), (), TokenizedTexts.from_lists(batch.column("ids")))
    file.unlink()
    return window


class _LogToParent(logging.Handler):
    """Passes log records on to the parent."""

    def __init__(self, child: _Child) -> None:
        super().__init__(logging.INFO)
        self._child = child

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record's message."""
        self._child.answer("log", (record.name, record.levelno, record.getMessage()))


def _picklable(error: Exception) -> Exception:
    """The error, if the parent knows its type without the model's libraries; else a ``RuntimeError`` like it."""
    if type(error).__module__.split(".")[0] in ("builtins", "embed_assets"):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _main() -> None:
    """Run the child until its parent is gone."""
    skip_pandas()
    child = _Child(*own_pipes())
    logger = logging.getLogger("embed_assets")
    logger.addHandler(_LogToParent(child))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    child.serve()


if __name__ == "__main__":
    _main()
