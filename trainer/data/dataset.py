"""A dataset as a run sees it: records, the two sides of its classes, and a decoder."""

from __future__ import annotations

from typing import Optional

import gin

from trainer.data.augment import Augmentation
from trainer.data.bad_records import Replacements
from trainer.data.decode import Decoder
from trainer.data.pipeline import Batches
from trainer.data.records import RecordIndex
from trainer.data.schedule import Schedule
from trainer.data.split import Split
from trainer.errors import UserError


@gin.register
class Dataset:
  """Records of classes that train, and of others that evaluate.

  Attributes:
    folder: of the records, or their pattern.
    index: the records.
    train_classes: int32 ids.
    evaluation_classes: int32 ids, disjoint from `train_classes`.
    decoder: makes inputs of records.
    replacements: of bad records, by others of their classes; None where bad ones are
      refused.

  Args:
    folder: folder of TFRecord shards with their index, or a pattern of shards.
    split: divides the classes.
    decoder: makes inputs of records.
    augmentation: changes what is trained on at random; None for no change.
    bad_records: "refuse" a record that can't be read or decoded, or, while training
      and mining, "replace" it by another of its class, which is logged.

  Raises:
    UserError: there is no index, one side has no class, or `bad_records` is not known.
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
    if bad_records not in ("refuse", "replace"):
      raise UserError(
        f"Dataset.bad_records={bad_records!r} is not known; choose 'refuse' or "
        "'replace'."
      )
    self.folder = folder
    self.index = RecordIndex.open(folder)
    self.train_classes, self.evaluation_classes = split.split(self.index.class_names)
    self.decoder = decoder
    self._augmentation = augmentation
    self.replacements: Optional[Replacements] = None
    if bad_records == "replace":
      self.replacements = Replacements(self.index, decoder)

  def training_batches(self, schedule: Schedule) -> Batches:
    """The batches of a schedule, augmented, bad records treated as wanted."""
    return Batches(
      self.index,
      schedule,
      self.decoder,
      augmentation=self._augmentation,
      replacements=self.replacements,
    )
