"""Chromium without a window, driven over its DevTools pipe: JSON messages ended by zero bytes, on descriptors 3 and 4."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def executable():
    """The browser of $CHROMIUM or of this machine. Without one a test is skipped, but fails where BROWSER=required."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        missing = "no Chromium here; pipelines/test.sh installs Debian's as root (apt-get install chromium-headless-shell)"
        (pytest.fail if os.environ.get("BROWSER") == "required" else pytest.skip)(missing)
    return found


class Page:
    """One tab. ``faults``: what the console said of errors, refused resources and exceptions, in order."""

    def __init__(self, profile):
        self.number, self.rest, self.faults, self.session = 0, b"", [], None
        (theirs_in, self.send_to), (self.read_from, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        redirected = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirected, executable(), *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def message(self, deadline):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read_from], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            piece = os.read(self.read_from, 1 << 20)
            assert piece, "the browser ended"
            self.rest += piece
        text, _, self.rest = self.rest.partition(b"\0")
        made = json.loads(text)
        method, params = made.get("method"), made.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.faults.append(params["exceptionDetails"])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.faults.append(params["args"])
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(params["entry"]["text"])
        return made

    def call(self, method, **params):
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params}
        asked |= {"sessionId": self.session} if self.session else {}
        os.write(self.send_to, json.dumps(asked).encode() + b"\0")
        deadline = time.monotonic() + 120
        while (made := self.message(deadline)).get("id") != self.number:
            pass
        assert "error" not in made, made
        return made["result"]

    def open(self, url, width, height=900):
        """Load a page at this width in CSS pixels, as a phone does below 600."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        while self.js("document.readyState") != "complete" or self.js("location.href") == "about:blank":
            time.sleep(0.05)

    def js(self, expression):
        """The JSON value of an expression."""
        made = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.session = None
            self.number += 1
            os.write(self.send_to, json.dumps({"id": self.number, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.send_to)
        os.close(self.read_from)
