"""The step that trains, as the program of one replica among R, for XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import using
from trainer.distribute.xla_collectives import XlaCollectives
from trainer.loop.step import TrainStep
from trainer.losses.accelerator import for_accelerator


class Program(NamedTuple):
  """A replica's program.

  Attributes:
    hlo: serialized; it takes the parts of the batch, then the variables.
    variables: all that the step reads or assigns, and tensors that it was given.
  """

  hlo: bytes
  variables: Sequence[Union[tf.Variable, tf.Tensor]]


def export(step: TrainStep, batch: Batch, num_replicas: int) -> Program:
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
