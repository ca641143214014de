"""Options of offline mining, and the sampler that switches between rounds.

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
from trainer.errors import UserError, check_at_least, check_choice
from trainer.mining.miner import Miner
from trainer.mining.round import Round, round_spec
from trainer.retrieval import knn


class PiecewiseSampler:
  """Sampler of a run, a pure function of the step and of the rounds in use.

  Only the current sampler and the one before it are kept, because batches that are read
  ahead may still use the latter. Older samplers are released, which frees the disk
  space of removed rounds.

  Attributes:
    shape: shape of the plain sampler; batches of all rounds have as many records.

  Args:
    plain: sampler used from step 0.
  """

  def __init__(self, plain: BatchSampler):
    self.shape = plain.shape
    # Replaced and never modified: another thread may draw while it reads ahead.
    self._samplers: tuple[tuple[int, BatchSampler], ...] = ((0, plain),)

  def use_from(self, first_step: int, sampler: BatchSampler) -> None:
    """Uses a sampler from a step on, which is not before that of an earlier sampler."""
    self._samplers = (self._samplers[-1], (first_step, sampler))

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, in the shape of the plain sampler."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, as [S, ...] int64.

    Raises:
      ValueError: a step is before the first step of the samplers that are kept.
    """
    firsts, samplers = zip(*self._samplers)
    if (steps < firsts[0]).any():
      raise ValueError(f"Samplers are kept from step {firsts[0]} on; got {min(steps)}.")
    numbers = np.searchsorted(firsts, steps, side="right") - 1
    records = np.empty((len(steps), *self.shape), np.int64)
    for number in np.unique(numbers).tolist():
      rows = np.flatnonzero(numbers == number)
      drawn = draw(samplers[number], steps[rows])
      records[rows] = drawn.reshape(len(rows), *self.shape)
    return records


@gin.register
@dataclasses.dataclass(frozen=True)
class OfflineMining:
  """Options of offline mining: training switches to a new round every `every_steps`.

  Attributes:
    sampler_fn: builds the sampler of a round: `MinedTripletSampler` or
      `neighbouring_class_sampler`. Its batches have as many records as those of
      `train.sampler_fn`, which is used before the first round.
    every_steps: a multiple of `LoopOptions.steps_per_loop`.
    miner: mines in the training process with the current weights (averaged, if averaged
      weights are evaluated). None if `--mode=mine` mines in a separate process, whose
      newest round is used.
    max_age_steps: the largest age of a round, in steps behind the training, when it is
      selected, or kept because there is no newer one. Before the first round, the
      largest number of steps without a round. None for no limit.
    when_too_few: the policy if a round has fewer examples than a batch, as late in a
      successful run there may be few hard examples. "keep" keeps the current batches,
      with a warning; "stop" ends the run.
    max_wait_s: how long to wait for a round that is not too old, seconds.

  Raises:
    UserError: a number is too small, or `when_too_few` is unknown.
  """

  sampler_fn: Callable[..., BatchSampler]
  every_steps: int
  miner: Optional[Miner] = None
  max_age_steps: Optional[int] = None
  max_wait_s: float = 0.0
  when_too_few: str = "keep"

  def __post_init__(self):
    check_at_least("OfflineMining.every_steps", self.every_steps, 1)
    check_at_least("OfflineMining.max_age_steps", self.max_age_steps, 1)
    check_at_least("OfflineMining.max_wait_s", self.max_wait_s, 0)
    check_choice("OfflineMining.when_too_few", self.when_too_few, ("keep", "stop"))

  def fingerprint(self) -> dict[str, object]:
    """Returns the facts that must be equal on all workers, by name."""
    is_mining = self.miner is not None
    return {"FAISS is installed": knn.is_faiss_installed()} if is_mining else {}

  def check(self, steps_per_loop: int) -> None:
    """Checks that rounds begin at the end of an inner loop.

    Args:
      steps_per_loop: steps of an inner loop.

    Raises:
      UserError: `every_steps` is not a multiple of `steps_per_loop`.
    """
    if self.every_steps % steps_per_loop:
      raise UserError(
        f"OfflineMining.every_steps={self.every_steps} must be a multiple of "
        f"LoopOptions.steps_per_loop={steps_per_loop}."
      )

  def check_age(self, step: int, round_step: Optional[int]) -> None:
    """Checks that a round is not too old to train with.

    Args:
      step: number of completed steps.
      round_step: step of the round; None if there is no round.

    Raises:
      UserError: the round is too old.
    """
    if self.max_age_steps is None or step - (round_step or 0) <= self.max_age_steps:
      return
    what = "there is no mining round"
    if round_step is not None:
      what = f"the newest mining round is of step {round_step}"
    if self.miner is None:
      waited = f" after {self.max_wait_s:g} s" if self.max_wait_s else ""
      advice = (
        "check that --mode=mine is running, raise max_age_steps or max_wait_s, or set "
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
    """Checks, before the first round, that rounds will fit.

    Args:
      dataset: as in `make_sampler`.
      plain_shape: as in `make_sampler`.
      num_replicas: as in `make_sampler`.

    Returns:
      A sampler like those of later rounds, but without examples to draw.

    Raises:
      UserError: as in `make_sampler`; or the miner does not mine what the sampler
        draws.
    """
    if self.miner is not None:
      self.miner.check(dataset)
    spec = round_spec(self.miner, dataset)
    return self.make_sampler(spec, dataset, plain_shape, num_replicas)

  def make_sampler(
    self,
    mining_round: Round,
    dataset: Dataset,
    plain_shape: Sequence[int],
    num_replicas: int,
  ) -> BatchSampler:
    """Returns the sampler of a round.

    Args:
      mining_round: a complete round.
      dataset: its training classes are drawn from.
      plain_shape: shape of the plain sampler.
      num_replicas: number of replicas that share the rows.

    Raises:
      UserError: the round lacks what the sampler draws, or a batch differs in size from
        that of the plain sampler, or does not split over the replicas.
    """
    sampler = self.sampler_fn(
      dataset.index, mining_round, classes=dataset.train_classes
    )
    size, plain_size = math.prod(sampler.shape), math.prod(plain_shape)
    if size != plain_size:
      raise UserError(
        f"OfflineMining.sampler_fn makes batches of {_product(sampler.shape)} records, "
        f"train.sampler_fn of {_product(plain_shape)}; make them equal."
      )
    if sampler.shape[0] % num_replicas:
      raise UserError(
        f"{sampler.shape[0]} groups of OfflineMining.sampler_fn do not split over "
        f"{num_replicas} replicas."
      )
    return sampler


def _product(shape: Sequence[int]) -> str:
  return f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
