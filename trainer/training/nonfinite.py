"""Handling and diagnosis of updates that are not finite.

The batch of a step is a pure function of the step, and the weights are those before it.
The step is computed again on the same replicas, layer by layer. It leaves no trace,
because variables written by its forward passes are restored.

Shapes: B examples on a replica, R replicas.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import tfrecord
from trainer.data.pipeline import Batch, Batches
from trainer.data.records import RecordIndex
from trainer.data.samplers import BatchSampler
from trainer.distribute.collectives import Collectives, current_collectives
from trainer.distribute.strategy import ReplicaBatches
from trainer.distribute.workers import current_workers
from trainer.errors import NotFiniteError, UserError, short_reason
from trainer.runtime import filesystem
from trainer.training.checkpoint import Checkpoints
from trainer.training.optimizers import set_step
from trainer.training.options import LoopOptions
from trainer.training.step import TrainStep

DIAGNOSIS_FILE = "nonfinite-{}.json"
_NUM_SHOWN = 5
_COUNT = "nonfinite_steps"


class Diagnosis:
  """A second computation of a step on all replicas, to find what is not finite.

  Must be called by all workers.

  Args:
    step: with the weights before it.
    index: gives the records' keys.
    sampler: gives the records of the batch.
    batches: gives the batch.
    model_dir: folder for a file with the keys of all records; None to write none.
  """

  def __init__(
    self,
    *,
    step: TrainStep,
    index: RecordIndex,
    sampler: BatchSampler,
    batches: Batches,
    model_dir: Optional[str],
  ):
    self._rerun = StepRerun(step)
    self._index = index
    self._sampler = sampler
    self._batches = batches
    self._model_dir = model_dir

  def __call__(self, step: int) -> str:
    """Describes what is not finite in a step, and the records of its batch."""
    try:
      found = self._rerun.describe(self._batch(step))
    except Exception as error:  # Must not hide the step's own error.
      logging.warning("Step %d can't be computed again: %s", step, error)
      why = (str(error).strip().splitlines() or [""])[0]
      found = (
        "what is not finite could not be found by computing the step again "
        f"({type(error).__name__}: {why})"
      )
    keys = [self._key(int(number)) for number in np.ravel(self._sampler.batch(step))]
    shown = ", ".join(keys[:_NUM_SHOWN])
    where = self._write(step, found, keys) if self._model_dir else ""
    return f"{found}; the batch has {shown}, … ({len(keys)} records{where})"

  def _batch(self, step: int) -> Any:
    """Returns the batch of a step, on the replicas."""
    workers = current_workers()
    dataset = self._batches.dataset(workers.shard(), first_step=step, num_steps=1)
    batches = ReplicaBatches(tf.distribute.get_strategy(), dataset)
    return workers.run_on_all(lambda: next(batches.iterator))

  def _key(self, number: int) -> str:
    """Returns the record's key, or else its position."""
    place = self._index.describe(number)
    try:
      [record] = self._index.read([number])
      [key] = tfrecord.feature_values(record, place)["key"]
      return key.decode("utf-8", "replace")
    except (UserError, KeyError, ValueError, AttributeError):
      return place

  def _write(self, step: int, found: str, keys: Sequence[str]) -> str:
    path = os.path.join(str(self._model_dir), DIAGNOSIS_FILE.format(step))
    content = {"step": step, "what": found, "keys": keys}
    try:
      filesystem.replace_file(path, json.dumps(content, indent=1))
    except OSError as error:
      return f"; {path} can't be written: {short_reason(error)}"
    return f"; all in {path}"


class _Check(NamedTuple):
  """A number that must be 0, with its description.

  Attributes:
    message: in the order of the computation; the first one not 0 is reported.
    num_bad: [] float32; of this replica, later of all.
  """

  message: str
  num_bad: tf.Tensor


