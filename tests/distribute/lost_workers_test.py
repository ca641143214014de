"""What is said of a worker that is lost."""

from __future__ import annotations

import json

import pytest
import tensorflow as tf

from trainer.distribute.workers import naming_lost_workers
from trainer.errors import StalledError


def _lose(monkeypatch, *addresses):
  content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))
  text = "Collective ops is aborted by: /job:worker/replica:0/task:1 is down\nmore"
  with naming_lost_workers():
    raise tf.errors.UnavailableError(None, None, text)


def test_a_lost_worker_is_named_in_one_line(monkeypatch):
  with pytest.raises(StalledError, match=r"lost worker 1 \(b:2\): Coll") as caught:
    _lose(monkeypatch, "a:1", "b:2")
  assert "\n" not in str(caught.value)


def test_a_process_that_is_alone_has_lost_nobody(monkeypatch):
  with pytest.raises(tf.errors.UnavailableError):
    _lose(monkeypatch, "a:1")
