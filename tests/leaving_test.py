"""A process ends at once, whatever it still lets go of."""

from __future__ import annotations

import subprocess
import sys
import time

_LONG_S = 120

_SCRIPT = f"""
import atexit, threading, time
from trainer.runtime import shutdown

class Slow:
  def __del__(self):
    time.sleep({_LONG_S})

atexit.register(print, "at exit")
shutdown.release_in_background([Slow()])
time.sleep(0.2)
print("leaves", flush=True)
shutdown.exit_process(3)
"""


def test_leaving_waits_for_nothing_and_keeps_the_status():
  start_s = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=_LONG_S
  )
  assert done.returncode == 3, done.stderr
  assert done.stdout == "leaves\nat exit\n"
  assert done.stderr == ""
  assert time.monotonic() - start_s < _LONG_S / 2
