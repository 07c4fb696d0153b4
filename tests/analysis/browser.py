"""A headless Chromium, told what to do through its DevTools protocol: one page, its console, its pictures."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_S = 120  # the machine may be loaded: generous, and reached only by a failure


class Page:
    """The page of a browser. errors: what the console, of all frames, was told of errors so far, with its source."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, loop: asyncio.AbstractEventLoop) -> None:
        self.errors: list[str] = []
        self._socket, self._loop, self._ids = socket, loop, itertools.count(1)
        self._sessions: list[str | None] = [None]  # the page itself, then frames with a process of their own
        # Frames without an origin, as sandboxed ones, have processes of their own, each to be listened to by itself.
        self._call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        self._listen(None)

    def open(self, url: str) -> None:
        """Go there; what it shows may take a while yet."""
        self._call("Page.navigate", url=url)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """The window, in CSS pixels, and how many pixels a picture has for one of them."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                   mobile=False)  # fmt: skip

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def ask_frames(self, script: str) -> list[Any]:
        """The expression's value in each frame that has a process of its own."""
        self.ask("0")  # with the answer comes what happened meanwhile: which frames there are
        found = []
        for session in self._sessions[1:]:
            answer = self._call("Runtime.evaluate", session, expression=script, returnByValue=True)
            found.append(answer["result"].get("value"))
        return found

    def until(self, script: str) -> Any:
        """The expression's value once it is true."""
        end = time.monotonic() + WAIT_S
        while not (found := self.ask(script)):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {script}\n{self.ask('document.body.innerText')}")
            time.sleep(0.2)
        return found

    def click(self, script: str) -> None:
        """Press and let go the mouse in the middle of the element that the expression gives, once it is there."""
        box = f"(() => {{const e = {script}; if (!e) return null; e.scrollIntoView({{block: 'nearest'}}); "
        box += "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
        x, y = self.until(box)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Put a text where the cursor is."""
        self._call("Input.insertText", text=text)

    def picture(self, path: Path, left: float = 0, top: float = 0, width: float = 0, height: float = 0) -> None:
        """The page as PNG; a part of it where a width is given."""
        clip = {"clip": {"x": left, "y": top, "width": width, "height": height, "scale": 1}} if width else {}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png", **clip)["data"]))

    def _listen(self, session: str | None) -> None:
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable", session)

    def _call(self, method: str, session: str | None = None, **given: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": given} | ({"sessionId": session} if session else {})
        self._loop.run_until_complete(self._socket.send_str(json.dumps(message)))
        new: list[str] = []
        while True:
            told = self._loop.run_until_complete(self._socket.receive_json(timeout=WAIT_S))
            if told.get("id") == number:
                break
            new += self._note(told)
        for attached in new:
            self._sessions.append(attached)
            self._listen(attached)
        if "error" in told and not session:  # a frame may go while it is asked
            raise AssertionError(f"{method}: {told['error']}")
        return dict(told.get("result", {"result": {}}))

    def _note(self, told: dict[str, Any]) -> list[str]:
        """Keep what an event says of errors; the sessions of frames that have come."""
        what, given = told.get("method"), told.get("params", {})
        if what == "Runtime.consoleAPICalled" and given["type"] in ("error", "assert"):
            words = " ".join(str(one.get("value", one.get("description", ""))) for one in given["args"])
            self.errors.append(words)
        elif what == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(given["exceptionDetails"]))
        elif what == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif what == "Target.detachedFromTarget" and given["sessionId"] in self._sessions:
            self._sessions.remove(given["sessionId"])
        return [given["sessionId"]] if what == "Target.attachedToTarget" else []


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A browser with its profile in `folder`, until the block ends."""
    assert BROWSER is not None
    profile = folder / "profile"
    process = subprocess.Popen(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--mute-audio",
         "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    try:
        address = loop.run_until_complete(_address(profile / "DevToolsActivePort"))

        async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
            client = aiohttp.ClientSession()
            return client, await client.ws_connect(address, max_msg_size=0)

        client, socket = loop.run_until_complete(connect())
        try:
            yield Page(socket, loop)
        finally:
            loop.run_until_complete(client.close())
    finally:
        process.terminate()
        process.wait()
        loop.close()


async def _address(written: Path) -> str:
    """Where the browser's first page listens, once the browser has said on which port."""
    end = time.monotonic() + WAIT_S
    while not (written.exists() and written.read_text().count("\n")):
        assert time.monotonic() < end, "the browser does not start"
        await asyncio.sleep(0.1)
    port = written.read_text().split()[0]
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/json/list") as answer:
        (target,) = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
        return str(target["webSocketDebuggerUrl"])
