"""A headless chromium driven over its DevTools pipe: no driver, no websocket, one page.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page:
    """One page; whatever it is asked waits at most ``patience`` seconds."""

    def __init__(self, send: int, receive: int, patience: float = 30.0) -> None:
        self._send, self._receive, self._patience = send, receive, patience
        self._buffer, self._count = b"", 0
        self._session: dict[str, str] = {}
        self.requests: list[str] = []
        """Addresses the page asked for."""
        self.errors: list[str] = []
        """Exceptions its scripts did not catch."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """Send one command and give its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._patience
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._receive], [], [], deadline - time.monotonic())[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self._receive, 1 << 20)
            if not chunk:
                raise ConnectionError("the browser ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        return message

    def open(self, url: str) -> None:
        """Load ``url`` afresh, also where it differs only behind the ``#``."""
        self.ask("Page.navigate", url="about:blank")
        self.requests.clear()
        self.errors.clear()
        self.ask("Page.navigate", url=url)

    def run(self, script: str, *, framed: bool = False) -> Any:
        """The value of a JavaScript expression, on the page or in its first frame."""
        where = {}
        if framed:
            frame = self.ask("Page.getFrameTree")["frameTree"]["childFrames"][0]["frame"]["id"]
            world = self.ask("Page.createIsolatedWorld", frameId=frame)
            where = {"contextId": world["executionContextId"]}
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, **where)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0, *, framed: bool = False) -> None:
        """Until the expression is true; says what the page shows if it never is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.run(f"Boolean({script})", framed=framed):
                return
            time.sleep(0.1)
        text = self.run("document.body ? document.body.innerText.slice(0, 1500) : ''")
        raise AssertionError(f"{script} stayed false for {seconds} s on:\n{text}")

    @property
    def text(self) -> str:
        """What the page shows, as text."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def screenshot(self, path: Path) -> None:
        """Write what the page shows as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path, *options: str, size: tuple[int, int] = (1500, 1000)) -> Iterator[Page]:
    """A page of a new chromium that knows ``profile`` only; ended with the block."""
    assert CHROMIUM is not None
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    # Sandboxed frames stay in the page's process, where the page's session reaches them.
    command += ["--disable-features=IsolateSandboxedIframes", "--disable-site-isolation-trials"]
    command += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}", *options]
    # The shell gives chromium the pipe as file descriptors 3 and 4, where it looks for it.
    pipe = f'exec "$@" 3<&{their_input} 4>&{their_output}'
    process = subprocess.Popen(
        ["bash", "-c", pipe, "bash", *command, "--remote-debugging-pipe", "about:blank"],
        pass_fds=(their_input, their_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input)
    os.close(their_output)
    try:
        yield Page(our_output, our_input)
    finally:
        process.terminate()
        process.wait(10)
        os.close(our_output)
        os.close(our_input)
