"""Stopping a process: signals, background release of slow objects, and exit.

TensorFlow's calls keep Python's own handlers waiting, so a thread hears of a signal,
from the wake-up pipe that the handlers of C write to. What then happens depends on
where the run is. While it trains it goes on to the end of the inner loop, and saves;
where that takes too long, the grace is over. Elsewhere there is nothing to save, and
it ends; but one worker of several only where it meets the others, to end with them.
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

_NAME = "let_go"


def release_in_background(held: list[Any]) -> None:
  """Empties a list in another thread.

  Args:
    held: what is in it is held by nobody else.
  """
  # No daemon: one that ends after the interpreter aborts the process.
  with contextlib.suppress(RuntimeError):  # The interpreter ends already.
    threading.Thread(target=held.clear, name=_NAME).start()


def exit_process(status: int) -> NoReturn:
  """Ends the process with a status.

  After S3 was used, tensorflow-io aborts the process while Python tears it down, so
  that a run that succeeded would end with status 134; and Python waits for threads. So
  where there is either, it is not torn down.

  Args:
    status: of the process.
  """
  is_letting_go = any(thread.name == _NAME for thread in threading.enumerate())
  if is_letting_go or "tensorflow_io" in sys.modules:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How long an exception may take to come through what runs; then the process is ended.
_UNWINDING_S = 5.0
# More than `struct sigaction` has on any system: 152 on Linux.
_SIGACTION_BYTES = 1024


class Preemption:
  """Whether this process was told to stop, and what that means now.

  Args:
    grace_s: from the signal to the end of the process, seconds.
  """

  def __init__(self, grace_s: float):
    self._grace_s = grace_s
    self._is_saving = False
    self._is_of_several = False
    self._told: Optional[signal.Signals] = None
    self._newest_fn: Callable[[], str] = lambda: "no checkpoint was saved"
    self._is_timed = False
    self._is_hearing = False
    self._ended = threading.Event()

  @property
  def stop_requested(self) -> bool:
    """Whether a signal came."""
    return self._told is not None

  @property
  def is_to_end(self) -> bool:
    """Whether a signal came, and there is nothing to save: for all workers to know."""
    return self.stop_requested and not self._is_saving

  @property
  def signal_name(self) -> str:
    """What told it; another worker, where this one heard nothing."""
    return self._told.name if self._told else "another worker"

  @contextlib.contextmanager
  def saving(self, newest_fn: Callable[[], str]) -> Iterator[None]:
    """A block that polls `stop_requested` and saves; a signal does not break it.

    Args:
      newest_fn: says in words which checkpoint is the newest.

    Yields:
      Nothing.

    Raises:
      PreemptedError: a signal came before, or too late for the block to look, and there
        is no other worker.
    """
    self.hear_again()
    self._is_saving, self._newest_fn = True, newest_fn
    try:
      self._end_if_alone()
      yield
      self._end_if_alone()
    finally:
      self._is_saving = False

  @contextlib.contextmanager
  def heard(self) -> Iterator[None]:
    """Hears signals inside the block; only a main thread can.

    Yields:
      Nothing.
    """
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
        self._is_hearing = True
        self.hear_again()
        try:
          yield
        finally:
          self._is_hearing = False
    finally:
      signal.set_wakeup_fd(old_wakeup)
      self._ended.set()
      writer.close()
      thread.join()
      reader.close()

  def join_others(self, num_others: int) -> None:
    """To be called when workers are connected: a signal is then for all of them.

    It breaks off nothing any more, as the others would wait for this one, and call it
    lost. Who meets the others tells them `is_to_end`.

    Args:
      num_others: how many they are; where there is none, nothing changes.
    """
    self._is_of_several = num_others > 0
    self.hear_again()

  def hear_again(self) -> None:
    """Hears signals that TensorFlow took, as it does with SIGTERM where it connects.

    Its handler notes the signal, and keeps it from Python.
    """
    if self._is_hearing:
      for number in SIGNALS:
        signal.signal(number, self._handle)

  def _handle(self, number, frame) -> None:
    del frame
    self._told = self._told or signal.Signals(number)
    if not self._is_saving:
      self._end_if_alone()

  def _end_if_alone(self) -> None:
    if self.stop_requested and not self._is_of_several:
      raise self.nothing_to_save()

  def _listen(self, reader: socket.socket) -> None:
    """The thread: hears every signal, whatever the main thread is doing."""
    num_interruptions = 0
    for number in iter(lambda: reader.recv(1), b""):
      heard = int.from_bytes(number, "little")
      if heard not in SIGNALS:
        continue
      num_interruptions += heard == signal.SIGINT
      if num_interruptions > 1:
        _exit_after_grace(INTERRUPTED, f"interrupted twice; {self._newest_fn()}.")
      self._told = self._told or signal.Signals(heard)
      if not self._is_timed:
        self._is_timed = True
        threading.Thread(target=self._end_late, daemon=True).start()

  def _end_late(self) -> None:
    """Ends the process when its time is over."""
    if not self._is_saving:
      patience_s = self._grace_s if self._is_of_several else _UNWINDING_S
      if not self._ended.wait(min(patience_s, self._grace_s)):
        _exit_after_grace(PreemptedError.exit_status, str(self.nothing_to_save()))
      return
    _say(f"{self.signal_name}: saving, within {self._grace_s:g} s.")
    if not self._ended.wait(self._grace_s):
      _exit_after_grace(
        PreemptedError.exit_status,
        f"{self.signal_name}: the grace of {self._grace_s:g} s is over before a "
        f"checkpoint could be written; {self._newest_fn()}; the same command "
        "resumes it.",
      )

  def nothing_to_save(self) -> PreemptedError:
    """What is raised where a run is to end."""
    return PreemptedError(
      f"{self.signal_name}: stopped where there was nothing new to save; the same "
      "command resumes it."
    )


_current = Preemption(0.0)


def current_preemption() -> Preemption:
  """That of this process; one that hears nothing, before `listening`."""
  return _current


@contextlib.contextmanager
def listening_for_signals(grace_s: float) -> Iterator[None]:
  """Makes this process hear SIGTERM and SIGINT inside the block.

  Args:
    grace_s: from the signal to the end of the process, seconds.

  Yields:
    Nothing.
  """
  global _current
  before, _current = _current, Preemption(grace_s)
  try:
    with _current.heard():
      yield
  finally:
    _current = before


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
  """Restores the handlers of SIGTERM and SIGINT after the block, those of C included.

  Python does not know handlers that a program which embeds it, or a library, set with
  the system's own call, and would leave the default action in their place.

  Yields:
    Nothing.
  """
  python_handlers = {number: signal.getsignal(number) for number in SIGNALS}
  system_handlers = {number: _system_handler(number) for number in SIGNALS}
  try:
    yield
  finally:
    for number, handler in python_handlers.items():
      # None: it was set before Python started.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
      _libc().sigaction(int(number), system_handlers[number], None)


def _system_handler(number: int) -> ctypes.Array:
  """The system's `struct sigaction` of a signal, as bytes that only it reads."""
  found = ctypes.create_string_buffer(_SIGACTION_BYTES)
  _libc().sigaction(int(number), None, found)
  return found


def _libc() -> ctypes.CDLL:
  return ctypes.CDLL(None)


def _say(line: str) -> None:
  # Not by the logging module: the main thread may hold its locks.
  os.write(2, f"{line}\n".encode())


def _exit_after_grace(status: int, line: str) -> NoReturn:
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  _say(f"error: {line}")
  os._exit(status)
