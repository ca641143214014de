"""The outer loop: its stops, reports and refused options."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data.pipeline import Batch
from trainer.distribute.strategy import ReplicaBatches
from trainer.errors import PreemptedError, UserError
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.losses.loss_terms import WeightedMean
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.runtime.shutdown import Preemption
from trainer.runtime.watchdog import Watchdog
from trainer.training.loop import HostFlags, InnerLoop, InnerLoopResult, Loop, Safety
from trainer.training.options import LoopOptions
from trainer.training.step import TrainStep

_NO_FLAGS = HostFlags(False, False)


class _CountingInner:
  """A fake inner loop: counts steps in the optimizer, up to a bad one."""

  def __init__(self, optimizer, bad_step, flags):
    self.calls = []
    self._optimizer = optimizer
    self._bad_step = bad_step
    self._flags = flags

  def run(self, num_steps):
    first = int(self._optimizer.iterations.numpy())
    if first <= self._bad_step < first + num_steps:
      num_steps = self._bad_step - first
    self.calls.append(num_steps)
    self._optimizer.iterations.assign_add(num_steps)
    size = np.float32(num_steps)
    return InnerLoopResult(
      num_steps, {"train/loss": WeightedMean(size, size)}, self._flags
    )


class _RecordingCheckpoints:
  """Fake checkpoints: record the saved steps."""

  def __init__(self, failure):
    self.failure = failure
    self.saved = []
    self.waited_for = []
    self.newest = "the newest is noted"

  def save(self, step):
    self.saved.append(step)

  def end_soon(self):
    pass

  def wait(self):
    self.waited_for = list(self.saved)


class _Policy:
  """A policy that skips nonfinite steps and records them."""

  def __init__(self, optimizer):
    self.passed_over = []
    self._optimizer = optimizer

  def handle_nonfinite(self, step):
    self.passed_over.append(step)
    self._optimizer.iterations.assign(step + 1)

  def metrics(self):
    return {}


class _Parts:
  """A loop and its parts."""

  def __init__(
    self, *, first_step=0, bad_step=-1, flags=_NO_FLAGS, failure=None, **options
  ):
    optimizer = tf.keras.optimizers.SGD(0.5)
    optimizer.iterations.assign(first_step)
    self.reports = []
    self.inner = _CountingInner(optimizer, bad_step, flags)
    self.checkpoints = _RecordingCheckpoints(failure)
    self.policy = _Policy(optimizer)
    self.loop = Loop(
      inner=self.inner,
      optimizer=optimizer,
      options=LoopOptions(**{**_OPTIONS, **options}),
      images_per_step=8,
      callbacks=[self.reports.append],
      safety=Safety(
        self.checkpoints,
        Preemption(1.0),
        Watchdog(os.devnull, start_deadline_s=1800.0, step_deadline_s=None),
        lambda *_: contextlib.nullcontext(),
        self.policy,
      ),
    )


def _run_loop(**options):
  parts = _Parts(**options)
  parts.loop.run()
  return parts.inner.calls, parts.reports


_OPTIONS = {"num_steps": 10, "steps_per_loop": 4, "checkpoint_every_steps": 8}


def test_loops_end_at_multiples_of_their_length_and_at_the_last_step():
  calls, reports = _run_loop(first_step=0)
  assert calls == [4, 4, 2]
  assert [report.step for report in reports] == [4, 8, 10]


def test_resumed_loop_ends_at_the_same_steps():
  calls, reports = _run_loop(first_step=6)
  assert calls == [2, 2]
  assert [report.step for report in reports] == [8, 10]


@pytest.mark.parametrize("error", [UserError("a mistake"), MemoryError("a fault")])
def test_pending_save_is_finished_before_an_error_ends_the_run(error):
  parts = _Parts()

  def save_and_fail(report):
    parts.checkpoints.save(report.step)
    raise error

  parts.loop.add_callback(save_and_fail)
  with pytest.raises(type(error), match=str(error)):
    parts.loop.run()
  assert parts.checkpoints.waited_for == [4]


def test_finished_run_does_nothing():
  assert _run_loop(first_step=10) == ([], [])


def test_reports_include_loss_learning_rate_and_speed():
  _, [report, *_] = _run_loop(first_step=0)
  assert report.metrics["train/loss"] == 1.0
  assert report.metrics["train/learning_rate"] == 0.5
  assert report.metrics["train/images_per_second"] > 0


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ({"steps_per_loop": 0}, "steps_per_loop=0 must be at least 1"),
    ({"checkpoint_every_steps": 6}, "multiple of steps_per_loop=4"),
    ({"on_disk_full": "pray"}, "on_disk_full='pray' is none of continue, stop"),
    ({"on_nonfinite": "no"}, "on_nonfinite='no' is none of stop, skip, restore"),
  ],
)
def test_invalid_options_are_refused(changed, message):
  with pytest.raises(UserError, match=message):
    LoopOptions(**{**_OPTIONS, **changed})


def test_stop_request_saves_a_checkpoint_and_is_reported():
  parts = _Parts(flags=HostFlags(True, False))
  with pytest.raises(PreemptedError, match="stopped after step 4; the newest is noted"):
    parts.loop.run()
  assert parts.inner.calls == [4]
  assert parts.checkpoints.saved == [4]
  assert [report.step for report in parts.reports] == [4]


def test_full_disk_stops_the_loop_at_once_or_at_the_end():
  full = {"flags": HostFlags(False, True), "failure": "no space"}
  parts = _Parts(**full, on_disk_full="stop")
  with pytest.raises(UserError, match="no space; the newest is noted"):
    parts.loop.run()
  assert parts.inner.calls == [4]
  parts = _Parts(**full)
  with pytest.raises(UserError, match="no space; the newest is noted"):
    parts.loop.run()  # The training finishes, but its last checkpoint is not on disk.
  assert parts.inner.calls == [4, 4, 2]


def test_skipped_batch_counts_as_a_step():
  parts = _Parts(bad_step=5)
  parts.loop.run()
  assert parts.inner.calls == [4, 1, 2, 2]
  assert parts.policy.passed_over == [5]
  assert [report.step for report in parts.reports] == [4, 8, 10]
  assert [report.metrics["train/loss"] for report in parts.reports] == [1.0, 1.0, 1.0]


_NUM_STEPS, _SIZE, _BAD_STEP = 4, 6, 2


class _Statistics(tf.keras.layers.Layer):
  """Counts calls and sums inputs in every kind of replicated variable."""

  def __init__(self):
    super().__init__()
    kinds = [("AUTO", "MEAN"), ("AUTO", "SUM"), ("ON_READ", "SUM"), ("ON_READ", "MEAN")]
    self.statistics = [
      self.add_weight(
        name=f"{synchronization}_{aggregation}",
        initializer="ones",
        trainable=False,
        synchronization=getattr(tf.VariableSynchronization, synchronization),
        aggregation=getattr(tf.VariableAggregation, aggregation),
      )
      for synchronization, aggregation in kinds
    ]

  def call(self, inputs):
    for each in self.statistics:
      each.assign(0.5 * tf.reduce_sum(inputs))
    return inputs


def _step(backbone=None):
  tf.keras.utils.set_random_seed(1)
  backbone = backbone or ConvNet(filters=(3,), normalization="batch")
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=4),
    loss=SupervisedContrastiveLoss(temperature=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.Adam(0.01),
    mining_statistics=None,
    cross_batch_memory=CrossBatchMemory(size=20, warm_up_steps=1),
  )
  step.create_variables((4, 4, 1))
  return step


def _images(bad_replica, bad_value):
  """[steps, replicas, B, 4, 4, 1]; one value of one replica at one step is replaced."""
  images = np.random.default_rng(0).random((_NUM_STEPS, 2, _SIZE, 4, 4, 1), np.float32)
  images[_BAD_STEP, bad_replica, 3, 0, 0, 0] = bad_value
  return images


def _dataset(images):
  num_steps, num_replicas = images.shape[:2]
  count = num_steps * num_replicas
  labels = np.tile(np.repeat(np.arange(2, dtype=np.int32), 3), (count, 1))
  labels += 2 * (np.arange(count, dtype=np.int32)[:, None] % num_replicas)
  flat = images.reshape(count, *images.shape[2:])
  weights = np.ones((count, _SIZE), np.float32)
  numbers = np.arange(count * _SIZE, dtype=np.int32).reshape(count, _SIZE)
  batches = Batch(flat, labels, weights, numbers)
  return tf.data.Dataset.from_tensor_slices(batches)


def _loop(strategy, step, images, flags=_NO_FLAGS):
  dataset = _dataset(images)
  return InnerLoop(
    step=step,
    strategy=strategy,
    batches=ReplicaBatches(strategy, dataset),
    zero_statistics=step.zero_statistics(dataset.element_spec),
    host_flags_fn=lambda: flags,
  )


def _values(step):
  parts = (step.encoder, step.optimizer, step.cross_batch_memory)
  return [variable.numpy() for part in parts for variable in part.variables]


# The last two overflow internally: convolution outputs, or only the variance.
# Its reciprocal root is 0, so embeddings, loss and gradients stay finite.
@pytest.mark.parametrize(
  ("bad_replica", "bad_value", "normalization"),
  thorough_except(
    [(0, 1e25, "synchronized_batch")],
    [
      (0, np.nan, "batch"),
      (1, np.inf, "batch"),
      (1, 3e38, "batch"),
      (0, 3e38, "synchronized_batch"),
      (1, 1e25, "batch"),
      (0, 1e25, "synchronized_batch"),
    ],
  ),
)
def test_nonfinite_update_on_one_replica_is_applied_on_none(
  mirrored, bad_replica, bad_value, normalization
):
  strategy = mirrored(2)
  with strategy.scope():
    step = _step(ConvNet(filters=(3,), normalization=normalization))
    loop = _loop(strategy, step, _images(bad_replica, bad_value))
    first = loop.run(_BAD_STEP)
    before = _values(step)
    none = loop.run(_NUM_STEPS)
    after = _values(step)
    behind = loop.run(1)
  assert [done.num_steps for done in (first, none, behind)] == [_BAD_STEP, 0, 1]
  assert first.statistics["train/loss"].count == _BAD_STEP
  assert none.statistics["train/loss"].count == 0
  for got, expected in zip(after, before):
    np.testing.assert_array_equal(got, expected)
  assert all(np.isfinite(value).all() for value in _values(step))
  assert any(np.any(now != then) for now, then in zip(_values(step), after))


@pytest.mark.parametrize("num_replicas", thorough_except([2], [1, 2]))
def test_statistics_of_a_custom_layer_are_restored(mirrored, num_replicas):
  strategy = mirrored(num_replicas)
  images = _images(0, 1e38)[:, :num_replicas]
  with strategy.scope():
    layers = [_Statistics(), tf.keras.layers.Rescaling(1e3), tf.keras.layers.Flatten()]
    step = _step(tf.keras.Sequential(layers))
    loop = _loop(strategy, step, images)
    loop.run(_BAD_STEP)
    results = strategy.experimental_local_results
    before = [[v.numpy() for v in results(each)] for each in step.forward_state]
    assert loop.run(1).num_steps == 0
    after = [[v.numpy() for v in results(each)] for each in step.forward_state]
    assert loop.run(1).num_steps == 1
    behind = [[v.numpy() for v in results(each)] for each in step.forward_state]
  assert len(before) == 4 and before == after and after != behind
  assert all(0 < value < 1e3 for values in before for value in values)


def test_host_flags_are_combined_over_all_replicas(mirrored):
  strategy = mirrored(2)
  with strategy.scope():
    loop = _loop(strategy, _step(), _images(0, 0.0), flags=HostFlags(True, False))
    done = loop.run(1)
    assert done.host_flags == HostFlags(True, False)
    # The new batches are used from their first on, without retracing.
    dataset = _dataset(_images(0, 0.0))
    loop.set_batches(ReplicaBatches(strategy, dataset))
    assert loop.run(_NUM_STEPS).num_steps == _NUM_STEPS
    assert loop._run.experimental_get_tracing_count() == 1
