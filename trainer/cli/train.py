"""Mode `train`: builds a training run from gin, and runs it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

import gin
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.config import run_config
from trainer.data.dataset import Dataset
from trainer.data.pipeline import Batches
from trainer.data.samplers import BatchSampler, PKSampler
from trainer.distribute.strategy import ReplicaBatches, make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UserError
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.mining.miner import class_means
from trainer.mining.offline_mining import OfflineMining
from trainer.mining.rounds import ChangeRound, Rounds
from trainer.models.layers import set_seed
from trainer.retrieval.embedder import Embedder
from trainer.run import Run, watching
from trainer.runtime import shutdown
from trainer.runtime.watchdog import Watchdog
from trainer.training import callbacks, checks
from trainer.training.callbacks import MetricsFile
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.checks import check_batch, check_groups
from trainer.training.loop import HostFlags, InnerLoop, Loop, Safety
from trainer.training.nonfinite import Diagnosis, NonfinitePolicy
from trainer.training.options import LoopOptions
from trainer.training.run_folder import check_disk, open_run_folder
from trainer.training.step import TrainStep

_NUM_SEEDS = 2**32
_EMBEDDED_AT_ONCE, _CLASSES_AT_ONCE = 256, 8192


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Configuration of a training run.

  Attributes:
    dataset: records, classes and decoder.
    sampler_fn: builds the sampler of the dataset's training classes.
    step: training step, with encoder, loss and optimizer.
    loop: number of steps, and intervals of logging and saving.
    seed: random seed of the initial weights and of dropout; in 0…2³²−1.
    mining: rounds of mining over the whole corpus; batches are drawn from them after
      the first round. None to use only `sampler_fn`.
  """

  dataset: Dataset
  sampler_fn: Callable[..., PKSampler]
  step: TrainStep
  loop: LoopOptions
  seed: int
  mining: Optional[OfflineMining] = None

  def make_sampler(self) -> PKSampler:
    """Returns the sampler of the training classes."""
    dataset = self.dataset
    return self.sampler_fn(dataset.index, classes=dataset.train_classes)

  def fingerprint(self) -> dict[str, object]:
    """Returns facts outside the configuration that must be equal on all workers."""
    mining = {} if self.mining is None else self.mining.fingerprint()
    return {**self.dataset.index.fingerprint(), **mining}

  def _training_classes(self) -> TrainingClasses:
    labels = np.sort(self.dataset.train_classes)
    index = self.dataset.index
    sizes = np.diff(index.member_table.starts)[labels]
    return TrainingClasses(labels, sizes, index.class_names.hashes[labels])

  def create_variables(self, *, has_centres: bool = True) -> None:
    """Creates the variables of the step, from the seed."""
    tf.keras.utils.set_random_seed(self.seed)
    has_centres &= bool(self.step.loss.tables)
    classes = self._training_classes() if has_centres else None
    self.step.create_variables(self.dataset.decoder.shape, classes)
    set_seed(self.step.encoder, self.seed)


