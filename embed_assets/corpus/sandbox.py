"""Parses whole files, such as PDF and Word, in a sandbox: a child process with limits on its CPU time and memory.

A document of a few kilobytes can expand to gigabytes or take hours, and the libraries that read these formats can't
always tell in advance. In the sandbox that costs one process, which is started again, and the document is rejected.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

from embed_assets.children import how_it_ended, own_pipes, receive, send, start_child
from embed_assets.corpus.formats.parsed import MissingExtra, Parsed
from embed_assets.corpus.formats.registry import FORMATS
from embed_assets.corpus.items import BadRow
from embed_assets.errors import SourceError

CPU_SECONDS = 60
"""CPU time for one document. 20 MB of HTML take five seconds, so this rejects only documents that blow up."""
MEMORY_BYTES = 2 << 30
"""Address space of the process, interpreter and libraries included. A higher limit parses heavier documents, but risks
the host's memory, once per process that parses."""
_WALL_SECONDS = 900.0
"""Elapsed time for one document, for a parser that hangs without using CPU. Generous: a busy host slows any parser."""


class ParserProcess:
    """A child process that parses one document at a time; it starts with the first one. Safe to share by threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def parse(self, suffix: str, data: bytes) -> Parsed:
        """The document, given its file name suffix and content.

        Raises ``BadRow.Error`` when the document can't be parsed or exceeds a limit, ``MissingExtra`` when the parser
        is not installed, and ``SourceError`` when the process can't start.
        """
        with self._lock:
            for is_last_attempt in (False, True):
                try:
                    answer, text = self._exchange(suffix, data)
                    break
                except _ProcessDied as died:
                    # Something else may have killed the process: only a second death in a row blames the document.
                    if died.hit_limit or is_last_attempt:
                        raise BadRow.Error("too_costly", str(died)) from None
        kind, *details = json.loads(answer)
        if kind == "parsed":
            title, media_type, metadata, page_starts, lost, properties = details
            rows = tuple(BadRow(*row) for row in lost)
            whole = text.decode("utf-8", "surrogatepass")
            return Parsed(whole, title, media_type, metadata, tuple(page_starts), rows, properties)
        if kind == "missing":
            raise MissingExtra(*details)
        raise BadRow.Error(*details)

    def _exchange(self, suffix: str, data: bytes) -> tuple[bytes, bytes]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(_WALL_SECONDS, process.kill)
        watchdog.start()
        try:
            send(process.stdin, suffix.encode(), data)
            return receive(process.stdout), receive(process.stdout)
        except (BrokenPipeError, EOFError):
            raise _ProcessDied.diagnose(process) from None
        except BaseException:
            self.close()  # a late answer must not be mistaken for the next document's
            raise
        finally:
            watchdog.cancel()

    def close(self) -> None:
        """Kill the process, if it is running. The next `parse` starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        """The live process, started if necessary. Raises ``SourceError`` when it does not start."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = start_child("embed_assets.corpus.sandbox", stderr=subprocess.DEVNULL)
            assert self._process.stdout is not None
            try:
                receive(self._process.stdout)
            except EOFError:
                status = self._process.wait()
                raise SourceError(
                    f"the process that parses documents exited with status {status} before its first "
                    "document; run 'python -m embed_assets.corpus.sandbox' to see why",
                    is_retryable=True,
                ) from None
        return self._process


parser_process = ParserProcess()
"""The one parser process that all of this Python process shares."""
atexit.register(parser_process.close)


class _ProcessDied(Exception):
    """The process died while it parsed a document."""

    def __init__(self, message: str, hit_limit: bool) -> None:
        super().__init__(message)
        self.hit_limit = hit_limit
        """Whether one of this module's limits ended it, rather than something outside."""

    @classmethod
    def diagnose(cls, process: subprocess.Popen[bytes]) -> _ProcessDied:
        """The exception that explains the exit status of a dead process."""
        how, status = how_it_ended(process), process.returncode
        if sys.platform != "win32" and status == -signal.SIGXCPU:
            return cls(f"parsing it took more than {CPU_SECONDS} seconds of CPU time; split or simplify it", True)
        guess = f"perhaps for using more than {MEMORY_BYTES >> 30} GB of memory"
        has_aborted = status == -signal.SIGABRT  # what native code does when an allocation fails
        return cls(f"parsing it ended the parser with {how}, {guess}; split it", has_aborted)


def _parse(suffix: str, data: bytes) -> tuple[list[object], bytes]:
    """The answer to a request: the outcome with its details, and the text as UTF-8."""
    try:
        parsed = FORMATS[suffix](data)
    except MissingExtra as error:
        return ["missing", error.what, error.extra], b""
    except BadRow.Error as error:
        return ["bad", error.row.reason, error.row.detail], b""
    except MemoryError:
        return ["bad", "too_costly", f"parsing it took more than {MEMORY_BYTES >> 30} GB of memory; split it"], b""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a library's Rust code is no Exception
        return ["bad", "broken_file", f"it could not be parsed: {type(error).__name__}: {error}"], b""
    lost = [[row.key, row.reason, row.detail] for row in parsed.lost]
    answer: list[object] = [
        "parsed",
        parsed.title,
        parsed.media_type,
        dict(parsed.metadata),
        list(parsed.page_starts),
        lost,
        dict(parsed.properties),
    ]
    return answer, parsed.text.encode("utf-8", "surrogatepass")


def _serve() -> None:
    """The child's main loop: answer requests until standard input closes."""
    requests, answers = own_pipes()
    send(answers, b"ready")
    while True:
        try:
            suffix, data = receive(requests).decode(), receive(requests)
        except EOFError:
            return
        _set_limits()
        answer, text = _parse(suffix, data)
        del data
        send(answers, json.dumps(answer).encode(), text)


def _set_limits() -> None:
    """Set the limits for the next document, as far as the operating system supports them."""
    with contextlib.suppress(ImportError):
        import resource

        seconds = int(time.process_time()) + CPU_SECONDS + 1
        for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    _serve()
