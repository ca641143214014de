"""Checkpoints: what is saved, written in the background, and restored.

Values are copied to the host first, so that the variables can change while they are
written.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.distribute.workers import current_workers
from trainer.errors import NotFiniteError, UserError, short_reason
from trainer.losses.class_centres import ClassCentres
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.models.layers import make_replicas_equal
from trainer.runtime import tensorflow_private
from trainer.training import centre_shards, checkpoint_files
from trainer.training.checkpoint_files import FOLDER
from trainer.training.optimizers import AveragedWeights, hyperparameters, set_step

# TensorFlow's reader raises the last two for a file in another format.
_UNREADABLE = (tf.errors.OpError, IndexError, RuntimeError)
_NUM_SHOWN = 3
_BANK = "cross_batch_memory/contents/embeddings/.ATTRIBUTES/VARIABLE_VALUE"


class Background:
  """A background thread for one function at a time; the next one waits."""

  def __init__(self):
    self._thread: Optional[threading.Thread] = None
    self._error: Optional[BaseException] = None

  def start(self, work: Callable[[], None]) -> None:
    """Waits for the previous function, and starts this one.

    Args:
      work: function to run.
    """
    self.wait()
    self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
    self._thread.start()

  def wait(self) -> None:
    """Waits until no function is running.

    Raises:
      BaseException: raised by the function.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def _run(self, work):
    try:
      work()
    except BaseException as error:
      self._error = error


Snapshot = dict[str, np.ndarray]


def take_snapshot(checkpoint: tf.train.Checkpoint) -> Snapshot:
  """Copies all values to the host.

  Must be called on every worker, because reading replica variables may be a collective.

  Args:
    checkpoint: objects to save.

  Returns:
    Values by their names in TensorFlow's files.
  """
  tensors = tensorflow_private.serialized_tensors(checkpoint)
  return {name: _on_host(tensor) for name, tensor in tensors.items()}


def variable_paths(checkpoint: tf.train.Checkpoint) -> set[str]:
  """Returns the paths of the variables that a checkpoint would save, without values.

  Args:
    checkpoint: objects to save.

  Returns:
    Paths such as "encoder/_head/kernel", as in TensorFlow's files.
  """
  view = tf.train.TrackableView(checkpoint)
  # Breadth first, as TensorFlow names objects that are reachable by several paths.
  queue: list[tuple[str, Any]] = [("", checkpoint)]
  seen = {id(checkpoint)}
  paths = set()
  for path, each in queue:
    for name, child in view.children(each).items():
      if id(child) not in seen:
        seen.add(id(child))
        queue.append((f"{path}/{name}" if path else name, child))
    if isinstance(each, tf.Variable):
      paths.add(path)
  return paths


def saved_paths(prefix: str) -> set[str]:
  """Returns the paths of the variables in a checkpoint file.

  Args:
    prefix: path of the files without their extensions.
  """
  names = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
  return {name.split("/.", 1)[0] for name in names if "/." in name}


def not_finite(snapshot: Snapshot) -> list[str]:
  """Returns the sorted paths of values with NaN or an infinity.

  Args:
    snapshot: the values.
  """
  return sorted(
    name.split("/.", 1)[0]
    for name, value in snapshot.items()
    if np.issubdtype(value.dtype, np.floating)
    and value.size
    # min and max propagate NaN, and need no array of flags.
    and not (np.isfinite(value.min()) and np.isfinite(value.max()))
  )


def write_snapshot(snapshot: Snapshot, prefix: str) -> None:
  """Writes TensorFlow's two files.

  Args:
    snapshot: the values.
    prefix: path of the files without their extensions.

  Raises:
    tf.errors.OpError: they cannot be written.
  """
  names = sorted(snapshot)
  with tf.device("CPU:0"):
    tf.raw_ops.SaveV2(
      prefix=prefix,
      tensor_names=names,
      shape_and_slices=[""] * len(names),
      tensors=[tf.constant(snapshot[name]) for name in names],
    )


def claimed_bytes(prefix: str) -> int:
  """Returns the memory that the tensors declared by a checkpoint would take, in bytes.

  Args:
    prefix: path of the files without their extensions.
  """
  reader = tf.train.load_checkpoint(prefix)
  dtypes = reader.get_variable_to_dtype_map()
  shapes = reader.get_variable_to_shape_map()
  return sum(
    int(np.prod(shape, dtype=object)) * dtypes[name].size
    for name, shape in shapes.items()
  )


