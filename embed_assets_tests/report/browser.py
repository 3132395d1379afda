"""Headless Chromium, driven over a pipe by its DevTools protocol: no port, no driver and no library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
)
_SECONDS = 120
"""Ends a test that hangs."""


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in the folder `profile`; it ends with the context."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    assert found, "these tests need Chromium: apt-get install chromium"
    from_us, to_it = os.pipe()
    from_it, to_us = os.pipe()

    def place_pipes() -> None:
        # The protocol's file descriptors are 3 and 4; first out of their way.
        read, write = os.dup(from_us), os.dup(to_us)
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [found, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Browser(from_it, to_it)
    finally:
        os.close(to_it)
        os.close(from_it)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """A connection to the browser."""

    def __init__(self, from_it: int, to_it: int) -> None:
        self._from_it, self._to_it, self._read, self._sent = from_it, to_it, b"", 0
        self._events: list[dict[str, Any]] = []

    def open(self, file: Path, width: int = 1280, height: int = 900, media: dict[str, str] | None = None) -> Page:
        """Open a file in a new tab of this size, with CSS media features such as `prefers-color-scheme`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        features = [{"name": name, "value": value} for name, value in (media or {}).items()]
        page.call("Emulation.setEmulatedMedia", features=features)
        page.resize(width, height)
        page.call("Page.setLifecycleEventsEnabled", enabled=True)
        page.wait_for_load(page.call("Page.navigate", url=file.as_uri())["loaderId"])
        page.settle()
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result. Events that arrive in the meantime are kept."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to_it, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self._sent:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._read:
            assert select.select([self._from_it], [], [], _SECONDS)[0], "Chromium does not answer"
            data = os.read(self._from_it, 1 << 20)
            assert data, "Chromium has ended"
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def events(self, session: str) -> list[dict[str, Any]]:
        """The events of a tab until now."""
        return [event for event in self._events if event.get("sessionId") == session]

    def keep(self, event: dict[str, Any]) -> None:
        self._events.append(event)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def close(self) -> None:
        """Close the tab; its events are kept."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def wait_for_load(self, loader: str) -> None:
        """Wait until what this navigation loads is loaded, unless it is."""
        done = {"name": "load", "loaderId": loader}
        while not any(done.items() <= event["params"].items() for event in self._browser.events(self._session)):
            self._browser.keep(self._browser.receive())

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until the page is drawn, which it is only in front of the others."""
        self.call("Page.bringToFront")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def point(self, x: float, y: float, kind: str = "mouseMoved") -> None:
        """Move the pointer, or press or release its button: `mousePressed`, `mouseReleased`."""
        clicks = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **clicks)
        self.settle()

    def click(self, selector: str) -> None:
        """Click an element as a person would: at its place."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.point(*box, kind=kind)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what is visible, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def complaints(self) -> list[str]:
        """What the console has: exceptions, errors, warnings, and what the Content-Security-Policy refused."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self._browser.events(self._session) if e["method"] in kinds]

    def requests(self) -> list[str]:
        """URLs that were asked for."""
        events = self._browser.events(self._session)
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
