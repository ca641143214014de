"""Iterators over replica batches are let go without a wait."""

from __future__ import annotations

import threading
import time

import tensorflow as tf

from trainer.distribute.strategy import ReplicaBatches

_LONG_S = 30.0


class _Deleted:
  """An iterator whose end takes as long as a thread has not been allowed to end."""

  def __init__(self, may_end, ended_in):
    self._may_end = may_end
    self._ended_in = ended_in

  def __iter__(self):
    return self

  def __next__(self):
    raise StopIteration

  def __del__(self):
    self._may_end.wait(_LONG_S)
    self._ended_in.append(threading.current_thread())


class _Strategy:
  """Gives such iterators."""

  def __init__(self):
    self.may_end, self.ended_in = threading.Event(), []

  def distribute_datasets_from_function(self, _):
    return _Deleted(self.may_end, self.ended_in)


def test_the_iterator_ends_in_another_thread_and_nobody_waits():
  strategy = _Strategy()
  batches = ReplicaBatches(strategy, None)
  assert isinstance(batches.iterator, _Deleted)
  start_s = time.monotonic()
  del batches
  assert time.monotonic() - start_s < _LONG_S / 2
  assert strategy.ended_in == []
  strategy.may_end.set()
  deadline_s = time.monotonic() + _LONG_S
  while not strategy.ended_in and time.monotonic() < deadline_s:
    time.sleep(0.01)
  assert strategy.ended_in not in ([], [threading.main_thread()])


def test_replicas_get_their_batches_in_turn(mirrored):
  strategy = mirrored(2)
  batches = ReplicaBatches(strategy, tf.data.Dataset.range(4).batch(1))
  for expected in ([0, 1], [2, 3]):
    values = strategy.experimental_local_results(next(batches.iterator))
    assert [int(each) for each in values] == expected