def data_bytes(prefix: str) -> int:
  """Returns the size of the data file in bytes."""
  return os.path.getsize(f"{prefix}.data-00000-of-00001")


def _on_host(tensor) -> np.ndarray:
  # Per-replica variables are given as specs and read on demand.
  value = getattr(tensor, "tensor", tensor)
  # A view of the CPU's own memory would change with the variable.
  return np.array(value.numpy())


class TrainingState(NamedTuple):
  """What a checkpoint has beside the encoder.

  Attributes:
    optimizer: built; its `iterations` are the step.
    loss: saved if it is a `tf.Module` (a learned temperature); the rows of its class
      centres are written by the worker that has them.
    averages: of the encoder's weights, if there are any.
    cross_batch_memory: of the training, if it has one.
  """

  optimizer: tf.keras.optimizers.Optimizer
  loss: Any = None
  averages: Optional[AveragedWeights] = None
  cross_batch_memory: Optional[CrossBatchMemory] = None

  @property
  def tables(self) -> Sequence[ClassCentres]:
    """Class centres of the loss."""
    return getattr(self.loss, "tables", ())

  @property
  def parts(self) -> dict[str, Any]:
    """The objects that TensorFlow saves, by name."""
    parts = self._asdict()
    if not isinstance(self.loss, tf.Module):
      del parts["loss"]
    return {name: part for name, part in parts.items() if part is not None}


