"""Headless Chromium over its DevTools protocol, for tests of the page.

Commands go through a pipe. It closes when the tests' process ends, however it ends, and the browser
ends with it.
"""

import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
LIMIT_S = 30
# The browser reads commands at 3 and answers at 4.
PIPED = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh"]


class Browser:
    """One page of a browser; it notes requests, and what the console says of errors.

    Args:
        commands, answers: the ends of its pipes, for JSON that ends in a zero byte.
    """

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers, self._read = commands, answers, b""
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the page; returns its result."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        text = json.dumps(message | ({"sessionId": session} if session else {}))
        self._commands.write(text.encode() + b"\0")
        self._commands.flush()
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _next(self) -> bytes:
        """The next message of the browser."""
        while b"\0" not in self._read:
            assert select.select([self._answers], [], [], LIMIT_S)[0], "the browser says nothing"
            part = os.read(self._answers.fileno(), 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return message

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["args"]))

    def open(self, page: Path, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Load a file at a size of window, as a light or dark system shows it."""
        self.errors.clear()
        self.requests.clear()
        self.resize(width, height)
        self.theme(theme)
        self.send("Page.navigate", url=page.absolute().as_uri())
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : "
                 "window.addEventListener('load', done))")  # fmt: skip
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """Another size of window; a narrow one is a phone."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip

    def theme(self, name: str) -> None:
        """The system's choice of light or dark."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def settle(self) -> None:
        """Wait until two frames are drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, **more: Any) -> None:
        """Press and release a key."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowDown": 40, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=codes.get(key, 0), **more,
                      **(text if kind == "keyDown" else {}))  # fmt: skip

    def hover(self, selector: str) -> None:
        """Move the pointer over the middle of an element."""
        box = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = node.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        self.settle()
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        self.settle()


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A browser with its own profile; skips the test where there is none."""
    found = [os.environ.get("CHROMIUM", "")] + [shutil.which(name) or "" for name in NAMES]
    program = next((each for each in found if each), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is there, and CHROMIUM names none")
    command = [*PIPED, program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
               "--disable-background-networking", "--remote-debugging-pipe",
               f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Browser(process.stdin, process.stdout)
        finally:
            process.kill()