class StepRerun:
  """A second computation of a step without its update; traced once.

  Args:
    step: with the weights before the update.
  """

  def __init__(self, step: TrainStep):
    self._step = step
    self._messages: list[str] = []
    self._seen = _SeenOutputs(step.encoder)

  def describe(self, batch: Any) -> str:
    """Returns the first non-finite quantity in the order of the computation.

    Args:
      batch: of each replica, or one for every replica.
    """
    before = self._read()
    try:
      with self._seen.patched():
        is_bad_row, num_bad, loss = self._run(batch)
    finally:
      self._write(before)
    rows = np.flatnonzero(is_bad_row.numpy()).tolist()
    if rows:
      return f"the inputs of rows {rows[:_NUM_SHOWN]} of the batch are not finite"
    failed = [text for text, bad in zip(self._messages, num_bad.numpy()) if bad]
    if not failed:
      return "all values are finite when the step is computed again"
    return failed[0].format(loss=loss.numpy())

  @tf.function(autograph=False)
  def _read(self):
    return tf.distribute.get_strategy().run(self._step.read_forward_state)

  @tf.function(autograph=False)
  def _write(self, values):
    tf.distribute.get_strategy().run(self._step.write_forward_state, args=(values,))

  @tf.function(autograph=False)
  def _run(self, batch):
    strategy = tf.distribute.get_strategy()
    found = strategy.run(self._on_replica, args=(batch,))
    return [strategy.experimental_local_results(each)[0] for each in found]

  def _on_replica(self, batch: Batch):
    """Returns [R·B] bool, non-finite rows; [n] counts of the checks; and the loss."""
    collectives = current_collectives()
    rows = collectives.gather(~_are_rows_finite(batch.inputs))
    checks = list(self._checks_before())
    with self._seen.recording() as outputs:
      self._step.embed_layerwise(batch, collectives)
    checks += [
      _Check(f"the output of layer {name} is not finite", num_bad)
      for name, num_bad in outputs
    ]
    checks += [
      _Check(
        f"what the forward pass writes to {each.name} is not finite", _num_bad(each)
      )
      for each in self._step.forward_state
    ]
    last, loss = self._checks_after(batch, collectives)
    checks += last
    self._messages = [check.message for check in checks]
    counts = tf.stack([check.num_bad for check in checks])
    return rows, *collectives.sum([counts, loss])

  def _checks_before(self) -> Iterator[_Check]:
    """Yields checks of the inputs of a step."""
    for weight in self._step.trainable_variables:
      yield _Check(f"the weights of {weight.name} are not finite", _num_bad(weight))
    for each in self._step.forward_state:
      yield _Check(
        f"{each.name} was not finite before the step, so the checkpoint it comes from "
        "is damaged",
        _num_bad(each),
      )

  def _checks_after(
    self, batch: Batch, collectives: Collectives
  ) -> tuple[list[_Check], tf.Tensor]:
    """Returns checks of loss and gradients, and this replica's share of the loss."""
    result = self._step.compute_update(batch, collectives)
    loss, gradients = result.statistics["train/loss"].total, result.update.gradients
    message = f"the loss, {type(self._step.loss).__name__}, is {{loss}}"
    checks = [_Check(message, _num_bad(loss))]
    for weight, gradient in zip(self._step.trainable_variables, gradients):
      message = f"the gradient to {weight.name} is not finite"
      checks.append(_Check(message, _num_bad(gradient)))
    for number, rows in enumerate(result.update.rows):
      message = f"the gradient to the class centres of table {number} is not finite"
      checks.append(_Check(message, _num_bad(tf.linalg.global_norm([rows.gradients]))))
    checks.append(
      _Check(
        "the gradient is so large that its squared norm is not finite",
        _num_bad(tf.linalg.global_norm(gradients)),
      )
    )
    return checks, loss


