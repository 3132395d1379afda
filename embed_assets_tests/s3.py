"""A real S3 API over loopback, and a proxy in front of it that simulates faults, each in its own process."""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SECRET = "wJalrXUtnFEMI-K7MDENG-planted-secret"
BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """Environment variables that a client of the server needs, as the storage libraries read them."""
    return {
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }


@contextmanager
def running_server() -> Iterator[int]:
    """Run a server with one empty bucket; its port."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).read()
        yield port


@contextmanager
def running_proxy(upstream: int, fault_percent: int, seed: int = 0) -> Iterator[int]:
    """Run a proxy that fails that often; its port."""
    port = free_port()
    command = [sys.executable, "-m", "embed_assets_tests.s3", *map(str, (port, upstream, fault_percent, seed))]
    with _running(command, port):
        yield port


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, f"{command} did not start"
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


class _FaultyProxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = 0
    fault_percent = 0
    chance = random.Random()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.chance.choice(("500", "503", "slow", "reset before", "reset after"))
        if self.chance.random() * 100 >= self.fault_percent:
            fault = ""
        if fault in ("500", "503"):
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self._answer(int(fault), [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else text)
            return
        if fault == "slow":
            time.sleep(self.chance.uniform(0.2, 1.0))
        if fault == "reset before":
            self._reset()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        response = connection.getresponse()
        data = response.read()
        if fault == "reset after":  # the request was carried out, but its response is lost
            self._reset()
            return
        self._answer(response.status, response.getheaders(), data)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward


def _serve(port: int, upstream: int, fault_percent: int, seed: int) -> None:
    _FaultyProxy.upstream, _FaultyProxy.fault_percent = upstream, fault_percent
    _FaultyProxy.chance = random.Random(seed)
    ThreadingHTTPServer(("127.0.0.1", port), _FaultyProxy).serve_forever()


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:5]))
