"""Processes exit without slow destructors and restore signal handlers."""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from trainer.runtime import shutdown

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


def test_exit_waits_for_no_destructor_and_keeps_the_status():
  start_s = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=_LONG_S
  )
  assert done.returncode == 3, done.stderr
  assert done.stdout == "leaves\nat exit\n"
  assert done.stderr == ""
  assert time.monotonic() - start_s < _LONG_S / 2


_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def c_handler():
  """Handlers set by the system call, as in a program that embeds Python."""
  received = []
  make = ctypes.CFUNCTYPE(None, ctypes.c_int)
  handler = make(received.append)
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, make]
  before = {number: signal.getsignal(number) for number in shutdown.SIGNALS}
  for number in shutdown.SIGNALS:
    libc.signal(int(number), handler)
  yield received
  for number, python_handler in before.items():
    signal.signal(number, python_handler)


def _raise_all():
  for number in shutdown.SIGNALS:
    os.kill(os.getpid(), number)


def test_c_handlers_are_restored_after_a_run(c_handler):
  with shutdown.listening_for_signals(1.0):
    pass
  _raise_all()
  assert c_handler == [15, 2]


def test_c_handlers_are_restored_after_a_stopped_run(c_handler):
  with pytest.raises(shutdown.PreemptedError), shutdown.listening_for_signals(30.0):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(10_000_000):  # Until Python runs its handler.
      pass
  assert c_handler == []
  _raise_all()
  assert c_handler == [15, 2]


def test_python_handler_is_restored_after_a_run():
  received = []
  before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  try:
    with shutdown.listening_for_signals(1.0):
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [15]
  finally:
    signal.signal(signal.SIGTERM, before)


_LIBRARY = """
#include <signal.h>
#include <unistd.h>
static void handle(int number) { (void)number; (void)!write(1, "C handler\\n", 10); }
__attribute__((constructor)) static void set(void) { signal(SIGTERM, handle); }
"""
_PROGRAM = """
import os, signal
from trainer.runtime import shutdown
assert signal.getsignal(signal.SIGTERM) is None
with shutdown.listening_for_signals(1.0):
  print("inside", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("after", flush=True)
"""


def test_handler_unknown_to_python_is_not_an_error(tmp_path):
  """A handler set before Python starts, which Python reports as None."""
  source, library = tmp_path / "handler.c", tmp_path / "handler.so"
  source.write_text(_LIBRARY)
  build = ["cc", "-shared", "-fPIC", "-o", str(library), str(source)]
  try:
    subprocess.run(build, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no compiler of C: {error}")
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(_PROGRAM)],
    env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n") == ["inside", "C handler", "after", ""]