class Checkpoints:
  """The checkpoints of a run.

  Attributes:
    notes: numbers stored with each checkpoint, by name.
    failure: why the last checkpoint could not be written; None if it could.
    saved_step: step of the newest checkpoint written or restored; None if there is
      none.
    new_classes: [n] places of the classes that had no centres in the checkpoint
      restored.

  Args:
    model_dir: folder of the run.
    encoder: its variables exist.
    training: the rest of the state; None for encoders only.
    allows_other_classes: whether class centres may be restored for other classes.
    num_kept: number of newest checkpoints to keep.
    is_chief: whether this worker writes. All workers must save, because reading a
      per-replica variable is a collective.
  """

  def __init__(
    self,
    *,
    model_dir: str,
    encoder: tf.keras.Model,
    training: Optional[TrainingState] = None,
    allows_other_classes: bool = False,
    num_kept: int = 1,
    is_chief: bool = True,
  ):
    self.notes: dict[str, int] = {}
    self.failure: Optional[str] = None
    self.saved_step: Optional[int] = None
    self.new_classes = np.empty(0, np.int64)
    self._encoder = encoder
    self._training = training
    self._tables = training.tables if training else ()
    self._allows_other_classes = allows_other_classes
    parts = training.parts if training else {}
    self._checkpoint = tf.train.Checkpoint(encoder=encoder, **parts)
    self._folder = os.path.join(model_dir, FOLDER)
    self._num_kept = num_kept
    self._is_chief = is_chief
    self._background = Background()
    self._is_ending = threading.Event()
    self._asked_step: Optional[int] = None

  @property
  def num_bytes(self) -> int:
    """Size of one checkpoint, without its index."""
    variables = [*self._encoder.variables]
    if self._training:
      variables += self._training.optimizer.variables
      variables += getattr(self._training.averages, "averages", ())
      variables += getattr(self._training.cross_batch_memory, "variables", ())
    num_bytes = sum(v.shape.num_elements() * v.dtype.size for v in variables)
    return num_bytes + sum(table.num_bytes for table in self._tables)

  def save(self, step: int) -> None:
    """Copies everything to the host, and writes it in the background.

    If replicas have moving averages of their own, all continue with the saved ones. A
    step that is already being saved is not saved again.

    Args:
      step: number of steps done.

    Raises:
      NotFiniteError: a value is not finite; on all workers, and nothing is written.
    """
    if step == self._asked_step:
      return
    self._asked_step = step
    make_replicas_equal(self._encoder)
    values = take_snapshot(self._checkpoint)
    if self._tables:
      self._background.wait()  # Two copies of the rows may not fit into memory.
    rows = centre_shards.copy_rows(step, self._tables, self._is_chief)
    bad = not_finite({**values, **{each.name: each.values for each in rows}})
    token = ""
    if self._tables:  # The rows of each worker are its own.
      bad, token = _exchange(bad)
    if bad:
      raise NotFiniteError(
        f"step {step}: {', '.join(bad[:_NUM_SHOWN])} ({len(bad)} in all) not finite "
        f"after the update, so no checkpoint is written; {self.newest}."
      )
    if self._is_chief:
      notes = dict(self.notes)
      self._background.start(lambda: self._write(values, rows, step, notes, token))
    elif rows:
      self._background.start(lambda: self._write_rows(rows, step, token))
    else:
      self.saved_step = step

  def steps(self) -> list[int]:
    """Returns the steps of the existing checkpoints, the newest first."""
    return checkpoint_files.steps(self._folder)

  def drop_after(self, step: int) -> None:
    """Removes checkpoints after the step from which a run resumes.

    Args:
      step: the last to keep.
    """
    checkpoint_files.drop_after(self._folder, step)

  def end_soon(self) -> None:
    """Makes `wait` return in seconds, though a worker may not write its part."""
    self._is_ending.set()

  def wait(self) -> None:
    """Waits until the checkpoint is written; `failure` then holds a write error."""
    self._background.wait()

  def restore(self) -> Optional[int]:
    """Restores the newest valid checkpoint, and logs the invalid ones.

    If only an encoder is restored, it gets its averaged weights if the checkpoint has
    them. Hyperparameters of the optimizer keep the values of the configuration, and
    differences from the checkpoint are logged.

    Returns:
      The number of steps done; None if there is no checkpoint.

    Raises:
      UserError: the checkpoint is of another encoder, loss or optimizer, or there are
        checkpoints but none is valid.
    """
    if self._is_chief and self._tables:
      centre_shards.remove_unpublished(self._folder, self.steps())
    step = self._newest_whole()
    if step is None:
      return None
    path = checkpoint_files.prefix(self._folder, step)
    if self._training:
      self._restore_training(path, step, self._training.optimizer)
    else:
      self._read(path).expect_partial()
      _assign_averages(self._encoder, path)
    _refresh_constants(self._encoder)
    self.notes = checkpoint_files.notes(self._folder, step)
    self.saved_step = self._asked_step = step
    logging.info("Restored %s.", path)
    return step

  def _restore_training(self, path: str, step: int, optimizer: Any) -> None:
    """Restores all state, but keeps the hyperparameters of the configuration."""
    configured = {
      name: (variable, variable.numpy())
      for name, variable in hyperparameters(optimizer).items()
    }
    self._read(path)
    self.new_classes = centre_shards.restore_rows(
      self._folder,
      checkpoint_files.shard_facts(self._folder, step),
      self._tables,
      allows_other_classes=self._allows_other_classes,
    )
    set_step(optimizer, step)
    for name, (variable, value) in configured.items():
      if variable.numpy() != value:
        logging.info(
          "%s: the checkpoint has %g; %g of this configuration is used after step %d.",
          name,
          variable.numpy(),
          value,
          step,
        )
        variable.assign(value)

  def _read(self, path: str) -> Any:
    """Reads TensorFlow's files, and returns the status.

    Raises:
      UserError: they are not TensorFlow's, or of another configuration.
    """
    try:
      self._check_size(path)
      self._check_memory(path)
      status = self._checkpoint.read(path)
      status.assert_existing_objects_matched()
      if self._training:
        status.assert_consumed()
      return status
    except UserError:
      raise
    except (AssertionError, ValueError) as error:
      raise UserError(
        f"{path} does not fit this configuration: {self._misfit(path, error)}"
      ) from error
    except _UNREADABLE as error:
      raise UserError(
        f"{path} is not a TensorFlow checkpoint ({_first_line(error)}); remove it."
      ) from error

  def _newest_whole(self) -> Optional[int]:
    """Returns the step of the newest valid checkpoint; None if there is none at all.

    Raises:
      UserError: all existing checkpoints are damaged.
    """
    faults: list[str] = []
    for step in checkpoint_files.steps(self._folder):
      fault = checkpoint_files.fault(
        self._folder, step, checks_shards=self._training is not None
      )
      if fault is None:
        for each in faults:
          logging.warning("%s; resuming from the checkpoint of step %d.", each, step)
        return step
      faults.append(fault)
    if faults:
      raise UserError(
        f"no checkpoint in {self._folder} is intact: {faults[0]}; copy one there "
        "again, or remove the folder to begin at the first step."
      )
    return None

  def _check_size(self, path: str) -> None:
    claimed, there = claimed_bytes(path), data_bytes(path)
    if claimed > there:
      raise RuntimeError(
        f"its index lists {claimed} bytes of tensors, and its data has {there}"
      )

  def _check_memory(self, path: str) -> None:
    """Raises a clear error where TensorFlow would report a missing variable."""
    if self._training is None:
      return
    shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    there = _words_of(shapes.get(_BANK))
    memory = self._training.cross_batch_memory
    wanted = _words_of(memory and memory.shape)
    if there != wanted:
      raise UserError(
        f"{path} does not fit this configuration: its memory has {there}, and "
        f"TrainStep.cross_batch_memory has {wanted}."
      )

  def _misfit(self, path: str, error: Exception) -> str:
    """Names the parts whose variables differ between a checkpoint and this run."""
    saved = saved_paths(path)
    mine = variable_paths(self._checkpoint)
    parts = []
    for part in sorted({name.split("/", 1)[0] for name in saved ^ mine}):
      more, fewer = (
        sum(name.split("/", 1)[0] == part for name in names)
        for names in (saved - mine, mine - saved)
      )
      parts.append(f"{part} (it has {more} other variables, and lacks {fewer})")
    if not parts or self._training is None:
      return _first_line(error)
    return (
      f"it differs in {', '.join(parts)}. Such a change needs a new run: take another "
      "--model_dir."
    )

  def _write(
    self,
    values: Snapshot,
    rows: Sequence[centre_shards.Rows],
    step: int,
    notes: dict[str, int],
    token: str,
  ) -> None:
    """Writes to a staging folder and publishes; records a failure."""
    try:
      folder = checkpoint_files.create_staging_dir(self._folder)
      write_snapshot(values, checkpoint_files.prefix(folder, step))
      centre_shards.write_rows(self._folder, rows, token)
      names = centre_shards.shard_names(step, self._tables)
      shards = centre_shards.collect_facts(self._folder, names, token, self._is_ending)
      checkpoint_files.publish(self._folder, step, notes, shards)
      self.saved_step, self.failure = step, None
      checkpoint_files.prune(self._folder, self._num_kept)
    except (OSError, tf.errors.OpError) as error:
      checkpoint_files.remove_staging_dir(self._folder)
      centre_shards.remove_step(self._folder, step)
      self._fail(step, error)

  def _write_rows(
    self, rows: Sequence[centre_shards.Rows], step: int, token: str
  ) -> None:
    """Writes this worker's rows of class centres; the chief publishes them."""
    try:
      os.makedirs(self._folder, exist_ok=True)
      centre_shards.write_rows(self._folder, rows, token)
      self.saved_step, self.failure = step, None
    except OSError as error:
      self._fail(step, error)

  def _fail(self, step: int, error: Exception) -> None:
    self.failure = (
      f"the checkpoint of step {step} can't be written: {short_reason(error)}"
    )
    if not self._tables:  # Otherwise other workers may have written their parts.
      self._asked_step = None
    logging.warning("%s; %s.", self.failure, self.newest)

  @property
  def newest(self) -> str:
    """Describes the checkpoint that a run would resume from."""
    if self.saved_step is None:
      return "no checkpoint was saved"
    return f"the newest checkpoint is of step {self.saved_step}"


def _exchange(names: Sequence[str]) -> tuple[list[str], str]:
  """Returns the names of all workers, sorted, and a random token of the chief."""
  own = json.dumps([list(names), secrets.token_hex(8)])
  of_workers = [json.loads(text) for text in current_workers().exchange(own)]
  return sorted({name for each, _ in of_workers for name in each}), of_workers[0][1]


def _words_of(shape: Optional[Sequence[int]]) -> str:
  return "no entries" if shape is None else "{:,} entries of {}".format(*shape)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refresh_constants(encoder: tf.keras.Model) -> None:
  """Updates layers such as Normalization to the restored weights."""
  for layer in encoder.submodules:
    if isinstance(layer, tf.keras.layers.Layer):
      layer.finalize_state()


def _assign_averages(encoder: tf.keras.Model, path: str) -> None:
  reader = tf.train.load_checkpoint(path)
  for number, weight in enumerate(encoder.trainable_variables):
    name = f"averages/averages/{number}/.ATTRIBUTES/VARIABLE_VALUE"
    if reader.has_tensor(name):
      weight.assign(reader.get_tensor(name))
