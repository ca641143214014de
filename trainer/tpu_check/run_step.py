"""The step of a run file and the batch it takes, without opening any records."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import gin
import numpy as np
import tensorflow as tf

from trainer.data.decode import Decoder
from trainer.data.members import MemberTable
from trainer.data.pipeline import Batch
from trainer.errors import UserError
from trainer.loop import micro_batches
from trainer.loop.step import TrainStep
from trainer.train import Parts

# More classes, and more samples of one, than a batch will have.
_NUM_CLASSES, _NUM_SAMPLES = 2**13, 2**9


class _DeclaredDataset(NamedTuple):
  """What a run file says of its data, where the data are not."""

  decoder: Decoder


class RunStep(NamedTuple):
  """A step that could train, and its batch.

  Attributes:
    step: with its variables made.
    input_shape: of one example.
    num_classes: P, of the global batch.
    num_samples: K.
  """

  step: TrainStep
  input_shape: tuple[int, ...]
  num_classes: int
  num_samples: int

  def replica_batch(self, num_classes: int, num_replicas: int) -> Batch:
    """Specs of what one replica takes.

    Args:
      num_classes: P, of the global batch.
      num_replicas: among which they are divided.

    Raises:
      UserError: they don't divide, or micro-batches don't divide what each gets.
    """
    if num_classes % num_replicas:
      multiple = -(-num_classes // num_replicas) * num_replicas
      raise UserError(
        f"PKSchedule.classes_per_batch={num_classes} does not split over "
        f"{num_replicas} replicas; try {multiple}."
      )
    size = num_classes * self.num_samples // num_replicas
    micro_batches.check_size(self.step.options.num_micro_batches, size)
    return Batch(
      tf.TensorSpec([size, *self.input_shape], tf.float32),
      tf.TensorSpec([size], tf.int32),
      tf.TensorSpec([size], tf.float32),
    )


def of_run() -> RunStep:
  """The step of the config that gin has.

  Raises:
    UserError: the parts don't fit each other, or the schedule must see the data.
  """
  decoder = _decoder()
  # By place, because gin makes what is given by name all the same.
  parts = Parts(_DeclaredDataset(decoder))  # type: ignore[arg-type, call-arg]
  shape = _schedule_shape(parts)
  parts.create_variables()
  return RunStep(parts.step, tuple(decoder.shape), *shape)


def _decoder() -> Decoder:
  dataset = gin.query_parameter("train.dataset")
  return copy.deepcopy(gin.query_parameter(f"{dataset.scoped_selector}.decoder"))


def _schedule_shape(parts: Parts) -> tuple[int, int]:
  records = np.arange(_NUM_CLASSES * _NUM_SAMPLES)
  table = MemberTable(records, np.arange(_NUM_CLASSES + 1) * _NUM_SAMPLES)
  make: Any = parts.schedule_fn
  try:
    return make(table).shape
  except AttributeError as error:
    raise UserError(
      f"train.schedule_fn draws by the data's own names ({error}), which are not "
      "looked at here; give @PKSchedule of as many classes."
    ) from error
