"""What is not finite in a step whose update was not made, and in whose records.

The batch of a step is a pure function of it, and the weights are as they were before:
so it is computed again, layer by layer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import examples
from trainer.data.pipeline import Batch, Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.schedule import Schedule
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.loop.step import TrainStep

FILE_NAME = "not_finite-{}.json"
_NUM_SHOWN = 5


class Diagnosis:
  """Looks at a step again, on one device.

  Args:
    step: with the weights before it.
    index: names the records.
    schedule: says which records made the batch.
    batches: gives the batch.
    model_dir: gets a file with the keys of all records; None to write none.
  """

  def __init__(
    self,
    *,
    step: TrainStep,
    index: RecordIndex,
    schedule: Schedule,
    batches: Batches,
    model_dir: Optional[str],
  ):
    self._step = step
    self._index = index
    self._schedule = schedule
    self._batches = batches
    self._model_dir = model_dir

  def __call__(self, step: int) -> str:
    """In words, what is not finite in that step, and which records it has."""
    try:
      dataset = self._batches.dataset(Shard(0, 1, 1), first_step=step, num_steps=1)
      [batch] = dataset
      found = _what(self._step, batch)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
      logging.warning("Step %d can't be computed again: %s", step, error)
      found = (
        "what is not finite could not be found by computing it again on one device"
      )
    keys = [self._key(int(number)) for number in np.ravel(self._schedule.batch(step))]
    shown = ", ".join(keys[:_NUM_SHOWN])
    where = f"; all in {self._write(step, found, keys)}" if self._model_dir else ""
    return f"{found}; the batch has {shown}, … ({len(keys)} records{where})"

  def _key(self, number: int) -> str:
    """The record's own key, or else its place."""
    place = self._index.describe(number)
    try:
      [record] = self._index.read([number])
      [key] = examples.values(record, place)["key"]
      return key.decode("utf-8", "replace")
    except (UserError, KeyError, ValueError, AttributeError):
      return place

  def _write(self, step: int, found: str, keys: Sequence[str]) -> str:
    path = os.path.join(str(self._model_dir), FILE_NAME.format(step))
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
      json.dump({"step": step, "what": found, "keys": keys}, file, indent=1)
    return path


def _what(step: TrainStep, batch: Batch) -> str:
  """The first thing that is not finite, in the order of the computation."""
  if not _is_finite(batch.inputs):
    rows = np.flatnonzero(~_are_rows_finite(batch.inputs)).tolist()
    return f"the inputs of rows {rows[:_NUM_SHOWN]} of the batch are not finite"
  for weight in step.trainable_variables:
    if not _is_finite(weight):
      return f"the weights of {weight.name} are not finite"
  outputs: list[tuple[str, Any]] = []
  with _outputs_seen(step.encoder, outputs):
    share, gradients = step.gradients(batch, OneReplica())
  for name, output in outputs:
    if not _is_finite(output):
      return f"the output of layer {name} is not finite"
  if not _is_finite(share.loss):
    return f"the loss, {type(step.loss).__name__}, is {share.loss.numpy()}"
  names = [
    weight.name
    for weight, gradient in zip(step.trainable_variables, gradients)
    if not _is_finite(gradient)
  ]
  if names:
    return f"the gradient to {', '.join(names[:_NUM_SHOWN])} is not finite"
  return "computed again on one device, all is finite"


@contextlib.contextmanager
def _outputs_seen(model: tf.keras.Model, outputs: list) -> Iterator[None]:
  """Notes the output of each layer that is called inside, innermost first."""
  modules = {id(each): each for each in model.submodules}.values()
  layers = [each for each in modules if isinstance(each, tf.keras.layers.Layer)]

  def seeing(layer, call):
    def call_and_see(*args, **kwargs):
      output = call(*args, **kwargs)
      if tf.executing_eagerly():  # A layer may trace itself when it is first called.
        outputs.append((layer.name, output))
      return output

    return call_and_see

  for layer in layers:
    layer.call = seeing(layer, layer.call)
  try:
    yield
  finally:
    for layer in layers:
      del layer.call


def _is_finite(value) -> bool:
  return all(
    bool(tf.reduce_all(tf.math.is_finite(tf.cast(each, tf.float32))))
    for each in tf.nest.flatten(value)
  )


def _are_rows_finite(inputs: tf.Tensor) -> np.ndarray:
  flat = tf.reshape(tf.cast(inputs, tf.float32), [inputs.shape[0], -1])
  return tf.reduce_all(tf.math.is_finite(flat), axis=1).numpy()
