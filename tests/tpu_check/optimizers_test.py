"""The update of every optimizer lowers, also of those that capture constants."""

from __future__ import annotations

import sys

import pytest

from tests.tpu_check.losses_test import STEPS, lowered
from trainer.training import optimizers
from trainer.training.optimizers import MultiOptimizer

_OPTIMIZERS = {
  "adam": lambda: optimizers.adam(learning_rate=0.1, global_clipnorm=1.0),
  "adamw": lambda: optimizers.adamw(learning_rate=0.1, weight_decay=0.1),
  "lamb": lambda: optimizers.lamb(learning_rate=0.1, weight_decay_rate=0.1),
  "per_part": lambda: MultiOptimizer(
    backbone=optimizers.adam(learning_rate=0.1), head=optimizers.adam(learning_rate=0.1)
  ),
}
if sys.version_info < (3, 12):  # TensorFlow Addons goes no further.
  _OPTIMIZERS.update(
    novograd=lambda: optimizers.novograd(learning_rate=0.1),
    rectified_adam=lambda: optimizers.rectified_adam(
      learning_rate=0.1, lookahead_steps=5
    ),
  )


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_the_update_of_every_optimizer_lowers(name):
  optimizer = _OPTIMIZERS[name]()
  program = lowered(STEPS["InfoNCELoss-0.5"], 4, None, optimizer)
  assert b"all-reduce" in program
