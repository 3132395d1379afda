"""Child processes that run a module of this package and exchange messages over pipes.

A child ends when its standard input closes, which it does when its parent ends.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import IO

_LENGTH = struct.Struct("<Q")
"""Every message on the pipes is preceded by its length in bytes."""


def start_child(
    module: str, environment: Mapping[str, str] = MappingProxyType({}), stderr: IO[bytes] | int | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with pipes for its input and output, and this process's import path.

    `environment` has additional variables. `stderr` is where its standard error goes; None: where this process's does.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        # Ctrl-C must reach only the parent. Not a session of its own: Linux compares priorities within one only.
        process_group=0,
    )


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process to end; "signal 9" or "status 1"."""
    status = process.wait()
    return f"signal {-status}" if status < 0 else f"status {status}"


def own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """In a child: the pipes for its requests and its answers. What a library prints goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, answers


def send(stream: IO[bytes], *messages: bytes) -> None:
    """Write messages, each preceded by its length."""
    for message in messages:
        stream.write(_LENGTH.pack(len(message)))
        stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """One message. Raises ``EOFError`` when the stream ends early."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    [length] = _LENGTH.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data
