"""Strategies of each kind of hardware, and the iterators over replica batches."""

from __future__ import annotations

import json
import threading
import time
import types

import pytest
import tensorflow as tf

from tests.distribute.cluster_test import free_addresses
from trainer.distribute import strategy as strategy_lib
from trainer.distribute.strategy import ReplicaBatches, make_strategy
from trainer.errors import StalledError, UserError
from trainer.run import Hardware

_LONG_S = 30.0


class _Deleted:
  """An iterator whose destructor blocks until an event is set."""

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
  """A strategy whose datasets have such iterators."""

  def __init__(self):
    self.may_end, self.ended_in = threading.Event(), []

  def distribute_datasets_from_function(self, _):
    return _Deleted(self.may_end, self.ended_in)


def test_iterator_is_destroyed_in_a_background_thread():
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


@pytest.fixture
def calls(monkeypatch):
  """Records the calls that set up a TPU, in order, without a TPU."""
  calls = []

  def record(name):
    def call(*arguments, **options):
      calls.append((name, *arguments, *options.values()))
      return name

    return call

  cluster = tf.distribute.cluster_resolver
  monkeypatch.setattr(cluster, "TPUClusterResolver", record("resolver"))
  monkeypatch.setattr(
    tf.tpu.experimental, "initialize_tpu_system", record("initialize")
  )

  class Strategy:
    num_replicas_in_sync = 8
    extended = types.SimpleNamespace(num_hosts=1)

    def __init__(self, resolver):
      calls.append(("strategy", resolver))

  monkeypatch.setattr(tf.distribute, "TPUStrategy", Strategy)
  return calls


@pytest.mark.parametrize(
  "hardware", [Hardware("tpu"), Hardware("tpu", tpu="local"), Hardware(tpu="local")]
)
def test_attached_tpu_is_initialized_before_its_strategy(calls, hardware):
  assert make_strategy(hardware).num_replicas_in_sync == 8
  assert calls == [
    ("resolver", "local"),
    ("initialize", "resolver"),
    ("strategy", "resolver"),
  ]


def test_multi_host_tpu_is_refused(calls, monkeypatch):
  monkeypatch.setattr(tf.distribute.TPUStrategy.extended, "num_hosts", 4)
  with pytest.raises(UserError, match=r"has 4 hosts, .* use a TPU with one host"):
    make_strategy(Hardware("tpu"))


def test_remote_tpu_is_refused(calls):
  with pytest.raises(UserError, match="--tpu=pod is another machine"):
    make_strategy(Hardware("auto", tpu="pod"))
  assert calls == []


@pytest.mark.parametrize(
  "error",
  [
    OSError("Name or service not known"),
    ValueError("Could not lookup TPU metadata"),
    tf.errors.NotFoundError(None, None, "TPUs not found in the cluster."),
  ],
)
def test_missing_tpu_is_reported(monkeypatch, error):
  def fail(*_, **__):
    raise error

  cluster = tf.distribute.cluster_resolver
  monkeypatch.setattr(cluster, "TPUClusterResolver", fail)
  with pytest.raises(UserError, match="--tpu=local is not available"):
    make_strategy(Hardware("tpu"))


def test_multi_worker_without_a_cluster_is_refused(monkeypatch):
  monkeypatch.delenv("TF_CONFIG", raising=False)
  monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
  with pytest.raises(UserError, match="needs TF_CONFIG"):
    make_strategy(Hardware("multi_worker"))


@pytest.mark.parametrize("strategy", ["multi_worker", "auto"])
def test_missing_workers_are_named_before_the_deadline(monkeypatch, strategy):
  addresses = free_addresses(2)
  content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))
  with pytest.raises(StalledError, match=r"worker 1 .* did not connect within 0.2 s"):
    make_strategy(Hardware(strategy, worker_timeout_s=0.2))


def test_tf_config_with_one_worker_is_a_single_process_run(monkeypatch):
  content = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))
  assert make_strategy(Hardware("auto")).num_replicas_in_sync == 1


@pytest.mark.parametrize("strategy", ["cpu", "multi_worker", "tpu"])
def test_virtual_replicas_of_other_strategies_are_refused(strategy):
  with pytest.raises(UserError, match="use --strategy=mirrored"):
    make_strategy(Hardware(strategy, 2))


def test_unknown_strategy_is_refused_with_the_choices():
  with pytest.raises(UserError, match="auto, cpu, mirrored, multi_worker, tpu"):
    make_strategy(Hardware("horovod"))


def test_every_strategy_of_the_command_line_has_a_maker():
  from trainer import task

  assert set(task.STRATEGIES) == set(strategy_lib._MAKERS)


def test_products_are_exact_in_float32():
  tf.config.experimental.enable_tensor_float_32_execution(True)
  make_strategy(Hardware("cpu"))
  assert not tf.config.experimental.tensor_float_32_execution_enabled()