class _SeenOutputs:
  """A record of the outputs of a model's layers, those of inner layers first.

  Args:
    model: its layers exist.
  """

  def __init__(self, model: tf.keras.Model):
    self._model = model
    # Replicas are traced in separate threads, one after the other.
    self._local = threading.local()

  @contextlib.contextmanager
  def recording(self) -> Iterator[list[tuple[str, tf.Tensor]]]:
    """Records the outputs of layers that a replica calls in this context, in a graph.

    Yields:
      A list, filled by the end of the context, with the layer's name and the number of
      non-finite values for each output.
    """
    graph = tf.compat.v1.get_default_graph()
    outputs: list[tuple[str, Any]] = []
    self._local.outputs = outputs
    found: list[tuple[str, tf.Tensor]] = []
    yield found
    self._local.outputs = None
    for name, output in outputs:
      # A layer may trace a function of its own, whose tensors are not accessible.
      tensors = [each for each in tf.nest.flatten(output) if _is_of(each, graph)]
      found.extend((name, _num_bad(each)) for each in tensors)

  @contextlib.contextmanager
  def patched(self) -> Iterator[None]:
    """Records outputs of layers traced in this context, on all replicas.

    Yields:
      Nothing.
    """
    modules = {id(each): each for each in self._model.submodules}.values()
    layers = [each for each in modules if isinstance(each, tf.keras.layers.Layer)]
    # Some Keras layers keep the function that they call in the same attribute.
    own = [(layer, vars(layer).get("call")) for layer in layers]
    for layer in layers:
      layer.call = self._recording(layer.name, layer.call)
    try:
      yield
    finally:
      for layer, call in own:
        del layer.call
        if call is not None:
          layer.call = call

  def _recording(self, name: str, call):
    @tf.autograph.experimental.do_not_convert
    def call_and_record(*args, **kwargs):
      output = call(*args, **kwargs)
      outputs = getattr(self._local, "outputs", None)
      if outputs is not None:
        outputs.append((name, output))
      return output

    return call_and_record


def _is_of(value: Any, graph: tf.Graph) -> bool:
  """Returns whether a value is a floating-point tensor of that graph."""
  is_tensor = isinstance(value, tf.Tensor) and value.dtype.is_floating
  return is_tensor and value.graph is graph


def _num_bad(values: Any) -> tf.Tensor:
  """Counts values that are not finite, [] float32; 0 for integers."""
  values = tf.convert_to_tensor(values)
  if not values.dtype.is_floating:
    return tf.constant(0.0)
  return tf.reduce_sum(tf.cast(~tf.math.is_finite(values), tf.float32))


def _are_rows_finite(inputs: tf.Tensor) -> tf.Tensor:
  """Returns whether each row is finite, [B] bool."""
  flat = tf.reshape(tf.cast(inputs, tf.float32), [inputs.shape[0], -1])
  return tf.reduce_all(tf.math.is_finite(flat), axis=1)


class NonfinitePolicy:
  """The policy for a non-finite update: stop, skip the batch, or restore.

  Args:
    options: the policy and its limit.
    optimizer: its `iterations` are the step, and so the number of the next batch.
    checkpoints: store the count of skipped updates.
    restore_fn: restores the newest checkpoint; called on all workers.
    diagnose_fn: describes what is not finite in a step, and its records.
  """

  def __init__(
    self,
    *,
    options: LoopOptions,
    optimizer: tf.keras.optimizers.Optimizer,
    checkpoints: Checkpoints,
    restore_fn: Callable[[], object],
    diagnose_fn: Callable[[int], str],
  ):
    self._options = options
    self._optimizer = optimizer
    self._checkpoints = checkpoints
    self._restore_fn = restore_fn
    self._diagnose_fn = diagnose_fn

  @property
  def _count(self) -> int:
    return self._checkpoints.notes.get(_COUNT, 0)

  def metrics(self) -> dict[str, float]:
    """Returns the number of skipped batches, if skipping is enabled."""
    if self._options.on_nonfinite == "stop":
      return {}
    return {"train/nonfinite_steps": float(self._count)}

  def handle_nonfinite(self, step: int) -> None:
    """Continues with the batch after that of a step, or raises.

    Args:
      step: the step whose update is not finite.

    Raises:
      NotFiniteError: the policy is 'stop', or `max_nonfinite_steps` was exceeded.
    """
    diagnosis = self._diagnose_fn(step)
    if self._options.on_nonfinite == "stop":
      self._stop(step, f"{diagnosis}; the update is not applied")
    if self._count >= self._options.max_nonfinite_steps:
      self._stop(step, f"{diagnosis}; {self._count} batches were skipped before")
    count = self._count + 1
    if self._options.on_nonfinite == "restore":
      self._restore_fn()
      logging.warning("Step %d: %s; %s.", step, diagnosis, self._checkpoints.newest)
    else:
      logging.warning("Step %d: %s; its batch is skipped.", step, diagnosis)
    self._checkpoints.notes[_COUNT] = count
    set_step(self._optimizer, step + 1)

  def _stop(self, step: int, why: str) -> None:
    self._checkpoints.wait()
    raise NotFiniteError(f"step {step}: {why}; {self._checkpoints.newest}.")
