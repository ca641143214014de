"""Stopping a process: signals, background release of slow objects, and exit.

TensorFlow calls delay Python's signal handlers. A thread therefore reads signals from
the wake-up pipe that the C handlers write to. The reaction depends on the state:

- During training, the run finishes the inner loop and saves a checkpoint. If that takes
  longer than the grace period, the process exits without saving.
- Elsewhere there is nothing to save, and the process ends at once. One of several
  workers ends only at the next synchronization, so that all end together.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, Callable, NoReturn, Optional

from trainer.errors import INTERRUPTED, PreemptedError

_RELEASE_THREAD = "release_in_background"

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Time for an exception to unwind the running code; then the process is ended.
_UNWINDING_S = 5.0
# Larger than `struct sigaction` on any system: 152 on Linux.
_SIGACTION_BYTES = 1024


def release_in_background(held: list[Any]) -> None:
  """Clears a list in another thread.

  Args:
    held: its items must not be referenced anywhere else.
  """
  # Not a daemon thread: one that outlives the interpreter aborts the process.
  with contextlib.suppress(RuntimeError):  # The interpreter is already shutting down.
    threading.Thread(target=held.clear, name=_RELEASE_THREAD).start()


def exit_process(status: int) -> NoReturn:
  """Ends the process with an exit status.

  After S3 was used, tensorflow-io aborts the process during interpreter shutdown, and a
  successful run would end with status 134. Python also waits for threads. In both cases
  the interpreter's shutdown is skipped.

  Args:
    status: exit status of the process.
  """
  is_releasing = any(thread.name == _RELEASE_THREAD for thread in threading.enumerate())
  if is_releasing or "tensorflow_io" in sys.modules:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


class Preemption:
  """The stop request of this process, and the reaction to it.

  Args:
    grace_s: time from the signal to the end of the process, seconds.
  """

  def __init__(self, grace_s: float):
    self._grace_s = grace_s
    self._is_saving = False
    self._is_of_several = False
    self._signal: Optional[signal.Signals] = None
    self._newest_fn: Callable[[], str] = lambda: "no checkpoint was saved"
    self._is_timed = False
    self._is_listening = False
    self._ended = threading.Event()

  @property
  def stop_requested(self) -> bool:
    """Whether a signal was received."""
    return self._signal is not None

  @property
  def exit_requested(self) -> bool:
    """Whether a signal was received and nothing is to be saved; sent to all workers."""
    return self.stop_requested and not self._is_saving

  @property
  def signal_name(self) -> str:
    """Name of the signal; "another worker" if this process received none."""
    return self._signal.name if self._signal else "another worker"

  @contextlib.contextmanager
  def saving(self, newest_fn: Callable[[], str]) -> Iterator[None]:
    """Marks a block that polls `stop_requested` and saves; signals don't interrupt it.

    Args:
      newest_fn: returns a phrase that names the newest checkpoint.

    Raises:
      PreemptedError: a signal was received before the block or after its last poll, and
        there is no other worker.
    """
    self.reinstall_handlers()
    self._is_saving, self._newest_fn = True, newest_fn
    try:
      self._raise_if_alone()
      yield
      self._raise_if_alone()
    finally:
      self._is_saving = False

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Handles signals inside the block; has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
    thread.start()
    try:
      with handlers_restored():
        self._is_listening = True
        self.reinstall_handlers()
        try:
          yield
        finally:
          self._is_listening = False
    finally:
      signal.set_wakeup_fd(old_wakeup)
      self._ended.set()
      writer.close()
      thread.join()
      reader.close()

  def coordinate_with(self, num_others: int) -> None:
    """Makes a signal apply to all workers; call it once they are connected.

    From then on a signal interrupts nothing, because the other workers would wait for
    this one and report it as lost. `exit_requested` is exchanged at each
    synchronization.

    Args:
      num_others: number of other workers; 0 changes nothing.
    """
    self._is_of_several = num_others > 0
    self.reinstall_handlers()

  def reinstall_handlers(self) -> None:
    """Reinstalls the signal handlers that TensorFlow replaced.

    TensorFlow installs a handler of SIGTERM when it connects. It records the signal and
    hides it from Python.
    """
    if self._is_listening:
      for number in SIGNALS:
        signal.signal(number, self._handle)

  def _handle(self, number, frame) -> None:
    del frame
    self._signal = self._signal or signal.Signals(number)
    if not self._is_saving:
      self._raise_if_alone()

  def _raise_if_alone(self) -> None:
    if self.stop_requested and not self._is_of_several:
      raise self.preempted_error()

  def _listen(self, reader: socket.socket) -> None:
    """Receives every signal, in a thread, even while the main thread is blocked."""
    num_interruptions = 0
    for number in iter(lambda: reader.recv(1), b""):
      received = int.from_bytes(number, "little")
      if received not in SIGNALS:
        continue
      num_interruptions += received == signal.SIGINT
      if num_interruptions > 1:
        _exit_after_grace(INTERRUPTED, f"interrupted twice; {self._newest_fn()}.")
      self._signal = self._signal or signal.Signals(received)
      if not self._is_timed:
        self._is_timed = True
        threading.Thread(target=self._enforce_grace, daemon=True).start()

  def _enforce_grace(self) -> None:
    """Ends the process after the grace period."""
    if not self._is_saving:
      patience_s = self._grace_s if self._is_of_several else _UNWINDING_S
      if not self._ended.wait(min(patience_s, self._grace_s)):
        _exit_after_grace(PreemptedError.exit_status, str(self.preempted_error()))
      return
    _write_stderr(
      f"{self.signal_name}: saving a checkpoint within {self._grace_s:g} s."
    )
    if not self._ended.wait(self._grace_s):
      _exit_after_grace(
        PreemptedError.exit_status,
        f"{self.signal_name}: the grace period of {self._grace_s:g} s ended before a "
        f"checkpoint was written; {self._newest_fn()}; the same command "
        "resumes it.",
      )

  def preempted_error(self) -> PreemptedError:
    """Returns the error that ends a run."""
    return PreemptedError(
      f"{self.signal_name}: stopped with nothing new to save; the same command "
      "resumes it."
    )


_current = Preemption(0.0)


def current_preemption() -> Preemption:
  """Returns the state of this process; inactive outside `listening_for_signals`."""
  return _current


@contextlib.contextmanager
def listening_for_signals(grace_s: float) -> Iterator[None]:
  """Handles SIGTERM and SIGINT inside the block.

  Args:
    grace_s: time from the signal to the end of the process, seconds.
  """
  global _current
  before, _current = _current, Preemption(grace_s)
  try:
    with _current.listening():
      yield
  finally:
    _current = before


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
  """Restores the handlers of SIGTERM and SIGINT after the block, including C handlers.

  Python has no record of handlers that a library or an embedding program installed with
  the system call, and would restore the default action instead.
  """
  python_handlers = {number: signal.getsignal(number) for number in SIGNALS}
  system_handlers = {number: _system_handler(number) for number in SIGNALS}
  try:
    yield
  finally:
    for number, handler in python_handlers.items():
      # None: the handler was installed before Python started.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
      _libc().sigaction(int(number), system_handlers[number], None)


def _system_handler(number: int) -> ctypes.Array:
  """Returns the system's `struct sigaction` of a signal as opaque bytes."""
  found = ctypes.create_string_buffer(_SIGACTION_BYTES)
  _libc().sigaction(int(number), None, found)
  return found


def _libc() -> ctypes.CDLL:
  return ctypes.CDLL(None)


def _write_stderr(line: str) -> None:
  # Not the logging module: the main thread may hold its locks.
  os.write(2, f"{line}\n".encode())


def _exit_after_grace(status: int, line: str) -> NoReturn:
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  _write_stderr(f"error: {line}")
  os._exit(status)
