"""The worker processes of a run: data exchange, and reporting of a lost worker."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Callable, Optional, TypeVar

import numpy as np
import tensorflow as tf

from trainer.data.pipeline import Shard
from trainer.distribute.cluster import differences, find_cluster
from trainer.distribute.collectives import current_collectives
from trainer.errors import (
  PreemptedError,
  StalledError,
  TooFewExamplesError,
  UnwritableError,
  UserError,
  WorkerFailedError,
  out_of_space,
)
from trainer.runtime import shutdown

_LOST = (
  tf.errors.UnavailableError,
  tf.errors.AbortedError,
  tf.errors.DeadlineExceededError,
)
_NUM_CHARACTERS = 200
# All gathered rows have one size, for one trace.
_ROW_SIZE = 1024
# Errors that are raised on all workers as on the first; subclasses precede their bases.
_KINDS = {
  kind.__name__: kind
  for kind in (
    PreemptedError,
    TooFewExamplesError,
    UnwritableError,
    UserError,
    WorkerFailedError,
  )
}


@contextlib.contextmanager
def reporting_lost_workers() -> Iterator[None]:
  """Reports which worker was lost, if several train together.

  Raises:
    StalledError: a worker was lost inside the context.
  """
  try:
    yield
  except _LOST as error:
    cluster = find_cluster(os.environ)
    if cluster is None or cluster.num_workers == 1:
      raise
    text = str(error)
    others = sorted({int(n) for n in re.findall(r"task:(\d+)", text)} - {cluster.index})
    names = [f"{i} ({cluster.addresses[i]})" for i in others if i < cluster.num_workers]
    reason = " ".join(text.split())[:_NUM_CHARACTERS]
    raise StalledError(
      f"lost worker {', '.join(names) or 'unknown'}: {reason}; the same command "
      "resumes from the newest checkpoint."
    ) from error


_Result = TypeVar("_Result")


class Workers:
  """The workers of the strategy in whose scope it is created; one for a local strategy.

  Attributes:
    index: number of this worker; the chief is 0.
    num_workers: number of workers.
    num_local_replicas: number of replicas per worker.
  """

  def __init__(self):
    self._strategy = tf.distribute.get_strategy()
    resolver = self._strategy.cluster_resolver
    is_many = isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)
    self.index = resolver.task_id if is_many else 0
    self.num_workers = (
      resolver.cluster_spec().num_tasks(resolver.task_type) if is_many else 1
    )
    self.num_local_replicas = self._strategy.num_replicas_in_sync // self.num_workers
    # Kept, because a strategy traces each call without a function again and logs a
    # warning.
    self._gather_fn = tf.function(self._gather_on_replicas, autograph=False)

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes the files of the run."""
    return self.index == 0

  def shard(self) -> Shard:
    """The part of every global batch that this worker reads."""
    num_local = self.num_local_replicas
    return Shard(self.index * num_local, num_local, num_local * self.num_workers)

  def exchange(self, text: str) -> list[str]:
    """Exchanges a text between all workers.

    Args:
      text: of this worker.

    Returns:
      The texts of all workers, in order.
    """
    if self.num_workers == 1:
      return [text]
    content = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    sizes = self._gather(np.full([_ROW_SIZE], len(content), np.int32))[:, 0]
    num_rows = max(1, -(-sizes.max() // _ROW_SIZE))
    padded = np.pad(content, (0, num_rows * _ROW_SIZE - len(content)))
    parts = [self._gather(part) for part in np.split(padded, num_rows)]
    rows = np.concatenate(parts, axis=1)
    return [
      row[:size].astype(np.uint8).tobytes().decode() for row, size in zip(rows, sizes)
    ]

  def check_equal(self, values: Mapping[str, object]) -> None:
    """Raises if values differ between workers.

    Args:
      values: values by name.

    Raises:
      UserError: a value differs; raised on every worker.
    """
    text = json.dumps({name: str(value) for name, value in values.items()})
    difference = differences([json.loads(each) for each in self.exchange(text)])
    if difference:
      raise UserError(difference)

  def run_on_chief(self, act: Callable[[], None]) -> None:
    """Runs a function on the chief while the others wait.

    Args:
      act: a function that only one process may run.

    Raises:
      UserError: the function raised one on the chief; raised on every worker.
      WorkerFailedError: it raised another error on the chief; raised on the others.
    """
    self.run_on_all(act if self.is_chief else lambda: None)

  def run_on_all(self, make: Callable[[], _Result]) -> _Result:
    """Runs a function on each worker; raises on all if one fails.

    Args:
      make: must not communicate with the other workers, as creating a variable does
        under their strategy.

    Returns:
      The result of this worker.

    Raises:
      UserError: the function raised one on some worker; raised on every worker.
      PreemptedError: a worker was preempted; raised on every worker.
      WorkerFailedError: it raised another error elsewhere.
    """
    if self.num_workers == 1:
      return make()
    try:
      result = make()
      if shutdown.current_preemption().exit_requested:
        raise shutdown.current_preemption().preempted_error()
    except Exception as error:
      self._raise_first(out_of_space(error) or error)
      raise
    self._raise_first(None)
    return result

  def dry_run(self, make: Callable[[], object]) -> None:
    """Runs a function on each worker alone, if there are several workers.

    Variables of several workers are created together. If one failed, the others would
    wait until it ends and then consider it lost. Each worker therefore first creates
    its own on the CPU and discards them. Errors that occur only under the strategy
    follow from the configuration, and occur on all workers.

    Args:
      make: creates what will be created under the strategy afterwards.

    Raises:
      UserError: the function raised one on some worker; raised on every worker.
      WorkerFailedError: it raised another error elsewhere.
    """
    if self.num_workers == 1:
      return

    def make_on_cpu():
      with tf.device("CPU:0"):
        make()

    # Strategies are thread-local; a new thread has none.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      self.run_on_all(lambda: pool.submit(make_on_cpu).result())

  def _raise_first(self, error: Optional[Exception]) -> None:
    """Raises the error of the first worker that has one, or this worker's own."""
    local = error and [_error_class(error).__name__, _describe_error(error)]
    errors = [json.loads(each) for each in self.exchange(json.dumps(local))]
    index = next((i for i, each in enumerate(errors) if each), None)
    if index is None or (error and _error_class(error) is WorkerFailedError):
      return
    name, text = errors[index]
    raise _KINDS[name](
      text if errors.count(errors[index]) == len(errors) else f"worker {index}: {text}"
    )

  def wait(self) -> None:
    """Waits for all workers, so that none exits while others need it."""
    self.exchange("")

  def _gather_on_replicas(self, rows):
    return self._strategy.run(lambda rows: current_collectives().gather(rows), (rows,))

  def _gather(self, row: np.ndarray) -> np.ndarray:
    """Gathers [_ROW_SIZE] int32 of each worker to [num_workers, _ROW_SIZE]."""
    gathered = self._gather_fn(tf.constant(row[None]))
    rows = self._strategy.experimental_local_results(gathered)[0].numpy()
    return rows[:: self.num_local_replicas]


@functools.cache
def _workers_of(strategy: tf.distribute.Strategy) -> Workers:
  with strategy.scope():
    return Workers()


def current_workers() -> Workers:
  """Returns the workers of the strategy in whose scope this is called."""
  return _workers_of(tf.distribute.get_strategy())


def _error_class(error: Exception) -> type[Exception]:
  """Returns the class with which the other workers raise the error."""
  kinds = (kind for kind in _KINDS.values() if isinstance(error, kind))
  return next(kinds, WorkerFailedError)


def _describe_error(error: Exception) -> str:
  is_named = _error_class(error) is WorkerFailedError
  return f"{type(error).__name__}: {error}" if is_named else str(error)
