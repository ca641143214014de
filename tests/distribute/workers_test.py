"""Errors and signals exchanged between workers, and lost workers."""

from __future__ import annotations

import json
import signal

import pytest
import tensorflow as tf

from trainer.distribute.workers import Workers, current_workers, reporting_lost_workers
from trainer.errors import (
  PreemptedError,
  StalledError,
  TooFewExamplesError,
  UserError,
  WorkerFailedError,
)
from trainer.runtime import shutdown


def _lose(monkeypatch, *addresses):
  content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))
  text = "Collective ops is aborted by: /job:worker/replica:0/task:1 is down\nmore"
  with reporting_lost_workers():
    raise tf.errors.UnavailableError(None, None, text)


def test_lost_worker_is_named_in_one_line(monkeypatch):
  with pytest.raises(StalledError, match=r"lost worker 1 \(b:2\): Coll") as caught:
    _lose(monkeypatch, "a:1", "b:2")
  assert "\n" not in str(caught.value)


def test_single_process_reports_no_lost_worker(monkeypatch):
  with pytest.raises(tf.errors.UnavailableError):
    _lose(monkeypatch, "a:1")


def _fail(error):
  def act():
    raise error

  return act


def _two_workers(index, other_message):
  workers = Workers()
  workers.index, workers.num_workers = index, 2
  workers.exchange = lambda own: (
    [own, other_message] if index == 0 else [other_message, own]
  )
  return workers


def test_workers_continue_if_all_succeeded():
  assert _two_workers(1, "null").run_on_all(lambda: 5) == 5


def test_user_error_is_raised_on_its_worker_and_on_the_others():
  with pytest.raises(UserError, match=r"^worker 0: no such file$"):
    _two_workers(1, '["UserError", "no such file"]').run_on_all(lambda: 5)
  with pytest.raises(UserError, match=r"^worker 0: no such file$"):
    _two_workers(0, "null").run_on_all(_fail(UserError("no such file")))


def test_user_error_of_all_workers_names_no_worker():
  with pytest.raises(UserError, match=r"^no$"):
    _two_workers(0, '["UserError", "no"]').run_on_all(_fail(UserError("no")))


def test_user_error_has_the_same_class_on_all_workers():
  error_message = '["TooFewExamplesError", "few"]'
  with pytest.raises(TooFewExamplesError, match=r"^worker 0: few$"):
    _two_workers(1, error_message).run_on_all(lambda: 5)
  with pytest.raises(TooFewExamplesError, match=r"^few$"):
    _two_workers(0, error_message).run_on_all(_fail(TooFewExamplesError("few")))


def test_internal_error_of_the_chief_stops_the_others_in_one_line():
  with pytest.raises(ZeroDivisionError):
    _two_workers(0, "null").run_on_chief(_fail(ZeroDivisionError("by zero")))
  with pytest.raises(WorkerFailedError, match="worker 0: ZeroDivisionError: by zero"):
    _two_workers(1, '["WorkerFailedError", "ZeroDivisionError: by zero"]').run_on_chief(
      lambda: None
    )


def test_stop_request_to_one_worker_stops_all():
  with pytest.raises(PreemptedError, match="worker 0: SIGTERM: stopped"):
    _two_workers(1, '["PreemptedError", "SIGTERM: stopped"]').run_on_all(lambda: 5)
  with pytest.raises(PreemptedError, match="SIGTERM: stopped"):
    _two_workers(0, "null").run_on_all(_fail(PreemptedError("SIGTERM: stopped")))


def test_signal_interrupts_nothing_and_is_exchanged_at_the_next_sync(monkeypatch):
  preemption = shutdown.Preemption(30.0)
  monkeypatch.setattr(shutdown, "_current", preemption)
  preemption.coordinate_with(1)
  preemption._handle(signal.SIGTERM, None)
  with pytest.raises(PreemptedError, match="SIGTERM: stopped with nothing new"):
    _two_workers(0, "null").run_on_all(lambda: 5)
  with preemption.saving(lambda: "the newest"):  # The loop exchanges its flags itself.
    assert _two_workers(0, "null").run_on_all(lambda: 5) == 5


def test_rehearsal_runs_without_the_strategy_and_reports_user_errors(mirrored):
  seen = []
  with mirrored(2).scope():
    _two_workers(1, "null").dry_run(lambda: seen.append(tf.distribute.has_strategy()))
    assert tf.distribute.has_strategy()
    with pytest.raises(UserError, match=r"^worker 0: no such file$"):
      _two_workers(1, '["UserError", "no such file"]').dry_run(lambda: None)
    with pytest.raises(WorkerFailedError, match="worker 0: MemoryError: no"):
      _two_workers(1, '["WorkerFailedError", "MemoryError: no"]').dry_run(lambda: None)
  assert seen == [False]


def test_single_worker_skips_the_rehearsal():
  made = []
  Workers().dry_run(lambda: made.append(1))
  assert made == []


def test_workers_of_a_strategy_are_created_once(mirrored):
  with mirrored(2).scope():
    assert current_workers() is current_workers()
    assert current_workers().num_local_replicas == 2
