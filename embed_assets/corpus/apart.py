"""Parsing HTML, PDF and Word in a process of its own, with limits on its time and memory.

A document of a few kilobytes can stand for gigabytes, or for hours, and the libraries that read these formats can't
always tell. Here that costs one process, which is started again, and the document is rejected.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO

from embed_assets.corpus.formats import FORMATS, MissingExtra
from embed_assets.corpus.items import BadRow
from embed_assets.errors import SourceError

CPU_SECONDS = 60
"""Of the machine's time for one document; 20 MB of HTML take five."""
MEMORY_BYTES = 2 << 30
"""Of addresses, the interpreter and its libraries included."""
_WALL_SECONDS = 900.0
"""When neither limit is reached, but nothing moves."""
_SIZE = struct.Struct("<Q")


class ParserProcess:
    """A process that parses one document after the other, started when the first one comes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def parse(self, ending: str, data: bytes) -> tuple[str, str]:
        """(text, title) of a document.

        Raises ``BadRow.Error`` or ``MissingExtra``; ``SourceError`` when the process fails for reasons of its own.
        """
        with self._lock:
            for is_last in (False, True):
                try:
                    answer, text = self._exchange(ending, data)
                    break
                except _Died as died:
                    # Something else may have killed it: the document is to blame if it happens again.
                    if died.is_limit or is_last:
                        raise BadRow.Error("too_costly", str(died)) from None
        kind, *details = json.loads(answer)
        if kind == "parsed":
            return text.decode("utf-8", "surrogatepass"), details[0]
        if kind == "missing":
            raise MissingExtra(details[0])
        raise BadRow.Error(*details)

    def _exchange(self, ending: str, data: bytes) -> tuple[bytes, bytes]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(_WALL_SECONDS, process.kill)
        watchdog.start()
        try:
            _send(process.stdin, ending.encode(), data)
            return _receive(process.stdout), _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            raise _Died.of(process) from None
        except BaseException:
            self.close()  # what it would still answer must not be taken for the next document's
            raise
        finally:
            watchdog.cancel()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "embed_assets.corpus.apart"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is for this process to handle
            )
            assert self._process.stdout is not None
            try:
                _receive(self._process.stdout)
            except EOFError:
                status = self._process.wait()
                raise SourceError(
                    f"the process that reads HTML, PDF and Word ended with status {status} before its first document; "
                    "see what 'python -m embed_assets.corpus.apart' says",
                    is_retryable=True,
                ) from None
        return self._process


parser_process = ParserProcess()
"""The one of this process."""
atexit.register(parser_process.close)


class _Died(Exception):
    """The process ended while it worked on a document."""

    def __init__(self, message: str, is_limit: bool) -> None:
        super().__init__(message)
        self.is_limit = is_limit
        """One of ours, that is, and not something from outside."""

    @classmethod
    def of(cls, process: subprocess.Popen[bytes]) -> _Died:
        """The cause of the process's death."""
        status = process.wait()
        if sys.platform != "win32" and status == -signal.SIGXCPU:
            return cls(f"reading it took more than {CPU_SECONDS} seconds; split or simplify it", True)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        limit = f"perhaps over {MEMORY_BYTES >> 30} GB of memory"
        return cls(f"reading it ended the parser with {how}, {limit}; split it", status == -signal.SIGABRT)


def _send(stream: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        stream.write(_SIZE.pack(len(part)))
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    [size] = _SIZE.unpack(head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _parse(ending: str, data: bytes) -> tuple[list[str], bytes]:
    """What is answered: how it went with details, and the text."""
    try:
        text, title = FORMATS[ending][1](data)
    except MissingExtra:
        return ["missing", ending], b""
    except BadRow.Error as error:
        return ["bad", error.row.reason, error.row.detail], b""
    except MemoryError:
        return ["bad", "too_costly", f"reading it took more than {MEMORY_BYTES >> 30} GB of memory; split it"], b""
    except Exception as error:
        return ["bad", "broken_file", f"it could not be parsed: {type(error).__name__}: {error}"], b""
    return ["parsed", title], text.encode("utf-8", "surrogatepass")


def _serve() -> None:
    """In the process: parse until nothing more comes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _send(answers, b"ready")
    while True:
        try:
            ending, data = _receive(requests).decode(), _receive(requests)
        except EOFError:
            return
        _limit()
        answer, text = _parse(ending, data)
        del data
        _send(answers, json.dumps(answer).encode(), text)


def _limit() -> None:
    """For the next document, as far as the system knows limits."""
    with contextlib.suppress(ImportError):
        import resource

        seconds = int(time.process_time()) + CPU_SECONDS + 1
        for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    _serve()
