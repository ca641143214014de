"""The training step of a run file as an XLA program of one replica."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Union

import gin
import numpy as np
import tensorflow as tf

from trainer.cli.train import TrainConfig, make_parts
from trainer.data.images import Decoder
from trainer.data.index_arrays import MemberTable
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import XlaCollectives, using
from trainer.errors import UserError
from trainer.losses.tiled_loss import for_accelerator
from trainer.training.checks import check_batch
from trainer.training.step import TrainStep

# More classes, and more samples of one, than a batch will have; none is looked up.
_NUM_CLASSES, _NUM_SAMPLES = 2**20, 2**20


class _DeclaredDataset(NamedTuple):
  """What a run file says of its data, where the data are not."""

  decoder: Decoder


class _Shape(NamedTuple):
  """What of a sampler has to fit the replicas.

  Attributes:
    shape: (P, K).
  """

  shape: tuple[int, int]


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

  def class_unit(self, num_replicas: int) -> int:
    """Of what P must be a multiple, to divide over replicas and micro-batches.

    Args:
      num_replicas: among which the classes are divided.
    """
    num_parts = self.step.options.num_micro_batches
    return num_replicas * num_parts // math.gcd(num_parts, self.num_samples)

  def replica_batch(self, num_classes: int, num_replicas: int) -> Batch:
    """Specs of what one replica takes.

    Args:
      num_classes: P, of the global batch.
      num_replicas: among which they are divided.

    Raises:
      UserError: replicas, micro-batches or the loss don't go with so many classes.
    """
    sampler: Any = _Shape((num_classes, self.num_samples))
    check_batch(sampler, self.step, num_replicas)
    self.step.options.check_compiled(self.step.encoder, num_replicas)
    size = num_classes * self.num_samples // num_replicas
    return Batch(
      tf.TensorSpec([size, *self.input_shape], tf.float32),
      tf.TensorSpec([size], tf.int32),
      tf.TensorSpec([size], tf.float32),
      tf.TensorSpec([size], tf.int32),
    )


def step_of_run() -> RunStep:
  """The step of the config that gin has.

  Raises:
    UserError: the parts don't fit each other, or the sampler must see the data.
  """
  decoder = _decoder()
  # By place, because gin makes what is given by name all the same.
  parts = make_parts(_DeclaredDataset(decoder))
  shape = _sampler_shape(parts)
  parts.create_variables()
  return RunStep(parts.step, tuple(decoder.shape), *shape)


def _decoder() -> Decoder:
  dataset = gin.query_parameter("train.dataset")
  return copy.deepcopy(gin.query_parameter(f"{dataset.scoped_selector}.decoder"))


def _sampler_shape(parts: TrainConfig) -> tuple[int, int]:
  starts = np.arange(_NUM_CLASSES + 1) * _NUM_SAMPLES
  table = MemberTable(np.empty(0, np.int64), starts)
  make: Any = parts.sampler_fn
  try:
    return make(table).shape
  except AttributeError as error:
    raise UserError(
      f"train.sampler_fn draws by the data's own names ({error}), which are not "
      "looked at here; give @PKSampler of as many classes."
    ) from error


class Program(NamedTuple):
  """A replica's program.

  Attributes:
    hlo: serialized; it takes the parts of the batch, then the variables.
    variables: all that the step reads or assigns, and tensors that it was given.
  """

  hlo: bytes
  variables: Sequence[Union[tf.Variable, tf.Tensor]]


def export_program(step: TrainStep, batch: Batch, num_replicas: int) -> Program:
  """Lowers a step: gather, loss, statistics, gradients, optimizer.

  It is traced as on a machine with accelerators, without `tf.distribute`.

  Args:
    step: with its variables made.
    batch: specs of a replica's part.
    num_replicas: R.

  Raises:
    tf.errors.OpError: an operation is none that XLA compiles.
  """

  def update(*parts: tf.Tensor):
    collectives = XlaCollectives(num_replicas)
    with using(collectives), for_accelerator():
      return dict(step(Batch(*parts), collectives))

  function = tf.function(update, jit_compile=True, autograph=False)
  graph = function.get_concrete_function(*batch)
  # The key of a resource is all that tells which variable a graph has captured.
  by_handle = {id(variable.handle): variable for variable in graph.variables}
  return Program(
    function.experimental_get_compiler_ir(*batch)(stage="hlo_serialized"),
    [by_handle.get(id(each), each) for each in graph.captured_inputs],
  )