def make_parts(*given: object) -> TrainConfig:
  """Builds the configuration described by gin.

  The seed is set first: a Keras model built by a gin function gets its weights when gin
  calls the function, and not in `create_variables`.

  Args:
    given: the first fields, if they do not come from gin.

  Returns:
    The configuration, without the variables that `create_variables` creates.

  Raises:
    UserError: the seed is not an integer in 0…2³²−1, or a part cannot be built.
  """
  bound = gin.get_bindings("train", resolve_references=False).get("seed")
  seed = copy.deepcopy(bound)  # Resolves a macro, as gin does.
  if seed is not None:
    if not isinstance(seed, int) or not 0 <= seed < _NUM_SEEDS:
      raise UserError(f"train.seed={seed!r} must be an integer in [0, {_NUM_SEEDS}).")
    # Differs from the seed of `create_variables`, so that layers do not start equal.
    tf.keras.utils.set_random_seed((seed + _NUM_SEEDS // 2) % _NUM_SEEDS)
  return TrainConfig(*given)  # type: ignore[arg-type, call-arg]  # The rest is gin's.


class Training(NamedTuple):
  """A training run that is ready to start.

  Attributes:
    loop: runs the remaining steps.
    step: the training step.
    options: of the loop.
    first_step: number of steps completed before.
  """

  loop: Loop
  step: TrainStep
  options: LoopOptions
  first_step: int

  @property
  def num_steps_done(self) -> int:
    """Number of completed steps."""
    return int(self.step.optimizer.iterations.numpy())


def main(run: Run) -> None:
  """Trains to the end, from the newest checkpoint if there is one."""
  with make_strategy(run.hardware, run.fingerprint()).scope():
    workers = current_workers()
    with watching(run, workers.index) as watchdog, training(run, watchdog) as built:
      built.loop.run()
      workers.wait()


@contextlib.contextmanager
def training(run: Run, watchdog: Watchdog) -> Iterator[Training]:
  """Builds a training run under the current strategy, and locks its folder.

  Args:
    run: where the run lives.
    watchdog: watches its steps.

  Yields:
    A training run, restored from the newest checkpoint.

  Raises:
    UserError: parts do not fit each other, the folder or the replicas, or another
      process trains in the folder.
  """
  workers = current_workers()
  num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
  workers.dry_run(
    lambda: _make_parts(num_replicas)[0].create_variables(has_centres=False)
  )
  parts, sampler = _make_parts(num_replicas)
  workers.check_equal(parts.fingerprint())
  with contextlib.ExitStack() as opened:
    workers.run_on_chief(lambda: opened.enter_context(open_run_folder(run)))
    yield _build(run, watchdog, parts, sampler)


def _build(
  run: Run, watchdog: Watchdog, parts: TrainConfig, sampler: PKSampler
) -> Training:
  workers = current_workers()
  dataset, step, loop = parts.dataset, parts.step, parts.loop
  parts.create_variables()
  if workers.num_workers > 1:
    workers.check_equal({"SHA-256 of the initial weights": hash_weights(step.encoder)})
  checkpoints = workers.run_on_all(lambda: _make_checkpoints(run, parts))
  # One more than are kept: the oldest is removed after the newest is written.
  num_bytes = checkpoints.num_bytes * (loop.num_checkpoints_kept + 1)
  workers.run_on_chief(lambda: check_disk(run.model_dir, num_bytes=num_bytes))
  first_step = _restore(run, parts, checkpoints) or 0
  # Save after restoring, so that a refused change does not stay in the folder.
  workers.run_on_chief(lambda: run_config.save_config(run.config, run.model_dir))
  rounds = _make_rounds(run, parts, sampler, checkpoints)
  drawn: BatchSampler = sampler
  if rounds is not None:
    rounds.resume(first_step, loop.num_steps)
    drawn = rounds.sampler
  batches = dataset.training_batches(drawn)
  inner = _make_inner_loop(batches, step, first_step, checkpoints)
  outer = Loop(
    inner=inner,
    optimizer=step.optimizer,
    options=loop,
    images_per_step=math.prod(sampler.shape),
    callbacks=[
      *(_chief_callbacks(run, first_step) if workers.is_chief else ()),
      callbacks.SaveCheckpoint(checkpoints, every_steps=loop.checkpoint_every_steps),
    ],
    safety=Safety(
      checkpoints,
      shutdown.current_preemption(),
      watchdog,
      batches.reporting_bad_records,
      _make_policy(run, parts, drawn, checkpoints),
    ),
    metrics_fns=[rounds.metrics] if rounds is not None else [],
  )
  if rounds is not None:
    outer.add_callback(_change_of_round(rounds, batches, inner, checkpoints))
  callbacks.log_start(run, sampler.shape, step, first_step)
  return Training(outer, step, loop, first_step)


def _change_of_round(
  rounds: Rounds, batches: Batches, inner: InnerLoop, checkpoints: Checkpoints
) -> ChangeRound:
  """Returns the callback that makes the inner loop draw from a new round."""

  def use_round(first_step: int) -> None:
    dataset = batches.dataset(current_workers().shard(), first_step=first_step)
    inner.set_batches(ReplicaBatches(tf.distribute.get_strategy(), dataset))

  return ChangeRound(rounds, save_fn=checkpoints.save, restart_fn=use_round)


def _make_parts(num_replicas: int) -> tuple[TrainConfig, PKSampler]:
  parts = make_parts()
  sampler = parts.make_sampler()
  check_batch(sampler, parts.step, num_replicas)
  for table in parts.step.loss.tables:
    num_batch_classes = min(sampler.shape[0], len(parts.dataset.train_classes))
    table.check_batch(num_batch_classes, len(parts.dataset.train_classes))
  if parts.mining is not None:
    parts.mining.check(parts.loop.steps_per_loop)
    mined = parts.mining.dry_run(parts.dataset, sampler.shape, num_replicas)
    check_groups(mined, parts.step, "OfflineMining.sampler_fn")
  checks.check_tpu_limits_if_on_tpu(parts.step)
  return parts, sampler


def hash_weights(encoder: tf.keras.Model) -> str:
  """Returns a hash of this worker's weights, which each worker may load from a file."""
  digest = hashlib.sha256()
  for variable in encoder.variables:
    local = tf.distribute.get_strategy().experimental_local_results(variable)
    digest.update(local[0].numpy().tobytes())
  return digest.hexdigest()


def _make_checkpoints(run: Run, parts: TrainConfig) -> Checkpoints:
  step = parts.step
  return Checkpoints(
    model_dir=run.model_dir,
    encoder=step.encoder,
    training=TrainingState(
      step.optimizer, step.loss, step.averages, step.cross_batch_memory
    ),
    allows_other_classes=run.allow_config_change,
    num_kept=parts.loop.num_checkpoints_kept,
    is_chief=current_workers().is_chief,
  )


def _restore(run: Run, parts: TrainConfig, checkpoints: Checkpoints) -> Optional[int]:
  """Restores the newest checkpoint on all workers, and returns its step, if any.

  Centres of classes that the checkpoint does not have start at the means of their
  embeddings, if that is configured.
  """
  workers = current_workers()
  step = workers.run_on_all(checkpoints.restore)
  workers.check_equal({f"the step of the newest checkpoint in {run.model_dir}": step})
  for table in parts.step.loss.tables:
    if step is None and table.initial_centres == "means":
      _start_at_means(parts, table, table.labels)
    elif len(checkpoints.new_classes) and table.new_classes == "means":
      _start_at_means(parts, table, table.labels[checkpoints.new_classes])
  return step


def _start_at_means(
  parts: TrainConfig, table: ClassCentres, labels: np.ndarray
) -> None:
  """Sets the centres of classes to the means of their embeddings."""
  dataset = parts.dataset
  embedder = Embedder(
    parts.step.encoder,
    dataset.index,
    dataset.decoder,
    global_batch_size=_EMBEDDED_AT_ONCE,
    replacements=dataset.replacements,
  )
  num_started = 0
  for first in range(0, len(labels), _CLASSES_AT_ONCE):
    means = class_means(embedder, dataset, labels[first : first + _CLASSES_AT_ONCE])
    table.assign_centres(means.class_ids, means.vectors)
    num_started += len(means.class_ids)
  logging.info(
    "The centres of %d classes start at the means of their embeddings%s.",
    num_started,
    f", {len(labels) - num_started} at random" if num_started < len(labels) else "",
  )


def _make_rounds(
  run: Run, parts: TrainConfig, plain: PKSampler, checkpoints: Checkpoints
) -> Optional[Rounds]:
  """Returns the mining rounds of the run; None if there is no mining."""
  if parts.mining is None:
    return None
  mine_fn = None
  if parts.mining.miner is not None:
    mine_fn = parts.mining.miner.make_mine_fn(parts.step, parts.dataset)
  return Rounds(
    parts.mining,
    parts.dataset,
    plain,
    run.model_dir,
    mine_fn=mine_fn,
    continues_unwritten=parts.loop.on_disk_full == "continue",
    oldest_step_fn=lambda: min(checkpoints.steps(), default=0),
  )


def _make_policy(
  run: Run, parts: TrainConfig, sampler: BatchSampler, checkpoints: Checkpoints
) -> NonfinitePolicy:
  workers = current_workers()

  def restore() -> None:
    checkpoints.wait()
    workers.wait()  # Until the chief has written the checkpoint that all restore.
    _restore(run, parts, checkpoints)

  return NonfinitePolicy(
    options=parts.loop,
    optimizer=parts.step.optimizer,
    checkpoints=checkpoints,
    restore_fn=restore,
    diagnose_fn=Diagnosis(
      step=parts.step,
      index=parts.dataset.index,
      sampler=sampler,
      batches=parts.dataset.training_batches(sampler),
      model_dir=run.model_dir if workers.is_chief else None,
    ),
  )


def _chief_callbacks(run: Run, first_step: int) -> list[callbacks.Callback]:
  callbacks.keep_log(run.model_dir)
  metrics_file = MetricsFile(run.model_dir)
  metrics_file.drop_after(first_step)
  return [
    callbacks.ShowProgress(),
    callbacks.WarnOfCollapse(),
    callbacks.WriteMetrics(metrics_file),
    callbacks.WriteEvents(run.model_dir),
    callbacks.SaveOperativeConfig(run.model_dir),
  ]


def _make_inner_loop(
  batches: Batches, step: TrainStep, first_step: int, checkpoints: Checkpoints
) -> InnerLoop:
  dataset = batches.dataset(current_workers().shard(), first_step=first_step)
  strategy = tf.distribute.get_strategy()
  return InnerLoop(
    step=step,
    strategy=strategy,
    batches=ReplicaBatches(strategy, dataset),
    zero_statistics=step.zero_statistics(dataset.element_spec),
    host_flags_fn=lambda: HostFlags(
      shutdown.current_preemption().stop_requested, checkpoints.failure is not None
    ),
  )
