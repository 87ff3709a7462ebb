"""Headless Chromium, spoken to over its DevTools protocol."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser; `said` holds what it complained of, `asked` every address it asked for."""

    def __init__(self, profile_folder: Path):
        command = [CHROMIUM, *"--headless=new --no-sandbox --disable-gpu --remote-debugging-port=0".split()]
        command += ["--autoplay-policy=no-user-gesture-required", f"--user-data-dir={profile_folder}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        found = (re.search(r"DevTools listening on (\S+)", line) for line in self.process.stderr)
        address = next(filter(None, found))[1]
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.numbers, self.session, self.said, self.asked, self.events = itertools.count(1), None, [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stderr.close()

    def _next(self) -> dict:
        message = json.loads(self.socket.recv())
        method, what = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(what["request"]["url"])
        failed = method in ("Runtime.exceptionThrown", "Network.loadingFailed") and not what.get("canceled")
        printed = method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning")
        if failed or printed or method == "Log.entryAdded":
            self.said.append(what)
        return message

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        about = {"sessionId": self.session} if self.session else {}
        self.socket.send(json.dumps({"id": number, "method": method, "params": params, **about}))
        while (message := self._next()).get("id") != number:
            self.events.append(message.get("method"))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, page: Path, width: int = 1280, height: int = 900) -> None:
        """Load a file and wait until it and its resources are there. width, height: of the window in CSS pixels."""
        self.events.clear()
        window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        self.call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self.events:
            self.events.append(self._next().get("method"))

    def value(self, expression: str):
        """A JavaScript expression's value in the page; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")
