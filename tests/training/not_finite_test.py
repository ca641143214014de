"""What is done about updates that are not finite, and how often."""

from __future__ import annotations

import types

import pytest
import tensorflow as tf

from trainer.errors import NotFiniteError
from trainer.training.learning_rates import Cosine
from trainer.training.nonfinite import NonfinitePolicy
from trainer.training.optimizers import MultiOptimizer, set_step
from trainer.training.options import LoopOptions


class _Parts:
  """A policy, and what it changes; going back restores step 4."""

  def __init__(self, optimizer=None, **options):
    self.optimizer = optimizer or tf.keras.optimizers.SGD(0.1)
    set_step(self.optimizer, 7)
    self.checkpoints = types.SimpleNamespace(
      notes={}, wait=lambda: None, newest="the newest checkpoint is of step 4"
    )
    self.restored = []
    self.policy = NonfinitePolicy(
      options=LoopOptions(
        num_steps=9, steps_per_loop=1, checkpoint_every_steps=1, **options
      ),
      optimizer=self.optimizer,
      checkpoints=self.checkpoints,
      restore_fn=self._restore,
      diagnose_fn=lambda step: f"layer x of {step}",
    )

  def _restore(self):
    self.restored.append(4)
    self.checkpoints.notes = {}
    set_step(self.optimizer, 4)


def test_it_stops_and_says_what_where_and_what_is_saved():
  parts = _Parts()
  expected = (
    "step 7: layer x of 7; no update was made with it; the newest checkpoint is"
  )
  with pytest.raises(NotFiniteError, match=expected):
    parts.policy.handle_nonfinite(7)
  assert parts.policy.metrics() == {}


def test_a_batch_that_is_skipped_counts_as_a_step():
  parts = _Parts(on_nonfinite="skip")
  parts.policy.handle_nonfinite(7)
  assert int(parts.optimizer.iterations) == 8
  assert parts.restored == []
  assert parts.policy.metrics() == {"train/not_finite_steps": 1.0}


def test_going_back_restores_and_goes_on_past_the_batch():
  parts = _Parts(on_nonfinite="restore")
  for step in (7, 8):
    parts.policy.handle_nonfinite(step)
    parts.checkpoints.notes["not_finite_steps"] = step - 6
  assert parts.restored == [4, 4]
  assert int(parts.optimizer.iterations) == 9


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_every_part_of_an_optimizer_continues_at_the_same_step_and_rate(policy):
  schedule = Cosine(peak=0.1, num_steps=20)
  per_part = MultiOptimizer(
    backbone=tf.keras.optimizers.SGD(schedule), head=tf.keras.optimizers.SGD(schedule)
  )
  weights = [tf.Variable(1.0), tf.Variable(1.0)]
  per_part.divide(weights[:1])
  per_part.build(weights)
  parts = _Parts(per_part, on_nonfinite=policy)
  parts.policy.handle_nonfinite(7)
  assert [int(part.iterations) for part in per_part.parts] == [8, 8]
  per_part.apply_gradients([(tf.constant(1.0), weight) for weight in weights])
  moves = [1.0 - float(weight) for weight in weights]
  assert moves == pytest.approx([float(schedule(8))] * 2, rel=1e-5)


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_it_stops_where_it_was_too_often(policy):
  parts = _Parts(on_nonfinite=policy, max_not_finite=1)
  parts.policy.handle_nonfinite(7)
  with pytest.raises(NotFiniteError, match="1 batches were passed over before"):
    parts.policy.handle_nonfinite(8)
