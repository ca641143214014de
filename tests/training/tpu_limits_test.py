from __future__ import annotations

import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses import BatchHardTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import checks
from trainer.training.step import TrainStep


def _step(precision):
  return TrainStep(
    encoder=Encoder(
      backbone=Perceptron(hidden_units=(4,)), embedding_size=2, precision=precision
    ),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
  )


def test_a_scaled_loss_is_refused_on_a_tpu_by_the_binding_that_asks_for_it():
  with pytest.raises(UserError, match=r"Encoder\.precision='mixed_float16'"):
    checks.check_tpu_limits(_step("mixed_float16"))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_what_a_tpu_computes_is_not_refused(precision):
  assert checks.check_tpu_limits(_step(precision)) is None


def test_nothing_is_refused_where_there_is_no_tpu():
  assert checks.check_tpu_limits_if_on_tpu(_step("mixed_float16")) is None
