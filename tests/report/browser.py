"""Headless Chromium through its DevTools pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

from tests.launch import debian

_TIMEOUT_S = 60


class Page:
  """One page in the browser.

  Attributes:
    errors: what was written to the console as an error, or thrown.
    requests: addresses that were asked for, but for the page and what it holds.
  """

  def __init__(self, process, to_browser, from_browser):
    self._process = process
    self._to_browser = to_browser
    self._from_browser = from_browser
    self._buffer = b""
    self._last_id = 0
    self._session = None
    self._has_loaded = False
    self._address = ""
    self.errors = []
    self.requests = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method, **parameters):
    """Returns the response to a command."""
    self._last_id += 1
    message = {"id": self._last_id, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._to_browser, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._receive()
      if answer.get("id") == self._last_id:
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

  def open(self, path, *, width=1280, height=900, is_dark=False, has_script=True):
    """Loads a file in a window of the given size."""
    self.resize(width, height)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    self.call("Emulation.setEmulatedMedia", features=[scheme])
    self.call("Emulation.setScriptExecutionDisabled", value=not has_script)
    self._has_loaded = False
    self._address = f"file://{path}"
    self.call("Page.navigate", url=self._address)
    while not self._has_loaded:
      self._receive()

  def resize(self, width, height):
    """Resizes the window."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )

  def evaluate(self, expression):
    """Returns the value of an expression in the page."""
    answer = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def point(self, x, y):
    """Moves the mouse to a position in the window."""
    self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

  def click(self, x, y):
    """Clicks at a position in the window."""
    self.point(x, y)
    for kind in ("mousePressed", "mouseReleased"):
      self.call(
        "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
      )

  def touch(self, x, y):
    """Taps at a position in the window."""
    self.call(
      "Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}]
    )
    self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

  def press(self, key):
    """Presses a key, such as ArrowLeft."""
    for kind in ("keyDown", "keyUp"):
      self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

  def screenshot(self, path, *, is_whole=True):
    """Writes a PNG of the page."""
    answer = self.call("Page.captureScreenshot", captureBeyondViewport=is_whole)
    with open(path, "wb") as file:
      file.write(base64.b64decode(answer["data"]))

  def _receive(self):
    """Returns the next message and records events."""
    deadline = time.monotonic() + _TIMEOUT_S
    while b"\0" not in self._buffer:
      assert self._process.poll() is None, "the browser has ended"
      left = deadline - time.monotonic()
      assert left > 0, "the browser does not answer"
      if select.select([self._from_browser], [], [], min(left, 1.0))[0]:
        self._buffer += os.read(self._from_browser, 1 << 20)
    line, _, self._buffer = self._buffer.partition(b"\0")
    message = json.loads(line)
    self._note(message.get("method"), message.get("params", {}))
    return message

  def _note(self, method, parameters):
    if method == "Page.loadEventFired":
      self._has_loaded = True
    elif method == "Runtime.exceptionThrown":
      self.errors.append(parameters["exceptionDetails"]["text"])
    elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
      self.errors.append(str(parameters["args"]))
    elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
      self.errors.append(parameters["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      address = parameters["request"]["url"]
      if not address.startswith("data:") and address.split("#")[0] != self._address:
        self.requests.append(address)


@contextlib.contextmanager
def opened(profile):
  """A browser with one page, as a context manager.

  Args:
    profile: folder for what the browser keeps.
  """
  debian.need(["chromium"], ["chromium"])
  command = [
    *(debian.program("chromium"), "--headless", "--no-sandbox", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
  ]
  to_browser_end, to_browser = os.pipe()
  from_browser, from_browser_end = os.pipe()
  # The browser reads descriptor 3 and writes descriptor 4. A shell opens them, because
  # code between fork and exec is unsafe with the threads of TensorFlow.
  shell = f'exec "$@" 3<&{to_browser_end} 4>&{from_browser_end}'
  process = subprocess.Popen(
    ["/bin/bash", "-c", shell, "browser", *command],
    pass_fds=(to_browser_end, from_browser_end),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env={**os.environ, "HOME": str(profile)},
  )
  os.close(to_browser_end)
  os.close(from_browser_end)
  try:
    yield Page(process, to_browser, from_browser)
  finally:
    # It exits, with all its processes, when the pipe is closed.
    os.close(to_browser)
    os.close(from_browser)
    try:
      process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    shutil.rmtree(profile, ignore_errors=True)
