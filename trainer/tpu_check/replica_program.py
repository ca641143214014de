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
from trainer.losses.class_centres import TrainingClasses
from trainer.losses.tiled_loss import for_accelerator
from trainer.training.checks import check_batch
from trainer.training.step import TrainStep

# More classes and samples than any batch; they are never looked up.
_NUM_CLASSES, _NUM_SAMPLES = 2**20, 2**20


class _DeclaredDataset(NamedTuple):
  """Dataset declared in a run file, without its data."""

  decoder: Decoder


class _Shape(NamedTuple):
  """Shape of a sampler, as needed to check the replicas.

  Attributes:
    shape: (P, K).
  """

  shape: tuple[int, int]


class RunStep(NamedTuple):
  """A training step and its batch.

  Attributes:
    step: with its variables created.
    input_shape: of one example.
    num_classes: P, of the global batch.
    num_samples: K.
  """

  step: TrainStep
  input_shape: tuple[int, ...]
  num_classes: int
  num_samples: int

  def class_unit(self, num_replicas: int) -> int:
    """Returns the unit of P, so that it divides over replicas and micro-batches.

    Args:
      num_replicas: number of replicas that share the classes.
    """
    num_parts = self.step.options.num_micro_batches
    return num_replicas * num_parts // math.gcd(num_parts, self.num_samples)

  def replica_batch(self, num_classes: int, num_replicas: int) -> Batch:
    """Returns the specs of one replica's batch.

    Args:
      num_classes: P, of the global batch.
      num_replicas: number of replicas that share them.

    Raises:
      UserError: replicas, micro-batches or the loss do not support this number of
        classes.
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


def build_run_step(num_replicas: int) -> RunStep:
  """Returns the step of the current gin config.

  Args:
    num_replicas: R, over which class centres are divided.

  Raises:
    UserError: the parts do not fit each other, the sampler needs the data, or the
      number of classes of class centres is not set.
  """
  decoder = _decoder()
  # Pass by position: gin also builds arguments that are passed by name.
  parts = make_parts(_DeclaredDataset(decoder))
  shape = _sampler_shape(parts)
  parts.create_variables(has_centres=False)
  for table in parts.step.loss.tables:
    if table.given_num_classes is None:
      raise UserError(
        "ClassCentres.num_classes is not set, and this check does not read the data; "
        "set the number of training classes."
      )
    labels = np.arange(table.given_num_classes)
    classes = TrainingClasses(labels, np.full(len(labels), _NUM_SAMPLES))
    size = parts.step.encoder.embedding_size
    table.create_variables(size, classes, num_replicas=num_replicas)
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
      f"train.sampler_fn reads the data ({error}), which this check does not; use "
      "@PKSampler with as many classes."
    ) from error


class Program(NamedTuple):
  """Program of one replica.

  Attributes:
    hlo: serialized; takes the parts of the batch, then the variables.
    variables: all that the step reads or assigns, and captured tensors.
  """

  hlo: bytes
  variables: Sequence[Union[tf.Variable, tf.Tensor]]


def export_program(step: TrainStep, batch: Batch, num_replicas: int) -> Program:
  """Lowers a step: gather, loss, statistics, gradients, optimizer.

  It is traced as on a machine with accelerators, without `tf.distribute`.

  Args:
    step: with its variables created.
    batch: specs of a replica's part.
    num_replicas: R.

  Raises:
    tf.errors.OpError: XLA does not compile an operation.
  """

  def update(*parts: tf.Tensor):
    collectives = XlaCollectives(num_replicas)
    with using(collectives), for_accelerator():
      return dict(step(Batch(*parts), collectives))

  function = tf.function(update, jit_compile=True, autograph=False)
  graph = function.get_concrete_function(*batch)
  # Only the key of a resource identifies the variable that a graph has captured.
  by_handle = {id(variable.handle): variable for variable in graph.variables}
  return Program(
    function.experimental_get_compiler_ir(*batch)(stage="hlo_serialized"),
    [by_handle.get(id(each), each) for each in graph.captured_inputs],
  )
