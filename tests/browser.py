"""A real browser without a window: Chromium, spoken to through a pipe in its DevTools protocol. No package is needed.

apt-get install chromium        or any Chromium or Chrome on the path, or named by CASCADEOPS_BROWSER
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers have no user namespaces; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
"""Seconds for one answer."""


def find_browser() -> str | None:
    named = os.environ.get("CASCADEOPS_BROWSER")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One tab. `events` are all that the browser has told of it: requests, messages of the console, violations."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._buffer, self._number = to_browser, from_browser, b"", 0
        self.events: list[dict] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{part}.enable")

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, file: Path, width: int, height: int, scheme: str = "light") -> None:
        """Shows a file at a size, and returns when it has been loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page, also of what a window would have to be scrolled for."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def requests(self) -> list[str]:
        """What was asked for, without pictures that the page itself holds."""
        sent = [event["params"]["request"]["url"] for event in self._of("Network.requestWillBeSent")]
        return [url for url in sent if not url.startswith("data:")]

    def refused(self) -> list[str]:
        """Why requests of the page were not sent."""
        return [event["params"].get("blockedReason") for event in self._of("Network.loadingFailed")]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        logged = [event["params"]["entry"]["text"] for event in self._of("Log.entryAdded")]
        called = [str(event["params"]["args"]) for event in self._of("Runtime.consoleAPICalled")]
        return logged + called + [str(event["params"]) for event in self._of("Runtime.exceptionThrown")]

    def _of(self, method: str) -> list[dict]:
        return [event for event in self.events if event.get("method") == method]

    def _read(self) -> dict:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def opened_browser(program: str) -> Iterator[Page]:
    """Starts the browser, yields its tab, and ends it with all its processes."""
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        # the browser reads from descriptor 3 and writes to 4
        command = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        process = subprocess.Popen(
            ["bash", "-c", command, "browser", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": profile},
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(write_commands, read_answers)
        finally:
            os.close(write_commands)  # the browser ends when its pipe does
            os.close(read_answers)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
