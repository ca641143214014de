"""The data set of a run: records, a split of the classes, and a decoder.

Shapes: C classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple, Optional, Protocol

import gin
import numpy as np

from trainer.data.augment import Augmentation
from trainer.data.images import Decoder
from trainer.data.index_arrays import ClassNames
from trainer.data.permutation import mix
from trainer.data.pipeline import Batches
from trainer.data.records import RecordIndex, Replacements
from trainer.data.samplers import BatchSampler
from trainer.errors import UserError, check_choice


class ClassSplit(NamedTuple):
  """Class ids of both sides of a split.

  Attributes:
    train: int32, ascending.
    evaluation: int32, ascending, disjoint from `train`.
  """

  train: np.ndarray
  evaluation: np.ndarray


class Split(Protocol):
  """A split of the classes into training and evaluation."""

  def split(self, class_names: Sequence[str]) -> ClassSplit:
    """Returns the ids of the training and evaluation classes."""


@gin.register
class HashSplit:
  """Split by a stable hash of the class name.

  A class keeps its side when other classes are added.

  Args:
    evaluation_fraction: approximate fraction of held-out classes, 0 < fraction < 1.
    salt: a different salt gives a different split.

  Raises:
    UserError: the fraction is not between 0 and 1.
  """

  def __init__(self, *, evaluation_fraction: float, salt: int = 0):
    if not 0 < evaluation_fraction < 1:
      raise UserError(
        f"HashSplit.evaluation_fraction={evaluation_fraction} must be between 0 and 1."
      )
    self._fraction = evaluation_fraction
    self._salt = salt

  def split(self, class_names: Sequence[str]) -> ClassSplit:
    """Splits the classes.

    Args:
      class_names: C names, by class id.

    Returns:
      Disjoint ids that together cover all classes.

    Raises:
      UserError: a side would be empty.
    """
    hashes = mix(self._salt, ClassNames.from_names(class_names).hashes)
    return _divide(hashes / 2.0**64 < self._fraction)


@gin.register
class ListSplit:
  """Split by explicit lists.

  Args:
    evaluation_classes: names of the held-out classes.
    train_classes: names of the training classes; None for all others.

  Raises:
    UserError: a name is in both lists, or is not text.
  """

  def __init__(
    self,
    *,
    evaluation_classes: Sequence[str],
    train_classes: Optional[Sequence[str]] = None,
  ):
    self._evaluation_classes = _names("evaluation_classes", evaluation_classes)
    self._train_classes = None
    if train_classes is not None:
      self._train_classes = _names("train_classes", train_classes)
    in_both = sorted({*self._evaluation_classes} & {*(self._train_classes or ())})
    if in_both:
      raise UserError(
        f"ListSplit has {in_both[0]!r} in evaluation_classes and in train_classes; "
        "remove it from one."
      )

  def split(self, class_names: Sequence[str]) -> ClassSplit:
    """Splits the classes.

    Args:
      class_names: C names, by class id.

    Returns:
      Disjoint ids; they cover all classes unless `train_classes` excludes some.

    Raises:
      UserError: a name is not a class, or a side would be empty.
    """
    ids = {name: class_id for class_id, name in enumerate(class_names)}
    is_held_out = _chosen(ids, "evaluation_classes", self._evaluation_classes)
    split = _divide(is_held_out)
    if self._train_classes is None:
      return split
    chosen = _chosen(ids, "train_classes", self._train_classes)
    return split._replace(train=np.flatnonzero(chosen).astype(np.int32))


def _names(argument: str, names: Sequence[str]) -> list[str]:
  """Returns the names as a list; refuses a single text, a sequence of letters."""
  if isinstance(names, str) or not all(isinstance(name, str) for name in names):
    raise UserError(
      f"ListSplit.{argument}={names!r} must be a list of class names, each a text in "
      "quotes."
    )
  return list(names)


def _chosen(ids: dict[str, int], argument: str, names: Sequence[str]) -> np.ndarray:
  """Returns [C] bool, true for the named classes."""
  is_chosen = np.zeros(len(ids), bool)
  for name in names:
    if name not in ids:
      nearest = difflib.get_close_matches(name, ids, n=1) or list(ids)[:1]
      raise UserError(
        f"ListSplit.{argument} names {name!r}, which is not a class of the data; did "
        f"you mean {nearest[0]!r}?"
      )
    is_chosen[ids[name]] = True
  return is_chosen


def _divide(is_held_out: np.ndarray) -> ClassSplit:
  evaluation = np.flatnonzero(is_held_out).astype(np.int32)
  train = np.flatnonzero(~is_held_out).astype(np.int32)
  if not len(train) or not len(evaluation):
    raise UserError(
      f"The split of {len(is_held_out)} classes has {len(train)} training and "
      f"{len(evaluation)} evaluation classes; each needs at least one: change "
      "Dataset.split."
    )
  return ClassSplit(train, evaluation)


@gin.register
class Dataset:
  """Records with a split into training and evaluation classes.

  Attributes:
    folder: folder of the records, or a pattern of shards.
    index: index of the records.
    train_classes: int32 ids.
    evaluation_classes: int32 ids, disjoint from `train_classes`.
    decoder: converts records to inputs.
    replacements: replaces bad records by others of their class; None if bad records
      are refused.

  Args:
    folder: folder of TFRecord shards with their index, or a pattern of shards.
    split: splits the classes.
    decoder: converts records to inputs.
    augmentation: random changes of the training inputs; None for no change.
    bad_records: "refuse" a record that can't be read or decoded, or, in training and
      mining, "replace" it by another of its class, which is logged.

  Raises:
    UserError: there is no index, a side has no class, or `bad_records` is unknown.
  """

  def __init__(
    self,
    *,
    folder: str,
    split: Split,
    decoder: Decoder,
    augmentation: Optional[Augmentation] = None,
    bad_records: str = "refuse",
  ):
    check_choice("Dataset.bad_records", bad_records, ("refuse", "replace"))
    self.folder = folder
    self.index = RecordIndex.open(folder)
    self.train_classes, self.evaluation_classes = split.split(self.index.class_names)
    self.decoder = decoder
    self._augmentation = augmentation
    self.replacements: Optional[Replacements] = None
    if bad_records == "replace":
      self.replacements = Replacements(self.index, decoder)

  def training_batches(self, sampler: BatchSampler) -> Batches:
    """Returns the augmented batches of a sampler; bad records follow `bad_records`."""
    return Batches(
      self.index,
      sampler,
      self.decoder,
      augmentation=self._augmentation,
      replacements=self.replacements,
    )
