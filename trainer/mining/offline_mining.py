"""Offline mining: how often, by which process, and the sampler over rounds.

Shapes: S steps, B records in a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Callable, Optional

import gin
import numpy as np

from trainer.data.dataset import Dataset
from trainer.data.samplers import BatchSampler, draw
from trainer.errors import UserError
from trainer.mining.miner import Miner
from trainer.mining.round import Round, round_spec
from trainer.retrieval import knn


class PiecewiseSampler:
  """A pure function of the step, given from which steps which rounds hold.

  The one that holds and the one before it are kept: what is read ahead may still be of
  that. Older ones are let go, so that the disk space of rounds that were removed is
  free again.

  Attributes:
    shape: that of the plain sampler; batches of all rounds have as many records.

  Args:
    plain: holds from step 0.
  """

  def __init__(self, plain: BatchSampler):
    self.shape = plain.shape
    # Replaced and never changed: what reads ahead may draw in another thread.
    self._held: tuple[tuple[int, BatchSampler], ...] = ((0, plain),)

  def hold(self, first_step: int, sampler: BatchSampler) -> None:
    """Lets a sampler hold from a step, which is not before that of an earlier one."""
    self._held = (self._held[-1], (first_step, sampler))

  def batch(self, step: int) -> np.ndarray:
    """The record numbers of a step, in the shape of the plain sampler."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, ...] int64, the record numbers of steps [S] int64.

    Raises:
      ValueError: a step is before those of the samplers that are kept.
    """
    firsts, samplers = zip(*self._held)
    if (steps < firsts[0]).any():
      raise ValueError(f"Samplers from step {firsts[0]} on are kept; got {min(steps)}.")
    holding = np.searchsorted(firsts, steps, side="right") - 1
    records = np.empty((len(steps), *self.shape), np.int64)
    for number in np.unique(holding).tolist():
      rows = np.flatnonzero(holding == number)
      drawn = draw(samplers[number], steps[rows])
      records[rows] = drawn.reshape(len(rows), *self.shape)
    return records


@gin.register
@dataclasses.dataclass(frozen=True)
class OfflineMining:
  """At each multiple of so many steps the training goes over to another mining round.

  Attributes:
    sampler_fn: makes the sampler of a round: `MinedTripletSampler`, or
      `with_neighbouring_classes`. A batch has as many records as that of
      `train.sampler_fn`, which holds before the first round.
    every_steps: a multiple of `LoopOptions.steps_per_loop`.
    miner: mines in the training itself, with the weights as they are (averaged, if
      those are evaluated); None where `--mode=mine` mines in a process beside it, of
      which the newest round is taken.
    max_age_steps: how many steps behind the training a round may be when it is taken,
      or when it is kept for want of a newer one; before the first round, how many steps
      may pass without. None for any.
    when_too_few: where a round has fewer examples than a batch, as nothing may be hard
      in the end where training goes well: "keep" the batches as they are, with a
      warning, or "stop".
    max_wait_s: how long to wait for a round that is not too old, seconds.

  Raises:
    UserError: a number is too small, or `when_too_few` is neither.
  """

  sampler_fn: Callable[..., BatchSampler]
  every_steps: int
  miner: Optional[Miner] = None
  max_age_steps: Optional[int] = None
  max_wait_s: float = 0.0
  when_too_few: str = "keep"

  def __post_init__(self):
    for name in ("every_steps", "max_age_steps"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f"OfflineMining.{name}={value} must be at least 1.")
    if self.max_wait_s < 0:
      raise UserError(f"OfflineMining.max_wait_s={self.max_wait_s} is below 0.")
    if self.when_too_few not in ("keep", "stop"):
      raise UserError(
        f"OfflineMining.when_too_few={self.when_too_few!r} is neither keep nor stop."
      )

  def fingerprint(self) -> dict[str, object]:
    """By name, what must be alike on all workers, which search each or together."""
    is_mining = self.miner is not None
    return {"FAISS is installed": knn.is_faiss_installed()} if is_mining else {}

  def check(self, steps_per_loop: int) -> None:
    """Checks that rounds begin where the host looks in.

    Args:
      steps_per_loop: of the loop.

    Raises:
      UserError: they don't.
    """
    if self.every_steps % steps_per_loop:
      raise UserError(
        f"OfflineMining.every_steps={self.every_steps} must be a multiple of "
        f"LoopOptions.steps_per_loop={steps_per_loop}."
      )

  def check_age(self, step: int, round_step: Optional[int]) -> None:
    """Checks that a round is not too old to train with.

    Args:
      step: number of steps done.
      round_step: of the round; None where there is none.

    Raises:
      UserError: it is.
    """
    if self.max_age_steps is None or step - (round_step or 0) <= self.max_age_steps:
      return
    what = "there is no mining round"
    if round_step is not None:
      what = f"the newest mining round is of step {round_step}"
    if self.miner is None:
      waited = f" after {self.max_wait_s:g} s" if self.max_wait_s else ""
      advice = (
        "is --mode=mine running? Raise max_age_steps or max_wait_s, or set "
        "OfflineMining.miner to mine in the training"
      )
    else:
      waited = ""
      advice = "raise max_age_steps, or mine in a wider window"
    raise UserError(
      f"step {step}: {what}{waited}, more than "
      f"OfflineMining.max_age_steps={self.max_age_steps} behind; {advice}."
    )

  def dry_run(
    self, dataset: Dataset, plain_shape: Sequence[int], num_replicas: int
  ) -> BatchSampler:
    """Checks, before there is one, that rounds will fit.

    Args:
      dataset: as in `sampler_of`.
      plain_shape: likewise.
      num_replicas: likewise.

    Returns:
      As those of rounds will be, but with nothing to draw.

    Raises:
      UserError: as `sampler_of`; the miner doesn't look for what is drawn.
    """
    if self.miner is not None:
      self.miner.check(dataset)
    to_come = round_spec(self.miner, dataset)
    return self.sampler_of(to_come, dataset, plain_shape, num_replicas)

  def sampler_of(
    self,
    mining_round: Round,
    dataset: Dataset,
    plain_shape: Sequence[int],
    num_replicas: int,
  ) -> BatchSampler:
    """The sampler of a round.

    Args:
      mining_round: whole.
      dataset: its training classes are drawn from.
      plain_shape: of the plain sampler.
      num_replicas: among which the rows are divided.

    Raises:
      UserError: the round has not what is drawn, or a batch is not as large as that of
        the plain sampler, or does not divide.
    """
    sampler = self.sampler_fn(
      dataset.index, mining_round, classes=dataset.train_classes
    )
    size, plain_size = math.prod(sampler.shape), math.prod(plain_shape)
    if size != plain_size:
      raise UserError(
        f"OfflineMining.sampler_fn makes batches of {_product(sampler.shape)} "
        f"records, and train.sampler_fn of {_product(plain_shape)}; make them equal."
      )
    if sampler.shape[0] % num_replicas:
      raise UserError(
        f"{sampler.shape[0]} groups of OfflineMining.sampler_fn do not split over "
        f"{num_replicas} replicas."
      )
    return sampler


def _product(shape: Sequence[int]) -> str:
  return f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
