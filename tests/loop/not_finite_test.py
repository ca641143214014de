"""What is done about updates that are not finite, and how often."""

from __future__ import annotations

import types

import pytest
import tensorflow as tf

from trainer.errors import NotFiniteError
from trainer.loop.loop_options import LoopOptions
from trainer.loop.not_finite import NotFinitePolicy


class _Parts:
  """A policy, and what it changes; going back restores step 4."""

  def __init__(self, **options):
    self.optimizer = tf.keras.optimizers.SGD(0.1)
    self.optimizer.iterations.assign(7)
    self.checkpoints = types.SimpleNamespace(
      notes={}, wait=lambda: None, newest="the newest checkpoint is of step 4"
    )
    self.restored = []
    self.policy = NotFinitePolicy(
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
    self.optimizer.iterations.assign(4)


def test_it_stops_and_says_what_where_and_what_is_saved():
  parts = _Parts()
  expected = (
    "step 7: layer x of 7; no update was made with it; the newest checkpoint is"
  )
  with pytest.raises(NotFiniteError, match=expected):
    parts.policy.pass_over(7)
  assert parts.policy.metrics() == {}


def test_a_batch_that_is_skipped_counts_as_a_step():
  parts = _Parts(when_not_finite="skip")
  parts.policy.pass_over(7)
  assert int(parts.optimizer.iterations) == 8
  assert parts.restored == []
  assert parts.policy.metrics() == {"train/not_finite_steps": 1.0}


def test_going_back_restores_and_goes_on_past_the_batch():
  parts = _Parts(when_not_finite="go_back")
  for step in (7, 8):
    parts.policy.pass_over(step)
    parts.checkpoints.notes["not_finite_steps"] = step - 6
  assert parts.restored == [4, 4]
  assert int(parts.optimizer.iterations) == 9


@pytest.mark.parametrize("policy", ["skip", "go_back"])
def test_it_stops_where_it_was_too_often(policy):
  parts = _Parts(when_not_finite=policy, max_not_finite=1)
  parts.policy.pass_over(7)
  with pytest.raises(NotFiniteError, match="1 batches were passed over before"):
    parts.policy.pass_over(8)
